"""Is a wider or deeper middle better? A grid of fresh middles, at equal tokens and at equal operations.

    frame = size_study.run(stack, pairs, data, "sizes", widths=(128, 384, 768), depths=(3, 5, 8), seeds=(0, 1, 2))
    say.sizes(frame, (384, 5))              # sentences; by the steps that a problem takes: say.sizes_by_k
    size_study.write("sizes", frame, source)    # width_of_thought.csv and .png, a section of ``surgery report``

Every cell is a graft (``surgery.graft``) of its own MLP width and depth, in a folder of its own: after a kill the same
call goes on where it was. At equal ``tokens`` every cell makes ``schedule.steps`` steps; at equal ``operations`` as
many as cost what those of the original size do, counted (``surgery.training.ledger``). The harvest is the same for all
and counts in neither.

Control: the cell of the original size, and the spread over seeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from surgery import disk
from surgery.corpus.splits import Split
from surgery.graft import draw, grafting, study
from surgery.graft.grafting import Graft, Objective, Schedule
from surgery.instruments import fidelity
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.page import drawing, phrases
from surgery.rebuild import layout
from surgery.records import tables
from surgery.stats.bootstrap import described, t_interval
from surgery.stats.claims import Effect
from surgery.training.activations import Latents

SIZES = "width_of_thought.csv"
BUDGETS = ("tokens", "operations")
MORE_EXACT = 0.01  # the least difference in exact answers that matters
COLUMNS = (
    {
        "budget": "what is equal to that of the middle of the original size: tokens or operations",
        "d_mlp": "MLP width of the new layers",
        "depth": "number of new layers",
        "seed": "of their random weights and of the order of batches",
        "k": "steps that a problem asks for; empty for all problems",
    }
    | fidelity.COLUMNS
    | study.SPENT
)
BY_K = (
    {name: COLUMNS[name] for name in ("budget", "d_mlp", "depth", "k")}
    | described({"exact": "share of exact answers", "gain": "exact minus that of the usual size"}, "seeds")
    | {
        "verdict": f"better or worse by more than {MORE_EXACT}, no difference that matters, or undecided, over seeds; "
        "the ks of a size are one family; empty for the usual size"
    }
)


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    budget: str
    d_mlp: int
    depth: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder: cells of the same size, steps and seed are the same training, whatever the budget."""
        return f"{self.d_mlp}x{self.depth}_{self.steps}_{self.seed}"


