"""Boundaries and verdict of whole networks whose three parts were built in."""

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.simulations import anatomy as simulations
from support.made_up_anatomy import three_parts
from surgery import Stack, anatomy, wiring
from surgery.anatomy import boundaries, draw, ends_against_middle, say
from surgery.instruments import known_networks
from surgery.page import drawing
from surgery.records import tables
from surgery.stats import changepoints
from surgery.stats.bootstrap import weights
from surgery.stats.sampling import Sampling

SHARES = [0.0] * 4 + [1.0] * 4 + [0.0] * 4
# Writes of the ends are .3, those of the middle 1: where a layer reads the one before, only the first sets the size.
GAINS = [0.3] * 4 + [1 / 0.3, 1.0, 1.0, 1.0] + [0.3] * 4
TOKENS = known_networks.tokens(32, 10)


def located(stack, kinds=None):
    return anatomy.locate(stack, TOKENS, kinds, drifts=39, sampling=Sampling(resamples=20))


@pytest.fixture(scope="module")
def known():
    return located(Stack(three_parts(SHARES, GAINS)), ["a", "b"] * 16)


def test_the_boundaries_are_found_within_a_layer_and_the_ends_are_parallel(known):
    for boundary, layer in (("in", 4), ("out", 8)):
        rows = known.boundaries[known.boundaries["boundary"] == boundary]
        assert rows.loc[(rows["layer"] - layer).abs() <= 1, "probability"].sum() > 0.9
    assert (known.ends["verdict"] == "supported").all()
    assert known.ends["kind"].tolist() == ["all", "a", "b"]
    assert abs(known.by_kind["D"][0]) < 0.2


def test_the_reverse_is_contradicted_and_uniform_is_undecided():
    thirds = simulations.thirds
    assert located(simulations.sized(thirds(1, 0, 12), thirds(0.3, 0.9, 12), 0)).ends["verdict"][0] == "contradicted"
    assert located(Stack(three_parts([0.5] * 12))).ends["verdict"][0] == "undecided"


def test_everything_can_be_said_written_and_drawn(known, tmp_path):
    assert "more parallel than the middle is supported" in " ".join(map(str, say.sentences(known.tables, 12)))
    for frame, columns in (
        (known.boundaries, changepoints.COLUMNS),
        (known.segments, changepoints.COLUMNS),
        (known.detectors, anatomy.DETECTORS_COLUMNS),
        (known.agreement, anatomy.AGREEMENT_COLUMNS),
        (known.by_kind, anatomy.KINDS_COLUMNS),
        (known.ends, ends_against_middle.COLUMNS),
    ):
        tables.write(frame, tmp_path / "table.csv", {}, columns)
    for figure in (draw.boundaries(known.boundaries, known.detectors, 12), draw.ends(known.ends)):
        assert drawing.png(figure)[1:4] == b"PNG"


def test_prompts_that_place_the_boundaries_are_not_those_that_test():
    placing, testing = boundaries._halves(["a"] * 9 + ["b"] * 5, seed=3)
    assert sorted([*placing, *testing]) == list(range(14))
    assert sum(i < 9 for i in placing) == 5


def test_features_are_what_they_are_called():
    stack = Stack(three_parts(SHARES, GAINS))
    values = anatomy.features(stack, TOKENS, splits=1, sampling=Sampling(resamples=2))
    assert values.values.shape == (5, 12, 18)
    kappa, cka = values.of("kappa").values, values.of("cka").values
    assert np.abs(kappa[0, 1:]).max() < 0.2
    assert cka[0].diagonal() == pytest.approx(np.ones(12))
    assert np.abs(cka[0] - cka[0].T).max() < 1e-9
    assert np.abs(cka[0]).max() < 1.0001
    assert np.isfinite(values.values).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_features_of_real_architectures(name, opened):
    stack = opened(name)
    tokens = torch.randint(stack.d_vocab, (12, 8), generator=torch.Generator().manual_seed(0))
    assert np.isfinite(anatomy.features(stack, tokens, sampling=Sampling(resamples=3)).values).all()


