"""Dropout on the page: what ``studies/dropout.py`` leaves in a folder, as a section; what is there is shown."""

from collections.abc import Mapping

import pandas

from surgery.dropout import study
from surgery.dropout.study import CAPTIONS, COLUMNS, DRAWN, MODELS, SAID
from surgery.page import drawing
from surgery.page.parts import Cell, Picture, Section, Table
from surgery.stats import bootstrap as stats

FILES = tuple(COLUMNS)
PARAGRAPHS = [
    "Models that differ in their dropout alone: the same first weights, the same batches. Within is about the neurons "
    "of one component, across about layers; the change is that of a line over the rates, from no dropout to the "
    "largest, seed by seed, with a t interval over seeds.",
    "More dropout means less learned after as many steps, and what is measured depends on what was learned: so models "
    "are compared at matched held-out loss too, where the one with more dropout has trained longer.",
]
Tables = Mapping[str, pandas.DataFrame]


def found(tables: Tables) -> list[str]:
    """Both halves of the prediction."""
    return study.found(tables[MODELS])[:2] if MODELS in tables else []


def untold(tables: Tables) -> list[str]:
    """What these tables leave open."""
    if MODELS not in tables:
        return []
    seeds = tables[MODELS]["seed"].nunique()
    return [
        f"What dropout does was measured on small models of {seeds} seeds and one corpus; effective features depend on "
        "the width and the number of active features of the autoencoder, which are the same for all."
    ]


def section(tables: Tables) -> Section:
    """Sentences, figures and the table of changes."""
    present = [name for name in FILES if name in tables]
    said = [sentence for name in present for sentence in SAID[name](tables[name])]
    if MODELS in tables:  # the measures one by one are in the table
        said = found(tables) + said[len(SAID[MODELS](tables[MODELS])) :]
    pictures = [
        Picture(name.removesuffix(".csv"), CAPTIONS[name], drawing.png(DRAWN[name](tables[name]))) for name in present
    ]
    shown = [_changes(tables[MODELS])] if MODELS in tables else []
    return Section(
        "dropout", "Dropout: within and across components", said, PARAGRAPHS, pictures=pictures, tables=shown
    )


def _changes(frame: pandas.DataFrame) -> Table:
    rates = sorted(frame["rate"].unique())
    rows = []
    for one in study.rows_of(study.verdicts(frame)):
        part = frame[frame["matched"] == one.matched].groupby("rate")[one.measure]
        levels = [Cell(f"{part.get_group(rate).mean():.3f}", _spread(part.get_group(rate))) for rate in rates]
        change = Cell(f"{one.change:+.3f}", "" if one.low != one.low else f"[{one.low:+.3f}, {one.high:+.3f}]")
        wanted = {1: "up", -1: "down", 0: ""}[one.predicted]
        rows.append(
            [Cell(one.half), Cell(one.phrase), Cell(one.matched), *levels, change, Cell(wanted), Cell(one.verdict)]
        )
    header = ["half", "measure", "matched", *(f"p = {rate:g}" for rate in rates), "change", "predicted", "verdict"]
    return Table("Mean over seeds [95 %] at every rate of dropout, and the change along them", header, rows)


def _spread(values: pandas.Series) -> str:
    _, low, high = stats.t_interval(values.to_numpy())
    return "" if low != low else f"[{low:.3f}, {high:.3f}]"
