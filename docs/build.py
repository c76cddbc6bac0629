"""Build the docs site: ``make docs``. Its front page is then ``site/html/index.html``.

    python docs/build.py

The pages are those of this folder; the reference of the library comes from docstrings, that of the command line from
typer. Any warning fails the build.
"""

import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import surgery

DOCS = Path(__file__).resolve().parent
REPOSITORY, SITE = DOCS.parent, DOCS.parent / "site"
ELSEWHERE = {  # pages that stay where GitHub shows them, and where they are on the site
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "benchmarks/README.md": "data/benchmarks.md",
    "data/README.md": "data/index.md",
    "data/atlas/README.md": "data/atlas.md",
    "data/reference/README.md": "data/reference.md",
    "data/translation/README.md": "data/translation.md",
}
NOT_OF_THE_LIBRARY = {"cli"}  # has a page of its own


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    source = SITE / "source"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("__pycache__", "build.py"))
    for page in sorted(DOCS.rglob("*.md")):
        carry(page, source / page.relative_to(DOCS), source)
    for path, place in ELSEWHERE.items():
        carry(REPOSITORY / path, source / place, source)
    reference = source / "reference"
    reference.mkdir()
    command_line = [sys.executable, "-m", "typer", "surgery.cli", "utils", "docs", "--name", "surgery"]
    options = subprocess.run(command_line, capture_output=True, text=True, check=True).stdout
    (reference / "command_line.md").write_text(options.replace("# `surgery`", "# Options of every command", 1))
    rooms = [
        name for name in dir(surgery) if inspect.ismodule(getattr(surgery, name)) and name not in NOT_OF_THE_LIBRARY
    ]
    for room in rooms:
        (reference / f"{room}.md").write_text(page_of(room))
    listed = "\n".join(["command_line", *rooms])
    (reference / "index.md").write_text(
        "# Reference\n\nEvery command, and every room of the library. In `surgery` itself there are\n\n"
        f"{exports('surgery')}\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-j", "auto"]
    raise SystemExit(subprocess.run([*sphinx, source, SITE / "html"]).returncode)


def carry(page: Path, place: Path, source: Path) -> None:
    """Write a page of the repository to its place on the site, with links that lead to where the others are there.

    A link to what is not on the site (a script, say) becomes its words.
    """

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match.groups(default="")
        if target.startswith(("http", "mailto")) or not target:
            return match[0]
        path = (page.parent / target).resolve()
        if path.is_relative_to(DOCS):
            there = source / path.relative_to(DOCS)
        elif (name := path.relative_to(REPOSITORY).as_posix()) in ELSEWHERE:
            there = source / ELSEWHERE[name]
        else:
            return words
        return f"[{words}]({os.path.relpath(there, place.parent)}{anchor})"

    place.parent.mkdir(exist_ok=True)
    place.write_text(re.sub(r"\[([^\[\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, page.read_text()))


def page_of(room: str) -> str:
    """The page of a room: what it offers in a table, and then its modules, one after another."""
    package = importlib.import_module(f"surgery.{room}")
    inside = [module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))]
    parts = [f"# surgery.{room}\n"]
    if inside:
        parts += [
            f"```{{eval-rst}}\n.. automodule:: surgery.{room}\n   :no-members:\n```\n",
            exports(f"surgery.{room}"),
        ]
    else:
        parts.append(f"```{{eval-rst}}\n.. automodule:: surgery.{room}\n```\n")
    for name in inside:
        parts.append(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: surgery.{room}.{name}\n```\n")
    return "\n".join(parts)


def exports(package: str) -> str:
    """A table of the functions and classes that a package passes on, each with the first sentence of its docstring."""
    rows = [f"| {{py:obj}}`{name} <{where}>` | {says} |" for name, where, says in _exports(package)]
    return "\n".join(["| name | what it is |", "|---|---|", *rows, ""]) if rows else ""


def _exports(package: str) -> Iterator[tuple[str, str, str]]:
    module = importlib.import_module(package)
    for name in dir(module):
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            first = (
                (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`").replace("|", r"\|")
            )
            yield f"{package}.{name}", f"{thing.__module__}.{thing.__qualname__}", first


if __name__ == "__main__":
    main()
