r"""Redundancy across components: if the computation of a layer is lost, is it also done elsewhere?

Layers in a chain (AND) fail together, layers that do the same (OR) fail only when all of them are gone. Five measures
of that, and the value that each must have:

==================  ===================================================  ========  ===========  =====================
measure             of                                                   chain     independent  each other's backup
==================  ===================================================  ========  ===========  =====================
additivity          damages of pairs (``instruments.interactions``)      0         1            above 1
mean_rho            the same                                             1         0            -1
curvature           damage of k random layers over k (``subsets``)       -1        0            above 0, 1 for two
self_repair         share of a lost direct effect that later layers      below 0   0            1
                    and the final norm compensate
predictability      R^2 of a later layer's output on a layer's own       none      low          1
                    input, from that layer's update
==================  ===================================================  ========  ===========  =====================

"None" is NaN: there is nothing to measure. Additivity, A, is also measured with MLPs and with heads as units
(``additivity``). A and curvature are of the margin with all norms frozen, including the last; self-repair is that of
the model as it runs. They need not agree: two layers that do the same and both write it are predictable from each
other, and damages still add up. Redundancy mass (``mass``) is 0 in any model whose pairs all lose less together than
apart, so it cannot compare models that are mostly chains; A moves. ``across`` gives all of them in one row, for
comparing models: only those that reach the same loss, on the same prompts, and with the same ``seed``, which draws the
subsets.

Controls: the architecture untrained (damages inside noise, no A), and ``predictability_shuffled``.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from itertools import combinations
from math import comb

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.dropout.predictability import MEASURES
from surgery.dropout.predictability import mean as mean_predictability
from surgery.dropout.predictability import predictability as predictability
from surgery.instruments import interactions
from surgery.instruments.ablation import CleanRun, Damages, clean_runs, damage
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import frozen_head, logits, portions, predicting_positions
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.errors import ModelError
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import Moments, columns, described, ratio, weights
from surgery.stats.sampling import Sampling

Resampled = Float[Tensor, " resample"]

_A = "additivity A of pairs of {}, mean ablation, margin: 0 chain, 1 independent, above 1 backup"
_MEASURES = {
    "additivity": _A.format("layers"),
    "additivity_mlps": _A.format("MLPs"),
    "additivity_heads": _A.format("heads"),
    "redundancy_mass": "sum of positive delta over sum of |delta|: 0 where no pair is redundant on balance, 1 all",
    "mean_rho": "mean rho of the pairs that have one: 1 needed together, 0 independent, -1 mutual backup",
    "curvature": "how far the damage of k layers lies below its chord, as a share: -1 chain, 0 additive, 1 backup",
    "second_difference": "damage of k + 1 layers less twice that of k plus that of k - 1 (logits); of a model the mean",
    "damage": "damage without k random layers (logits)",
    "self_repair": "share of a lost direct effect compensated: 1 all, 0 nothing, below 0 later layers lose more",
    "norm_repair": "the part of self_repair due to the new denominators of the final norm",
    "norm_share": "norm_repair over self_repair, where the interval of that lies above 0",
    **MEASURES,
}
COLUMNS: dict[str, str] = {
    "units": "what was taken out: layers, mlps or heads",
    "layer": "layer, counted from 0; of a pair the earlier",
    "later": "the later layer of the pair",
    "size": "number of layers taken out together",
    "n_subsets": "number of sets of that many layers",
    "n_pairs": "number of pairs of layers, or of other units",
    "n_measured": "number of pairs with a rho",
    "n_undefined": "number of pairs with a damage that is not finite, which are left out",
    "n_prompts": "number of prompts, the unit of resampling",
} | described(_MEASURES)


@with_meanings(COLUMNS)
@in_smaller_batches
def across(
    stack: Stack,
    tokens: Tokens | Tensor,
    *,
    sizes: Sequence[int] | None = None,
    draws: int = 20,
    kind: str = "mean",
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure all redundancy of a model as one row, with intervals over prompts: those of ``COLUMNS`` that apply.

    Self-repair is pooled over all layers but the last, predictability is the mean of all pairs. Cost in a model of L
    layers: ``mass`` and ``subsets`` together, ``additivity`` of MLPs and of heads (NaN where a model has none that can
    be told apart), ``self_repair`` and ``predictability``; for 6 layers about 120 F and 200 readouts.

    Raises ValueError as these do.

    >>> from surgery.instruments import known_networks
    >>> stack, tokens = Stack(known_networks.parallel_network(n_layers=3)), known_networks.tokens(60, 8)
    >>> row = across(stack, tokens, sampling=Sampling(resamples=20)).iloc[0]
    >>> bool(abs(row.second_difference) < 1e-6), bool(abs(row.self_repair) < 1e-6)
    (True, True)
    """
    tokens = Tokens.of(tokens)
    chosen = random_subsets(stack.n_layers, sizes, draws, sampling.seed)
    full = damage(stack, tokens, [*interactions.sets(stack.n_layers), *chosen], kind, frozen=True, sampling=sampling)
    pairs = interactions.summary(full, resamples=sampling.resamples, seed=sampling.seed, tolerance=stack.tolerance)
    curve = _curve(full, chosen, sampling)
    row: dict[str, float] = {
        **pairs.iloc[0],
        **_additivity(stack, tokens, kind, sampling),
        **columns("curvature", _curvature(curve)),
        **columns("second_difference", curve.diff(2, dim=0).mean(0)),
    }
    moments = _repair_moments(stack, tokens, sampling)
    row |= _slopes([moments[layer] for layer in range(max(stack.n_layers - 1, 1))], _draws(len(tokens), sampling))
    row |= mean_predictability(stack, tokens, sampling=sampling)
    return pd.DataFrame([row])


