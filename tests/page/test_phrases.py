"""How numbers and layers are written."""

import math

import pandas as pd
import pytest

from surgery.page import phrases
from surgery.stats.claims import Effect


def test_runs_of_layers():
    assert phrases.layers([3, 1, 2, 7, 9, 10]) == "layers 1 to 3, 7, 9 to 10"
    assert phrases.layers([4]) == "layer 4"


def test_a_number_with_its_interval():
    assert phrases.interval(0.634, 0.6, 0.66) == "0.63 [0.60, 0.66]"
    assert phrases.interval(0.634, 0.6, 0.66, 3) == "0.634 [0.600, 0.660]"
    assert phrases.interval(0.634, -0.6, 0.66, signed=True) == "+0.63 [-0.60, +0.66]"


def test_what_is_written_where_there_is_no_interval_or_no_number():
    assert phrases.interval(-0.634, math.nan, math.nan, signed=True) == "-0.63 (no interval)"
    assert phrases.interval(0.634, 0.6, math.nan) == "0.63 (no interval)", "half an interval is none"
    assert phrases.interval(math.nan, 0.1, 0.2) == "undefined"
    assert phrases.value(math.nan) == "undefined"
    assert phrases.bracket(math.nan, 0.2) == phrases.bracket(0.1, math.nan) == ""


def test_a_measure_of_a_row():
    row = pd.Series({"S": 0.2, "S_low": 0.1, "S_high": 0.3, "R": 0.5})
    assert phrases.number(row, "S", 1, signed=True) == "+0.2 [+0.1, +0.3]"
    assert phrases.number(row, "R") == "0.50 (no interval)"
    assert phrases.number(row, "O") == "undefined"


def test_a_warning_about_few_prompts():
    assert phrases.few_prompts(pd.DataFrame({"S": [0.1]})) == []
    assert phrases.few_prompts(pd.DataFrame({"n_prompts": [20, 64]})) == []
    (warning,) = phrases.few_prompts(pd.DataFrame({"n_prompts": [64, 19]}))
    assert warning.startswith("19 prompts only")
    (warning,) = phrases.few_prompts(pd.DataFrame({"n_prompts": [1]}))
    assert warning.startswith("1 prompt only")


S = {"S": 0.2, "S_low": 0.1, "S_high": 0.3, "n_prompts": 32}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"S": math.nan}, "undefined"),
        ({"S": math.nan, "n_prompts": 1}, "undefined"),
        ({"n_prompts": 1}, "one prompt has no interval"),
        ({"S_low": math.nan}, "no interval"),
        ({"S_low": 0.2, "S_high": 0.2}, "nothing varies"),
        ({"token_share": 0.73}, "one token holds 73 % of the variance"),
        ({"token_share": 0.02}, None),
    ],
)
def test_why_a_claim_is_withheld(changed, why):
    assert phrases.withheld(pd.Series(S | changed), "S") == why


def test_claims_name_the_least_effect_and_why_they_are_not_made():
    effects = [Effect(0.3, 0.2, 0.4), Effect(-0.3, -0.4, -0.2), Effect(-7e-5, -9e-5, -5e-5), Effect(0.1, -0.1, 0.3)]
    said = phrases.claims([*effects, Effect(0.3)], 0.01, "0.01 nats", "helps", "harms")
    assert said == [
        "helps",
        "harms",
        "no difference that matters (0.01 nats)",
        "undecided",
        "undecided (no interval)",
    ]