def test_cka_of_unrelated_streams_is_nothing_though_dimensions_are_many():
    x, y = torch.randn(2, 100, 200, generator=torch.Generator().manual_seed(0)).double()
    assert abs(boundaries._cka([x, y], torch.ones(1, 100).double(), torch.arange(100))[0, 0, 1]) < 0.1


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_cka_of_resamples_is_that_of_tokens_weighed_one_resample_at_a_time(mean):
    generator = torch.Generator().manual_seed(0)
    streams = mean + torch.randn(4, 40, 7, generator=generator).double()
    prompt = torch.randint(9, (40,), generator=generator)
    drawn = weights(9, 20)
    for times, found in zip(drawn, boundaries._cka(list(streams), drawn, prompt), strict=True):
        share = times[prompt] / times[prompt].sum()
        centring = torch.eye(40).double() - share
        flat = [(centring @ x @ x.T @ centring.T * share.outer(share).sqrt()).fill_diagonal_(0) for x in streams]
        plain = torch.tensor([[float((a * b).sum() / a.norm() / b.norm()) for b in flat] for a in flat])
        assert found == pytest.approx(plain, abs=1e-6)


def test_the_brain_scan_shows_where_repeating_helps():
    rows, generator = [], np.random.default_rng(0)
    for repeat in wiring.every_repeat(9):
        inside = repeat.repeated_span()
        gain = 0.0 if inside is None else 1.0 if inside[0] >= 3 and inside[1] <= 6 else -1.0
        rows += [
            {
                "wiring": str(repeat),
                "prompt": prompt,
                "group": "",
                "metric": "loglik",
                "baseline": 0.0,
                "value": gain + 0.1 * generator.normal(),
            }
            for prompt in range(8)
        ]
    skyline = anatomy.functional(pd.DataFrame(rows), 9, resamples=10)
    start, end = skyline.values[0].T
    assert start.argmax() in (3, 4)
    assert end.argmax() in (4, 5)
    with pytest.raises(ValueError, match="scan every_repeat"):
        anatomy.functional(pd.DataFrame(rows).query("wiring in (':', ':4 3:')"), 9)


def of_families(path):
    """Features of as many families as ``path`` has columns."""
    return anatomy.Features(tuple("abcde"[: path.shape[1]]), path[None])


def test_families_that_share_blocks_agree_and_those_that_share_a_drift_do_not():
    generator = np.random.default_rng(0)
    heights = generator.permuted(np.tile([-1.0, 0.0, 1.0], (5, 1)), axis=1).T
    blocks = np.repeat(heights, 8, axis=0) + 0.05 * generator.normal(size=(24, 5))
    drift = np.linspace(-1, 1, 24)[:, None] * np.ones(5) + 0.05 * generator.normal(size=(24, 5))
    shared, smooth = (anatomy.agreement(of_families(path), 3, 99) for path in (blocks, drift))
    assert (shared["sd"] == 0).all()
    assert (shared["p_drift"] < 0.05).all()
    assert (smooth["p_drift"] > 0.1).all()


@pytest.mark.parametrize(("gain", "evidence"), [(1 / 40, "growth"), (40.0, "size")])
def test_a_quiet_or_loud_middle_is_found_by_the_family_that_sees_it(gain, evidence):
    stack = simulations.scaled(simulations.thirds(1.0, gain, 12), seed=0)
    features = anatomy.features(stack, TOKENS, sampling=Sampling(resamples=0))
    table = anatomy.detectors(features, min_size=3, drifts=59).set_index("detector")
    assert table.loc[evidence, "p_adjusted"].max() < 0.05
    assert table.loc[evidence, "layer"].tolist() == [4, 8]
    assert table.loc[changepoints.ALL, "p_drift"].min() > 0.05  # pooled, it would be drowned


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="8 prompts or more and the kind of each, got 4 and 4"):
        anatomy.locate(Stack(known_networks.random_network()), TOKENS[:4])


@pytest.mark.parametrize(("n_layers", "min_size"), [(1, None), (2, None), (4, 2), (3, 0)])
def test_three_parts_need_three_layers(n_layers, min_size):
    stack = Stack(known_networks.random_network(n_layers=n_layers, d_model=16))
    with pytest.raises(ValueError, match="do not fit into the"):
        boundaries.locate(stack, known_networks.tokens(16, 5), min_size=min_size)
