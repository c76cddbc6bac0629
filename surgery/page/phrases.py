"""How sentences and cells write numbers: one way to write ``value [low, high]``, and one for missing numbers.

>>> interval(0.634, 0.6, 0.66)
'0.63 [0.60, 0.66]'
>>> interval(0.634, math.nan, math.nan), interval(math.nan, math.nan, math.nan)
('0.63 (no interval)', 'undefined')
"""

import math
from collections.abc import Iterable

import pandas as pd

FEW_PROMPTS = 20  # below, a bootstrap over prompts gives intervals that are too narrow


def value(number: float, digits: int = 2, *, signed: bool = False) -> str:
    """``0.63``, with ``signed`` ``+0.63``; ``undefined`` for NaN."""
    return "undefined" if math.isnan(number) else f"{number:{'+' if signed else ''}.{digits}f}"


def bracket(low: float, high: float, digits: int = 2, *, signed: bool = False) -> str:
    """``[0.60, 0.66]``; nothing where there is no interval."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"[{value(low, digits, signed=signed)}, {value(high, digits, signed=signed)}]"


def interval(number: float, low: float, high: float, digits: int = 2, *, signed: bool = False) -> str:
    """``0.63 [0.60, 0.66]``; ``0.63 (no interval)`` where none could be made; ``undefined`` for NaN."""
    if math.isnan(number):
        return "undefined"
    return f"{value(number, digits, signed=signed)} {bracket(low, high, digits, signed=signed) or '(no interval)'}"


def ends(row: "pd.Series", name: str) -> tuple[float, float, float]:
    """A measure in a row and the ends of its interval: ``name``, ``name_low``, ``name_high``; NaN for missing ones."""
    numbers = (float(row.get(key, math.nan)) for key in (name, f"{name}_low", f"{name}_high"))
    return next(numbers), next(numbers), next(numbers)


def number(row: "pd.Series", name: str, digits: int = 2, *, signed: bool = False) -> str:
    """The ``interval`` of a measure in a row of a table.

    >>> number(pd.Series({"S": 0.2, "S_low": 0.1, "S_high": 0.3}), "S")
    '0.20 [0.10, 0.30]'
    """
    return interval(*ends(row, name), digits, signed=signed)


def layers(indices: Iterable[int]) -> str:
    """Name layers in words, with neighbours as ranges.

    >>> layers([1, 2, 3, 7]), layers([2])
    ('layers 1 to 3, 7', 'layer 2')
    """
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    named = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer {named}" if named.isdecimal() else f"layers {named}"


def few_prompts(frame: pd.DataFrame) -> list[str]:
    """A warning if any row has too few prompts (column ``n_prompts``) for its intervals; else an empty list."""
    if "n_prompts" not in frame or frame["n_prompts"].min() >= FEW_PROMPTS:
        return []
    count = int(frame["n_prompts"].min())
    return [
        f"{count} prompt{'s' * (count != 1)} only: intervals from fewer than {FEW_PROMPTS} are too narrow or missing."
    ]
