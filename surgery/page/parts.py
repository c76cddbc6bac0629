"""The parts of a page (sections, pictures, tables, cells), and writing it as one self-contained file.

>>> import tempfile
>>> write_page(f"{tempfile.mkdtemp()}/report.html", "A page", "", [Section("one", "One", findings=["S = 1."])]).name
'report.html'
"""

import base64
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from surgery import disk, outside
from surgery.page import phrases
from surgery.page.answers import HEIGHT, WIDTH, Answer

PAGE = "report.html"
MEANINGS = {  # told where a pointer rests on the word
    "S": "how serial a window of layers is: 0 if no layer reads another, 1 if each lives only on the one before",
    "R": "how much layers write differently when they do not see one another",
    "O": "how much a window writes differently from the sum of its layers side by side",
    "preference": "response to what the window wrote, over that to the same turned at random: 1 if there is none",
    "kappa": "the part of a token's deviation from the mean that a layer writes against",
    "psi": "0 if the stream walks at random, 1 if its spread stays, above 1 if it shrinks",
    "phi": "how much of a shock is left a layer later",
    "D": "mean S of the ends minus mean S of the middle: below 0 the ends are more parallel",
    "A": "additivity of damage: 0 for a chain, 1 for independent parts, above 1 for backups",
    "unexplained": "share of the variance of what the layers write that a new middle misses",
    "p_max": "how often the luckiest of all wirings would reach as much if none had any effect",
    "p_drift": "how often smooth drift over layers would be divided as clearly",
    "F": "one forward pass of the model over the batch",
    "nats": "units of information: 0.69 nats are one bit",
}
_PART = r"(?:\{[^{}]+\}(?:\*[\d.]+)?|\([\d: ]+\)\*[\d.]+|\d*:\d*)"
_LAYER = r"\d+(?:\.attn|\.mlp)?"
_WIRING = re.compile(rf"(?<![^\s(,])(?:{_LAYER} )*{_PART}(?: (?:{_PART}|{_LAYER}(?![\d.%])))*(?=[\s,.;)]|$)")
_MEASURE = re.compile(rf"(?<![\w<>/=\"-])(?:{'|'.join(MEANINGS)})(?![\w<>=\"-])(?<!A(?! [=\d]))")  # A may be an article


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a number or word, and the interval printed after it."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """A table; ``words`` aligns it left, for tables that are read rather than compared.

    ``meanings`` tells what its heads mean, where a pointer rests on them.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: bool = False
    meanings: Mapping[str, str] = field(default_factory=dict)

    def meaning(self, head: str) -> str:
        """What a head means: the column of a file, or the measure that it begins or ends with; empty if neither."""
        return self.meanings.get(head, "") or next(
            (MEANINGS[word] for word in (head, head.split("_")[0], head.split(", ")[-1]) if word in MEANINGS), ""
        )


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
class Chart:
    """A chart that can be touched: its Vega-Lite ``spec``, and the column that a click copies, if any."""

    name: str
    caption: str
    spec: Mapping[str, Any]
    copied: str = ""

    @property
    def json(self) -> Markup:
        """The spec inside a script element: nothing in it can end that element."""
        return htmlsafe_json_dumps(self.spec)


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes: ``headline``, the sentence to read first; ``charts``, to be touched; ``answers``, a table of them. The
    rest is folded: ``findings``, every sentence; ``paragraphs``, how it is measured; ``tables``; ``pictures``;
    ``points``, what stays open; ``files``, the CSV files beside the page. A section that is ``aside`` is folded whole.
    """

    anchor: str
    title: str
    findings: Sequence[str] = ()
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    headline: str = ""
    answers: Sequence[Answer] = ()
    charts: Sequence[Chart] = ()
    files: Sequence[str] = ()
    aside: bool = False


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write the page whole or not at all, and return its path.

    It fetches nothing, so that it can be read offline, in the dark and on paper; without scripts all is there but the
    charts, whose PNG files stand in their place. Raises ``OSError`` if it cannot be written.
    """
    path = Path(path)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("surgery.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
    )
    environment.filters |= {"marked": marked}
    library = vega() if any(section.charts for section in sections) else ""
    page = environment.get_template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, library=Markup(library), width=WIDTH, height=HEIGHT
    )
    disk.save({path: page.encode()})
    return path


def _printable(value: Any) -> Any:
    """Text as it can be shown; what is marked up is our own and stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value if value.isprintable() else outside.printable(value)


@functools.cache
def vega() -> str:
    """The scripts that draw the charts: Vega, Vega-Lite and Vega-Embed (BSD 3), once for the whole page."""
    import vl_convert

    bundle: Any = vl_convert.javascript_bundle  # its argument may be left out, whatever its types say
    return str(bundle()).replace("</script", "<\\/script")


def marked(text: str) -> Markup:
    """A sentence with its wirings as code, and what the measures' letters mean where a pointer rests on them.

    >>> str(marked("the cheapest, :7 {7.attn|8.attn} 9:, adds .1"))
    'the cheapest, <code>:7 {7.attn|8.attn} 9:</code>, adds .1'
    >>> str(marked("layers 1 to 11: 0.9 in <code>"))
    'layers 1 to 11: 0.9 in &lt;code&gt;'
    """
    shown = escape(_printable(text))
    coded = _WIRING.sub(_coded, str(shown))
    seen: set[str] = set()

    def told(found: "re.Match[str]") -> str:
        if found[0] in seen:
            return found[0]
        seen.add(found[0])
        return f'<abbr tabindex="0" title="{escape(MEANINGS[found[0]])}">{found[0]}</abbr>'

    return Markup(_MEASURE.sub(told, coded))


def _coded(found: "re.Match[str]") -> str:
    """A wiring as code; a colon behind a number or a word is none."""
    text = found[0]
    is_wiring = any(mark in text for mark in "{(") or " " in text or re.fullmatch(r"\d*:\d+", text)
    return f"<code>{text}</code>" if is_wiring else text


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
