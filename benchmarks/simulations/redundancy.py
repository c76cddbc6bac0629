"""Pairs of units of known reliability, undefined damages, and planted features: what rho, A and F read of them.

Units of strength a and b (1 as they are, 0 taken out, 1/2 in part) are joined by a worth; damages are what the worth
loses, times a size that differs from prompt to prompt, plus noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from surgery.instruments.ablation import Damages
from surgery.instruments.interactions import sets, summary, table

PAIR = ((0,), (1,), (0, 1))


@dataclass(frozen=True)
class System:
    """Two units joined by ``worth``, and what must be read of them."""

    worth: Callable[[float, float], float]
    rho: float
    additivity: float
    word: str


SYSTEMS = {
    "chain": System(lambda a, b: a * b, 1, 0, "needed together"),
    "AND of two that never read each other": System(min, 1, 0, "needed together"),
    "independent": System(lambda a, b: (a + b) / 2, 0, 1, "independent"),
    "saturating readout": System(lambda a, b: max(1, a + b), 1, 0, "saturating"),
    "half a backup": System(lambda a, b: a + b - a * b / 2, -1 / 3, 2, "backup"),
    "hard OR": System(max, -1, np.nan, "backup"),
    "hard OR with a threshold": System(lambda a, b: (max(a, b) >= 0.5) + 0.05 * min(a, b), -0.905, 20, "backup"),
}


def damages_of(worth: Callable[[float, float], float], amount: float = 1.0, n_prompts: int = 60) -> Damages:
    """Damages without each unit and both, ``amount`` of them taken out."""
    left, draw = 1 - amount, torch.Generator().manual_seed(0)
    lost = [worth(1, 1) - worth(*kept) for kept in ((left, 1), (1, left), (left, left))]
    size = 0.5 + torch.rand(n_prompts, generator=draw).double()
    value = torch.tensor(lost).double().unsqueeze(1) * size
    value = value + 0.001 * torch.randn(3, n_prompts, generator=draw).double()
    return Damages(PAIR, value, value)
