"""What ``surgery list`` tells: every name of a kind, what it is, and which package brings it. No torch in here.

>>> [entry.name for entry in entries("families")][:2]
['repeat', 'skip']
"""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery import plugins
from surgery.chapters import MEASURED
from surgery.corpus.probe_sets import ABOUT
from surgery.models.names import WHEELS
from surgery.scan.metrics import MEANINGS
from surgery.wiring import families

MODELS = {
    "babel": "trained on composing functions in four made-up languages; 12 layers, comes with surgery",
    "babel-translation": "the same size, trained to translate between them; comes with surgery",
    "smollm2": "SmolLM2 135M Instruct of Hugging Face; 30 layers",
    "gemma3-270m": "Gemma 3 270M of Google; 18 layers",
}
MEASURES = {
    "series": "do layers work in series or in parallel? Every window of layers, and its calibration",
    "reversion": "does the residual stream revert to a mean over depth?",
    "scan": "which repeated spans of layers help, and does it last on fresh probes?",
    "anatomy": "where do input translation, reasoning and output translation begin and end?",
}
OURS = "surgery"


@dataclass(frozen=True)
class Entry:
    """One name: what it is in a line, and the package that brings it."""

    name: str
    about: str
    package: str = OURS


def entries(kind: str) -> list[Entry]:
    """All names of a kind (``KINDS``), the built-in ones first."""
    return KINDS[kind]()


def rendered(kind: str, listed: Sequence[Entry]) -> str:
    """The entries as a table for a terminal, as wide as it is."""
    width = shutil.get_terminal_size((120, 24)).columns
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    apart = len({entry.package for entry in listed}) > 1
    for head in ("name", "what it is", *(["from"] * apart)):
        table.add_column(head, no_wrap=head == "name")
    for entry in listed:
        table.add_row(*(Text(text) for text in (entry.name, entry.about, *([entry.package] * apart))))
    page = Console(file=StringIO(), width=width, color_system=None)
    page.print(table)
    text = page.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def _models() -> list[Entry]:
    def missing(name: str) -> str:
        parts = WHEELS[name].parts if name in WHEELS else ()
        there = all(importlib.util.find_spec(package) for package, _ in parts)
        return "" if there else f"; install it with: {WHEELS[name].install}"

    return [Entry(name, about + missing(name)) for name, about in MODELS.items()]


def _families() -> list[Entry]:
    about = {name: (every.__doc__ or "").split("\n")[0].replace("``", "") for name, every in families.EVERY.items()}
    about[families.PAINTERS] = (
        "Skip, repeat the middle, reverse, shuffle, run beside each other or loop centred windows."
    )
    return _with_own("families", about)


def _with_own(kind: str, about: dict[str, str]) -> list[Entry]:
    own = plugins.installed(kind, about).values()
    return [
        *(Entry(name, text) for name, text in about.items()),
        *(Entry(plugin.name, plugin.about or "-", plugin.package) for plugin in own),
    ]


KINDS: dict[str, Callable[[], list[Entry]]] = {
    "models": _models,
    "probes": lambda: _with_own("probes", ABOUT),
    "metrics": lambda: [Entry(name, about) for name, about in MEANINGS.items()],
    "measures": lambda: _with_own("measures", {name: MEASURES[name] for name in MEASURED}),
    "families": _families,
}
