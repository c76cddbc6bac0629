r"""Is a wiring better than the unmodified model, or only the luckiest of thousands? From the table of a scan alone.

The unit is the prompt. Every wiring is compared with the unmodified model on the same prompts, d = value - baseline
(baseline - value for the metrics where less is better, so that a gain is always an improvement), and

* ``gain`` is the mean of d over prompts, with the percentile interval of a bootstrap over prompts;
* ``p`` is two-sided, from flipping the signs of d at random: if a wiring does nothing, d and -d are as likely;
* ``p_max`` asks the same of the largest of all wirings. The statistic is z = sum(d) / sqrt(sum(d²)), each wiring in
  units of its own spread (the denominator does not change under flips, and z orders as Student's t does), and a prompt
  is flipped in all wirings at once, so that what wirings share stays shared. Below .05: with that many wirings tried,
  and none with any effect, one in twenty scans would show so large a |z| anywhere (Westfall and Young 1993);
* ``q`` is the false discovery rate (Benjamini and Hochberg 1995) among the wirings that gain as much or more, or lose
  as much or more: gains and losses are two families, or else the many wirings that break a model would pay for the
  few that seem to help it. Benjamini-Hochberg and not Benjamini-Yekutieli, because the wirings of a scan share their
  baseline and most of their layers and so move together, the case in which the former is proven to hold (Benjamini and
  Yekutieli 2001), while the latter costs a factor of about ln m; what must hold under any dependence, reads ``p_max``.

Signs are flipped ``resamples`` times, so no p is below 1 / (resamples + 1); if there are no more than that many ways to
flip, each is taken once and p is exact. Intervals from fewer than some 20 prompts are too narrow, and are for one
wiring looked at by itself: the interval of the best of a scan does not know that it was chosen. ``winners`` measures
it again on probes that took no part in the choice.

Cells that were not measured (or are NaN) are left out of their wiring alone; ``n_prompts`` says how many remain. With
one prompt there is no interval (NaN) and p is 1; a wiring that changes nothing has gain 0, interval [0, 0], p = 1.

Control to compare with: ``expected_best``, what the best wiring would gain by luck. No model code lives here.

>>> import numpy as np
>>> noise = np.random.default_rng(0).normal(size=(3, 40))
>>> rows = [
...     {"wiring": wiring, "prompt": prompt, "group": "", "metric": "loglik", "value": shift + noise[place, prompt]}
...     for place, (wiring, shift) in enumerate([(":2 1:", 0.0), (":3 1:", 1.0), (":3 2:", 0.0)])
...     for prompt in range(40)
... ]
>>> gains = table(pd.DataFrame(rows).assign(baseline=0.0), "loglik")
>>> gains.loc[gains["p_max"] < 0.05, "wiring"].tolist()
[':3 1:']
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Float
from statsmodels.stats.multitest import multipletests

from surgery.stats.bootstrap import weights
from surgery.stats.permutation import FLIPS, chunks, p_value, sign_flips, signs, standardised

RESAMPLES = FLIPS
LESS_IS_BETTER = ("loss", "kl")
COLUMNS = {
    "wiring": "the order in which the layers ran",
    "group": "group of the probes, in a table by group",
    "gain": "mean over prompts of value - baseline (baseline - value for loss and kl): above 0 is better",
    "gain_low": "lower end of its 95 % interval, bootstrap over prompts",
    "gain_high": "upper end of its 95 % interval",
    "p": "two-sided, by sign flips, of this row by itself",
    "p_max": "two-sided, by sign flips, against the largest of all rows: family-wise",
    "q": "false discovery rate among the rows that gain (or lose) at least as clearly",
    "n_prompts": "how many prompts the row was measured on",
}


@dataclass(frozen=True)
class Luck:
    """What the best of ``wirings`` wirings would gain on ``prompts`` prompts if none had any effect, in units of gain.

    ``mean`` on average, ``high`` in all but the luckiest 5 % of scans. The ``worse`` wirings, clearly harmful, are left
    out of it; both are NaN where that is all of them.
    """

    wirings: int
    prompts: int
    worse: int
    mean: float
    high: float


def differences(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the improvement over the unmodified model: a row per prompt (``group``, ``prompt``), a column per wiring.

    Raises ValueError for a metric that the table does not hold, a cell measured twice, a prompt in two groups, and if
    nothing was measured.
    """
    missing = [name for name in ("wiring", "prompt", "group", "metric", "value", "baseline") if name not in frame]
    if missing:
        raise ValueError(f"this is no table of a scan: it has no column {', '.join(missing)}")
    known = [str(name) for name in frame["metric"].unique()]
    if metric not in known:
        raise ValueError(f"the scan holds no metric {metric!r}; it holds {', '.join(known) or 'no rows'}")
    rows = frame[frame["metric"] == metric]
    column, wirings = pd.factorize(rows["wiring"], use_na_sentinel=False)
    place, prompts = pd.factorize(rows["prompt"], sort=True, use_na_sentinel=False)
    if len(np.unique(place * len(wirings) + column)) < len(rows):
        row = rows[rows.duplicated(["wiring", "prompt"])].iloc[0]
        raise ValueError(f"{metric} of wiring {row['wiring']} on prompt {row['prompt']} is there twice, keep one row")
    group = rows["group"].fillna("").astype(str).to_numpy()
    group_of = group[np.unique(place, return_index=True)[1]]
    other = group != group_of[place]
    if other.any():
        raise ValueError(f"prompt {prompts[place[other].min()]} is in more than one group")
    better = rows["baseline"] - rows["value"] if metric in LESS_IS_BETTER else rows["value"] - rows["baseline"]
    d = np.full((len(prompts), len(wirings)), np.nan)
    d[place, column] = better
    d[~np.isfinite(d)] = np.nan
    if np.isnan(d).all():
        raise ValueError(f"no value of {metric} can be compared with its baseline, all are missing")
    index = pd.MultiIndex.from_arrays([group_of, prompts], names=["group", "prompt"])
    return pd.DataFrame(d, index=index, columns=pd.Index(wirings, name="wiring"))


