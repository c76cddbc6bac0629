"""The tests of a change, nearest first, in about a minute: ``make test-quick``.

    python tests/quick.py [REF]      # what differs from REF (HEAD if not given), files that git does not know included

First come the tests of the changed modules, then those of the modules that import them, and so on outwards. What does
not fit into the time is left out and counted; ``make test`` runs everything.
"""

import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 45  # to begin tests in, imports included; the last ones may take a little longer


def changed(ref: str = "HEAD") -> set[Path]:
    """Files that differ from ``ref``, relative to the repository."""
    commands = (["diff", "--name-only", ref], ["ls-files", "--others", "--exclude-standard"])
    outputs = [
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for command in commands
    ]
    return {Path(line) for output in outputs for line in output.splitlines() if (ROOT / line).exists()}


def module_of(path: Path) -> str | None:
    """``surgery/scan/rows.py`` -> ``surgery.scan.rows``; None for what is not a module of the package."""
    if path.parts[:1] != ("surgery",) or path.suffix not in (".py", ".pyi"):
        return None
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def tests_of(module: str) -> Iterable[Path]:
    """The test files that are named after a module: its own, and its further ones (``test_window_sublayers``)."""
    *rooms, name = module.split(".")[1:] or [""]
    return sorted((ROOT / "tests").joinpath(*rooms).glob(f"test_{name}*.py")) if name else []


def nearest_first(modules: set[str]) -> list[str]:
    """These modules, then those that import them, then those that import these."""
    graph = grimp.build_graph("surgery")
    order, ring = list[str](), sorted(modules & graph.modules)
    while ring:
        order += ring
        importers = {importer for module in ring for importer in graph.find_modules_that_directly_import(module)}
        ring = sorted(importers - set(order))
    return order


def test_files(paths: set[Path]) -> list[Path]:
    """The test files of changed files, the nearest first."""
    files = [ROOT / path for path in sorted(paths) if path.name.startswith("test_") and path.suffix == ".py"]
    helpers = {path.stem for path in paths if path.parts[:2] == ("tests", "support")}
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        words = test.read_text().split() if helpers else []
        if any(helper in words or f"support.{helper}" in words for helper in helpers):
            files.append(test)
    if any(path.suffix == ".md" for path in paths):
        files.append(ROOT / "tests" / "test_docs.py")
    files += [ROOT / "tests" / "studies" / f"test_{path.name}" for path in sorted(paths) if path.parts[0] == "studies"]
    for module in nearest_first({module for path in paths if (module := module_of(path))}):
        files += tests_of(module)
    return list(dict.fromkeys(files))


if __name__ == "__main__":
    until = time.time() + SECONDS
    files = test_files(changed(*sys.argv[1:2]))
    if not files:
        sys.exit("nothing has changed that a test is named after: make test runs everything")
    sys.exit(pytest.main(["--until", str(until), *map(str, files)]))  # in one process: importing everything takes long
