r"""Do layers fall into parts that an intervention can see: does damage jump where it crosses a boundary?

Swapping two layers of one part should harm less than swapping layers of two parts; skipping, or running in parallel, a
span should harm more than its layers account for where it reaches over a boundary. So damage is regressed on crossing,

    rank of damage = what the layers cost + what the distance costs + beta [crosses a boundary] + residual,

where ranks are normal scores, because damages span orders of magnitude and some are nothing at all. Every layer has a
cost of its own as the first of a span (or of two swapped layers) and one as the last, and so has every distance. (With
one cost for both, chains of layers were found to have parts: there, damage follows from the first alone.) Residuals
of neighbouring pairs are alike, because layers change smoothly with depth; taken for independent they would find a
boundary in anything. They are a Gaussian process over the two indices,

    correlation = rho m(|di| / range) m(|dj| / range), and 1 for a pair with itself,

with m rough, exp(-d), or smooth, (1 + d) exp(-d); m, rho and range are chosen by restricted maximum likelihood, with
the boundaries and without. The test is the likelihood ratio
of the best two boundaries, against its values in draws of the process that fits without them; so the search over places
is in it. With ``counts=(1, 2, 3, 4)`` it looks for two to five parts at once. ``ratio`` says how many times as large
damage is across these boundaries, by the same regression on its logarithm: on asinh(damage / its median standard
error), as some rewirings cost nothing or improve the loss.

Parts are *shown* if p < .05 and damage is at least ``LEAST`` times as large across, with its whole interval.

That ``power`` is low says that a miss says little: it is how often a jump as large as the one that fits best would be
found. First make sure that it finds the parts of a model that was trained to have some. What it finds in simulations
with known answers is in ``docs/validity.md``. No model runs here; damages come from ``surgery.scan`` or the atlas.

>>> import numpy as np
>>> spans = pairs(12)
>>> part = np.searchsorted([4, 8], range(12), side="right")
>>> crossed = np.array([part[i] != part[j] for i, j in spans])
>>> noise = np.random.default_rng(0).lognormal(0, 0.2, (20, len(spans)))
>>> found = parts(noise * np.where(crossed, 3.0, 1.0), spans, "swap", 12, draws=99)
>>> found["parts"], boundaries(found["parts"]), found["p"] < 0.05
(':4 4:8 8:', (4, 8), True)
"""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.linalg import slogdet
from scipy.linalg import solve_triangular
from scipy.stats import norm, rankdata
from threadpoolctl import threadpool_limits

Spans = Sequence[tuple[int, int]]
RHOS = (0.3, 0.6, 0.8, 0.95, 0.99, 0.999)  # and 0
RANGES = (1.0, 2.0, 4.0, 8.0, 16.0)
KERNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rough": lambda d: np.exp(-d),
    "smooth": lambda d: (1 + d) * np.exp(-d),
}
LEAST = 1.5  # times
DRAWS = 499
RESAMPLES = 300
COLUMNS: dict[str, str] = {
    "family": "what was done: swap two layers, skip a span, or run it in parallel",
    "looked_for": "how many parts were looked for",
    "parts": "the parts whose boundaries explain most, as spans of layers",
    "ratio": "how many times as large damage is where it crosses a boundary (1: no difference)",
    "ratio_low": "lower end of its 95 % interval over texts, at these boundaries",
    "ratio_high": "upper end of its 95 % interval",
    "likelihood_ratio": "twice the gain in log likelihood from the best boundaries",
    "p": "share of processes without boundaries that boundaries explain as well",
    "shown": "whether parts are: p < .05, and damage at least 1.5 times as large across",
    "power": "how often a jump of this size would be found (p < .05)",
    "rho": "share of the residual variance that neighbouring pairs have in common",
    "range": "over how many layers they do",
    "kernel": "how: rough, with steps from pair to pair, or smooth",
    "n_pairs": "pairs of layers, or spans",
    "n_prompts": "texts",
}


def pairs(n_layers: int) -> list[tuple[int, int]]:
    """The pairs of layers i < j that can be swapped."""
    return list(combinations(range(n_layers), 2))


def crosses(spans: Spans, boundaries: Sequence[int], family: str) -> Bool[np.ndarray, " span"]:
    """Whether each span lies on both sides of one of the boundaries.

    A span is the two layers of a swap, or else (start, stop).

    >>> crosses([(0, 2), (2, 4)], [2], "swap").tolist(), crosses([(0, 2), (1, 4)], [2], "skip").tolist()
    ([True, False], [False, True])
    """
    first, last = np.array(spans).T
    last = last - (family != "swap")
    return np.any([(first < b) & (last >= b) for b in boundaries], axis=0)


