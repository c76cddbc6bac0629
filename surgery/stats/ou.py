r"""The Ornstein-Uhlenbeck process of series: its parameters, the bias of a single one, and how well any of it works.

    dX = kappa (mu - X) dt + sigma dW     seen every dt is     X' = mu + phi (X - mu) + shock,    phi = exp(-kappa dt)

with shocks of variance ``s^2 = sigma^2 (1 - phi^2) / (2 kappa)``, exactly, so that least squares is maximum likelihood.
kappa is a rate: the share of a deviation taken back in one step is ``1 - phi``, not kappa.

``ou`` fits all series with one set of parameters. ``andrews`` estimates phi of one short series, whose least-squares
slope is biased by about ``-(1 + 3 phi) / T`` (Kendall 1954), without that bias. ``comparison`` runs the usual unit-root
tests series by series, here and on series whose truth is known: of 12 steps they see next to nothing, of 48 only strong
reversion. ``recovery`` is the table of all estimators, here and in ``surgery.stats.panels``, on panels whose truth is
known: bias, error and how often the interval covers it, to read before a number is believed.

Sources: G. Uhlenbeck and L. Ornstein (1930); M. Kendall (1954); E. Fieller (1954) for mu; D. Andrews (1993).

>>> process = ou(simulate(0.5, 400, 12) + 3)
>>> process.kappa.low < math.log(2) < process.kappa.high, process.mu.low < 3 < process.mu.high
(True, True)
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.meanings import with_meanings
from surgery.stats.panels import Estimator, half_panel, nickell_corrected, pooled, sandwich, simulate, within

Series = Float[Tensor, "series time"]
Triple = tuple[Tensor, Tensor, Tensor]  # estimate, lower and upper end

COLUMNS = {
    "estimator": "which; ou.* are surgery.stats.ou.ou's, cross_section is the slope of the middle transition alone",
    "panel": "ou, random walk or explosive",
    "effects": "s.d. of the units' own means, in s.d. of a shock",
    "T": "transitions",
    "phi": "of the panel",
    "n_units": "units of one panel",
    "truth": "what is estimated, of this panel",
    "bias": "mean estimate - truth",
    "median_bias": "median estimate - truth",
    "rmse": "root mean square of estimate - truth",
    "coverage": "share of 95 % intervals that hold the truth",
    "valid": "whether theory promises 95 % there",
    "n_simulations": "panels simulated",
}


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Process:
    """The result of ``ou``: phi of a step, kappa, sigma and mu of the process, and the s.d. of a step's shock."""

    phi: Interval
    kappa: Interval
    sigma: Interval
    mu: Interval
    shock: float
    n: int  # transitions, of all series together
    note: str = ""  # what is undefined, and why


def ou(y: Series | Float[Tensor, " time"], dt: float = 1.0) -> Process:
    """Fit the process of one series, or of many with the same parameters, by maximum likelihood given where they start.

    Intervals: phi's is least squares' (t); kappa's is the same, carried over, and reaches infinity where phi's reaches
    0; sigma's adds on a log scale what s and phi leave open; mu's holds every mu that the data do not reject (Fieller),
    and is NaN, as mu is, where phi's holds 1: a walk has no mean. ``phi <= 0`` is no such process: kappa and sigma are
    NaN, and ``note`` says so. ``phi > 1`` is one, with negative kappa. s has the degrees of freedom n - 2.

    For a panel whose units have means of their own this is as wrong as ``panels.pooled``, and for one short series phi
    is too small: see ``andrews``. Raises ValueError for fewer than 3 transitions, and for what is not finite.
    """
    y = y.double().reshape(-1, y.shape[-1])
    if y[:, 1:].numel() < 3 or not y.isfinite().all():
        raise ValueError(f"three transitions or more, all finite, got series {tuple(y.shape)}: give longer ones")
    fitted = {name: Interval(*(float(value) for value in triple)) for name, triple in _fit(y, dt).items()}
    shock, notes = fitted.pop("shock").value, []
    if math.isnan(fitted["phi"].value):
        notes.append("nothing varies: all is undefined")
    elif fitted["phi"].value <= 0:
        notes.append("phi <= 0: no process in continuous time does that, kappa and sigma are undefined")
    elif math.isnan(fitted["mu"].value):
        notes.append("phi may be 1: mu is undefined")
    return Process(**fitted, shock=shock, n=y[:, 1:].numel(), note="; ".join(notes))


