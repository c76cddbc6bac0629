r"""Does the stream revert over several layers, and over all of them? Windows, and the panel of tokens by depth.

Every token is a trajectory ``x_0 .. x_L``. All that is needed is one matrix of second moments of these,

    G[s, t] = E<c(x_s), c(x_t)>,      c(x_t) = x_t - E x_t,

which is kept unit by unit, so that everything has an interval over prompts and memory does not grow with the corpus.

``windows``: for layers ``a`` to ``b - 1``, ``kappa = 1 - G[a, b] / G[a, a]``, what they take back together, and the
variance ratio ``E|c(x_b - x_a)|^2 / sum_l E|c(u_l)|^2``: 1 if updates are uncorrelated, below if later ones undo
earlier ones, above (up to the number of layers) if they go on in the same direction. This form, unlike A. Lo and
C. MacKinlay's (1988), does not take increments that grow with depth for momentum.

``panel``: one phi for a stretch of layers, ``c(x_{t+1}) = phi c(x_t) + shock`` (``surgery.stats.panels``), estimated

* *pooled*: no token has a mean of its own. Biased towards 1 if they have;
* *weighted*: the same with every layer's shock brought to one size, as shocks grow with depth;
* *within*: every token has a mean of its own. Biased towards reversion, S. Nickell (1981): the shorter, the more. The
  truth lies between *within* and *pooled*;
* *nickell* and *half panel*: *within* with that bias taken out, by formula and by jackknife (Dhaene and Jochmans 2015).
  Both assume that shocks do not grow: see what they say of the nulls.

``within_excess`` compares *within* with what it would be in a random walk whose increments have the variances of these:
the test of R. Harris and E. Tzavalis (1999) without equal shocks or independent tokens; its null and its spread are
computed from the data, prompt by prompt. Above 0 a shock lives longer than in a random walk, below 0 it is taken back.
``cross_correlation`` is the mean correlation of two tokens' shocks at one layer (H. Pesaran 2004): why prompts, and not
tokens, are counted.

**Nulls.** The same start, and updates of the same size that know nothing of the trajectory so far: *rotated*, every
layer's by a random rotation; *token_shuffled*, every layer's those of other tokens. Both are random walks.
*order_shuffled* runs the layers in random order; *untrained* is the architecture with fresh weights.

Compare with ``surgery.instruments.known_networks``: where layers write into fresh subspaces kappa is 0, VR is 1 and
pooled is 1 to rounding. Cost: 1 F with the walks, ``draws`` F in random orders, 1 F untrained, 1 F for massive
activations. Memory: the stream of one batch three times, and L d_model + L^2 numbers per unit. The measures are ours
except for the sources named.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack, tokens = Stack(known_networks.parallel_network()), known_networks.tokens()
>>> frame = windows(measure(stack, tokens, sampling=Sampling(resamples=20), draws=1))
>>> bool((frame.kappa.abs() < 1e-6).all() and ((frame.variance_ratio - 1).abs() < 1e-6).all())
True
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from surgery.instruments import massive
from surgery.instruments.coordinates import Map, coordinate_map
from surgery.instruments.ensemble import Ensemble, exchange, partners
from surgery.instruments.massive import Concentration
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.reversion.kappa import smaller_excess
from surgery.reversion.rules import held
from surgery.stats import panels
from surgery.stats.bootstrap import columns, described, measure_columns, pool, ratio, rotations, weights
from surgery.stats.drift import NEGLIGIBLE, Resampled, half_life
from surgery.stats.sampling import Sampling

NULLS = ("rotated", "token_shuffled", "order_shuffled", "untrained")
Trajectory = Float[Tensor, "time prompt pos d_model"]

_WINDOW = {
    "kappa": "part of a deviation that the window takes back; 1 is all of it",
    "psi": "2 kappa / growth^2: 0 random walk, 1 stationary, above 1 contracting, below 0 explosive",
    "growth": "size of what the window writes beside the stream that enters it",
    "variance_ratio": "variance of what the window writes over the summed variances of its layers' updates",
}
_OF_NULLS = {
    f"{name}_{null}": f"{name} {meaning} ({null.replace('_', ' ')})"
    for null in NULLS
    for name, meaning in (
        ("kappa", "of the null"),
        ("variance_ratio", "of the null"),
        ("kappa_excess", "kappa minus the null's: in excess"),
        ("variance_ratio_excess", "variance ratio minus the null's"),
    )
}
WINDOWS_COLUMNS = {
    "start": "first layer of the window",
    "stop": "first layer behind it",
    **described(_WINDOW),
    "half_life": "layers until half of a deviation is gone, at the window's rate; empty unless 0 < kappa < 1",
    **described(_OF_NULLS),
    **described({"kappa_excess": "the claim: kappa in excess of both random walks, the smaller of the two"}),
    "coordinates": "in which the stream is seen",
    "n_prompts": "number of prompts",
    **massive.COLUMNS,
}
_PANEL = {
    "pooled": "phi over one layer, no token with a mean of its own; biased towards 1 if they have",
    "weighted": "pooled, with every layer's shocks brought to one size",
    "within": "phi with a mean for every token; biased towards reversion in few layers",
    "within_walk": "within, of a random walk whose increments have these variances",
    "within_excess": "within minus within_walk: below 0 shocks are taken back",
    "nickell": "within, its bias taken out by formula (equal shocks assumed)",
    "half_panel": "within, its bias taken out by the half-panel jackknife; empty below 4 transitions",
    "kappa_ou": "-ln(pooled): the rate of the Ornstein-Uhlenbeck process seen at every layer; empty if pooled <= 0",
}
PANEL_COLUMNS = {
    "series": "the model, or which null",
    "span": "which layers, in a word",
    "start": "first layer",
    "stop": "first layer behind",
    "transitions": "layers in the span",
    **described(_PANEL),
    "half_life": "layers until half of a shock is gone, of pooled; empty unless 0 < pooled < 1",
    "z": "within_excess in units of its own spread over prompts",
    "p": "two-sided p of z: that this is a random walk",
    "cross_correlation": "mean correlation of two tokens' shocks over layers, coordinate by coordinate",
    "coordinates": "in which the stream is seen",
    "n_prompts": "number of prompts",
    **massive.COLUMNS,
}

_ENDS = {
    "kappa_ends": "mean kappa of the layers before and behind the middle",
    "kappa_middle": "mean kappa of the middle layers",
    "difference": "kappa_ends minus kappa_middle",
    "excess": "the same of kappa beyond the random walk that comes closer",
}
ENDS_COLUMNS = {
    "boundary_in": "first layer of the middle",
    "boundary_out": "first layer of the output part",
    **described(_ENDS),
    "coordinates": "in which the stream is seen",
    "n_prompts": "number of prompts",
    **massive.COLUMNS,
}


@dataclass(frozen=True)
class Sums:
    """Sums over every unit's tokens, from which G follows under any weights."""

    count: Float[Tensor, " unit"]
    total: Float[Tensor, "unit time d_model"]
    product: Float[Tensor, "unit time time"]

    @classmethod
    def empty(cls, n_units: int, times: int, width: int) -> "Sums":
        """Return the sums of ``n_units`` units before any token is added."""
        return cls(*(torch.zeros(n_units, *shape, dtype=torch.float64) for shape in ((), (times, width), (times,) * 2)))

    def add(self, unit: Int[Tensor, " prompt"], stream: Trajectory, mask: Bool[Tensor, "prompt pos"]) -> None:
        """Add the tokens of prompts, each to the sums of its unit."""
        x = stream.double().masked_fill(~mask.unsqueeze(-1), 0)
        self.count.index_add_(0, unit, mask.sum(1).double().cpu())
        self.total.index_add_(0, unit, reduce(x, "time prompt pos d_model -> prompt time d_model", "sum").cpu())
        product = einsum(x, x, "time prompt pos d_model, other prompt pos d_model -> prompt time other")
        self.product.index_add_(0, unit, product.cpu())

    def matrix(self, weights: Float[Tensor, "resample unit"]) -> Float[Tensor, "resample time time"]:
        """Return G under every row of weights; exactly 0 where nothing varies but by rounding."""
        count = (weights @ self.count)[:, None, None]
        mean = einsum(weights, self.total, "resample unit, unit time d_model -> resample time d_model") / count
        square = einsum(weights, self.product, "resample unit, unit time other -> resample time other") / count
        G = square - mean @ mean.mT
        still = G.diagonal(dim1=1, dim2=2) <= NEGLIGIBLE * square.diagonal(dim1=1, dim2=2)
        return G.masked_fill(still.unsqueeze(1) | still.unsqueeze(2), 0)