@with_meanings(COLUMNS)
@in_smaller_batches
def mass(stack: Stack, tokens: Tokens | Tensor, kind: str = "mean", *, sampling: Sampling = Sampling()) -> pd.DataFrame:
    """Redundancy mass and mean rho of all pairs of layers: ``interactions.summary`` of their damages, norms frozen.

    Cost in a model of L layers: ``(L - 1)/2 + (L - 1)(L - 2)/6 + 3`` F and ``L (L + 1)/2 + 1`` readouts.

    Raises ValueError for a model of one layer, and what ``ablation.damage`` refuses.
    """
    full = damage(stack, tokens, interactions.sets(stack.n_layers), kind, frozen=True, sampling=sampling)
    return interactions.summary(full, resamples=sampling.resamples, seed=sampling.seed, tolerance=stack.tolerance)


@with_meanings(COLUMNS)
@in_smaller_batches
def additivity(
    stack: Stack,
    tokens: Tokens | Tensor,
    units: str = "layers",
    kind: str = "mean",
    *,
    draws: int = 100,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure A of pairs of layers, MLPs or heads, ``sum (D_ij - max(D_i, D_j)) / sum min(D_i, D_j)``: one row.

    0 where each pair is needed together, 1 where damages add up, above 1 where one does the other's work when it is
    gone; NaN where nothing is lost with one alone (perfect backups, and noise). In margin units, norms frozen. Of more
    than ``draws`` pairs as many are drawn by the seed, the same in every model of that shape. Intervals are over
    prompts; over models, use their spread. Ours.

    Cost: a run from the first unit on, and a readout, for every unit and pair, at most, and 3 F.

    Raises ValueError for fewer than two units and an unknown kind of unit, and as ``ablation.damage`` does.

    >>> from surgery.instruments import known_networks
    >>> stack, tokens = Stack(known_networks.random_network(n_layers=3)), known_networks.tokens(24, 8)
    >>> frame = additivity(stack, tokens, "heads", draws=5, sampling=Sampling(resamples=0))
    >>> frame[["units", "n_pairs", "n_undefined"]].values.tolist()
    [['heads', 5, 0]]
    """
    tokens = Tokens.of(tokens)
    count = stack.n_layers * (int(stack.model.cfg.n_heads) if units == "heads" else 1)
    if count < 2:
        raise ValueError(f"{stack.name} has one of these units; a pair needs two")
    pairs = list(combinations(range(count), 2))
    chosen = sorted(random.Random(sampling.seed).sample(pairs, min(draws, len(pairs))))
    alone = sorted({(unit,) for pair in chosen for unit in pair})
    full = damage(stack, tokens, [*alone, *chosen], kind, frozen=True, units=units, sampling=sampling)
    frame = interactions.summary(full, resamples=sampling.resamples, seed=sampling.seed, tolerance=stack.tolerance)
    frame.insert(0, "units", units)
    return frame


@with_meanings(COLUMNS)
@in_smaller_batches
def subsets(
    stack: Stack,
    tokens: Tokens | Tensor,
    sizes: Sequence[int] | None = None,
    draws: int = 20,
    *,
    kind: str = "mean",
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure the mean damage of taking out k random layers: a row per size from 0 on, ``COLUMNS``.

    With D(k) the mean damage and K the largest size, ``curvature = 1 - 2 sum_{k<K} D(k) / ((K - 1) D(K))``, the area
    between the curve and its chord: -1 if the first layer costs everything, 0 if damages add up, 1 if only all K do;
    the same in every row, NaN where the interval of D(K) is not above 0. ``second_difference`` is
    ``D(k+1) - 2 D(k) + D(k-1)``. In any model the curve over all layers bends down once there is nothing more to lose,
    so by default K is half of them. The sets are fixed by the seed (``random_subsets``): intervals are over prompts
    alone.

    Cost: at most ``draws`` runs and readouts per size, the runs that sets share done once, and 3 F.

    Raises ValueError for sizes that are not 1, 2, ... up to n_layers or fewer than two, for no draws, and for what
    ``ablation.damage`` refuses.

    >>> from surgery.instruments import known_networks
    >>> stack, tokens = Stack(known_networks.parallel_network(n_layers=4)), known_networks.tokens(8, 6)
    >>> frame = subsets(stack, tokens, sampling=Sampling(resamples=0))
    >>> frame["n_subsets"].tolist(), bool(frame["second_difference"].abs().max() < 1e-6)
    ([1, 4, 6], True)
    """
    chosen = random_subsets(stack.n_layers, sizes, draws, sampling.seed)
    full = damage(stack, tokens, chosen, kind, frozen=frozen, sampling=sampling)
    curve = _curve(full, chosen, sampling)
    second = torch.full_like(curve, torch.nan)
    second[1:-1] = curve.diff(2, dim=0)
    rows = []
    for size, values in enumerate(curve):
        row: dict[str, float] = {"size": size, "n_subsets": sum(len(layers) == size for layers in chosen)}
        row |= {"n_prompts": full.margin.shape[1]} | columns("damage", values)
        rows.append(row | columns("second_difference", second[size]) | columns("curvature", _curvature(curve)))
    return pd.DataFrame(rows)


def random_subsets(n_layers: int, sizes: Sequence[int] | None, draws: int, seed: int) -> list[tuple[int, ...]]:
    """Draw ``draws`` different sets of layers of every size, or all if there are no more; the empty set comes first.

    Raises ValueError as ``subsets`` does.

    >>> random_subsets(3, (1, 2), 2, 0)
    [(), (1,), (2,), (0, 1), (0, 2)]
    """
    sizes = range(1, max(2, n_layers // 2) + 1) if sizes is None else sizes
    if list(sizes) != list(range(1, len(sizes) + 1)) or not 2 <= len(sizes) <= n_layers or draws < 1:
        raise ValueError(
            f"the curve goes from 0 in steps of one layer: give sizes 1, 2, ... up to {n_layers}, two or more, and at "
            f"least one draw, got {list(sizes)} and draws={draws}"
        )
    generator, subsets = random.Random(seed), [tuple[int, ...]()]
    for size in sizes:
        every = range(comb(n_layers, size))
        chosen = set(every if len(every) <= draws else generator.sample(every, draws))
        subsets += [layers for i, layers in enumerate(combinations(range(n_layers), size)) if i in chosen]
    return subsets


@with_meanings(COLUMNS)
@in_smaller_batches
def self_repair(stack: Stack, tokens: Tokens | Tensor, *, sampling: Sampling = Sampling()) -> pd.DataFrame:
    """How much of a layer's direct effect on the right next token is compensated when it is lost: a row per layer.

    The layer is resampled: it writes what it wrote at another prompt's token (``surgery.instruments.ablation``). DE is
    the fall of the margin if only the head sees that, the final norm frozen; TE the fall if the model runs on, its
    norms live. ``self_repair`` is the slope of ``DE - TE`` on DE over the tokens, minus that of ``TE - DE``.
    ``norm_repair`` is the same where only the head sees it and its norm is live. Rushing and Nanda (2024, arXiv
    2402.15390) find it to be about .3 of DE in published models, and noisy. Only the norm can repair the last layer. In
    a chain in which the head reads every layer the slope is below 0; where the head does not read the layer there is
    none (NaN).

    Cost in a model of L layers: ``(L - 1)/2 + 1`` F and ``3 L + 2`` readouts.

    Raises ValueError for a single prompt, prompts of two tokens, and as ``ablation.clean_runs`` does.

    >>> from surgery.instruments import known_networks
    >>> stack, tokens = Stack(known_networks.parallel_network(n_layers=3)), known_networks.tokens(8, 6)
    >>> frame = self_repair(stack, tokens, sampling=Sampling(resamples=0))
    >>> frame["self_repair"].abs().round(4).tolist()
    [0.0, 0.0, 0.0]
    """
    tokens = Tokens.of(tokens)
    moments, draws = _repair_moments(stack, tokens, sampling), _draws(len(tokens), sampling)
    return pd.DataFrame(
        {"layer": layer, "n_prompts": len(tokens)} | _slopes([of_layer], draws) for layer, of_layer in moments.items()
    )


def _additivity(stack: Stack, tokens: Tokens, kind: str, sampling: Sampling) -> dict[str, float]:
    """A of MLPs and of heads."""
    row: dict[str, float] = {}
    for units in ("mlps", "heads"):
        row |= columns(f"additivity_{units}", torch.full((1,), torch.nan))
        with suppress(ModelError):
            measured = additivity(stack, tokens, units, kind, sampling=sampling).iloc[0]
            row |= {f"additivity_{units}{end}": float(measured[f"additivity{end}"]) for end in ("", "_low", "_high")}
    return row


def _draws(n_prompts: int, sampling: Sampling) -> Float[Tensor, "resample prompt"]:
    """How often each resample counts each prompt; a single prompt is not resampled."""
    return weights(n_prompts, sampling.resamples, sampling.seed)


# --- damage of subsets ---


def _curve(full: Damages, sets: Iterable[tuple[int, ...]], sampling: Sampling) -> Float[Tensor, "size resample"]:
    """Mean damage of the sets of each size under every resample of the prompts."""
    n_prompts, by_size = full.margin.shape[1], defaultdict(list)
    shares = _draws(n_prompts, sampling) / n_prompts
    for layers in sets:
        by_size[len(layers)].append(full.margin[full.row[layers]])
    return torch.stack([shares @ torch.stack(values).mean(0) for _, values in sorted(by_size.items())])


def _curvature(curve: Float[Tensor, "size resample"]) -> Resampled:
    values = 1 - 2 * ratio(curve[:-1].sum(0), (len(curve) - 2) * curve[-1])
    return values if interactions.is_above_0(curve[-1]) else torch.full_like(values, torch.nan)


# --- self-repair ---


def _repair_moments(stack: Stack, tokens: Tokens, sampling: Sampling) -> dict[int, dict[str, Moments]]:
    """The moments of DE with itself, with DE - TE and with the repair by the norm, for every layer."""
    ensemble = Ensemble.of(stack, tokens, sampling.but(progress=False))
    if not predicting_positions(ensemble.tokens, ensemble.mask).any():
        raise ValueError("no token of the ensemble predicts another: give prompts of 3 tokens or more")
    parts: defaultdict[int, defaultdict[str, list[Moments]]] = defaultdict(lambda: defaultdict(list))
    for run in clean_runs(stack, ensemble, "resample"):
        kept = predicting_positions(run.context.tokens, run.mask)
        clean = _margin(stack, run, run.stream[-1], kept)
        for layer in range(stack.n_layers):
            lost = run.update(layer) - run.ablate(layer, run.update(layer))
            alone, x = run.stream[-1] - lost, run.stream[layer + 1] - lost
            ablated = stack.execute(f"{layer + 1}:", x, run.context) if layer + 1 < stack.n_layers else x
            direct = clean - _margin(stack, run, alone, kept, frozen=True)
            effects = {
                "direct": direct,
                "self_repair": direct - (clean - _margin(stack, run, ablated, kept)),
                "norm_repair": direct - (clean - _margin(stack, run, alone, kept)),
            }
            for name, values in effects.items():
                parts[layer][name].append(Moments.of(direct, values, kept))
    return {
        layer: {name: Moments.concatenate(batches) for name, batches in of_layer.items()}
        for layer, of_layer in parts.items()
    }


def _margin(
    stack: Stack, run: CleanRun, final: Tensor, kept: Tensor, *, frozen: bool = False
) -> Float[Tensor, "prompt pos 1"]:
    """Centred logit of the right next token where one is predicted, 0 elsewhere."""
    x, clean = final[:, :-1][kept], run.stream[-1][:, :-1][kept]
    targets, margins = run.context.tokens.ids[:, 1:][kept], []
    for rows in portions(stack, x):
        with frozen_head(stack, clean[rows]) if frozen else nullcontext():
            y = logits(stack, x[rows]).double()
        margins.append(y.gather(1, targets[rows].unsqueeze(1)) - y.mean(1, keepdim=True))
    values = torch.zeros(*kept.shape, 1, dtype=torch.float64, device=x.device)
    values[kept] = torch.cat(margins)
    return values


def _slopes(layers: Sequence[dict[str, Moments]], draws: Float[Tensor, "resample prompt"]) -> dict[str, float]:
    """Slopes on the direct effect, pooled over the layers, each about its own means."""
    size = _sum(sums["direct"].covariance(draws) for sums in layers)
    scale = _sum(sums["direct"].product.sum() for sums in layers) / _sum(sums["direct"].count.sum() for sums in layers)
    size = torch.where(size > 1e-9 * scale, size, 0)
    slopes = {
        name: ratio(_sum(sums[name].covariance(draws) for sums in layers), size)
        for name in ("self_repair", "norm_repair")
    }
    share = ratio(slopes["norm_repair"], slopes["self_repair"])
    slopes["norm_share"] = (
        share if interactions.is_above_0(slopes["self_repair"]) else torch.full_like(share, torch.nan)
    )
    return {key: value for name, values in slopes.items() for key, value in columns(name, values).items()}


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)
