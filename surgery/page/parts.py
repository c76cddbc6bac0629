"""A page that can be read without the code: sections of sentences, pictures and tables, self-contained.

>>> import tempfile
>>> write_page(f"{tempfile.mkdtemp()}/report.html", "A page", "", [Section("one", "One", findings=["Found."])]).name
'report.html'
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas

from surgery.records import tables as frames

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
    frames.save({path: page.encode()})
    return path


def tabled(
    caption: str,
    head: str,
    rows: Sequence[pandas.Series],
    columns: Sequence[str],
    label: Callable[[pandas.Series], str],
    digits: int = 2,
) -> Table:
    cells = [[Cell(label(row)), *(cell(row, column, digits) for column in columns)] for row in rows]
    return Table(caption, [head, *columns], cells)


def cell(row: pandas.Series, column: str, digits: int) -> Cell:
    value = row[column]
    if isinstance(value, str):
        return Cell(value)
    if pandas.isna(value):
        return Cell("")
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    interval = "" if low is None or pandas.isna(low) else f"[{low:.{digits}f}, {high:.{digits}f}]"
    return Cell(f"{value:.{digits}f}", interval)
