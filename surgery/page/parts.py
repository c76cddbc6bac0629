"""The parts of a page (sections, pictures, tables, cells), and writing it as one self-contained file.

>>> import tempfile
>>> write_page(f"{tempfile.mkdtemp()}/report.html", "A page", "", [Section("one", "One", findings=["S = 1."])]).name
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

from surgery import disk, outside
from surgery.page import phrases

PAGE = "report.html"


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a number or word, and the interval printed after it."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """A table; ``words`` aligns it left, for tables that are read rather than compared."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture in the page; ``name`` is that of its file beside the page, without ``.png``."""

    name: str
    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        """The bytes as text, to embed in the page."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """One section of the page: highlighted sentences, paragraphs, a list, pictures and tables, in this order."""

    anchor: str
    title: str
    findings: Sequence[str] = ()
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write the page whole or not at all, and return its path.

    It runs no script and fetches nothing, so that it can be read offline, in the dark and on paper. Raises ``OSError``
    if it cannot be written.
    """
    path = Path(path)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("surgery.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if value.isprintable() else outside.printable(value),
    )
    page = environment.get_template("page.html").render(title=title, subtitle=subtitle, sections=sections)
    disk.save({path: page.encode()})
    return path


def tabled(
    caption: str,
    head: str,
    rows: Iterable[pd.Series],
    columns: Sequence[str],
    label: Callable[[pd.Series], str],
    digits: int = 2,
) -> Table:
    """A table with a row for each of ``rows``: its ``label`` under ``head``, then ``columns`` with their intervals."""
    cells = [[Cell(label(row)), *(cell(row, column, digits) for column in columns)] for row in rows]
    return Table(caption, [head, *columns], cells)


def rows(frame: pd.DataFrame) -> list[pd.Series]:
    """The rows of a frame, one by one."""
    return [row for _, row in frame.iterrows()]


def cell(row: pd.Series, column: str, digits: int = 2, *, signed: bool = False) -> Cell:
    """A cell with a measure and its interval, or with a word; empty where the measure is undefined."""
    if isinstance(row[column], str):
        return Cell(row[column])
    return number_cell(*phrases.ends(row, column), digits, signed=signed)


def number_cell(
    number: float, low: float = math.nan, high: float = math.nan, digits: int = 2, *, signed: bool = False
) -> Cell:
    """A cell with a number and its interval, if there is one; empty for NaN."""
    if math.isnan(number):
        return Cell("")
    return Cell(phrases.value(number, digits, signed=signed), phrases.bracket(low, high, digits, signed=signed))


def spread_cell(values: pd.Series, digits: int = 3) -> Cell:
    """A cell with the median of several values, and their smallest and largest; empty if none is defined."""
    return number_cell(float(values.median()), float(values.min()), float(values.max()), digits)


def count_cell(number: float) -> Cell:
    """A cell with a count, in scientific notation from ten million on; empty for NaN."""
    return Cell("" if math.isnan(number) else f"{number:,.0f}" if number < 1e7 else f"{number:.2e}")


def model_name(manifest: Mapping[str, Any]) -> str:
    """The name of the model in a manifest, without the path of its folder."""
    name = str(manifest["model"]["name"])
    return Path(name).name if name.startswith((".", "/")) else name
