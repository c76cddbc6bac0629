"""What the tables of the anatomy say, in sentences: where the parts divide, and whether their ends differ."""

from collections.abc import Mapping

import pandas as pd

from surgery.page.chapters import Sentence
from surgery.page.parts import rows
from surgery.page.phrases import number

SURE = 0.05


def parts(boundaries: pd.DataFrame, segments: pd.DataFrame, n_layers: int) -> str:
    """Where three parts are divided, and whether they explain more than smooth drift would."""
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
    """Nothing, unless content counts for more than language in no layer: then there is no boundary to be read."""
    if (frame.loc[frame["layer"] > 0, "difference"] > 0).any():
        return []
    return ["Content never counts for more than language (SC > SL): no boundary can be read from there."]


def ends(frame: pd.DataFrame) -> str:
    """Are the ends more parallel than the middle?"""
    return f"That the ends are more parallel than the middle is {frame.iloc[0]['verdict']}."


def by_kind(frame: pd.DataFrame) -> list[str]:
    """A sentence for each kind of prompts: does the contrast depend on what is asked?"""
    sentences = []
    for row in rows(frame):
        clear = "another" if row["D_low"] > 0 or row["D_high"] < 0 else "not clearly another"
        sentences.append(f"On {row['kind']} D is {clear} than on {row['other']}: the difference is {number(row, 'D')}.")
    return sentences


def sentences(found: Mapping[str, pd.DataFrame], n_layers: int) -> list[Sentence]:
    """All of it; ``found`` by the names of ``Anatomy.tables``."""
    said = [Sentence(parts(found["boundaries"], found["segments"], n_layers), headline=True)]
    said += map(Sentence, agreement(found["agreement"]))
    if "convergence" in found:
        said += map(Sentence, convergence(found["convergence"]))
    said.append(Sentence(ends(found["ends"]), headline=True))
    return [*said, *map(Sentence, by_kind(found["by_kind"]))]
