r"""In which directions does a layer take deviations back? Its drift as a matrix, by ridge regression.

kappa (``surgery.stats.drift``) is one number per layer: a direction that reverts and one that grows cancel in it. In
the top principal components ``V`` of the stream that enters the layer, ``z = V c(x)``, the drift is a matrix ``K``,

    V c(u) = -K z + what is not linear,        z after the layer = (I - K) z + ...

and it is read in four ways, as they agree for a symmetric ``K`` only:

    decay    eigenvalues of (K + K') / 2: the part that a step takes back of a deviation along each of its orthogonal
             eigenvectors (half the loss of energy, to first order). Above 0 it reverts, below 0 it grows
    remaining   how long a deviation along that eigenvector is after the step, in all dimensions of the stream, beside
             before. A rotation has decay > 0 everywhere and remaining = 1: it turns deviations and takes none back
    modulus  |eigenvalues of I - K|: what is left after many such steps. A non-normal K can have all of them below 1 and
             still let deviations grow on the way, which decay then shows as values below 0
    angle    of the same eigenvalues, in radians: by how much deviations turn at a step; pi is overshooting

**How much of it is noise.** With ``k`` directions and ``N`` tokens the eigenvalues of nothing but noise spread by
``sqrt(k / N)`` around 0, of both signs. So the same regression is made with every token's update exchanged for that of
another prompt's token at the same place (``surgery.instruments.ensemble.partners``). A direction counts as reverting or
growing only if its interval lies beyond the whole spread of that null, not only beyond that of its own rank, if it is
shortened or lengthened by ``LEAST``, and if moving the stream along it shortens it, too (``verdict``).

**How much is what any map does.** A map drawn at random takes back half of the directions and carries the others
further, far beyond that null. So ``balance``, the mean decay of the directions looked at, is set against the same map
turned by random rotations: its mean is 0, its variance ``|K|^2 / (d_model k^2)``, ``|K|`` over all dimensions that
it writes to. Directions revert for a reason only where ``balance_excess`` is above 0.

**Ridge.** The penalty is that of ``RIDGES`` (in units of the mean eigenvalue of ``E z z'``) which predicts held-out
prompts best; the same in every resample and in the null. It pulls ``K`` towards 0, so towards "nothing reverts".
``R2`` is measured on prompts that were not fitted on; ``V`` is taken from all prompts, without looking at any update.
A resample has fewer different prompts to learn from, so R2 falls in it: compare ``R2_low`` with ``R2_null_high``.

Compare with the architecture untrained, which has nothing in the balance, and with
``surgery.instruments.known_networks``: the parallel network, which writes where nothing was, has ``K = 0``. A layer
``u = -A (x - mu)`` has ``K = V A V'`` exactly.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.instruments import massive
from surgery.instruments.displacement import Response, along, principal_components
from surgery.instruments.ensemble import Ensemble, Totals, exchange, partners
from surgery.instruments.memory import Memory
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.reversion.rules import WORDS, beyond, held
from surgery.stats.bootstrap import columns, described, measure_columns, pool, ratio, weights
from surgery.stats.drift import LEAST, NEGLIGIBLE, Step
from surgery.stats.sampling import Sampling

RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in units of the mean eigenvalue
FOLDS = 5
SIZE = 0.1  # of a displacement, beside the spread of the stream

VERDICTS = ("reverts", "slope", "turns", "persists", "grows", "undecided")
COLUMNS = {
    "layer": "layer, counted from 0",
    "rank": "from the fastest: decay sorted downwards, modulus upwards; and the principal component of pc_kappa",
    "verdict": "reverts, slope, turns, persists, grows or undecided, see verdict",
    "angle": "of the eigenvalue of I - K that has this modulus, 0 to pi radians",
    "ridge": "the penalty chosen, in units of the mean eigenvalue of E z z'",
    "n_components": "k, the directions that the layer was read in",
    "n_units": "number of prompts, or of groups of prompts, the unit of resampling",
    **massive.COLUMNS,
} | described(
    {
        "decay": "eigenvalue of the symmetric part of K: the part of a deviation along it that the layer takes back",
        "decay_null": "the same rank with updates of other tokens",
        "remaining": "length after the layer, beside before, of a deviation along it, by regression: a rotation is 1",
        "remaining_moved": "the same of the stream displaced along it; empty unless it reverts by regression",
        "share": "share of the stream's variance along the direction of decay",
        "modulus": "modulus of an eigenvalue of I - K: what a step leaves of a deviation after many of them",
        "modulus_null": "the same rank with updates of other tokens",
        "pc_kappa": "diagonal of K: the part of a deviation along this principal component that the layer takes back",
        "pc_share": "share of the stream's variance along this principal component",
        "R2": "share of the variance of V u that -K z predicts on held-out prompts; the same in a layer's every row",
        "R2_null": "the same with updates of other tokens",
        "balance": "mean of the layer's decays: what its directions revert minus what they grow",
        "balance_null": "of the same map turned by random rotations",
        "balance_excess": "balance minus that",
        "share_x": "share of the variance of the stream within the n_components directions",
        "share_u": "share of the variance of the update within them",
    }
)


@with_meanings(COLUMNS)
@in_smaller_batches
def layers(
    stack: Stack,
    tokens: Ensemble | Tokens | Int[Tensor, "prompt pos"],
    *,
    components: int = 16,
    ridge: float | None = None,
    draws: int = 4,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure ``components`` directions of every layer (fewer if the stream has fewer), one row each: ``COLUMNS``.

    ``ridge`` is a penalty to use instead of the one chosen by cross-validation. The null is made of ``draws`` exchanges
    of updates; its interval pools them with the resampling. ``_low`` and ``_high`` are 95 % intervals over resampled
    prompts. A layer whose stream does not vary has one row, of NaN. Tokens of massive activations are left out, unless
    ``sampling.skip_massive`` is False.

    Cost: 1 F, and 1 F to find massive activations; where directions revert by regression, as many F as the mean number
    of them a layer; 3 F more where the updates do not fit into ``memory.LIMIT``. Memory: one batch's stream; these
    updates; two d_model x d_model matrices per layer; for each layer and unit of resampling 2 d_model +
    2 (draws + 2) components^2 numbers.

    Raises ValueError if no token is left to measure, if ``components``, ``draws`` or ``batch_size`` is not positive, if
    ``ridge`` is negative, or if the stream is not finite.
    """
    if components < 1 or draws < 1 or (ridge is not None and ridge < 0):
        raise ValueError(
            f"components and draws must be positive and ridge 0 or more, got components={components}, draws={draws}, "
            f"ridge={ridge}"
        )
    ensemble = Ensemble.of(stack, tokens, sampling)
    ensemble = ensemble.remembering(ensemble.memory or Memory())  # of four walks the last three cost nothing
    units = ensemble.n_units
    resampled = weights(units, sampling.resamples, sampling.seed)
    bases = _bases(stack, ensemble, components)
    steps, totals = _sums(stack, ensemble, bases, draws)
    rounding = torch.finfo(stack.dtype).eps
    by_layer: list[list[dict[str, Any]]] = []
    axes, lengths = [], []
    for layer, step in enumerate(steps):
        elsewhere, *sums = (
            Regression(*(totals[layer, draw, field.name] for field in fields(Regression)))
            for draw in range(-1, draws + 1)
        )
        rows, directions = _describe(layer, step, elsewhere, *sums, ridge=ridge, resampled=resampled, rounding=rounding)
        by_layer.append([row | held(ensemble.concentration, [layer], [layer]) for row in rows])
        reverting = [row["rank"] for row in rows if row["verdict"] == "reverts"]
        axes.append(directions[:, reverting].T @ bases[layer][0].cpu())
        lengths.append(SIZE * float(step.variance(resampled[:1]).sqrt()))
    _move(by_layer, along(stack, ensemble, axes, lengths), resampled)
    frame = pd.DataFrame([row for rows in by_layer for row in rows]).assign(n_units=units, n_massive=ensemble.n_massive)
    return frame[[name for name in COLUMNS if name in frame]]


