r"""Uncertainty for measures that are functions of second moments: one exact bootstrap over prompts for all of them.

Almost every measure of this package is a ratio of centred second moments over an ensemble of tokens,

    cov(a, b) = E<c(a), c(b)> = E<a, b> - <E a, E b>,      c(a) = a - E a,      n(c(a)) = sqrt(cov(a, a)),

and the independent unit is the prompt, never the token: tokens of one prompt share everything. A prompt enters such a
moment only through its count, two sum vectors and one sum of products, so a resampled data set is a vector of prompt
weights, and the moment is exact under any weights (the mean is re-estimated in every resample). ``Moments`` keeps those
sums; ``weights`` draws the resamples; row 0 of every result is the estimate itself, the other rows are the bootstrap.
``rotation`` is for nulls and for networks that prefer no direction.

No model code lives here. Source of the scheme: the cluster bootstrap (Cameron, Gelbach and Miller 2008), with prompts
as clusters; percentile intervals (Efron 1981).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import scipy.stats
import torch
from jaxtyping import Bool, Float
from torch import Tensor

RESAMPLES = 400


def weights(n_prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> Float[Tensor, "resample prompt"]:
    """Return the weight of each prompt in each resample; row 0 weighs every prompt 1 (the estimate itself).

    Rows sum to ``n_prompts``, but a resample draws fewer prompts, ``drawn(n_prompts)``, each of which then weighs more:
    drawing all makes percentile intervals of few prompts too narrow. One prompt has no resamples, and so no interval.

    >>> weights(3, resamples=2)[0].tolist()
    [1.0, 1.0, 1.0]
    >>> weights(1).shape[0]
    1
    """
    if n_prompts < 1:
        raise ValueError("there is no prompt to resample")
    generator, count = np.random.default_rng(seed), drawn(n_prompts)
    size = resamples if n_prompts > 1 else 0
    draws = generator.multinomial(count, np.full(n_prompts, 1 / n_prompts), size=size) * (n_prompts / count)
    return torch.from_numpy(np.vstack([np.ones(n_prompts), draws]))


def drawn(n_prompts: int) -> int:
    """Return how many prompts a resample draws so that a percentile interval is as wide as Student's t makes it.

    The bootstrap of a mean has variance ``s^2 (n - 1) / n / m`` for m draws of n, where a t interval takes ``s^2 / n``
    and a quantile that is larger than the normal one. So ``m = (n - 1) (z / t)^2``: 1 for 2 or 3 prompts, 13 for 16,
    61 for 64; the same correction as expanding the percentiles (Hesterberg 2015, arXiv 1411.5279).

    >>> [drawn(n) for n in (2, 5, 16, 64, 256)]
    [1, 2, 13, 61, 253]
    """
    if n_prompts < 2:
        return 1
    z, t = scipy.stats.norm.ppf(0.975), scipy.stats.t.ppf(0.975, n_prompts - 1)
    return max(1, round((n_prompts - 1) * (z / t) ** 2))


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
        """Sum ``a`` and ``b`` (``a`` if not given) over the positions that ``mask`` keeps (all if not given)."""
        keep = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device) if mask is None else mask
        tokens, prompts = keep.flatten().nonzero()[:, 0], keep.nonzero()[:, 0]

        def kept(x: Tensor) -> Tensor:  # first what counts, then the wide format: it is what takes the time
            return x.flatten(0, 1).index_select(0, tokens).double()

        def by_prompt(values: Tensor) -> Tensor:
            return values.new_zeros(len(keep), *values.shape[1:]).index_add_(0, prompts, values).cpu()

        left = kept(a)
        right = left if b is None else kept(b)
        sum_a = by_prompt(left)
        return cls(
            count=keep.sum(1).double().cpu(),
            sum_a=sum_a,
            sum_b=sum_a if b is None else by_prompt(right),
            product=by_prompt(torch.linalg.vecdot(left, right)),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Moments"]) -> "Moments":
        """Join the moments of several batches of prompts, in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def covariance(self, weights: Float[Tensor, "resample prompt"]) -> Float[Tensor, " resample"]:
        """Return ``E<c(a), c(b)>`` under every row of ``weights``, with the means re-estimated in each."""
        count = weights @ self.count
        total_a = weights @ self.sum_a
        total_b = total_a if self.sum_b is self.sum_a else weights @ self.sum_b
        return weights @ self.product / count - (total_a * total_b).sum(-1) / count**2

    def norm(self, weights: Float[Tensor, "resample prompt"]) -> Float[Tensor, " resample"]:
        """Return ``n(c(a))``, the root mean square of the centred ensemble, for moments of ``a`` with itself."""
        return self.covariance(weights).clamp(min=0).sqrt()


def rotation(noise: Float[Tensor, "d_model d_model"]) -> Float[Tensor, "d_model d_model"]:
    """Return a random orthogonal matrix, uniform over all of them (Haar), made of independent standard normal numbers.

    QR alone is not uniform: it comes with conventions of its own about signs (Mezzadri 2007, arXiv math-ph/0609050).
    """
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()