@dataclass(frozen=True)
class TrajectoryMoments:
    """The second moments of the model's trajectories and of every null's, under every resample."""

    matrices: dict[str, list[Float[Tensor, "resample time time"]]]  # several draws of a null
    n_prompts: int
    n_massive: int
    concentration: Concentration | None
    coordinates: str

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.matrices["model"][0].shape[-1] - 1

    def about(self, start: int, stop: int) -> dict[str, Any]:
        """What a row of a table about these layers says of how it was measured."""
        about = {"coordinates": self.coordinates, "n_prompts": self.n_prompts, "n_massive": self.n_massive}
        return about | held(self.concentration, range(start, stop + 1), range(start, stop))


@in_smaller_batches
def measure(
    stack: Stack,
    tokens: Ensemble | Tokens | Int[Tensor, "prompt pos"],
    *,
    draws: int = 4,
    nulls: bool = True,
    untrained: Stack | None = None,
    coordinates: str = "raw",
    sampling: Sampling = Sampling(),
) -> TrajectoryMoments:
    """Measure the second moments from which ``windows``, ``panel`` and ``ends`` are computed, in one go.

    ``draws`` is the number of random walks of each kind, and of random orders of layers. Raises ValueError if no token
    is left to measure, for a ``batch_size`` or ``draws`` that is not positive, unknown coordinates, or a stream that is
    not finite.
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    if draws < 1:
        raise ValueError(f"draws must be positive, got draws={draws}")
    resampled = weights(ensemble.n_units, sampling.resamples, sampling.seed)
    view = coordinate_map(coordinates, stack, ensemble)
    sums = _sums(stack, ensemble, view, draws if nulls else 0)
    if nulls:
        generator = np.random.default_rng((sampling.seed, 2))
        orders = [generator.permutation(stack.n_layers).tolist() for _ in range(draws)]
        sums["order_shuffled"] = [_sums(stack, ensemble, view, order=order)["model"][0] for order in orders]
        if untrained is not None:
            fresh = coordinate_map(coordinates, untrained, ensemble)
            sums["untrained"] = _sums(untrained, ensemble, fresh)["model"]
    matrices = {name: [draw.matrix(resampled) for draw in of_series] for name, of_series in sums.items()}
    return TrajectoryMoments(matrices, len(ensemble.tokens), ensemble.n_massive, ensemble.concentration, coordinates)


@with_meanings(WINDOWS_COLUMNS)
def windows(moments: TrajectoryMoments, max_length: int | None = None) -> pd.DataFrame:
    """Return one row per window of up to ``max_length`` layers (any, if not given): ``WINDOWS_COLUMNS``.

    No forward pass. Raises ValueError if no window is that short.
    """
    longest = moments.n_layers if max_length is None else max_length
    if longest < 1:
        raise ValueError(f"a window has 1 to {moments.n_layers} layers, got max_length={max_length}")
    rows = []
    for start in range(moments.n_layers):
        for stop in range(start + 1, min(start + longest, moments.n_layers) + 1):
            own = _window(moments.matrices["model"][0], start, stop)
            row: dict[str, float] = {"start": start, "stop": stop} | measure_columns(own)
            row["half_life"] = (stop - start) * half_life(float(own["kappa"][0]))
            of_nulls = dict[str, Resampled]()
            for null, matrices in moments.matrices.items():
                if null != "model":
                    of_nulls |= _null_measures(own, [_window(matrix, start, stop) for matrix in matrices], null)
            row |= measure_columns(of_nulls)
            if "rotated" in moments.matrices:
                row |= smaller_excess(row)
            rows.append(row | moments.about(start, stop))
    return pd.DataFrame(rows)


@with_meanings(PANEL_COLUMNS)
def panel(moments: TrajectoryMoments, boundaries: tuple[int, int] | None = None, first_layer: int = 1) -> pd.DataFrame:
    """Return phi of an autoregression over depth, a row per series (model or null) and span: ``PANEL_COLUMNS``.

    The spans are all layers from ``first_layer`` on (the stream that enters layer 0 is the bare embedding), and the
    layers before, between and after ``boundaries`` (thirds, if not given); those shorter than two layers are left out.
    No forward pass. Raises ValueError for boundaries outside the model.
    """
    rows = []
    for span, (start, stop) in spans(moments.n_layers, boundaries, first_layer).items():
        for series, matrices in moments.matrices.items():
            by_draw = [_panel(matrix[:, start : stop + 1, start : stop + 1]) for matrix in matrices]
            measures = {name: pool([draw[name] for draw in by_draw]) for name in by_draw[0]}
            row: dict[str, float | str] = {"series": series, "span": span, "start": start, "stop": stop}
            row["transitions"] = stop - start
            row |= measure_columns(measures)
            row["half_life"] = half_life(1 - float(row["pooled"]))
            excess = measures["within_excess"]
            z = float(excess[0] / excess[1:].std()) if len(excess) > 2 else math.nan
            row |= {"z": z, "p": math.erfc(abs(z) / math.sqrt(2))}
            rows.append(row | moments.about(start, stop))
    return pd.DataFrame(rows)


def spans(n_layers: int, boundaries: tuple[int, int] | None = None, first_layer: int = 1) -> dict[str, tuple[int, int]]:
    """Return ``all`` layers from ``first_layer`` on, and the three parts around ``boundaries``; none of a single layer.

    >>> spans(12)
    {'all': (1, 12), 'input': (1, 4), 'middle': (4, 8), 'output': (8, 12)}
    """
    first, second = _boundaries(n_layers, boundaries)
    start = min(first_layer, n_layers - 1)
    parts = {"all": (start, n_layers), "input": (start, first), "middle": (first, second), "output": (second, n_layers)}
    return {name: (a, b) for name, (a, b) in parts.items() if b - a >= 2}


@with_meanings(ENDS_COLUMNS)
def ends(moments: TrajectoryMoments, boundaries: tuple[int, int] | None = None, first_layer: int = 1) -> pd.DataFrame:
    """Compare reversion in the ends with the middle: mean kappa of the layers before and behind, minus between.

    One row: ``ENDS_COLUMNS``. ``boundaries`` as for ``panel``; the intervals over prompts take them as certain.
    ``excess`` is the same of kappa beyond the random walk that comes closer, and absent without nulls. No forward pass.
    Raises ValueError for boundaries outside the model; a part without a layer is undefined (NaN).
    """
    first, second = _boundaries(moments.n_layers, boundaries)
    outer = [*range(min(first_layer, first), first), *range(second, moments.n_layers)]
    middle = [*range(max(first, first_layer), second)]

    def kappas(series: str) -> Float[Tensor, "resample layer"]:
        by_draw = [
            torch.stack([_window(matrix, layer, layer + 1)["kappa"] for layer in range(moments.n_layers)], 1)
            for matrix in moments.matrices[series]
        ]
        return torch.stack(by_draw).mean(0)

    def contrast(values: Float[Tensor, "resample layer"]) -> Resampled:
        return values[:, outer].mean(1) - values[:, middle].mean(1)

    own = kappas("model")
    row: dict[str, float] = {"boundary_in": first, "boundary_out": second}
    row |= columns("kappa_ends", own[:, outer].mean(1)) | columns("kappa_middle", own[:, middle].mean(1))
    row |= columns("difference", contrast(own))
    if "rotated" in moments.matrices:
        walks = torch.stack([kappas("rotated"), kappas("token_shuffled")])
        row |= columns("excess", contrast(own - walks.amax(0)))
    return pd.DataFrame([row | moments.about(0, moments.n_layers)])


@in_smaller_batches
def cross_correlation(
    stack: Stack,
    tokens: Ensemble | Tokens | Int[Tensor, "prompt pos"],
    start: int = 1,
    stop: int | None = None,
    *,
    coordinates: str = "raw",
    sampling: Sampling = Sampling(),
) -> float:
    """Return the mean correlation of two tokens' shocks over layers ``start`` to ``stop``, coordinate by coordinate.

    0 if tokens are independent. The shocks are the centred updates, as they are in a random walk (H. Pesaran 2004; his
    CD is this times ``sqrt(T N (N - 1) / 2)``). NaN for one token or fewer than two layers. Cost: 2 F.
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    view = coordinate_map(coordinates, stack, ensemble)
    stop = stack.n_layers if stop is None else stop
    n_tokens = int(ensemble.mask.sum())
    if stop - start < 2 or n_tokens < 2:
        return math.nan

    def shocks() -> Iterator[Float[Tensor, "layer token width"]]:
        for _, context, mask, streams in ensemble.streams(stack):
            yield view.map(streams[start : stop + 1], context)[:, mask].diff(dim=0)

    mean = torch.stack([batch.sum(1) for batch in shocks()]).sum(0) / n_tokens
    totals, counts = [], []
    for batch in shocks():
        centred = batch - mean.unsqueeze(1)
        centred = centred - centred.mean(0)
        length = centred.norm(dim=0)
        totals.append(functional.normalize(centred, dim=0, eps=NEGLIGIBLE).sum(1))
        counts.append((length > NEGLIGIBLE).sum(0))
    total, count = torch.stack(totals).sum(0), torch.stack(counts).sum(0)
    return float(ratio(total.square().sum(0) - count, (count * (count - 1)).to(total)).nanmean())


