r"""Are two layers in series, independent, or backups of each other? From the damage of taking out each and both.

``D_i``, ``D_j``, ``D_ij`` are the damages (``surgery.instruments.ablation``) without layer i, without j, and without
both.

    delta = D_ij - D_i - D_j
    rho   = -delta / min(D_i, D_j)    if delta <= 0,    -delta / D_ij    if delta > 0

Where damage is monotone, 0 <= max(D_i, D_j) <= D_ij, rho lies in [-1, 1], and reads as in the theory of reliability:

====  ==================  ===================================================================================
 rho  system              damages
====  ==================  ===================================================================================
  +1  series (AND)        without either everything is lost, there is nothing left to lose: D_ij = max(D_i, D_j)
   0  independent         damages add up: D_ij = D_i + D_j (and the readout is linear)
  -1  mutual backup (OR)  each does the other's work when it is gone: D_i = D_j = 0 < D_ij
====  ==================  ===================================================================================

"Parallel" means either of the last two; running layers in parallel cannot tell them apart, rho can. Three things can
fake it:

* noise: rho is a ratio. Where its divisor (the smaller damage if delta <= 0, the common one if delta > 0: a backup's
  single damages are 0, that is what it is) is not above two standard errors, ``status`` says ``inside noise`` and rho
  is NaN; where a layer's removal helps, by two standard errors, ``ablation helps``: the damage is not monotone.
* many pairs: ``q`` is the false discovery rate (Benjamini and Hochberg 1995) of delta over all pairs, each pair's p by
  flipping the signs of its delta prompt by prompt.
* saturation: a damage that has an upper bound makes everything look serial. So the layers are taken out again in part
  (``amount`` = .5). Then rho reads ``amount`` for a linear chain, as what is left of it is a product; -1 for backups,
  0 for independent layers. ``saturating`` is yes where the interval of rho excludes 0 and ``rho_partial`` has
  another sign, or less than half of ``amount |rho|``.

Damage is the margin (logits), with all norms frozen, the last one too; with ``frozen=False`` rho also contains what
live norms make up for. Control: the architecture untrained, whose pairs lie inside noise. rho is ours; delta is minus
the second-order Moebius term of the model's worth at the full model, a pairwise interaction index (Grabisch and Roubens
1999).

>>> import torch
>>> full = Damages(((0,), (1,), (0, 1)), *torch.tensor([[2.0, 3, 2], [2, 3, 2], [2, 3, 2]]).double().expand(2, 3, 3))
>>> table(full, full)[["layer", "later", "delta", "rho"]].round(3).values.tolist()
[[0.0, 1.0, -2.333, 1.0]]
"""

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from surgery.instruments.ablation import Damages, damage
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import RESAMPLES, described, measure_columns, weights
from surgery.stats.permutation import p_value, sign_flips, signs
from surgery.stats.sampling import Sampling

Resampled = Float[Tensor, " resample"]

COLUMNS = {
    "layer": "the earlier layer of the pair, counted from 0",
    "later": "the later layer of the pair",
    "n_prompts": "number of prompts, the unit of resampling",
    "status": "measured, inside noise (rho's divisor below two standard errors), or ablation helps (not monotone)",
    "q": "false discovery rate of delta over all pairs (Benjamini-Hochberg, sign flips over prompts)",
    "saturating": "whether partial ablation fails to confirm rho: yes, no, undecided (no rho to confirm)",
    "n_pairs": "number of pairs",
    "n_measured": "number of pairs with a rho",
}
_INTERVALS = {
    "damage": "damage without the earlier layer (logits, or nats for the loss)",
    "damage_later": "damage without the later layer",
    "damage_both": "damage without both",
    "delta": "damage_both - damage - damage_later: below 0 series, above 0 redundancy",
    "rho": "interaction: 1 series, 0 independent, -1 mutual backup",
    "rho_partial": "rho where the layers are taken out in part: amount for a series, 0, -1",
    "mean_rho": "mean rho of the pairs that have one",
    "redundancy_mass": "sum of positive delta over sum of |delta|, over all pairs: 0 all series, 1 all redundant",
}
COLUMNS |= described(_INTERVALS)


def sets(n_layers: int) -> list[tuple[int, ...]]:
    """Return every layer alone and every pair.

    >>> sets(3)
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    """
    return [*combinations(range(n_layers), 1), *combinations(range(n_layers), 2)]


