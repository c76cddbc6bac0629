r"""Does a displacement of the stream go back by itself? Move it at one layer, and follow what is left layer by layer.

The stream that enters layer ``l`` is moved by ``d_0`` at one token of each prompt, all later layers run, and ``d_q`` is
how far the stream is from the clean run's after ``q`` of them. With the expectation over prompts and draws,

    along     E<d_q, d_0> / E|d_0|^2          what is left of the displacement itself
    remaining sqrt(E|d_q|^2 / E|d_0|^2)       how far the token's stream is off, in whatever direction
    spread    the same over all tokens of the prompt: attention carries a displacement to later ones

A deviation that is taken back has remaining < 1 (and so along < 1). along < 1 = remaining is one that was only turned,
as by a rotation; along < 1 < remaining one that was turned into something else and amplified; both above 1, one that is
carried further out. ``1 - along`` after one layer
is the causal kappa of ``surgery.instruments.displacement``, the same number for the same displacements; the curve says
whether later layers undo what one layer has taken back.

=====================================  ================================================================================
network                                what it must read
=====================================  ================================================================================
Ornstein-Uhlenbeck, ``-kappa (x-mu)``  along = remaining = spread = the product of ``1 - kappa`` over the layers, for
                                       every kind and size
parallel (``known_networks``)          along = 1 for displacements within the stream (difference, principal): each
                                       layer writes where nothing was. remaining > 1 where a layer reads what was moved
nobody reads the direction             along = remaining = spread = 1
the same architecture untrained        what attention and normalisation do without having learnt it: the control
=====================================  ================================================================================

Sizes are fractions of ``n(x)``, the root mean square distance of the stream from its mean at that layer. A linear stack
reads the same at every size; curves that part with size are the layers' bend. What only makes the stream longer, a live
norm divides away; ``frozen`` keeps the denominators at the clean run's.

Source: the measure is ours, the directions are those of ``surgery.instruments.displacement``.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack, tokens = Stack(known_networks.parallel_network(n_layers=2)), known_networks.tokens(6, 5)
>>> frame = curves(stack, tokens, layers=[0], sampling=Sampling(resamples=0))
>>> frame[frame.kind == "principal"].along.round(4).tolist()
[1.0, 1.0, 1.0, 1.0]
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from surgery.instruments import massive
from surgery.instruments.displacement import KINDS, displacements, principal_components
from surgery.instruments.ensemble import Ensemble, Totals, Visit
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.reversion.rules import held
from surgery.stats.bootstrap import described, measure_columns, ratio, weights
from surgery.stats.drift import Step
from surgery.stats.sampling import Sampling

HALF = 0.5

COLUMNS = {
    "layer": "the layer whose incoming stream was moved",
    "q": "number of layers that have run since",
    "kind": "direction of the displacement: difference, random or principal",
    "size": "its length, as a fraction of the stream's distance from its mean, n(x)",
    "n_units": "number of prompts, or of groups of prompts, the unit of resampling",
    **massive.COLUMNS,
} | described(
    {
        "along": "what is left of the displacement along itself: 1 all, 0 none, below 0 overshot",
        "remaining": "size of the deviation at that token over that of the displacement",
        "spread": "the same over all tokens of the prompt",
    }
)
HALF_WAY_COLUMNS = {
    "layer": COLUMNS["layer"],
    "kind": COLUMNS["kind"],
    "size": COLUMNS["size"],
    "kappa": "1 - along after one layer: the causal kappa",
    "kappa_low": "lower end of its 95 % interval",
    "kappa_high": "upper end of its 95 % interval",
    "half_way": "number of layers after which less than half is left along the displacement; NaN if there always is",
    "along": "what is left of it along itself after the last layer",
    "remaining": "size of the deviation after the last layer",
    "spread": "the same over all tokens of the prompt",
}


@with_meanings(COLUMNS)
@in_smaller_batches
def curves(
    stack: Stack,
    tokens: Ensemble | Tokens | Int[Tensor, "prompt pos"],
    layers: Sequence[int] | None = None,
    *,
    sizes: Sequence[float] = (0.1, 1.0),
    draws: int = 2,
    frozen: bool = False,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Follow displacements made at ``layers`` (all if not given): a row per layer, layer run since, kind and size.

    Columns: ``COLUMNS``. ``draws`` tokens of every prompt are moved, one at a time; along the principal components,
    draw ``i`` takes the ``i``-th. ``_low`` and ``_high`` are 95 % intervals over resampled prompts, NaN for one prompt.
    Where no token of any prompt differs from its partner, ``difference`` is NaN; so is everything once a moved stream
    overflows, as one may with frozen norms that started from a small embedding. Tokens of massive activations are not
    moved, unless ``sampling.skip_massive`` is False: beside them every other spread is
    nothing.

    Cost: ``3 + 3 draws sizes (L + 1) / 2`` F if all L layers are moved, 1 F more with ``frozen`` and
    1 F to find massive activations; a layer ``l`` by itself takes ``3 draws sizes (L - l) / L``. Memory: the streams of
    one batch at all layers, and a d_model x d_model matrix per layer.

    Raises ValueError for a layer that the model does not have, if a size or ``draws`` is not positive, if no token is
    left to measure, if the stream is not finite, or if ``frozen`` is asked of a model whose denominators cannot be
    found.
    """
    moved = list(range(stack.n_layers)) if layers is None else sorted(set(layers))
    if not moved or not set(moved) <= set(range(stack.n_layers)):
        raise ValueError(f"layers can be any of 0 to {stack.n_layers - 1} of {stack.name}, got {layers}")
    if draws < 1 or not sizes or min(sizes) <= 0:
        raise ValueError(f"draws and sizes must be positive, got draws={draws}, sizes={tuple(sizes)}")
    ensemble = Ensemble.of(stack, tokens, sampling)
    bases, spreads = principal_components(stack, ensemble, draws), _spreads(stack, ensemble)
    totals, first = Totals(ensemble.n_units), 0
    for unit, context, mask in ensemble.batches(stack, "displacements"):
        clean = stack.stream(context)
        with stack.frozen(context) if frozen else nullcontext():
            for layer in moved:
                visit = Visit(first, unit, layer, context, mask, clean[layer], clean[layer + 1] - clean[layer])
                for draw in range(draws):
                    prompt, place, directions = displacements(
                        visit, bases[layer], draw, ensemble.generator(visit, draw)
                    )
                    for kind, direction in directions.items():
                        for size in sizes:
                            start = clean[layer].clone()
                            start[prompt, place] += (size * spreads[layer] * direction).to(start)
                            sums = _follow(stack, context, clean[layer:], start, layer, prompt, place)
                            totals.add((layer, kind, size), unit[prompt.cpu()], sums)
        first += len(unit)
    units = ensemble.n_units
    resampled = weights(units, sampling.resamples, sampling.seed)
    rows = []
    for layer in moved:
        for kind in KINDS:
            for size in sizes:
                product, square, spread = torch.tensordot(resampled, totals[layer, kind, size], 1).unbind(-1)
                for q in range(1, stack.n_layers - layer + 1):
                    row: dict[str, Any] = {"layer": layer, "q": q, "kind": kind, "size": size, "n_units": units}
                    row |= held(ensemble.concentration, range(layer, layer + q + 1), range(layer, layer + q))
                    row |= measure_columns(
                        {
                            "along": ratio(product[:, q], square[:, 0]),
                            "remaining": ratio(square[:, q], square[:, 0]).sqrt(),
                            "spread": ratio(spread[:, q], square[:, 0]).sqrt(),
                        }
                    )
                    rows.append(row)
    frame = pd.DataFrame(rows).assign(n_massive=ensemble.n_massive)
    return frame[[name for name in COLUMNS if name in frame]]


