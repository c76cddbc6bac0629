r"""Take layers out: what is put in their place, and what that costs the model, prompt by prompt.

Layer ``i`` writes ``u_i`` into the stream. Taken out, it writes instead, at every token of the ensemble,

    u  ->  (1 - amount) u + amount v,

where u is what it would write on the stream that now enters it, and v depends on ``kind``:

========  ==============================================================================================================
skip      v = 0. The stream is then one that no layer was trained on; what breaks may be due to that alone
mean      v = E u_i over the ensemble: all that the layer says of one token rather than another is gone, its bias stays
resample  v = the update that another prompt's token at the same place received (``ensemble.partners``). A token has one
          donor for all layers, so that what layers write when taken out together is consistent
========  ==============================================================================================================

Each prompt's first token is left as it is (unless ``skip_first=False``): it sees itself alone, and others rely on it.

``damage`` measures the loss in two units, averaged over the tokens that a prompt's ensemble predicts: ``margin``, by
how much the centred logit of the right next token falls (its logit minus the mean logit over the vocabulary), which
does not saturate: it goes on falling when the token is long lost; and ``loss``, the rise of the cross entropy in nats.
With ``frozen`` all norms keep the denominators of the clean run, the last one too, so that the margin is linear in the
last stream (but for soft-capped logits). A live norm makes up for part of what is gone, about 30 % of the direct effect
in published models (Rushing and Nanda 2024, arXiv 2402.15390). Frozen damages add up, which is what interactions need;
what the model itself loses is the live one. A layer that makes the stream much longer or shorter reads otherwise
frozen than live, even with another sign, because freezing keeps the length that this layer made: ``freezing`` measures
both and says where they part. The units may also be MLPs or heads (``surgery.instruments.components``). A damage that
is not finite stays so, and is counted in ``undefined``. Controls to compare with: the same with a smaller ``amount``,
another kind, and the architecture untrained. Mean and resample ablation: Chan et al. 2022 (causal scrubbing), Wang et
al. 2022 (arXiv 2211.00593).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery import progress
from surgery.instruments.components import Sites
from surgery.instruments.ensemble import Ensemble, exchange, partners
from surgery.instruments.readout import frozen_head, logits, portions, predicting_positions
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.engine import Stream
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import RESAMPLES, columns, described, measure_columns, weights
from surgery.stats.sampling import Sampling

KINDS = ("skip", "mean", "resample")
PART = 0.5  # of the larger damage: frozen and live damages that differ by more are said to part
COLUMNS = {
    "layers": "the layers (or other units) taken out together, counted from 0, separated by spaces",
    "n_layers": "how many they are",
    "n_prompts": "number of prompts, the unit of resampling",
    "undefined": "number of prompts whose damage is not finite: where there are any, the set has no damage",
    "margin": "by how much the centred logit of the right next token falls (logits)",
    "margin_low": "lower end of the 95 % interval of margin (bootstrap over prompts)",
    "margin_high": "upper end of the 95 % interval of margin",
    "loss": "by how much the loss rises (nats per token)",
    "loss_low": "lower end of the 95 % interval of loss",
    "loss_high": "upper end of the 95 % interval of loss",
}
FREEZING = {
    "layers": COLUMNS["layers"],
    "n_prompts": COLUMNS["n_prompts"],
    **described(
        {
            "frozen": "fall of the margin with the norms' denominators kept from the clean run (logits)",
            "live": "fall of the margin as the model runs (logits)",
            "difference": "frozen minus live",
        }
    ),
    "freezing": "agrees, or parts (in sign, in size: believe live of what the model loses), undefined, undecided",
}


@dataclass(frozen=True)
class Damages:
    """What taking out each of ``sets`` of layers costs each prompt, averaged over its predicted tokens."""

    sets: tuple[tuple[int, ...], ...]
    margin: Float[Tensor, "set prompt"]  # logits
    loss: Float[Tensor, "set prompt"]  # nats

    @cached_property
    def row(self) -> dict[tuple[int, ...], int]:
        """The row of ``margin`` and ``loss`` that is about a set."""
        return {layers: row for row, layers in enumerate(self.sets)}

    @cached_property
    def undefined(self) -> Bool[Tensor, "set prompt"]:
        """Where a damage is not finite: nothing may be said of that set."""
        return ~(self.margin.isfinite() & self.loss.isfinite())

    @with_meanings(COLUMNS)
    def frame(self, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
        """Return one row per set, with intervals over prompts: ``COLUMNS``."""
        n_prompts = self.margin.shape[1]
        draws = weights(n_prompts, resamples, seed) / n_prompts
        return pd.DataFrame(
            {"layers": " ".join(map(str, layers)), "n_layers": len(layers), "n_prompts": n_prompts}
            | {"undefined": int(self.undefined[row].sum())}
            | columns("margin", draws @ self.margin[row])
            | columns("loss", draws @ self.loss[row])
            for layers, row in self.row.items()
        )


@dataclass(frozen=True)
class CleanRun:
    """One batch, run as it is, and what its layers, MLPs or heads write when they are taken out."""

    first: int  # index of the batch's first prompt among all
    context: Context
    mask: Bool[Tensor, "prompt pos"]  # the tokens of the ensemble
    stream: Float[Tensor, "layer_plus_1 prompt pos d_model"]
    amount: float
    means: Float[Tensor, "layer width"]  # of updates, or of what is written at ``sites``
    partner: Int[Tensor, " token"] | None  # for kind="resample"
    sites: Sites
    written: dict[int, Tensor] = field(default_factory=dict)  # at the sites, in the clean run

    def update(self, layer: int) -> Stream:
        """Return ``u_l`` of the clean run."""
        return self.stream[layer + 1] - self.stream[layer]

    def replacement(self, layer: int) -> Stream:
        """Return v, what the layer (its MLP, its heads) writes in the ensemble when it is taken out wholly."""
        clean = self.written[layer] if self.sites.modules else self.update(layer)
        if self.partner is not None:
            return exchange(clean, self.mask, self.partner)
        return self.means[layer].to(clean).expand_as(clean)

    def ablate(self, layer: int, u: Stream, where: Bool[Tensor, "prompt pos"] | None = None) -> Stream:
        """Return ``(1 - amount) u + amount v`` at the tokens ``where`` (default: the ensemble), and u at the others."""
        ablated = (1 - self.amount) * u + self.amount * self.replacement(layer)
        return torch.where((self.mask if where is None else where).unsqueeze(-1), ablated, u)

    def update_without(
        self, stack: Stack, layer: int, units: Sequence[int], x: Stream, u: Stream | None = None
    ) -> Stream:
        """Return the update of ``layer`` on ``x`` without these of its units; ``u`` is its whole update, if it ran.

        Taken out wholly, a layer need not run: tokens outside the ensemble see none in it, so they are as they were.
        """
        if not self.sites.modules:
            return self.ablate(layer, self.update(layer) if u is None else u)

        def without(written: Tensor) -> Tensor:
            ablated, left = self.ablate(layer, written), written.clone()
            for unit in units:
                part = self.sites.part(unit, written.shape[-1])
                left[..., part] = ablated[..., part]
            return left

        with self.sites.replaced(layer, without):
            return stack.update(layer, x, self.context)


def clean_runs(
    stack: Stack, ensemble: Ensemble, kind: str = "mean", amount: float = 1.0, units: str = "layers"
) -> Iterator[CleanRun]:
    """Yield every batch of the ensemble, ready for ``units`` to be taken out of it. Cost: 1 F, with ``mean`` 2 F.

    Raises ValueError for an unknown kind, an amount outside (0, 1], one prompt to resample from, and a stream that is
    not finite, and as ``components.Sites`` does.

    >>> from surgery.instruments import known_networks
    >>> ensemble = Ensemble(Tokens.of(known_networks.tokens(4)))
    >>> run = next(clean_runs(Stack(known_networks.parallel_network()), ensemble, "skip"))
    >>> run.ablate(2, run.update(2))[run.mask].abs().max().item()
    0.0
    """
    if kind not in KINDS:
        raise ValueError(f"layers are taken out by {', '.join(KINDS)}, not by {kind!r}")
    if not 0 < amount <= 1:
        raise ValueError(f"amount is the share of an update to take out, above 0 and up to 1, got {amount}")
    if kind == "resample" and len(ensemble.tokens) < 2:
        raise ValueError("resample takes the updates of another prompt: give two or more, or kind='mean'")
    means = mean_updates(stack, ensemble, units) if kind == "mean" else None
    first, seed = 0, ensemble.sampling.seed
    quiet = replace(ensemble, sampling=ensemble.sampling.but(progress=False))
    for _, context, mask in quiet.batches(stack, least=3):  # in less, a prompt could have no donor
        sites = Sites.of(stack, context, units)
        with sites.recorded() as written:
            stream = stack.stream(context)
        if not stream[:, mask].isfinite().all():
            raise ValueError(f"the stream of {stack.name} is not finite: load the model in float32, or fix its weights")
        partner = partners(mask, np.random.default_rng((seed, 2, first))) if kind == "resample" else None
        v = torch.zeros(stack.n_layers, 1, dtype=torch.float64) if means is None else means
        yield CleanRun(first, context, mask, stream, amount, v, partner, sites, dict(written))
        first += len(mask)


def mean_updates(stack: Stack, ensemble: Ensemble, units: str = "layers") -> Float[Tensor, "layer width"]:
    """Return the mean update of every layer over the ensemble, in float64 on the CPU. Cost: 1 F.

    Of other ``units`` it is the mean of what they write at their sites.
    """
    totals: dict[int, Tensor] = {}
    sites = Sites.of(stack, stack.context(ensemble.tokens[:1]), units)
    with sites.recorded() as written:
        for visit in ensemble.visits(stack, "mean updates"):
            values = (written[visit.layer] if sites.modules else visit.u)[visit.mask]
            totals[visit.layer] = totals.get(visit.layer, 0) + values.sum(0, dtype=torch.float64).cpu()
    return torch.stack([totals[layer] for layer in range(stack.n_layers)]) / int(ensemble.mask.sum())


@in_smaller_batches
def damage(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    sets: Iterable[Sequence[int]],
    kind: str = "mean",
    amount: float = 1.0,
    *,
    frozen: bool = False,
    units: str = "layers",
    sampling: Sampling = Sampling(),
) -> Damages:
    """Measure what it costs each prompt to do without each of ``sets`` of layers (or of other ``units``).

    The sets are the leaves of a tree: what two have in common before they part is run once, and what comes before the
    first layer taken out is not run again. Cost: 1 F for the clean run, 1 F for the mean, 1 F for the denominators of
    ``frozen``, and of L layers ``(L - 1)/2`` F for each taken out alone and ``(L - 1)(L - 2)/6`` F for all pairs; a
    readout for every set. Memory: the streams of one batch, twice.

    Raises ValueError for a layer that the model does not have, a prompt without a predicted token in the ensemble, what
    ``clean_runs`` refuses and, with ``frozen``, a norm whose denominator cannot be found (use ``frozen=False``).

    >>> from surgery.instruments import known_networks
    >>> damages = damage(Stack(known_networks.parallel_network()), known_networks.tokens(8), [[1], [4], [1, 4]])
    >>> apart, together = damages.margin[:2].sum(0), damages.margin[damages.row[1, 4]]
    >>> torch.allclose(together, apart, atol=1e-5)  # no layer reads another: damages add up
    True
    """
    distinct = list(dict.fromkeys(tuple(sorted(set(layers))) for layers in sets))
    ensemble = Ensemble.of(stack, tokens, sampling)
    count = Sites.of(stack, stack.context(ensemble.tokens[:1]), units).count
    absent = sorted({unit for chosen in distinct for unit in chosen if not 0 <= unit < count})
    if absent:
        name = {"layers": "layer", "mlps": "MLP", "heads": "head"}[units]
        raise ValueError(f"there is no {name} {absent[0]} to take out: {stack.name} has 0 to {count - 1}")
    silent = ~predicting_positions(ensemble.tokens, ensemble.mask).any(1)
    if silent.any():
        raise ValueError(
            f"prompt {int(silent.nonzero()[0]) + 1} predicts no token from the ensemble: give prompts of "
            f"{3 if sampling.skip_first else 2} tokens or more"
        )
    measures = torch.zeros(2, len(distinct), len(ensemble.tokens), dtype=torch.float64)
    damages = Damages(tuple(distinct), *measures)
    with progress.task("ablations", len(distinct) * len(ensemble.tokens), sampling.progress) as advance:
        for run in clean_runs(stack, ensemble, kind, amount, units):
            with stack.frozen(run.context) if frozen else nullcontext():
                clean = _scores(stack, run, run.stream[-1], frozen)
                prompts = slice(run.first, run.first + len(run.mask))
                for layers, final in _final_streams(stack, run, distinct):
                    measures[:, damages.row[layers], prompts] = clean - _scores(stack, run, final, frozen)
                    advance(len(run.mask))
    return damages


@with_meanings(COLUMNS)
def freezing(frozen: Damages, live: Damages, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Compare damages of the margin under frozen and live norms: a row per set, ``FREEZING``. Cost: no forward pass.

    They part in sign where both intervals exclude 0, on opposite sides; in size where the interval of their difference
    excludes 0 and the difference is more than ``PART`` of the larger. What the model loses is then the live one, and a
    frozen damage is a direct effect at the length that the stream had, no more. Raises ValueError for different sets.

    >>> less, more = (torch.tensor([[sign * 1.0, sign * 1.2]]).double() for sign in (-1, 1))
    >>> freezing(Damages(((5,),), more, more), Damages(((5,),), less, less))["freezing"].tolist()
    ['parts in sign']
    """
    if frozen.sets != live.sets or frozen.margin.shape != live.margin.shape:
        raise ValueError("frozen and live damages are of different sets or prompts")
    n_prompts = frozen.margin.shape[1]
    draws = weights(n_prompts, resamples, seed) / n_prompts
    rows = []
    for i, chosen in enumerate(frozen.sets):
        values = {"frozen": draws @ frozen.margin[i], "live": draws @ live.margin[i]}
        values["difference"] = values["frozen"] - values["live"]
        row: dict[str, Any] = {"layers": " ".join(map(str, chosen)), "n_prompts": n_prompts}
        row |= measure_columns(values)
        rows.append(row | {"freezing": _parting(row)})
    return pd.DataFrame(rows)


