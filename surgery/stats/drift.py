r"""What one step ``x -> x + u`` does to an ensemble of tokens: kappa, psi and growth, from sums that can be resampled.

With ``c(a) = a - E a`` and ``n(a) = sqrt(E|c(a)|^2)`` over the tokens,

    kappa  = -E<c(u), c(x)> / E|c(x)|^2      the part of a deviation that the step takes back; 1 is all of it
    growth = n(u) / n(x)                     the size of the update beside the stream, often called r
    psi    = 2 kappa / growth^2              0 random walk, 1 stationary, above 1 contracting, below 0 explosive

and ``E|c(x + u)|^2 = E|c(x)|^2 (1 - 2 kappa + growth^2)``: a stream can revert and still grow. kappa is the slope of a
cross-section of tokens at one depth: no panel, no fixed effects, no error in x, so none of their biases. For an
Ornstein-Uhlenbeck stream, ``u = -kappa (x - mu) + noise``, it is the kappa of that equation.

Source: our definitions, after G. Uhlenbeck and L. Ornstein (1930) and the balance of fluctuation and dissipation in
their process. Without centring, ``kappa / growth`` is minus the cosine of R. Csordas et al. (2025, arXiv 2505.13898).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.stats.bootstrap import ratio

Stream = Float[Tensor, "prompt pos d_model"]
Resampled = Float[Tensor, " resample"]

LEAST = 0.05  # the least kappa that a claim is made of: less leaves half of a deviation for more than 13 layers
NEGLIGIBLE = 1e-12  # a variance below this share of the second moment is the rounding of float64, not a variance


@dataclass(frozen=True)
class Drift:
    """What a step does, under every row of prompt weights (row 0 is the estimate). NaN where nothing varies."""

    kappa: Resampled
    psi: Resampled
    growth: Resampled
    variance_ratio_next: Resampled


@dataclass(frozen=True)
class Step:
    """Sums of one step ``x -> x + u`` over the tokens of each prompt: all that ``drift`` needs, whatever the weights.

    ``empty`` and ``add`` keep sums of units of prompts instead, however many prompts there are.

    >>> from surgery.stats import weights
    >>> x = torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(0))
    >>> round(Step.of(x, -0.25 * (x - 3)).drift(weights(20)).kappa[0].item(), 6)
    0.25
    """

    count: Float[Tensor, " prompt"]
    sum_x: Float[Tensor, "prompt d_model"]
    sum_u: Float[Tensor, "prompt d_model"]
    xx: Float[Tensor, " prompt"]
    ux: Float[Tensor, " prompt"]
    uu: Float[Tensor, " prompt"]
    next: Float[Tensor, " prompt"]

    @classmethod
    def of(cls, x: Stream, u: Stream, mask: Bool[Tensor, "prompt pos"] | None = None) -> "Step":
        """Sum over the positions that ``mask`` keeps (all if not given), in float64."""
        x, u = x.double(), u.double()
        if mask is None:
            count = torch.full((len(x),), float(x.shape[1]), dtype=torch.float64)
        else:  # what padding computes may be NaN, and 0 * NaN is NaN
            count = mask.sum(1).double()
            x, u = (a.masked_fill(~mask.unsqueeze(-1), 0) for a in (x, u))
        after = x + u
        sums = x.sum(1), u.sum(1), _dot(x, x), _dot(u, x), _dot(u, u), _dot(after, after)
        return cls(count.cpu(), *(total.cpu() for total in sums))

    @classmethod
    def concatenate(cls, parts: Sequence["Step"]) -> "Step":
        """Join the sums of several batches of prompts, in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def empty(cls, n_units: int, width: int) -> "Step":
        """Return the sums of ``n_units`` units of resampling before any token is added."""
        number, vector = (torch.zeros(n_units, *shape, dtype=torch.float64) for shape in ((), (width,)))
        return cls(number, vector, vector.clone(), *(number.clone() for _ in range(4)))

    def add(self, unit: Int[Tensor, " prompt"], x: Stream, u: Stream, mask: Bool[Tensor, "prompt pos"]) -> None:
        """Add the tokens of prompts, each to the sums of its unit."""
        sums = Step.of(x, u, mask)
        for field in fields(self):
            getattr(self, field.name).index_add_(0, unit, getattr(sums, field.name))

    def size(self, weights: Float[Tensor, "resample prompt"]) -> Resampled:
        """Return ``sqrt(E|u|^2 / E|x|^2)``, not centred: how long an update is beside the stream."""
        return ratio(weights @ self.uu, weights @ self.xx).sqrt()

    def drift(self, weights: Float[Tensor, "resample prompt"]) -> Drift:
        """Return kappa, psi, growth and the ratio of variances under every row of ``weights``."""
        count = weights @ self.count
        mean_x, mean_u = (weights @ total / count.unsqueeze(-1) for total in (self.sum_x, self.sum_u))
        x, u, after = (
            _variance(weights @ square / count, mean)
            for square, mean in ((self.xx, mean_x), (self.uu, mean_u), (self.next, mean_x + mean_u))
        )
        against = (mean_u * mean_x).sum(-1) - weights @ self.ux / count
        kappa = ratio(torch.where(u > 0, against, 0), x)
        return Drift(kappa, ratio(2 * kappa * x, u), ratio(u, x).sqrt(), ratio(after, x))

    def variance(self, weights: Float[Tensor, "resample prompt"]) -> Resampled:
        """Return ``E|c(x)|^2``; exactly 0 where it is no more than rounding."""
        count = weights @ self.count
        return _variance(weights @ self.xx / count, weights @ self.sum_x / count.unsqueeze(-1))


def _dot(a: Stream, b: Stream) -> Float[Tensor, " prompt"]:
    """Return ``<a, b>`` summed over the positions of each prompt."""
    return (a.flatten(1).unsqueeze(1) @ b.flatten(1).unsqueeze(2)).flatten()


def _variance(square: Resampled, mean: Float[Tensor, "resample d_model"]) -> Resampled:
    variance = square - mean.square().sum(-1)
    return torch.where(variance > NEGLIGIBLE * square, variance, 0)


def half_life(kappa: float) -> float:
    """Return in how many layers half of a deviation is gone: ``ln 2 / -ln(1 - kappa)``, NaN unless ``0 < kappa < 1``.

    >>> half_life(0.5)
    1.0
    """
    return math.log(2) / -math.log1p(-kappa) if 0 < kappa < 1 else math.nan


def regime(kappa: float, low: float, high: float, growth: float, rounding: float = 0.0) -> str:
    """Return what the interval of kappa says, in a word; within ``rounding`` of 0 is 0.

    ``opposing`` above 0 (updates run against deviations, whether that shrinks or only turns them), ``overshooting``
    above 1 (a deviation changes sign), ``carrying`` below 0 (further out; the norm may grow in any regime),
    ``undecided`` otherwise, ``still`` if the update is the same for all tokens, ``undefined`` if the stream is.
    """
    if math.isnan(kappa):
        return "undefined"
    if growth == 0:
        return "still"
    if high < -rounding:
        return "carrying"
    if low > 1:
        return "overshooting"
    return "opposing" if low > rounding else "undecided"
