"""``surgery list`` and ``surgery view``: what there is, and the page of what was measured. No torch in here."""

import sys
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from surgery import catalogue, plugins
from surgery.console import Result, say
from surgery.options import choice

PAGE = "report.html"


def list_(
    kind: Annotated[str, typer.Argument(**choice(tuple(catalogue.KINDS)), help="What to list.")],
) -> Result:
    """List the models, probe sets, metrics, measures or families of wirings by name, and say what each is.

    Those of installed packages are among them.

    Example: surgery list probes
    """
    listed = catalogue.entries(kind)
    for sentence in plugins.refused(kind, [entry.name for entry in listed if entry.package == catalogue.OURS]):
        say(f"note: {sentence}")
    return Result(catalogue.rendered(kind, listed), more={kind: [asdict(entry) for entry in listed]})


def view(
    folder: Annotated[Path, typer.Argument(help="Folder with the page of a study, scan, graft or compilation.")],
) -> Result:
    """Open the page of a folder in the browser, and print where it is.

    Example: surgery view results
    """
    page = folder / PAGE
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; measure something first: surgery study --out {folder}")
    if not page.is_file():
        if not any(folder.glob("*.csv")):
            raise ValueError(f"{folder} has no page and no results; measure first: surgery study --out {folder}")
        ask = sys.stdin.isatty() and sys.stdout.isatty()
        if not (ask and typer.confirm(f"{folder} has results, but no page. Write it now?", default=True, err=True)):
            raise ValueError(f"{folder} has results, but no page; write it with: surgery report {folder}")
        from surgery.report import build

        build(folder)
    page = page.resolve()
    if not webbrowser.open(page.as_uri()):
        say("no browser could be opened here; open the page yourself")
    return Result(str(page), page=page)
