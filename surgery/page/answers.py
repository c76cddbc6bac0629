"""A question's answer in one line: a verdict in a word or two, the number with its interval, and what to hold it to.

>>> answer = Answer("Do layers need one another?", "in series", "S", (0.6, 0.5, 0.7), (0.3, 0.4), "untrained layers")
>>> answer.number, answer.held_to
('0.60 [0.50, 0.70]', 'untrained layers: 0.30 to 0.40')
"""

import math
from dataclasses import dataclass

from surgery.page import phrases

UNDECIDED = "undecided"
WIDTH, HEIGHT = 132, 22  # of the small figure, in pixels


@dataclass(frozen=True)
class Answer:
    """One row of the table on top of the page.

    Attributes:
        question: as a reader asks it.
        verdict: the answer in a word or two; "undecided" and "no" are answers too.
        measure: what the number is.
        effect: the number and the ends of its 95 % interval; NaN where there is none.
        null: the smallest and largest value without an effect, as a control gave them.
        null_name: what that control is.
        digits: decimals.
        anchor: of the chapter that shows more; the page fills it in.
    """

    question: str
    verdict: str
    measure: str = ""
    effect: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    null: tuple[float, float] = (math.nan, math.nan)
    null_name: str = ""
    digits: int = 2
    anchor: str = ""

    @property
    def number(self) -> str:
        """The effect with its interval; empty if it is undefined."""
        return "" if math.isnan(self.effect[0]) else phrases.interval(*self.effect, self.digits)

    @property
    def held_to(self) -> str:
        """The null with its name; empty if there is none."""
        if math.isnan(self.null[0]):
            return ""
        ends = [phrases.value(end, self.digits) for end in self.null]
        return f"{self.null_name}: {ends[0]}" + (f" to {ends[1]}" if ends[1] != ends[0] else "")

    @property
    def places(self) -> dict[str, float]:
        """Where the small figure puts value, ends and null, in pixels; empty if one is not finite."""
        value, low, high = self.effect
        low, high = (value, value) if math.isnan(low) or math.isnan(high) else (low, high)
        null = (0.0, 0.0) if math.isnan(self.null[0]) else self.null
        if not all(map(math.isfinite, (value, low, high, *null))):
            return {}
        least, most = min(low, *null), max(high, *null)
        unit = (WIDTH - 16) / (most - least or 1.0)
        names = ("value", "low", "high", "null_low", "null_high")
        return {name: 8 + (at - least) * unit for name, at in zip(names, (value, low, high, *null), strict=True)}
