"""What the tables of the anatomy say, in sentences: where the parts divide, and whether their ends differ.

Every sentence is a rule with a least effect, a correction for how much was looked at, and a form in which it is
withheld:

=============  ========================================  =====================================  ======================
sentence       claims if                                 corrected for                          otherwise
=============  ========================================  =====================================  ======================
``parts``      p_drift < .05                             kinds of evidence (in p_drift)         "is not shown", and how
                                                                                                sure that is
``agreement``  p_drift < .05                             two boundaries (Bonferroni)            "no closer together"
``ends``       ``ends_against_middle.verdict``           both ends, S and R/R rotated all have  "undecided", and why
                                                         to agree: no luck to correct for
``by_kind``    p < .05 and a difference of ``LEAST``     kinds (Bonferroni)                     "not clearly different"
=============  ========================================  =====================================  ======================
"""

from collections.abc import Mapping

import pandas as pd

from surgery.anatomy import ends_against_middle
from surgery.anatomy.ends_against_middle import LEAST
from surgery.instruments import massive
from surgery.page.chapters import Sentence
from surgery.page.parts import rows
from surgery.page.phrases import number
from surgery.stats.changepoints import ALL

SURE = 0.05
STABLE = 0.8  # share of resamples that make a boundary stable, and power that makes a miss count against parts


def parts(boundaries: pd.DataFrame, segments: pd.DataFrame, n_layers: int) -> str:
    """Whether there are three parts at all and, if so, where they divide."""
    two = segments.set_index("breaks").loc[2]
    if pd.isna(two["p_drift"]):
        return "No feature varies over layers: there are no parts to be found."
    first = boundaries.sort_values("probability", ascending=False).drop_duplicates("boundary").sort_values("boundary")
    likely = " and ".join(f"{row['layer']} ({row['probability']:.0%})" for row in rows(first))
    if two["p_drift"] < SURE:
        return (
            f"The layers fall into three parts, as {_evidence(two['evidence'])}: divided before layers {likely} of "
            f"{n_layers} (share of resamples), they explain {two['gain']:.0%} of how layers differ there, more than "
            f"they would of smooth drift ({two['gain_drift']:.0%} on average, p = {two['p_drift']:.3f}, corrected for "
            "all kinds of evidence)."
        )
    stable = "stable under resampling" if (first["probability"] >= STABLE).all() else "not even stable under resampling"
    return (
        f"That the layers fall into three parts is not shown: no kind of evidence is divided more clearly than smooth "
        f"drift would be (p = {two['p_drift']:.3f}). {_missed(two['power'])} The best division, before layers {likely} "
        f"of {n_layers}, is {stable}; that a boundary exists is not shown."
    )


def _evidence(name: str) -> str:
    return "all features together show" if name == ALL else f"{name} shows"


def _missed(power: float) -> str:
    """What it means that no parts were shown, from how often they would have been."""
    found = f"Parts as distinct as these seem would be shown in {power:.0%} of such models"
    if power >= STABLE:
        return f"{found}, which speaks against them."
    return f"{found}, so that this says little." if power < 0.5 else f"{found}."


def agreement(frame: pd.DataFrame) -> list[str]:
    """A sentence for each boundary: do the families put it closer together than they would on smooth drift?"""
    sentences = []
    for row in rows(frame):
        if row["n_detectors"] < 2:
            continue
        close = row["p_drift"] < SURE / len(frame)
        together = "closer together than on smooth drift" if close else "no closer together than on smooth drift"
        where = f"between layers {row['earliest']:g} and {row['latest']:g}"
        where = f"before layer {row['earliest']:g} in all" if row["earliest"] == row["latest"] else where
        sentences.append(
            f"The boundary '{row['boundary']}' of {row['n_detectors']} detectors lies {where}: {together} "
            f"(SD {row['sd']:.1f}, there {row['sd_drift']:.1f}, p = {row['p_drift']:.3f})."
        )
    return sentences


