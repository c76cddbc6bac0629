"""Boundaries of features made by hand: where they are is known, and that a drift has none."""

import itertools

import numpy as np
import pytest

from surgery.stats import changepoints

FAMILIES = ("a", "b", "c", "d")


def blocks(noise=0.1, seed=0, sizes=(4, 5, 3)):
    generator = np.random.default_rng(seed)
    return np.repeat(generator.normal(size=(len(sizes), 4)), sizes, axis=0) + noise * generator.normal(size=(12, 4))


def ramp(seed=0):
    generator = np.random.default_rng(seed)
    return np.linspace(0, 1, 12)[:, None] * generator.choice([-1.0, 1.0], size=4) + 0.03 * generator.normal(
        size=(12, 4)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_breaks_are_the_best_of_all(seed):
    path = np.random.default_rng(seed).normal(size=(9, 3))
    every = [(a, b) for a, b in itertools.combinations(range(2, 8), 2) if b - a >= 2]
    best = min(every, key=lambda cut: changepoints.cost(path, cut))
    assert changepoints.breaks(path, 2, 2) == best


def test_blocks_are_found_and_are_no_drift():
    path = changepoints.standardise(blocks(), FAMILIES)
    assert changepoints.breaks(path) == (4, 9)
    assert changepoints.gain(path) > 0.9
    assert changepoints.drift_null(path, FAMILIES, draws=99)[0] < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_a_drift_is_no_blocks_though_breaks_explain_it(seed):
    path = changepoints.standardise(ramp(seed), FAMILIES)
    assert changepoints.gain(path) > 0.8
    assert changepoints.drift_null(path, FAMILIES, draws=99)[0] > 0.1


def test_a_random_walk_is_rarely_called_blocks():
    walks = np.random.default_rng(0).normal(size=(20, 12, 4)).cumsum(1)
    called = [
        changepoints.drift_null(changepoints.standardise(walk, FAMILIES), FAMILIES, draws=39)[0] < 0.05
        for walk in walks
    ]
    assert sum(called) <= 2


def test_the_posterior_spreads_as_the_noise_does():
    sure = np.stack([blocks(0.05, 0) + 0.05 * np.random.default_rng(i).normal(size=(12, 4)) for i in range(40)])
    unsure = np.stack([blocks(0.05, 0) + 1.5 * np.random.default_rng(i).normal(size=(12, 4)) for i in range(40)])
    likely = [changepoints.posterior(changepoints.places(paths))["probability"].max() for paths in (sure, unsure)]
    assert likely[0] == 1 > likely[1]
    assert (
        changepoints.posterior(changepoints.places(unsure))
        .groupby("boundary")["probability"]
        .sum()
        .round(9)
        .eq(1)
        .all()
    )


def test_held_out_prompts_prefer_the_true_number_of_breaks():
    true = np.repeat(np.random.default_rng(1).normal(size=(3, 4)), 4, axis=0)
    generator = np.random.default_rng(0)
    halves = [tuple(true + 0.3 * generator.normal(size=(12, 4)) for _ in range(2)) for _ in range(40)]
    table = changepoints.heldout(halves, FAMILIES).set_index("breaks")["heldout_error"]
    assert table.idxmin() == 2
    assert table[0] == pytest.approx(1)


def test_families_count_alike_and_what_does_not_vary_is_nothing():
    path = np.stack([np.arange(6.0), np.arange(6.0) ** 2, np.full(6, 3.0), np.arange(6.0) * -7], 1)
    found = changepoints.standardise(path, ("a", "a", "b", "c"))
    assert (found**2).sum(0) == pytest.approx([3, 3, 0, 6])
    assert np.isnan(changepoints.gain(np.ones((6, 1))))


@pytest.mark.parametrize(("count", "min_size"), [(6, 2), (-1, 2), (1, 0)])
def test_parts_that_do_not_fit_are_refused(count, min_size):
    with pytest.raises(ValueError, match="do not fit into 12 layers; ask for at most"):
        changepoints.breaks(blocks(), count, min_size)


def test_families_have_to_be_named():
    with pytest.raises(ValueError, match="name the family of each of 4 features"):
        changepoints.standardise(blocks(), ("a",))