@with_meanings(COLUMNS)
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
    [[0, 0, 0, 3, 0, 0], [0, 0, 0, 6, 0, 0]]
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


def verdict(row: Mapping[str, Any], null_low: float, null_high: float, rounding: float = 0.0) -> str:
    """Return what a direction does, from its row; ``null_low`` and ``null_high`` are the null's ends at any rank.

    It ``reverts`` if the interval of its decay lies above the whole null and a deviation along it is shorter
    afterwards, both by ``LEAST`` or more, and ``turns`` if it surely is not shorter; where moving the stream along it
    does not shorten it, that is a ``slope`` and no more. It ``grows`` if the decay lies below the null, by as much. It
    ``persists`` if the decay lies within ``LEAST`` of 0, and is ``undecided`` otherwise.

    >>> row = {"decay": 0.3, "decay_low": 0.2, "decay_high": 0.4}
    >>> left = {"remaining": 0.7, "remaining_low": 0.6, "remaining_high": 0.8}
    >>> verdict(row | left, -0.1, 0.1), verdict(row | left, -0.1, 0.3)
    ('reverts', 'undecided')
    >>> verdict(row | dict.fromkeys(left, 1.0), -0.1, 0.1)
    'turns'
    """
    low, high = row["decay_low"], row["decay_high"]
    if low > max(LEAST - rounding, null_high):
        left = [name for name in ("remaining", "remaining_moved") if f"{name}_low" in row]
        words = [WORDS[beyond(row, name, origin=1, sign=-1).side()] for name in left]
        if "no" in words:
            return "turns" if words[0] == "no" else "slope"
        return "reverts" if set(words) == {"yes"} else "undecided"
    if high < min(rounding - LEAST, null_low):
        return "grows"
    return "persists" if max(-low, high) < LEAST else "undecided"


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

    def rows(self, chosen: Bool[Tensor, " row"]) -> "Regression":
        """Return the sums of some rows."""
        return Regression(*(getattr(self, field.name)[chosen] for field in fields(self)))

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
        """Return ``drift`` for several penalties: for one above 0 a linear system, else from the eigenvectors."""
        centred = self.about(*self.means())
        if len(ridges) == 1 and ridges[0] > 0:
            return [_penalised(centred.zz, centred.wz, ridges[0])]
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
            fitted, tested = (self.rows(part).weighted(weights[:, part]) for part in (fold != number, fold == number))
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