def rotations(count: int, width: int, generator: np.random.Generator) -> list[Float[Tensor, "width width"]]:
    """Return ``count`` random rotations of a space of ``width`` dimensions (``rotation``), in float64."""
    return [rotation(torch.from_numpy(generator.standard_normal((width, width)))) for _ in range(count)]


def pool(draws: Sequence[Float[Tensor, "_ ..."]]) -> Float[Tensor, "pooled ..."]:
    """Join the resamples of several random draws into one sample; its estimate (row 0) is the mean over draws.

    >>> pool([torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3.0, 5.0])]).tolist()
    [2.0, 0.0, 2.0, 5.0]
    """
    estimate = torch.stack([values[0] for values in draws]).nanmean(0, keepdim=True)
    return torch.cat([estimate, *(values[1:] for values in draws)])


def interval(values: Float[Tensor, " resample"], level: float = 0.95) -> tuple[float, float, float]:
    """Return the estimate (row 0) and the percentile interval of the other rows.

    Where more than one resample of ten is undefined, so is the interval (NaN): the others are not a fair sample.

    >>> interval(torch.tensor([2.0, 1.0, 2.0, 3.0]), level=0.5)
    (2.0, 1.5, 2.5)
    >>> interval(torch.tensor([2.0, 1.0, torch.nan, 3.0]))
    (2.0, nan, nan)
    """
    estimate, low, high = intervals(values.unsqueeze(1), level)
    return float(estimate[0]), float(low[0]), float(high[0])


def intervals(values: Float[Tensor, "resample measure"], level: float = 0.95) -> Float[np.ndarray, "3 measure"]:
    """Return the ``interval`` of every column: estimates, lower and upper ends.

    >>> intervals(torch.tensor([[2.0, 0.0], [1.0, 4.0], [2.0, torch.inf], [3.0, 4.0]]), level=0.5).tolist()
    [[2.0, 0.0], [1.5, nan], [2.5, nan]]
    """
    of_all = values.double().cpu().numpy()
    rest, ends = of_all[1:], ((1 - level) / 2, (1 + level) / 2)
    found = np.full((3, of_all.shape[1]), np.nan)
    found[0] = of_all[0]
    defined = np.isfinite(rest)
    if len(rest):
        whole = defined.all(0)
        found[1:, whole] = np.quantile(rest[:, whole], ends, axis=0)
        for column in np.flatnonzero(~whole & (defined.mean(0) >= 0.9)):
            found[1:, column] = np.quantile(rest[defined[:, column], column], ends)
    return found


def columns(name: str, values: Float[Tensor, " resample"]) -> dict[str, float]:
    """Return the ``interval`` of a measure as columns of a table row: ``name``, ``name_low``, ``name_high``."""
    return measure_columns({name: values})


def measure_columns(measures: Mapping[str, Float[Tensor, " resample"]]) -> dict[str, float]:
    """Return the ``interval`` of several measures as columns of one row of a table, quantiles of all at once.

    >>> list(measure_columns({"R": torch.ones(3), "N": torch.ones(3)}))
    ['R', 'R_low', 'R_high', 'N', 'N_low', 'N_high']
    """
    by_length: dict[int, list[str]] = {}
    for name, values in measures.items():
        by_length.setdefault(len(values), []).append(name)
    found = {
        name: ends
        for names in by_length.values()
        for name, ends in zip(names, intervals(torch.stack([measures[name] for name in names], 1)).T, strict=True)
    }
    return {f"{name}{end}": float(found[name][i]) for name in measures for i, end in enumerate(("", "_low", "_high"))}


def described(meanings: Mapping[str, str], over: str = "prompts") -> dict[str, str]:
    """Return what the ``columns`` of several measures mean: each measure, and the ends of its interval.

    >>> list(described({"T": "total effect"}))
    ['T', 'T_low', 'T_high']
    """
    documented = {}
    for name, meaning in meanings.items():
        documented[name] = meaning
        documented[f"{name}_low"] = f"lower end of the 95 % interval of {name} (bootstrap over {over})"
        documented[f"{name}_high"] = f"upper end of the 95 % interval of {name}"
    return documented


def ratio(a: Float[Tensor, "*resample"], b: Float[Tensor, "*resample"]) -> Float[Tensor, "*resample"]:
    """Return ``a / b``; NaN where ``b``, a variance or a size, is 0: where nothing varies, the ratio is undefined."""
    return torch.where(b > 0, a / b, torch.nan)


def t_interval(values: Sequence[float] | Float[np.ndarray, " seed"]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval by Student's t, for a handful of seeds; one value has no interval (NaN).

    >>> [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def verdict(low: float, high: float, above: str, below: str) -> str:
    """Return what a ``t_interval`` of paired differences says, in a word: ``undecided`` where it holds 0.

    >>> verdict(0.1, 0.3, "helps", "harms"), verdict(-0.1, 0.3, "helps", "harms")
    ('helps', 'undecided')
    """
    if np.isnan(low):
        return "one seed tells nothing"
    return above if low > 0 else below if high < 0 else "undecided"
