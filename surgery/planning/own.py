"""A measure of a user's own package in ``surgery study`` and on its page: entry points ``surgery.measures``.

What an entry point holds is a ``Measure``: a part of a study and a chapter of the page. ``measure`` makes both of one
function that returns a table. Whoever wants levels, several files, figures or sentences builds ``Part`` and ``Chapter``
as the rooms of surgery do.

>>> import pandas as pd
>>> def depth(stack, tokens, *, sampling):
...     "How many layers there are."
...     return pd.DataFrame({"layers": [stack.n_layers]})
>>> own = measure("depth", depth, {"layers": "number of layers"}, "How deep is it?")
>>> own.part.question, list(own.chapter.files)
('depth', ['depth.csv'])
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from surgery import plugins
from surgery.page.chapters import Chapter, Manifests, Tables
from surgery.page.parts import Cell, Section, Table
from surgery.planning.parts import Level, Part, Shape, Subject
from surgery.records import tables as files
from surgery.stats.sampling import Sampling

ROWS = 40  # of a table on the page


@dataclass(frozen=True)
class Measure:
    """A part of a study, and its chapter on the page, both under one name. Raises ValueError for two names."""

    part: Part
    chapter: Chapter

    def __post_init__(self) -> None:
        if self.part.question != self.chapter.name:
            raise ValueError(f"the part answers {self.part.question!r}, the chapter {self.chapter.name!r}: name one")


def measure(
    name: str,
    function: Callable[..., pd.DataFrame],
    columns: Mapping[str, str],
    title: str,
    *,
    passes: float = 1.0,
) -> Measure:
    """Make a measure of ``function(stack, tokens, *, sampling)``, which returns a table with these ``columns``.

    The table becomes the file ``<name>.csv``, and on the page a section with ``title``, the first paragraph of the
    function's docstring and the first ``ROWS`` rows. ``passes`` is its cost in F, from which a study with a budget
    plans; what it takes more is told by the study and cut from the parts after it.
    """

    def run(subject: Subject, folder: Path, settings: Mapping[str, Any]) -> None:
        sampling = Sampling(seed=subject.seed, batch_size=subject.batch_size, progress=subject.progress)
        frame = function(subject.stack, subject.tokens, sampling=sampling)
        files.write(frame, folder / file, subject.manifest(**settings), columns)

    def levels(shape: Shape) -> tuple[Level, ...]:
        return (Level({}, passes * shape.forward),)

    def section(tables: Tables, manifests: Manifests) -> Section:
        told = inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        return Section(name, title, paragraphs=[told] if told else [], tables=[_table(file, tables[file])])

    file = f"{name}.csv"
    return Measure(Part(name, name, f"{name}: {title}", levels, run), Chapter(name, {file: columns}, section))


def installed(names: Iterable[str], built_in: Iterable[str]) -> "list[Measure]":
    """The measures of these ``names`` that packages add; names that are built in, or nobody's, are passed over.

    Raises PluginError for one that cannot be used.
    """
    found = plugins.installed("measures", built_in)
    return [_loaded(found[name]) for name in names if name in found]


def chapters(built_in: Iterable[str]) -> list[Chapter]:
    """The chapters of all measures that packages add, for the page; one that cannot be used is told in a warning."""
    found = []
    for plugin in plugins.installed("measures", built_in).values():
        try:
            found.append(_loaded(plugin).chapter)
        except plugins.PluginError as error:
            warnings.warn(str(error), stacklevel=2)
    return found


def _loaded(plugin: plugins.Plugin) -> Measure:
    own = plugin.load()
    if not isinstance(own, Measure):
        raise plugin.error(f"its entry point holds a {type(own).__name__}, not what surgery.planning.own.measure makes")
    if own.chapter.name != plugin.name:
        raise plugin.error(f"it calls itself {own.chapter.name!r}")
    return own


def _table(caption: str, frame: pd.DataFrame) -> Table:
    """The first rows of a table, with the interval of a column ``a`` (``a_low``, ``a_high``) in its cell."""
    ends = {f"{name}{end}" for name in frame for end in ("_low", "_high")}
    heads = [str(name) for name in frame if name not in ends]
    rows = [[_cell(row, head) for head in heads] for row in frame.head(ROWS).to_dict("records")]
    said = caption if len(frame) <= ROWS else f"{caption}, the first {ROWS} of {len(frame)} rows"
    return Table(said, heads, rows)


def _cell(row: Mapping[Any, Any], head: str) -> Cell:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    ends = [row.get(f"{head}{end}") for end in ("_low", "_high")]
    return Cell(text(row[head]), "" if None in ends else f"[{text(ends[0])}, {text(ends[1])}]")