@with_meanings(HALF_WAY_COLUMNS)
def half_way(frame: pd.DataFrame) -> pd.DataFrame:
    """Return where half of every displacement is back, and what is left in the end: ``HALF_WAY_COLUMNS``.

    One row per layer, kind and size of ``curves``.

    >>> curve = {"q": [1, 2, 3], "along": [0.7, 0.49, 0.34], "along_low": 0.0, "along_high": 1.0}
    >>> frame = pd.DataFrame({"layer": 0, "kind": "random", "size": 1.0, "remaining": 1.0, "spread": 1.0} | curve)
    >>> half_way(frame).half_way.item()
    2.0
    """
    rows = []
    for (layer, kind, size), curve in frame.groupby(["layer", "kind", "size"], sort=False):
        first, last = curve.iloc[0], curve.iloc[-1]
        below = curve.q[curve.along < HALF]
        rows.append(
            {"layer": layer, "kind": kind, "size": size}
            | {"kappa": 1 - first.along, "kappa_low": 1 - first.along_high, "kappa_high": 1 - first.along_low}
            | {"half_way": float(below.min()) if len(below) else math.nan}
            | {name: last[name] for name in ("along", "remaining", "spread")}
        )
    return pd.DataFrame(rows)[list(HALF_WAY_COLUMNS)]


def _spreads(stack: Stack, ensemble: Ensemble) -> list[float]:
    """Return ``n(x)`` of the stream that enters each layer. Cost: 1 F."""
    steps = [Step.empty(ensemble.n_units, stack.d_model) for _ in range(stack.n_layers)]
    for visit in ensemble.visits(stack, "size of the stream"):
        steps[visit.layer].add(visit.unit, visit.x, visit.u, visit.mask)
    everything = torch.ones(1, ensemble.n_units, dtype=torch.float64)
    return [float(step.variance(everything).sqrt()) for step in steps]


def _follow(
    stack: Stack,
    context: Context,
    clean: Float[Tensor, "q prompt pos d_model"],
    start: Float[Tensor, "prompt pos d_model"],
    layer: int,
    prompt: Int[Tensor, " chosen"],
    place: Int[Tensor, " chosen"],
) -> Float[Tensor, "chosen q 3"]:
    """Return ``<d_q, d_0>`` and ``|d_q|^2`` at the token moved, and ``|d_q|^2`` summed over its prompt's tokens."""
    streams = [start]
    stack.execute(f"{layer}:", start, context, lambda _, before, after: streams.append(after))
    sums, origin = [], None
    for stream, reference in zip(streams, clean, strict=True):
        difference = (stream.double() - reference.double()).masked_fill(~context.tokens.mask.unsqueeze(-1), 0)
        here = difference[prompt, place]
        origin = here if origin is None else origin
        everywhere = reduce(difference.square(), "prompt pos d_model -> prompt", "sum")[prompt]
        sums.append(torch.stack([(here * origin).sum(-1), (here * here).sum(-1), everywhere], -1))
    return torch.stack(sums, 1)
