r"""Are two layers needed together, independent, or backups of each other? From the damage of taking out each and both.

``D_i``, ``D_j``, ``D_ij`` are the damages (``surgery.instruments.ablation``) without layer i, without j, and without
both.

    delta = D_ij - D_i - D_j
    rho   = -delta / min(D_i, D_j)    if delta <= 0,    -delta / D_ij    if delta > 0

Where damage is monotone, 0 <= max(D_i, D_j) <= D_ij, rho lies in [-1, 1], and reads as in the theory of reliability:

====  ======================  ===============================================================================
 rho  system                  damages
====  ======================  ===============================================================================
  +1  needed together (AND)   without either everything is lost, nothing is left to lose: D_ij = max(D_i, D_j)
   0  independent             damages add up: D_ij = D_i + D_j (and the readout is linear)
  -1  mutual backup (OR)      each does the other's work when it is gone: D_i = D_j = 0 < D_ij
====  ======================  ===============================================================================

Needed together is not "in series": two layers that never read each other, joined by an AND in a third, read +1 too.
That one reads the other is what T or a local effect above 0 says (``surgery.series.effects``). "Parallel" means either
of the last two; running layers in parallel cannot tell them apart, rho can. Five things can fake it:

* noise: rho is a ratio. Where its divisor (the smaller damage if delta <= 0, the common one if delta > 0: a backup's
  single damages are 0, that is what it is) is not shown to be above 0, ``status`` says ``inside noise`` and rho is NaN;
  where a layer's removal is shown to help, ``ablation helps``: the damage is not monotone. Both at p < .05 over all
  damages together (``stats.comparisons.judged``: the larger p of studentised bootstrap and sign flips, step-down), so
  that of twenty models that compute nothing one has a pair with a rho. Fewer than 6 prompts show nothing.
* damages that are not finite, as when layers that erase massive activations are taken out under frozen norms: the pair
  is ``undefined``, and ``status`` names the ablation. Nothing of it enters a mean, a maximum or another pair.
* many pairs: ``q`` is p of delta over all defined pairs together, judged in the same way, and so a bound on the false
  discovery rate. Damages are skewed: by sign flips, or pair by pair, three times too many networks show a delta.
* saturation: a damage that has an upper bound makes everything look needed together. So the layers are taken out again
  in part (``amount`` = .5). Then rho reads ``amount`` for a linear chain, as what is left of it is a product, more for
  a hard AND, 0 for independent layers. ``saturating`` is yes where the interval of rho lies above 0 and
  ``rho_partial`` is less than half of ``amount rho``. A bound can only lower delta, so it never fakes a backup, and
  no objection is made where rho is below 0: a hard OR (D_ij = 0 until both are gone) loses nothing in part. What fakes
  a backup is a convex damage, such as the loss in nats of a sure token; the margin is linear in the last stream.
* freezing: ``freezing`` says where a single damage parts from that of the model as it runs (``ablation.freezing``).
  There rho is of direct effects at the length that the clean stream had; believe the live damages of what is lost.

``summary`` gives, over all pairs, mean rho and two indices of redundancy. Redundancy mass ``sum max(delta, 0) / sum
|delta|`` is 0 as soon as no pair has a positive delta, however many nearly have: it cannot compare models that are
mostly chains. Additivity moves between all of them:

    A = sum (D_ij - max(D_i, D_j)) / sum min(D_i, D_j),      0 chain, 1 independent, above 1 backup,

in margin units (in nats, convex, everything reads 1). Where the single damages are 0, as in perfect backups, A has no
bound and is NaN; A = 1 + sum delta / sum min(D_i, D_j).

Damage is the margin (logits), with all norms frozen, the last one too; with ``frozen=False`` rho also contains what
live norms make up for. Control: the architecture untrained, whose pairs lie inside noise. rho and A are ours; delta is
minus the second-order Moebius term of the model's worth at the full model, a pairwise interaction index (Grabisch and
Roubens 1999).

>>> import torch
>>> full = Damages(((0,), (1,), (0, 1)), *torch.tensor([2.0, 3, 2, 2, 3, 2]).double().expand(2, 3, 6))
>>> table(full, full)[["layer", "later", "delta", "rho"]].round(3).values.tolist()
[[0.0, 1.0, -2.333, 1.0]]
"""

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from surgery.instruments import massive
from surgery.instruments.ablation import Damages, damage, freezing
from surgery.instruments.ensemble import Ensemble
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats import comparisons, studentised
from surgery.stats.bootstrap import RESAMPLES, described, measure_columns, ratio, weights
from surgery.stats.sampling import Sampling

Resampled = Float[Tensor, " resample"]
SURE = 0.05

