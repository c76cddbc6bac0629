r"""When a deviation is said to be taken back: by enough, for certain, and not by the luck of one layer among many.

A quantity ``a`` (kappa, its excess over a walk, ``1 - remaining``) is there if it is ``LEAST`` or more, is not if it is
surely less, and is undecided otherwise (``surgery.stats.claims``). A claim that needs several quantities at once, as a
force needs a slope and displacements of every kind that get shorter, is as strong as the ``weakest`` of them, and no
correction is needed within it (R. Berger 1982); over layers, ``judged`` corrects.

>>> row = dict.fromkeys(("remaining", "remaining_low", "remaining_high"), 1.0)
>>> row |= {"kappa": 0.4, "kappa_low": 0.3, "kappa_high": 0.5}
>>> turn, slope = beyond(row, "remaining", origin=1, sign=-1), beyond(row, "kappa")
>>> judged([slope]), judged([turn]), judged([weakest([slope, turn])])
(['yes'], ['no'], ['no'])
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from surgery.instruments import massive
from surgery.instruments.massive import Concentration
from surgery.stats.claims import ABOVE, BELOW, UNDECIDED, Effect, sides
from surgery.stats.drift import LEAST

Row = Mapping[str, Any] | Mapping[Hashable, Any] | pd.Series  # of a table
ROUNDING = 1e-6  # of float32; an interval of no width is not more certain than that
WORDS = {ABOVE: "yes", BELOW: "no", UNDECIDED: "undecided"}


def beyond(row: Row, name: str, *, origin: float = 0.0, sign: int = 1, least: float = LEAST) -> Effect:
    """Return by how much ``sign (a - origin)`` exceeds ``least``, ``a`` the measure ``name`` of a row of a table.

    Undefined where ``a`` is, where it has no interval, and where one token holds too much of the variance
    (``token_share``, ``surgery.instruments.massive``).
    """
    if massive.decides(row):
        return Effect(math.nan)
    value, *ends = (sign * (float(row[key]) - origin) - least for key in (name, f"{name}_low", f"{name}_high"))
    return Effect(value, min(ends) - ROUNDING, max(ends) + ROUNDING)


def weakest(effects: Sequence[Effect]) -> Effect:
    """Return the effect that is least surely above 0; an undefined one if there is any and none is surely below."""
    undefined = [effect for effect in effects if not effect.defined]
    least = min((effect for effect in effects if effect.defined), key=_score, default=Effect(math.nan))
    return undefined[0] if undefined and least.side() != BELOW else least


def judged(effects: Sequence[Effect]) -> list[str]:
    """Return ``yes``, ``no`` or ``undecided`` for each of a family of effects beyond the least; Holm over them."""
    return [WORDS[side] for side in sides(effects)]


def held(known: Concentration | None, streams: Iterable[int] = (), updates: Iterable[int] = ()) -> dict[str, float]:
    """Return ``n_tokens``, ``token_share`` and ``dimension_share`` of a row; nothing if they are not known."""
    return {} if known is None else known.columns(streams, updates)


def _score(effect: Effect) -> float:
    return effect.value / (effect.value - effect.low if effect.value > 0 else effect.high - effect.value)