def _boundaries(n_layers: int, boundaries: tuple[int, int] | None) -> tuple[int, int]:
    first, second = boundaries or (round(n_layers / 3), round(2 * n_layers / 3))
    if not 0 <= first <= second <= n_layers:
        raise ValueError(f"boundaries are 0 <= in <= out <= {n_layers}, got {boundaries}")
    return first, second


def _sums(
    stack: Stack, ensemble: Ensemble, view: Map, draws: int = 0, order: Sequence[int] | None = None
) -> dict[str, list[Sums]]:
    """Sum over the trajectories, with any order of layers, and over ``draws`` random walks of each kind. Cost: 1 F."""
    sums: dict[str, list[Sums]] = {}
    turns: list[Tensor] = []
    first = 0
    for unit, context, mask, stream in ensemble.streams(stack, "trajectories", order):
        mapped = view.map(stream, context)
        series = {"model": iter([mapped])}
        if draws:
            base, seed = mapped if view.linear else stream, ensemble.sampling.seed
            turns = turns or rotations(draws * stack.n_layers, base.shape[-1], np.random.default_rng((seed, 1)))
            walks = _random_walks(base, mask, turns, np.random.default_rng((seed, 3, first)))
            series |= {
                name: drawn if view.linear else (view.map(walk, context) for walk in drawn)
                for name, drawn in walks.items()
            }
        for name, drawn in series.items():
            of_series = sums.setdefault(name, [])
            for draw, points in enumerate(drawn):
                if len(of_series) == draw:
                    of_series.append(Sums.empty(ensemble.n_units, len(points), points.shape[-1]))
                of_series[draw].add(unit, points, mask)
        first += len(unit)
    return sums


