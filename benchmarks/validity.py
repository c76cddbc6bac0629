"""Do the measures say the truth where it is known? Every simulation: what should be read, was read, and is read.

    python benchmarks/validity.py [--quick] [--only anatomy luck] [--write]

Each module of ``benchmarks/simulations`` has ``rows(quick)``, whose dicts are ``point`` (the question), ``case``,
``nominal``, ``before`` (the code before it was mended) and ``after``. Rows are printed, and with ``--write`` put into
docs/validity.md, as soon as a module is through: one that fails costs only its own. ``--quick`` has fewer draws.
"""

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "validity.md"
MODULES = ("series", "reversion", "luck", "halving", "anatomy", "crossing", "redundancy", "graft")
KEYS = ("point", "case", "nominal", "before", "after")
END = "<!-- end of table -->\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer draws: a few minutes in all")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES, help="these modules only")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/validity.md")
    chosen = parser.parse_args(arguments)
    failed = []
    for name in chosen.only:
        started = time.perf_counter()
        try:
            frame = pd.DataFrame(simulation(name).rows(chosen.quick), columns=list(KEYS))
            print(frame.to_string(index=False))
            if chosen.write:
                PAGE.write_text(written(PAGE.read_text(), name, frame, chosen.quick))
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: {time.perf_counter() - started:.0f} s\n", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def simulation(name: str) -> ModuleType:
    """Import one module of ``benchmarks/simulations``, wherever this file is started from."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"benchmarks.simulations.{name}")


def begin(name: str, point: str) -> str:
    """The line in the page above the table of one point."""
    return f"<!-- {name}: {point} -->\n"


def written(page: str, name: str, frame: pd.DataFrame, quick: bool = False) -> str:
    """The page with the rows of one module in place of what it had; ValueError where it has no place for a point."""
    for point, rows in frame.groupby("point", sort=False):
        opening = begin(name, str(point))
        if opening not in page:
            raise ValueError(f"{PAGE.name} has no table of {name}: {point}")
        lines = [f"| case | should read | before | after{' (quick run)' * quick} |", "|---|---|---|---|"]
        for row in rows[list(KEYS[1:])].itertuples(index=False):
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |")
        before, rest = page.split(opening)
        page = before + opening + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1]
    return page


if __name__ == "__main__":
    main()
