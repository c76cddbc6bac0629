r"""Lines of thought: the stream of many prompts as one cloud that is rotated, stretched, and blurred by noise.

The stream at the last token of every prompt draws a line through the layers. Sarfati et al. (2024, arXiv 2410.01545)
find that the cloud of all lines moves, from depth ``t`` to ``t + tau`` (in layers), nearly as

    x(t + tau) = U(t + tau) Lambda(t, tau) U(t)^T x(t) + w,      Lambda = diag(sigma_i(t + tau) / sigma_i(t)),

``U(t)`` and ``sigma(t)`` the principal components of the cloud at ``t`` and its spread along them, ``w`` isotropic and
Gaussian with a variance of ``alpha exp(lambda (t + tau))`` in every coordinate. ``noise`` measures ``w`` for every
pair of depths and ``fit`` the line ``ln variance = ln alpha + lambda (t + tau)`` through them. ``growth`` is how much
longer each layer makes the stream, which S. Heimersheim and A. Turner (2023) find to be exponential, too.

The map matches spreads; it is not a regression and not a drift, and that it stretches says nothing of reversion. With
``y(t) = U(t)^T x(t)`` and ``rho_i`` the correlation of ``y_i(t)`` with ``y_i(t + tau)``, the noise is

    E|w|^2 = 2 sum_i sigma_i(t + tau)^2 (1 - rho_i),

whatever decorrelated the components: a process with noise, a layer that mixes two of them, two that changed places.
A random walk with growing updates has an exponent as well. So **compare lambda with its nulls**: the same updates given
to other tokens (``token_shuffled``) or turned by random rotations (``rotated``), a layer at a time, which makes random
walks of them; and the architecture ``untrained``.

Choices. Clouds are centred (``centred=False`` is as in the paper's code). The sign of a component is the one in which
it continues the component before. Variances are per coordinate of the model, ``E|w|^2 / d_model``. A component without
spread is not stretched. Every pair of depths counts once in the fit; those that start at the embedding, which is small
in many models and low in rank, are left out (``first=1``). Components, spreads and signs are kept in the resamples.

Fewer prompts than dimensions leave components without spread, and only a few more give components that fit these
prompts alone: the paper has 3 to 14 times as many as d_model, and below 3 times ``enough`` says no.

Compare: ``PUBLISHED``. The measure is theirs, intervals and nulls are ours.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack, tokens = Stack(known_networks.linear_network(gain=1.0)), known_networks.tokens(96)
>>> frame = fit(stack, tokens, sampling=Sampling(resamples=50))
>>> frame.network.tolist()
['model', 'token_shuffled', 'rotated']
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from surgery.instruments import massive
from surgery.instruments.ensemble import Ensemble, Totals, partners
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.reversion.rules import held
from surgery.stats.bootstrap import columns, described, measure_columns, ratio, rotations, weights
from surgery.stats.sampling import Sampling

Streams = Float[Tensor, "depth row d_model"]
Resampled = Float[Tensor, " resample"]

NULLS = ("token_shuffled", "rotated")
NEGLIGIBLE = 1e-12  # a variance below this share of the second moment is rounding
PUBLISHED: dict[str, dict[str, float]] = {
    "gpt2-medium": {"lambda": 0.18, "alpha": 0.64},  # arXiv 2410.01545; .64 may be ln alpha: their Llama's is negative
    "Llama-2-7B": {"lambda": 0.27},  # the same
    "gpt2-xl": {"norm_growth": 1.045},  # Heimersheim and Turner 2023
}
_MEASURES = {
    "noise": "variance per coordinate that the map from start to stop does not explain (units of the stream, squared)",
    "unexplained": "that over the variance of the stream: 0 the map explains all, 1 no more than the mean, 2 unrelated",
    "excess_kurtosis": "excess kurtosis of the noise one layer on, mean over principal components: 0 Gaussian",
    "lambda": "growth of the log of the noise's variance, per layer",
    "alpha": "variance of the noise per coordinate, extrapolated to depth 0 (units of the stream, squared)",
    "r2": "share of the variance of log noise over pairs that the exponential explains",
    "norm": "geometric mean over tokens of the length of the stream that enters the layer",
    "norm_growth": "geometric mean over tokens of |stream leaving| / |stream entering the layer|",
    "norm_growth_fitted": "factor per layer of the exponential fitted to norm, the same in every row",
}
COLUMNS = described(_MEASURES) | {
    "network": "model, one of the nulls token_shuffled and rotated, or untrained",
    "layer": "layer, counted from 0",
    "start": "depth at which the map starts: the stream that enters this layer",
    "stop": "depth at which it ends: the stream that enters this layer, or leaves the last",
    "isotropy": "participation of the noise's variances one layer on, over d_model: 1 alike in all coordinates",
    "top_quarter": "share of the stream's variance in its top d_model / 4 components, mean over depths",
    "norm_growth_r2": "share of the variance of log norm over depths that the exponential explains",
    "n_pairs": "pairs of depths in the fit",
    "n_components": "components with spread, the fewest of all depths",
    "n_tokens": "lines: tokens measured",
    "n_prompts": "prompts measured, resampled by units of surgery.instruments.ensemble",
    **massive.COLUMNS,
    "enough": "yes, if there are 3 d_model lines; no, and how many to give",
}


@with_meanings(COLUMNS)
@in_smaller_batches
def noise(
    stack: Stack,
    tokens: Ensemble | Tokens | Int[Tensor, "prompt pos"],
    *,
    null: str | None = None,
    every_token: bool = False,
    centred: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure ``noise`` and ``unexplained`` of the map between every pair of depths, one row each, with intervals.

    Neighbouring depths also have ``excess_kurtosis`` and ``isotropy``; for the others they are NaN. ``null`` is one of
    ``NULLS``; ``every_token`` takes all tokens in place of each prompt's last. Other columns: ``COLUMNS``. Tokens of
    massive activations are left out, unless ``sampling.skip_massive`` is False.

    Cost: 2 F, and 1 F to find massive activations. Memory: one batch's stream, and 3 d_model x d_model matrices per
    layer.

    Raises ValueError for another ``null``, for fewer than 3 lines, and if the stream is not finite.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack, tokens = Stack(known_networks.random_network(n_layers=2)), known_networks.tokens(60)
    >>> frame = noise(stack, tokens, sampling=Sampling(resamples=20))
    >>> frame[["start", "stop"]].values.tolist()
    [[0, 1], [0, 2], [1, 2]]
    """
    ensemble = _ensemble(stack, tokens, every_token, sampling=sampling)
    residuals = _residuals(stack, ensemble, null, centred)
    draws, components = _draws(ensemble, sampling.resamples), residuals.components
    rows = []
    for start, stop in combinations(range(stack.n_layers + 1), 2):
        row: dict[str, Any] = {"start": start, "stop": stop}
        row |= columns("noise", residuals.noise(start, stop, draws))
        row |= columns("unexplained", residuals.unexplained(start, stop, draws))
        near = stop == start + 1
        row |= columns("excess_kurtosis", residuals.kurtosis(start, draws) if near else torch.full((1,), math.nan))
        row["isotropy"] = components.isotropy(start) if near else math.nan
        rows.append(
            row | {"n_components": min(components.rank[start], components.rank[stop])} | _counts(ensemble, stack)
        )
    return pd.DataFrame(rows)