def _random_walks(
    stream: Trajectory, mask: Tensor, turns: Sequence[Tensor], generator: np.random.Generator
) -> dict[str, Iterator[Trajectory]]:
    """Yield walks from the same start with the same updates: rotated, and those of other tokens."""
    updates = stream.diff(dim=0)

    def rotated(turns: Sequence[Tensor]) -> Tensor:
        return torch.stack([u @ turn.to(u).T for u, turn in zip(updates, turns, strict=True)])

    def shuffled() -> Tensor:
        return torch.stack([exchange(u, mask, partners(mask, generator)) for u in updates])

    def walk(steps: Tensor) -> Tensor:
        return torch.cat([stream[:1], stream[:1] + steps.cumsum(0)])

    firsts = range(0, len(turns), len(updates))
    return {
        "rotated": (walk(rotated(turns[first : first + len(updates)])) for first in firsts),
        "token_shuffled": (walk(shuffled()) for _ in firsts),
    }


def _window(matrix: Float[Tensor, "resample time time"], start: int, stop: int) -> dict[str, Resampled]:
    """Return the measures of the layers from ``start`` to ``stop - 1`` together."""
    before, after, both = matrix[:, start, start], matrix[:, stop, stop], matrix[:, start, stop]
    written = (before + after - 2 * both).clamp(min=0)
    kappa = 1 - ratio(both, before)
    return {
        "kappa": kappa,
        "psi": ratio(2 * kappa * before, written),
        "growth": ratio(written, before).sqrt(),
        "variance_ratio": panels.variance_ratio(matrix, start, stop - start),
    }


