"""D and its verdict on networks whose ends and middle are known to be parallel or serial."""

import numpy as np
import pytest
import torch

from benchmarks.simulations import anatomy as simulations
from support.exact_networks import ragged
from support.made_up_anatomy import three_parts
from surgery import Stack, series
from surgery.anatomy import ends_against_middle, say
from surgery.instruments import known_networks
from surgery.series import side_by_side
from surgery.stats.sampling import Sampling

TOKENS = known_networks.tokens(24)
PLACES = [(4, 8)]


def verdict(shares, seed=0):
    profile = ends_against_middle.measure(
        Stack(three_parts(shares, seed=seed)), TOKENS, sampling=Sampling(resamples=60)
    )
    contrast = ends_against_middle.ends(profile, PLACES)
    return ends_against_middle.verdict(contrast), contrast


def test_parallel_ends_around_a_serial_middle():
    word, contrast = verdict([0.0] * 4 + [1.0] * 4 + [0.0] * 4)
    assert word == "supported"
    assert contrast["D"] == pytest.approx(-1, abs=1e-6)
    assert [contrast[name] for name in ("S_in", "S_middle", "S_out")] == pytest.approx([0, 1, 0], abs=1e-6)


def test_serial_ends_around_a_parallel_middle():
    word, contrast = verdict([1.0] * 4 + [0.0] * 4 + [1.0] * 4)
    assert word == "contradicted"
    assert contrast["D"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("share", "seed"), [(0.0, 0), (0.5, 1), (1.0, 0)])
def test_a_uniform_network_is_undecided(share, seed):
    assert verdict([share] * 12, seed)[0] == "undecided"


def test_the_contrast_falls_as_the_middle_becomes_serial():
    D = [verdict([0.25] * 4 + [share] * 4 + [0.25] * 4)[1]["D"] for share in (0.0, 0.5, 1.0)]
    assert D[0] > D[1] + 0.1 > D[2] + 0.2


def test_one_end_alone_does_not_decide_for_both():
    word, contrast = verdict([0.0] * 4 + [1.0] * 8)
    assert contrast["D_in"] == pytest.approx(-1, abs=1e-6)
    assert contrast["D_out"] == pytest.approx(0, abs=1e-6)
    assert word == "undecided"
    assert "only the first end" in say.verdict(contrast)
    assert contrast["D"] == pytest.approx(-0.5, abs=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("length", [2, 3])
def test_the_profile_is_that_of_series(name, length, opened):
    stack = opened(name)
    tokens = torch.randint(stack.d_vocab, (6, 8), generator=torch.Generator().manual_seed(0))
    profile = ends_against_middle.measure(stack, tokens, length, sampling=Sampling(resamples=10, batch_size=4))
    frame = series.windows(stack, tokens, length, damage=False, sampling=Sampling(resamples=10))
    frame = frame[frame["stop"] - frame["start"] == length]
    assert profile.S[0].tolist() == pytest.approx(frame["S"].tolist(), rel=1e-4)
    assert profile.R_over_rotated[0].tolist() == pytest.approx(frame["R_over_rotated"].tolist(), rel=1e-4)
    low = torch.quantile(profile.S[1:], 0.025, dim=0)
    assert low.tolist() == pytest.approx(frame["S_low"].tolist(), rel=1e-4)


def test_padding_does_not_matter():
    stack = Stack(known_networks.random_network(n_layers=3))
    left, right = (
        ends_against_middle.measure(stack, ragged(side), sampling=Sampling(resamples=3)) for side in ("left", "right")
    )
    assert left.S.numpy() == pytest.approx(right.S.numpy(), rel=1e-4)


def test_the_cost_is_as_stated():
    stack = Stack(known_networks.random_network(n_layers=4))
    with side_by_side.counted_layers() as count:
        ends_against_middle.measure(stack, TOKENS, 3, sampling=Sampling(resamples=0, skip_massive=False))
    assert count[0] / TOKENS.numel() == 3 * 4 + 2 * 2 * (3 - 1)


def test_unsure_boundaries_widen_the_interval():
    profile = ends_against_middle.measure(
        Stack(three_parts([0.0] * 4 + [1.0] * 4 + [0.0] * 4)), TOKENS, sampling=Sampling(resamples=60)
    )
    moved = np.array([(4, 8), *[(3, 8), (5, 9), (4, 7)] * 20])
    sure, unsure = ends_against_middle.ends(profile, PLACES), ends_against_middle.ends(profile, moved)
    assert unsure["D"] == sure["D"]
    assert unsure["D_high"] > sure["D_high"] + 0.05
    assert ends_against_middle.difference(profile, profile, moved) == {"D": 0, "D_low": 0, "D_high": 0, "p": 1}


def test_an_end_without_a_window_leaves_it_undecided_and_says_so():
    profile = ends_against_middle.measure(Stack(three_parts([0.5] * 6)), TOKENS, sampling=Sampling(resamples=5))
    contrast = ends_against_middle.ends(profile, [(2, 4)])
    assert ends_against_middle.verdict(contrast) == "undecided"
    assert "holds no window of 2 layers" in say.verdict(contrast)


def test_bad_input_is_refused():
    stack = Stack(known_networks.random_network(n_layers=3))
    with pytest.raises(ValueError, match="windows have 2 to 3 layers"):
        ends_against_middle.measure(stack, TOKENS, 4)
    with pytest.raises(ValueError, match="0 < in < out < 3"):
        ends_against_middle.ends(ends_against_middle.measure(stack, TOKENS, sampling=Sampling(resamples=2)), [(2, 3)])


@pytest.mark.parametrize("seed", [0, 1])
def test_ends_at_a_tenth_and_a_larger_serial_middle_are_told_apart(seed):
    assert simulations.told(simulations.thirds(0.1, 0.6, 12), simulations.thirds(0.3, 0.9, 12), seed) == "supported"


@pytest.mark.parametrize(("share", "middle"), [(0.3, 0.9), (None, 0.1)])
def test_sizes_of_updates_alone_are_no_difference(share, middle):
    shares = share and [share] * 12
    assert simulations.told(shares, simulations.thirds(0.3, middle, 12), seed=0) == "undecided"
