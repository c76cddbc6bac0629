r"""Does the residual stream revert to a mean? Layer by layer, with its nulls and with the cause checked.

Layer ``l`` takes the stream ``x`` to ``x + u``. Over the ensemble of tokens, centred (``c(a) = a - E a``) and with
``n(a) = sqrt(E|c(a)|^2)``, its drift is three numbers:

    kappa  = -E<c(u), c(x)> / E|c(x)|^2      the part of a deviation that the layer takes back; 1 is all of it
    growth = n(u) / n(x)                     the size of the update beside the stream, often called r
    psi    = 2 kappa / growth^2              0 random walk, 1 stationary, above 1 contracting, below 0 explosive

so that ``E|c(x + u)|^2 = E|c(x)|^2 (1 - 2 kappa + growth^2)``: a stream can revert and still grow. kappa is the slope
of a cross-section of tokens at one depth: no panel, no fixed effects, no error in x, so none of their biases. For an
Ornstein-Uhlenbeck stream, ``u = -kappa (x - mu) + noise``, it is the kappa of that equation.

**A slope may be nothing.** Four nulls have updates of the same size in other directions. *rotated*: turned by random
rotations. *token_shuffled*: those of another token at the same place. *order_shuffled*: the layers run in random order.
*untrained*: the same architecture with fresh weights. The claim is the excess over the first two.

**A slope is not a force.** A layer that writes against x because it read something correlated with x pushes nothing
back. So the stream is displaced by ``d`` at one token, and what the layer then does differently there decides:

    kappa_causal = -E<d, f(x + d) - f(x)> / E|d|^2

``d`` points to another prompt's token at that place (*difference*), anywhere (*random*) or along a top principal
component (*principal*), see ``surgery.displacement``. For a layer that treats every token alone and linearly,
differences repeat the slope by algebra; random directions are what tells a force from a correlate that is kept
elsewhere in the same stream.

Compare with ``surgery.calibration``: writing into fresh subspaces reads 0, in parallel as in series. All of it is
measured on the weights as loaded (folding or centring weights changes kappa). Layer 0 starts from the bare embedding,
which is small in many models: there kappa and growth say little.

Source: these are our definitions, after G. Uhlenbeck and L. Ornstein (1930) and the balance of fluctuation and
dissipation in their process. Without centring, ``kappa / growth`` is minus the cosine of R. Csordas et al. (2025,
arXiv 2505.13898).

>>> from surgery import Stack, calibration, reversion
>>> frame = reversion.layers(Stack(calibration.parallel_network()), calibration.tokens(), nulls=False, causal=False)
>>> bool((frame.kappa.abs() < 1e-6).all())
True
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.displacement import KINDS, responses
from surgery.ensemble import Ensemble, exchanged, partners
from surgery.stack import Stack
from surgery.stats import RESAMPLES, Moments, columns, ratio, rotation, weights
from surgery.tokens import Tokens

Stream = Float[Tensor, "prompt pos d_model"]
Resampled = Float[Tensor, " resample"]

ROTATIONS = 4  # each serves for hundreds, see _rotated
NEGLIGIBLE = 1e-12  # a variance below this share of the second moment is the rounding of float64, not a variance


def layers(
    stack: Stack,
    tokens: Tokens | Int[Tensor, "prompt pos"],
    *,
    skip_first: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
    batch_size: int = 64,
    draws: int = 4,
    size: float = 0.1,
    nulls: bool = True,
    causal: bool = True,
    untrained: Stack | None = None,
    progress: bool = False,
) -> pandas.DataFrame:
    """One row per layer: how far it reverts the stream to its mean, beside its nulls, and whether that is a force.

    ============================  =====================================================================================
    ``kappa psi growth``          as above
    ``variance_ratio_next``       variance of the stream that leaves over that which enters, ``1 - 2 kappa + growth^2``
    ``half_life``                 layers like this until half of a deviation is gone; NaN unless 0 < kappa < 1
    ``regime``                    in a word, see ``regime``
    ``kappa_<null>``              of the four nulls, at equal size: times ``growth / growth_<null>`` where they differ
    ``growth_<null>``             in ``order_shuffled`` and ``untrained``, where they do
    ``kappa_excess_<null>``       kappa - kappa_<null>
    ``kappa_excess``              the claim: the smaller excess of ``rotated`` and ``token_shuffled``, and the smaller
                                  of each end of their intervals, so that above 0 is above both
    ``kappa_causal_<kind>``       ``difference``, ``random``, ``principal``, with live normalisation
    ``kappa_causal_<kind>_frozen``  with the norms' denominators kept at the clean run's; absent if they cannot be
    ``restoring``                 ``yes``, ``no`` or ``undecided``, see ``restoring``
    ``n_prompts``                 the units of resampling
    ============================  =====================================================================================

    Every number has ``_low`` and ``_high``, the 95 % interval over resampled prompts and, pooled, over whatever was
    drawn: a null's interval is where one random draw may fall. One prompt has no interval (NaN).

    ``size`` is the length of a displacement as a fraction of n(x); a force shows at several sizes. ``draws`` is the
    number of layer orders, of displaced tokens of each prompt and kind, and of principal components. Partners, for
    shuffling and for differences, come from the same batch.

    Cost: 1 F; nulls 1 + ``draws`` F, and 1 F of ``untrained``; causal 3 + 6 ``draws`` F. By default 33 F in all.
    Memory: one batch's stream, and for each layer 10 vectors a prompt and a d_model x d_model matrix.

    Raises ValueError if no token is left to measure, if ``draws``, ``size`` or ``batch_size`` is not positive, if
    ``untrained`` has another shape, or if the stream is not finite.
    """
    ensemble = Ensemble(Tokens.of(tokens).to(stack.device), skip_first, batch_size, seed, progress)
    _check(stack, draws, size, untrained)
    n_prompts = len(ensemble.tokens)
    resampled = weights(n_prompts, resamples if n_prompts > 1 else 0, seed)
    rounding = torch.finfo(stack.dtype).eps
    steps = _steps(ensemble, stack, "reversion")
    drifts = [step.drift(resampled) for step in steps]
    rows = [_describe(layer, drift, rounding) for layer, drift in enumerate(drifts)]
    if nulls:
        measured = _exchanges(ensemble, stack, steps, resampled)
        measured["order_shuffled"] = _orders(ensemble, stack, draws, resampled)
        if untrained is not None:
            measured["untrained"] = [[step.drift(resampled)] for step in _steps(ensemble, untrained, "untrained")]
        for layer, drift in enumerate(drifts):
            rows[layer] |= _compare(drift, {null: found[layer] for null, found in measured.items()})
    if causal:
        lengths = [size * float(step.variance(resampled[:1]).sqrt()) for step in steps]
        found = responses(stack, ensemble, lengths, draws)
        for layer, row in enumerate(rows):
            for kind, response in found.items():
                row |= columns(f"kappa_causal_{kind}", 0 - response.slope(layer, resampled))
            row["restoring"] = restoring(row, rounding)
    return pandas.DataFrame(rows).assign(n_prompts=n_prompts)


@dataclass(frozen=True)
class Drift:
    """What a step does, under every row of prompt weights (row 0 is the estimate). NaN where nothing varies."""

    kappa: Resampled
    psi: Resampled
    growth: Resampled
    variance_ratio_next: Resampled


@dataclass(frozen=True)
class Step:
    """Per-prompt sums of one step ``x -> x + u`` over its tokens: all that ``drift`` needs, whatever the weights.

    >>> x = torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(0))
    >>> round(Step.of(x, -0.25 * (x - 3)).drift(weights(20)).kappa[0].item(), 6)
    0.25
    """

    count: Float[Tensor, " prompt"]
    sum_x: Float[Tensor, "prompt d_model"]
    sum_u: Float[Tensor, "prompt d_model"]
    xx: Float[Tensor, " prompt"]
    ux: Float[Tensor, " prompt"]
    uu: Float[Tensor, " prompt"]
    next: Float[Tensor, " prompt"]

    @classmethod
    def of(cls, x: Stream, u: Stream, mask: Bool[Tensor, "prompt pos"] | None = None) -> "Step":
        """The sums over the positions that ``mask`` keeps (all if not given), in float64."""
        x, u = x.double(), u.double()
        if mask is not None:  # what padding computes may be NaN, and 0 * NaN is NaN
            x, u = x.masked_fill(~mask.unsqueeze(-1), 0), u.masked_fill(~mask.unsqueeze(-1), 0)
        both = Moments.of(u, x, mask)
        xx, uu, after = (Moments.of(a, mask=mask).product for a in (x, u, x + u))
        return cls(both.count, both.sum_b, both.sum_a, xx, both.product, uu, after)

    @classmethod
    def concatenate(cls, parts: Sequence["Step"]) -> "Step":
        """The sums of several batches of prompts as one, prompts in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def drift(self, weights: Float[Tensor, "resample prompt"]) -> Drift:
        """kappa, psi, growth and the ratio of variances under every row of ``weights``."""
        x, u = self.variance(weights), self._variance(self.sum_u, self.uu, weights)
        kappa = ratio(0 - Moments(self.count, self.sum_u, self.sum_x, self.ux).covariance(weights), x)
        after = self._variance(self.sum_x + self.sum_u, self.next, weights)
        return Drift(kappa, ratio(2 * kappa * x, u), ratio(u, x).sqrt(), ratio(after, x))

    def variance(self, weights: Float[Tensor, "resample prompt"]) -> Resampled:
        """``E|c(x)|^2``; exactly 0 where it cannot be told from rounding."""
        return self._variance(self.sum_x, self.xx, weights)

    def _variance(self, total: Tensor, square: Tensor, weights: Tensor) -> Resampled:
        variance = Moments(self.count, total, total, square).covariance(weights)
        return torch.where(variance > NEGLIGIBLE * (weights @ square) / (weights @ self.count), variance, 0)


