"""When a layer is said to restore: slope, excess over the nulls, displacements shortened, all of them surely."""

import math

import pandas as pd
import pytest

from surgery.reversion.kappa import restoring


@pytest.mark.parametrize(
    ("slope", "excess", "left", "expected"),
    [
        ((0.2, 0.4), (0.1, 0.3), (0.7, 0.9), "yes"),
        ((0.2, 0.4), (0.1, 0.3), (0.97, 0.99), "no"),  # shortened by less than is spoken of
        ((0.2, 0.4), (0.1, 0.3), (1.0, 1.0), "no"),  # only turned
        ((0.2, 0.4), (0.1, 0.3), (0.7, 1.2), "undecided"),  # too noisy to tell
        ((0.2, 0.4), (0.1, 0.3), (1.1, 1.3), "no"),
        ((0.2, 0.4), (-0.1, 0.3), (0.7, 0.9), "undecided"),  # not above the nulls
        ((0.0009, 0.0011), (0.0009, 0.0011), (0.7, 0.9), "no"),  # surely above 0, and nothing
        ((-0.4, -0.2), (-0.4, -0.2), (0.7, 0.9), "no"),
        ((-0.2, 0.2), (-0.2, 0.2), (0.7, 0.9), "undecided"),
        ((math.nan, math.nan), (math.nan, math.nan), (0.7, 0.9), "undecided"),
        ((math.nan, math.nan), (math.nan, math.nan), (1.1, 1.3), "no"),  # whatever the slope is
    ],
)
def test_restoring(slope, excess, left, expected):
    assert restoring(one_layer(slope, excess, left)) == [expected]


def one_layer(slope, excess, left, **more):
    intervals = {"kappa": slope, "remaining_random": left, "remaining_difference": (0.7, 0.8)}
    intervals |= {
        "remaining_principal": (0.7, 0.8),
        "kappa_excess_rotated": excess,
        "kappa_excess_token_shuffled": excess,
    }
    row = {
        f"{name}{end}": value
        for name, (low, high) in intervals.items()
        for end, value in (("", (low + high) / 2), ("_low", low), ("_high", high))
    }
    return pd.DataFrame([row | more])


def test_restoring_is_corrected_for_the_number_of_layers():
    barely = one_layer((0.06, 0.26), (0.06, 0.26), (0.7, 0.8))  # by itself just above the least effect
    assert restoring(barely) == ["yes"]
    assert restoring(pd.concat([barely] * 6)) == ["undecided"] * 6


def test_nothing_is_claimed_where_one_token_holds_the_variance():
    frame = pd.concat([one_layer((0.2, 0.4), (0.1, 0.3), (0.7, 0.9), token_share=share) for share in (0.02, 0.4)])
    assert restoring(frame) == ["yes", "undecided"]
