"""Metrics of one's own: what recomputes a built-in one gives it, in portions and files; what has no name is refused."""

import functools

import numpy as np
import pytest
import torch

from support.scans import PROBES, same
from surgery import scan, wiring
from surgery.corpus.probes import Probe, ProbeSet
from surgery.scan import metrics, rows
from surgery.stats import comparisons

WIRINGS = [":", ":2 1:", ":1 {1|2} 3:"]


def my_loglik(log_p, targets):
    return log_p.gather(1, targets[:, None]).sum()


def my_exact(log_p, targets):
    return bool((log_p.argmax(1) == targets).all())


def margin(log_p, targets):
    best = log_p[0].topk(2).values
    return float(best[0] - best[1])


@pytest.mark.parametrize("memory", [None, 60_000])
def test_functions_that_recompute_built_in_metrics_give_them(stack_of, memory):
    frame = scan.run(
        stack_of("llama"), WIRINGS, PROBES, metrics=("loglik", my_exact, "exact", my_loglik), memory=memory
    )
    assert frame["metric"].drop_duplicates().tolist() == ["loglik", "my_exact", "exact", "my_loglik"]
    by_metric = {name: part.reset_index(drop=True) for name, part in frame.groupby("metric")}
    for name in ("loglik", "exact"):
        mine, built_in = by_metric[f"my_{name}"], by_metric[name]
        assert mine[["wiring", "prompt", "group"]].equals(built_in[["wiring", "prompt", "group"]])
        assert np.allclose(mine["value"], built_in["value"], atol=1e-6)
        assert np.allclose(mine["baseline"], built_in["baseline"], atol=1e-6)
        ours, theirs = (comparisons.table(frame, metric, resamples=50) for metric in (f"my_{name}", name))
        assert np.allclose(ours["gain"], theirs["gain"], atol=1e-6)


def test_only_the_right_answer_of_a_probe_with_choices_is_asked_about(stack_of):
    probes = ProbeSet("choose", tuple(Probe(f"w{i} w5", f"w{i}", choices=(f"w{i}", "w7 w8", "w20")) for i in range(4)))
    frame = scan.run(stack_of("gpt2"), WIRINGS, probes, metrics=(my_loglik, "loglik"))
    mine, built_in = (frame.loc[frame["metric"] == name, "value"] for name in ("my_loglik", "loglik"))
    assert np.allclose(mine, built_in, atol=1e-6)


def test_functions_alone_and_by_the_full_logits_of_one_run(stack_of):
    stack = stack_of("gpt2")
    frame = scan.run(stack, [":2 1:"], PROBES, metrics=[margin]).set_index("prompt")
    for number, probe in enumerate(PROBES.probes):
        ids = stack.tokens([f"{probe.prompt} {probe.answer}"]).ids
        logits = stack.run(ids, ":2 1:")[0, -len(probe.answer.split()) - 1]
        best = logits.topk(2).values
        assert frame.loc[number, "value"] == pytest.approx(float(best[0] - best[1]), abs=2e-5)


def test_a_function_is_not_asked_about_what_is_not_finite(stack_of):
    stack = stack_of("llama")
    scorer = scan.Scorer(stack, PROBES.encode(stack), [my_exact])
    x = stack.execute(":2 1:", scorer.context.x0, scorer.context)
    x[2, :, 3] = torch.nan
    values = scorer.rows(":2 1:", x)["value"]
    assert 0 < values.isna().sum() < len(values)


def weighted(by):
    def mine(log_p, targets):
        return by * my_loglik(log_p, targets)

    return mine


def test_a_file_goes_on_with_the_same_function_only(stack_of, tmp_path, monkeypatch):
    stack, wirings, out = stack_of("llama"), list(wiring.every_repeat(4)), tmp_path / "scan.csv"
    expected = scan.run(stack, wirings, PROBES, metrics=("loglik", weighted(2)))
    with monkeypatch.context() as patch:
        patch.setattr(rows.ResumableTable, "close", lambda *_: None)
        scan.run(stack, wirings[:4], PROBES, out, metrics=("loglik", weighted(2)))
    with pytest.raises(ValueError, match="holds another scan, with metrics"):
        scan.run(stack, wirings, PROBES, out, metrics=("loglik", weighted(3)))
    assert same(scan.run(stack, wirings, PROBES, out, metrics=("loglik", weighted(2))), expected)


def test_an_identity_is_the_name_the_source_and_what_is_enclosed():
    assert metrics.identity("loss") == "loss"
    assert metrics.identity(weighted(2)) == metrics.identity(weighted(2)) != metrics.identity(weighted(3))
    tables = [torch.zeros(3000), torch.zeros(3000)]
    tables[1][1500] = 1.0  # where the text of a tensor has dots
    assert metrics.identity(weighted(tables[0])) != metrics.identity(weighted(tables[1]))
    typed: list[dict] = [{}, {}]
    for number, names in enumerate(typed):
        exec(f"def typed(log_p, targets):\n    return {number}.0", names)  # without a source file
    assert metrics.identity(typed[0]["typed"]) != metrics.identity(typed[1]["typed"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([lambda log_p, targets: 0.0], "needs a name for the table, and a lambda has none: write it with def"),
        ([functools.partial(my_loglik)], "and a partial has none"),
        ([my_loglik, my_loglik], "the metric my_loglik is given twice"),
        ([weighted(1), weighted(2)], "the metric mine is given twice"),
        (["loss", "loss"], "the metric loss is given twice"),
        (["accuracy"], "no metric 'accuracy'; there are loglik, .* or a function of your own"),
    ],
)
def test_what_the_table_could_not_name_is_refused(stack_of, asked, said):
    with pytest.raises(ValueError, match=said):
        scan.run(stack_of("gpt2"), [":"], PROBES, metrics=asked)


def test_a_built_in_name_and_what_is_no_number_are_refused(stack_of):
    def loss(log_p, targets):
        return 0.0

    def every(log_p, targets):
        return log_p[:, :3]

    with pytest.raises(ValueError, match="your function loss has the name of a built-in metric"):
        scan.run(stack_of("gpt2"), [":"], PROBES, metrics=[loss])
    with pytest.raises(ValueError, match=r"every must return one number for a probe, not a tensor of shape \[2, 3\]"):
        scan.run(stack_of("gpt2"), [":"], PROBES, metrics=[every])
