r"""Is a wiring better than the unmodified model, or only the luckiest of thousands? From the table of a scan alone.

Every wiring is compared with the unmodified model on the same prompts, d = value - baseline (baseline - value for the
metrics where less is better, so that a gain is always an improvement). The unit is the prompt or, with ``cluster``, a
group of prompts that are not independent (made from one template, one passage, one k and pair of languages): such
prompts gain and lose together, and counted one by one they make luck look certain. Then

* ``gain`` is the mean of d over prompts, with its bootstrap-t interval over units;
* ``p`` is two-sided, the larger of two: by a studentised bootstrap (``surgery.stats.studentised``), which allows for
  the skew that gains of log-likelihood have, and by sign flips (``surgery.stats.permutation``), which hold for counts
  of a few exact answers, where a bootstrap does not know the outcomes that it has not seen;
* ``p_max`` asks the same of the largest of all wirings, gains and losses apart, by step-down: a unit is drawn (or
  flipped) in all wirings at once, so that what wirings share stays shared. Below .05: with that many wirings tried, and
  none with any effect, one in forty scans would show so clear a gain anywhere, and one in forty so clear a loss;
* ``q`` is the false discovery rate (Benjamini and Hochberg 1995) among the wirings that gain as much or more, or lose
  as much or more: gains and losses are two families, or else the many wirings that break a model would pay for the
  few that seem to help it. Benjamini-Hochberg and not Benjamini-Yekutieli, because the wirings of a scan share their
  baseline and most of their layers and so move together, the case in which the former is proven to hold (Benjamini and
  Yekutieli 2001), while the latter costs a factor of about ln m; what must hold under any dependence, reads ``p_max``.

No p is below 2 / (resamples + 1), nor below 2 / 2^units. With skewed gains ``p_max`` is nominal or below from 32
prompts on; with fewer than ``FEW`` prompts p of one wiring is too small where gains are very skewed, and with fewer
than ``FEW_CLUSTERS`` clusters little can be shown. The simulation is in ``benchmarks/simulations/luck.py``.
An interval is for one wiring looked at by itself: that of the best of a scan does not know that it was chosen.
``winners`` measures it again on probes that took no part in the choice.

**What is not finite** (NaN or infinite: a stream that overflows, an answer of probability 0). A prompt on which the
unmodified model gives no finite number is left out for every wiring alike. Where only the wiring gives none, that is a
loss without bound, whatever it gains elsewhere: its ``gain`` is -inf, below every finite gain, it has no interval, p is
1, and ``n_not_finite`` says on how many prompts. Nor does it enter the luck of the others, as it could not have won.

Cells that were not measured are left out of their wiring alone; ``n_prompts`` says how many remain. With one unit there
is no interval (NaN) and p is 1; a wiring that changes nothing has gain 0, interval [0, 0], p = 1.

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
from jaxtyping import Float
from statsmodels.stats.multitest import multipletests

from surgery.meanings import with_meanings
from surgery.stats import studentised
from surgery.stats.permutation import FLIPS, all_of_them, signs, standardised
from surgery.stats.studentised import Units

RESAMPLES = FLIPS
FEW, FEW_CLUSTERS = 128, 20  # prompts, clusters: with fewer, what is read is said to be uncertain
LESS_IS_BETTER = ("loss", "kl")
COLUMNS = {
    "wiring": "the order in which the layers ran",
    "group": "group of the probes, in a table by group",
    "gain": "mean over prompts of value - baseline (baseline - value for loss and kl): above 0 is better; -inf where a "
    "value is not finite",
    "gain_low": "lower end of its 95 % interval, bootstrap-t over prompts (or clusters of them)",
    "gain_high": "upper end of its 95 % interval",
    "p": "two-sided, by studentised bootstrap and sign flips, of this row by itself",
    "p_max": "the same against the largest of all rows, gains and losses apart: family-wise",
    "q": "false discovery rate among the rows that gain (or lose) at least as clearly",
    "n_prompts": "how many prompts the row was measured on, those left out on which the unmodified model is not finite",
    "n_not_finite": "on how many of them the wiring gives no finite number",
    "n_units": "of how many independent units they are: as many, or the clusters that were drawn whole",
}


@dataclass(frozen=True)
class Luck:
    """What the best of ``wirings`` wirings would gain on ``prompts`` prompts if none had any effect, in units of gain.

    ``mean`` on average, ``high`` in all but the luckiest 5 % of scans. The ``worse`` wirings, clearly harmful or not
    finite on some prompt, are left out of it; both are NaN where that is all of them.
    """

    wirings: int
    prompts: int
    worse: int
    mean: float
    high: float


def differences(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the improvement over the unmodified model: a row per prompt (``group``, ``prompt``), a column per wiring.

    -inf where the wiring gives no finite number though the unmodified model does, so that a mean over prompts puts it
    last; NaN where nothing was measured. Prompts on which the unmodified model gives none are left out.

    Raises ValueError for a metric that the table does not hold, a cell measured twice, a prompt in two groups, and if
    nothing can be compared.
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
    better = better.where(np.isfinite(better), -np.inf).where(np.isfinite(rows["baseline"]))
    d = np.full((len(prompts), len(wirings)), np.nan)
    d[place, column] = better
    if np.isnan(d).all():
        raise ValueError(
            f"no value of {metric} can be compared: the unmodified model gives no finite number on any of "
            f"{len(prompts)} prompts"
        )
    index = pd.MultiIndex.from_arrays([group_of, prompts], names=["group", "prompt"])
    return pd.DataFrame(d, index=index, columns=pd.Index(wirings, name="wiring")).dropna(how="all")


@with_meanings(COLUMNS)
def table(
    frame: pd.DataFrame,
    metric: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    by_group: bool = False,
    cluster: str | None = None,
) -> pd.DataFrame:
    """Return a row per wiring, or per wiring and group, in the order of the scan: ``COLUMNS``.

    All rows see the same resamples and the same flips. With ``by_group`` the family of ``p_max`` and ``q`` is all rows,
    of every group. ``cluster`` is the column of ``frame`` with what prompts have in common that are not independent.

    Cost: no forward pass; some seconds for 3000 wirings on 300 prompts.
    """
    wide = differences(frame, metric)
    d, names, groups = wide.to_numpy(), wide.columns.astype(str), wide.index.get_level_values("group")
    families = groups.unique() if by_group else pd.Index(["all"])
    if by_group:  # a wiring in one group: the wiring, not measured on the prompts of the others
        inside = np.asarray(groups)[:, None] == np.asarray(families)
        d = np.where(inside[:, None], d[:, :, None], np.nan).reshape(len(d), -1)
    n_prompts, n_not_finite = (~np.isnan(d)).sum(0), np.isneginf(d).sum(0)
    broken = np.greater(n_not_finite, 0)
    d = np.where(broken & ~np.isnan(d), 0.0, d)  # judged as if they changed nothing: no p, and no part in the others'
    units = Units.of(d, _labels(frame, wide, cluster))
    drawn = studentised.draws(len(units), resamples, seed)
    low, high = studentised.interval(units, drawn)
    gain, p, p_max = units.mean(), *judged(units, drawn, seed)
    q = discoveries(p, gain)
    rows = {
        "wiring": names.repeat(len(families)),
        "group": np.tile(families, len(names)),
        "gain": np.where(broken, -np.inf, gain),
        "gain_low": np.where(broken, np.nan, low),
        "gain_high": np.where(broken, np.nan, high),
        "p": p,
        "p_max": p_max,
        "q": q,
        "n_prompts": n_prompts,
        "n_not_finite": n_not_finite,
        "n_units": units.present(),
    }
    return pd.DataFrame({name: rows[name] for name in COLUMNS if by_group or name != "group"})


def judged(
    units: Units, drawn: Float[np.ndarray, "resample unit"], seed: int
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Return p of every mean by itself and family-wise, each the larger of bootstrap and sign flips.

    NaN where nothing was measured. Two-sided; none is below 2 / (resamples + 1), nor below 2 / 2^units. ``drawn`` come
    from ``studentised.draws``.
    """
    flips = signs(len(units), len(drawn), seed)
    scaled = standardised(units.total)
    by_bootstrap = studentised.tails(
        units.t(), lambda chosen: studentised.null(units.columns(chosen), drawn), len(drawn)
    )
    by_flips = studentised.tails(
        scaled.sum(0), lambda chosen: flips @ scaled[:, chosen], len(flips), extra=0 if all_of_them(flips) else 1
    )
    p, p_max = (np.where(units.present() > 0, np.maximum(*both), np.nan) for both in zip(by_bootstrap, by_flips))
    return p, p_max


