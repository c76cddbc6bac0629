"""A plan that is kept beside what was begun with it, so that the same command goes on with the same plan.

Speeds are measured anew at every start and never come out the same, and what is half done cannot go on in another size.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import surgery
from surgery import disk, outside
from surgery.records import checked

FORMAT = 1


def planned(file: Path, identity: Mapping[str, Any], plan: Callable[[], Mapping[str, Any]]) -> tuple[dict, bool]:
    """The plan in ``file`` and True, if it was made for this ``identity`` by this version; else a new one and False.

    ``identity``, what the plan depends on besides the machine, and what ``plan`` returns are JSON values. A new plan is
    written to ``file``, in place of one that is damaged or for something else. Raises OSError if it cannot be.
    """
    key = json.loads(json.dumps({"version": surgery.__version__, **identity}))
    before = _read(file)
    if before is not None and before["identity"] == key:
        return before["plan"], True
    value = checked.sealed({"format": FORMAT, "identity": key, "plan": plan()})
    disk.save({file: json.dumps(value, indent=1).encode()})
    return value["plan"], False


def _read(file: Path) -> dict[str, Any] | None:
    """What the file holds; None if it is missing, damaged or of another format."""
    try:
        value = outside.read_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    known = isinstance(value, dict) and value.get("format") == FORMAT and {"identity", "plan"} <= set(value)
    return value if known and checked.intact(value) else None
