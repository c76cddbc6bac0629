"""A question on the page: the files it leaves, what they say, how they are drawn and what they leave undecided.

Every room has its own ``Chapter``; ``surgery.report`` only loops over them. All callables are pure functions of the
tables of a folder, by file name, and of their manifests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from surgery.page.drawing import png
from surgery.page.parts import Picture, Section

Tables = Mapping[str, pd.DataFrame]
Manifests = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Sentence:
    """One finding in words. A ``headline`` is repeated at the top of the page; every sentence stands in its chapter."""

    text: str
    headline: bool = False

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
        of_model: whether it was measured on the user's model, not on networks for comparison.
        same_prompts: whether it is read beside others that must have been measured on the same prompts.
    """

    name: str
    files: Mapping[str, Mapping[str, str]]
    section: Callable[[Tables, Manifests], Section]
    say: Callable[[Tables, Manifests], list[Sentence]] = no_sentences
    untold: Callable[[Tables, Manifests], list[str]] = no_limits
    draw: Callable[[Tables, Manifests], dict[str, Drawing]] = no_drawings
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
        """The whole section: ``section`` with the sentences of ``say`` and the pictures of ``draw``."""
        return replace(
            self.section(tables, manifests),
            findings=[str(sentence) for sentence in self.say(tables, manifests)],
            pictures=[
                Picture(name, drawing.caption, png(drawing.figure))
                for name, drawing in self.draw(tables, manifests).items()
            ],
        )