@with_meanings(COLUMNS)
def together(
    frame: pd.DataFrame, metric: str, resamples: int = RESAMPLES, seed: int = 0, *, cluster: str | None = None
) -> pd.DataFrame:
    """Return the gain of every wiring with intervals that hold all at once: wiring, gain, gain_low, gain_high.

    So they hold for whichever wiring is chosen by its result, where those of ``table`` hold for a wiring chosen before.
    A wiring that is not finite on some prompt has the gain -inf and no interval, and takes no part in the others'.
    """
    wide = differences(frame, metric)
    broken = (wide == -np.inf).any().to_numpy()
    units = Units.of(wide.mask(wide == -np.inf, 0.0).to_numpy(), _labels(frame, wide, cluster))
    drawn = studentised.draws(len(units), resamples, seed)
    low, high = studentised.together(units.columns(np.flatnonzero(~broken)), drawn) if not broken.all() else ([], [])
    result = pd.DataFrame({"wiring": wide.columns.astype(str), "gain": units.mean()})
    result.loc[~broken, ["gain_low", "gain_high"]] = np.transpose([low, high])
    result.loc[broken, "gain"] = -np.inf
    return result


def expected_best(
    frame: pd.DataFrame, metric: str, resamples: int = RESAMPLES, seed: int = 0, *, cluster: str | None = None
) -> Luck:
    """Return the largest gain of a scan in which no wiring has an effect but each keeps its spread over prompts.

    Prompts (or clusters) are drawn as for ``p_max``, of d less its mean, and the largest mean gain (not t) is kept.
    Wirings that are clearly worse than the unmodified model, t below -sqrt(2 ln ln n), could not have won by luck and
    would only bring their large spread into it, so they are left out (Hansen 2005, "A test for superior predictive
    ability"), as are those that are not finite on some prompt. A gain in the units of the metric weighs wirings of
    large spread most; ``p_max`` weighs all alike.

    Raises ValueError if no wiring but the unmodified model was measured on two prompts (or clusters) or more.
    """
    wide = _without_baseline(differences(frame, metric))
    broken = (wide == -np.inf).any().to_numpy()
    units = Units.of(wide.replace(-np.inf, 0.0).to_numpy(), _labels(frame, wide, cluster))
    enough = units.present() > 1
    units, broken = units.columns(np.flatnonzero(enough)), broken[enough]
    n, wirings = units.present(), units.total.shape[1]
    if wirings == 0:
        raise ValueError(f"luck cannot be estimated: no wiring was measured on two {_unit(cluster)} or more")
    worse = broken | (units.t() < -np.sqrt(2 * np.log(np.maximum(np.log(n), 1))))
    if worse.all():
        return Luck(wirings, len(wide), int(worse.sum()), float("nan"), float("nan"))
    units, n = units.columns(np.flatnonzero(~worse)), n[~worse]
    drawn = studentised.draws(len(units), resamples, seed)
    best = np.full(resamples, -np.inf)
    for chosen in studentised.portions(len(n), resamples):
        change = studentised.resampled(units.columns(chosen), drawn)[0]
        best = np.maximum(best, (change * np.sqrt(n / (n - 1))[chosen]).max(1))  # a degree of freedom went to the mean
    return Luck(wirings, len(wide), int(worse.sum()), float(best.mean()), float(np.quantile(best, 0.95)))


