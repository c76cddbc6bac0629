"""Is a wider or deeper middle better? A grid of fresh middles, at equal tokens and at equal operations.

    frame = sweep.run(stack, pairs, data, "sweep", widths=(128, 384, 768), depths=(3, 5, 8), seeds=(0, 1, 2))
    sweep.found(frame, (384, 5))            # sentences; by the steps that a problem takes: sweep.found_by_k
    sweep.write("sweep", frame, manifest)   # width_of_thought.csv and .png, a section of ``surgery report``

Every cell is a graft (``surgery.graft``) of its own MLP width and depth, in a folder of its own: killed, the same call
goes on where it was. At equal ``tokens`` every cell makes ``schedule.steps`` steps; at equal ``operations`` as many as
cost what those of the original size do, counted (``surgery.training.ledger``). The harvest is the same for all and in neither.

Control: the cell of the original size, and the spread over seeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from surgery.corpus.splits import Split
from surgery.graft import grafting as graft
from surgery.graft import study
from surgery.graft.grafting import Graft, Objective, Schedule
from surgery.instruments import fidelity
from surgery.models.stack import Stack
from surgery.page import drawing
from surgery.rebuild import layout
from surgery.records import tables
from surgery.stats import bootstrap as stats
from surgery.training.activations import Latents

SIZES = "width_of_thought.csv"
BUDGETS = ("tokens", "operations")
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
    | stats.described({"exact": "share of exact answers", "gain": "exact minus that of the usual size"}, "seeds")
    | {"verdict": "better, worse or undecided, by the interval of gain over seeds; empty for the usual size"}
)
CAPTION = (
    "Held-out loss over the MLP width of the new layers, a line per depth: mean over seeds, every seed a dot. Left at "
    "equal tokens, right at equal operations. Line: the original."
)


@dataclass(frozen=True)
class Cell:
    budget: str
    d_mlp: int
    depth: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder: cells of the same size, steps and seed are the same training, whatever the budget."""
        return f"{self.d_mlp}x{self.depth}_{self.steps}_{self.seed}"


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
    """A row per budget, width, depth and seed, ``COLUMNS``; with ``parts``, held-out data by k, one for each of these.

    ``cross``, a width and depth, keeps of the grid what has that width or that depth: its row and its column.

    Cost: training every cell; two steps of each size and ``len(parts) + 1`` looks more.

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
            found = study.row("", cell.seed, grown, study.judge(teacher, grown, pairs, part))
            place = {"budget": cell.budget, "d_mlp": cell.d_mlp, "depth": cell.depth, "seed": cell.seed, "k": float(k)}
            rows.append(place | {name: value for name, value in found.items() if name not in study.RUN})
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
    """Every cell, one after the other, seeds outermost: what is there first is all ``sizes`` (width and depth) once."""
    options: dict[str, Any] = {"objective": objective, "answers": data.answers, "weigh": data.weigh}
    usual = operations(teacher, pairs, None, None, objective, schedule, data)
    spent = {(w, d): operations(teacher, pairs, w, d, objective, schedule, data) for w, d in sizes}
    for seed in seeds:
        for budget in budgets:
            for (width, depth), each in spent.items():
                steps = schedule.steps if budget == "tokens" else max(1, round(schedule.steps * usual / each))
                every = max(1, steps * schedule.every // schedule.steps)
                cell = Cell(budget, width, depth, steps, seed)
                yield (
                    cell,
                    graft.train(
                        teacher,
                        pairs,
                        data.heldout,
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
    """Floating-point operations of a training step of such a middle, see ``graft_study.step_operations``."""
    rows = layout.middle(teacher.n_layers, pairs.start, pairs.stop, depth, d_mlp=d_mlp)
    student, kept = layout.build(teacher.model, rows), teacher.n_layers - (pairs.stop - pairs.start)
    span = (pairs.start, pairs.start + len(rows) - kept)
    return study.step_operations(teacher, student, span, pairs, data, objective=objective, schedule=schedule)


def draw(frame: pd.DataFrame) -> Figure:
    """Held-out loss over width, a line per depth, a panel per budget: means over seeds, every seed as a dot."""
    whole = frame[frame["k"].isna()]
    loss = "cross_entropy_answers" if "cross_entropy_answers" in frame else "cross_entropy"
    budgets = list(dict.fromkeys(whole["budget"]))
    figure = Figure(figsize=(5.2 * len(budgets), 4), layout="constrained")
    for axes, budget in zip(np.atleast_1d(figure.subplots(1, len(budgets), sharey=True)), budgets, strict=True):
        part = whole[whole["budget"] == budget]
        for (depth, some), colour in zip(part.groupby("depth"), drawing.COLOURS * 2):
            axes.plot(some.groupby("d_mlp")[loss].mean(), color=colour, label=f"{depth} layers")
            axes.plot(some["d_mlp"], some[loss], ".", color=colour)
        axes.axhline(whole[f"{loss}_original"].iloc[0], color=drawing.INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        widths = sorted(whole["d_mlp"].unique())
        axes.set_xticks(widths, [f"{width:g}" for width in widths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("MLP width of the new layers")
        axes.set_title(f"equal {budget}", loc="left")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("held-out loss, nats per " + ("answer token" if "answers" in loss else "token"))
    figure.axes[-1].legend(fontsize=8)
    return figure


def found(frame: pd.DataFrame, usual: tuple[int, int]) -> list[str]:
    """Per budget and cell: is it better than the middle of the ``usual`` width and depth, over seeds?

    What is compared are ratios of held-out losses: seeds in pairs, a t interval of their logarithms.
    """
    said, loss = list[str](), "cross_entropy_answers" if "cross_entropy_answers" in frame else "cross_entropy"
    whole = frame[frame["k"].isna()]
    for budget, part in whole.groupby("budget", sort=False):
        losses = {
            size: np.log(some.set_index("seed")[loss])  # they span orders of magnitude
            for size, some in part.groupby(["d_mlp", "depth"])
        }
        for size in (size for size in losses if size != usual and usual in losses):
            mean, low, high = stats.t_interval((losses[usual] - losses[size]).dropna().to_numpy())
            text = f"{np.exp(mean):.2f} times as small a loss" + _ends(np.exp(low), np.exp(high), ".2f")
            word = stats.verdict(low, high, "better", "worse")
            said.append("At equal {}, width {} and {} layers: {}; {}.".format(budget, *size, text, word))
    return said


def by_k(frame: pd.DataFrame, usual: tuple[int, int]) -> pd.DataFrame:
    """Exact answers by budget, size and k, and what they are more than the ``usual`` size's: ``BY_K``.

    Means and t intervals over seeds; differences of seeds in pairs. Empty where ``frame`` was made without ``parts`` or
    nothing is an answer.
    """
    rows, parts = [], frame.dropna(subset=["k", "exact"]) if "exact" in frame else frame[:0]
    for (budget, k), part in parts.groupby(["budget", "k"], sort=False):
        exact = {size: some.set_index("seed")["exact"] for size, some in part.groupby(["d_mlp", "depth"])}
        for size, values in exact.items():
            row = {"budget": budget, "d_mlp": size[0], "depth": size[1], "k": k}
            row |= _interval("exact", stats.t_interval(values.to_numpy()))
            if usual in exact and size != usual:
                gain = stats.t_interval((values - exact[usual]).dropna().to_numpy())
                row |= _interval("gain", gain) | {"verdict": stats.verdict(*gain[1:], "better", "worse")}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(BY_K))


def found_by_k(frame: pd.DataFrame, usual: tuple[int, int]) -> list[str]:
    """A sentence per budget and size: the exact answers at each k, and whether the ``usual`` size gives as many."""
    said = []
    compared = by_k(frame, usual).dropna(subset=["verdict"])
    for (budget, width, depth), part in compared.groupby(["budget", "d_mlp", "depth"], sort=False):
        listed = "; ".join(
            f"k = {row['k']:.0f} {row['exact']:.3f}, {row['gain']:+.3f}"
            f"{_ends(row['gain_low'], row['gain_high'], '+.3f')} {row['verdict']}"
            for _, row in part.iterrows()
        )
        said.append(
            f"Exact answers at equal {budget}, width {width} and {depth} layers, and their difference from width "
            f"{usual[0]} and {usual[1]} layers: {listed}."
        )
    return said


def write(folder: Path, frame: pd.DataFrame, manifest: Mapping[str, Any]) -> None:
    """The table and its figure; with ``usual``, width and depth, among the settings of ``manifest`` the page compares.

    Raises OSError where they cannot be written.
    """
    tables.write(frame, folder / SIZES, manifest, COLUMNS)
    tables.save({(folder / SIZES).with_suffix(".png"): drawing.png(draw(frame))})


def _interval(name: str, ends: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _ends(low: float, high: float, style: str) -> str:
    return "" if np.isnan(low) else f" [{low:{style}}, {high:{style}}]"
