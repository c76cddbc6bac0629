"""How sentences and cells write numbers: one way to write ``value [low, high]``, and one for missing numbers.

>>> interval(0.634, 0.6, 0.66)
'0.63 [0.60, 0.66]'
>>> interval(0.634, math.nan, math.nan), interval(math.nan, math.nan, math.nan)
('0.63 (no interval)', 'undefined')
"""

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from surgery.instruments import massive
from surgery.stats.claims import ABOVE, BELOW, UNDECIDED, WITHIN, Effect, sides

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


def withheld(row: "pd.Series", name: str) -> str | None:
    """Why nothing may be claimed of a measure in a row of a table, in words; None where a claim may be made.

    A claim is withheld of a measure that is undefined or has no interval, of a single prompt (``n_prompts``), of what
    does not vary (its interval has no width), and where one token decides (``token_share``, ``n_tokens``).

    >>> numbers = {"S": 0.2, "S_low": 0.1, "S_high": 0.3}
    >>> withheld(pd.Series(numbers), "S"), withheld(pd.Series(numbers | {"n_prompts": 1}), "S")
    (None, 'one prompt has no interval')
    >>> withheld(pd.Series(numbers | {"token_share": 0.73}), "S"), withheld(pd.Series({"S": math.nan}), "S")
    ('one token holds 73 % of the variance', 'undefined')
    """
    missing, share = Effect.of_row(row, name).missing, float(row.get("token_share", math.nan))
    decided = massive.decides(row)
    if missing == "undefined":
        return missing
    if row.get("n_prompts") == 1:
        return "one prompt has no interval"
    return missing or (f"one token holds {100 * share:.0f} % of the variance" if decided else None)


def claims(effects: Sequence[Effect], least: float, matters: str, above: str, below: str) -> list[str]:
    """What may be claimed of each effect of a family, in words, corrected for their number (``stats.claims.sides``).

    ``matters`` names the ``least`` effect in its unit; ``above`` and ``below`` are the words for more than that.

    >>> harms, little = Effect(-0.2, -0.25, -0.15), Effect(-0.00007, -0.0001, -0.00004)
    >>> claims([harms, little, Effect(0.1)], 0.01, "0.01 nats", "helps", "harms")
    ['harms', 'no difference that matters (0.01 nats)', 'undecided (no interval)']
    >>> claims([Effect(0.2, 0.02, 0.38)] * 8, 0.01, "0.01 nats", "helps", "harms")[0]
    'undecided (as one of 8 comparisons)'
    """
    said, count = [], sum(effect.defined for effect in effects)
    words = {ABOVE: above, BELOW: below, WITHIN: f"no difference that matters ({matters})"}
    for effect, side in zip(effects, sides(effects, least), strict=True):
        if not effect.defined:
            said.append(f"undecided ({effect.missing})")
        elif side == UNDECIDED and effect.side(least) != UNDECIDED:
            said.append(f"undecided (as one of {count} comparisons)")
        else:
            said.append(words.get(side, "undecided"))
    return said


def few_prompts(frame: pd.DataFrame) -> list[str]:
    """A warning if any row has too few prompts (column ``n_prompts``) for its intervals; else an empty list."""
    if "n_prompts" not in frame or frame["n_prompts"].min() >= FEW_PROMPTS:
        return []
    count = int(frame["n_prompts"].min())
    return [
        f"{count} prompt{'s' * (count != 1)} only: intervals from fewer than {FEW_PROMPTS} are too narrow or missing."
    ]
