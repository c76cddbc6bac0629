import numpy as np
import pandas as pd
import pytest

from surgery import Stack, Wiring, scan, wiring
from surgery.corpus.probes import Probe, ProbeSet
from surgery.scan import halving, rows, schedule
from surgery.stats import comparisons

PROBES = ProbeSet("words", tuple(Probe(f"w{i} w{i + 1} w{2 * i}", f"w{i + 3} w{i}", f"g{i % 2}") for i in range(8)))
SPANS = np.array([(i, j) for i in range(12) for j in range(i + 1, 13)])


def plane(seed, effect=0.0, best=0, harm=0.0, probes=128):
    """Gains of all repeats of 12 layers: prompts and neighbours have noise in common; ``best`` is the top of a hill."""
    rng = np.random.default_rng(seed)
    apart = np.abs(SPANS[:, None] - SPANS[None])
    near = 0.2 + 0.75 * np.exp(-apart[..., 0] / 8 - apart[..., 1] / 1.5) + 0.05 * np.eye(len(SPANS))
    d = rng.standard_exponential((probes, 1)) - 1 + rng.multivariate_normal(np.zeros(len(SPANS)), near, size=probes)
    return d - harm + effect * np.exp(-apart[best].sum(1) / 3)


def searched(d, share=0.15, seed=0, **options):
    asked = []

    def measure(number, probes, spans):
        asked.append((probes, spans))
        return d[np.ix_(probes, spans)]

    gains, effort = halving.rounds(measure, SPANS, ["a", "b"] * (len(d) // 2), 12, share, seed=seed, **options)
    return gains, effort, asked


def test_what_it_runs_is_what_the_schedule_counts_and_stays_within_the_share():
    d = plane(0)
    gains, effort, asked = searched(d)
    everything = schedule.simulate([Wiring.of(12), *wiring.every_repeat(12)]).executions
    executions = sum(
        len(probes) * schedule.simulate([Wiring.of(12), *(Wiring.of(12).repeat(*SPANS[i]) for i in spans)]).executions
        for probes, spans in asked
    )
    assert effort.executions == executions
    assert effort.share == pytest.approx(executions / everything / len(d))
    assert 0.14 < effort.share <= 0.15
    assert sorted(np.concatenate([probes for probes, _ in asked])) == list(range(len(d))), "every probe, once"
    for probes, spans in asked:
        np.testing.assert_array_equal(gains[np.ix_(probes, spans)], d[np.ix_(probes, spans)])
        assert abs((probes % 2).mean() - 0.5) < 0.1, "groups in turn"
    assert np.isfinite(gains).sum() == sum(len(probes) * len(spans) for probes, spans in asked)


def test_the_first_choice_lowers_the_weighted_variance_most():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    covariance, noise = root @ root.T, np.diag(rng.random(6) + 0.5)
    weight, cost = rng.random(6), np.array([3, 1, 4, 1, 5, 2])
    lowered = []
    for i in range(6):
        left = covariance - np.outer(covariance[i], covariance[i]) / (covariance[i, i] + noise[i, i])
        lowered.append(weight @ (np.diag(covariance) - np.diag(left)) / (cost[i] + 1))
    assert halving._choose(covariance, noise, weight, cost, cost[np.argmax(lowered)]).tolist() == [np.argmax(lowered)]
    assert cost[halving._choose(covariance, noise, weight, cost, 9)].sum() <= 9
    assert halving._choose(covariance, noise, weight, cost, 99).tolist() == list(range(6))


def test_a_planted_winner_is_found_and_asked_more_than_others():
    ranks, asked = [], []
    for seed in range(3):
        best = np.random.default_rng(seed).choice(len(SPANS))
        d = plane(seed, 1.2, best)
        gains, effort, _ = searched(d)
        table, _ = halving.estimates(gains, SPANS, 12, list(map(str, range(len(SPANS)))))
        assert not effort.stopped
        ranks.append(table["wiring"].tolist().index(str(best)))
        top = np.argsort(-d.mean(0))[:10]
        asked.append(np.isfinite(gains).sum(0)[top].mean() / np.isfinite(gains).sum(0).mean())
    assert sorted(ranks)[1] < 5
    assert np.mean(asked) > 1.5


def test_where_everything_harms_it_stops_early_and_says_so():
    for seed in range(2):
        _, effort, _ = searched(plane(seed, harm=1.0))
        assert effort.stopped
        assert effort.share < 0.1


def test_nothing_is_claimed_without_an_effect():
    """Family-wise, nominal .025 of searches; the full simulation is benchmarks/simulations/halving.py."""
    claims = 0
    for seed in range(4):
        d = plane(100 + seed, probes=64)
        gains, _, _ = searched(d, seed=seed)
        table, luck = halving.estimates(gains, SPANS, 12, list(map(str, range(len(SPANS)))))
        claims += bool(((table["p_max"] < 0.05) & (table["gain"] > 0)).any())
        assert luck.mean < luck.high
    assert claims <= 1


def test_a_share_of_one_is_the_full_scan(stack_of, tmp_path):
    stack = stack_of("llama")
    every = list(wiring.every_repeat(4))
    found = halving.search(stack, every, PROBES, 1.0, tmp_path)
    frame = scan.run(stack, every, PROBES, metrics=("loglik",))
    gains = comparisons.differences(frame, "loglik").mean()
    np.testing.assert_allclose(found.table["gain"], gains.loc[found.table["wiring"]], atol=1e-5)
    assert (found.table["n_prompts"] == len(PROBES)).all()
    assert found.effort.share == 1
    assert found.table.columns.tolist() == list(halving.COLUMNS)
    assert found.table["gain"].is_monotonic_decreasing
    assert len(list(tmp_path.glob("round_*.csv"))) == found.effort.rounds


def test_killed_and_resumed_it_ends_the_same(stack_of, tmp_path, monkeypatch):
    stack = stack_of("gpt2")
    every = list(wiring.every_repeat(4))
    whole = halving.search(stack, every, PROBES, 0.6, tmp_path / "whole")
    left, append = [7], rows.ResumableTable.append

    def killed(table, block):
        append(table, block)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rows.ResumableTable, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            halving.search(stack, every, PROBES, 0.6, tmp_path / "killed")
    resumed = halving.search(stack, every, PROBES, 0.6, tmp_path / "killed")
    pd.testing.assert_frame_equal(resumed.table, whole.table)
    assert resumed.effort == whole.effort
    monkeypatch.setattr(rows.ResumableTable, "append", lambda *_: pytest.fail("a wiring ran that was there"))
    pd.testing.assert_frame_equal(halving.search(stack, every, PROBES, 0.6, tmp_path / "killed").table, whole.table)


def test_what_is_not_finite_comes_last_and_is_asked_no_more():
    d = plane(0, 3.0, 20)
    d[:, 20] = -np.inf
    d[5] = np.nan
    gains, _, asked = searched(d)
    table, luck = halving.estimates(gains, SPANS, 12, list(map(str, range(len(SPANS)))))
    row = table.set_index("wiring").loc["20"]
    if row["n_prompts"]:
        assert table["wiring"].iloc[-1] == "20"
        assert np.isneginf(row["gain"])
        assert np.isnan(row["gain_low"])
        assert row["p_max"] == 1
        assert sum(20 in spans for _, spans in asked) == 1
    assert np.isfinite(table["gain"].iloc[:-1]).all()
    assert np.isfinite(luck.high)


def test_probes_of_a_cluster_that_are_alike_widen_the_intervals():
    rng = np.random.default_rng(0)
    d = plane(0) + rng.normal(size=(32, 1)).repeat(4, axis=0) * 2
    gains, _, _ = searched(d)
    names = list(map(str, range(len(SPANS))))
    alone, _ = halving.estimates(gains, SPANS, 12, names)
    together, _ = halving.estimates(gains, SPANS, 12, names, [f"c{p // 4}" for p in range(128)])
    width = [(table["gain_high"] - table["gain_low"]).mean() for table in (alone, together)]
    assert width[1] > 1.2 * width[0]
    assert together["n_units"].max() <= 32


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_other_shares_are_refused(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        searched(plane(0, probes=8), share)


def test_other_wirings_are_refused(stack_of):
    with pytest.raises(ValueError, match="one span run twice or left out"):
        halving.search(Stack(stack_of("llama").model), ["3 2 1 0"], PROBES)


def test_recall_by_hand():
    full = pd.DataFrame(
        [(f"w{i}", prompt, "", "loglik", prompt - i, prompt) for i in range(12) for prompt in range(2)],
        columns=["wiring", "prompt", "group", "metric", "value", "baseline"],
    )
    table = pd.DataFrame({"wiring": ["w0", "w9", "w1", "w8", "w7", "w6", "w2"]})
    found = halving.recall(table, full, top=3)
    assert found.looked_at.tolist() == [3, 6, 9]
    assert found.recall.tolist() == [2 / 3, 2 / 3, 1]