COLUMNS = {
    "layer": "the earlier layer of the pair, counted from 0",
    "later": "the later layer of the pair",
    "n_prompts": "number of prompts, the unit of resampling",
    "status": "measured, inside noise (rho's divisor is not shown to be above 0, over all damages), ablation helps "
    "(not monotone), or undefined and which damage is not finite",
    "q": "p of delta over all defined pairs together (studentised bootstrap and sign flips, step-down); bounds the "
    "false discovery rate",
    "saturating": "whether partial ablation fails to confirm a rho above 0: yes, no, undecided (no rho to confirm)",
    "freezing": "whether frozen and live norms agree on the layers alone: agrees, or which layer parts, and how",
    "n_pairs": "number of pairs",
    "n_measured": "number of pairs with a rho",
    "n_undefined": "number of pairs with a damage that is not finite, which are left out",
}
_INTERVALS = {
    "damage": "damage without the earlier layer (logits, or nats for the loss)",
    "damage_later": "damage without the later layer",
    "damage_both": "damage without both",
    "delta": "damage_both - damage - damage_later: below 0 needed together, above 0 redundancy",
    "rho": "interaction: 1 needed together, 0 independent, -1 mutual backup",
    "rho_partial": "rho where the layers are taken out in part: amount for a chain, 0 for independent ones",
    "mean_rho": "mean rho of the pairs that have one",
    "additivity": "A, sum of D_ij - max(D_i, D_j) over sum of min(D_i, D_j): 0 chain, 1 independent, above 1 backup",
    "redundancy_mass": "sum of positive delta over sum of |delta|: 0 where no pair is redundant on balance, 1 all",
}
COLUMNS |= described(_INTERVALS) | massive.COLUMNS


def sets(n_layers: int) -> list[tuple[int, ...]]:
    """Return every layer alone and every pair.

    >>> sets(3)
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    """
    return [*combinations(range(n_layers), 1), *combinations(range(n_layers), 2)]