def _null_measures(
    own: dict[str, Resampled], draws: list[dict[str, Resampled]], null: str
) -> dict[str, Float[Tensor, " pooled"]]:
    """Return a null's measures; walks have updates of the window's size, of others kappa is brought to that size."""
    walk = null in ("rotated", "token_shuffled")
    kappas = [draw["kappa"] * (1 if walk else ratio(own["growth"], draw["growth"])) for draw in draws]
    measures: dict[str, Float[Tensor, " pooled"]] = {}
    for name, values in (("kappa", kappas), ("variance_ratio", [draw["variance_ratio"] for draw in draws])):
        measures[f"{name}_{null}"] = pool(values)
        measures[f"{name}_excess_{null}"] = pool([own[name] - value for value in values])
    return measures


def _panel(matrix: Float[Tensor, "resample time time"]) -> dict[str, Resampled]:
    """Return every estimate of phi on a stretch of layers."""
    within, walk = panels.within(matrix), panels.within(panels.random_walk(matrix))
    pooled, transitions = panels.pooled(matrix), matrix.shape[-1] - 1
    shocks = panels.increments(matrix)[0]
    return {
        "pooled": pooled,
        "weighted": panels.pooled(matrix, torch.where(shocks > 0, 1 / shocks, 0)),
        "within": within,
        "within_walk": walk,
        "within_excess": within - walk,
        "nickell": panels.nickell_corrected(within, transitions),
        "half_panel": panels.half_panel(matrix) if transitions >= 4 else torch.full_like(within, torch.nan),
        "kappa_ou": torch.where(pooled > 0, -pooled.clamp(min=1e-300).log(), torch.nan),
    }