def _parting(row: Mapping[str, Any]) -> str:
    if not all(np.isfinite(row[name]) for name in ("frozen", "live")):
        return "undefined"
    if np.isnan(row["difference_low"]):
        return "undecided"

    def side(name: str) -> int:
        return int(row[f"{name}_low"] > 0) - int(row[f"{name}_high"] < 0)

    if side("frozen") * side("live") < 0:
        return "parts in sign"
    larger = max(abs(row["frozen"]), abs(row["live"]))
    return "parts in size" if side("difference") and abs(row["difference"]) > PART * larger else "agrees"


def _final_streams(
    stack: Stack, run: CleanRun, sets: list[tuple[int, ...]], layer: int = 0, x: Stream | None = None
) -> Iterator[tuple[tuple[int, ...], Stream]]:
    """Yield every set with its final stream; before ``layer`` all are the same and give ``x`` (None: clean so far)."""
    if layer == stack.n_layers:
        yield from ((layers, run.stream[-1] if x is None else x) for layers in sets)
        return
    before = run.stream[layer] if x is None else x
    by_removed: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for units in sets:
        removed = tuple(unit for unit in units if run.sites.layer(unit) == layer)
        by_removed.setdefault(removed, []).append(units)
    u = None
    if x is not None and (() in by_removed or (run.amount < 1 and not run.sites.modules)):
        u = stack.update(layer, x, run.context)
    for removed, group in by_removed.items():
        written = run.update_without(stack, layer, removed, before, u) if removed else u
        after = None if written is None else before + written
        yield from _final_streams(stack, run, group, layer + 1, after)


def _scores(stack: Stack, run: CleanRun, final: Stream, frozen: bool) -> Float[Tensor, "measure prompt"]:
    """Return centred logit and log-probability of the right next token, averaged over every prompt's predictions."""
    predicting = predicting_positions(run.context.tokens, run.mask)
    x, clean = final[:, :-1][predicting], run.stream[-1][:, :-1][predicting]
    targets, prompts = run.context.tokens.ids[:, 1:][predicting], predicting.nonzero()[:, 0]
    parts = []
    for rows in portions(stack, x):
        with frozen_head(stack, clean[rows]) if frozen else nullcontext():
            y = logits(stack, x[rows])
        right = y.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
        parts.append(torch.stack([right - y.mean(1), right - y.logsumexp(1)]).double())
    total = torch.zeros(2, len(predicting), dtype=torch.float64, device=x.device)
    return (total.index_add(1, prompts, torch.cat(parts, 1)) / predicting.sum(1)).cpu()
