"""Sentences about the anatomy: every verdict with its reason, and what agreement and kinds of prompts say."""

import math

import pandas as pd
import pytest

from support import made_up_anatomy
from surgery.anatomy import say


def text(sentences):
    return " ".join(map(str, sentences))


@pytest.mark.parametrize(
    ("D", "of_ratio", "p", "expected"),
    [
        (-0.2, -0.3, 0.01, "supported: both ends are more parallel than the middle; D = -0.20 [-0.21, -0.19] (first"),
        (0.2, 0.3, 0.01, "contradicted: both ends are more serial than the middle; "),
        (-0.2, -0.3, 0.5, "undecided: windows thrown together at random differ as much; "),
        (0.2, 0.3, 0.5, "undecided: windows thrown together at random differ as much; "),
        (-0.04, -0.3, 0.01, "undecided: the ends differ by less than 0.05; "),
        (-0.2, 0.0, 0.01, "undecided: the ends differ, but not against the rotation null: "),
        (0.2, -0.3, 0.5, "undecided: the ends differ, but not against the rotation null: "),
        (0.0, 0.3, 0.01, "undecided: the intervals of both ends hold 0; "),
        (math.nan, math.nan, math.nan, "undecided: an end or the middle holds no window of 2 layers"),
    ],
)
def test_the_verdict_has_a_reason(D, of_ratio, p, expected):
    contrast = made_up_anatomy.ends(D, of_ratio, p).iloc[0]
    assert say.verdict(contrast).startswith(expected)
    assert say.verdict(contrast).endswith(f"p over windows {p:.3f} and {p:.3f}") is not math.isnan(D)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0.32, -0.09, "the ends disagree, S is larger in the first than in the middle and smaller in the last; D = "),
        (-0.3, 0.0, "S of only the first end differs from that of the middle; "),
        (0.0, -0.3, "S of only the last end differs from that of the middle; "),
    ],
)
def test_ends_that_disagree_are_not_averaged(first, last, expected):
    contrast = made_up_anatomy.ends(first=first, last=last).iloc[0]
    assert say.verdict(contrast).startswith(f"undecided: {expected}")
    assert f"(first end {first:.2f} [" in say.verdict(contrast)


def test_where_one_token_decides_nothing_is_claimed():
    contrast = made_up_anatomy.ends().iloc[0]
    assert say.verdict(contrast).startswith("supported: ")
    shared = pd.Series({**contrast, "token_share": 0.4})
    assert say.verdict(shared).startswith("undecided: one token holds 40% of a variance, so that no claim is made; ")


def test_without_resamples_there_is_no_verdict():
    contrast = made_up_anatomy.ends().iloc[0]
    none = {f"{name}_{end}": math.nan for name in ("D", "D_in", "D_out", "D_over_rotated") for end in ("low", "high")}
    assert say.verdict(pd.Series({**contrast, **none})).startswith("undecided: there is no interval; ")


def parts(**changes):
    tables = made_up_anatomy.tables()
    return say.parts(tables["boundaries"], tables["segments"].assign(**changes), 12)


def test_parts_that_are_shown_are_told_by_what_shows_them():
    assert parts() == (
        "The layers fall into three parts, as growth shows: divided before layers 4 (80%) and 9 (100%) of 12 (share of "
        "resamples), they explain 70% of how layers differ there, more than they would of smooth drift (40% on "
        "average, p = 0.010, corrected for all kinds of evidence)."
    )
    assert "as all features together show" in parts(evidence="all features")


@pytest.mark.parametrize(
    ("power", "meaning"),
    [(0.9, "in 90% of such models, which speaks against them."), (0.2, "so that this says little."), (0.6, "models. ")],
)
def test_stable_boundaries_are_not_certain_ones(power, meaning):
    sentence = parts(p_drift=0.96, power=power)
    assert sentence.startswith("That the layers fall into three parts is not shown")
    assert meaning in sentence
    assert sentence.endswith("is stable under resampling; that a boundary exists is not shown.")


def test_boundaries_that_move_are_not_called_stable():
    tables = made_up_anatomy.tables()
    unsure = tables["boundaries"].assign(probability=0.5)
    assert "not even stable under resampling" in say.parts(unsure, tables["segments"].assign(p_drift=0.3), 12)


def test_where_nothing_varies_there_are_no_parts():
    assert parts(p_drift=math.nan) == "No feature varies over layers: there are no parts to be found."


def test_detectors_that_agree_are_told_from_those_that_do_not():
    frame = made_up_anatomy.tables()["agreement"]
    close, far = say.agreement(frame)
    assert close.startswith("The boundary 'in' of 5 detectors lies between layers 4 and 5: closer together than on")
    assert "between layers 3 and 10: no closer together than on smooth drift (SD 3.0, there 2.0, p = 0.900)" in far
    assert "no closer" in say.agreement(frame.assign(p_drift=0.03))[0]  # two boundaries are looked at
    assert "of 5 detectors lies before layer 4 in all: " in say.agreement(frame.assign(latest=frame["earliest"]))[0]
    assert say.agreement(frame.assign(n_detectors=1)) == []


def test_no_boundary_is_read_where_content_never_counts_for_more_than_language():
    curve = pd.DataFrame({"layer": [0, 1, 2], "difference": [0.5, -0.1, -0.2]})
    assert say.convergence(curve)[0].startswith("In no layer is content seen to count for more than language")
    assert say.convergence(curve.assign(difference=[-0.5, 0.1, -0.2])) == []


@pytest.mark.parametrize(
    ("D", "p", "expected"),
    [
        (0.2, 0.01, "is different from"),
        (0.2, 0.1, "is not clearly different from"),
        (0.03, 0.01, "is within 0.05 of"),
    ],
)
def test_kinds_of_prompts_are_compared(D, p, expected):
    (sentence,) = say.by_kind(made_up_anatomy.by_kind(D, p))
    assert sentence.startswith(f"On b, D {expected} that on a: the difference is {D:.2f} [")


def test_all_sentences_with_the_parts_and_the_verdict_as_headlines():
    tables = made_up_anatomy.tables()
    sentences = say.sentences(tables, 12)
    assert [str(sentence).split()[0] for sentence in sentences if sentence.headline] == ["The", "That"]
    assert "That the ends are more parallel than the middle is supported: " in text(sentences)
    assert "In no layer" not in text(sentences)
    curve = pd.DataFrame({"layer": [0, 1], "difference": [0.5, -0.1]})
    assert "In no layer" in text(say.sentences(tables | {"convergence": curve}, 12))
