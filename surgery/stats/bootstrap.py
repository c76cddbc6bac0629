r"""Uncertainty for measures that are functions of second moments: one exact bootstrap over prompts for all of them.

Almost every measure of this package is a ratio of centred second moments over an ensemble of tokens,

    cov(a, b) = E<c(a), c(b)> = E<a, b> - <E a, E b>,      c(a) = a - E a,      n(c(a)) = sqrt(cov(a, a)),

and the independent unit is the prompt, never the token: tokens of one prompt share everything. A prompt enters such a
moment only through its count, two sum vectors and one sum of products, so a resampled data set is a vector of prompt
weights, and the moment is exact under any weights (the mean is re-estimated in every resample). ``Moments`` keeps those
sums; ``weights`` draws the resamples; row 0 of every result is the estimate itself, the other rows are the bootstrap.
``rotation`` is for nulls and for networks that prefer no direction; ``sign_flips`` is the null of paired differences.

No model code lives here. Source of the scheme: the cluster bootstrap (Cameron, Gelbach and Miller 2008), with prompts
as clusters; percentile intervals (Efron 1981); the sign-flip test (Fisher 1935).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RESAMPLES = 400
FLIPS = 2000
_AT_ONCE = 2**24  # numbers held per step: resamples times columns


def weights(n_prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> Float[Tensor, "resample prompt"]:
    """How often each prompt is drawn in each resample; row 0 draws every prompt once (the estimate itself).

    >>> weights(3, resamples=2)[0].tolist()
    [1.0, 1.0, 1.0]
    """
    if n_prompts < 1:
        raise ValueError("there is no prompt to resample")
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=resamples)
    return torch.from_numpy(np.vstack([np.ones(n_prompts), draws]))


@dataclass(frozen=True)
class Moments:
    """Per-prompt sums over tokens from which ``cov(a, b)`` follows under any prompt weights. All in float64."""

    count: Float[Tensor, " prompt"]
    sum_a: Float[Tensor, "prompt d_model"]
    sum_b: Float[Tensor, "prompt d_model"]
    product: Float[Tensor, " prompt"]

    @classmethod
    def of(
        cls,
        a: Float[Tensor, "prompt pos d_model"],
        b: Float[Tensor, "prompt pos d_model"] | None = None,
        mask: Bool[Tensor, "prompt pos"] | None = None,
    ) -> "Moments":
        """Sums of ``a`` and ``b`` (``a`` if not given) over the positions that ``mask`` keeps (all if not given)."""
        keep = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device) if mask is None else mask
        weight = keep.unsqueeze(-1).double()
        left = a.double() * weight
        right = left if b is None else b.double() * weight
        sum_a = left.sum(1).cpu()
        return cls(
            count=keep.sum(1).double().cpu(),
            sum_a=sum_a,
            sum_b=sum_a if b is None else right.sum(1).cpu(),
            product=(left * right).sum((1, 2)).cpu(),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Moments"]) -> "Moments":
        """The moments of several batches of prompts as one, prompts in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def covariance(self, weights: Float[Tensor, "resample prompt"]) -> Float[Tensor, " resample"]:
        """``E<c(a), c(b)>`` under every row of ``weights``, the means re-estimated in each."""
        count = weights @ self.count
        total_a = weights @ self.sum_a
        total_b = total_a if self.sum_b is self.sum_a else weights @ self.sum_b
        return weights @ self.product / count - (total_a * total_b).sum(-1) / count**2

    def norm(self, weights: Float[Tensor, "resample prompt"]) -> Float[Tensor, " resample"]:
        """``n(c(a))``, the root mean square of the centred ensemble, for moments of ``a`` with itself."""
        return self.covariance(weights).clamp(min=0).sqrt()


def rotation(noise: Float[Tensor, "d_model d_model"]) -> Float[Tensor, "d_model d_model"]:
    """A random orthogonal matrix, uniform over all of them (Haar), out of independent standard normal numbers.

    QR alone is not uniform: it comes with conventions of its own about signs (Mezzadri 2007, arXiv math-ph/0609050).
    """
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()


def interval(values: Float[Tensor, " resample"], level: float = 0.95) -> tuple[float, float, float]:
    """Estimate (row 0) and the percentile interval of the other rows; undefined resamples (NaN) are left out.

    >>> interval(torch.tensor([2.0, 1.0, 2.0, 3.0]), level=0.5)
    (2.0, 1.5, 2.5)
    """
    estimate, rest = float(values[0]), values[1:].double().cpu().numpy()
    rest = rest[np.isfinite(rest)]
    if not len(rest):
        return estimate, float("nan"), float("nan")
    low, high = np.quantile(rest, [(1 - level) / 2, (1 + level) / 2])
    return estimate, float(low), float(high)


