r"""Does the stream revert over several layers, and over all of them? Windows, and the panel of tokens by depth.

Every token is a trajectory ``x_0 .. x_L``. All that is needed of them is one matrix of second moments,

    G[s, t] = E<c(x_s), c(x_t)>,      c(x_t) = x_t - E x_t,

which is kept unit by unit, so that everything has an interval over prompts and nothing grows with the corpus.

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

**Nulls.** The same start, and updates of the same size that know nothing of the way so far: *rotated*, every layer's by
a random rotation; *token_shuffled*, every layer's those of other tokens. Both are random walks. *order_shuffled* runs
the layers in random order; *untrained* is the architecture with fresh weights.

Compare with ``surgery.instruments.known_networks``: where layers write into fresh subspaces kappa is 0, VR is 1 and pooled is 1 to
rounding. Cost: 1 F with the walks, ``draws`` F in random orders, 1 F untrained, 1 F for massive activations. Memory:
the stream of one batch three times, and L d_model + L^2 numbers a unit. The measures are ours but for the sources
named.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> frame = windows(measure(Stack(known_networks.parallel_network()), known_networks.tokens(), sampling=Sampling(resamples=20), draws=1))
>>> bool((frame.kappa.abs() < 1e-6).all() and ((frame.variance_ratio - 1).abs() < 1e-6).all())
True
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from surgery.instruments import coordinates as maps
from surgery.instruments.ensemble import Ensemble, exchanged, partners
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.stats import panels
from surgery.stats.bootstrap import columns, described, ratio, rotation, weights
from surgery.stats.drift import NEGLIGIBLE, Resampled, half_life
from surgery.stats.sampling import Sampling

NULLS = ("rotated", "token_shuffled", "order_shuffled", "untrained")
Way = Float[Tensor, "time prompt pos d_model"]

_WINDOW = {
    "kappa": "part of a deviation that the window takes back; 1 is all of it",
    "psi": "2 kappa / growth^2: 0 random walk, 1 stationary, above 1 contracting, below 0 explosive",
    "growth": "size of what the window writes beside the stream that enters it",
    "variance_ratio": "variance of what the window writes over the summed variances of its layers' updates",
}
_OF_NULLS = {
    f"{name}_{null}": f"{name} {what} ({null.replace('_', ' ')})"
    for null in NULLS
    for name, what in (
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
    "n_massive": "tokens left out for massive activations",
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
    "n_massive": "tokens left out for massive activations",
}

_ENDS = {
    "kappa_ends": "mean kappa of the layers before and behind the middle",
    "kappa_middle": "mean kappa of the middle layers",
    "difference": "kappa_ends minus kappa_middle: above 0 reversion is stronger in the ends",
    "excess": "the same of kappa beyond the random walk that comes closer",
}
ENDS_COLUMNS = {
    "boundary_in": "first layer of the middle",
    "boundary_out": "first layer of the output part",
    **described(_ENDS),
    "coordinates": "in which the stream is seen",
    "n_prompts": "number of prompts",
}


@dataclass(frozen=True)
class Moments:
    """Sums over every unit's tokens, from which G follows under any weights."""

    count: Float[Tensor, " unit"]
    total: Float[Tensor, "unit time d_model"]
    product: Float[Tensor, "unit time time"]

    @classmethod
    def empty(cls, n_units: int, times: int, width: int) -> "Moments":
        return cls(*(torch.zeros(n_units, *shape, dtype=torch.float64) for shape in ((), (times, width), (times,) * 2)))

    def add(self, unit: Int[Tensor, " prompt"], way: Way, mask: Bool[Tensor, "prompt pos"]) -> None:
        """Add the tokens of prompts, each to what its unit has."""
        way = way.double().masked_fill(~mask.unsqueeze(-1), 0)
        self.count.index_add_(0, unit, mask.sum(1).double().cpu())
        self.total.index_add_(0, unit, way.sum(2).transpose(0, 1).cpu())
        self.product.index_add_(0, unit, torch.einsum("sipd,tipd->ist", way, way).cpu())

    def matrix(self, weights: Float[Tensor, "resample unit"]) -> Float[Tensor, "resample time time"]:
        """G under every row of weights; exactly 0 where nothing varies but by rounding."""
        count = (weights @ self.count)[:, None, None]
        mean = torch.einsum("ru,utd->rtd", weights, self.total) / count
        square = torch.einsum("ru,ust->rst", weights, self.product) / count
        found = square - mean @ mean.mT
        still = found.diagonal(dim1=1, dim2=2) <= NEGLIGIBLE * square.diagonal(dim1=1, dim2=2)
        return found.masked_fill(still.unsqueeze(1) | still.unsqueeze(2), 0)