def table(
    frame: pd.DataFrame, metric: str, resamples: int = RESAMPLES, seed: int = 0, *, by_group: bool = False
) -> pd.DataFrame:
    """Return a row per wiring, or per wiring and group, in the order of the scan: ``COLUMNS``.

    All wirings see the same resamples and the same flips. With ``by_group`` the family of ``p_max`` and ``q`` is all
    rows, of every group. Cost: no forward pass; some seconds for 3000 wirings on 300 prompts.
    """
    wide = differences(frame, metric)
    d, names, groups = wide.to_numpy(), wide.columns.astype(str), wide.index.get_level_values("group")
    families = groups.unique() if by_group else ["all"]
    flips = signs(len(d), resamples, seed)
    parts, largest = [], np.zeros(len(flips))
    for family in families:
        chosen = np.asarray(groups == family) if by_group else np.full(len(d), True)
        z, reached, highest = sign_flips(d[chosen], flips[:, chosen])
        parts.append((*_bootstrap(d[chosen], resamples, seed), np.isfinite(d[chosen]).sum(0), z, reached))
        largest = np.maximum(largest, highest)
    gain, low, high, n_prompts, z, reached = (
        rearrange(list(part), "group wiring -> (wiring group)") for part in zip(*parts, strict=True)
    )
    beyond = len(largest) - np.searchsorted(np.sort(largest), z - 1e-9)
    p, p_max = (np.where(np.isfinite(z), p_value(count, flips), np.nan) for count in (reached, beyond))
    rows = {
        "wiring": names.repeat(len(families)),
        "group": np.tile(families, len(names)),
        "gain": gain,
        "gain_low": low,
        "gain_high": high,
        "p": p,
        "p_max": p_max,
        "q": _discoveries(p, gain),
        "n_prompts": n_prompts,
    }
    return pd.DataFrame({name: rows[name] for name in COLUMNS if by_group or name != "group"})


def expected_best(frame: pd.DataFrame, metric: str, resamples: int = RESAMPLES, seed: int = 0) -> Luck:
    """Return the largest gain of a scan in which no wiring has an effect but each keeps its spread over prompts.

    Signs are flipped as for ``p_max``, of d less its mean, and the largest mean gain (not z) is kept. Wirings that are
    clearly worse than the unmodified model, z below -sqrt(2 ln ln n), could not have won by luck and would only bring
    their large spread into it, so they are left out (Hansen 2005, "A test for superior predictive ability").
    A gain in the units of the metric weighs wirings of large spread most; ``p_max`` weighs all alike.

    Raises ValueError if no wiring but the unmodified model was measured on two prompts or more.
    """
    wide = _without_baseline(differences(frame, metric))
    wide = wide.loc[:, wide.count() > 1]
    if wide.shape[1] == 0:
        raise ValueError("luck cannot be estimated: no wiring was measured on two prompts or more")
    d = wide.to_numpy()
    n = np.isfinite(d).sum(0)
    worse = standardised(d).sum(0) < -np.sqrt(2 * np.log(np.maximum(np.log(n), 1)))
    if worse.all():
        return Luck(wide.shape[1], len(wide), int(worse.sum()), float("nan"), float("nan"))
    d, n = d[:, ~worse], n[~worse]
    flips = signs(len(d), resamples, seed)
    deviation = np.nan_to_num(d - np.nanmean(d, axis=0))
    scaled = deviation / np.sqrt(n * (n - 1))  # a mean over n, and the degree of freedom that the mean in d took
    best = np.max([(flips @ chunk).max(1) for chunk in chunks(scaled, len(flips))], axis=0)
    return Luck(wide.shape[1], len(wide), int(worse.sum()), float(best.mean()), float(np.quantile(best, 0.95)))