@with_meanings(COLUMNS)
def winners(
    search: pd.DataFrame,
    validation: pd.DataFrame,
    metric: str,
    top: int = 10,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    cluster: str | None = None,
) -> pd.DataFrame:
    """Measure the ``top`` largest gains of the search half again, on the validation half.

    The largest of many gains is large partly by luck, so on fresh probes it shrinks even where a wiring helps
    (regression to the mean). ``survived`` is the gain on validation as a share of the gain that was claimed, its
    interval that of the validation gain; NaN without a gain to survive. ``p_max_validation`` is family-wise over the
    ``top`` alone. ``verdict``, at .05 of it, so that one scan in forty without any effect has a
    survivor:

    =================  ==============================================================
    survived           better on validation, and as large a gain as claimed possible
    survived in part   better on validation, by less than claimed
    vanished           not shown to be better, and less than claimed
    undecided          too few probes: neither no gain nor the whole of it is excluded
    reversed           worse on validation
    not finite         no finite number on some validation prompt on which the unmodified model gives one
    no gain            the search half itself claimed none
    =================  ==============================================================

    Raises ValueError as ``confirmed``, and if both halves are one table.
    """
    if search is validation:
        raise ValueError("search and validation are the same table; the winners need probes that did not choose them")
    claimed = table(search, metric, resamples, seed, cluster=cluster)
    return confirmed(claimed, validation, metric, top, resamples, seed, cluster=cluster)


