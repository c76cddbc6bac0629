r"""Find the best spans at a small part of a full scan's cost: rounds that ask more and more about those that may win.

Classical successive halving asks all candidates a few probes, the better half twice as many, and so on. Gains of spans
are noisier than their differences, but alike between neighbours, and between all spans on one probe; so here a probe is
asked of a few spans only, **others in every round**, and ``surgery.scan.kriging`` predicts what a full scan would read.
A round takes the next probes (all groups in turn) and chooses, one after another, the spans whose measurement takes
most uncertainty, per layer that it runs, out of who is among the best: the weight of a span is p (1 - p), with p the
probability that it is one of the ``top``. All spans of a round share their beginnings.

It stops early where nothing beats the unmodified model: where the upper bounds of all spans together (95 %) are below
the least gain that matters. The gains of the best are estimates: optimistic, since they were chosen, or too low where a
gain stands alone among its neighbours. Measure them again on probes that took no part (``surgery.scan.study`` does),
where the usual intervals hold (``benchmarks/simulations/halving.py``).

Of the ten best of a full scan of the same probes, so many are among the first twenty of the search (mean; least), and
so much of the gain of the full scan's best, on other probes, is missed by the best of the search (regret; standard
error). Beside it a full scan of as many probes as cost the same. ``benchmarks/halving.py`` makes the table:

======  ====================================  ====================================
share   bundled model, 128 probes (8 sets)    512 probes (5 sets, twice)
        recall      few   regret       few    recall      few   regret       few
======  ====================================  ====================================
0.05    .41 (.0)    .43   .74 +- .16   .92    .75 (.2)    .65   .40 +- .08   .59
0.10    .78 (.4)    .53   .62 +- .19   .66    .94 (.6)    .62   .05 +- .04   .47
0.15    .85 (.5)    .61   .30 +- .15   .45    .99 (.9)    .61   .00 +- .03   .38
0.25    .88 (.7)    .66   .12 +- .12   .33    .98 (.9)    .74   .02 +- .04   .17
======  ====================================  ====================================

On SmolLM2-135M (arithmetic, random halves of 192 probes, the 219 spans that end at layer 23 or later; a whole plane was
not scanned): recall .98 (.9), 1.00 (1.0), 1.00 (1.0) and 1.00 (1.0) at these shares, regret .19 +- .18, .06 +- .09,
.01 +- .05 and .00.

What limits it is the number of probes: with 128 the ten best of the full scan itself are half luck (another set of
probes has some other ten), and a seventh of their cells does not tell luck apart from luck.

The first-order estimate (``surgery.scan.search.first_order``) is no help as a control variate: on single probes of the
bundled model it explains 1 % of the variance of the gains with one coefficient, and takes 5 % of a full scan.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import norm

from surgery.corpus.probes import ProbeSet
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.scan import execution, kriging, scanning
from surgery.scan.cluster import Cluster, Pool, joined
from surgery.scan.kriging import Prediction
from surgery.scan.search import span_of
from surgery.scan.worth import drawn_together
from surgery.stats import comparisons
from surgery.stats.comparisons import Luck
from surgery.stats.studentised import Units
from surgery.wiring.value import Wiring

ROUNDS = 8
DRAWS = 2000  # of what a full scan might read, given what was measured
_FLOOR = 1e-3  # of a weight: what is left of the budget when all is decided goes to what is known least
LEVEL = 0.95  # of the bounds, all spans together
COLUMNS: dict[str, str] = {
    **{name: meaning for name, meaning in comparisons.COLUMNS.items() if name != "group"},
    "gain": "what a full scan of the search half would read, estimated from the cells that were measured; -inf where a "
    "value is not finite",
    "gain_low": "lower end of its 95 % interval, of a Gaussian model of spans and probes; does not know of the choice",
    "p": "two-sided, by that model, of this row by itself",
    "n_prompts": "how many prompts the row was measured on; 0: estimated from other spans alone",
}
# (round, probes, spans) -> gains: NaN where the unmodified model is not finite, -inf where only the wiring is not
Measure = Callable[[int, Int[np.ndarray, " probe"], Int[np.ndarray, " span"]], Float[np.ndarray, "probe span"]]


@dataclass(frozen=True)
class Effort:
    """What a search ran.

    Attributes:
        executions: layers run, each on one probe; a full scan runs 1 / ``share`` times as many.
        share: of the executions of a full scan of the same probes.
        rounds: how many.
        probes: how many there were to ask.
        stopped: whether it ended early because no span can beat the unmodified model.
    """

    executions: float
    share: float
    rounds: int
    probes: int
    stopped: bool


def rounds(
    measure: Measure,
    spans: Int[np.ndarray, "span 2"],
    groups: Sequence[str],
    n_layers: int,
    share: int | float,
    *,
    top: int = 10,
    least: float = 0.0,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "probe span"], Effort]:
    """Measure cells in rounds, at most a ``share`` of a full scan: gains (NaN where not measured), and the effort.

    Args:
        measure: runs the given spans on the given probes.
        spans: start and stop of every repeated span; more generally of ``:j i:`` the pair (i, j).
        groups: of every probe.
        n_layers: of the model.
        share: of the layer executions of a full scan, above 0 and at most 1.
        top: how many winners are looked for.
        least: the gain below which nothing matters.
        seed: of the order of the probes and of the draws.

    Raises ValueError for another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is the part of a full scan to run, above 0 and at most 1, got {share}")
    rng, n_probes = np.random.default_rng(seed), len(groups)
    order, cost = _in_turn(groups, rng), n_layers - spans[:, 0]  # a repeat shares all before its jump
    full = n_probes * (n_layers + cost.sum())
    gains, spent, stopped = np.full((n_probes, len(spans)), np.nan), 0, False
    weight = np.ones(len(spans))
    fitted = kriging.fit(spans, gains, n_layers)
    predicted = kriging.predict(fitted, gains)
    edges = np.linspace(0, n_probes, min(ROUNDS, n_probes) + 1).round().astype(int)
    for number, (first, stop) in enumerate(itertools.pairwise(edges), start=1):
        budget = (share * full - spent) / (n_probes - first) - n_layers  # of each probe, beside the unmodified model
        chosen = _choose(predicted.covariance, fitted.probe / (stop - first), weight, cost, budget)
        if not len(chosen):
            continue
        probes = np.sort(order[first:stop])
        gains[np.ix_(probes, chosen)] = measure(number, probes, chosen)
        spent += (stop - first) * (n_layers + cost[chosen].sum())
        finite = np.where(np.isfinite(gains), gains, np.nan)
        fitted = kriging.fit(spans, finite, n_layers)
        predicted = kriging.predict(fitted, finite)
        broken = np.isneginf(gains).any(0)
        stopped = number > 1 and bool((_upper(predicted.of_population(fitted, n_probes), rng)[~broken] < least).all())
        if stopped:
            break
        weight = np.where(broken, 0.0, _undecided(predicted, top, rng) + _FLOOR)
    return gains, Effort(float(spent), float(spent / full), number, n_probes, stopped)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        table: a row per span, the best first: ``COLUMNS``.
        luck: what the best would seem to gain by luck.
        effort: what the search ran.
    """

    table: pd.DataFrame
    luck: Luck
    effort: Effort


def search(
    stack: Stack,
    wirings: "Iterable[Wiring | str]",
    probes: ProbeSet,
    share: int | float = 0.15,
    out: "str | Path | None" = None,
    *,
    metric: str = "loglik",
    top: int = 10,
    least: float = 0.0,
    seed: int = 0,
    precision: str = "float32",
    memory: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    cluster: "Cluster | Pool | str | int | None" = None,
) -> Found:
    """Estimate the gain of every span, and find the ``top``, at a ``share`` of a full scan's layer executions.

    Args:
        stack: the model.
        wirings: spans run twice or left out, such as ``every_repeat(n_layers)``.
        probes: what is asked.
        share: of the executions of a full scan of these probes, above 0 and at most 1.
        out: a folder for a CSV file of every round; the same call goes on there, and ends as if never interrupted.
        metric: of ``surgery.scan.METRICS``.
        top, least, seed: as for ``rounds``.
        precision, memory, batch_size, progress, cluster: as for ``scan.run``.

    Raises ValueError for a wiring that is not of the form ``:a b:``, for another share, and as ``scan.run``.
    Cost: ``share`` times that of ``scan.plan`` for the wirings, and some seconds for the predictions. Control: a full
    scan of the same probes, or of as many of them as cost the same.

    >>> from surgery import models
    >>> from surgery.corpus.probes import named
    >>> from surgery.wiring import every_repeat
    >>> found = search(Stack(models.load("babel")), every_repeat(12), named("babel", 16), share=0.25)
    >>> len(found.table), found.effort.share <= 0.25
    (78, True)
    """
    candidates = execution.distinct(stack, wirings)
    spans = np.array([span_of(wiring) for wiring in candidates])

    def measure(number: int, chosen: np.ndarray, asked: np.ndarray) -> np.ndarray:
        few = replace(probes, probes=tuple(probes.probes[probe] for probe in chosen))
        with_names = [candidates[span] for span in asked]
        frame = scanning.run(
            stack,
            with_names,
            few,
            None if out is None else Path(out) / f"round_{number}.csv",
            metrics=(metric,),
            precision=precision,
            memory=memory,
            batch_size=batch_size,
            progress=progress,
            cluster=pool,
        )
        if not np.isfinite(frame["baseline"]).any():
            return np.full((len(chosen), len(asked)), np.nan)
        wide = comparisons.differences(frame, metric).droplevel("group")
        return wide.reindex(index=range(len(chosen)), columns=list(map(str, with_names))).to_numpy()

    groups = [probe.group for probe in probes.probes]
    with nullcontext() if cluster is None else joined(cluster) as pool:  # one for all rounds
        gains, effort = rounds(measure, spans, groups, stack.n_layers, share, top=top, least=least, seed=seed)
    clusters = drawn_together(groups, [probe.cluster for probe in probes.probes])
    table, luck = estimates(gains, spans, stack.n_layers, list(map(str, candidates)), clusters, seed)
    return Found(table, luck, effort)


def estimates(
    gains: Float[np.ndarray, "probe span"],
    spans: Int[np.ndarray, "span 2"],
    n_layers: int,
    names: Sequence[str],
    clusters: Sequence[str] = (),
    seed: int = 0,
) -> tuple[pd.DataFrame, Luck]:
    """What the cells of ``rounds`` tell of every span, the best first (``COLUMNS``), and what luck would.

    ``clusters`` holds a label per probe; errors are larger by as much as probes of one cluster are alike.
    """
    finite, broken = np.where(np.isfinite(gains), gains, np.nan), np.isneginf(gains).sum(0)
    fitted = kriging.fit(spans, finite, n_layers)
    predicted = kriging.predict(fitted, finite).of_population(fitted, len(gains))
    error = np.sqrt(np.diag(predicted.covariance) * _alike(finite, clusters))
    drawn = _noise(predicted.covariance, np.random.default_rng(seed))
    drawn /= np.sqrt(np.diag(predicted.covariance))
    t = predicted.mean / error
    counted = np.where(np.isnan(gains), 0, 1)
    highest, lowest = np.sort(drawn.max(1)), np.sort(drawn.min(1))
    beyond = np.where(t > 0, 1 - np.searchsorted(highest, t) / DRAWS, np.searchsorted(lowest, t) / DRAWS)
    p = np.where(broken > 0, 1.0, 2 * norm.sf(np.abs(t)))
    gain = np.where(broken > 0, -np.inf, predicted.mean)
    half = np.where(broken > 0, np.nan, norm.ppf(0.975) * error)
    labels = np.array(clusters or range(len(gains)))
    table = pd.DataFrame(
        {
            "wiring": list(names),
            "gain": gain,
            "gain_low": predicted.mean - half,
            "gain_high": predicted.mean + half,
            "p": p,
            "p_max": np.where(broken > 0, 1.0, np.clip(2 * beyond, 2 / (DRAWS + 1), 1)),
            "q": comparisons.discoveries(p, gain),
            "n_prompts": counted.sum(0),
            "n_not_finite": broken,
            "n_units": [len(set(labels[asked])) for asked in counted.T.astype(bool)],
        }
    )
    could = (broken == 0) & (t > -np.sqrt(2 * np.log(np.maximum(np.log(len(gains)), 1))))
    luck = np.array([np.nan]) if not could.any() else (drawn * error)[:, could].max(1)
    of_luck = Luck(len(names), len(gains), int((~could).sum()), float(luck.mean()), float(np.quantile(luck, LEVEL)))
    return table.sort_values("gain", ascending=False, kind="stable", ignore_index=True), of_luck


@with_meanings(COLUMNS)
def recall(table: pd.DataFrame, full: pd.DataFrame, metric: str = "loglik", top: int = 10) -> pd.DataFrame:
    """Share of the true ``top`` spans among the best ``top``, 2 and 3 times ``top`` of a search: looked_at, recall.

    ``table`` is what a search found, ``full`` what ``scan.run`` gave for the same wirings and probes.
    """
    best = set(comparisons.differences(full, metric).mean().nlargest(top).index)
    ranked, looked_at = table["wiring"].tolist(), [top, 2 * top, 3 * top]
    return pd.DataFrame({"looked_at": looked_at, "recall": [len(best & set(ranked[:n])) / top for n in looked_at]})


def _alike(gains: np.ndarray, clusters: Sequence[str]) -> float:
    """By how much the variance of a mean over probes is larger because those of one cluster are alike; at least 1."""
    if len(set(clusters)) == len(clusters):
        return 1.0
    there = np.isfinite(gains)
    count = np.maximum(there.sum(0), 1)
    left = np.where(there, gains - np.where(there, gains, 0).sum(0) / count, 0)
    size = np.sqrt((left**2).sum(0) / count)
    of_probe = (left / np.where(size > 0, size, 1)).sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True), 1)
    single, together = (float(Units.of(of_probe, labels).error()[0]) for labels in (None, list(clusters)))
    return max(1.0, (together / single) ** 2) if single > 0 else 1.0


def _undecided(predicted: Prediction, top: int, rng: np.random.Generator) -> Float[np.ndarray, " span"]:
    """p (1 - p), with p the probability that a span is among the ``top`` of a full scan."""
    draws = predicted.mean + _noise(predicted.covariance, rng)
    best = np.partition(draws, -min(top, draws.shape[1]), axis=1)[:, -min(top, draws.shape[1])]
    p = (draws >= best[:, None]).mean(0)
    return p * (1 - p)


def _upper(predicted: Prediction, rng: np.random.Generator) -> Float[np.ndarray, " span"]:
    """Upper bounds of all gains that hold together with probability ``LEVEL``."""
    error = np.sqrt(np.diag(predicted.covariance))
    largest = (_noise(predicted.covariance, rng) / error).max(1)
    return predicted.mean + np.quantile(largest, LEVEL) * error


def _noise(covariance: np.ndarray, rng: np.random.Generator) -> Float[np.ndarray, "draw span"]:
    size, vectors = np.linalg.eigh(covariance)
    return rng.normal(size=(DRAWS, len(size))) @ (vectors * np.sqrt(np.maximum(size, 0))).T


def _choose(
    covariance: np.ndarray, noise: np.ndarray, weight: np.ndarray, cost: np.ndarray, budget: float
) -> Int[np.ndarray, " chosen"]:
    """The spans to measure, each the one that lowers the weighted variance most per layer, within the budget.

    ``covariance`` is of what is known of all spans, ``noise`` of what a round would read.
    """
    known, read, chosen = covariance.copy(), covariance + noise, []
    open_ = weight > 0
    while (fits := open_ & (cost <= budget)).any():
        lowered = weight @ known**2 / np.diag(read) / (cost + 1)  # and a readout
        best = int(np.where(fits, lowered, -np.inf).argmax())
        chosen.append(best)
        open_, budget = open_ & (np.arange(len(cost)) != best), budget - cost[best]
        known = known - np.outer(known[:, best], read[best]) / read[best, best]
        read = read - np.outer(read[:, best], read[best]) / read[best, best]
        read[np.diag_indices(len(read))] += 1e-12 * np.diag(covariance)
    return np.array(sorted(chosen), dtype=int)


def _in_turn(groups: Sequence[str], rng: np.random.Generator) -> Int[np.ndarray, " probe"]:
    """All probes in random order, groups in turn, so that every stretch holds all of them."""
    labels = pd.Series(list(groups))
    shuffled = labels.sample(frac=1, random_state=rng)
    turn = shuffled.groupby(shuffled).cumcount()
    return turn.sort_values(kind="stable").index.to_numpy()
