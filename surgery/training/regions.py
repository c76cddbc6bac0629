"""Moments of the activations of one class of positions, beside a bank of some of these activations.

They are gathered from chunks, in float64. Memory: a few d_model x d_model matrices, and the bank.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery.instruments.massive import Usual
from surgery.stats.scatter import Scatter

SAMPLES = 5  # activations needed for each component
CONSTANT = 1e-7  # a variance below this share of E |x|^2 is the rounding of half precision
SINGULAR = 1e-9  # as is a component's below this share of the first's

Rows = Float[Tensor, "row d_model"]


@dataclass(frozen=True, eq=False)
class Region:
    """The activations of one class of positions: their moments, and a bank of some of them."""

    mean: Float[Tensor, " d_model"]
    axes: Float[Tensor, "component d_model"]  # orthonormal
    scale: Float[Tensor, " component"]  # standard deviation along each
    bank: Float[Tensor, "real d_model"]
    n_tokens: int
    variance: float
    usual: Usual | None = None  # what tells massive activations, which are left out of all of the above
    n_massive: int = 0

    @property
    def components(self) -> int:
        """The number of principal components."""
        return len(self.scale)

    def to(self, device: torch.device | str) -> "Region":
        """The same on another device."""
        usual = self.usual and Usual(self.usual.centre.to(device), self.usual.scale.to(device))
        tensors = {name: getattr(self, name).to(device) for name in ("mean", "axes", "scale", "bank")}
        return replace(self, **tensors, usual=usual)

    def massive(self, x: Rows) -> Bool[Tensor, " row"]:
        """Whether these are massive activations (``surgery.instruments.massive``), which are left where they are."""
        if self.usual is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self.usual.exceeds(x.unsqueeze(0))[0]

    def whitened(self, x: Rows) -> Float[Tensor, "row component"]:
        """Coordinates along the principal components, in standard deviations."""
        return (x - self.mean) @ self.axes.T / self.scale

    def unwhitened(self, z: Float[Tensor, "row component"]) -> Rows:
        """The displacement that has these whitened coordinates."""
        return (z * self.scale) @ self.axes

    def nearest(self, x: Rows, count: int) -> Float[Tensor, "row neighbour d_model"]:
        """The ``count`` real activations of the bank that are nearest, nearest first."""
        if count > len(self.bank):
            raise ValueError(
                f"there are {len(self.bank)} real activations to choose {count} neighbours from: "
                "ask for fewer, or fit with a larger bank"
            )
        return self.bank[torch.cdist(x, self.bank).topk(count, largest=False).indices]


class Gathered:
    """Gathers moments, and a random bank of rows, from rows that come in chunks, without those that ``usual`` calls
    massive."""

    def __init__(self, bank: int, usual: Usual | None = None) -> None:
        self.size, self.scatter, self.usual, self.n_massive = bank, Scatter(), usual, 0
        self.keys = np.zeros(0)

    def add(self, x: Rows, generator: np.random.Generator) -> None:
        """Add a chunk. Raises ValueError for numbers that are not finite."""
        if self.usual is not None and len(x):
            exceeding = self.usual.exceeds(x.float().unsqueeze(0))[0]
            self.n_massive += int(exceeding.sum())
            x = x[~exceeding]
        keys = generator.random(len(x))
        if not len(x):
            return
        if not x.isfinite().all():
            raise ValueError("an activation is not finite: harvest in float32 or bfloat16, or fix the model's weights")
        if not self.scatter.count:
            self.bank = x[:0]
        self.scatter.add(x)
        keys = np.concatenate([self.keys, keys])
        smallest = np.sort(np.argsort(keys, kind="stable")[: self.size])
        self.keys, self.bank = keys[smallest], torch.cat([self.bank, x.float()])[torch.from_numpy(smallest)]

    def region(self, place: int, components: int | None, share: float) -> Region:
        """What was gathered at ``place``, with so many ``components`` or as many as hold a ``share`` of the variance.

        Raises ValueError for too few activations.
        """
        count, few = self.scatter.count, f"position {place} has {self.scatter.count} activations"
        if count < 2:
            raise ValueError(f"{few}, moments need two or more: take longer prompts, or fewer positions")
        values, vectors = torch.linalg.eigh(self.scatter.covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.T.flip(0)
        total, mean = values.sum(), self.scatter.mean
        varying = int((values > SINGULAR * values[0]).sum()) if total > CONSTANT * mean.square().sum() else 0
        cumulative = values.cumsum(0) / total
        k = min(varying, int((cumulative < share).sum()) + 1 if components is None else components)
        if count < SAMPLES * k:
            raise ValueError(
                f"{few}, {k} components need {SAMPLES * k} or more: take more prompts, or fewer components"
            )
        variance = float(cumulative[k - 1]) if k else 1.0
        scale = values[:k].sqrt().float()
        return Region(
            mean.float(), vectors[:k].float(), scale, self.bank, count, min(1.0, variance), self.usual, self.n_massive
        )
