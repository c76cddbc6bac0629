"""One scan from end to end: search with half of the probes, the winners again on the other half. ``surgery scan``.

    scan_search.csv       a row per wiring, probe and metric of the search half         (surgery.scan)
    scan_table.csv        a row per wiring: gain, interval, p, p_max, q                 (surgery.stats.comparisons)
    scan_validation.csv   the winners on the other half
    scan_winners.csv      both halves side by side, and how much of the search gain survived
    scan_groups.csv       the winners in every group of the validation half, if there are several
    scan_controls.csv     beside every confirmed repeat: random spans, a damped pass and so on  (surgery.scan.worth)
    painters.csv          the table by variant and size of the window (family ``painters``)

With a ``share`` below 1 the search half is not scanned whole but searched in rounds (``surgery.scan.halving``). Then
the table holds estimates, and in place of the first file there is ``scan_rounds/round_1.csv`` and so on.

With a ``budget`` of time the share, the precision of the search and, if need be, the number of probes are chosen so
that all of it fits (``surgery.scan.levels``); ``scan_plan.json`` holds what was chosen.

What holds a row per probe survives a kill: the same command goes on where it was. ``surgery.report.build`` makes the
page of them: the findings in sentences, ``brain_scan.png`` (repeats), ``pareto.png``, ``group_bars.png``,
``painters.png``.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from surgery import disk, plugins
from surgery.corpus import probes
from surgery.corpus.asked import TEXT, require_questions
from surgery.corpus.probes import Encoded, ProbeSet
from surgery.corpus.text_files import LINES
from surgery.models.half_precision import named
from surgery.models.loading import load
from surgery.models.stack import Stack
from surgery.planning.budget import seconds_of
from surgery.planning.plans import Plan
from surgery.records import tables
from surgery.records.manifest import manifest
from surgery.scan import controls, execution, halving, levels, scanning, worth
from surgery.scan import say as sentences
from surgery.scan.cluster import Cluster, Pool, joined
from surgery.scan.halving import Effort
from surgery.scan.levels import SEARCHED, TOP
from surgery.stats import comparisons
from surgery.wiring import families
from surgery.wiring.value import Wiring

SEARCH, VALIDATION, ROUNDS = "scan_search.csv", "scan_validation.csv", "scan_rounds"
TABLE: str = "scan_table.csv"
WINNERS: str = "scan_winners.csv"
GROUPS: str = "scan_groups.csv"
CONTROLS: str = "scan_controls.csv"
PAINTERS: str = "painters.csv"
FAMILIES: dict[str, Callable[[int], Any]] = {
    **families.EVERY,
    families.PAINTERS: lambda n_layers: controls.painters(n_layers)["wiring"].unique(),
}
FEWEST = 4  # probes: two to search with, two to measure again on
MAX_TOKENS = 128  # where running text is cut
BESIDE = (
    *("answers", "answers_low", "answers_high", "temperature", "by_temperature"),
    *("beyond", "beyond_low", "beyond_high", "p_beyond"),
)
WINNERS_COLUMNS: dict[str, str] = {
    **comparisons.COLUMNS,
    **{
        f"{name}_{half}": f"{meaning}; {half} half"
        for name, meaning in comparisons.COLUMNS.items()
        for half in ("search", "validation")
    },
    "survived": "gain on the validation half as a share of the gain on the search half",
    "survived_low": "lower end of its 95 % interval, that of the validation gain",
    "survived_high": "upper end of its 95 % interval",
    "answers": "gain on the validation half in right answers (exact, choice; credit for text)",
    "answers_low": "lower end of its 95 % interval",
    "answers_high": "upper end of its 95 % interval",
    "temperature": "gain there of the best temperature of the unmodified model, chosen on the search half",
    "by_temperature": "the same as a share of the gain of the wiring; above 1 where it gains more",
    "beyond": "how much more the wiring gains there than the temperature",
    "beyond_low": "lower end of its 95 % interval",
    "beyond_high": "upper end of its 95 % interval",
    "p_beyond": "of it, family-wise over the winners",
    "verdict": "what became of the gain: survived, survived in part, vanished, undecided, reversed, not finite or no "
    "gain; or withdrawn: not above chance, as a temperature, too small",
}
PAINTERS_COLUMNS: dict[str, str] = {
    **comparisons.COLUMNS,
    "variant": "what was done to the window: skip, middle-repeat, reverse, random order, parallel mean or sum, looped",
    "size": "layers in the window, which is centred",
}


@dataclass(frozen=True)
class ScanResult:
    """What a scan found.

    Attributes:
        table: every wiring on the search half.
        winners: the best of them on both halves.
        groups: the winners by group on the validation half; empty where the probes are of one group.
        luck: what the best would gain by luck.
        metric: in which all of these are measured.
        baseline: how well the unmodified model does the task, against chance.
        controls: what stands beside every confirmed repeat.
        effort: what a search in rounds ran; None after a full scan.
        plan: the budget and what was cut to fit into it, see ``measure``; None without a budget.
    """

    table: pd.DataFrame
    winners: pd.DataFrame
    groups: pd.DataFrame
    luck: comparisons.Luck
    metric: str
    baseline: worth.Baseline
    controls: pd.DataFrame
    effort: Effort | None = None
    plan: Mapping[str, Any] | None = None

    @property
    def sentences(self) -> list[str]:
        """The findings, and their limits."""
        return [
            *sentences.findings(self.table, self.winners, self.luck, self.baseline, self.controls, self.effort),
            *sentences.best_groups(self.groups, self.baseline),
            *self.limits,
        ]

    @property
    def limits(self) -> list[str]:
        """What the scan leaves open."""
        notes = sentences.limits(self.table, self.winners, self.effort) if self.baseline.done else []
        return notes + sentences.planned(self.plan)


def run(
    model: str = "babel",
    family: str = "repeat",
    questions: str | None = None,
    out: "str | Path" = "results",
    *,
    text: "str | Path | None" = None,
    metric: str | None = None,
    count: int = 256,
    share: int | float | None = None,
    top: int = TOP,
    seed: int = 0,
    precision: str | None = None,
    budget: str | None = None,
    memory: int | None = None,
    batch_size: int | None = None,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    cluster: "Cluster | Pool | str | int | None" = None,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> ScanResult:
    """Scan every wiring of a family, measure the winners again on fresh probes, and write the tables to ``out``.

    Args:
        model: what ``surgery.load`` takes.
        family: which wirings, of ``FAMILIES`` or of an installed package (``surgery.plugins``).
        questions: a probe set (``surgery.corpus.probes.named``), a JSONL file of questions, or a ``.txt`` file of
            running text, one text a line. The bundled models are asked ``babel`` by default; others have none.
        text: in place of ``questions``, running text from a file as of ``surgery study``.
        out: folder for the results, made if need be; the same one resumes a scan that was killed.
        metric: of ``surgery.scan.METRICS``; by default ``loss`` for running text, else ``loglik``.
        count: probes of a built-in set, both halves together.
        share: of the layer executions of a full scan: below 1 the best are searched in rounds (``scan.halving``). By
            default 1, or what fits into the budget; with a budget, at most so much.
        top: how many winners to measure again.
        seed: of the built-in set, the halves and all resamples.
        precision: of the search, as for ``scan.run``; the winners are always measured again in float32. By default
            float32, or with a budget bf16 where the machine is faster in it.
        budget: time to stay within, such as ``10m``; ``none`` or None for no limit. Then fewer probes may be asked,
            spread over all of them. A scan that was begun in the folder goes on with its plan.
        memory, batch_size, cluster, progress: as for ``scan.run``.
        device, dtype, offload: as for ``surgery.load``.
        say: is called with a sentence when a step begins.

    Raises:
        ValueError: an unknown family, metric or probe set, none named for a model without its own, fewer than 4
            different probes, what is no budget or one into which nothing fits, or a share that is not above 0 and at
            most 1, or below 1 for a family without spans.
        OSError: ``out`` cannot be written to.
    """
    began, seconds = time.monotonic(), None if budget is None else seconds_of(budget)
    _check_family(family, 1 if share is None else share)
    probe_set, plan = asked(model, questions, count, seed, text=text), None
    with disk.held(out) as folder:
        say(f"opening {model}")
        stack = Stack(load(model, device=device, dtype=dtype, offload=offload))
        if probe_set.max_tokens is not None:
            probe_set = replace(probe_set, max_tokens=min(probe_set.max_tokens, stack.n_ctx))
        if seconds is not None:
            of_metric = metric or metric_of(probe_set)
            made, again = levels.plan(
                stack,
                probe_set,
                tuple(_wirings(stack, family, None)),
                folder,
                family=family,
                budget=seconds,
                began=began,
                share=share,
                precision=precision,
                top=top,
                asked={"metric": of_metric, "seed": seed, "memory": memory, "batch_size": batch_size},
            )
            say(f"going on with the plan in {folder / levels.FILE}" if again else str(made))
            fewer = asked(model, questions, made.prompts, seed, text=text)
            probe_set = replace(probe_set, probes=_spread(fewer.probes, made.prompts))
            share, precision = (made.parts[0].settings[name] for name in ("share", "precision"))
            plan = {"budget": seconds, "expected": made.seconds, "cuts": _cuts(made)}
        with nullcontext() if cluster is None else joined(cluster) as pool:  # one for both halves
            return measure(
                stack,
                probe_set,
                folder,
                family,
                metric=metric or metric_of(probe_set),
                share=1 if share is None else share,
                top=top,
                seed=seed,
                precision=precision or "float32",
                memory=memory,
                batch_size=batch_size,
                cluster=pool,
                plan=plan,
                say=say,
                progress=progress,
            )


@contextmanager
def _told_in_sentences() -> Iterator[None]:
    """No warnings of what is not finite, as the findings say it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scanning.NotFiniteWarning)
        yield


