r"""What series is not: how much a layer changes the stream, and how alike the streams of two layers are.

These measures of the literature are often read as "this layer depends on that one" or "these layers could run side by
side", but cannot say so: they look at what layers write, never at what layers read. They are offered beside
``surgery.series`` so that the difference can be seen. A chain of rotations and rotations side by side read the same
number in all of them, while S reads 1 and 0 (the tests check it). On ``surgery.instruments.known_networks``, which are
not linear, block influence, cosine, size and angle do not order parallel and serial either; linearity and the alignment
of distant streams do, because a chain of rectifiers bends more than one rectifier: they read the bend, not the chain.

* ``layers``: ``block_influence = 1 - E cos(x_l, x_{l+1})`` (Men et al. 2024, ShortGPT, arXiv 2403.03853); ``cosine =
  E cos(u_l, x_l)`` and ``update_ratio = E |u_l| / |x_l|``, below 0 a layer erases and above it strengthens what is
  there (Csordas et al. 2025, arXiv 2505.13898); with ``sublayers`` the same of attention and MLP;
* ``angles``: ``arccos(cos(x_a, x_b)) / pi`` over spans, 0 to 1, at the last token (Gromov et al. 2024, arXiv
  2403.17887);
* ``linearity``: the share of the variance of ``u_l`` that a linear map of ``x_l`` predicts on prompts it was not fitted
  on. Razzhigaev et al. 2024 (arXiv 2405.12250) predict ``x_{l+1}`` and fit and measure on the same tokens; that is near
  1 whatever the layer does, since most of ``x_{l+1}`` is ``x_l``: ``linearity_stream`` is theirs, held out;
* ``cka``: linear centred kernel alignment of every two streams (Kornblith et al. 2019, arXiv 1905.00414) with the
  unbiased estimator of the Hilbert-Schmidt criterion (Song et al. 2012), 0 for unrelated streams whatever d_model.

Angles are dominated by the few directions in which some models' streams are huge. Compare all measures with the
architecture untrained. ``_low`` and ``_high`` are 95 % percentile intervals over resampled prompts (``surgery.stats``).

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> [bool(layers(Stack(network), known_networks.tokens()).cosine.abs().max() < 1e-6)
...  for network in (known_networks.parallel_network(), known_networks.serial_network())]
[True, True]
"""

import itertools
from collections import defaultdict

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from surgery.instruments import massive
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.regression import LeastSquares, halves
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import Moments, columns, described, measure_columns, ratio, weights
from surgery.stats.sampling import Sampling

_MEASURES = {
    "block_influence": "1 - E cos(stream entering, stream leaving the layer), 0 to 2; says nothing of series",
    "cosine": "E cos(update, stream entering): below 0 the layer erases, above 0 it strengthens",
    "update_ratio": "E |update| / |stream entering|",
    "attn_cosine": "E cos(attention's update, stream entering the layer)",
    "attn_ratio": "E |attention's update| / |stream entering the layer|",
    "mlp_cosine": "E cos(MLP's update, the stream after attention)",
    "mlp_ratio": "E |MLP's update| / |the stream after attention|",
    "angle": "E arccos(cos(stream entering, stream leaving the span)) / pi, 0 to 1",
    "linearity": "share of the variance of the update predicted by a linear map of the stream, on held-out prompts",
    "linearity_stream": "the same of the stream leaving the layer: near 1 because most of it is the stream entering",
    "cka": "unbiased linear centred kernel alignment of two streams, 1 if alike up to rotation and scale",
}
COLUMNS = {
    "layer": "layer, counted from 0",
    "start": "first layer of the span",
    "stop": "one past the last layer of the span",
    "layer_a": "the layer that the first stream enters; the number of layers for the stream that leaves the last",
    "layer_b": "the same of the second stream",
    "n_prompts": "number of prompts measured, the unit of resampling",
    **massive.COLUMNS,
}
COLUMNS |= described(_MEASURES)


