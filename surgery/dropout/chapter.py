"""Dropout on the page: what ``studies/dropout.py`` leaves in a folder, as a section; what is there is shown."""

import pandas as pd

from surgery.dropout import study
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables, headlines
from surgery.page.parts import Cell, Section, Table, number_cell
from surgery.stats import bootstrap

PARAGRAPHS = [
    "Models that differ in their dropout alone: the same first weights, the same batches. Within is about the neurons "
    "of one component, across about layers; the change is that of a line over the rates, from no dropout to the "
    "largest, seed by seed, with a t interval over seeds.",
    "More dropout means less learned after as many steps, and what is measured depends on what was learned: so models "
    "are compared at matched held-out loss too, where the one with more dropout has trained longer.",
]


def say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """Both halves of the prediction (headlines), then what the other tables say; single measures are in the table."""
    said = list[Sentence]()
    for name in _present(tables):
        texts = study.SAID[name](tables[name])
        said += headlines(texts[:2]) if name == study.MODELS else map(Sentence, texts)
    return said


def untold(tables: Tables, manifests: Manifests) -> list[str]:
    """What these tables leave open."""
    if study.MODELS not in tables:
        return []
    seeds = tables[study.MODELS]["seed"].nunique()
    return [
        f"What dropout does was measured on small models of {seeds} seeds and one corpus; effective features depend on "
        "the width and the number of active features of the autoencoder, which are the same for all."
    ]


def draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """A figure for each table that is there."""
    return {
        name.removesuffix(".csv"): Drawing(study.DRAWN[name](tables[name]), study.CAPTIONS[name])
        for name in _present(tables)
    }


def section(tables: Tables, manifests: Manifests) -> Section:
    """What within and across mean, and the table of changes."""
    shown = [_changes(tables[study.MODELS])] if study.MODELS in tables else []
    return Section("dropout", "Dropout: within and across components", paragraphs=PARAGRAPHS, tables=shown)


def _present(tables: Tables) -> list[str]:
    return [name for name in study.COLUMNS if name in tables]


def _changes(frame: pd.DataFrame) -> Table:
    rates = sorted(frame["rate"].unique())
    rows = []
    for one in study.rows_of(study.verdicts(frame)):
        part = frame[frame["matched"] == one.matched].groupby("rate")[one.measure]
        levels = [number_cell(*bootstrap.t_interval(part.get_group(rate).to_numpy()), digits=3) for rate in rates]
        change = number_cell(one.change, one.low, one.high, 3, signed=True)
        wanted = {1: "up", -1: "down", 0: ""}[one.predicted]
        rows.append(
            [Cell(one.half), Cell(one.phrase), Cell(one.matched), *levels, change, Cell(wanted), Cell(one.verdict)]
        )
    header = ["half", "measure", "matched", *(f"p = {rate:g}" for rate in rates), "change", "predicted", "verdict"]
    return Table("Mean over seeds [95 %] at every rate of dropout, and the change along them", header, rows)


CHAPTER = Chapter("dropout", study.COLUMNS, section, say, untold, draw)
