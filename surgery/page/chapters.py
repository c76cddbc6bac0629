"""A question on the page: the files it leaves, what they say, how they are drawn and what they leave undecided.

Every room has its own ``Chapter``; ``surgery.report`` only loops over them. All callables are pure functions of the
tables of a folder, by file name, and of their manifests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from surgery.page.answers import Answer
from surgery.page.charts import copied, embedded
from surgery.page.drawing import png
from surgery.page.parts import Chart, Picture, Section

Tables = Mapping[str, pd.DataFrame]
Manifests = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Sentence:
    """One finding in words. A ``headline`` is printed when a study ends; the one that ``leads`` stands on top of its
    chapter, or the first headline if none does."""

    text: str
    headline: bool = False
    leads: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Drawing:
    """A figure and its ``caption``, which is also the text for readers who cannot see it."""

    figure: Figure
    caption: str


def headlines(texts: Sequence[str]) -> list[Sentence]:
    """Turn texts into sentences that are all repeated at the top of the page."""
    return [Sentence(text, headline=True) for text in texts]


def no_sentences(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """The ``say`` of a chapter that claims nothing."""
    return []


def no_limits(tables: Tables, manifests: Manifests) -> list[str]:
    """The ``untold`` of a chapter whose limits are stated elsewhere."""
    return []


def no_answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """The ``answers`` of a chapter that no reader asks for first."""
    return []


def no_charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """The ``charts`` of a chapter without any."""
    return {}


def no_drawings(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """The ``draw`` of a chapter of words and tables only."""
    return {}


@dataclass(frozen=True)
class Chapter:
    """A question on the page.

    Attributes:
        name: as on the command line and in links; one word.
        files: the CSV files that it may leave, each with the meaning of its columns.
        section: title, paragraphs and tables; ``on_page`` adds the sentences and pictures.
        say: the findings of the tables, in sentences.
        untold: the limits of the tables, and what stays undecided.
        draw: the figures, by the names of their PNG files.
        requires: the chapter appears if the first of these files is there, and then needs the others too; if it
            requires none, any of ``files`` makes it appear.
        answers: the question as a reader asks it, and its answer in a word and a number; on top of the page.
        charts: Altair charts by name (``surgery.page.charts.plot``), to be touched.
        of_model: whether it was measured on the user's model, not on networks for comparison.
        same_prompts: whether it is read beside others that must have been measured on the same prompts.
    """

    name: str
    files: Mapping[str, Mapping[str, str]]
    section: Callable[[Tables, Manifests], Section]
    say: Callable[[Tables, Manifests], list[Sentence]] = no_sentences
    untold: Callable[[Tables, Manifests], list[str]] = no_limits
    draw: Callable[[Tables, Manifests], dict[str, Drawing]] = no_drawings
    answers: Callable[[Tables, Manifests], list[Answer]] = no_answers
    charts: Callable[[Tables, Manifests], dict[str, Any]] = no_charts
    requires: tuple[str, ...] = ()
    of_model: bool = True
    same_prompts: bool = False

    def present(self, names: Sequence[str]) -> list[str]:
        """The files of this chapter to read, given the ``names`` in a folder; none if it has nothing to show."""
        existing = [name for name in self.files if name in names]
        if self.requires and self.requires[0] not in existing:
            return []
        return [*dict.fromkeys((*self.requires, *existing))]

    def on_page(self, tables: Tables, manifests: Manifests) -> Section:
        """The whole section: ``section`` with sentences, answers, charts, pictures and limits."""
        sentences, drawings = self.say(tables, manifests), self.draw(tables, manifests)
        ranked = sorted(sentences, key=lambda sentence: (not sentence.leads, not sentence.headline))
        first = str(ranked[0]) if ranked and (ranked[0].leads or ranked[0].headline) else ""
        section = self.section(tables, manifests)
        meanings = {name: text for file in self.present([*tables]) for name, text in self.files[file].items()}
        return replace(
            section,
            tables=[replace(table, meanings=meanings | dict(table.meanings)) for table in section.tables],
            headline=first,
            findings=[str(sentence) for sentence in sentences if str(sentence) != first],
            points=self.untold(tables, manifests),
            charts=[
                Chart(name, _told(chart), embedded(chart), copied(chart))
                for name, chart in self.charts(tables, manifests).items()
            ],
            pictures=[Picture(name, drawing.caption, png(drawing.figure)) for name, drawing in drawings.items()],
            files=self.present([*tables]),
        )

    def answered(self, tables: Tables, manifests: Manifests) -> list[Answer]:
        """The ``answers``, each with a link to this chapter."""
        return [replace(answer, anchor=self.name) for answer in self.answers(tables, manifests)]


def _told(chart: Any) -> str:
    """What a chart shows, in words."""
    return str(chart.to_dict().get("description", ""))