@with_meanings(COLUMNS)
@in_smaller_batches
def layers(
    stack: Stack, tokens: Ensemble | Tokens | Tensor, *, sublayers: bool = False, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Measure block influence, cosine and size of every layer's update; with ``sublayers`` also of attention and MLP.

    Where attention and MLP read the same stream (GPT-J, GPT-NeoX) the MLP's update is still measured against the stream
    to which it is added last. Cost: 1 F, with ``sublayers`` less than 2 F. Raises ValueError where no token is left to
    measure, and, with ``sublayers``, for a model whose layers cannot be split.
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    draws = _draws(ensemble, sampling.resamples)
    count = draws @ ensemble.mask.sum(1).double().cpu()
    sums = readings(stack, ensemble, sublayers)
    frame = pd.DataFrame(
        {"layer": layer, "n_prompts": len(ensemble.tokens)}
        | measure_columns({name: draws @ values[layer] / count for name, values in sums.items()})
        for layer in range(stack.n_layers)
    )
    return ensemble.annotate(frame, "layer")


def readings(stack: Stack, ensemble: Ensemble, sublayers: bool = False) -> dict[str, Float[Tensor, "layer prompt"]]:
    """Return the measures of ``layers`` as sums over the ensemble's tokens of each prompt. Cost: as ``layers``."""
    if sublayers:
        stack.wiring("0.attn 0.mlp")  # refuses models whose layers cannot be split
    sums: dict[str, Tensor] = defaultdict(
        lambda: torch.zeros(stack.n_layers, len(ensemble.tokens), dtype=torch.float64)
    )
    for visit in ensemble.visits(stack, "similarity"):
        prompts = visit.first + visit.mask.cpu().nonzero()[:, 0]
        x, u = visit.x[visit.mask].double(), visit.u[visit.mask].double()
        measures = {"block_influence": 1 - cosine_similarity(x, x + u), "cosine": cosine_similarity(u, x)}
        measures["update_ratio"] = u.norm(dim=1) / x.norm(dim=1)
        if sublayers:
            after = stack.execute(f"{visit.layer}.attn", visit.x, visit.context)[visit.mask].double()
            for part, read, write in (("attn", x, after - x), ("mlp", after, x + u - after)):
                measures[f"{part}_cosine"] = cosine_similarity(write, read)
                measures[f"{part}_ratio"] = write.norm(dim=1) / read.norm(dim=1)
        for name, values in measures.items():
            sums[name][visit.layer].index_add_(0, prompts, values.cpu())
    return dict(sums)


@with_meanings(COLUMNS)
@in_smaller_batches
def angles(
    stack: Stack, tokens: Tokens | Tensor, max_length: int | None = None, *, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Measure the angle between the streams at both ends of every span of 1 to ``max_length`` layers.

    It is a fraction of pi, taken at the last token of every prompt, as in Gromov et al. Cost: 1 F.
    """
    tokens = Tokens.of(tokens).to(stack.device)
    draws = _draws(Ensemble(tokens, sampling.but(skip_first=False)), sampling.resamples)
    last = torch.zeros_like(tokens.mask)
    last[torch.arange(len(tokens)), (tokens.positions * tokens.mask).argmax(1)] = True
    stream = _streams(stack, tokens, last, sampling.batch_size)
    longest = stack.n_layers if max_length is None else max_length
    rows = []
    for start, stop in itertools.combinations(range(stack.n_layers + 1), 2):
        if stop - start <= longest:
            angle = cosine_similarity(stream[start], stream[stop]).clamp(-1, 1).arccos() / torch.pi
            row = {"start": start, "stop": stop, "n_prompts": len(tokens)}
            rows.append(row | columns("angle", draws @ angle / draws.sum(1)))
    return pd.DataFrame(rows, columns=["start", "stop", "n_prompts", "angle", "angle_low", "angle_high"])


@with_meanings(COLUMNS)
@in_smaller_batches
def linearity(
    stack: Stack, tokens: Tokens | Tensor, *, ridge: float = 0.01, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Measure how well an affine map of the stream, fitted on half of the prompts, predicts updates on the others.

    Below 0: worse than the mean update. Give many more tokens than ``d_model``, or it reads low for want of data;
    ``ridge`` as in ``surgery.instruments.lens.layers``. Cost: 1 F. Memory: two float64 d_model x d_model matrices a
    layer.

    Raises ValueError for a single prompt, prompts without a token to measure, and a negative ridge.
    """
    measured, fitted = halves(Tokens.of(tokens).to(stack.device), sampling.seed)
    fits = [LeastSquares(stack.d_model) for _ in range(stack.n_layers)]
    for visit in Ensemble.of(stack, fitted, sampling).visits(stack, "fitting"):
        fits[visit.layer].add(visit.x[visit.mask], visit.u[visit.mask])
    maps = [fit.solve(ridge) for fit in fits]
    ensemble = Ensemble.of(stack, measured, sampling)
    missed = torch.zeros(stack.n_layers, len(measured), dtype=torch.float64)
    moments: dict[tuple[str, int], list[Moments]] = defaultdict(list)
    for visit in ensemble.visits(stack, "linearity"):
        matrix, bias = maps[visit.layer]
        error = visit.u.double() - visit.x.double() @ matrix - bias
        squares = (error.pow(2).sum(2) * visit.mask).sum(1).cpu()
        missed[visit.layer, visit.first : visit.first + len(squares)] = squares
        moments["linearity", visit.layer].append(Moments.of(visit.u, mask=visit.mask))
        moments["linearity_stream", visit.layer].append(Moments.of(visit.x + visit.u, mask=visit.mask))
    draws, rows = _draws(ensemble, sampling.resamples), []
    count = draws @ ensemble.mask.sum(1).double().cpu()
    for layer in range(stack.n_layers):
        row: dict[str, float] = {"layer": layer, "n_prompts": len(measured)}
        for name in ("linearity", "linearity_stream"):
            variance = Moments.concatenate(moments[name, layer]).covariance(draws)
            row |= columns(name, 1 - ratio(draws @ missed[layer] / count, variance))
        rows.append(row)
    return ensemble.annotate(pd.DataFrame(rows), "layer")


@with_meanings(COLUMNS)
@in_smaller_batches
def cka(stack: Stack, tokens: Tokens | Tensor, *, sampling: Sampling = Sampling()) -> pd.DataFrame:
    """Measure the centred kernel alignment of every two streams ``x_a``, ``x_b``, a <= b, from a random token a prompt.

    Only one, because the estimator takes its samples to be independent, and tokens of one prompt are not. A resampled
    prompt is never paired with itself. Cost: 1 F and, per pair of layers, n_prompts^2 operations a resample. Memory:
    n_prompts^2 numbers a layer. Raises ValueError for fewer than four prompts with a token to measure.
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    tokens, usable = ensemble.tokens, ensemble.mask.any(1)
    if usable.sum() < 4:
        raise ValueError(f"cka takes four prompts with a token to measure, there are {int(usable.sum())}: give more")
    tokens, mask = Tokens(tokens.ids[usable], tokens.mask[usable]), ensemble.mask[usable]
    noise = torch.from_numpy(np.random.default_rng((sampling.seed, 3)).random(tuple(mask.shape))).to(mask.device)
    chosen = torch.zeros_like(mask)
    chosen[torch.arange(len(tokens)), (noise * mask).argmax(1)] = True
    stream = _streams(stack, tokens, chosen, sampling.batch_size)
    stream = stream - stream.mean(1, keepdim=True)
    kernels = stream @ stream.mT
    kernels.diagonal(dim1=1, dim2=2).zero_()
    draws, rows = weights(len(tokens), sampling.resamples, sampling.seed), []
    own = [_hsic(kernel, kernel, draws) for kernel in kernels]
    for a, b in itertools.combinations_with_replacement(range(len(kernels)), 2):
        alignment = ratio(_hsic(kernels[a], kernels[b], draws), (own[a] * own[b]).clamp(min=0).sqrt())
        rows.append({"layer_a": a, "layer_b": b, "n_prompts": len(tokens)} | columns("cka", alignment))
    return pd.DataFrame(rows)


def _hsic(
    a: Float[Tensor, "prompt prompt"], b: Float[Tensor, "prompt prompt"], draws: Float[Tensor, "resample prompt"]
) -> Float[Tensor, " resample"]:
    """Return the unbiased Hilbert-Schmidt criterion, up to a factor, of kernels whose diagonals are zero."""
    n = len(a)
    through_a, through_b = draws @ a, draws @ b
    together = ((draws @ (a * b)) * draws).sum(1)
    apart = (through_a * draws).sum(1) * (through_b * draws).sum(1) / ((n - 1) * (n - 2))
    return together + apart - 2 * (through_a * through_b * draws).sum(1) / (n - 2)


def _streams(stack: Stack, tokens: Tokens, chosen: Tensor, batch_size: int) -> Float[Tensor, "layer prompt d_model"]:
    """Return ``x_0 .. x_L`` at one chosen token of every prompt, in float64 on the CPU."""
    streams, first = [], 0
    for batch in tokens.batches(batch_size):
        streams.append(stack.stream(batch)[:, chosen[first : first + len(batch)]].double().cpu())
        first += len(batch)
    return torch.cat(streams, 1)


def _draws(ensemble: Ensemble, resamples: int) -> Float[Tensor, "resample prompt"]:
    return weights(len(ensemble.tokens), resamples, ensemble.sampling.seed)
