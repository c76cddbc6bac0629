"""A page that can be read without the code: sections of sentences, pictures and tables, self-contained.

>>> import tempfile
>>> write_page(f"{tempfile.mkdtemp()}/report.html", "A page", "", [Section("one", "One", findings=["Found."])]).name
'report.html'
"""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from surgery.page import phrases
from surgery.records import tables

PAGE = "report.html"


@dataclass(frozen=True)
class Cell:
    value: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """``words`` aligns left, for tables that are read rather than compared."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """``name`` is that of the file beside the page, without ``.png``."""

    name: str
    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """One part of the page: sentences set off, paragraphs, a list, pictures and tables, in this order."""

    anchor: str
    title: str
    findings: Sequence[str] = ()
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write the page whole or not at all. It runs no script and fetches nothing: it reads offline, dark, on paper."""
    path = Path(path)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("surgery.page", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html").render(title=title, subtitle=subtitle, sections=sections)
    tables.save({path: page.encode()})
    return path


def tabled(
    caption: str,
    head: str,
    rows: Iterable[pd.Series],
    columns: Sequence[str],
    label: Callable[[pd.Series], str],
    digits: int = 2,
) -> Table:
    """A row for each of ``rows``: its ``label`` under ``head``, then ``columns`` with their intervals."""
    cells = [[Cell(label(row)), *(cell(row, column, digits) for column in columns)] for row in rows]
    return Table(caption, [head, *columns], cells)


def rows(frame: pd.DataFrame) -> list[pd.Series]:
    """The rows of a table, one by one."""
    return [row for _, row in frame.iterrows()]


def cell(row: pd.Series, column: str, digits: int = 2, *, signed: bool = False) -> Cell:
    """A measure with its interval, or a word; empty where it is not defined."""
    if isinstance(row[column], str):
        return Cell(row[column])
    return number_cell(*phrases.ends(row, column), digits, signed=signed)


def number_cell(
    number: float, low: float = math.nan, high: float = math.nan, digits: int = 2, *, signed: bool = False
) -> Cell:
    """A number with its interval; empty for NaN."""
    if math.isnan(number):
        return Cell("")
    return Cell(phrases.value(number, digits, signed=signed), phrases.bracket(low, high, digits, signed=signed))


def spread_cell(values: pd.Series, digits: int = 3) -> Cell:
    """The median of several values, and from the smallest to the largest; empty where none is defined."""
    return number_cell(float(values.median()), float(values.min()), float(values.max()), digits)


def count_cell(number: float) -> Cell:
    """A number of things, or of very many; empty for NaN."""
    return Cell("" if math.isnan(number) else f"{number:,.0f}" if number < 1e7 else f"{number:.2e}")


def model_name(manifest: Mapping[str, Any]) -> str:
    """The model of a manifest, without the folder that it lies in."""
    name = str(manifest["model"]["name"])
    return Path(name).name if name.startswith((".", "/")) else name
