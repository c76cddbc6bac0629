"""One scan from end to end: search with half of the probes, the winners again on the other half. ``surgery scan``.

    scan_search.csv       a row per wiring, probe and metric of the search half         (surgery.scan)
    scan_table.csv        a row per wiring: gain, interval, p, p_max, q                 (surgery.stats.comparisons)
    scan_validation.csv   the winners on the other half
    scan_winners.csv      both halves side by side, and how much of the search gain survived
    scan_groups.csv       the winners in every group of the validation half, if there are several
    painters.csv          the table by variant and size of the window (family ``painters``)

The first and third survive a kill: the same command goes on where it was. ``run`` ends with the page of
``surgery.report``: what was found in sentences, ``brain_scan.png`` (repeats), ``pareto.png``, ``group_bars.png``,
``painters.png``.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from surgery.corpus import probes
from surgery.corpus.probes import ProbeSet
from surgery.models.loading import load
from surgery.models.stack import Stack
from surgery.records import manifest as provenance
from surgery.records import tables
from surgery.scan import controls
from surgery.scan import say as scan_findings
from surgery.scan import scanning as scan
from surgery.scan.cluster import Cluster, Pool, joined
from surgery.stats import comparisons
from surgery.wiring import families
from surgery.wiring.value import Wiring

SEARCH = "scan_search.csv"
TABLE: str = "scan_table.csv"
WINNERS: str = "scan_winners.csv"
GROUPS: str = "scan_groups.csv"
PAINTERS: str = "painters.csv"
FAMILIES: dict[str, Callable[[int], Any]] = {
    **families.EVERY,
    families.PAINTERS: lambda n_layers: controls.painters(n_layers)["wiring"].unique(),
}
FEWEST = 4  # probes: two to search with, two to measure again on
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
    "verdict": "what became of the gain: survived, survived in part, vanished, undecided, reversed or no gain",
}
PAINTERS_COLUMNS: dict[str, str] = {
    **comparisons.COLUMNS,
    "variant": "what was done to the window: skip, middle-repeat, reverse, random order, parallel mean or sum, looped",
    "size": "layers in the window, which is centred",
}


@dataclass(frozen=True)
class Found:
    """What a scan found: every wiring on the search half, the winners on both, by group on the validation half (empty
    where the probes are of one group), and what the best would gain by luck."""

    table: pd.DataFrame
    winners: pd.DataFrame
    groups: pd.DataFrame
    luck: comparisons.Luck
    metric: str

    @property
    def sentences(self) -> list[str]:
        """What was found, and what could not be told."""
        said = scan_findings.found(self.table, self.winners, self.luck, self.metric)
        return [*said, *scan_findings.best_groups(self.groups, self.metric), *self.untold]

    @property
    def untold(self) -> list[str]:
        return scan_findings.untold(self.table, self.winners)


def run(
    model: str = "babel",
    family: str = "repeat",
    questions: str = "babel",
    out: "str | Path" = "results",
    *,
    metric: str = "loglik",
    count: int = 256,
    top: int = 10,
    seed: int = 0,
    memory: int | None = None,
    cluster: "Cluster | Pool | str | int | None" = None,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> Found:
    """Scan every wiring of ``family`` on ``questions``, and write tables, figures and the page to ``out``.

    ``questions`` is a built-in probe set (``surgery.corpus.probes.named``) or a JSONL file; ``cluster`` as for ``scan.run``.

    Raises ValueError for an unknown family, metric or probe set, OSError where ``out`` cannot be written to.
    """
    _family(family)
    folder = tables.folder(out)
    asked = probes.load(questions) if Path(questions).suffix == ".jsonl" else probes.named(questions, count, seed)
    say(f"opening {model}")
    stack = Stack(load(model))
    with nullcontext() if cluster is None else joined(cluster) as pool:  # one for both halves
        found = measure(
            stack,
            asked,
            folder,
            family,
            metric=metric,
            top=top,
            seed=seed,
            memory=memory,
            cluster=pool,
            say=say,
            progress=progress,
        )
    return found


def measure(
    stack: Stack,
    asked: ProbeSet,
    out: "str | Path",
    family: str = "repeat",
    *,
    metric: str = "loglik",
    longest: int | None = None,
    top: int = 10,
    seed: int = 0,
    memory: int | None = None,
    cluster: "Cluster | Pool | str | int | None" = None,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> Found:
    """The tables of ``run`` on an opened model; with ``longest``, only wirings of so many layers more at most.

    Raises ValueError for an unknown family or metric, and for fewer than 4 different probes.
    """
    _family(family)
    if len(set(asked.probes)) < FEWEST:
        raise ValueError(
            f"a scan needs at least {FEWEST} different probes, half of them to validate on, and {asked.name} has "
            f"{len(set(asked.probes))}; give more"
        )
    folder = tables.folder(out)
    search, validation = asked.split(seed)
    wirings = [stack.wiring(one) for one in FAMILIES[family](stack.n_layers)]
    wirings = [one for one in wirings if longest is None or one.depth <= stack.n_layers + longest]
    say(str(scan.plan(stack, wirings, search, memory)))
    searched = _scan(stack, wirings, search, folder / SEARCH, metric, memory, cluster, progress)
    table = comparisons.table(searched, metric, seed=seed)
    best = table[table["wiring"] != ":"].nlargest(top, "gain")["wiring"].tolist()
    say(f"the {len(best)} best again, on probes that took no part in the choice")
    again = _scan(stack, best, validation, folder / "scan_validation.csv", metric, memory, cluster, progress)
    winners = comparisons.winners(searched, again, metric, top=top, seed=seed)
    luck = comparisons.expected_best(searched, metric, seed=seed)
    groups = comparisons.table(again, metric, seed=seed, by_group=True)
    groups = groups if groups["group"].nunique() > 1 else groups.iloc[:0]
    settings: dict[str, Any] = {"family": family, "metric": metric, "luck": asdict(luck)}
    manifest = provenance.manifest(stack, search.encode(stack).tokens, seed=seed, **settings)
    tables.write(table, folder / TABLE, manifest, comparisons.COLUMNS)
    tables.write(winners, folder / WINNERS, manifest, WINNERS_COLUMNS)
    fresh = provenance.manifest(stack, validation.encode(stack).tokens, seed=seed, **settings)
    tables.write(groups, folder / GROUPS, fresh, comparisons.COLUMNS)
    if family == "painters":
        painted = controls.painters(stack.n_layers).merge(table, on="wiring")
        tables.write(painted, folder / PAINTERS, manifest, PAINTERS_COLUMNS)
    return Found(table, winners, groups, luck, metric)


def painters(
    stack: Stack,
    asked: ProbeSet,
    out: "str | Path | None" = None,
    *,
    metric: str = "loglik",
    sizes: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """The reorder family of Sun et al. (2024, arXiv 2407.09298) on all of ``asked``, against the unmodified model.

    Skip, middle-repeat, reverse, random order (one wiring per ``seeds``), parallel mean and sum, looped parallel, over
    centred windows of ``sizes`` layers: variant, size, wiring, gain with interval, p, p_max, q, n_prompts. Nothing is
    chosen here, so no probes are held back. ``out`` is a CSV file for the rows of every probe, as of ``scan.run``.
    ``surgery.scan.draw.painters`` draws it.

    Cost: ``scan.plan`` of the wirings; about 50 F for all sizes of 12 layers. Control: the unmodified model, and random
    orders beside the reverse.

    >>> table = painters(Stack(load("babel")), probes.named("babel", 4), sizes=[2], seeds=[0])
    >>> table["variant"].tolist()
    ['skip', 'middle-repeat', 'reverse', 'random order', 'parallel mean', 'parallel sum', 'looped parallel']
    """
    listed = controls.painters(stack.n_layers, sizes, seeds)
    rows = scan.run(stack, listed["wiring"].unique(), asked, out, metrics=(metric,), progress=progress)
    return listed.merge(comparisons.table(rows, metric, seed=seed), on="wiring")


def _family(name: str) -> None:
    if name not in FAMILIES:
        raise ValueError(f"there is no family {name!r}; there are {', '.join(FAMILIES)}")


def _scan(
    stack: Stack,
    wirings: Sequence["Wiring | str"],
    asked: ProbeSet,
    out: Path,
    metric: str,
    memory: int | None,
    cluster: "Cluster | Pool | str | int | None",
    progress: bool,
) -> pd.DataFrame:
    return scan.run(stack, wirings, asked, out, metrics=(metric,), memory=memory, progress=progress, cluster=cluster)
