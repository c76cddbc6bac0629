r"""What may be claimed of an effect: it is above the least effect that matters, below minus that, within, or undecided.

An interval that leaves out 0 is no claim yet: with enough prompts an effect of 0.00007 does. So every claim names the
least effect that matters (``least``, in the effect's own unit), and an effect is

    ABOVE      if it is more than ``least``: the whole interval lies there
    BELOW      if it is less than ``-least``
    WITHIN     if it is no difference that matters: the whole interval lies between ``-least`` and ``least``
    UNDECIDED  otherwise, and always where there is no interval or the effect is undefined

Whatever the truth is, at most one of the first three is right, and the chance to claim another is at most 5 %. With
several effects it is 5 % that *any* claim is wrong: ``sides`` corrects for their number (Holm), and the smallest level
at which an effect is decided is its p. Claim nothing from ``Effect.side`` alone if it is one of many.

``largest`` does the same for rankings: it names all that may be the largest, not the one that happens to be.

Sources: minimum-effect tests, Murphy and Myors (1999); equivalence by two one-sided tests, Schuirmann (1987); that the
three can be tested at once, as at most one is true, Goeman, Solari and Stijnen (2010); Holm (1979).

>>> small, clear = Effect(0.0001, 0.00005, 0.00015), Effect(0.2, 0.15, 0.25)
>>> small.side(least=0.01), clear.side(least=0.01), Effect(0.02, -0.03, 0.07).side(least=0.01)
('within', 'above', 'undecided')
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from surgery.stats.bootstrap import t_interval

ABOVE, BELOW, WITHIN, UNDECIDED = "above", "below", "within", "undecided"
LEVEL = 0.05
ROUNDING = 1e-6  # an interval narrower than this share of its ends is of numbers that differ by rounding alone

Key = TypeVar("Key", bound=Hashable)


class Effect(NamedTuple):
    """An effect with its 95 % interval, NaN where there is none; ``df`` of the t distribution that made it."""

    value: float
    low: float = math.nan
    high: float = math.nan
    df: float = math.inf  # of a bootstrap: normal

    @classmethod
    def of_seeds(cls, values: Iterable[float]) -> "Effect":
        """The mean of independent values, one a seed, by Student's t; those that are NaN are left out.

        >>> [round(end, 3) for end in Effect.of_seeds([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484, 2]
        """
        there = [float(value) for value in values if not math.isnan(value)]
        return cls(*t_interval(there), len(there) - 1) if there else cls(math.nan)

    @classmethod
    def of_row(cls, row: pd.Series, name: str) -> "Effect":
        """The columns ``name``, ``name_low`` and ``name_high`` of a row; NaN for missing ones."""
        return cls(*(float(row.get(key, math.nan)) for key in (name, f"{name}_low", f"{name}_high")))

    @property
    def defined(self) -> bool:
        """Whether there is a finite value with a finite interval; one of no width comes of what does not vary."""
        largest = max(abs(self.low), abs(self.high))
        return math.isfinite(self.value) and math.isfinite(largest) and self.high - self.low > ROUNDING * largest

    @property
    def missing(self) -> str | None:
        """Why nothing can be claimed, in words; None if the effect is ``defined``.

        >>> Effect.of_seeds([0.2]).missing, Effect(0.2).missing, Effect.of_seeds([]).missing
        ('one seed tells nothing', 'no interval', 'undefined')
        """
        if not math.isfinite(self.value):
            return "undefined"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "one seed tells nothing" if self.df == 0 else "no interval"
        return None if self.defined else "nothing varies"

    def p(self, least: float = 0.0) -> float:
        """The smallest level at which the effect is decided; NaN where it is undefined.

        >>> round(Effect(0.2, 0.1, 0.3).p(0.1), 3), Effect(0.2).p(0.1)
        (0.05, nan)
        """
        if not self.defined:
            return math.nan
        above, below = self._beyond(least), 1 - self._beyond(-least)
        return min(1.0, 2 * min(above, below, max(1 - above, 1 - below)))

    def side(self, least: float = 0.0, level: float = LEVEL) -> str:
        """``ABOVE``, ``BELOW``, ``WITHIN`` or ``UNDECIDED`` of this effect by itself."""
        if not self.defined or self.p(least) > level + 1e-9:  # an interval that ends at ``least`` decides
            return UNDECIDED
        return ABOVE if self.value > least else BELOW if self.value < -least else WITHIN

    def _beyond(self, bound: float) -> float:
        """One-sided p of the effect being at most ``bound``; on either side of the value the interval's own half."""
        half = self.value - self.low if self.value > bound else self.high - self.value
        if half <= 0:
            return float(self.value < bound)
        distance = (bound - self.value) / half
        if math.isinf(self.df):
            return float(ndtr(distance * ndtri(0.975)))
        return float(stdtr(self.df, distance * stdtrit(self.df, 0.975)))


def sides(effects: Sequence[Effect], least: float | Sequence[float] = 0.0, level: float = LEVEL) -> list[str]:
    """``Effect.side`` of a family of effects, so that in 95 % of families no claim is wrong (Holm).

    ``least`` is that of all, or of each. Effects that are undefined count in nothing.

    >>> sides([Effect(0.2, 0.01, 0.39)]), sides([Effect(0.2, 0.01, 0.39)] * 8)[0]
    (['above'], 'undecided')
    """
    bounds = np.broadcast_to(least, len(effects)).tolist()
    p = np.array([effect.p(bound) for effect, bound in zip(effects, bounds, strict=True)])
    return [
        effect.side(bound, 1.0) if corrected <= level + 1e-9 else UNDECIDED
        for effect, bound, corrected in zip(effects, bounds, holm(p).tolist(), strict=True)
    ]


def holm(p: Sequence[float] | Float[np.ndarray, " effect"]) -> Float[np.ndarray, " effect"]:
    """Return p corrected for the number of tests (Holm 1979): below .05 in one family of twenty where none is true.

    Those that are NaN stay so and do not count. As statsmodels' ``multipletests``, which collects garbage first, for
    half a second a call.

    >>> holm([0.01, 0.04, math.nan, 0.03]).round(3).tolist()
    [0.03, 0.06, nan, 0.06]
    """
    values = np.asarray(p, float)
    order = np.argsort(values)[: np.isfinite(values).sum()]  # NaN comes last
    corrected = np.full(len(values), np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return corrected


def largest(effects: Mapping[Key, Effect]) -> list[Key]:
    """All that may be the largest, the largest value first: those whose interval reaches the highest lower end.

    One key alone is a claim that this is the largest; several are not told apart. None if no effect is defined, or if
    one of them is not: that one may be the largest. Give effects with their signs turned for the smallest.

    >>> largest({"a": Effect(0.37, 0.3, 0.44), "b": Effect(0.22, 0.15, 0.31), "c": Effect(0.9, 0.8, 1.0)})
    ['c']
    >>> largest({"a": Effect(0.37, 0.3, 0.44), "b": Effect(0.22, 0.15, 0.31)})
    ['a', 'b']
    """
    if not effects or not all(effect.defined for effect in effects.values()):
        return []
    reached = max(effect.low for effect in effects.values())
    among = [key for key, effect in effects.items() if effect.high >= reached]
    return sorted(among, key=lambda key: -effects[key].value)