def half_life(kappa: float) -> float:
    """Layers of this kappa until half of a deviation is gone, ``ln 2 / -ln(1 - kappa)``; NaN unless ``0 < kappa < 1``.

    >>> half_life(0.5)
    1.0
    """
    return math.log(2) / -math.log1p(-kappa) if 0 < kappa < 1 else math.nan


def regime(kappa: float, low: float, high: float, growth: float, rounding: float = 0.0) -> str:
    """What the interval of kappa says, in a word; within ``rounding`` of 0 is 0.

    ``reverting`` above 0, ``overshooting`` above 1 (a deviation changes sign), ``growing`` below 0 (deviations are
    carried further out; the norm may grow in any regime), ``undecided`` otherwise, ``still`` if the update is the same
    for all tokens, ``undefined`` if the stream is.
    """
    if math.isnan(kappa):
        return "undefined"
    if growth == 0:
        return "still"
    if high < -rounding:
        return "growing"
    if low > 1:
        return "overshooting"
    return "reverting" if low > rounding else "undecided"


def restoring(row: dict, rounding: float = 0.0) -> str:
    """Whether a row of ``layers`` shows a restoring force: only where the slope and every kind of intervention say so.

    ``yes`` if the intervals of ``kappa_excess`` (of ``kappa``, without nulls) and of the three live causal kappas lie
    above 0: agreement in sign, the sizes are there to be read. ``no`` if kappa or a causal kappa lies at or below 0, or
    if a causal kappa's interval reaches 0 and stays below kappa's: moving the stream does not reproduce the slope.
    ``undecided`` otherwise.
    """
    slope = row.get("kappa_excess_low", row["kappa_low"])
    causal = [(row[f"kappa_causal_{kind}_low"], row[f"kappa_causal_{kind}_high"]) for kind in KINDS]
    if row["kappa_high"] <= rounding or any(high <= rounding for _, high in causal):
        return "no"
    if slope > rounding and all(low > rounding for low, _ in causal):
        return "yes"
    return "no" if any(low <= rounding and high < row["kappa_low"] for low, high in causal) else "undecided"