@dataclass(frozen=True)
class Ways:
    """The moments of the model's trajectories and of every null's, under every resample."""

    matrices: dict[str, list[Float[Tensor, "resample time time"]]]  # several draws of a null
    n_prompts: int
    n_massive: int
    coordinates: str

    @property
    def n_layers(self) -> int:
        return self.matrices["model"][0].shape[-1] - 1


def measure(
    stack: Stack,
    tokens: Tokens | Int[Tensor, "prompt pos"],
    *,
    draws: int = 4,
    nulls: bool = True,
    untrained: Stack | None = None,
    coordinates: str = "raw",
    skip_massive: bool = True,
    sampling: Sampling = Sampling(),
) -> Ways:
    """Walk through the prompts once for everything that ``windows`` and ``panel`` say; both take what this returns.

    ``draws`` is the number of random walks of each kind, and of random orders of layers. Raises ValueError if no token
    is left to measure, for a ``batch_size`` or ``draws`` that is not positive, unknown coordinates, or a stream that is
    not finite.
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    if draws < 1:
        raise ValueError(f"draws must be positive, got draws={draws}")
    n_massive = 0
    if skip_massive:
        whole, ensemble = int(ensemble.mask.sum()), ensemble.without_massive(stack)
        n_massive = whole - int(ensemble.mask.sum())
    resampled = weights(ensemble.n_units, sampling.resamples if ensemble.n_units > 1 else 0, sampling.seed)
    seen = maps.of(coordinates, stack, ensemble)
    sums = _walk(stack, ensemble, seen, draws if nulls else 0)
    if nulls:
        generator = np.random.default_rng((sampling.seed, 2))
        orders = [generator.permutation(stack.n_layers).tolist() for _ in range(draws)]
        sums["order_shuffled"] = [_walk(stack, ensemble, seen, order=order)["model"][0] for order in orders]
        if untrained is not None:
            fresh = maps.of(coordinates, untrained, ensemble)
            sums["untrained"] = _walk(untrained, ensemble, fresh)["model"]
    matrices = {name: [moments.matrix(resampled) for moments in several] for name, several in sums.items()}
    return Ways(matrices, len(ensemble.tokens), n_massive, coordinates)


def windows(ways: Ways, max_length: int | None = None) -> pd.DataFrame:
    """One row per window of up to ``max_length`` layers (any, if not given): ``WINDOWS_COLUMNS``. No forward pass.

    Raises ValueError if no window is that short.
    """
    longest = ways.n_layers if max_length is None else max_length
    if longest < 1:
        raise ValueError(f"a window has 1 to {ways.n_layers} layers, got max_length={max_length}")
    rows = []
    for start in range(ways.n_layers):
        for stop in range(start + 1, min(start + longest, ways.n_layers) + 1):
            own = _window(ways.matrices["model"][0], start, stop)
            row: dict[str, float | str] = {"start": start, "stop": stop}
            for name, values in own.items():
                row |= columns(name, values)
            row["half_life"] = (stop - start) * half_life(float(own["kappa"][0]))
            for null, several in ways.matrices.items():
                if null != "model":
                    row |= _against(own, [_window(matrix, start, stop) for matrix in several], null)
            if "kappa_excess_rotated" in row:
                for end in ("", "_low", "_high"):
                    over = row[f"kappa_excess_rotated{end}"], row[f"kappa_excess_token_shuffled{end}"]
                    row[f"kappa_excess{end}"] = float(np.minimum(*over))
            rows.append(row)
    return pd.DataFrame(rows).assign(coordinates=ways.coordinates, n_prompts=ways.n_prompts, n_massive=ways.n_massive)


def panel(ways: Ways, boundaries: tuple[int, int] | None = None, first_layer: int = 1) -> pd.DataFrame:
    """One row per series (the model and its nulls) and span: phi of an autoregression over depth. ``PANEL_COLUMNS``.

    The spans are all layers from ``first_layer`` on (the stream that enters layer 0 is the bare embedding), and the
    layers before, between and after ``boundaries`` (thirds, if not given); those shorter than two layers are left out.
    No forward pass. Raises ValueError for boundaries outside the model.
    """
    rows = []
    for span, (start, stop) in spans(ways.n_layers, boundaries, first_layer).items():
        for series, several in ways.matrices.items():
            found = [_panel(matrix[:, start : stop + 1, start : stop + 1]) for matrix in several]
            row: dict[str, float | str] = {
                "series": series,
                "span": span,
                "start": start,
                "stop": stop,
                "transitions": stop - start,
            }
            for name in found[0]:
                row |= columns(name, _pool([one[name] for one in found]))
            row["half_life"] = half_life(1 - float(row["pooled"]))
            excess = _pool([one["within_excess"] for one in found])
            z = float(excess[0] / excess[1:].std()) if len(excess) > 2 else math.nan
            row |= {"z": z, "p": math.erfc(abs(z) / math.sqrt(2))}
            rows.append(row)
    return pd.DataFrame(rows).assign(coordinates=ways.coordinates, n_prompts=ways.n_prompts, n_massive=ways.n_massive)


def spans(n_layers: int, boundaries: tuple[int, int] | None = None, first_layer: int = 1) -> dict[str, tuple[int, int]]:
    """``all`` layers from ``first_layer`` on, and ``input``, ``middle`` and ``output`` part; none of a single layer.

    >>> spans(12)
    {'all': (1, 12), 'input': (1, 4), 'middle': (4, 8), 'output': (8, 12)}
    """
    first, second = _boundaries(n_layers, boundaries)
    start = min(first_layer, n_layers - 1)
    parts = {"all": (start, n_layers), "input": (start, first), "middle": (first, second), "output": (second, n_layers)}
    return {name: (a, b) for name, (a, b) in parts.items() if b - a >= 2}


def ends(ways: Ways, boundaries: tuple[int, int] | None = None, first_layer: int = 1) -> pd.DataFrame:
    """Is reversion stronger in the ends than in the middle? Mean kappa of the layers before and behind, minus between.

    One row: ``ENDS_COLUMNS``. ``boundaries`` as for ``panel``; with intervals over prompts, the boundaries taken for
    certain. ``excess`` is the same of kappa beyond the random walk that comes closer, and absent without nulls. No
    forward pass. Raises ValueError for boundaries outside the model; a part without a layer is undefined (NaN).
    """
    first, second = _boundaries(ways.n_layers, boundaries)
    outer = [*range(min(first_layer, first), first), *range(second, ways.n_layers)]
    middle = [*range(max(first, first_layer), second)]

    def kappas(series: str) -> Float[Tensor, "resample layer"]:
        every = [
            torch.stack([_window(matrix, layer, layer + 1)["kappa"] for layer in range(ways.n_layers)], 1)
            for matrix in ways.matrices[series]
        ]
        return torch.stack(every).mean(0)

    def contrast(values: Float[Tensor, "resample layer"]) -> Resampled:
        return values[:, outer].mean(1) - values[:, middle].mean(1)

    own = kappas("model")
    row: dict[str, float] = {"boundary_in": first, "boundary_out": second}
    row |= columns("kappa_ends", own[:, outer].mean(1)) | columns("kappa_middle", own[:, middle].mean(1))
    row |= columns("difference", contrast(own))
    if "rotated" in ways.matrices:
        walks = torch.stack([kappas("rotated"), kappas("token_shuffled")])
        row |= columns("excess", contrast(own - walks.amax(0)))
    return pd.DataFrame([row]).assign(coordinates=ways.coordinates, n_prompts=ways.n_prompts)


def cross_correlation(
    stack: Stack,
    tokens: Tokens | Int[Tensor, "prompt pos"],
    start: int = 1,
    stop: int | None = None,
    *,
    coordinates: str = "raw",
    sampling: Sampling = Sampling(),
) -> float:
    """Mean correlation over the layers from ``start`` to ``stop`` of two tokens' shocks, coordinate by coordinate.

    0 if tokens are independent. The shocks are the centred updates, as they are in a random walk (H. Pesaran 2004; his
    CD is this times ``sqrt(T N (N - 1) / 2)``). NaN for one token or fewer than two layers. Cost: 2 F.
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    seen = maps.of(coordinates, stack, ensemble)
    stop = stack.n_layers if stop is None else stop
    n_tokens = int(ensemble.mask.sum())
    if stop - start < 2 or n_tokens < 2:
        return math.nan

    def shocks() -> Iterator[Float[Tensor, "layer token width"]]:
        for _, context, mask in ensemble.batches(stack):
            yield seen.map(stack.stream(context)[start : stop + 1], context)[:, mask].diff(dim=0)

    mean = torch.stack([found.sum(1) for found in shocks()]).sum(0) / n_tokens
    totals, counts = [], []
    for found in shocks():
        centred = found - mean.unsqueeze(1)
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