def convergence(frame: pd.DataFrame) -> list[str]:
    """A sentence only if content counts for more than language in no layer: then no boundary can be read from it."""
    if (frame.loc[frame["layer"] > 0, "difference"] > 0).any():
        return []
    return [
        "In no layer is content seen to count for more than language (SC > SL): no boundary can be read from there."
    ]


def ends(frame: pd.DataFrame) -> str:
    """Are the ends more parallel than the middle?"""
    return f"That the ends are more parallel than the middle is {verdict(frame.iloc[0])}."


def verdict(contrast: pd.Series) -> str:
    """The verdict on one kind of prompts (``ends_against_middle.verdict``), why it is that, and the numbers."""
    word = ends_against_middle.verdict(contrast)
    if pd.isna(contrast["D"]):
        return f"{word}: an end or the middle holds no window of {int(contrast['length'])} layers"
    reasons = {
        "supported": "both ends are more parallel than the middle",
        "contradicted": "both ends are more serial than the middle",
        "undecided": _undecided(contrast),
    }
    numbers = (
        f"D = {number(contrast, 'D')} (first end {number(contrast, 'D_in')}, last end {number(contrast, 'D_out')}), "
        f"of R/R rotated {number(contrast, 'D_over_rotated')}, p over windows {contrast['p_windows']:.3f} and "
        f"{contrast['p_rotated']:.3f}"
    )
    return f"{word}: {reasons[word]}; {numbers}"


def _undecided(contrast: pd.Series) -> str:
    """Why a contrast of ends and middle is undecided, if it is."""
    if massive.decided_by_one(contrast["token_share"], contrast["n_tokens"]):
        return f"one token holds {contrast['token_share']:.0%} of a variance, so that no claim is made"
    first, last = (_side(contrast, name) for name in ("D_in", "D_out"))
    if first * last < 0:
        size = {-1: "smaller", 1: "larger"}
        return f"the ends disagree, S is {size[first]} in the first than in the middle and {size[last]} in the last"
    if first != last:
        return f"S of only the {'first' if first else 'last'} end differs from that of the middle"
    if pd.isna(contrast["D_low"]):
        return "there is no interval"
    if not first:
        return "the intervals of both ends hold 0"
    if _side(contrast, "D_over_rotated") != first:
        return "the ends differ, but not against the rotation null: the size of the updates may be all"
    if abs(contrast["D"]) < LEAST or abs(contrast["D_over_rotated"]) < LEAST:
        return f"the ends differ by less than {LEAST}"
    return "windows thrown together at random differ as much"


def _side(contrast: pd.Series, name: str) -> int:
    """On which side of 0 an interval lies: -1, 1, or 0 if it holds 0."""
    return int(contrast[f"{name}_low"] > 0) - int(contrast[f"{name}_high"] < 0)


def by_kind(frame: pd.DataFrame) -> list[str]:
    """A sentence for each kind of prompts: does the contrast depend on what is asked?"""
    sentences = []
    for row in rows(frame):
        clear = "not clearly different from"
        if row["p"] < SURE / len(frame):
            clear = "different from" if abs(row["D"]) >= LEAST else f"within {LEAST} of"
        kind, other = row["kind"], row["other"]
        sentences.append(
            f"On {kind}, D is {clear} that on {other}: the difference is {number(row, 'D')}, p = {row['p']:.3f}."
        )
    return sentences


def sentences(tables: Mapping[str, pd.DataFrame], n_layers: int) -> list[Sentence]:
    """All of it; ``tables`` by the names of ``Anatomy.tables``."""
    return [
        Sentence(parts(tables["boundaries"], tables["segments"], n_layers), headline=True),
        *map(Sentence, agreement(tables["agreement"])),
        *map(Sentence, convergence(tables["convergence"]) if "convergence" in tables else ()),
        Sentence(ends(tables["ends"]), headline=True),
        *map(Sentence, by_kind(tables["by_kind"])),
    ]