def _check(stack: Stack, draws: int, size: float, untrained: Stack | None) -> None:
    if draws < 1 or size <= 0:
        raise ValueError(f"draws and size must be positive, got draws={draws}, size={size}")
    if untrained is not None and (untrained.n_layers, untrained.d_vocab) != (stack.n_layers, stack.d_vocab):
        raise ValueError(
            f"untrained has {untrained.n_layers} layers and {untrained.d_vocab} tokens, the model {stack.n_layers} and "
            f"{stack.d_vocab}: give the same architecture with fresh weights"
        )


def _steps(ensemble: Ensemble, stack: Stack, label: str, order: Sequence[int] | None = None) -> list[Step]:
    """Each layer's step, wherever in the order it ran. Cost: 1 F."""
    parts: list[list[Step]] = [[] for _ in range(stack.n_layers)]
    for visit in ensemble.visits(stack, label, order):
        parts[visit.layer].append(Step.of(visit.x, visit.u, visit.mask))
    return [Step.concatenate(part) for part in parts]


def _exchanges(ensemble: Ensemble, stack: Stack, steps: list[Step], resampled: Tensor) -> dict[str, list[list[Drift]]]:
    """The nulls that keep every layer's stream and updates but not which goes with which. Cost: 1 F."""
    generator = np.random.default_rng((ensemble.seed, 1))
    normal = torch.from_numpy(generator.standard_normal((ROTATIONS, stack.d_model, stack.d_model)))
    rotations = [rotation(noise) for noise in normal]
    shuffled: list[list[Step]] = [[] for _ in steps]
    paired: list[list[Tensor]] = [[] for _ in steps]
    for visit in ensemble.visits(stack, "rotated and shuffled updates"):
        prompt = visit.mask.nonzero()[:, 0]
        x, u = visit.x[visit.mask].double(), visit.u[visit.mask].double()
        other = exchanged(visit.u, visit.mask, partners(visit.mask, ensemble.generator(visit)))
        shuffled[visit.layer].append(Step.of(visit.x, other, visit.mask))
        sums = x.new_zeros(ROTATIONS, len(visit.mask), x.shape[1])
        for i, turn in enumerate(rotations):
            sums[i].index_add_(0, prompt, u @ turn.to(x).T * x)
        paired[visit.layer].append(sums.cpu())
    signs = torch.from_numpy(generator.choice([-1.0, 1.0], (len(resampled), stack.d_model)))
    rotated = [_rotated(step, rotations, torch.cat(sums, 1), resampled, signs) for step, sums in zip(steps, paired)]
    return {
        "rotated": [[replace(step.drift(resampled), kappa=kappa)] for step, kappa in zip(steps, rotated)],
        "token_shuffled": [[Step.concatenate(parts).drift(resampled)] for parts in shuffled],
    }


