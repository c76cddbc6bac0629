r"""In which directions does a layer take deviations back? Its drift as a matrix, by ridge regression.

kappa (``surgery.stats.drift``) is one number per layer: a direction that reverts and one that grows cancel in it. In
the top principal components ``V`` of the stream that enters the layer, ``z = V c(x)``, the drift is a matrix ``K``,

    V c(u) = -K z + what is not linear,        z after the layer = (I - K) z + ...

and it is read in three ways, as they agree for a normal ``K`` only:

    decay    eigenvalues of (K + K') / 2: the part that a step takes back of a deviation along each of its orthogonal
             eigenvectors (half the loss of energy, to first order). Above 0 it reverts, below 0 it grows
    modulus  |eigenvalues of I - K|: what is left after many such steps. A non-normal K can have all of them below 1 and
             still let deviations grow on the way, which decay then shows as values below 0
    angle    of the same eigenvalues, in radians: by how much deviations turn at a step; pi is overshooting

**How much of it is noise.** With ``k`` directions and ``N`` tokens the eigenvalues of nothing but noise spread by
``sqrt(k / N)`` around 0, of both signs. So the same regression is made with every token's update exchanged for that of
another prompt's token at the same place (``surgery.instruments.ensemble.partners``). A direction counts as reverting or
growing only if its interval lies beyond the whole spread of that null, not only beyond that of its own rank
(``verdict``).

**Ridge.** The penalty is that of ``RIDGES`` (in units of the mean eigenvalue of ``E z z'``) which predicts held-out
prompts best; the same in every resample and in the null. It pulls ``K`` towards 0, so towards "nothing reverts".
``R2`` is measured on prompts that were not fitted on; ``V`` is taken from all prompts, without looking at any update.
A resample has fewer different prompts to learn from, so R2 falls in it: compare ``R2_low`` with ``R2_null_high``.

Compare with the architecture untrained: a linear map drawn at random reverts in half of the directions and grows in the
others, far beyond this null, which only says that the layer reads the stream. What training did is in the balance.
Compare with ``surgery.instruments.known_networks``: the parallel network, which writes where nothing was, has
``K = 0``; a layer ``u = -A (x - mu)`` has ``K = V A V'`` exactly. It is a slope and not yet a force:
``surgery.reversion.returns`` moves the stream.

Source: first-order vector autoregression by ridge regression, after G. Uhlenbeck and L. Ornstein (1930); that growth on
the way is read from the symmetric part: L. Trefethen and M. Embree (2005, Spectra and Pseudospectra). The regression
from sums, its null and its verdict are ours.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack, tokens = Stack(known_networks.parallel_network(n_layers=3)), known_networks.tokens(12, 6)
>>> frame = layers(stack, tokens, sampling=Sampling(resamples=40))
>>> sorted(set(frame.verdict))
['persists']
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.instruments.displacement import principal_components
from surgery.instruments.ensemble import Ensemble, Totals, exchange, partners
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import columns, described, measure_columns, pool, ratio, weights
from surgery.stats.drift import NEGLIGIBLE, Step
from surgery.stats.sampling import Sampling

RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in units of the mean eigenvalue
FOLDS = 5
PERSISTS = 0.05  # a decay smaller than this, either way, leaves half of a deviation for more than 13 layers

VERDICTS = ("reverts", "persists", "grows", "undecided")
COLUMNS = {
    "layer": "layer, counted from 0",
    "rank": "from the fastest: decay sorted downwards, modulus upwards; and the principal component of pc_kappa",
    "verdict": "reverts, persists, grows or undecided, of decay, see verdict",
    "angle": "of the eigenvalue of I - K that has this modulus, 0 to pi radians",
    "ridge": "the penalty chosen, in units of the mean eigenvalue of E z z'",
    "n_components": "k, the directions that the layer was read in",
    "n_units": "number of prompts, or of groups of prompts, the unit of resampling",
} | described(
    {
        "decay": "eigenvalue of the symmetric part of K: the part of a deviation along it that the layer takes back",
        "decay_null": "the same rank with updates of other tokens",
        "share": "share of the stream's variance along the direction of decay",
        "modulus": "modulus of an eigenvalue of I - K: what a step leaves of a deviation after many of them",
        "modulus_null": "the same rank with updates of other tokens",
        "pc_kappa": "diagonal of K: the part of a deviation along this principal component that the layer takes back",
        "pc_share": "share of the stream's variance along this principal component",
        "R2": "share of the variance of V u that -K z predicts on held-out prompts; the same in a layer's every row",
        "R2_null": "the same with updates of other tokens",
        "share_x": "share of the variance of the stream within the n_components directions",
        "share_u": "share of the variance of the update within them",
    }
)


def layers(
    stack: Stack,
    tokens: Tokens | Int[Tensor, "prompt pos"],
    *,
    components: int = 16,
    ridge: float | None = None,
    draws: int = 4,
    skip_massive: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure ``components`` directions of every layer (fewer if the stream has fewer), one row each: ``COLUMNS``.

    ``ridge`` is a penalty to use instead of the one chosen by cross-validation. The null is made of ``draws`` exchanges
    of updates; its interval pools them with the resampling. ``_low`` and ``_high`` are 95 % intervals over resampled
    prompts. A layer whose stream does not vary has one row, of NaN. Tokens of massive activations are left out, unless
    ``skip_massive`` is False (``surgery.instruments.ensemble``).

    Cost: 2 F, and 1 F to find massive activations. Memory: one batch's stream; a d_model x d_model matrix per layer;
    for each layer and unit of resampling 2 d_model + 2 (draws + 1) components^2 numbers.

    Raises ValueError if no token is left to measure, if ``components``, ``draws`` or ``batch_size`` is not positive, if
    ``ridge`` is negative, or if the stream is not finite.
    """
    if components < 1 or draws < 1 or (ridge is not None and ridge < 0):
        raise ValueError(
            f"components and draws must be positive and ridge 0 or more, got components={components}, draws={draws}, "
            f"ridge={ridge}"
        )
    ensemble = Ensemble.of(stack, tokens, sampling)
    if skip_massive:
        ensemble = ensemble.without_massive(stack)
    units = ensemble.n_units
    resampled = weights(units, sampling.resamples if units > 1 else 0, sampling.seed)
    steps, totals = _sums(stack, ensemble, principal_components(stack, ensemble, components), draws)
    rounding = torch.finfo(stack.dtype).eps
    rows: list[dict[str, Any]] = []
    for layer, step in enumerate(steps):
        sums = (
            Regression(*(totals[layer, draw, field.name] for field in fields(Regression))) for draw in range(draws + 1)
        )
        rows += _describe(layer, step, *sums, ridge=ridge, resampled=resampled, rounding=rounding)
    return pd.DataFrame(rows).assign(n_units=units)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Count for every layer how many directions revert, persist and grow, and how much of the stream varies along them.

    ``R2``, ``R2_low``, ``R2_null_high``, ``ridge`` as there; ``kappa``, the slope within the directions looked at, the
    mean of ``pc_kappa`` over the variance; then ``<verdict>`` and ``share_<verdict>`` for every verdict: the number of
    directions and their share of the variance of the whole stream.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack, tokens = Stack(known_networks.parallel_network(n_layers=2, width=3)), known_networks.tokens(12, 6)
    >>> frame = layers(stack, tokens, sampling=Sampling(resamples=40))
    >>> summary(frame)[list(VERDICTS)].values.tolist()
    [[0, 3, 0, 0], [0, 6, 0, 0]]
    """
    rows = []
    for layer, part in frame.groupby("layer"):
        row: dict[str, Any] = {"layer": layer}
        row |= {name: part[name].iloc[0] for name in ("R2", "R2_low", "R2_null_high", "ridge")}
        row["kappa"] = (part.pc_kappa * part.pc_share).sum(skipna=False) / part.pc_share.sum()
        row |= {verdict: int((part.verdict == verdict).sum()) for verdict in VERDICTS}
        row |= {f"share_{verdict}": part.share[part.verdict == verdict].sum() for verdict in VERDICTS}
        rows.append(row)
    return pd.DataFrame(rows)


def verdict(low: float, high: float, null_low: float, null_high: float, rounding: float = 0.0) -> str:
    """Return what the interval of a decay says; ``null_low`` and ``null_high`` are the ends of the null's at any rank.

    ``reverts`` if it lies above 0 and above the whole null, ``grows`` if below both, ``persists`` if neither and it
    lies within ``PERSISTS`` of 0, ``undecided`` otherwise.

    >>> verdict(0.2, 0.4, -0.1, 0.1), verdict(0.05, 0.4, -0.1, 0.1), verdict(-0.02, 0.03, -0.1, 0.1)
    ('reverts', 'undecided', 'persists')
    """
    if low > max(rounding, null_high):
        return "reverts"
    if high < min(-rounding, null_low):
        return "grows"
    return "persists" if max(-low, high) < PERSISTS else "undecided"


@dataclass(frozen=True)
class Regression:
    """Sums over tokens from which the regression of ``w = V u`` on ``z = V x`` follows, for each row; in float64."""

    count: Float[Tensor, " row"]
    z: Float[Tensor, "row k"]
    w: Float[Tensor, "row k"]
    zz: Float[Tensor, "row k k"]
    wz: Float[Tensor, "row k k"]
    ww: Float[Tensor, " row"]

    @classmethod
    def of(
        cls,
        z: Float[Tensor, "row pos k"],
        w: Float[Tensor, "row pos k"],
        mask: Bool[Tensor, "row pos"] | None = None,
    ) -> "Regression":
        """Sum every row over the positions that ``mask`` keeps (all if not given).

        >>> z = torch.randn(20, 5, 2, generator=torch.Generator().manual_seed(0))
        >>> sums = Regression.of(z, 7 - z @ torch.tensor([[0.5, 0.1], [0.2, -0.3]]))
        >>> sums.weighted(weights(20, 0)).drift(ridge=0.0)[0].round(decimals=5).tolist()
        [[0.5, 0.2], [0.1, -0.3]]
        """
        mask = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if mask is None else mask
        z, w = (a.double().masked_fill(~mask.unsqueeze(-1), 0) for a in (z, w))
        return cls(mask.sum(1).double(), z.sum(1), w.sum(1), z.mT @ z, w.mT @ z, (w * w).sum((1, 2)))

    def weighted(self, weights: Float[Tensor, "resample row"]) -> "Regression":
        """Return the sums of all rows together under each row of ``weights``."""
        return Regression(*(torch.tensordot(weights, getattr(self, field.name), 1) for field in fields(self)))

    def about(self, z: Float[Tensor, "row k"], w: Float[Tensor, "row k"]) -> "Regression":
        """Return the same sums of ``z`` and ``w`` less these values."""
        n = self.count.unsqueeze(-1)
        moved_z, moved_w = self.z - n * z, self.w - n * w
        return Regression(
            self.count,
            moved_z,
            moved_w,
            self.zz - _outer(self.z, z) - _outer(z, moved_z),
            self.wz - _outer(self.w, z) - _outer(w, moved_z),
            self.ww - ((self.w + moved_w) * w).sum(-1),
        )

    def means(self) -> tuple[Float[Tensor, "row k"], Float[Tensor, "row k"]]:
        """Return the means of ``z`` and ``w``; 0 without a token."""
        n = self.count.clamp(min=1).unsqueeze(-1)
        return self.z / n, self.w / n

    def covariance(self) -> Float[Tensor, "row k k"]:
        """Return the covariance of ``z``."""
        return self.about(*self.means()).zz / self.count[:, None, None]

    def drift(self, ridge: float) -> Float[Tensor, "row k k"]:
        """Return ``K``; the penalty is in units of the mean eigenvalue. It is 0 where ``z`` does not vary."""
        return self.drifts([ridge])[0]

    def drifts(self, ridges: Sequence[float]) -> list[Float[Tensor, "row k k"]]:
        """Return ``drift`` for several penalties."""
        centred = self.about(*self.means())
        values, vectors = torch.linalg.eigh(centred.zz)
        turned, mean = centred.wz @ vectors, values.mean(-1, keepdim=True)
        drifts = []
        for ridge in ridges:
            penalised = values + ridge * mean
            inverse = torch.where(penalised > NEGLIGIBLE * penalised[:, -1:], 1 / penalised, 0)
            drifts.append(0 - (turned * inverse.unsqueeze(-2)) @ vectors.mT)
        return drifts

    def held_out(
        self, weights: Float[Tensor, "resample row"], ridges: Sequence[float]
    ) -> Float[Tensor, "ridge resample"]:
        """Return the share of the variance of ``w`` predicted in each of ``FOLDS`` parts of the rows, from the others.

        NaN for a single row, where ``w`` does not vary, and in resamples with nothing to fit on.
        """
        fold = torch.arange(len(self.count)) % FOLDS
        errors, total = weights.new_zeros(len(ridges), len(weights)), weights.new_zeros(len(weights))
        for number in range(min(FOLDS, len(fold))):
            fitted, tested = (self.weighted(weights * part) for part in (fold != number, fold == number))
            tested = tested.about(*fitted.means())
            total += tested.ww.masked_fill((fitted.count == 0) & (tested.count > 0), torch.nan)
            for i, drift in enumerate(fitted.drifts(ridges)):
                errors[i] += tested.ww + ((2 * tested.wz + drift @ tested.zz) * drift).sum((-2, -1))
        return torch.stack([1 - ratio(error, total) for error in errors])


@dataclass(frozen=True)
class Spectrum:
    """The two sets of eigenvalues of a drift matrix, sorted from the fastest."""

    decay: Float[Tensor, "row k"]
    axes: Float[Tensor, "row k k"]  # the directions of decay, in columns
    modulus: Float[Tensor, "row k"]
    angle: Float[Tensor, "row k"]

    @classmethod
    def of(cls, drift: Float[Tensor, "row k k"]) -> "Spectrum":
        """Return both sets of eigenvalues of ``drift``; here deviations grow at first, and halve in the long run.

        >>> spectrum = Spectrum.of(torch.tensor([[[0.5, 3.0], [0.0, 0.5]]]))
        >>> spectrum.decay.tolist(), spectrum.modulus.tolist()
        ([[2.0, -1.0]], [[0.5, 0.5]])
        """
        decay, axes = torch.linalg.eigh((drift + drift.mT) / 2)
        left = torch.linalg.eigvals(torch.eye(drift.shape[-1], dtype=drift.dtype) - drift)
        modulus, order = left.abs().sort(-1)
        return cls(decay.flip(-1), axes.flip(-1), modulus, left.angle().abs().gather(-1, order))


def _outer(a: Float[Tensor, "row k"], b: Float[Tensor, "row k"]) -> Float[Tensor, "row k k"]:
    return einsum(a, b, "row i, row j -> row i j")


def _sums(stack: Stack, ensemble: Ensemble, bases: Sequence[Tensor], draws: int) -> tuple[list[Step], Totals]:
    """Sum every layer's step and ``Regression``, draw 0 with the model's updates, the others with exchanged. Cost: 1 F.

    ``z`` is counted from the mean over the first batch: sums of squares far from 0 would round away what is small.
    """
    steps = [Step.empty(ensemble.n_units, stack.d_model) for _ in range(stack.n_layers)]
    totals = Totals(ensemble.n_units)
    origin: dict[int, Tensor] = {}
    for visit in ensemble.visits(stack, "drift in principal components"):
        layer, mask = visit.layer, visit.mask
        steps[layer].add(visit.unit, visit.x, visit.u, mask)
        x, u = visit.x.double(), visit.u.double()
        basis = bases[layer].to(x)
        z, w = (x - origin.setdefault(layer, x[mask].mean(0))) @ basis.T, u @ basis.T
        for draw in range(draws + 1):
            answer = exchange(w, mask, partners(mask, ensemble.generator(visit, draw))) if draw else w
            sums = Regression.of(z, answer, mask)
            for field in fields(sums):
                totals.add((layer, draw, field.name), visit.unit, getattr(sums, field.name))
    return steps, totals


def _describe(
    layer: int,
    step: Step,
    model: Regression,
    *exchanges: Regression,
    ridge: float | None,
    resampled: Float[Tensor, "resample unit"],
    rounding: float,
) -> list[dict[str, Any]]:
    """Return the rows of one layer, with the null that ``exchanges`` of its updates make."""
    varies_x = step.variance(resampled)
    varies_u = varies_x * step.drift(resampled).growth ** 2
    if varies_x[0] == 0:
        return [dict.fromkeys(COLUMNS, math.nan) | {"layer": layer, "rank": 0, "verdict": "undecided"}]
    if ridge is None:
        ridge = RIDGES[int(model.held_out(resampled[:1], RIDGES).nan_to_num(-math.inf).argmax())]
    sums = model.weighted(resampled)
    drift, covariance = sums.drift(ridge), sums.covariance()
    share_u = ratio(sums.about(*sums.means()).ww / sums.count, varies_u)
    spectrum = Spectrum.of(drift)
    axes = spectrum.axes
    share = einsum(axes, covariance, axes, "row i rank, row i j, row j rank -> row rank")
    # every exchange serves for a part of the resamples, and all of them for the estimate
    parts = [torch.cat([resampled[:1], resampled[1 + i :: len(exchanges)]]) for i in range(len(exchanges))]
    nulls = [Spectrum.of(null.weighted(part).drift(ridge)) for null, part in zip(exchanges, parts, strict=True)]
    null_decay, null_modulus = (pool([getattr(null, name) for null in nulls]) for name in ("decay", "modulus"))
    null_R2 = pool([null.held_out(part, [ridge])[0] for null, part in zip(exchanges, parts, strict=True)])
    whole: dict[str, Any] = {"layer": layer, "ridge": ridge, "n_components": drift.shape[-1]}
    for name, values in {"R2": model.held_out(resampled, [ridge])[0], "R2_null": null_R2}.items():
        whole |= columns(name, values if share_u[0] > NEGLIGIBLE else torch.full_like(values, torch.nan))
    whole |= columns("share_x", ratio(covariance.diagonal(dim1=-2, dim2=-1).sum(-1), varies_x))
    whole |= columns("share_u", share_u)
    rows = []
    for rank in range(drift.shape[-1]):
        row = whole | {"rank": rank, "angle": float(spectrum.angle[0, rank])}
        row |= measure_columns(
            {
                "decay": spectrum.decay[:, rank],
                "decay_null": null_decay[:, rank],
                "modulus": spectrum.modulus[:, rank],
                "modulus_null": null_modulus[:, rank],
                "share": ratio(share[:, rank], varies_x),
                "pc_kappa": drift[:, rank, rank],
                "pc_share": ratio(covariance[:, rank, rank], varies_x),
            }
        )
        rows.append(row)
    null_low, null_high = rows[-1]["decay_null_low"], rows[0]["decay_null_high"]
    for row in rows:
        row["verdict"] = verdict(row["decay_low"], row["decay_high"], null_low, null_high, rounding)
    return rows
