"""Networks of known answer and every window of them, measured once, and the formulas of windows written out."""

import functools
import math

import numpy as np
import pandas as pd
import torch

from surgery import Stack, series
from surgery.instruments import known_networks
from surgery.instruments.windows import FORMS
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling


@functools.cache
def stack(kind: str, *args, **sizes) -> Stack:
    return Stack(getattr(known_networks, f"{kind}_network")(*args, **sizes))


@functools.cache
def every_window(kind: str, *args, damage: bool = True, **sizes) -> pd.DataFrame:
    """Every window of a known network on 24 prompts."""
    tokens, sampling = known_networks.tokens(24, 10), Sampling(resamples=20)
    return series.windows(stack(kind, *args, **sizes), tokens, damage=damage, forms=FORMS, sampling=sampling)


def uneven_prompts(n_prompts: int = 9, longest: int = 12) -> Tokens:
    """Prompts of different lengths, padded on the right."""
    ids = known_networks.tokens(n_prompts, longest, seed=5)
    lengths = torch.arange(n_prompts) % (longest - 3) + 4
    return Tokens(ids, torch.arange(longest) < lengths.unsqueeze(1))


def random_tokens() -> torch.Tensor:
    """Prompts for the architectures of the matrix."""
    return torch.randint(4, 96, (12, 9), generator=torch.Generator().manual_seed(0))


def spread(a: np.ndarray) -> float:
    """n(c(a)) over [token, d_model]."""
    return math.sqrt(((a - a.mean(0)) ** 2).sum(1).mean())


def by_hand(updates: dict, alone: dict, x: dict, start: int) -> dict[str, float]:
    """R, O, S, N from ``u_l``, ``p_l`` (l > start) and ``x_l``, written out."""
    layers = sorted(alone)
    read = [spread(updates[i] - alone[i]) / (spread(updates[i]) + spread(alone[i])) for i in layers]
    weight = [spread(updates[i]) ** 2 + spread(alone[i]) ** 2 for i in layers]
    moved = [spread(x[i] - x[start]) / (spread(x[i]) + spread(x[start])) for i in layers]
    serial, parallel = sum(updates[i] for i in layers), sum(alone[i] for i in layers)
    R, N = np.average(read, weights=weight), np.average(moved, weights=weight)
    O = spread(serial - parallel) / (spread(serial) + spread(parallel))  # noqa: E741
    return {"R": R, "O": O, "S": (R + O) / 2, "N": N, "R_over_N": R / N}