def _walk(
    stack: Stack, ensemble: Ensemble, seen: maps.Map, draws: int = 0, order: Sequence[int] | None = None
) -> dict[str, list[Moments]]:
    """Moments of the trajectories, in any order of layers, and of ``draws`` random walks of each kind. Cost: 1 F."""
    found: dict[str, list[Moments]] = {}
    turns: list[Tensor] = []
    first = 0
    for unit, context, mask in ensemble.batches(stack, "trajectories"):
        way = _run(stack, context, order)
        if not way[:, mask].isfinite().all():
            raise ValueError(
                "the stream is not finite on these prompts: load the model in float32, or mend its weights"
            )
        mapped = seen.map(way, context)
        ways = {"model": iter([mapped])}
        if draws:
            base = mapped if seen.linear else way
            turns = turns or _turns(draws * stack.n_layers, base.shape[-1], ensemble.sampling.seed)
            ways |= _random_walks(base, mask, turns, np.random.default_rng((ensemble.sampling.seed, 3, first)))
        for name, several in ways.items():
            for draw, one in enumerate(several):
                one = one if seen.linear or name == "model" else seen.map(one, context)
                booked = found.setdefault(name, [])
                if len(booked) == draw:
                    booked.append(Moments.empty(ensemble.n_units, len(one), one.shape[-1]))
                booked[draw].add(unit, one, mask)
        first += len(unit)
    return found