def andrews(series: Float[Tensor, "*series time"], draws: int = 20000, seed: int = 0) -> Triple:
    """Estimate phi of each single series without bias in the median, and its 95 % interval, all between -1 and 1.

    The slope of a short series is too small; so the phi is given at which that slope is the median of simulated ones
    (normal shocks, an intercept), and for the ends of the interval its quantiles. 1 is the highest phi considered, and
    the interval of a random walk covers it in 97.5 %. Simulations are made once for every T. Source: Andrews (1993).

    >>> phi, low, high = andrews(simulate(0.9, 2000, 12))
    >>> round(phi.median().item(), 1), round(((low <= 0.9) & (0.9 <= high)).double().mean().item(), 2)
    (0.9, 0.95)
    """
    rows = series.double()
    slope = within(rows.unsqueeze(-1) * rows.unsqueeze(-2))
    grid, quantiles = _slopes(rows.shape[-1] - 1, draws, seed)
    low, median, high = (np.interp(slope.cpu().numpy(), quantile, grid) for quantile in quantiles)
    phi, lowest, highest = (
        torch.as_tensor(value).where(slope.cpu().isfinite(), math.nan) for value in (median, high, low)
    )
    return phi, lowest, highest


@with_meanings(COLUMNS)
def comparison(y: Series, n_series: int = 100, seed: int = 0) -> pd.DataFrame:
    """Return what the usual tests reject at 5 %, series by series: the share here, and where the truth is known.

    Rows: ``adfuller`` (Dickey-Fuller, no lags) and ``variance_ratio`` (Lo and MacKinlay 1988, q = 2, robust; two-sided)
    reject a random walk, ``kpss`` (Kwiatkowski et al. 1992) rejects stationarity. Columns: ``test``, ``null``,
    ``share`` of (up to ``n_series``) series of y, evenly picked; ``share_random_walk``, ``share_slow`` and
    ``share_reverting`` of as many simulated series of that length, with phi = 1, 0.9 and 0.5 (half of a deviation gone
    every step); ``n_series``, ``T``. Where two of these are alike the test cannot tell one from the other, whatever it
    says of y: at T = 12 that is all three, and 0.9 cannot be told from 1 at 48 either. Series that do not vary are left
    out. Raises ValueError for fewer than 8 transitions.
    """
    T = y.shape[1] - 1
    if T < 8 or not y.isfinite().all():
        raise ValueError(f"these tests take 8 transitions or more, all finite, got {T}: use surgery.stats.panels")
    varying = y[y.double().std(1) > 0].double().cpu()
    chosen = varying[torch.linspace(0, len(varying) - 1, min(n_series, len(varying))).round().long()]
    panels = {
        "share": chosen,
        "share_random_walk": simulate(1.0, n_series, T, seed=seed),
        "share_slow": simulate(0.9, n_series, T, seed=seed),
        "share_reverting": simulate(0.5, n_series, T, seed=seed),
    }
    rows = []
    for name, (null, p) in _TESTS.items():
        shares = {
            column: float(np.mean([p(row.numpy()) < 0.05 for row in panel])) if len(panel) else math.nan
            for column, panel in panels.items()
        }
        rows.append({"test": name, "null": null, **shares, "n_series": len(chosen), "T": T})
    return pd.DataFrame(rows)


