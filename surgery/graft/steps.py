"""The kinds of steps of a walk: what each draws for a prompt, and where that moves its activations."""

import itertools
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from surgery.training.regions import Region, Rows

Noise = Float[Tensor, "row number"]


@runtime_checkable
class Kind(Protocol):
    """How to step: which random numbers a prompt needs, and where they move its activations."""

    def draw(self, generator: np.random.Generator, length: int, d_model: int) -> Float[np.ndarray, "pos number"]:
        """Draw random numbers for every position of one prompt."""

    def move(self, region: Region, x: Rows, noise: Noise) -> Rows:
        """Activations of one class of positions after one step with these numbers."""


@dataclass(frozen=True)
class Stationary:
    """Shrink deviations to ``rho`` times and add noise in place of what is lost: mean and covariance stay.

    ``memory`` is the correlation of the noise from one position of a prompt to the next.

    >>> Stationary(1.0)
    Traceback (most recent call last):
        ...
    ValueError: rho is what a step leaves of a deviation, 0 (a fresh draw) or more and below 1, got 1.0
    """

    rho: float
    memory: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rho < 1:
            raise ValueError(
                f"rho is what a step leaves of a deviation, 0 (a fresh draw) or more and below 1, got {self.rho}"
            )
        _check_memory(self.memory)

    def draw(self, generator: np.random.Generator, length: int, d_model: int) -> Float[np.ndarray, "pos number"]:
        return _correlated(generator.standard_normal((length, d_model)), self.memory)

    def move(self, region: Region, x: Rows, noise: Noise) -> Rows:
        change = (self.rho - 1) * region.whitened(x) + (1 - self.rho**2) ** 0.5 * noise[:, : region.components]
        return x + region.unwhitened(change)


@dataclass(frozen=True)
class Free:
    """Add noise of ``eta`` standard deviations in every component; ``memory`` as in ``Stationary``."""

    eta: float
    memory: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("eta", self.eta)
        _check_memory(self.memory)

    def draw(self, generator: np.random.Generator, length: int, d_model: int) -> Float[np.ndarray, "pos number"]:
        return _correlated(generator.standard_normal((length, d_model)), self.memory)

    def move(self, region: Region, x: Rows, noise: Noise) -> Rows:
        return x + self.eta * region.unwhitened(noise[:, : region.components])


@dataclass(frozen=True)
class Tangent:
    """Add noise with ``step^2`` times the covariance of the nearest real activations: it follows data that bend."""

    step: float
    neighbours: int = 16

    def __post_init__(self) -> None:
        _check_positive("step", self.step)
        if self.neighbours < 2:
            raise ValueError(f"a covariance needs two neighbours or more, got {self.neighbours}")

    def draw(self, generator: np.random.Generator, length: int, d_model: int) -> Float[np.ndarray, "pos number"]:
        return generator.standard_normal((length, self.neighbours))

    def move(self, region: Region, x: Rows, noise: Noise) -> Rows:
        near = region.nearest(x, self.neighbours)
        centred = near - near.mean(1, keepdim=True)
        along = einsum(noise, centred, "row neighbour, row neighbour d_model -> row d_model")
        return x + self.step / self.neighbours**0.5 * along


@dataclass(frozen=True)
class Interpolated:
    """Move between two real activations or, if ``beyond``, as far behind the first: ``l = 1 + Beta(alpha, alpha)``."""

    alpha: float
    beyond: bool = False

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)

    def draw(self, generator: np.random.Generator, length: int, d_model: int) -> Float[np.ndarray, "pos number"]:
        weight = generator.beta(self.alpha, self.alpha, length)
        return np.stack([weight + self.beyond, generator.random(length)], 1)

    def move(self, region: Region, x: Rows, noise: Noise) -> Rows:
        weight, partner = noise[:, :1], (noise[:, 1] * len(region.bank)).long().clamp(max=len(region.bank) - 1)
        return weight * x + (1 - weight) * region.bank[partner]


@dataclass(frozen=True)
class Scattered:
    """The control: move every activation as far as ``kind`` does, in a uniformly random direction."""

    kind: Kind

    def draw(self, generator: np.random.Generator, length: int, d_model: int) -> Float[np.ndarray, "pos number"]:
        numbers = self.kind.draw(generator, length, d_model)
        return np.concatenate([generator.standard_normal((length, d_model)), numbers], 1)

    def move(self, region: Region, x: Rows, noise: Noise) -> Rows:
        direction, numbers = noise[:, : x.shape[1]], noise[:, x.shape[1] :]
        distance = (self.kind.move(region, x, numbers) - x).norm(dim=1, keepdim=True)
        return x + distance * direction / direction.norm(dim=1, keepdim=True)


def _correlated(noise: Float[np.ndarray, "pos number"], memory: float) -> Float[np.ndarray, "pos number"]:
    """Noise in which each position remembers the one before: AR(1) of variance 1."""
    for before, row in itertools.pairwise(noise):
        row *= (1 - memory**2) ** 0.5
        row += memory * before
    return noise


def _check_memory(memory: float) -> None:
    if not 0 <= memory <= 1:
        raise ValueError(f"memory is the correlation of neighbouring positions' noise, 0 to 1, got {memory}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is the size of a step, above 0, got {value}")
