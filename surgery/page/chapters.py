"""A question as the page knows it: the files it leaves, what they say, how they are drawn and what they leave open.

Each room makes its own ``Chapter``; ``surgery.report`` only loops over them. All callables are pure functions of the
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
    """One finding in words. A ``headline`` stands at the top of the page too, every sentence in its chapter."""

    text: str
    headline: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Drawing:
    """A figure and what it shows; ``caption`` is also its text for those who do not see it."""

    figure: Figure
    caption: str


def headlines(texts: Sequence[str]) -> list[Sentence]:
    """Sentences that all stand at the top of the page."""
    return [Sentence(text, headline=True) for text in texts]


def no_sentences(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """For a chapter that claims nothing."""
    return []


def no_limits(tables: Tables, manifests: Manifests) -> list[str]:
    """For a chapter whose limits are stated elsewhere."""
    return []


def no_drawings(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """For a chapter of words and tables."""
    return {}


@dataclass(frozen=True)
class Chapter:
    """A question on the page.

    Attributes:
        name: as on the command line and in links; one word.
        files: the CSV files it may leave, each with the meaning of its columns.
        section: title, paragraphs and tables; sentences and pictures are put in by ``on_page``.
        say: what the tables say.
        untold: their limits, and what stays undecided.
        draw: figures by the name of their PNG file.
        requires: the first of these makes the chapter appear, and then the others must be there too; if there are
            none, any of ``files`` does.
        of_model: whether it was measured on the user's model, not on networks for comparison.
        same_prompts: whether it is read beside others that were measured on the very same prompts.
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
        """The files of this chapter to read, out of those in a folder; none if the chapter has nothing to show."""
        there = [name for name in self.files if name in names]
        if self.requires and self.requires[0] not in there:
            return []
        return [*dict.fromkeys((*self.requires, *there))]

    def on_page(self, tables: Tables, manifests: Manifests) -> Section:
        """The whole section, with its sentences and pictures."""
        return replace(
            self.section(tables, manifests),
            findings=[str(sentence) for sentence in self.say(tables, manifests)],
            pictures=[
                Picture(name, drawing.caption, png(drawing.figure))
                for name, drawing in self.draw(tables, manifests).items()
            ],
        )