@with_meanings(COLUMNS)
def recovery(
    T: Sequence[int] = (12, 24, 48),
    phi: Sequence[float] = (0.3, 0.5, 0.9, 0.95, 1.0, 1.05),
    n_units: int = 100,
    effects: Sequence[float] = (0.0, 2.0),
    n_simulations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Run every estimator on simulated panels: how far off it is, and how often its 95 % interval holds the truth.

    Columns are ``COLUMNS``. Estimators of phi: those of ``surgery.stats.panels``, their intervals t times ``sandwich``;
    ``nickell_corrected`` is of ``within``, and ``.zero`` assumes units that start at their means; ``ou.phi``,
    ``ou.kappa``, ``ou.sigma``; ``andrews``, on one series a simulation (and ten times as many, in panels without
    effects); ``cross_section``, the slope of one transition, against phi and (``.slope``) against what it is that a
    cross-section measures, the slope over units whatever makes them differ.

    ``valid`` is theory's word before the fact. pooled, ou: no unit effects, or phi = 1, where they drop out. within:
    never. nickell_corrected: up to phi = 1; with zero, from 1 on. half_panel: ``N / T^3 < 0.01`` and a panel of five
    memories or more, ``T (1 - phi) >= 5``, as what is left of its bias falls as 1/T^2 only then. andrews: up to 1.
    """
    rows = []
    for cell in ((t, p, e) for t in T for p in phi for e in effects):
        y = simulate(cell[1], n_simulations * n_units, cell[0], effects=cell[2], seed=seed)
        rows += _cell(y.unflatten(0, (n_simulations, n_units)), *cell)
        if cell[2] == 0:
            y = simulate(cell[1], 10 * n_simulations, cell[0], seed=seed + 1)
            rows.append(_row("andrews", andrews(y), cell[1], cell[1] <= 1, (1, *cell)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _cell(y: Float[Tensor, "simulation unit time"], T: int, phi: float, effects: float) -> list[dict[str, Any]]:
    """Run all estimators on one kind of panel."""
    n, middle = y.shape[1], T // 2
    middle_alone = torch.zeros(T).index_fill_(0, torch.tensor(middle), 1.0)
    common = effects == 0 or phi == 1
    long = n / T**3 < 0.01 and T * (1 - phi) >= 5
    # the variance about its own mean with which a unit enters the middle transition
    spread = 1 / (1 - phi**2) if phi < 1 else sum(phi ** (2 * step) for step in range(middle))
    slope = phi + (1 - phi) * effects**2 / (spread + effects**2)
    estimators: list[tuple[str, Estimator, float, bool]] = [
        ("pooled", pooled, phi, common),
        ("within", within, phi, False),
        ("nickell_corrected", lambda G: nickell_corrected(within(G), T), phi, phi <= 1),
        ("nickell_corrected.zero", lambda G: nickell_corrected(within(G), T, "zero"), phi, phi >= 1),
        ("half_panel", half_panel, phi, long),
        ("cross_section", lambda G: pooled(G, middle_alone), phi, common),
        ("cross_section.slope", lambda G: pooled(G, middle_alone), slope, True),
    ]
    rows, t = [], float(scipy.stats.t.ppf(0.975, n - 1))
    for name, estimator, truth, valid in estimators:
        value, error = sandwich(estimator, y)
        rows.append(_row(name, (value, value - t * error, value + t * error), truth, valid, (n, T, phi, effects)))
    kappa = -math.log(phi)
    truths = {"phi": phi, "kappa": kappa, "sigma": math.sqrt(_spreading(torch.tensor(kappa).double()))}
    fitted = _fit(y, 1.0)
    return rows + [
        _row(f"ou.{name}", fitted[name], truth, common, (n, T, phi, effects)) for name, truth in truths.items()
    ]


def _row(
    name: str, estimate: Triple, truth: float, valid: bool, panel: tuple[int, int, float, float]
) -> dict[str, Any]:
    """Return one row of ``recovery``. An undefined interval covers nothing."""
    value, low, high = estimate
    n_units, T, phi, effects = panel
    error = value - truth
    return {
        "estimator": name,
        "panel": "ou" if phi < 1 else "random walk" if phi == 1 else "explosive",
        "effects": effects,
        "T": T,
        "phi": phi,
        "n_units": n_units,
        "truth": truth,
        "bias": float(error.nanmean()),
        "median_bias": float(error.nanmedian()),
        "rmse": math.sqrt(error.square().nanmean()),
        "coverage": float(((low <= truth) & (truth <= high)).double().mean()),
        "valid": valid,
        "n_simulations": len(value),
    }


def _fit(y: Float[Tensor, "*panel series time"], dt: float) -> dict[str, Triple]:
    """Return estimate and interval of every parameter, of every panel."""
    x, z = y[..., :-1].flatten(-2), y[..., 1:].flatten(-2)
    n = x.shape[-1]
    mean_x, mean_z = x.mean(-1), z.mean(-1)
    x, z = x - mean_x.unsqueeze(-1), z - mean_z.unsqueeze(-1)
    square = x.square().sum(-1)
    square = square.where(square > 0, math.nan)
    phi = (x * z).sum(-1) / square
    variance = (z - phi.unsqueeze(-1) * x).square().sum(-1) / (n - 2)
    t = float(scipy.stats.t.ppf(0.975, n - 2))
    error = (variance / square).sqrt()
    ends = (phi, phi - t * error, phi + t * error)
    rate, low, high = (-torch.log(end.clamp(min=0)).where(phi > 0, math.nan) / dt for end in ends)
    # sigma^2 = s^2 2 kappa / (1 - phi^2); its error on a log scale, by delta in s^2 (chi squared) and phi
    kappa = rate * dt
    log_sigma = (variance * _spreading(kappa) / dt).log() / 2
    steepness = torch.where(kappa.abs() < 1e-4, 1 - kappa / 3, 1 / kappa - 2 / torch.expm1(2 * kappa))
    half = t * (2 / (n - 2) + (steepness * error / phi).square()).sqrt() / 2
    return {
        "phi": ends,
        "kappa": (rate, high, low),
        "sigma": (log_sigma.exp(), (log_sigma - half).exp(), (log_sigma + half).exp()),
        "mu": _fieller(phi, mean_x, mean_z, t * variance.sqrt(), square, n),
        "shock": (variance.sqrt(),) * 3,
    }


def _spreading(kappa: Tensor) -> Tensor:
    """Return ``2 kappa / (1 - exp(-2 kappa))``, sigma^2 over s^2 for a step of 1: above 1 where phi < 1."""
    return torch.where(kappa == 0, 1.0, -2 * kappa / torch.expm1(-2 * kappa))


def _fieller(phi: Tensor, mean_x: Tensor, mean_z: Tensor, scale: Tensor, square: Tensor, n: int) -> Triple:
    """Return all m with ``|mean_z - m - phi (mean_x - m)| <= scale sqrt(1/n + (mean_x - m)^2 / square)``, or NaN.

    NaN stands for an unbounded set. In terms of ``d = m - mean_x`` and ``gap = mean_z - mean_x`` that is a quadratic,
    ``(gap - (1 - phi) d)^2 <= ...``.
    """
    gap, pull = mean_z - mean_x, 1 - phi
    a = pull.square() - scale.square() / square
    root = ((gap * pull).square() - a * (gap.square() - scale.square() / n)).clamp(min=0).sqrt()
    bounded = a > 0
    offsets = (gap / pull, (gap * pull - root) / a, (gap * pull + root) / a)
    value, low, high = ((mean_x + d).where(bounded, math.nan) for d in offsets)
    return value, low, high


@lru_cache(maxsize=16)
def _slopes(T: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid of phi, and at each the 2.5, 50 and 97.5 % quantiles of the slope of T transitions."""
    grid = np.concatenate([np.linspace(-0.99, 0.7, 24), np.linspace(0.75, 0.95, 9), [0.97, 0.98, 0.99, 1.0]])
    noise = np.random.default_rng(seed).standard_normal((T + 1, draws))
    quantiles = []
    for phi in grid:  # the same shocks for all
        x = [noise[0] / math.sqrt(1 - phi**2) if phi < 1 else np.zeros(draws)]
        for shock in noise[1:]:
            x.append(phi * x[-1] + shock)
        path = np.stack(x)
        now, after = path[:-1] - path[:-1].mean(0), path[1:]
        slopes = (now * after).sum(0) / np.square(now).sum(0)
        quantiles.append(np.quantile(slopes, [0.025, 0.5, 0.975]))
    return grid, np.maximum.accumulate(np.array(quantiles).T, 1)


def _adfuller(series: np.ndarray) -> float:
    from statsmodels.tsa.stattools import adfuller

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adfuller currently returns", FutureWarning)  # a tuple: p is its second
        return float(adfuller(series, maxlag=0, autolag=None)[1])


def _kpss(series: np.ndarray) -> float:
    from statsmodels.tools.sm_exceptions import InterpolationWarning
    from statsmodels.tsa.stattools import kpss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kpss currently returns", FutureWarning)
        warnings.simplefilter("ignore", InterpolationWarning)  # p outside its table, which ends at 0.01 and 0.1
        return float(kpss(series, nlags="auto")[1])


def _variance_ratio(series: np.ndarray) -> float:
    from arch.unitroot import VarianceRatio

    return float(VarianceRatio(series, lags=2).pvalue)


_TESTS: dict[str, tuple[str, Callable[[np.ndarray], float]]] = {
    "adfuller": ("random walk", _adfuller),
    "kpss": ("stationary", _kpss),
    "variance_ratio": ("random walk", _variance_ratio),
}