def winners(
    search: pd.DataFrame,
    validation: pd.DataFrame,
    metric: str,
    top: int = 10,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the ``top`` largest gains of the search half again, on the validation half.

    The largest of many gains is large partly by luck, so on fresh probes it shrinks even where a wiring helps
    (regression to the mean). ``survived`` is the gain on validation as a share of the gain that was claimed, its
    interval that of the validation gain; NaN without a gain to survive. ``p_max_validation`` is family-wise over the
    ``top`` alone. ``verdict``, at .05 of it:

    =================  ==============================================================
    survived           better on validation, and as large a gain as claimed possible
    survived in part   better on validation, by less than claimed
    vanished           not shown to be better, and less than claimed
    undecided          too few probes: neither no gain nor the whole of it is excluded
    reversed           worse on validation
    no gain            the search half itself claimed none
    =================  ==============================================================

    Raises ValueError if a winner was not measured on the validation half, or if both halves are one table.
    """
    if search is validation:
        raise ValueError("search and validation are the same table; the winners need probes that did not choose them")
    claimed = table(search, metric, resamples, seed)
    claimed = claimed[(claimed["wiring"] != ":") & claimed["gain"].notna()].nlargest(top, "gain")
    names = claimed["wiring"].tolist()
    absent = [name for name in names if name not in set(validation.loc[validation["metric"] == metric, "wiring"])]
    if absent:
        raise ValueError(f"{metric} of {len(absent)} winners was not measured on validation, such as {absent[0]}")
    fresh = table(validation[validation["wiring"].isin(names)], metric, resamples, seed)
    both = claimed.merge(fresh, on="wiring", suffixes=("_search", "_validation"), validate="one_to_one")
    gained = both["gain_search"].where(both["gain_search"] > 0)
    for end in ("", "_low", "_high"):
        both[f"survived{end}"] = both[f"gain{end}_validation"] / gained
    both["verdict"] = [_verdict(row) for _, row in both.iterrows()]
    halves = [
        f"{name}_{half}"
        for half in ("search", "validation")
        for name in ("gain", "gain_low", "gain_high", "p_max", "n_prompts")
    ]
    return both[["wiring", *halves, "survived", "survived_low", "survived_high", "verdict"]]


def _verdict(row: pd.Series) -> str:
    if not row["gain_search"] > 0:
        return "no gain"
    less = row["gain_high_validation"] < row["gain_search"]
    if row["p_max_validation"] < 0.05:
        if row["gain_validation"] < 0:
            return "reversed"
        return "survived in part" if less else "survived"
    return "vanished" if less else "undecided"


def _without_baseline(wide: pd.DataFrame) -> pd.DataFrame:
    return wide.loc[:, wide.columns != ":"]


def _bootstrap(
    d: Float[np.ndarray, "prompt wiring"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, " wiring"], Float[np.ndarray, " wiring"], Float[np.ndarray, " wiring"]]:
    """Return mean and percentile interval of every wiring, all wirings under the same resamples."""
    draws = weights(len(d), resamples, seed).numpy()
    parts = []
    for chunk in chunks(d, len(draws)):
        there = np.isfinite(chunk)
        total = draws @ np.nan_to_num(chunk)
        with np.errstate(invalid="ignore"):
            means = total / (len(d) if there.all() else draws @ there)
        ends = np.full((2, chunk.shape[1]), np.nan)
        several = there.sum(0) > 1
        whole = several & np.isfinite(means).all(0)  # nanquantile is slow, and needed only where a resample was empty
        ends[:, whole] = np.quantile(means[1:, whole], [0.025, 0.975], axis=0)
        if (several & ~whole).any():
            ends[:, several & ~whole] = np.nanquantile(means[1:, several & ~whole], [0.025, 0.975], axis=0)
        parts.append(np.vstack([means[:1], ends]))
    estimate, low, high = np.hstack(parts)
    return estimate, low, high


def _discoveries(p: Float[np.ndarray, " row"], gain: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    q = np.where(np.isfinite(p), 1.0, np.nan)
    measured = np.isfinite(p)
    for side in (gain > 0, gain < 0):
        if (side & measured).any():
            of_side = np.where(side, p, 1.0)[measured]
            q[side] = multipletests(of_side, method="fdr_bh")[1][side[measured]]
    return q