@with_meanings(COLUMNS)
def confirmed(
    claimed: pd.DataFrame,
    validation: pd.DataFrame,
    metric: str,
    top: int = 10,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    cluster: str | None = None,
) -> pd.DataFrame:
    """Return what ``winners`` returns, from the ``table`` of the search half or another with its columns.

    Raises ValueError if a winner was not measured on the validation half.
    """
    claimed = claimed[(claimed["wiring"] != ":") & claimed["gain"].notna()].nlargest(top, "gain")
    names = claimed["wiring"].tolist()
    absent = [name for name in names if name not in set(validation.loc[validation["metric"] == metric, "wiring"])]
    if absent:
        raise ValueError(f"{metric} of {len(absent)} winners was not measured on validation, such as {absent[0]}")
    fresh = table(validation[validation["wiring"].isin(names)], metric, resamples, seed, cluster=cluster)
    both = claimed.merge(fresh, on="wiring", suffixes=("_search", "_validation"), validate="one_to_one")
    gained = both["gain_search"].where(both["gain_search"] > 0)
    for end in ("", "_low", "_high"):
        both[f"survived{end}"] = both[f"gain{end}_validation"].replace(-np.inf, np.nan) / gained
    both["verdict"] = [_verdict(row) for _, row in both.iterrows()]
    halves = [
        f"{name}_{half}"
        for half in ("search", "validation")
        for name in ("gain", "gain_low", "gain_high", "p_max", "n_prompts", "n_not_finite", "n_units")
    ]
    return both[["wiring", *halves, "survived", "survived_low", "survived_high", "verdict"]]


def _verdict(row: pd.Series) -> str:
    if not row["gain_search"] > 0:
        return "no gain"
    if row["n_not_finite_validation"]:
        return "not finite"
    less = row["gain_high_validation"] < row["gain_search"]
    if row["p_max_validation"] < 0.05:
        if row["gain_validation"] < 0:
            return "reversed"
        return "survived in part" if less else "survived"
    return "vanished" if less else "undecided"


def _without_baseline(wide: pd.DataFrame) -> pd.DataFrame:
    return wide.loc[:, wide.columns != ":"]


def _labels(frame: pd.DataFrame, wide: pd.DataFrame, cluster: str | None) -> pd.Series | None:
    """The cluster of every prompt of ``wide``."""
    if cluster is None:
        return None
    if cluster not in frame:
        raise ValueError(f"this table has no column {cluster!r} to cluster by")
    of_prompt = frame[["prompt", cluster]].drop_duplicates()
    twice = of_prompt["prompt"].duplicated()
    if twice.any():
        raise ValueError(f"prompt {of_prompt.loc[twice, 'prompt'].iloc[0]} is in more than one {cluster}")
    return of_prompt.set_index("prompt")[cluster].loc[wide.index.get_level_values("prompt")]


def _unit(cluster: str | None) -> str:
    return "prompts" if cluster is None else "clusters"


def discoveries(p: Float[np.ndarray, " row"], gain: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Return the false discovery rate among the rows that gain (or lose) at least as clearly."""
    q = np.where(np.isfinite(p), 1.0, np.nan)
    measured = np.isfinite(p)
    for side in (gain > 0, gain < 0):
        if (side & measured).any():
            of_side = np.where(side, p, 1.0)[measured]
            q[side] = multipletests(of_side, method="fdr_bh")[1][side[measured]]
    return q
