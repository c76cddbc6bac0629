"""How often a scan in which no wiring has any effect finds one, and how often it finds one that is there.

Many wirings that move together, on few prompts: gains that are skewed as gains of log-likelihood are (most prompts gain
a little, a few lose much), symmetric, of heavy tails, counts of exact answers; prompts that stand by themselves or come
in clusters. ``before`` is what sign flips with percentile intervals read on the same draws.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from surgery.stats import comparisons

WIRINGS, RESAMPLES = 100, 500
SHARE = 0.05  # of a scan's scans: half of it for gains, half for losses
BEFORE = {  # measured with sign flips, percentile intervals, every prompt by itself; 200 scans each
    "false gains, skewed (exponential), 32 prompts": 0.110,
    "false gains, skewed (exponential), 64 prompts": 0.100,
    "false gains, skewed (exponential), 128 prompts": 0.060,
    "false gains, skewed (exponential), 256 prompts": 0.065,
    "false gains, skewed (lognormal), 32 prompts": 0.280,
    "false gains, skewed (lognormal), 64 prompts": 0.240,
    "false gains, skewed (lognormal), 128 prompts": 0.185,
    "false gains, skewed (lognormal), 256 prompts": 0.165,
    "false gains, normal, 32 prompts": 0.015,
    "false gains, normal, 64 prompts": 0.020,
    "false gains, normal, 128 prompts": 0.020,
    "false gains, normal, 256 prompts": 0.035,
    "false gains, heavy tails (t, 3), 32 prompts": 0.015,
    "false gains, heavy tails (t, 3), 64 prompts": 0.015,
    "false gains, heavy tails (t, 3), 128 prompts": 0.015,
    "false gains, heavy tails (t, 3), 256 prompts": 0.020,
    "false gains, 8 clusters of 8 skewed prompts": 0.710,
    "false gains, 16 clusters of 8 skewed prompts": 0.720,
    "false gains, 32 clusters of 8 skewed prompts": 0.720,
    "false gains of single wirings, few exact answers, 64 prompts": 0.003,
    "survived without effect, skewed, 32 prompts": 0.095,
    "survived without effect, skewed, 64 prompts": 0.075,
    "survived without effect, skewed, 128 prompts": 0.070,
    "survived without effect, skewed, 256 prompts": 0.085,
    "intervals that miss, skewed, 32 prompts": 0.073,
    "intervals that miss, skewed, 128 prompts": 0.078,
    "power, normal, a gain of 1.0 SD among 100, 32 prompts": 0.945,
    "power, normal, a gain of 0.6 SD among 100, 64 prompts": 0.910,
    "power, normal, a gain of 0.4 SD among 100, 128 prompts": 0.825,
    "power, normal, a gain of 0.3 SD among 100, 256 prompts": 0.925,
    "power, skewed (exponential), a gain of 1.0 SD among 100, 32 prompts": 0.995,
    "power, skewed (exponential), a gain of 0.6 SD among 100, 64 prompts": 0.940,
    "power, skewed (exponential), a gain of 0.4 SD among 100, 128 prompts": 0.915,
    "power, skewed (exponential), a gain of 0.3 SD among 100, 256 prompts": 0.930,
}
Noise = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
NOISE: dict[str, Noise] = {
    "skewed (exponential)": lambda rng, size: 1 - rng.exponential(size=size),
    "skewed (lognormal)": lambda rng, size: np.exp(0.5) - rng.lognormal(size=size),
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails (t, 3)": lambda rng, size: rng.standard_t(3, size=size),
}


def gains(rng: np.random.Generator, noise: Noise, prompts: int, clusters: int | None = None) -> np.ndarray:
    """No effect, ``[wiring, prompt]``: half of it shared by all wirings; with clusters, most of it by their prompts."""
    d = noise(rng, (1, prompts)) + noise(rng, (WIRINGS, prompts))
    if clusters is None:
        return d
    together = noise(rng, (1, clusters)) + noise(rng, (WIRINGS, clusters))
    return together.repeat(prompts // clusters, axis=1) + d / 2


def exact_answers(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """No effect on exact answers, of which few change: one in thirty is gained, as many are lost."""
    return np.sign(np.floor(31 * rng.random((WIRINGS, prompts))) - 15) * (rng.random((WIRINGS, prompts)) < 1 / 15)


def scan(d: np.ndarray, metric: str = "loglik") -> pd.DataFrame:
    """The table of a scan with the gains ``d`` ``[wiring, prompt]``."""
    wirings, prompts = d.shape
    return pd.DataFrame(
        {
            "wiring": np.repeat([f":{place + 2} 1:" for place in range(wirings)], prompts),
            "prompt": np.tile(np.arange(prompts), wirings),
            "group": "",
            "metric": metric,
            "value": d.ravel(),
            "baseline": 0.0,
        }
    )


def found(d: np.ndarray, clusters: int | None = None) -> pd.DataFrame:
    """The comparison of a scan; prompts of a cluster follow one another."""
    frame = scan(d)
    if clusters is None:
        return comparisons.table(frame, "loglik", RESAMPLES)
    size = d.shape[1] // clusters
    return comparisons.table(frame.assign(cluster=frame["prompt"] // size), "loglik", RESAMPLES, cluster="cluster")


def false_gains(noise: Noise, prompts: int, scans: int, clusters: int | None = None) -> float:
    """The share of scans without any effect in which some wiring gains at p_max < .05; nominal .025."""
    hits = []
    for seed in range(scans):
        table = found(gains(np.random.default_rng(seed), noise, prompts, clusters), clusters)
        hits.append(((table["p_max"] < SHARE) & (table["gain"] > 0)).any())
    return float(np.mean(hits))


def false_single_gains(scans: int, prompts: int = 64) -> float:
    """The share of wirings, of exact answers without any effect, that gain at p < .05; nominal .025."""
    tables = [found(exact_answers(np.random.default_rng(seed), prompts)) for seed in range(scans)]
    return float(np.mean([((table["p"] < SHARE) & (table["gain"] > 0)).mean() for table in tables]))


def false_survivors(noise: Noise, prompts: int, scans: int) -> float:
    """The share of scans without any effect of whose ten best one or more survives on fresh probes; nominal .025."""
    hits = []
    for seed in range(scans):
        rng = np.random.default_rng(seed)
        halves = [scan(gains(rng, noise, prompts)) for _ in range(2)]
        verdicts = comparisons.winners(*halves, "loglik", resamples=RESAMPLES)["verdict"]
        hits.append(verdicts.str.startswith("survived").any())
    return float(np.mean(hits))


def power(noise: Noise, prompts: int, effect: float, scans: int) -> float:
    """The share of scans that find the one wiring of all that gains ``effect`` standard deviations."""
    hits = []
    for seed in range(scans):
        d = gains(np.random.default_rng(seed), noise, prompts)
        d[17] += effect * d[17].std()
        hits.append(found(d)["p_max"][17] < SHARE)
    return float(np.mean(hits))


def misses(noise: Noise, prompts: int, scans: int) -> float:
    """The share of intervals that leave out the truth; nominal .05."""
    tables = [found(gains(np.random.default_rng(seed), noise, prompts)) for seed in range(scans)]
    return float(np.mean([((table["gain_low"] > 0) | (table["gain_high"] < 0)).mean() for table in tables]))


def misses_together(noise: Noise, prompts: int, scans: int) -> float:
    """The share of scans in which one of the intervals that should hold together leaves out the truth; nominal .05."""
    tables = [
        comparisons.together(scan(gains(np.random.default_rng(seed), noise, prompts)), "loglik", RESAMPLES)
        for seed in range(scans)
    ]
    return float(np.mean([((table["gain_low"] > 0) | (table["gain_high"] < 0)).any() for table in tables]))


def cases(scans: int) -> Iterator[tuple[str, float | str, Callable[[], float]]]:
    """Every case: its name, what it should read, and how it is read."""
    skewed = NOISE["skewed (exponential)"]
    for name, noise in NOISE.items():
        for n in (32, 64, 128, 256):
            yield f"false gains, {name}, {n} prompts", 0.025, lambda noise=noise, n=n: false_gains(noise, n, scans)
    for n in (8, 16, 32):
        yield (
            f"false gains, {n} clusters of 8 skewed prompts",
            0.025,
            lambda n=n: false_gains(skewed, 8 * n, scans, clusters=n),
        )
    yield "false gains of single wirings, few exact answers, 64 prompts", 0.025, lambda: false_single_gains(scans)
    for n in (32, 64, 128, 256):
        yield f"survived without effect, skewed, {n} prompts", 0.025, lambda n=n: false_survivors(skewed, n, scans)
    for n in (32, 128):
        yield f"intervals that miss, skewed, {n} prompts", 0.05, lambda n=n: misses(skewed, n, scans // 4)
    for n in (32, 128):
        case = f"any interval that misses, of {WIRINGS} that should hold together, skewed, {n} prompts"
        yield case, 0.05, lambda n=n: misses_together(skewed, n, scans)
    for name in ("normal", "skewed (exponential)"):
        for n, effect in ((32, 1.0), (64, 0.6), (128, 0.4), (256, 0.3)):
            yield (
                f"power, {name}, a gain of {effect} SD among {WIRINGS}, {n} prompts",
                "high",
                lambda name=name, n=n, effect=effect: power(NOISE[name], n, effect, scans),
            )


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """A row per case: point, case, nominal, before, after."""
    return [
        {
            "point": "the luck of the best",
            "case": name,
            "nominal": nominal,
            "before": BEFORE.get(name, ""),
            "after": round(read(), 3),
        }
        for name, nominal, read in cases(20 if quick else 200)
    ]
