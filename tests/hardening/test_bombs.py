"""Wirings that cost more than they look, in every form: computed before they are made, and refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.attacks import Attack
from support.fuzzed_wirings import FORMS
from support.wiring_bombs import BOMBS

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 10_000  # trials of a process
SLOWEST = 0.1  # seconds that a trial may take on average, before the process counts as hanging


def fuzzed(form: str) -> Callable[[int, Path], Iterator[str | None]]:
    """Inputs of a form, each read in a process that has 200 MB more than it began with."""

    def trials(count: int, folder: Path) -> Iterator[str | None]:
        for seed, first in enumerate(range(0, count, AT_ONCE)):
            of_process = min(AT_ONCE, count - first)
            command = [sys.executable, "-m", "support.fuzzed_wirings", form, str(seed), str(of_process)]
            places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
            limit = 60 + of_process * (SLOWEST if form in FORMS else 20)
            process = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": places},
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
            if process.returncode:
                yield f"{form} {seed} ended with {process.returncode}: {process.stderr[-500:]}"
            else:
                yield from json.loads(process.stdout)

    return trials


FUZZED = {  # form: what it is called, what failed before
    "notation": ("Notation, from the grammar and with mistakes", "331 of 1,000"),
    "rys": ("RYS blocks as text", "65 of 1,000"),
    "rys_objects": ("RYS blocks as objects", "84 of 1,000"),
    "paths": ("Inclusive paths", "88 of 1,000"),
    "mergekit": ("mergekit configurations", "2 of 1,000"),
    "objects": ("Steps, shared, cyclic and of other types, and every method", "no end in 5 minutes"),
}
ATTACKS = [
    Attack("Wirings made by hand to eat time or memory", fuzzed("bombs"), quick=45, full=len(BOMBS), before="49 of 83"),
    *(Attack(name, fuzzed(form), quick=100, full=100_000, before=before) for form, (name, before) in FUZZED.items()),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_nothing_fails(attack, tmp_path):
    attack.hold(tmp_path)