@_told_in_sentences()
def measure(
    stack: Stack,
    probe_set: ProbeSet,
    out: "str | Path",
    family: str = "repeat",
    *,
    metric: str = "loglik",
    longest: int | None = None,
    share: int | float = 1,
    top: int = 10,
    seed: int = 0,
    precision: str = "float32",
    memory: int | None = None,
    batch_size: int | None = None,
    cluster: "Cluster | Pool | str | int | None" = None,
    plan: Mapping[str, Any] | None = None,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> ScanResult:
    """Do what ``run`` does on an opened model; with ``longest``, only wirings of at most so many layers more.

    ``plan`` is told in the manifest and among the limits: ``budget`` in seconds, ``cuts`` in words.

    Raises ValueError for an unknown family or metric, fewer than 4 different probes, and a ``share`` as ``run``.
    """
    _check_family(family, share)
    if len(set(probe_set.probes)) < FEWEST:
        raise ValueError(
            f"a scan needs at least {FEWEST} different probes, half of them to validate on, and {probe_set.name} has "
            f"{len(set(probe_set.probes))}; give more"
        )
    with disk.held(out) as folder:
        halves = probe_set.split(seed)
        search, validation = (half.encode(stack) for half in halves)
        wirings = _wirings(stack, family, longest)

        def scan(
            candidates: Sequence[Wiring], half: Encoded, name: str, *metrics: str, precision: str = "float32"
        ) -> pd.DataFrame:
            rows = scanning.run(
                stack,
                candidates,
                half,
                folder / name,
                metrics=metrics,
                precision=precision,
                memory=memory,
                batch_size=batch_size,
                progress=progress,
                cluster=cluster,
            )
            return worth.clustered(rows, half)

        baseline = worth.baseline(stack, probe_set, metric, seed)
        say(sentences.baseline(baseline))
        say(str(execution.plan(stack, wirings, search, memory)))
        effort = None
        if share < 1:
            say(f"{100 * share:g} % of these, in rounds")
            estimated = halving.search(
                stack,
                wirings,
                halves[0],
                share,
                folder / ROUNDS,
                metric=metric,
                top=top,
                least=worth.LEAST_GAIN.get(metric, 0),
                seed=seed,
                precision=precision,
                memory=memory,
                batch_size=batch_size,
                progress=progress,
                cluster=cluster,
            )
            table, luck, effort = estimated.table, estimated.luck, estimated.effort
        else:
            searched = scan(wirings, search, SEARCH, metric, precision=precision)
            table = comparisons.table(searched, metric, seed=seed, cluster="cluster")
            luck = comparisons.expected_best(searched, metric, seed=seed, cluster="cluster")
        best = table[table["wiring"] != ":"].nlargest(top, "gain")["wiring"].tolist()
        say(f"the {len(best)} best again, on probes that took no part in the choice")
        by_name = {str(wiring): wiring for wiring in wirings}
        answers = {"loss": "credit"}.get(baseline.measure, baseline.measure)
        beside = (answers,) if metric in worth.LIKELIHOOD else ()
        validated = scan([by_name[name] for name in best], validation, VALIDATION, metric, *beside)
        winners = comparisons.confirmed(table, validated, metric, top=top, seed=seed, cluster="cluster")
        if beside:
            right = comparisons.table(validated, answers, seed=seed, cluster="cluster").set_index("wiring")
            ends = {"answers": "gain", "answers_low": "gain_low", "answers_high": "gain_high"}
            winners = winners.assign(**{name: winners["wiring"].map(right[column]) for name, column in ends.items()})
            softer = worth.softened(stack, search, validation, metric, memory)[1]
            winners = winners.merge(worth.beyond_temperature(validated, softer, metric, seed), on="wiring")
            gained = winners["gain_validation"].where(winners["gain_validation"] > 0)
            winners["by_temperature"] = winners["temperature"] / gained
        winners["verdict"] = worth.judged(winners, baseline)
        found = [name for name in winners if name not in (*BESIDE, "verdict")]
        winners = winners.reindex(columns=[*found, *BESIDE, "verdict"])
        confirmed = winners.loc[winners["verdict"].str.startswith("survived"), "wiring"]
        parts = [worth.beside(stack, by_name[name], validation, metric, seed=seed, memory=memory) for name in confirmed]
        against = pd.concat(
            [part for part in parts if len(part)] or [pd.DataFrame(columns=list(worth.CONTROLS_COLUMNS))]
        )
        own = "cluster" if any(validation.clusters) else None  # else a group may be a cluster
        groups = comparisons.table(validated, metric, seed=seed, by_group=True, cluster=own)
        groups = groups if groups["group"].nunique() > 1 else groups.iloc[:0]
        settings: dict[str, Any] = {
            "family": family,
            "metric": metric,
            "luck": asdict(luck),
            "baseline": asdict(baseline),
            "effort": effort and asdict(effort),
            **({} if plan is None else {"plan": dict(plan)}),
        }
        of_search, of_validation = (
            manifest(stack, half.tokens, seed=seed, precision=named(stack, numbers), **settings)
            for half, numbers in ((search, precision), (validation, "float32"))
        )
        tables.write(table, folder / TABLE, of_search, halving.COLUMNS if effort else comparisons.COLUMNS)
        tables.write(winners, folder / WINNERS, of_search, WINNERS_COLUMNS)
        tables.write(groups, folder / GROUPS, of_validation, comparisons.COLUMNS)
        tables.write(against, folder / CONTROLS, of_validation, worth.CONTROLS_COLUMNS)
        if family == families.PAINTERS:
            variants = controls.painters(stack.n_layers).merge(table, on="wiring")
            tables.write(variants, folder / PAINTERS, of_search, PAINTERS_COLUMNS)
        return ScanResult(table, winners, groups, luck, metric, baseline, against, effort, plan)


def painters(
    stack: Stack,
    probe_set: ProbeSet,
    out: "str | Path | None" = None,
    *,
    metric: str = "loglik",
    sizes: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Compare the reorder family of Sun et al. (2024, arXiv 2407.09298) with the unmodified model on all probes.

    Skip, middle-repeat, reverse, random order (one wiring per ``seeds``), parallel mean and sum, looped parallel, over
    centred windows of ``sizes`` layers: variant, size, wiring, gain with interval, p, p_max, q, n_prompts. Nothing is
    chosen here, so no probes are held back. ``out`` is a CSV file for the rows of every probe, as of ``scan.run``.
    ``surgery.scan.draw.painters`` draws the result.

    Cost: ``scan.plan`` of the wirings; about 50 F for all sizes of 12 layers. Control: the unmodified model, and random
    orders beside the reverse.

    >>> table = painters(Stack(load("babel")), probes.named("babel", 4), sizes=[2], seeds=[0])
    >>> table["variant"].tolist()
    ['skip', 'middle-repeat', 'reverse', 'random order', 'parallel mean', 'parallel sum', 'looped parallel']
    """
    variants = controls.painters(stack.n_layers, sizes, seeds)
    rows = scanning.run(stack, variants["wiring"].unique(), probe_set, out, metrics=(metric,), progress=progress)
    return variants.merge(comparisons.table(rows, metric, seed=seed), on="wiring")


def metric_of(probe_set: ProbeSet) -> str:
    """The metric that probes are scanned in unless another is asked for: ``loss`` of running text, else ``loglik``."""
    return "loss" if worth.measure_of(probe_set) == "loss" else "loglik"


def asked(
    model: str,
    questions: str | None,
    count: int,
    seed: int,
    max_tokens: int = MAX_TOKENS,
    text: "str | Path | None" = None,
) -> ProbeSet:
    """What the model is asked: a built-in set, a file of questions, or running text, cut to ``max_tokens``.

    Raises ValueError, in words, where nobody said so, or both ``questions`` and ``text`` do.
    """
    if text is not None:
        if questions is not None:
            raise ValueError(f"a scan asks questions ({questions}) or scores running text ({text}): give one of them")
        return probes.text(text, count, max_tokens)
    if questions is None:
        require_questions(model, None)
        return probes.named("babel", count, seed)
    kind = Path(questions).suffix.lower()
    if kind == TEXT:
        return probes.text(questions, count, max_tokens)
    return probes.load(questions) if kind in LINES else probes.named(questions, count, seed)


def _spread(found: tuple[probes.Probe, ...], count: int) -> tuple[probes.Probe, ...]:
    """``count`` probes spread evenly over all: a file may hold one kind after the other."""
    return tuple(found[place * len(found) // count] for place in range(min(count, len(found))))


def _cuts(made: Plan) -> list[str]:
    """What the plan of a scan leaves out, in words."""
    (part,) = made.parts
    fewer = [f"{made.prompts} of {made.asked[0]} probes"] if made.prompts < made.asked[0] else []
    return fewer + ([f"without {part.cut}"] if part.cut else [])


def _check_family(name: str, share: int | float) -> None:
    if name not in (every := plugins.names("families", FAMILIES)):
        raise ValueError(f"there is no family {name!r}; there are {', '.join(every)}")
    if name not in FAMILIES:
        plugins.installed("families", FAMILIES)[name].load()  # before a model is opened
    if not 0 < share <= 1:
        raise ValueError(f"share is the part of a full scan to run, above 0 and at most 1, got {share}")
    if share < 1 and name not in SEARCHED:
        raise ValueError(
            f"a share of a scan is searched in {' or '.join(SEARCHED)}, whose wirings have neighbours, not in {name}; "
            "scan all of it with share 1"
        )


def _members(family: str, n_layers: int) -> list[Wiring | str]:
    """The wirings of a family, built in or of an installed package."""
    if family in FAMILIES:
        return list(FAMILIES[family](n_layers))
    plugin = plugins.installed("families", FAMILIES)[family]
    every = plugin.load()
    try:
        return list(every(n_layers))
    except Exception as error:  # a package of somebody else's can raise anything
        raise plugin.error(error) from error


def _wirings(stack: Stack, family: str, longest: int | None) -> list[Wiring]:
    """The wirings of a family, parsed, that run at most ``longest`` layers more than the model."""
    wirings = execution.distinct(stack, _members(family, stack.n_layers))
    return [wiring for wiring in wirings if longest is None or wiring.depth <= stack.n_layers + longest]