@with_meanings(COLUMNS)
@in_smaller_batches
def fit(
    stack: Stack,
    tokens: Ensemble | Tokens | Int[Tensor, "prompt pos"],
    *,
    first: int = 1,
    last: int | None = None,
    nulls: bool = True,
    untrained: Stack | None = None,
    every_token: bool = False,
    centred: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Fit an exponential to the noise of all pairs of depths from ``first`` to ``last``: one row per network.

    The first row is the model; those of the nulls follow, and that of ``untrained`` if given. Columns: ``network``,
    ``lambda``, ``alpha``, ``r2`` (refitted in every resample), means of ``unexplained`` over pairs and of
    ``excess_kurtosis`` and ``isotropy`` over layers, ``top_quarter``, and counts; see ``COLUMNS``. Pairs whose noise is
    rounding are left out; if fewer than two end depths remain, as in a model of two layers, nothing can be fitted
    (NaN): see ``first=0``.

    Tokens of massive activations in the model are left out of every row, unless ``sampling.skip_massive`` is False.

    The last layers of some models stand apart: look at ``noise``, and fit again up to a smaller ``last`` (the final
    depth if not given).

    Cost: 2 F per row, and 1 F to find massive activations. Raises as ``noise``, and ValueError unless ``first`` comes
    before ``last``.
    """
    last = stack.n_layers if last is None else last
    if not 0 <= first < last <= stack.n_layers:
        raise ValueError(f"depths go from 0 to {stack.n_layers} and first before last, got {first} and {last}")
    ensemble = _ensemble(stack, tokens, every_token, sampling=sampling)
    draws, rows = _draws(ensemble, sampling.resamples), []
    networks: list[tuple[str, Stack, str | None]] = [("model", stack, None)]
    networks += [(null, stack, null) for null in NULLS if nulls]
    networks += [("untrained", untrained, None)] if untrained is not None else []
    for name, network, null in networks:
        fitted = _residuals(network, ensemble, null, centred).fit(first, last, draws)
        rows.append({"network": name} | fitted | _counts(ensemble, network))
    return pd.DataFrame(rows)


@with_meanings(COLUMNS)
@in_smaller_batches
def growth(
    stack: Stack,
    tokens: Ensemble | Tokens | Int[Tensor, "prompt pos"],
    *,
    first: int = 1,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure how long the stream is that enters each layer, by what factor the layer lengthens it, and the fit.

    ``norm_growth_fitted`` is ``exp`` of the slope of ``ln norm`` over depths from ``first`` to the last. All tokens
    count but those of massive activations (unless ``sampling.skip_massive`` is False); means are geometric, so that no
    long token dominates. One row per layer. Cost: 1 F, and 1 F to find massive activations.

    Raises ValueError if no token is left to measure, if the stream is not finite, or if two depths do not remain.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack, tokens = Stack(known_networks.linear_network(gain=1.0)), known_networks.tokens(8)
    >>> frame = growth(stack, tokens, sampling=Sampling(resamples=20))
    >>> bool((frame.norm_growth > 1).all())
    True
    """
    if not 0 <= first < stack.n_layers:
        raise ValueError(f"first is a depth before the last, {stack.n_layers}: 0 to {stack.n_layers - 1}, got {first}")
    ensemble = Ensemble.of(stack, tokens, sampling)
    totals, draws = Totals(ensemble.n_units), _draws(ensemble, sampling.resamples)
    for unit, stream in _lines(stack, ensemble, None):
        totals.add("log", unit, stream.norm(dim=-1).log().T)
        totals.add("count", unit, torch.ones(len(unit)))
    log = draws @ totals["log"] / (draws @ totals["count"]).unsqueeze(1)
    _, slope, r2 = line(torch.arange(first, stack.n_layers + 1).double(), log[:, first:])
    fitted = columns("norm_growth_fitted", slope.exp()) | {"norm_growth_r2": float(r2[0])}
    rows = []
    for layer in range(stack.n_layers):
        row: dict[str, Any] = {"layer": layer} | columns("norm", log[:, layer].exp())
        row |= columns("norm_growth", (log[:, layer + 1] - log[:, layer]).exp())
        rows.append(
            row
            | fitted
            | {"n_prompts": len(ensemble.tokens)}
            | held(ensemble.concentration, [layer, layer + 1], [layer])
        )
    return pd.DataFrame(rows).assign(n_massive=ensemble.n_massive)


# --- pure statistics --------------------------------------------------------------------------------------------------


class Clouds:
    """The first pass: second moments of the cloud at every depth, and between neighbours."""

    def __init__(self, n_depths: int, d_model: int) -> None:
        self.count = 0
        self.total = torch.zeros(n_depths, d_model, dtype=torch.float64)
        self.square = torch.zeros(n_depths, d_model, d_model, dtype=torch.float64)
        self.cross = torch.zeros(n_depths - 1, d_model, d_model, dtype=torch.float64)

    def add(self, stream: Streams) -> None:
        """Add some lines, at all depths."""
        x = stream.double()
        self.count += x.shape[1]
        self.total += x.sum(1).cpu()
        for depth, cloud in enumerate(x):
            self.square[depth] += (cloud.T @ cloud).cpu()
            if depth:
                self.cross[depth - 1] += (x[depth - 1].T @ cloud).cpu()

    def components(self, centred: bool = True) -> "Components":
        """Return the principal components of every depth, each continuing the one of the same rank before."""
        mean = self.total / self.count * centred
        square, cross = self.square / self.count, self.cross / self.count
        values, vectors = torch.linalg.eigh(square - mean.unsqueeze(2) * mean.unsqueeze(1))
        values, vectors = values.flip(-1), vectors.flip(-1)
        spread = values > NEGLIGIBLE * square.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
        variance, basis = values * spread, vectors * spread.unsqueeze(1)
        step = torch.zeros_like(variance[1:])
        for depth, products in enumerate(cross - mean[:-1].unsqueeze(2) * mean[1:].unsqueeze(1)):
            shared = ((basis[depth].T @ products) * basis[depth + 1].T).sum(1)
            basis[depth + 1] *= torch.where(shared < 0, -1.0, 1.0)
            factor = _stretch(variance[depth], variance[depth + 1])
            step[depth] = variance[depth + 1] + factor**2 * variance[depth] - 2 * factor * shared.abs()
        return Components(mean, basis, variance, step.clamp(min=0))


@dataclass(frozen=True)
class Components:
    """The frame in which every depth is read; components without spread are 0."""

    mean: Float[Tensor, "depth d_model"]
    basis: Float[Tensor, "depth d_model component"]
    variance: Float[Tensor, "depth component"]  # sigma^2
    step: Float[Tensor, "layer component"]  # variance of the noise one layer on, in closed form

    @property
    def rank(self) -> list[int]:
        """How many components have spread, at every depth."""
        return (self.variance > 0).sum(1).tolist()

    def rotate(self, stream: Streams) -> Float[Tensor, "depth row component"]:
        """Return ``y``: the stream of every depth in its own components."""
        return (stream.double() - self.mean.unsqueeze(1).to(stream.device)) @ self.basis.to(stream.device)

    def isotropy(self, layer: int) -> float:
        """Return ``(sum v)^2 / (d_model sum v^2)`` of the variances ``v`` of the noise of one layer."""
        step = self.step[layer : layer + 1]
        return float(ratio(step.sum(1) ** 2, (step**2).sum(1) * step.shape[1]))

    def top_quarter(self, first: int, last: int) -> float:
        """Return the share of the variance in the top quarter of components, the mean over depths."""
        variance = self.variance[first : last + 1]
        return float(ratio(variance[:, : math.ceil(variance.shape[1] / 4)].sum(1), variance.sum(1)).nanmean())


class Residuals:
    """The second pass: per unit of resampling, squared residuals of the map for every pair of depths."""

    def __init__(self, components: Components, n_units: int) -> None:
        self.components, self.totals = components, Totals(n_units)
        self.n_depths, self.d_model = components.mean.shape

    def add(self, unit: Int[Tensor, " row"], stream: Streams) -> None:
        """Add lines of the first pass again, with the unit of resampling of each.

        ``Lambda`` is a ratio of spreads, so with ``z = y / sigma`` the map leaves
        ``sigma(t + tau) (z(t + tau) - z(t))``, whose squares are products of matrices, of all pairs of depths at once.
        """
        y = self.components.rotate(stream)
        variance = self.components.variance.to(y)
        sigma = variance.sqrt().unsqueeze(1)
        z, own = torch.where(sigma > 0, y / sigma, 0), y.square().sum(-1).T
        ours, theirs = (rearrange(a, "depth row component -> row depth component") for a in (y * sigma, z))
        left = theirs.square() @ variance.T - 2 * theirs @ ours.mT + own.unsqueeze(1)
        self.totals.add("count", unit, torch.ones(len(unit)))
        self.totals.add("total", unit, own)
        self.totals.add("left", unit, left.clamp(min=0))
        for stop in range(1, self.n_depths):
            step = self.components.step[stop - 1].to(y)
            noisy = step > NEGLIGIBLE * self.components.variance[stop].sum()
            last = (y[stop] - self.stretch(stop - 1, stop).to(y) * y[stop - 1])[:, noisy]
            self.totals.add(("fourth", stop), unit, (last.square() / step[noisy]).square().mean(1))

    def stretch(self, start: int, stop: int) -> Float[Tensor, " component"]:
        """Return the diagonal of ``Lambda``."""
        return _stretch(self.components.variance[start], self.components.variance[stop])

    def noise(self, start: int, stop: int, draws: Float[Tensor, "resample unit"]) -> Resampled:
        """Return ``E|w|^2 / d_model``."""
        return draws @ self.totals["left"][:, start, stop] / (draws @ self.totals["count"]) / self.d_model

    def unexplained(self, start: int, stop: int, draws: Float[Tensor, "resample unit"]) -> Resampled:
        """Return ``E|w|^2 / E|c(x)|^2``."""
        return ratio(draws @ self.totals["left"][:, start, stop], draws @ self.totals["total"][:, stop])

    def kurtosis(self, layer: int, draws: Float[Tensor, "resample unit"]) -> Resampled:
        """Return ``E w_i^4 / (E w_i^2)^2 - 3``, the mean over components; NaN without noise."""
        return draws @ self.totals["fourth", layer + 1] / (draws @ self.totals["count"]) - 3

    def fit(self, first: int, last: int, draws: Float[Tensor, "resample unit"]) -> dict[str, Any]:
        """Return the columns of ``fit``, but for the counts of prompts."""
        every, layers = list(combinations(range(first, last + 1), 2)), range(first, last)
        unexplained = torch.stack([self.unexplained(*pair, draws) for pair in every])
        pairs = [pair for pair, values in zip(every, unexplained) if values[0] > NEGLIGIBLE]
        log = torch.stack([draws.new_zeros(len(draws)), *(self.noise(*pair, draws).log() for pair in pairs)], 1)[:, 1:]
        intercept, slope, r2 = line(torch.tensor([stop for _, stop in pairs]).double(), log)
        row: dict[str, Any] = measure_columns(
            {
                "lambda": slope,
                "alpha": intercept.exp(),
                "r2": r2,
                "unexplained": unexplained.nanmean(0),
                "excess_kurtosis": torch.stack([self.kurtosis(layer, draws) for layer in layers]).nanmean(0),
            }
        )
        isotropy = torch.tensor([self.components.isotropy(layer) for layer in layers])
        row |= {"isotropy": float(isotropy.nanmean()), "top_quarter": self.components.top_quarter(first, last)}
        return row | {"n_pairs": len(pairs), "n_components": min(self.components.rank[first : last + 1])}


def line(x: Float[Tensor, " point"], y: Float[Tensor, "resample point"]) -> tuple[Resampled, Resampled, Resampled]:
    """Fit every row of ``y`` by least squares: intercept, slope and R^2; NaN unless there are two different ``x``.

    >>> [value.item() for value in line(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[1.0, 3.0, 5.0]]))]
    [1.0, 2.0, 1.0]
    """
    away, off = x - x.mean(), y - y.mean(1, keepdim=True)
    square = (away @ away).expand(len(y))
    slope = ratio(off @ away, square)
    return y.mean(1) - slope * x.mean(), slope, ratio(slope**2 * square, (off**2).sum(1))


def _stretch(before: Float[Tensor, " component"], after: Float[Tensor, " component"]) -> Float[Tensor, " component"]:
    """Return the ratio of two spreads, given variances; 0 for a component without spread before."""
    return torch.where(before == 0, 0, after / before).sqrt()


# --- the model --------------------------------------------------------------------------------------------------------


def _ensemble(stack: Stack, tokens: Ensemble | Tokens | Tensor, every_token: bool, sampling: Sampling) -> Ensemble:
    ensemble = Ensemble.of(stack, tokens, sampling)
    tokens = ensemble.tokens
    if not every_token:
        last = tokens.positions == tokens.mask.sum(1, keepdim=True) - 1
        ensemble = replace(ensemble, left_out=~(ensemble.mask & last))
    if (lines := int(ensemble.mask.sum())) < 3:
        raise ValueError(
            f"a cloud needs 3 lines at the least and better {3 * stack.d_model} (3 d_model), there are {lines}: give "
            "more prompts, or every_token=True"
        )
    return ensemble


def _residuals(stack: Stack, ensemble: Ensemble, null: str | None, centred: bool) -> Residuals:
    if null not in (None, *NULLS):
        raise ValueError(f"there is no null {null!r}: choose one of {', '.join(NULLS)}, or None")
    clouds = Clouds(stack.n_layers + 1, stack.d_model)
    for _, stream in _lines(stack, ensemble, null):
        clouds.add(stream)
    residuals = Residuals(clouds.components(centred), ensemble.n_units)
    for unit, stream in _lines(stack, ensemble, null):
        residuals.add(unit, stream)
    return residuals


def _lines(stack: Stack, ensemble: Ensemble, null: str | None) -> Iterator[tuple[Int[Tensor, " row"], Streams]]:
    """Yield the unit of every measured token and their stream (or that of a null) in float64, batch by batch."""
    turns, first = _turns(stack, ensemble.sampling.seed) if null == "rotated" else [], 0
    for unit, _, mask, streams in ensemble.streams(stack, "lines of thought"):
        stream = streams[:, mask].double()
        updates = stream.diff(dim=0)
        for layer, u in enumerate(updates):
            if null == "rotated":
                updates[layer] = u @ turns[layer].to(u)
            elif null == "token_shuffled":
                generator = np.random.default_rng((ensemble.sampling.seed, 1, layer, first))
                updates[layer] = u[partners(mask, generator)]
        if null is not None:
            stream = torch.cat([stream[:1], stream[:1] + updates.cumsum(0)])
        yield unit[mask.nonzero()[:, 0].cpu()], stream
        first += len(mask)


def _turns(stack: Stack, seed: int) -> list[Float[Tensor, "d_model d_model"]]:
    return rotations(stack.n_layers, stack.d_model, np.random.default_rng((seed, 2)))


def _draws(ensemble: Ensemble, resamples: int) -> Float[Tensor, "resample unit"]:
    return weights(ensemble.n_units, resamples, ensemble.sampling.seed)


def _counts(ensemble: Ensemble, stack: Stack) -> dict[str, Any]:
    lines, needed = int(ensemble.mask.sum()), 3 * stack.d_model
    enough = "yes" if lines >= needed else f"no: {lines} lines in {stack.d_model} dimensions, give {needed} or more"
    return {"n_tokens": lines, "n_prompts": len(ensemble.tokens), "enough": enough}
