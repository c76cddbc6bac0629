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
        (-0.2, -0.3, 0.01, "supported: the ends are more parallel than the middle; D = -0.20 [-0.21, -0.19], of R/N"),
        (0.2, 0.3, 0.01, "contradicted: the ends are more serial than the middle; "),
        (-0.2, -0.3, 0.5, "undecided: windows thrown together at random differ as much; "),
        (0.2, 0.3, 0.5, "undecided: windows thrown together at random differ as much; "),
        (-0.2, 0.0, 0.01, "undecided: the ends differ, but not against the displacement null; "),
        (0.2, -0.3, 0.5, "undecided: the ends differ, but not against the displacement null; "),
        (0.0, 0.3, 0.01, "undecided: the interval holds 0; "),
        (math.nan, math.nan, math.nan, "undecided: an end or the middle holds no window of 2 layers"),
    ],
)
def test_the_verdict_has_a_reason(D, of_ratio, p, expected):
    contrast = made_up_anatomy.ends(D, of_ratio, p).iloc[0]
    assert say.verdict(contrast).startswith(expected)
    assert say.verdict(contrast).endswith(f"p over windows {p:.3f}") is not math.isnan(D)


def test_the_parts_are_told_with_their_probability_and_against_drift():
    tables = made_up_anatomy.tables()
    assert say.parts(tables["boundaries"], tables["segments"], 12) == (
        "Three parts are most likely divided before layers 4 (80%) and 9 (100%) of 12; they explain 70% of how layers "
        "differ, more than smooth drift would (40% on average, p = 0.010)."
    )
    drifting = tables["segments"].assign(p_drift=0.3)
    assert "no more than smooth drift would" in say.parts(tables["boundaries"], drifting, 12)


def test_detectors_that_agree_are_told_from_those_that_do_not():
    close, far = say.agreement(made_up_anatomy.tables()["agreement"])
    assert close.startswith("The boundary 'in' of 5 detectors lies between layers 4 and 5: closer together than chance")
    assert "between layers 3 and 10: no closer together than chance (SD 3.0, at random 2.0, p = 0.900)" in far


def test_no_boundary_is_read_where_content_never_counts_for_more_than_language():
    curve = pd.DataFrame({"layer": [0, 1, 2], "difference": [0.5, -0.1, -0.2]})
    assert say.convergence(curve)[0].startswith("Content never counts for more than language")
    assert say.convergence(curve.assign(difference=[-0.5, 0.1, -0.2])) == []


@pytest.mark.parametrize(("D", "expected"), [(0.2, "is different from"), (0.0, "is not clearly different from")])
def test_kinds_of_prompts_are_compared(D, expected):
    (sentence,) = say.by_kind(made_up_anatomy.by_kind(D))
    assert sentence.startswith(f"On b, D {expected} that on a: the difference is {D:.2f} [")


def test_all_sentences_with_the_parts_and_the_verdict_as_headlines():
    tables = made_up_anatomy.tables()
    sentences = say.sentences(tables, 12)
    assert [str(sentence).split()[0] for sentence in sentences if sentence.headline] == ["Three", "That"]
    assert "That the ends are more parallel than the middle is supported: " in text(sentences)
    assert "Content never" not in text(sentences)
    curve = pd.DataFrame({"layer": [0, 1], "difference": [0.5, -0.1]})
    assert "Content never" in text(say.sentences(tables | {"convergence": curve}, 12))
