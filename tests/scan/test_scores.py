"""Every metric against the full logits of one unpadded run."""

import numpy as np
import pytest
import torch

from support.scans import PROBES
from surgery import Stack, Wiring, scan
from surgery.corpus.probes import Probe, ProbeSet
from surgery.scan import scores


def by_hand(stack: Stack, wiring: Wiring, probe: Probe) -> dict[str, float]:
    """The metrics of one probe from the full logits of one unpadded run."""
    ids = stack.tokens([f"{probe.prompt} {probe.answer}"]).ids
    count = len(probe.answer.split())
    log_p, clean = (stack.run(ids, w)[0, -count - 1 : -1].log_softmax(-1) for w in (wiring, ":"))
    targets = ids[0, -count:]
    picked = log_p.gather(1, targets[:, None])
    return {
        "loglik": float(picked.sum()),
        "exact": float((log_p.argmax(1) == targets).all()),
        "credit": float(
            (log_p.argmax(1) == targets).float() @ torch.tensor([float(len(w)) for w in probe.answer.split()])
        )
        / len("".join(probe.answer.split())),
        "loss": -float(picked.mean()),
        "kl": float((clean.exp() * (clean - log_p)).sum(1).mean()),
    }


def test_metrics_by_hand(stack_of):
    stack = stack_of("llama")
    wirings = [":", ":2 1:", ":1 {1|2} 3:"]
    frame = scan.run(stack, wirings, PROBES, metrics=("loglik", "exact", "credit", "loss", "kl"))
    assert list(frame.columns) == ["wiring", "prompt", "group", "metric", "value", "baseline"]
    assert len(frame) == len(wirings) * len(PROBES.probes) * 5
    for text in wirings:
        for index, probe in enumerate(PROBES.probes):
            expected, clean = (by_hand(stack, stack.wiring(w), probe) for w in (text, ":"))
            rows = frame[(frame.wiring == str(stack.wiring(text))) & (frame.prompt == index)].set_index("metric")
            assert (rows.group == probe.group).all()
            for metric, value in expected.items():
                assert rows.value[metric] == pytest.approx(value, abs=2e-5), (text, metric)
                assert rows.baseline[metric] == pytest.approx(clean[metric], abs=2e-5), (text, metric)


def test_every_metric_of_a_stream_that_is_not_finite_is_nan(stack_of):
    stack = stack_of("llama")
    chosen = ProbeSet(  # whose choices are sequences of their own
        "choose", tuple(Probe(f"w{i} w5", f"w{i} w1", choices=(f"w{i} w1", "w7 w1", "w20 w1")) for i in range(4))
    )
    encoded = chosen.encode(stack)
    scorer = scan.Scorer(stack, encoded, scan.METRICS)
    x = stack.execute(":2 1:", scorer.context.x0, scorer.context)
    whole = scorer.rows(":2 1:", x).set_index(["metric", "prompt"])["value"]
    for broken in (np.nan, np.inf):
        for choice in range(3):  # of the second probe
            row = next(i for i, at in enumerate(zip(encoded.probe, encoded.choice)) if at == (1, choice))
            overflowing = x.clone()
            overflowing[row, -1, 3] = broken
            values = scorer.rows(":2 1:", overflowing).set_index(["metric", "prompt"])["value"]
            undefined = {(metric, 1) for metric in scan.METRICS} if choice == 0 else {("choice", 1)}
            assert set(values.index[values.isna()]) == undefined
            assert values.dropna().equals(whole[values.notna()])


def test_tokens_of_probability_zero_add_nothing_to_the_divergence(stack_of, monkeypatch):
    stack = stack_of("llama")
    expected = scan.run(stack, [":2 1:"], PROBES, metrics=("kl",))["value"]
    logits_of = scores.readout.logits

    def masked(*arguments):
        logits = logits_of(*arguments)
        logits[:, -1] = -torch.inf
        return logits

    monkeypatch.setattr(scores.readout, "logits", masked)
    assert np.allclose(scan.run(stack, [":2 1:"], PROBES, metrics=("kl",))["value"], expected, atol=0.1)


def test_choices(stack_of):
    stack = stack_of("gpt2")
    probes = ProbeSet("choose", tuple(Probe(f"w{i} w5", f"w{i}", choices=(f"w{i}", "w7 w8", "w20")) for i in range(4)))
    frame = scan.run(stack, [":", ":1 2:"], probes, metrics=("choice", "loglik"))
    for row in frame[frame.metric == "choice"].itertuples():
        loglik = [
            by_hand(stack, stack.wiring(row.wiring), Probe(f"w{row.prompt} w5", choice))["loglik"]
            for choice in (f"w{row.prompt}", "w7 w8", "w20")
        ]
        assert row.value == float(np.argmax(loglik) == 0)
    with pytest.raises(ValueError, match="needs probes with choices"):
        scan.run(stack, [":"], PROBES, metrics=("choice",))


def test_an_unknown_metric_is_refused(stack_of):
    with pytest.raises(ValueError, match="no metric 'accuracy'; there are loglik"):
        scan.run(stack_of("gpt2"), [":"], PROBES, metrics=("accuracy",))
