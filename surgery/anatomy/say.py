"""What the tables of the anatomy say, in sentences: where the parts divide, and whether their ends differ."""

from collections.abc import Mapping

import pandas as pd

from surgery.anatomy import ends_against_middle
from surgery.page.chapters import Sentence
from surgery.page.parts import rows
from surgery.page.phrases import number

SURE = 0.05


def parts(boundaries: pd.DataFrame, segments: pd.DataFrame, n_layers: int) -> str:
    """Where the three parts divide, and whether they explain more than smooth drift would."""
    two = segments.set_index("breaks").loc[2]
    first = boundaries.sort_values("probability", ascending=False).drop_duplicates("boundary").sort_values("boundary")
    likely = " and ".join(f"{row['layer']} ({row['probability']:.0%})" for row in rows(first))
    real = "more than" if two["p_drift"] < SURE else "no more than"
    return (
        f"Three parts are most likely divided before layers {likely} of {n_layers}; they explain "
        f"{two['gain']:.0%} of how layers differ, {real} smooth drift would ({two['gain_drift']:.0%} on average, "
        f"p = {two['p_drift']:.3f})."
    )


def agreement(frame: pd.DataFrame) -> list[str]:
    """A sentence for each boundary: do the detectors put it closer together than chance would?"""
    sentences = []
    for row in rows(frame):
        together = "closer together than chance" if row["p_random"] < SURE else "no closer together than chance"
        sentences.append(
            f"The boundary '{row['boundary']}' of {row['n_detectors']} detectors lies between layers "
            f"{row['earliest']:g} and {row['latest']:g}: {together} (SD {row['sd']:.1f}, at random "
            f"{row['sd_random']:.1f}, p = {row['p_random']:.3f})."
        )
    return sentences


def convergence(frame: pd.DataFrame) -> list[str]:
    """A sentence only if content counts for more than language in no layer: then no boundary can be read from it."""
    if (frame.loc[frame["layer"] > 0, "difference"] > 0).any():
        return []
    return ["Content never counts for more than language (SC > SL): no boundary can be read from there."]


def ends(frame: pd.DataFrame) -> str:
    """Are the ends more parallel than the middle?"""
    return f"That the ends are more parallel than the middle is {verdict(frame.iloc[0])}."


def verdict(contrast: pd.Series) -> str:
    """The verdict on one kind of prompts (``ends_against_middle.verdict``), why it is that, and the numbers."""
    word = ends_against_middle.verdict(contrast)
    if pd.isna(contrast["D"]):
        return f"{word}: an end or the middle holds no window of {int(contrast['length'])} layers"
    reasons = {
        "supported": "the ends are more parallel than the middle",
        "contradicted": "the ends are more serial than the middle",
        "undecided": _undecided(contrast),
    }
    numbers = (
        f"D = {number(contrast, 'D')}, of R/N {number(contrast, 'D_over_N')}, "
        f"p over windows {contrast['p_windows']:.3f}"
    )
    return f"{word}: {reasons[word]}; {numbers}"


def _undecided(contrast: pd.Series) -> str:
    """Why a contrast of ends and middle is undecided, if it is."""
    below, above = contrast["D_high"] < 0, contrast["D_low"] > 0
    if (below and contrast["D_over_N_high"] < 0) or (above and contrast["D_over_N_low"] > 0):
        return "windows thrown together at random differ as much"
    if below or above:
        return "the ends differ, but not against the displacement null"
    return "the interval holds 0"


def by_kind(frame: pd.DataFrame) -> list[str]:
    """A sentence for each kind of prompts: does the contrast depend on what is asked?"""
    sentences = []
    for row in rows(frame):
        clear = "different from" if row["D_low"] > 0 or row["D_high"] < 0 else "not clearly different from"
        kind, other = row["kind"], row["other"]
        sentences.append(f"On {kind}, D is {clear} that on {other}: the difference is {number(row, 'D')}.")
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