def pairs(
    stack: Stack,
    tokens: Tokens | Tensor,
    kind: str = "mean",
    measure: str = "margin",
    amount: float = 0.5,
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure every pair of layers, taken out wholly and in part (``amount``): a row per pair, ``COLUMNS``.

    Cost in a model of L layers, twice: ``(L - 1)/2 + (L - 1)(L - 2)/6`` F, 1 F each for the
    clean run, the mean and the denominators, and ``L (L + 1)/2 + 1`` readouts.

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
    full, partial = (
        damage(stack, tokens, sets(stack.n_layers), kind, share, frozen=frozen, sampling=sampling)
        for share in (1.0, amount)
    )
    return table(full, partial, measure, amount, sampling.resamples, sampling.seed, tolerance=stack.tolerance)


def table(
    full: Damages,
    partial: Damages,
    measure: str = "margin",
    amount: float = 0.5,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    tolerance: float = 1e-9,
) -> pd.DataFrame:
    """Return rho, delta and what speaks against them, for every pair whose damages are given. Cost: no forward pass.

    Deltas within ``tolerance`` of the largest damage are rounding and count as 0.
    """
    value, part = _values(full, measure), _values(partial, measure)
    draws, rows, deltas = _draws(value, resamples, seed), [], []
    for pair in _pairs(full):
        d, d_partial = _damages(full, value, pair, tolerance), _damages(partial, part, pair, tolerance)
        deltas.append(_delta(d))
        measures = dict(zip(("damage", "damage_later", "damage_both"), d @ draws.T, strict=True))
        status, rho = _rho(d @ draws.T)
        partial_status, rho_partial = _rho(d_partial @ draws.T)
        measures |= {"delta": draws @ deltas[-1], "rho": rho, "rho_partial": rho_partial}
        row: dict[str, Any] = {"layer": pair[0], "later": pair[1], "n_prompts": value.shape[1], "status": status}
        row |= measure_columns(measures)
        decided = status == partial_status == "measured" and not np.isnan(row["rho_low"])
        row["saturating"] = _saturating(row, amount) if decided else "undecided"
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame["q"] = _discoveries(torch.stack(deltas, 1).numpy(), seed)
    return frame


def summary(
    full: Damages, measure: str = "margin", resamples: int = RESAMPLES, seed: int = 0, *, tolerance: float = 1e-9
) -> pd.DataFrame:
    """Return mean rho and redundancy mass ``sum max(delta, 0) / sum |delta|`` of all pairs, with intervals: one row.

    Which pairs have a rho is decided once, on the estimates. The mass weighs every pair by its size, including those
    inside noise: noise alone reads about .5, so compare models on the same prompts. Cost: no forward pass.

    >>> series = torch.ones(3, 4).double()
    >>> summary(Damages(((0,), (1,), (0, 1)), series, series))[["mean_rho", "redundancy_mass"]].values.tolist()
    [[1.0, 0.0]]
    """
    value = _values(full, measure)
    draws, all_pairs = _draws(value, resamples, seed), _pairs(full)
    damages = [_damages(full, value, pair, tolerance) for pair in all_pairs]
    rhos = [rho for status, rho in (_rho(d @ draws.T) for d in damages) if status == "measured"]
    deltas = torch.stack([draws @ _delta(d) for d in damages])
    mean = torch.stack(rhos).nanmean(0) if rhos else torch.full((len(draws),), torch.nan, dtype=torch.float64)
    size = deltas.abs().sum(0)
    mass = torch.where(size > 0, deltas.clamp(min=0).sum(0) / size, torch.nan)
    counts = {"n_prompts": value.shape[1], "n_pairs": len(all_pairs), "n_measured": len(rhos)}
    return pd.DataFrame([counts | measure_columns({"mean_rho": mean, "redundancy_mass": mass})])


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
    return weights(n_prompts, resamples if n_prompts > 1 else 0, seed) / n_prompts


def _damages(
    damages: Damages, value: Float[Tensor, "set prompt"], pair: tuple[int, int], tolerance: float
) -> Float[Tensor, "3 prompt"]:
    """Return the damages without the earlier layer, the later, and both; sums equal but for rounding are made equal."""
    first, later, both = (value[damages.row[layers]] for layers in (pair[:1], pair[1:], pair))
    rounding = tolerance * float(value.abs().max())
    return torch.stack([first, later, torch.where((both - first - later).abs() > rounding, both, first + later)])


def _delta(d: Float[Tensor, "3 column"]) -> Float[Tensor, " column"]:
    return d[2] - (d[0] + d[1])


def _rho(d: Float[Tensor, "3 resample"]) -> tuple[str, Resampled]:
    """Return whether the index stands out from noise, and its value under every resample (NaN if it does not)."""
    delta, least = _delta(d), d[:2].amin(0)
    redundant = bool(delta[0] > 0)
    error = d[:, 1:].std(1) if d.shape[1] > 2 else torch.zeros(3, dtype=d.dtype)
    divisor = 2 if redundant else int(d[:2, 0].argmin())
    if (d[:2, 0] < -2 * error[:2]).any():
        return "ablation helps", torch.full_like(delta, torch.nan)
    if not d[divisor, 0] > 2 * error[divisor]:
        return "inside noise", torch.full_like(delta, torch.nan)
    return "measured", torch.where(delta > 0, -delta / d[2], -delta / least)


def _saturating(row: dict, amount: float) -> str:
    if row["rho_low"] <= 0 <= row["rho_high"]:
        return "no"  # nothing is claimed
    confirmed = np.sign(row["rho"]) * row["rho_partial"] >= amount * abs(row["rho"]) / 2
    return "no" if confirmed else "yes"


def _discoveries(deltas: Float[np.ndarray, "prompt pair"], seed: int) -> Float[np.ndarray, " pair"]:
    """Return the Benjamini-Hochberg q of every pair; p comes from flipping the signs of its deltas."""
    flips = signs(len(deltas), seed=seed)
    _, reached, _ = sign_flips(deltas, flips)
    return multipletests(p_value(reached, flips), method="fdr_bh")[1]