def _penalised(zz: Float[Tensor, "row k k"], wz: Float[Tensor, "row k k"], ridge: float) -> Float[Tensor, "row k k"]:
    """Return ``K`` for a penalty above 0, which leaves nothing singular; 0 where ``z`` does not vary."""
    mean = zz.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    penalty = torch.where(mean > 0, ridge * mean, 1) * torch.eye(zz.shape[-1]).to(zz)
    return torch.where(mean > 0, 0 - torch.linalg.solve_ex(zz + penalty, wz.mT).result.mT, 0)


def _bases(stack: Stack, ensemble: Ensemble, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return, for every layer, orthonormal rows: the top components of ``x``, and where else ``u`` follows these to.

    The latter are as many as the former, zero where fewer suffice. Cost: 2 F.
    """
    within = principal_components(stack, ensemble, count)
    ux = [torch.zeros(stack.d_model, len(inside), dtype=torch.float64) for inside in within]
    x_total, u_total = torch.zeros(2, stack.n_layers, stack.d_model, dtype=torch.float64)
    for visit in ensemble.visits(stack, "drift along principal components"):
        x, u = visit.x[visit.mask].double(), visit.u[visit.mask].double()
        ux[visit.layer] += (u.T @ (x @ within[visit.layer].to(x).T)).cpu()
        x_total[visit.layer] += x.sum(0).cpu()
        u_total[visit.layer] += u.sum(0).cpu()
    n = int(ensemble.mask.sum())
    bases = []
    for layer, inside in enumerate(within):
        slope = ux[layer] / n - u_total[layer].outer(inside @ x_total[layer]) / n**2
        left, sizes, _ = torch.linalg.svd(slope - inside.T @ (inside @ slope), full_matrices=False)
        outside = left.T * (sizes > 1e-9 * torch.linalg.matrix_norm(slope)).unsqueeze(-1)
        bases.append((inside, outside))
    return bases


def _sums(
    stack: Stack, ensemble: Ensemble, bases: Sequence[tuple[Tensor, Tensor]], draws: int
) -> tuple[list[Step], Totals]:
    """Sum every layer's step and ``Regression``: draw 0 with the model's updates, -1 with what they write elsewhere.

    The others with exchanged updates. ``z`` is counted from the mean over the first batch: sums of squares far from 0
    would round away what is small. Cost: 1 F.
    """
    steps = [Step.empty(ensemble.n_units, stack.d_model) for _ in range(stack.n_layers)]
    totals = Totals(ensemble.n_units)
    origin: dict[int, Tensor] = {}
    for visit in ensemble.visits(stack, "drift in principal components"):
        layer, mask = visit.layer, visit.mask
        steps[layer].add(visit.unit, visit.x, visit.u, mask)
        x, u = visit.x.double(), visit.u.double()
        inside, outside = (basis.to(x) for basis in bases[layer])
        z, w = (x - origin.setdefault(layer, x[mask].mean(0))) @ inside.T, u @ inside.T
        for draw in range(-1, draws + 1):
            answer = {-1: u @ outside.T, 0: w}.get(draw)
            if answer is None:
                answer = exchange(w, mask, partners(mask, ensemble.generator(visit, draw)))
            sums = Regression.of(z, answer, mask)
            for field in fields(sums):
                totals.add((layer, draw, field.name), visit.unit, getattr(sums, field.name))
    return steps, totals


def _move(by_layer: Sequence[Sequence[dict[str, Any]]], responses: Sequence[Response], resampled: Tensor) -> None:
    """Add what is left of displacements to the rows that revert by regression, and judge these again."""
    for layer, rows in enumerate(by_layer):
        reverting = [row for row in rows if row["verdict"] == "reverts"]
        for row, response in zip(reverting, responses, strict=False):
            row |= columns("remaining_moved", response.remaining(layer, resampled))
            row["verdict"] = verdict(row, -math.inf, 0.0)
    for row in (row for rows in by_layer for row in rows):
        for name in described({"remaining_moved": ""}):
            row.setdefault(name, math.nan)


def _describe(
    layer: int,
    step: Step,
    elsewhere: Regression,
    model: Regression,
    *exchanges: Regression,
    ridge: float | None,
    resampled: Float[Tensor, "resample unit"],
    rounding: float,
) -> tuple[list[dict[str, Any]], Float[Tensor, "k axis"]]:
    """Return the rows of one layer, with the null that ``exchanges`` of its updates make, and its axes.

    These are columns within the components.
    """
    varies_x = step.variance(resampled)
    varies_u = varies_x * step.drift(resampled).growth ** 2
    if varies_x[0] == 0:
        nothing = dict.fromkeys(COLUMNS, math.nan) | {"layer": layer, "rank": 0, "verdict": "undecided"}
        return [nothing], torch.zeros(model.z.shape[1], 0, dtype=torch.float64)
    if ridge is None:
        ridge = RIDGES[int(model.held_out(resampled[:1], RIDGES).nan_to_num(-math.inf).argmax())]
    sums = model.weighted(resampled)
    drift, covariance = sums.drift(ridge), sums.covariance()
    share_u = ratio(sums.about(*sums.means()).ww / sums.count, varies_u)
    spectrum = Spectrum.of(drift)
    axes, outside = spectrum.axes, elsewhere.weighted(resampled).drift(ridge)
    remaining = torch.cat([axes - drift @ axes, outside @ axes], 1).norm(dim=1)
    k = drift.shape[-1]
    balance = drift.diagonal(dim1=-2, dim2=-1).mean(-1)
    spread = torch.cat([drift, outside], 1).flatten(1).norm(dim=1) / (k * step.sum_x.shape[1] ** 0.5)
    turned = spread * torch.randn(len(spread), generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
    turned[0] = 0
    share = einsum(axes, covariance, axes, "row i rank, row i j, row j rank -> row rank")
    # every exchange serves for a part of the resamples, and all of them for the estimate
    parts = [torch.cat([resampled[:1], resampled[1 + i :: len(exchanges)]]) for i in range(len(exchanges))]
    nulls = [Spectrum.of(null.weighted(part).drift(ridge)) for null, part in zip(exchanges, parts, strict=True)]
    null_decay, null_modulus = (pool([getattr(null, name) for null in nulls]) for name in ("decay", "modulus"))
    null_R2 = pool([null.held_out(part, [ridge])[0] for null, part in zip(exchanges, parts, strict=True)])
    whole: dict[str, Any] = {"layer": layer, "ridge": ridge, "n_components": drift.shape[-1]}
    for name, values in {"R2": model.held_out(resampled, [ridge])[0], "R2_null": null_R2}.items():
        whole |= columns(name, values if share_u[0] > NEGLIGIBLE else torch.full_like(values, torch.nan))
    whole |= measure_columns({"balance": balance, "balance_null": turned, "balance_excess": balance - turned})
    whole |= columns("share_x", ratio(covariance.diagonal(dim1=-2, dim2=-1).sum(-1), varies_x))
    whole |= columns("share_u", share_u)
    rows = []
    for rank in range(drift.shape[-1]):
        row = whole | {"rank": rank, "angle": float(spectrum.angle[0, rank])}
        row |= measure_columns(
            {
                "decay": spectrum.decay[:, rank],
                "remaining": remaining[:, rank],
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
        row["verdict"] = verdict(row, null_low, null_high, rounding)
    return rows, axes[0]
