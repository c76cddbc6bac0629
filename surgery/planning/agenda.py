"""``study.json``: what a study planned, what of it is done, and how long that took. With it a study goes on.

A part is done when the agenda lists its files and they are still as they were. It holds for one model, one set of
prompts and one choice of settings; anything else begins anew.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery import disk, outside
from surgery.planning.plans import Plan
from surgery.records import checked

FILE = "study.json"
FORMAT = 1


@dataclass(frozen=True)
class Done:
    """A part that was measured: its files with their hashes, seconds, and the most memory that the process had."""

    files: Mapping[str, str]
    seconds: float
    peak: float


@dataclass(frozen=True)
class Agenda:
    """The plan of the study in a folder, and the parts that are done."""

    identity: Mapping[str, Any]
    plan: Plan
    done: Mapping[str, Done]

    @property
    def missing(self) -> list[str]:
        """Parts that are planned and not done."""
        return [part.name for part in self.plan.parts if part.name not in self.done]

    @classmethod
    def read(cls, folder: Path) -> "Agenda | None":
        """The agenda in a folder; None if there is none, or it is damaged or of another version."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            value = outside.read_json(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or value.get("format") != FORMAT or not checked.intact(value):
                return None
            done = {name: Done(**entry) for name, entry in value["done"].items()}
            return cls(value["identity"], Plan.of_json(value["plan"]), done)
        except (ValueError, TypeError, KeyError, AttributeError, OSError):
            return None

    def write(self, folder: Path) -> None:
        """Write it to a folder. Raises OSError if that cannot be done."""
        value = {
            "format": FORMAT,
            "identity": dict(self.identity),
            "plan": self.plan.json(),
            "done": {name: vars(entry) for name, entry in self.done.items()},
        }
        disk.save({folder / FILE: json.dumps(checked.sealed(value), indent=1).encode()})

    def holds(self, folder: Path, name: str) -> bool:
        """Whether a part is done and its files are as it left them."""
        entry = self.done.get(name)
        return entry is not None and entry.files == hashes(folder, entry.files)

    def with_part(self, name: str, done: Done) -> "Agenda":
        """The agenda when one more part is done."""
        return replace(self, done={**self.done, name: done})

    def without(self, name: str, reason: str) -> "Agenda":
        """The agenda without a part that turned out not to be measurable."""
        parts = tuple(part for part in self.plan.parts if part.name != name)
        plan = replace(self.plan, parts=parts, left_out={**self.plan.left_out, name: reason})
        return replace(self, plan=plan)


def hashes(folder: Path, names: Any) -> dict[str, str]:
    """The sha256 of those of the files that are there."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).is_file()
    }
