"""What a gain is worth: can the model do the task, does a temperature do the same, and is it this span that helps?

A gain in likelihood is not yet a gain in answers. Where a model is wrong and sure of it, whatever makes it less sure
gains nats. So three things stand beside every gain:

* **The baseline and chance** (``baseline``): how often the unmodified model is right, against what the form of the
  question alone gives: one in so many choices; else how often its answers are those of *other* questions of the same
  cluster or group; for running text all tokens alike. A model that is not clearly above chance does not do the task,
  and no wiring of it is a winner.
* **A temperature** (``softened``): the logits of the unmodified model divided by the one number that is best on the
  search half. It changes no first choice. What it gains on the other half, no wiring needs to be thanked for.
* **Controls** (``beside``): for a repeated span those of ``surgery.scan.controls``, on the same probes.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from surgery.corpus.probes import Encoded, Probe, ProbeSet
from surgery.instruments import readout
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.scan import controls, execution, scanning
from surgery.scan.scores import Scorer, predicting
from surgery.stats import bootstrap, comparisons
from surgery.stats.studentised import Units
from surgery.wiring.value import Wiring

LIKELIHOOD = ("loglik", "loss")  # what a temperature can raise
TEMPERATURES = tuple(2 ** (step / 4) for step in range(-4, 17))  # 1/2 to 16
LEAST = {"exact": 0.05, "choice": 0.05, "loss": 0.1}  # that much above chance, at least
LEAST_GAIN = {"loglik": 0.01, "exact": 0.005, "credit": 0.005, "choice": 0.005, "loss": 0.001, "kl": 0.001}
SURE = 0.05
MOST_NOT_FINITE = 0.1  # of the prompts: beyond that the others are no fair sample
RANDOM_SPANS = 5  # beside every winner
CONTROLS_COLUMNS: dict[str, str] = {
    "winner": "the wiring that it stands beside",
    "control": "repeat, random span, damped 0.5, norm-only or linearised",
    "control_wiring": "the order in which the layers ran, or the name of the control",
    **{
        name: f"{meaning}, of the control"
        for name, meaning in comparisons.COLUMNS.items()
        if name not in ("wiring", "group")
    },
    "less": "how much less the control gains than the winner, mean over prompts",
    "less_low": "lower end of its 95 % interval",
    "less_high": "upper end of its 95 % interval",
    "p_less": "of it, family-wise over the controls of this winner",
}


@dataclass(frozen=True)
class Baseline:
    """How well the unmodified model does what it is asked.

    Attributes:
        measure: exact, choice, or loss (running text).
        value: its mean over prompts; ``chance``: what the form of the questions alone gives.
        above: by how much it is better than chance, ``low`` to ``high`` its 95 % interval.
        prompts: how many; ``units``: of how many independent units.
        scored: the mean of the metric that is scanned, ``metric``.
        not_finite: on how many more prompts the model gives no finite number; they are left out of all of these.
    """

    measure: str
    value: float
    chance: float
    above: float
    low: float
    high: float
    prompts: int
    units: int
    metric: str
    scored: float
    not_finite: int = 0

    @property
    def sound(self) -> bool:
        """Whether the model gives finite numbers on all but ``MOST_NOT_FINITE`` of the prompts."""
        return self.not_finite <= MOST_NOT_FINITE * (self.prompts + self.not_finite)

    @property
    def done(self) -> bool:
        """Whether the task is done: above chance by more than ``LEAST``, as far as a fair sample shows."""
        return self.sound and self.low > LEAST[self.measure]


def measure_of(probe_set: ProbeSet) -> str:
    """In what right answers are counted: ``choice`` if there are choices, ``loss`` for running text, else ``exact``."""
    if all(not probe.prompt for probe in probe_set.probes):
        return "loss"
    return "choice" if any(probe.choices for probe in probe_set.probes) else "exact"


def baseline(stack: Stack, probe_set: ProbeSet, metric: str, seed: int = 0) -> Baseline:
    """The unmodified model against chance, on all probes.

    Cost: 1 F of the probes, and for free answers 1 F more with the answers of other questions.

    Raises ValueError if the model gives no finite number on any of them.
    """
    measure = measure_of(probe_set)
    encoded = probe_set.encode(stack)
    rows = scanning.run(stack, [":"], encoded, metrics=tuple(dict.fromkeys((measure, metric))))
    broken = rows.loc[~np.isfinite(rows["value"]), "prompt"].unique()
    if len(broken) == len(probe_set):
        raise ValueError(f"{stack.name} gives no finite number on any of {len(broken)} probes: look at its weights")
    scored = float(rows.loc[(rows["metric"] == metric) & ~rows["prompt"].isin(broken), "value"].mean())
    rows = rows[rows["metric"] == measure].reset_index(drop=True)
    if measure == "loss":
        rows["baseline"] = math.log(stack.d_vocab)
    elif measure == "choice":
        rows["baseline"] = [1 / len(probe.answers) for probe in probe_set.probes]
    else:
        other = scanning.run(stack, [":"], swapped(probe_set, seed), metrics=(measure,))
        rows["baseline"] = other["value"].fillna(0).to_numpy()  # no finite number is no right answer
    rows = clustered(rows[~rows["prompt"].isin(broken)], encoded)
    above, low, high, units = _above(rows, measure, seed)
    return Baseline(
        measure=measure,
        value=float(rows["value"].mean()),
        chance=float(rows["baseline"].mean()),
        above=above,
        low=low,
        high=high,
        prompts=len(rows),
        units=units,
        metric=metric,
        scored=scored,
        not_finite=len(broken),
    )


def _above(rows: pd.DataFrame, measure: str, seed: int) -> tuple[float, float, float, int]:
    """How much better than chance, with its percentile interval, and the units; no interval (NaN) from a single one.

    Not bootstrap-t: nearly all answers may be right, and a resample without a wrong one would have no spread.
    """
    better = comparisons.differences(rows, measure).to_numpy()
    units = Units.of(better, rows["cluster"])
    drawn = bootstrap.weights(len(units), comparisons.RESAMPLES, seed).numpy()
    above, low, high = bootstrap.interval(torch.from_numpy((drawn @ units.total) / (drawn @ units.count))[:, 0])
    return (above, low, high, len(units)) if len(units) > 1 else (above, math.nan, math.nan, 1)


def swapped(probe_set: ProbeSet, seed: int = 0) -> ProbeSet:
    """Every question with the answer of another one: of its cluster if there is another, else of its group, else any.

    >>> two = ProbeSet("two", (Probe("1 + 1 =", "2"), Probe("1 + 2 =", "3")))
    >>> [probe.answer for probe in swapped(two).probes]
    ['3', '2']
    """
    generator = random.Random(f"swapped {seed}")
    kinds = [
        [(probe.cluster, probe.group) for probe in probe_set.probes],
        [("", probe.group) for probe in probe_set.probes],
        [("", "")] * len(probe_set),
    ]
    partner: dict[int, int] = {}
    for kind in kinds:
        members = defaultdict(list)
        for place, label in enumerate(kind):
            if place not in partner:
                members[label].append(place)
        for places in members.values():
            if len(places) > 1:
                turned = generator.sample(places, len(places))
                partner |= dict(zip(turned, turned[1:] + turned[:1], strict=True))
    probes = [
        Probe(probe.prompt, probe_set.probes[partner.get(place, place)].answer, probe.group)
        for place, probe in enumerate(probe_set.probes)
    ]
    return replace(probe_set, name=f"{probe_set.name}, answers of other questions", probes=tuple(probes))


def clustered(rows: pd.DataFrame, encoded: Encoded) -> pd.DataFrame:
    """The rows of a scan with a column ``cluster``: ``drawn_together`` of their probes."""
    return rows.assign(cluster=np.array(drawn_together(encoded.groups, encoded.clusters))[rows["prompt"]])


def drawn_together(groups: Sequence[str], clusters: Sequence[str]) -> list[str]:
    """A label per probe: those with the same one are drawn together when luck is judged.

    Probes that name clusters are drawn by these; probes of many groups by their groups; else each by itself.
    """
    if not any(clusters) and comparisons.FEW_CLUSTERS <= len(set(groups)) < len(groups):
        return list(groups)
    return [label or f"probe {place}" for place, label in enumerate(clusters or [""] * len(groups))]


def softened(
    stack: Stack, search: Encoded, validation: Encoded, metric: str, memory: int | None = None
) -> tuple[float, Float[np.ndarray, " probe"]]:
    """The best temperature of the search half, and the value of the metric at it for every validation probe.

    The logits of the unmodified model are divided by it. Probes on which that is not finite take no part in the choice.
    Cost: 1 F of both halves.

    Raises ValueError for a metric that a temperature does not raise.
    """
    if metric not in LIKELIHOOD:
        raise ValueError(f"a temperature changes {' and '.join(LIKELIHOOD)}, not {metric}")
    chosen, measured = (_by_temperature(stack, half, metric, memory) for half in (search, validation))
    means = chosen[:, np.isfinite(chosen[TEMPERATURES.index(1)])].mean(1)
    means = -means if metric in comparisons.LESS_IS_BETTER else means
    best = int(np.where(np.isfinite(means), means, -np.inf).argmax())
    return TEMPERATURES[best], measured[best]


def _by_temperature(
    stack: Stack, encoded: Encoded, metric: str, memory: int | None
) -> Float[np.ndarray, "temperature probe"]:
    values = np.empty((len(TEMPERATURES), len(encoded.groups)))
    for portion in execution.portions(stack, encoded, memory):
        rows = [row for row, choice in enumerate(portion.choice) if choice == 0]
        context = stack.context(portion.tokens.to(stack.device))
        final = stack.execute(":", context.x0, context)[rows]
        scored = portion.scored[rows].to(stack.device)
        targets, row = portion.tokens.ids[rows].to(stack.device)[scored], scored.nonzero()[:, 0].cpu()
        final, total = final[predicting(scored)], torch.zeros(len(TEMPERATURES), len(rows), dtype=torch.float64)
        for chunk in readout.portions(stack, final):
            logits = readout.logits(stack, final[chunk])
            for place, temperature in enumerate(TEMPERATURES):
                log_p = (logits / temperature).log_softmax(-1).gather(1, targets[chunk].unsqueeze(1)).squeeze(1)
                total[place].index_add_(0, row[chunk.cpu()], log_p.double().cpu())
        of_portion = -total / torch.bincount(row, minlength=len(rows)) if metric == "loss" else total
        values[:, portion.prompts] = of_portion.numpy()
    return values


def beyond_temperature(
    validated: pd.DataFrame, softer: Float[np.ndarray, " probe"], metric: str, seed: int = 0
) -> pd.DataFrame:
    """For every wiring: what the temperature gains, and how much more the wiring does; p_max over them.

    ``validated`` is ``clustered``. Columns: wiring, temperature, beyond, beyond_low, beyond_high, p_beyond.
    """
    rows = validated[validated["metric"] == metric]
    against = rows.assign(baseline=softer[rows["prompt"]])
    gained = comparisons.differences(rows.assign(value=against["baseline"]), metric).mean()
    more = comparisons.table(against, metric, seed=seed, cluster="cluster")
    return pd.DataFrame(
        {
            "wiring": more["wiring"],
            "temperature": more["wiring"].map(gained),
            "beyond": more["gain"],
            "beyond_low": more["gain_low"],
            "beyond_high": more["gain_high"],
            "p_beyond": more["p_max"],
        }
    )


def judged(winners: pd.DataFrame, baseline: Baseline) -> pd.Series:
    """The verdicts of ``comparisons.winners``, withdrawn where a gain is none of the wiring's.

    ======================  =========================================================================================
    not above chance        the model does not do the task: what gains is not the task
    not finite              the model gives no finite number on too many prompts (``MOST_NOT_FINITE``)
    as a temperature        confirmed, but not shown to gain more than the best temperature of the unmodified model
    too small               confirmed, and less than ``LEAST_GAIN``
    ======================  =========================================================================================
    """
    verdict = winners["verdict"].copy()
    survived = verdict.str.startswith("survived")
    if "p_beyond" in winners:
        verdict[survived & ~((winners["p_beyond"] < SURE) & (winners["beyond"] > 0))] = "as a temperature"
    verdict[survived & (winners["gain_validation"] < LEAST_GAIN.get(baseline.metric, 0))] = "too small"
    if not baseline.done:
        verdict[verdict != "no gain"] = "not above chance" if baseline.sound else "not finite"
    return verdict


@with_meanings(CONTROLS_COLUMNS)
def beside(
    stack: Stack, winner: Wiring, encoded: Encoded, metric: str, *, seed: int = 0, memory: int | None = None
) -> pd.DataFrame:
    """The controls of a repeated span on the probes that confirm it: ``CONTROLS_COLUMNS``; no row for another wiring.

    Random spans of that length, half of the second pass, the stream resized, the second pass linearised. Cost: some
    ten wirings; less where a model cannot be linearised, which is then left out.
    """
    span = winner.repeated_span()
    if span is None:
        return pd.DataFrame(columns=list(CONTROLS_COLUMNS))
    listed = controls.repeats(stack.n_layers, *span, count=RANDOM_SPANS, factors=(0.5,), seed=seed)
    rows = scanning.run(stack, listed["wiring"].unique(), encoded, metrics=(metric,), memory=memory)
    streams = by_streams(stack, encoded, *span, (metric,), memory)
    names = streams["wiring"].unique()
    listed = pd.concat([listed, pd.DataFrame({"control": names, "wiring": names})], ignore_index=True)
    unmodified = rows[rows["wiring"] == rows["wiring"].iloc[0]].set_index("prompt")["baseline"]  # NaN: left out below
    rows = pd.concat([rows, streams.assign(baseline=streams["prompt"].map(unmodified))], ignore_index=True)
    rows = clustered(rows, encoded)
    own = rows[rows["wiring"] == str(winner)].set_index("prompt")["value"]
    other = rows[rows["wiring"] != str(winner)]
    theirs = other["value"].where(np.isfinite(other["baseline"]))
    against = other.assign(value=other["prompt"].map(own), baseline=theirs)  # so that less is above 0
    less = comparisons.table(against, metric, seed=seed, cluster="cluster").set_index("wiring")
    table = listed.merge(comparisons.table(rows, metric, seed=seed, cluster="cluster"), on="wiring")
    table.insert(0, "winner", str(winner))
    for name, column in (("less", "gain"), ("less_low", "gain_low"), ("less_high", "gain_high"), ("p_less", "p_max")):
        table[name] = table["wiring"].map(less[column])
    return table.rename(columns={"wiring": "control_wiring"})[list(CONTROLS_COLUMNS)]


def by_streams(
    stack: Stack, encoded: Encoded, start: int, stop: int, metrics: Sequence[str], memory: int | None = None
) -> pd.DataFrame:
    """The controls that no wiring expresses, ``norm-only`` and ``linearised``, as rows of a scan without a baseline."""
    kinds = {"norm-only": controls.norm_only, "linearised": controls.linearised}
    parts = []
    for portion in execution.portions(stack, encoded, memory):
        scorer = Scorer(stack, portion, metrics)
        for name, control in kinds.items():
            try:
                x = control(stack, start, stop, scorer.context)
            except controls.NoDerivativeError:
                continue
            parts.append(scorer.rows(name, x))
    return pd.concat(parts).sort_values("prompt", kind="stable", ignore_index=True)