def boundaries(parts: str) -> tuple[int, ...]:
    """The first layer of every part but the first.

    >>> boundaries(":4 4:12 12:")
    (4, 12)
    """
    return tuple(int(span.partition(":")[0]) for span in parts.split()[1:])


@threadpool_limits.wrap(limits=1, user_api="blas")  # small matrices: with threads it takes up to 16 times as long
def parts(
    damage: Float[np.ndarray, "item span"],
    spans: Spans,
    family: str,
    n_layers: int,
    at: Sequence[int] | None = None,
    *,
    counts: Sequence[int] = (2,),
    min_size: int = 2,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the row of ``COLUMNS`` for damages of every span on every text (nats).

    Args:
        spans: the two layers of each swap (``pairs``), or start and stop of each span.
        family: ``swap``, or else a family of spans.
        at: test these boundaries alone, which must not have been read from the same damages; else the best of all
            places that leave ``min_size`` layers in each part are looked for.
        counts: how many boundaries may divide the layers: two make three parts.
        draws: of the process without boundaries; half as many with them, for the power.

    Raises ValueError for damages that are not finite, too few layers to divide, or spans that leave nothing to test.
    """
    if not np.isfinite(damage).all():
        raise ValueError("a damage is not a finite number: leave out that wiring or text")
    places = [tuple(at)] if at else [place for count in counts for place in _placements(n_layers, min_size, count)]
    if not places:
        least = min(counts) + 1
        raise ValueError(f"{n_layers} layers do not divide into {least} parts of {min_size} layers or more")
    test = _Test(spans, family, n_layers, places)
    scale = _scale(damage)
    scores = norm.ppf(rankdata(damage.mean(0)) / (1 + len(spans)))
    generator = np.random.default_rng((seed, 5))
    ratio, grid, place, beta = (part[0].item() for part in test.fit(scores[None]))
    null, spread = test.null(scores)
    process = test.processes[null]
    simulated = test.fit(process.draw(draws, generator) * spread)[0]
    critical = np.quantile(simulated, 0.95)
    planted = test.fit(process.draw(draws // 2 + 1, generator) * spread + max(beta, 0.0) * test.crossing[place])[0]
    weights = generator.multinomial(len(damage), np.full(len(damage), 1 / len(damage)), RESAMPLES) / len(damage)
    resampled = test.slopes(np.arcsinh(weights @ damage / scale), grid, place)
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(damage) > 1 else (np.nan, np.nan)
    p = (1 + (simulated >= ratio).sum()) / (1 + draws)
    row = {
        "family": family,
        "looked_for": " or ".join(str(size) for size in sorted({len(one) + 1 for one in places})),
        "parts": _spans(places[place]),
        "ratio": np.exp(test.slopes(np.arcsinh(damage.mean(0, keepdims=True) / scale), grid, place)[0]),
        "ratio_low": np.exp(low),
        "ratio_high": np.exp(high),
        "likelihood_ratio": ratio,
        "p": p,
        "shown": bool(p < 0.05 and np.exp(low) >= LEAST),
        "power": (planted > critical).mean(),
        "rho": process.rho,
        "range": process.range,
        "kernel": process.kernel,
        "n_pairs": len(spans),
        "n_prompts": len(damage),
    }
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}


def _scale(damage: Float[np.ndarray, "item span"]) -> float:
    """The median standard error of a damage over texts; of one text the median size of damages."""
    error = float(np.median(damage.std(0))) / len(damage) ** 0.5
    return error or float(np.median(np.abs(damage.mean(0)))) or 1.0


def _placements(n_layers: int, min_size: int, count: int) -> list[tuple[int, ...]]:
    """Every ``count`` boundaries that leave ``min_size`` layers in each part."""
    free = n_layers - (count + 1) * (min_size - 1)
    return [
        tuple(place + (n + 1) * (min_size - 1) for n, place in enumerate(places))
        for places in combinations(range(1, free), count)
    ]


def _spans(places: Sequence[int]) -> str:
    ends = ["", *map(str, places), ""]
    return " ".join(f"{start}:{stop}" for start, stop in pairwise(ends))


def _controls(spans: Spans, family: str, n_layers: int) -> Float[np.ndarray, "span column"]:
    """A column for every layer as the first of a span, one for every layer as the last, and one for every distance."""
    first, last = np.array(spans).T
    last = last - (family != "swap")
    layer, distance = np.arange(n_layers), last - first
    sides = [layer == side[:, None] for side in (first, last)]
    return np.concatenate([*sides, distance[:, None] == np.unique(distance)], axis=1).astype(float)


class _Process:
    """One correlation of the residuals: it whitens what is orthogonal to the controls, and draws from itself."""

    def __init__(
        self, rho: float, length: float, kernel: str, apart: np.ndarray, free: np.ndarray, crossing: np.ndarray
    ) -> None:
        self.rho, self.range, self.kernel = rho, length, kernel
        correlation = rho * KERNELS[kernel](apart / length).prod(-1)
        np.fill_diagonal(correlation, 1.0)
        self.root = np.linalg.cholesky(correlation + 1e-9 * np.eye(len(apart)))
        inside = free.T @ correlation @ free
        self.lower = np.linalg.cholesky(inside + 1e-9 * np.eye(len(inside)))
        self.logdet = slogdet(inside)[1]
        whitened = self.whiten(free.T @ crossing.T)
        self.size = np.linalg.norm(whitened, axis=0)  # of each placement's column, as far as controls leave it
        self.columns = whitened / np.where(self.size > 1e-6, self.size, np.inf)

    def whiten(self, free: Float[np.ndarray, "free any"]) -> Float[np.ndarray, "free any"]:
        return solve_triangular(self.lower, free, lower=True)

    def draw(self, count: int, generator: np.random.Generator) -> Float[np.ndarray, "draw span"]:
        return generator.standard_normal((count, len(self.root))) @ self.root.T


class _Test:
    """Everything about the spans that does not depend on the damages."""

    def __init__(self, spans: Spans, family: str, n_layers: int, places: Sequence[tuple[int, ...]]) -> None:
        controls = _controls(spans, family, n_layers)
        left, sizes, _ = np.linalg.svd(controls, full_matrices=True)
        rank = int((sizes > 1e-9 * sizes[0]).sum())
        self.free = left[:, rank:]
        if self.free.shape[1] < 3:
            raise ValueError(f"{len(spans)} spans of {n_layers} layers leave nothing to test: measure more of them")
        self.crossing = np.array([crosses(spans, place, family) for place in places], dtype=float)
        index = np.array(spans)
        apart = np.abs(index[:, None] - index[None])
        settings = [(0.0, 1.0, "rough"), *product(RHOS, RANGES, KERNELS)]
        self.processes = [
            _Process(rho, length, kernel, apart, self.free, self.crossing) for rho, length, kernel in settings
        ]

    def fit(self, logs: Float[np.ndarray, "draw span"]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Likelihood ratio, process and placement with the best boundaries, and beta there, of every draw."""
        free, m = self.free.T @ logs.T, self.free.shape[1]
        without, best = np.full(len(logs), -np.inf), np.full(len(logs), -np.inf)
        grid, place, beta = np.zeros(len(logs), int), np.zeros(len(logs), int), np.zeros(len(logs))
        every = np.arange(len(logs))
        for number, process in enumerate(self.processes):
            w = process.whiten(free)
            squares = (w**2).sum(0)
            along = process.columns.T @ w
            chosen = along.argmax(0)  # damage is larger across: one-sided
            rise = np.maximum(along[chosen, every], 0.0)
            of_process = -0.5 * process.logdet
            without = np.maximum(without, of_process - m / 2 * np.log(squares / m))
            likely = of_process - m / 2 * np.log((squares - rise**2) / m)
            better = likely > best
            best = np.where(better, likely, best)
            grid, place = np.where(better, number, grid), np.where(better, chosen, place)
            beta = np.where(better, rise / np.maximum(process.size[chosen], 1e-9), beta)
        return 2 * (best - without), grid, place, beta

    def null(self, logs: Float[np.ndarray, " span"]) -> tuple[int, float]:
        """The process that fits best without boundaries, and its standard deviation."""
        free, m = self.free.T @ logs, self.free.shape[1]
        squares = [(process.whiten(free[:, None]) ** 2).sum() for process in self.processes]
        likely = [-0.5 * p.logdet - m / 2 * np.log(s / m) for p, s in zip(self.processes, squares)]
        best = int(np.argmax(likely))
        return best, float(np.sqrt(squares[best] / m))

    def slopes(self, logs: Float[np.ndarray, "draw span"], grid: int, place: int) -> Float[np.ndarray, " draw"]:
        """beta of every draw under one process and placement."""
        process = self.processes[grid]
        along = process.columns[:, place] @ process.whiten(self.free.T @ logs.T)
        return along / max(process.size[place], 1e-9)
