"""Dropout on the page: the tables that ``studies/dropout.py`` leaves in a folder, as one section."""

from typing import Any

import pandas as pd

from surgery.dropout.draw import CAPTIONS, FIGURES
from surgery.dropout.files import COLUMNS, CONFIRMATION, MODELS
from surgery.dropout.say import SENTENCES
from surgery.dropout.verdicts import ACROSS, WITHIN, verdicts
from surgery.page import parts
from surgery.page.answers import UNDECIDED, Answer
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables, headlines
from surgery.page.charts import plot
from surgery.page.parts import Cell, Section, Table, number_cell
from surgery.page.phrases import ends
from surgery.stats import bootstrap

_HEADLINES = {MODELS: 2, CONFIRMATION: 1}  # how many of a table's sentences stand at the top of the page
PARAGRAPHS = [
    "Models that differ in their dropout alone: the same first weights, the same batches. Within is about the neurons "
    "of one component, across about layers; the change is that of a line over the rates, from no dropout to the "
    "largest, seed by seed, with a t interval over seeds.",
    "More dropout means less learned in as many steps, and what is measured depends on what was learned: so models "
    "are compared at matched held-out loss too, where the one with more dropout has trained longer.",
]


def say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """Both halves of the prediction and what fresh models confirm (headlines), then what the other tables say.

    Of the models' own table only the halves are said: single measures are in the table.
    """
    sentences = list[Sentence]()
    for name in _present(tables):
        texts = SENTENCES[name](tables[name])
        first = _HEADLINES.get(name, 0)
        sentences += headlines(texts[:first])
        sentences += map(Sentence, texts[first:] if name != MODELS else [])
    return sentences


def untold(tables: Tables, manifests: Manifests) -> list[str]:
    """What these tables leave open."""
    if MODELS not in tables:
        return []
    seeds = tables[MODELS]["seed"].nunique()
    return [
        f"What dropout does was measured on small models of {seeds} seeds and one corpus; effective features depend on "
        "the width of the autoencoder and on how much it explains, which are the same for all."
    ]


def draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """A figure for each table that is there."""
    return {
        name.removesuffix(".csv"): Drawing(FIGURES[name](tables[name]), CAPTIONS[name]) for name in _present(tables)
    }


QUESTIONS = {
    WITHIN: "Does dropout reduce superposition within a component?",
    ACROSS: "Does dropout raise redundancy across components?",
}


def answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """Both halves of the prediction, each by the measure that decides it."""
    if MODELS not in tables:
        return []
    judged, found = verdicts(tables[MODELS]), []
    for half, question in QUESTIONS.items():
        main = judged[judged["half"] == half].head(2)
        said = set(main["verdict"])  # at matched steps and at matched loss
        word = {("confirmed",): "yes", ("refuted",): "no, the opposite"}.get(tuple(said), UNDECIDED)
        row = main.iloc[-1]
        measure = f"change of {row['phrase']} at matched {row['matched']}:"
        found.append(Answer(question, word, measure, ends(row, "change"), (0.0, 0.0), "no dropout", digits=3))
    return found


def charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """The change of every measure along the rates."""
    if MODELS not in tables:
        return {}
    frame = verdicts(tables[MODELS])
    names = [f"{row['measure']}, matched {row['matched']}" for row in parts.rows(frame)]
    columns = ["name", "change", "change_low", "change_high", "half", "verdict"]
    told = "How every measure changes from no dropout to the most, seed by seed, with its 95 % interval"
    return {"dropout": plot(frame.assign(name=names)[columns], "change", told=told)}


def section(tables: Tables, manifests: Manifests) -> Section:
    """What within and across mean, and the table of changes."""
    shown = [_changes(tables[MODELS])] if MODELS in tables else []
    return Section("dropout", "Dropout: within and across components", paragraphs=PARAGRAPHS, tables=shown)


def _present(tables: Tables) -> list[str]:
    return [name for name in COLUMNS if name in tables]


def _changes(frame: pd.DataFrame) -> Table:
    rates = sorted(frame["rate"].unique())
    rows = []
    for verdict in parts.rows(verdicts(frame)):
        by_rate = frame[frame["matched"] == verdict["matched"]].groupby("rate")[verdict["measure"]]
        levels = [number_cell(*bootstrap.t_interval(by_rate.get_group(rate).to_numpy()), digits=3) for rate in rates]
        words = [Cell(verdict[name]) for name in ("half", "phrase", "matched")]
        change = parts.cell(verdict, "change", 3, signed=True)
        direction = {1: "up", -1: "down", 0: ""}[verdict["predicted"]]
        rows.append([*words, *levels, change, Cell(direction), Cell(verdict["verdict"])])
    header = ["half", "measure", "matched", *(f"p = {rate:g}" for rate in rates), "change", "predicted", "verdict"]
    return Table("Mean over seeds [95 %] at every rate of dropout, and the change along them", header, rows)


CHAPTER = Chapter("dropout", COLUMNS, section, say, untold, draw, answers, charts)