def _rotated(
    step: Step,
    rotations: list[Float[Tensor, "d_model d_model"]],
    paired: Float[Tensor, "rotation prompt d_model"],
    resampled: Float[Tensor, "resample prompt"],
    signs: Float[Tensor, "resample d_model"],
) -> Resampled:
    """kappa of rotated updates, every resample with a rotation of its own; row 0 is the mean over all of them.

    Random signs in front of a uniformly random rotation make another one, and signs can be drawn after the sums over
    tokens: ``<s R u, x> = sum_k s_k (R u)_k x_k``. So a few rotations serve for hundreds.
    """
    count = (resampled @ step.count).unsqueeze(-1)
    mean_x = resampled @ step.sum_x / count
    covariance = torch.stack(
        [
            resampled @ products / count - (resampled @ (step.sum_u @ turn.T) / count) * mean_x
            for turn, products in zip(rotations, paired, strict=True)
        ]
    )
    rows = torch.arange(len(resampled))
    values = (covariance[rows % len(rotations), rows] * signs).sum(-1)
    values[0] = (covariance[:, 0] @ signs.T).mean()
    return ratio(0 - values, step.variance(resampled))


def _orders(ensemble: Ensemble, stack: Stack, draws: int, resampled: Tensor) -> list[list[Drift]]:
    """Each layer's drift at the place where it ran in ``draws`` random orders of all layers. Cost: ``draws`` F."""
    generator = np.random.default_rng((ensemble.seed, 2))
    orders = [generator.permutation(stack.n_layers).tolist() for _ in range(draws)]
    runs = (_steps(ensemble, stack, "layers in random order", order) for order in orders)
    return [list(drifts) for drifts in zip(*([step.drift(resampled) for step in steps] for steps in runs))]


def _describe(layer: int, drift: Drift, rounding: float) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer}
    for field in fields(drift):
        row |= columns(field.name, getattr(drift, field.name))
    kappa, low, high = row["kappa"], row["kappa_low"], row["kappa_high"]
    row["half_life"] = half_life(kappa)
    defined = 0 < kappa < 1
    row["half_life_low"] = (0.0 if high >= 1 else half_life(high)) if defined else math.nan
    row["half_life_high"] = (math.inf if low <= 0 else half_life(low)) if defined else math.nan
    row["regime"] = regime(kappa, low, high, row["growth"], rounding)
    return row


def _compare(drift: Drift, nulls: dict[str, list[Drift]]) -> dict[str, float]:
    """The columns of the nulls; a null's interval, and that of the excess over it, pools all draws and resamples."""
    row: dict[str, float] = {}
    for name, draws in nulls.items():
        matched = torch.stack([null.kappa * ratio(drift.growth, null.growth) for null in draws])
        row |= columns(f"kappa_{name}", _pool(matched))
        row |= columns(f"kappa_excess_{name}", _pool(drift.kappa - matched))
        if name in ("order_shuffled", "untrained"):
            row |= columns(f"growth_{name}", _pool(torch.stack([null.growth for null in draws])))
    for end in ("", "_low", "_high"):
        over = row[f"kappa_excess_rotated{end}"], row[f"kappa_excess_token_shuffled{end}"]
        row[f"kappa_excess{end}"] = float(np.minimum(*over))
    return row


def _pool(values: Float[Tensor, "draw resample"]) -> Float[Tensor, " pooled"]:
    """All resamples of all draws as one sample, with the mean over draws as its estimate."""
    return torch.cat([values[:, :1].nanmean(0), values[:, 1:].flatten()])
