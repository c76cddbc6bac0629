"""Boundaries of features made by hand: where they are is known, and that a drift has none."""

import itertools

import numpy as np
import pytest

from benchmarks.simulations import anatomy as simulations
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


def p_of(path, draws=99):
    return changepoints.drift_test(path, FAMILIES, draws=draws)["p_adjusted"].min()


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
    assert p_of(path) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_a_drift_is_no_blocks_though_breaks_explain_it(seed):
    path = changepoints.standardise(ramp(seed), FAMILIES)
    assert changepoints.gain(path) > 0.8
    assert p_of(path) > 0.1


def test_a_random_walk_is_rarely_called_blocks():
    walks = np.random.default_rng(0).normal(size=(20, 12, 4)).cumsum(1)
    called = [p_of(changepoints.standardise(walk, FAMILIES), 39) < 0.05 for walk in walks]
    assert sum(called) <= 2


def test_blocks_of_one_family_are_not_drowned_by_the_others():
    generator = np.random.default_rng(0)
    path = generator.normal(size=(18, 4)).cumsum(0)
    path[:, 0] = np.repeat([0.0, 9.0, 0.0], 6) + 0.1 * generator.normal(size=18)
    tests = changepoints.drift_test(changepoints.standardise(path, FAMILIES), FAMILIES, 2, 3, 99)
    assert tests["p_adjusted"].idxmin() == tests["excess"].idxmax() == "a"
    assert tests.loc["a", "p_adjusted"] < 0.05 < tests.loc[changepoints.ALL, "p_drift"]
    assert (tests["p_adjusted"] >= tests["p_drift"]).sum() >= 4


def test_many_families_are_corrected_for():
    """Of paths that drift, each family in a way of its own, fewer than 5 % are called blocks."""
    generator, kinds = np.random.default_rng(1), ("line", "walk", "noise", "exponential")
    called = 0
    for seed in range(25):
        path = changepoints.standardise(simulations.drifting(kinds, 12, generator), simulations.FAMILIES)
        tests = changepoints.drift_test(path, simulations.FAMILIES, 2, 3, 39, seed)
        called += tests["p_adjusted"].min() < 0.05
    assert called <= 3


def test_power_is_high_where_blocks_are_clear_and_low_where_they_are_not():
    clear, faint = (
        changepoints.power(changepoints.standardise(blocks(noise), FAMILIES), FAMILIES, paths=20) for noise in (0.03, 3)
    )
    assert clear > 0.8 > 0.4 > faint


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
    tests = changepoints.drift_test(found, ("a", "a", "b", "c"), 1, draws=9)
    assert tests.isna().all(axis=1).to_dict() == {"a": False, "b": True, "c": False, changepoints.ALL: False}


@pytest.mark.parametrize(("count", "min_size"), [(6, 2), (-1, 2), (1, 0)])
def test_parts_that_do_not_fit_are_refused(count, min_size):
    with pytest.raises(ValueError, match="do not fit into 12 layers; ask for at most"):
        changepoints.breaks(blocks(), count, min_size)


def test_families_have_to_be_named():
    with pytest.raises(ValueError, match="name the family of each of 4 features"):
        changepoints.standardise(blocks(), ("a",))