@with_meanings(COLUMNS)
def run(
    teacher: Stack,
    pairs: Latents,
    data: Split,
    folder: str | Path,
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    cross: tuple[int, int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[str] = BUDGETS,
    schedule: Schedule = Schedule(),
    objective: Objective = Objective(),
    parts: dict[int, Split] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Train the grid: a row per budget, width, depth and seed, ``COLUMNS``.

    With ``parts``, held-out data by k, there is a row for each of these too. ``cross``, a width and a depth, keeps of
    the grid only what has that width or that depth: its row and its column.

    Cost: training every cell, two steps of each size, and ``len(parts) + 1`` evaluations of each cell.

    Raises ValueError for an empty axis, an unknown budget, and as ``graft.train`` does.
    """
    if not (len(widths) and len(depths) and len(seeds)) or not set(budgets) <= set(BUDGETS):
        raise ValueError(f"give at least one width, depth and seed, and budgets of {', '.join(BUDGETS)}")
    rows: list[dict[str, Any]] = []
    sizes = [(w, d) for w in widths for d in depths if cross is None or w == cross[0] or d == cross[1]]
    for cell, grown in trained(
        teacher, pairs, data, Path(folder), sizes, seeds, budgets, schedule, objective, progress
    ):
        for k, part in [(float("nan"), data), *(parts or {}).items()]:
            row = study.row("", cell.seed, grown, study.judge(teacher, grown, pairs, part))
            place = {"budget": cell.budget, "d_mlp": cell.d_mlp, "depth": cell.depth, "seed": cell.seed, "k": float(k)}
            rows.append(place | {name: value for name, value in row.items() if name not in study.RUN})
    return pd.DataFrame(rows)


def trained(
    teacher: Stack,
    pairs: Latents,
    data: Split,
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    seeds: Sequence[int],
    budgets: Sequence[str],
    schedule: Schedule,
    objective: Objective,
    progress: bool = False,
) -> Iterator[tuple[Cell, Graft]]:
    """Train every cell, one after the other, seeds outermost, so that all ``sizes`` (width, depth) come first once."""
    options: dict[str, Any] = {"objective": objective, "answers": data.stop_answers, "weigh": data.weigh}
    usual = operations(teacher, pairs, None, None, objective, schedule, data)
    spent = {(w, d): operations(teacher, pairs, w, d, objective, schedule, data) for w, d in sizes}
    for seed in seeds:
        for budget in budgets:
            for (width, depth), cost in spent.items():
                steps = schedule.steps if budget == "tokens" else max(1, round(schedule.steps * usual / cost))
                every = max(1, steps * schedule.every // schedule.steps)
                cell = Cell(budget, width, depth, steps, seed)
                yield (
                    cell,
                    grafting.train(
                        teacher,
                        pairs,
                        data.stop,
                        folder / cell.name,
                        depth=depth,
                        d_mlp=width,
                        schedule=replace(schedule, steps=steps, every=every, seed=seed),
                        progress=progress,
                        **options,
                    ),
                )


def operations(
    teacher: Stack,
    pairs: Latents,
    d_mlp: int | None,
    depth: int | None,
    objective: Objective,
    schedule: Schedule,
    data: Split,
) -> float:
    """Floating-point operations of a training step of such a middle, see ``study.step_operations``."""
    rows = layout.middle(teacher.n_layers, pairs.start, pairs.stop, depth, d_mlp=d_mlp)
    student, n_frozen = layout.build_stack(teacher, rows), teacher.n_layers - (pairs.stop - pairs.start)
    span = (pairs.start, pairs.start + len(rows) - n_frozen)
    return study.step_operations(
        teacher, student, span, pairs, objective=objective, schedule=schedule, weigh=data.weigh
    )


def by_k(frame: pd.DataFrame, usual: tuple[int, int]) -> pd.DataFrame:
    """Exact answers by budget, size and k, and how far they exceed the ``usual`` size's: ``BY_K``.

    Means and t intervals over seeds; differences of seeds in pairs. A verdict is a claim of ``stats.claims``. Empty
    where ``frame`` was made without ``parts`` or nothing is an answer.
    """
    rows: list[dict[str, Any]] = []
    parts = frame.dropna(subset=["k", "exact"]) if "exact" in frame else frame[:0]
    gains: dict[tuple[Any, ...], dict[int, Effect]] = {}  # by budget and size, then by row
    for (budget, k), part in parts.groupby(["budget", "k"], sort=False):
        exact = {size: of_size.set_index("seed")["exact"] for size, of_size in part.groupby(["d_mlp", "depth"])}
        for size, values in exact.items():
            row = {"budget": budget, "d_mlp": size[0], "depth": size[1], "k": k}
            row |= _named("exact", t_interval(values.to_numpy()))
            if usual in exact and size != usual:
                gain = Effect.of_seeds(values - exact[usual])
                row |= _named("gain", gain[:3])
                gains.setdefault((budget, *size), {})[len(rows)] = gain
            rows.append(row)
    for of_size in gains.values():
        claims = phrases.claims([*of_size.values()], MORE_EXACT, f"less than {MORE_EXACT}", "better", "worse")
        for place, claim in zip(of_size, claims, strict=True):
            rows[place]["verdict"] = claim
    return pd.DataFrame(rows, columns=list(BY_K))


def write(folder: Path, frame: pd.DataFrame, manifest: Mapping[str, Any]) -> None:
    """Write the table and its figure. The page compares sizes with ``usual``, a width and depth, which it takes from
    the settings of ``manifest``. Raises OSError where they cannot be written."""
    tables.write(frame, folder / SIZES, manifest, COLUMNS)
    disk.save({(folder / SIZES).with_suffix(".png"): drawing.png(draw.sizes(frame))})


def _named(name: str, interval: tuple[float, float, float]) -> dict[str, float]:
    """A value and the ends of its interval, by column."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
