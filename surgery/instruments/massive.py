r"""Massive activations: which tokens would decide every second moment by themselves, and how much one of them holds.

In pretrained models a few tokens carry numbers hundreds of times larger than all others (M. Sun et al. 2024, arXiv
2402.17762), and some dimensions are large in all tokens. The first decide whatever is averaged over tokens; the second
do no such harm. So a token is judged against other tokens in the same dimension. At every place between layers

    r(t) = max_d |x_td - m_d| / max(s_d, s),     m_d = median_t x_td,     s_d = median_t |x_td - m_d|,

where ``s``, the floor for dimensions in which most tokens are alike, is the root mean square over dimensions of a
typical token's deviation (its median over tokens). A token is massive if r exceeds ``TIMES`` anywhere. On SmolLM2-135M
the massive tokens read 50 to 220 in the layers where they are, all others 17 at most in any layer; a constant large
dimension reads nothing. Where more than ``RARE`` of the tokens exceed, they are no outliers: none is left out there.

``Concentration`` says what remains: the share of the variance that the largest token and the largest dimension hold.
Where one token decides (``decided_by_one``), a resample with and one without it tell different stories, and no interval
over prompts can be trusted: claims are withheld. The rule and its limits are ours.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery.stats.bootstrap import ratio

TIMES = 30  # typical deviations of its dimension
RARE = 0.25  # of the tokens
DECIDES = 0.1  # of the variance
FARTHEST = 16  # tokens among which the largest share is looked for: the mean is known only at the end
COLUMNS = {
    "n_tokens": "tokens measured",
    "n_massive": "tokens left out for massive activations",
    "token_share": "largest share of the variance of a stream or an update, among those measured, that one token holds",
    "dimension_share": "the same of one dimension",
}


@dataclass(frozen=True)
class Usual:
    """What is usual among tokens: centre and scale of every dimension, at every place between layers."""

    centre: Float[Tensor, "place d_model"]
    scale: Float[Tensor, "place d_model"]

    @classmethod
    def of(cls, streams: Float[Tensor, "place token d_model"]) -> "Usual":
        """Take medians over the tokens of each place.

        A place gets infinite scales, so that no token exceeds them, where most tokens are equal, and where more than
        ``RARE`` of them would exceed.

        >>> stream = torch.randn(1, 99, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([500.0] + 7 * [0])
        >>> stream[0, 3, 5] = 500
        >>> Usual.of(stream).exceeds(stream)[0].nonzero().flatten().tolist()
        [3]
        """
        centre = streams.median(1).values
        deviation = (streams - centre.unsqueeze(1)).abs()
        typical = deviation.square().mean(-1).median(1, keepdim=True).values.sqrt()
        scale = torch.maximum(deviation.median(1).values, typical)
        usual = cls(centre, torch.where(typical > 0, scale, torch.inf))
        rare = usual.exceeds(streams).float().mean(1, keepdim=True) <= RARE
        return cls(centre, torch.where(rare, usual.scale, torch.inf))

    def exceeds(self, streams: Float[Tensor, "place token d_model"]) -> Bool[Tensor, "place token"]:
        """Return which tokens lie more than ``TIMES`` scales from the centre in some dimension, place by place."""
        return torch.stack(
            [
                ((x - centre).abs() > TIMES * scale).any(-1)
                for x, centre, scale in zip(streams, self.centre, self.scale, strict=True)
            ]
        )


@dataclass(frozen=True)
class Concentration:
    """The share of a variance that its largest token and its largest dimension hold, for every stream and update.

    ``stream_*`` has a place before every layer and one after the last, ``update_*`` one a layer; NaN where nothing
    varies.
    """

    stream_token: Float[Tensor, " place"]
    stream_dimension: Float[Tensor, " place"]
    update_token: Float[Tensor, " layer"]
    update_dimension: Float[Tensor, " layer"]
    n_tokens: int

    def columns(self, streams: Iterable[int] = (), updates: Iterable[int] = ()) -> dict[str, float]:
        """Return ``n_tokens``, ``token_share`` and ``dimension_share`` of a row about these streams and updates.

        The shares are the largest of each; a row about nothing that varies has NaN.
        """
        places, layers = list(streams), list(updates)
        return {
            "n_tokens": self.n_tokens,
            "token_share": _largest(self.stream_token[places], self.update_token[layers]),
            "dimension_share": _largest(self.stream_dimension[places], self.update_dimension[layers]),
        }


class Spreads:
    """Adds up, batch by batch, what a ``Concentration`` follows from: moments by dimension, and the farthest tokens.

    Numbers are taken relative to ``usual.centre``, so that a large mean costs no digits.
    """

    def __init__(self, usual: Usual) -> None:
        centre = usual.centre.double()
        self.centre = torch.cat([centre, centre[1:] - centre[:-1]])  # of the streams, and of the updates
        self.count = 0
        self.total = torch.zeros_like(self.centre)
        self.square = torch.zeros_like(self.centre)
        self.farthest = list(torch.zeros_like(self.centre).unsqueeze(1))  # by their distance from the centre

    def add(self, streams: Float[Tensor, "place token d_model"]) -> None:
        """Add the tokens of a batch."""
        self.count += streams.shape[1]
        if not streams.shape[1]:
            return
        for i, centre in enumerate(self.centre):
            layer = i - len(streams)
            values = streams[i] if layer < 0 else streams[layer + 1] - streams[layer]
            deviation = values.double() - centre
            squares = deviation.square()
            self.total[i] += deviation.sum(0)
            self.square[i] += squares.sum(0)
            farthest = torch.cat(
                [self.farthest[i], deviation[squares.sum(1).topk(min(FARTHEST, len(squares))).indices]]
            )
            self.farthest[i] = farthest[farthest.square().sum(1).topk(min(FARTHEST, len(farthest))).indices]

    def concentration(self) -> Concentration:
        """Return the shares; NaN where nothing varies beyond rounding."""
        mean = self.total / self.count
        variance = (self.square - self.count * mean.square()).clamp(min=0)
        whole = variance.sum(1)
        whole = torch.where(whole > 1e-12 * (self.square.sum(1) + self.count * self.centre.square().sum(1)), whole, 0)
        largest = [(far - mean[i]).square().sum(1).max() for i, far in enumerate(self.farthest)]
        token = ratio(torch.stack(largest), whole).clamp(max=1).cpu()
        dimension = ratio(variance.amax(1), whole).cpu()
        places = (len(self.centre) + 1) // 2
        return Concentration(token[:places], dimension[:places], token[places:], dimension[places:], self.count)


class MassiveUpdateWarning(UserWarning):
    """A span writes activations of another order of size into a few tokens."""


def warn_of_updates(update: Float[Tensor, "token d_model"], start: int, stop: int, times: float = 50.0) -> None:
    """Warn if layers [start, stop) write more than ``times`` the usual length into some of these tokens.

    Whoever learns such a span learns one token: often the first, in which attention finds its sink. SmolLM2's layer 11
    writes 170 times the usual length there; without it the loss is 3 nats higher.
    """
    size = update.norm(dim=-1)
    largest, usual = float(size.max()), float(size.median())
    if largest > times * usual:
        few = int((size > times * usual).sum())
        warnings.warn(
            f"layers [{start}, {stop}) write {largest / usual:.0f} times the usual length into {few} of {len(size)} "
            "tokens, often the first of every prompt, which attention needs as its sink. A middle that misses it "
            "breaks the model: begin it behind the layer that does this (surgery.series.profile shows how much each "
            "layer writes)",
            MassiveUpdateWarning,
            stacklevel=3,
        )


def decided_by_one(token_share: float, n_tokens: float = math.inf) -> bool:
    """Whether one of ``n_tokens`` holds so much of the variance that no claim can be made from it.

    That is more than ``DECIDES``, and where tokens are few, more than twenty times its fair share.

    >>> decided_by_one(0.15), decided_by_one(0.15, n_tokens=100), decided_by_one(math.nan)
    (True, False, False)
    """
    return token_share > max(DECIDES, 20 / n_tokens)


def decides(row: Mapping[Any, Any] | pd.Series) -> bool:
    """Whether one token decides what a row of a table says (``decided_by_one``); not where its columns are missing."""
    return decided_by_one(float(row.get("token_share", math.nan)), float(row.get("n_tokens", math.inf)))


def _largest(*shares: Float[Tensor, " place"]) -> float:
    defined: Sequence[float] = [float(share) for share in torch.cat(shares) if share.isfinite()]
    return max(defined, default=float("nan"))