def columns(name: str, values: Float[Tensor, " resample"]) -> dict[str, float]:
    """The ``interval`` of a measure as it stands in a row of a table: ``name``, ``name_low``, ``name_high``."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval(values), strict=True))


def described(meanings: Mapping[str, str], over: str = "prompts") -> dict[str, str]:
    """What the ``columns`` of several measures hold: each with its meaning, and the ends of its interval.

    >>> list(described({"T": "total effect"}))
    ['T', 'T_low', 'T_high']
    """
    found = {}
    for name, meaning in meanings.items():
        found[name] = meaning
        found[f"{name}_low"] = f"lower end of the 95 % interval of {name} (bootstrap over {over})"
        found[f"{name}_high"] = f"upper end of the 95 % interval of {name}"
    return found


class Scatter:
    """Mean and covariance of rows that come in chunks, in float64. Memory: at most four matrices.

    Put together as Chan, Golub and LeVeque (1983) do, so that a mean much larger than the spread costs no digits.

    >>> scatter = Scatter()
    >>> for chunk in ([[1e9, 0.0]], [[1e9 + 2, 1.0], [1e9 + 4, 2.0]]):
    ...     scatter.add(torch.tensor(chunk, dtype=torch.float64))
    >>> scatter.count, (3 * scatter.covariance).tolist()
    (3, [[8.0, 4.0], [4.0, 2.0]])
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Float[Tensor, "row d_model"]) -> None:
        """One or more rows."""
        rows = rows.double()
        mean = rows.mean(0)
        if not self.count:
            self.mean, self.products = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        centred, new, share = rows - mean, mean - self.mean, len(rows) / (self.count + len(rows))
        self.products += centred.T @ centred + torch.outer(new, new) * (self.count * share)
        self.mean += new * share
        self.count += len(rows)

    @property
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        return self.products / self.count


def ratio(a: Float[Tensor, " resample"], b: Float[Tensor, " resample"]) -> Float[Tensor, " resample"]:
    """``a / b``; NaN where ``b``, a variance or a size, is 0: nothing varies there, and nothing can be said."""
    return torch.where(b > 0, a / b, torch.nan)


def t_interval(values: Sequence[float] | Float[np.ndarray, " seed"]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t, for a handful of seeds; of one value there is no interval (NaN).

    >>> [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def verdict(low: float, high: float, above: str, below: str) -> str:
    """What a ``t_interval`` of paired differences says: one word, ``undecided`` where it holds 0.

    >>> verdict(0.1, 0.3, "helps", "harms"), verdict(-0.1, 0.3, "helps", "harms")
    ('helps', 'undecided')
    """
    if np.isnan(low):
        return "one seed tells nothing"
    return above if low > 0 else below if high < 0 else "undecided"


def signs(n_prompts: int, resamples: int = FLIPS, seed: int = 0) -> Float[np.ndarray, "flip prompt"]:
    """A sign for every prompt, ``resamples`` times; each way to give them once where there are no more than that.

    >>> signs(2).tolist()
    [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]
    """
    if 2**n_prompts <= resamples:
        return 1.0 - 2.0 * (np.arange(2**n_prompts)[:, None] >> np.arange(n_prompts) & 1)
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, n_prompts))


def sign_flips(
    d: Float[np.ndarray, "prompt column"], flips: Float[np.ndarray, "flip prompt"]
) -> tuple[Float[np.ndarray, " column"], Int[np.ndarray, " column"], Float[np.ndarray, " flip"]]:
    """|z| of every column (NaN if not measured), how many ``flips`` reach it, and the largest |z| of every flip.

    ``d`` are paired differences, NaN where not measured: if there is no effect, d and -d are as likely. A prompt is
    flipped in all columns at once (``signs``), so that what they share stays shared. ``z = sum(d) / sqrt(sum(d^2))``
    orders as Student's t does, and its denominator does not change under flips. ``p_value`` of the count is each
    column's own; compared with the largest of every flip, |z| is judged family-wise (Westfall and Young 1993).

    >>> flips = signs(3)
    >>> z, reached, largest = sign_flips(np.array([[1.0], [2.0], [3.0]]), flips)
    >>> p_value(reached, flips).tolist()  # two of eight: as it is, and all turned
    [0.25]
    """
    scaled = standardised(d)
    z = np.abs(scaled.sum(0))
    reached, largest = [], np.zeros(len(flips))
    for some in chunks(scaled, len(flips)):
        null = np.abs(flips @ some)
        reached.append((null >= np.abs(some.sum(0)) - 1e-9).sum(0))
        largest = np.maximum(largest, null.max(1))
    return np.where(np.isfinite(d).any(0), z, np.nan), np.concatenate(reached), largest


def p_value(reached: Int[np.ndarray, " row"], flips: Float[np.ndarray, "flip prompt"]) -> Float[np.ndarray, " row"]:
    """Two-sided p of what ``reached`` of the ``flips`` (of ``signs``) reach: exact if these are all there are."""
    extra = 0 if len(flips) == 2 ** flips.shape[1] else 1  # the data as they are count as one of the flips
    return (reached + extra) / (len(flips) + extra)


def standardised(d: Float[np.ndarray, "prompt column"]) -> Float[np.ndarray, "prompt column"]:
    """``d / sqrt(sum(d^2))``, whose sum is z; 0 where not measured and in columns that are 0 throughout."""
    size = np.sqrt(np.nansum(d**2, axis=0))
    return np.nan_to_num(d) / np.where(size > 0, size, 1)


def chunks(values: np.ndarray, rows: int) -> list[np.ndarray]:
    """Columns in parts small enough that ``rows`` results for each fit into memory together."""
    size = max(1, _AT_ONCE // rows)
    return [values[:, first : first + size] for first in range(0, values.shape[1], size)]
