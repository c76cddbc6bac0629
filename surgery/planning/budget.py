"""A budget of time, as a user writes it. No torch in here: the command line checks it before anything is imported."""

import math
import re
from collections.abc import Sequence

from surgery.progress import duration

UNITS = {"s": 1, "m": 60, "h": 3600}
EXPECTED = "a budget is a number of seconds, minutes or hours, such as 90s, 10m or 2h, or none for everything"


def seconds_of(budget: str) -> float:
    """Read a budget: ``90s``, ``10m``, ``1.5h``; ``none`` is infinite.

    Raises ValueError for anything else.

    >>> seconds_of("10m"), seconds_of("1.5h"), seconds_of("none")
    (600.0, 5400.0, inf)
    """
    if budget.strip().lower() == "none":
        return math.inf
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s*([smh])", budget.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"{budget!r} is no budget: {EXPECTED}")
    return float(match[1]) * UNITS[match[2]]


def told(budget: float, cuts: Sequence[str]) -> str:
    """A sentence about what was cut to fit into so many seconds; empty if nothing was.

    >>> told(600.0, ["64 of 256 probes"])
    'To fit into 10 min this was cut: 64 of 256 probes.'
    """
    return f"To fit into {duration(budget)} this was cut: {'; '.join(cuts)}." if cuts else ""