def _run(stack: Stack, context: Context, order: Sequence[int] | None) -> Way:
    if order is None:
        return stack.stream(context)
    way = [context.x0]
    for layer in order:
        way.append(way[-1] + stack.update(layer, way[-1], context))
    return torch.stack(way)


def _turns(count: int, width: int, seed: int) -> list[Float[Tensor, "width width"]]:
    normal = np.random.default_rng((seed, 1)).standard_normal((count, width, width))
    return [rotation(noise) for noise in torch.from_numpy(normal)]


def _random_walks(
    way: Way, mask: Tensor, turns: Sequence[Tensor], generator: np.random.Generator
) -> dict[str, Iterator[Way]]:
    """From the same start with the same updates: turned, and those of other tokens. One at a time."""
    updates = way.diff(dim=0)

    def turned(turns: Sequence[Tensor]) -> Tensor:
        return torch.stack([u @ turn.to(u).T for u, turn in zip(updates, turns, strict=True)])

    def shuffled() -> Tensor:
        return torch.stack([exchanged(u, mask, partners(mask, generator)) for u in updates])

    def walk(steps: Tensor) -> Tensor:
        return torch.cat([way[:1], way[:1] + steps.cumsum(0)])

    firsts = range(0, len(turns), len(updates))
    return {
        "rotated": (walk(turned(turns[first : first + len(updates)])) for first in firsts),
        "token_shuffled": (walk(shuffled()) for _ in firsts),
    }


def _window(matrix: Float[Tensor, "resample time time"], start: int, stop: int) -> dict[str, Resampled]:
    before, after, both = matrix[:, start, start], matrix[:, stop, stop], matrix[:, start, stop]
    written = (before + after - 2 * both).clamp(min=0)
    kappa = 1 - ratio(both, before)
    return {
        "kappa": kappa,
        "psi": ratio(2 * kappa * before, written),
        "growth": ratio(written, before).sqrt(),
        "variance_ratio": panels.variance_ratio(matrix, start, stop - start),
    }


def _against(own: dict[str, Resampled], draws: list[dict[str, Resampled]], null: str) -> dict[str, float]:
    """A null's columns; the walks' updates have the window's size already, in the others kappa is brought to it."""
    walk = null in ("rotated", "token_shuffled")
    kappas = [one["kappa"] * (1 if walk else ratio(own["growth"], one["growth"])) for one in draws]
    found: dict[str, float] = {}
    for name, values in (("kappa", kappas), ("variance_ratio", [one["variance_ratio"] for one in draws])):
        found |= columns(f"{name}_{null}", _pool(values))
        found |= columns(f"{name}_excess_{null}", _pool([own[name] - value for value in values]))
    return found


def _panel(matrix: Float[Tensor, "resample time time"]) -> dict[str, Resampled]:
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


def _pool(draws: Sequence[Resampled]) -> Float[Tensor, " pooled"]:
    """All resamples of all draws as one sample, with the mean over draws as its estimate."""
    values = torch.stack(list(draws))
    return torch.cat([values[:, :1].nanmean(0), values[:, 1:].flatten()])
