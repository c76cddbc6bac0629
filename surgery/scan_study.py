"""One scan from end to end: search with half of the probes, the winners again on the other half. ``surgery scan``.

    scan_search.csv       a row per wiring, probe and metric of the search half         (surgery.scan)
    scan_table.csv        a row per wiring: gain, interval, p, p_max, q                 (surgery.comparisons)
    scan_validation.csv   the winners on the other half
    scan_winners.csv      both halves side by side, and how much of the search gain survived
    brain_scan.png        gain of every repeated span (family ``repeat``)

The first and third survive a kill: the same command goes on where it was.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas

import surgery
from surgery import comparisons, figures, frames, probes, provenance, scan, scan_figures, wiring
from surgery.stack import Stack
from surgery.wiring import Wiring

FAMILIES: dict[str, Callable[[int], Any]] = {
    "repeat": wiring.every_repeat,
    "skip": wiring.every_skip,
    "parallel": wiring.every_parallel,
    "swap": wiring.every_swap,
    "reverse": wiring.every_reverse,
}
WINNERS_COLUMNS = {
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
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> tuple[pandas.DataFrame, pandas.DataFrame, comparisons.Luck]:
    """Scan every wiring of ``family`` on ``questions``; returns the table of the search half, the winners on the other
    half, and what the best would gain by luck.

    ``questions`` is a built-in probe set (``surgery.probes.named``) or a JSONL file. Files are written to ``out``.

    Raises ValueError for an unknown family, metric or probe set, OSError where ``out`` cannot be written to.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}; there are {', '.join(FAMILIES)}")
    folder = frames.folder(out)
    asked = probes.load(questions) if Path(questions).suffix == ".jsonl" else probes.named(questions, count, seed)
    search, validation = asked.split(seed)
    say(f"opening {model}")
    stack = Stack(surgery.load(model))
    wirings = list(FAMILIES[family](stack.n_layers))
    say(str(scan.plan(stack, wirings, search, memory)))
    found = _scan(stack, wirings, search, folder / "scan_search.csv", metric, memory, progress)
    table = comparisons.table(found, metric, seed=seed)
    best = table[table["wiring"] != ":"].nlargest(top, "gain")["wiring"].tolist()
    say(f"the {len(best)} best again, on probes that took no part in the choice")
    again = _scan(stack, best, validation, folder / "scan_validation.csv", metric, memory, progress)
    winners = comparisons.winners(found, again, metric, top=top, seed=seed)
    manifest = provenance.manifest(stack, search.encode(stack).tokens, seed=seed, family=family, metric=metric)
    frames.write(table, folder / "scan_table.csv", manifest, comparisons.COLUMNS)
    frames.write(winners, folder / "scan_winners.csv", manifest, WINNERS_COLUMNS)
    if family == "repeat":
        frames.save({folder / "brain_scan.png": figures.png(scan_figures.brain_scan(table, stack.n_layers))})
    return table, winners, comparisons.expected_best(found, metric, seed=seed)


def _scan(
    stack: Stack,
    wirings: Sequence["Wiring | str"],
    asked: probes.ProbeSet,
    out: Path,
    metric: str,
    memory: int | None,
    progress: bool,
) -> pandas.DataFrame:
    return scan.run(stack, wirings, asked, out, metrics=(metric,), memory=memory, progress=progress)
