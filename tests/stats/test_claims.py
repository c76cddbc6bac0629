"""Claims: what an interval allows, that none is made of what is undefined, and how often a family holds a wrong one."""

import math

import numpy as np
import pandas as pd
import pytest

from surgery.stats.claims import ABOVE, BELOW, UNDECIDED, WITHIN, Effect, largest, sides

NAN = math.nan


@pytest.mark.parametrize(
    ("effect", "said"),
    [
        (Effect(0.2, 0.15, 0.25), ABOVE),
        (Effect(0.2, 0.1, 0.3), ABOVE),  # it ends at the least effect
        (Effect(0.2, 0.09, 0.31), UNDECIDED),
        (Effect(-0.2, -0.25, -0.15), BELOW),
        (Effect(-7e-5, -9e-5, -5e-5), WITHIN),  # clear, and of no matter
        (Effect(0.0, -0.2, 0.2), UNDECIDED),
    ],
)
def test_an_effect_is_what_its_whole_interval_is(effect, said):
    assert effect.side(0.1) == said


@pytest.mark.parametrize(
    ("effect", "why"),
    [
        (Effect(NAN, NAN, NAN), "undefined"),
        (Effect(math.inf, 1.0, 2.0), "undefined"),
        (Effect(NAN, 0.1, 0.2), "undefined"),
        (Effect(0.5), "no interval"),
        (Effect(0.5, 0.4, NAN), "no interval"),
        (Effect(0.5, 0.5, 0.5), "nothing varies"),
        (Effect.of_seeds([0.5]), "one seed tells nothing"),
        (Effect.of_seeds([0.5, NAN]), "one seed tells nothing"),
        (Effect.of_row(pd.Series({"S": 0.5}), "S"), "no interval"),
    ],
)
def test_nothing_is_claimed_of_what_is_undefined_or_has_no_interval(effect, why):
    assert (effect.defined, effect.missing) == (False, why)
    assert math.isnan(effect.p(0.1))
    assert effect.side(0.0) == UNDECIDED
    assert sides([effect, Effect(0.2, 0.15, 0.25)], 0.1) == [UNDECIDED, ABOVE], "and it does not count as a comparison"
    assert largest({"this": effect, "other": Effect(0.2, 0.15, 0.25)}) == [], "the undefined one may be the largest"


def test_p_is_the_level_at_which_the_interval_reaches_the_least_effect():
    values = np.array([0.31, 0.22, 0.27, 0.38, 0.25])
    for df, effect in ((4, Effect.of_seeds(values)), (math.inf, Effect(0.2, 0.1, 0.3))):
        assert effect.df == df
        assert effect.p(effect.low) == pytest.approx(0.05)
        assert effect.p(effect.high + 1.0) < 1e-3, "well within"


def simulated(truths, least, n, families, seed):
    """How often a family holds any wrong claim, by itself (before) and corrected."""
    generator = np.random.default_rng(seed)
    right = [ABOVE if t > least else BELOW if t < -least else WITHIN for t in truths]
    wrong = np.zeros(2)
    for _ in range(families):
        effects = [Effect.of_seeds(t + generator.standard_normal(n)) for t in truths]
        for place, said in enumerate(([e.side(least) for e in effects], sides(effects, least))):
            wrong[place] += any(s not in (UNDECIDED, r) for s, r in zip(said, right, strict=True))
    return wrong / families


@pytest.mark.parametrize("truth", [0.0, 0.3])  # nothing there; at the least effect itself, where error is likeliest
def test_one_family_in_twenty_holds_a_wrong_claim_and_not_one_effect(truth):
    alone, corrected = simulated([truth] * 8, truth, 8, 500, seed=1)
    assert alone > 0.12
    assert corrected <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 500)


def test_a_ranking_names_all_that_are_not_told_apart():
    wide, other, far = Effect(0.37, 0.3, 0.44), Effect(0.35, 0.28, 0.42), Effect(0.22, 0.15, 0.28)
    assert largest({"5 to 7": wide, "9 to 11": other, "7 to 9": far}) == ["5 to 7", "9 to 11"]
    assert largest({"7 to 9": far, "5 to 7": wide}) == ["5 to 7"]
    assert largest({}) == []