@with_meanings(COLUMNS)
@in_smaller_batches
def pairs(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    kind: str = "mean",
    measure: str = "margin",
    amount: float = 0.5,
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure every pair of layers, taken out wholly and in part (``amount``): a row per pair, ``COLUMNS``.

    Cost in a model of L layers, twice: ``(L - 1)/2 + (L - 1)(L - 2)/6`` F, 1 F each for the
    clean run, the mean and the denominators, and ``L (L + 1)/2 + 1`` readouts; and for the live damages, with
    ``frozen``, ``(L - 1)/2 + 2`` F.

    Raises ValueError for a model of one layer, an amount not between 0 and 1, and what ``ablation.damage`` refuses.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.parallel_network(n_layers=3))
    >>> frame = pairs(stack, known_networks.tokens(24), sampling=Sampling(resamples=50))
    >>> bool(frame["delta"].abs().max() < 1e-5)
    True
    """
    if stack.n_layers < 2:
        raise ValueError(f"{stack.name} has one layer; an interaction needs two")
    if not 0 < amount < 1:
        raise ValueError(f"amount is what partial ablation takes out, between 0 and 1, got {amount}")
    ensemble = Ensemble.of(stack, tokens, sampling)
    full, partial = (
        damage(stack, ensemble, sets(stack.n_layers), kind, share, frozen=frozen, sampling=sampling)
        for share in (1.0, amount)
    )
    alone = [(layer,) for layer in range(stack.n_layers)]
    live = damage(stack, ensemble, alone, kind, sampling=sampling) if frozen else None
    options = (sampling.resamples, sampling.seed)
    frame = table(full, partial, measure, amount, *options, live=live, tolerance=stack.tolerance)
    return ensemble.annotate(frame, "layer", "later")


@with_meanings(COLUMNS)
def table(
    full: Damages,
    partial: Damages,
    measure: str = "margin",
    amount: float = 0.5,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    live: Damages | None = None,
    tolerance: float = 1e-9,
) -> pd.DataFrame:
    """Return rho, delta and what speaks against them, for every pair whose damages are given. Cost: no forward pass.

    ``live`` are damages of single layers with live norms; without them ``freezing`` is "not measured". Deltas within
    ``tolerance`` of the largest damage of the median prompt are rounding and count as 0.
    """
    value, part = _values(full, measure), _values(partial, measure)
    draws, rows, deltas = _draws(value, resamples, seed), [], []
    shown, shown_partial = _shown(value, seed), _shown(part, seed)
    parting = {} if live is None else _freezing(full, live, resamples, seed)
    for pair in _pairs(full):
        d, d_partial = _damages(full, value, pair, tolerance), _damages(partial, part, pair, tolerance)
        deltas.append(_delta(d))
        measures = dict(zip(("damage", "damage_later", "damage_both"), d @ draws.T, strict=True))
        status, rho = _rho(d @ draws.T, shown[_rows(full, pair)])
        status = _undefined(full, value, pair) or status
        partial_status, rho_partial = _rho(d_partial @ draws.T, shown_partial[_rows(partial, pair)])
        measures |= {"delta": draws @ deltas[-1], "rho": rho, "rho_partial": rho_partial}
        row: dict[str, Any] = {"layer": pair[0], "later": pair[1], "n_prompts": value.shape[1], "status": status}
        row |= measure_columns(measures)
        row["saturating"] = _saturating(row, amount, confirms=partial_status == "measured")
        parts = [f"layer {layer} {parting[layer]}" for layer in pair if parting.get(layer, "agrees") != "agrees"]
        row["freezing"] = ("; ".join(parts) or "agrees") if parting else "not measured"
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame["q"] = _family(torch.stack(deltas), seed)
    return frame


@with_meanings(COLUMNS)
def rhos(full: Damages, measure: str = "margin", seed: int = 0, *, tolerance: float = 1e-9) -> pd.DataFrame:
    """Return ``layer``, ``later`` and the estimate ``rho`` of every pair, without intervals and controls.

    It is that of ``table``. Cost: no forward pass.

    >>> chain = torch.ones(3, 8).double()
    >>> rhos(Damages(((0,), (1,), (0, 1)), chain, chain)).values.tolist()
    [[0.0, 1.0, 1.0]]
    """
    value, rows = _values(full, measure), []
    draws, shown = _draws(value, 0, seed), _shown(value, seed)
    for pair in _pairs(full):
        _, rho = _rho(_damages(full, value, pair, tolerance) @ draws.T, shown[_rows(full, pair)])
        rows.append({"layer": pair[0], "later": pair[1], "rho": float(rho[0])})
    return pd.DataFrame(rows)


@with_meanings(COLUMNS)
def summary(
    full: Damages, measure: str = "margin", resamples: int = RESAMPLES, seed: int = 0, *, tolerance: float = 1e-9
) -> pd.DataFrame:
    """Return mean rho, additivity A and redundancy mass of all pairs, with intervals over prompts: one row.

    Which pairs have a rho is decided once, on the estimates. A and the mass weigh every pair by its size, including
    those inside noise, but for undefined ones. A is NaN where the sum of the smaller damages has no interval above 0.
    Of noise alone the mass reads about .5. Compare models on the same prompts. Cost: no forward pass.

    >>> chain = torch.ones(3, 8).double()
    >>> row = summary(Damages(((0,), (1,), (0, 1)), chain, chain))
    >>> row[["mean_rho", "additivity", "redundancy_mass"]].values.tolist()
    [[1.0, 0.0, 0.0]]
    """
    value = _values(full, measure)
    draws, all_pairs = _draws(value, resamples, seed), _pairs(full)
    defined = [pair for pair in all_pairs if not _undefined(full, value, pair)]
    damages, shown = [_damages(full, value, pair, tolerance) for pair in defined], _shown(value, seed)
    judged = (_rho(d @ draws.T, shown[_rows(full, pair)]) for d, pair in zip(damages, defined, strict=True))
    rhos = [rho for status, rho in judged if status == "measured"]
    nothing = torch.full((len(draws),), torch.nan, dtype=torch.float64)
    measures = dict.fromkeys(("mean_rho", "additivity", "redundancy_mass"), nothing)
    if damages:
        deltas = torch.stack([draws @ _delta(d) for d in damages])
        least = torch.stack([(d[:2] @ draws.T).amin(0) for d in damages]).sum(0)
        measures["redundancy_mass"] = ratio(deltas.clamp(min=0).sum(0), deltas.abs().sum(0))
        if is_above_0(least):
            measures["additivity"] = 1 + ratio(deltas.sum(0), least)
    if rhos:
        measures["mean_rho"] = torch.stack(rhos).nanmean(0)
    counts = {"n_prompts": value.shape[1], "n_pairs": len(all_pairs), "n_measured": len(rhos)}
    counts["n_undefined"] = len(all_pairs) - len(defined)
    return pd.DataFrame([counts | measure_columns(measures)])


def is_above_0(values: Resampled) -> bool:
    """Whether the interval lies above 0; for one prompt, or without resamples, whether the estimate does."""
    return bool((values[0] if len(values) == 1 else values[1:].quantile(0.025)) > 0)


def _pairs(damages: Damages) -> list[tuple[int, int]]:
    pairs_measured = [(layers[0], layers[-1]) for layers in damages.sets if len(layers) == 2]
    missing = [layer for pair in pairs_measured for layer in pair if (layer,) not in damages.row]
    if missing or not pairs_measured:
        alone = f"layer {missing[0]} was not taken out alone" if missing else "there is no pair of layers"
        raise ValueError(f"{alone} in these damages; measure interactions.sets(n_layers)")
    return pairs_measured


def _values(damages: Damages, measure: str) -> Float[Tensor, "set prompt"]:
    if measure not in ("margin", "loss"):
        raise ValueError(f"damage is measured as margin (logits) or loss (nats), not as {measure!r}")
    return damages.margin if measure == "margin" else damages.loss


def _draws(value: Float[Tensor, "set prompt"], resamples: int, seed: int) -> Float[Tensor, "resample prompt"]:
    n_prompts = value.shape[1]
    return weights(n_prompts, resamples, seed) / n_prompts


def _rows(damages: Damages, pair: tuple[int, int]) -> list[int]:
    """Where the damages without the earlier layer, the later, and both are."""
    return [damages.row[layers] for layers in (pair[:1], pair[1:], pair)]


def _damages(
    damages: Damages, value: Float[Tensor, "set prompt"], pair: tuple[int, int], tolerance: float
) -> Float[Tensor, "3 prompt"]:
    """Return the damages without the earlier layer, the later, and both; sums equal but for rounding are made equal."""
    first, later, both = value[_rows(damages, pair)]
    finite = value.where(value.isfinite(), 0).abs()
    rounding = tolerance * float(finite.amax(0).median())  # of the median prompt: one that is huge decides nothing
    equal = (both - first - later).abs() <= rounding  # not so where any is undefined
    return torch.stack([first, later, torch.where(equal, first + later, both)])


def _undefined(damages: Damages, value: Float[Tensor, "set prompt"], pair: tuple[int, int]) -> str:
    """Return which damages of a pair are not finite, in words; nothing if all are."""
    names = []
    for chosen in (pair[:1], pair[1:], pair):
        bad = (~value[damages.row[chosen]].isfinite()).nonzero()[:, 0]
        if len(bad):
            more = f" and {len(bad) - 1} more" * (len(bad) > 1)
            names.append(f"without {' and '.join(map(str, chosen))} (prompt {int(bad[0]) + 1}{more})")
    return f"undefined: not finite {', '.join(names)}" if names else ""


def _freezing(full: Damages, live: Damages, resamples: int, seed: int) -> dict[int, str]:
    """Return whether frozen and live damages of every single layer agree."""
    alone = [layers for layers in full.sets if len(layers) == 1]
    rows = [full.row[layers] for layers in alone]
    singles = Damages(tuple(alone), full.margin[rows], full.loss[rows])
    same = [live.row[layers] for layers in alone]
    live = Damages(tuple(alone), live.margin[same], live.loss[same])
    words = freezing(singles, live, resamples, seed)["freezing"]
    return {layer: word for (layer,), word in zip(alone, words, strict=True)}


def _delta(d: Float[Tensor, "3 column"]) -> Float[Tensor, " column"]:
    return d[2] - (d[0] + d[1])


def _rho(d: Float[Tensor, "3 resample"], shown: Int[np.ndarray, " 3"]) -> tuple[str, Resampled]:
    """Return whether the index stands out from noise, and its value under every resample (NaN if it does not)."""
    delta, least = _delta(d), d[:2].amin(0)
    nothing = torch.full_like(delta, torch.nan)
    if not d.isfinite().all():
        return "undefined", nothing
    if (shown[:2] < 0).any():
        return "ablation helps", nothing
    if shown[2 if delta[0] > 0 else int(d[:2, 0].argmin())] <= 0:
        return "inside noise", nothing
    return "measured", torch.where(delta > 0, -delta / d[2], -delta / least)


def _saturating(row: dict, amount: float, *, confirms: bool) -> str:
    """Whether a rho above 0 may be the work of a bounded damage; a bound cannot make one below 0."""
    if np.isnan(row["rho_low"]) or (row["rho_low"] > 0 and not confirms):
        return "undecided"
    return "yes" if row["rho_low"] > 0 and row["rho_partial"] < amount * row["rho"] / 2 else "no"


def _shown(value: Float[Tensor, "set prompt"], seed: int) -> Int[np.ndarray, " set"]:
    """Return the sign of every mean damage that is not 0 by luck, corrected for all of them; 0 for the others."""
    return np.where(_family(value, seed) < SURE, np.sign(value.mean(1).numpy()), 0).astype(int)


def _family(values: Float[Tensor, "row prompt"], seed: int) -> Float[np.ndarray, " row"]:
    """Return p of the mean of every row, all of them together; NaN where a prompt is not finite."""
    d, finite = values.T.numpy(), values.isfinite().all(1).numpy()
    p = np.full(len(values), np.nan)
    if finite.any():
        drawn = studentised.draws(len(d), comparisons.RESAMPLES, seed)
        p[finite] = comparisons.judged(studentised.Units.of(d[:, finite]), drawn, seed)[1]
    return p
