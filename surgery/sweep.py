"""Is a wider or deeper middle better? A grid of fresh middles, at equal tokens and at equal operations.

    frame = sweep.run(stack, pairs, data, "sweep", widths=(128, 384, 768), depths=(3, 5, 8), seeds=(0, 1, 2))
    sweep.draw(frame)

Every cell is a graft (``surgery.graft``) of its own MLP width and depth, in a folder of its own: killed, the same call
goes on where it was. At equal ``tokens`` every cell makes ``schedule.steps`` steps; at equal ``operations`` as many as
cost what those of the original size do, counted (``surgery.ledger``). The harvest is the same for all and in neither.

Control: the cell of the original size, and the spread over seeds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.figure import Figure
from scipy import stats

from surgery import fidelity, figures, graft, graft_study, layout
from surgery.graft import Graft, Objective, Schedule
from surgery.graft_study import Data
from surgery.latents import Latents
from surgery.stack import Stack

BUDGETS = ("tokens", "operations")
COLUMNS = {
    "budget": "what is equal to that of the middle of the original size: tokens or operations",
    "d_mlp": "MLP width of the new layers",
    "depth": "number of new layers",
    "seed": "of their random weights and of the order of batches",
    "k": "steps that a problem asks for; empty for all problems",
} | fidelity.COLUMNS | graft_study.SPENT  # fmt: skip


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
    data: Data,
    folder: str | Path,
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[str] = BUDGETS,
    schedule: Schedule = Schedule(),
    objective: Objective = Objective(),
    parts: dict[int, Data] | None = None,
    progress: bool = False,
) -> pandas.DataFrame:
    """A row per budget, width, depth and seed, ``COLUMNS``; with ``parts``, held-out data by k, one for each of these.

    Cost: training every cell; two steps of each size and ``len(parts) + 1`` looks more.

    Raises ValueError for an empty axis, an unknown budget, and as ``graft.train`` does.
    """
    if not (len(widths) and len(depths) and len(seeds)) or not set(budgets) <= set(BUDGETS):
        raise ValueError(f"give at least one width, depth and seed, and budgets of {', '.join(BUDGETS)}")
    rows: list[dict[str, Any]] = []
    for cell, grown in trained(teacher, pairs, data, Path(folder), widths, depths, seeds, budgets, schedule,
                               objective, progress):  # fmt: skip
        for k, part in [(float("nan"), data), *(parts or {}).items()]:
            found = graft_study.row("", cell.seed, grown, graft_study.judge(teacher, grown, pairs, part))
            place = {"budget": cell.budget, "d_mlp": cell.d_mlp, "depth": cell.depth, "seed": cell.seed, "k": float(k)}
            rows.append(place | {name: value for name, value in found.items() if name not in graft_study.RUN})
    return pandas.DataFrame(rows)


def trained(
    teacher: Stack,
    pairs: Latents,
    data: Data,
    folder: Path,
    widths: Sequence[int],
    depths: Sequence[int],
    seeds: Sequence[int],
    budgets: Sequence[str],
    schedule: Schedule,
    objective: Objective,
    progress: bool = False,
) -> Iterator[tuple[Cell, Graft]]:
    """Every cell, one after the other, seeds outermost: what is there first is a whole grid."""
    options: dict[str, Any] = {"objective": objective, "answers": data.answers, "weigh": data.weigh}
    usual = operations(teacher, pairs, None, None, objective, schedule, data)
    spent = {(w, d): operations(teacher, pairs, w, d, objective, schedule, data) for w in widths for d in depths}
    for seed in seeds:
        for budget in budgets:
            for (width, depth), each in spent.items():
                steps = schedule.steps if budget == "tokens" else max(1, round(schedule.steps * usual / each))
                every = max(1, steps * schedule.every // schedule.steps)
                cell = Cell(budget, width, depth, steps, seed)
                yield cell, graft.train(
                    teacher, pairs, data.heldout, folder / cell.name, depth=depth, d_mlp=width,
                    schedule=replace(schedule, steps=steps, every=every, seed=seed), progress=progress, **options,
                )  # fmt: skip


def operations(
    teacher: Stack,
    pairs: Latents,
    d_mlp: int | None,
    depth: int | None,
    objective: Objective,
    schedule: Schedule,
    data: Data,
) -> float:
    """Floating-point operations of a training step of such a middle, see ``graft_study.step_operations``."""
    rows = layout.middle(teacher.n_layers, pairs.start, pairs.stop, depth, d_mlp=d_mlp)
    student, kept = layout.build(teacher.model, rows), teacher.n_layers - (pairs.stop - pairs.start)
    span = (pairs.start, pairs.start + len(rows) - kept)
    return graft_study.step_operations(teacher, student, span, pairs, data, objective=objective, schedule=schedule)


def draw(frame: pandas.DataFrame) -> Figure:
    """Held-out loss over width, a line per depth, a panel per budget: means over seeds, every seed as a dot."""
    whole = frame[frame["k"].isna()]
    loss = "cross_entropy_answers" if "cross_entropy_answers" in frame else "cross_entropy"
    budgets = list(dict.fromkeys(whole["budget"]))
    figure = Figure(figsize=(5.2 * len(budgets), 4), layout="constrained")
    for axes, budget in zip(np.atleast_1d(figure.subplots(1, len(budgets), sharey=True)), budgets, strict=True):
        part = whole[whole["budget"] == budget]
        for (depth, some), colour in zip(part.groupby("depth"), graft_study.COLOURS * 2):
            axes.plot(some.groupby("d_mlp")[loss].mean(), color=colour, label=f"{depth} layers")
            axes.plot(some["d_mlp"], some[loss], ".", color=colour)
        axes.axhline(whole[f"{loss}_original"].iloc[0], color=figures.INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("MLP width of the new layers")
        axes.set_title(f"equal {budget}", loc="left")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("held-out loss, nats per " + ("answer token" if "answers" in loss else "token"))
    figure.axes[-1].legend(fontsize=8)
    return figure


def found(frame: pandas.DataFrame, usual: tuple[int, int]) -> list[str]:
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
            better = (losses[usual] - losses[size]).dropna()
            text, word = f"{np.exp(better.mean()):.2f} times as small a loss", "one seed tells nothing"
            if len(better) > 1:
                half = stats.t.ppf(0.975, len(better) - 1) * better.std() / len(better) ** 0.5
                low, high = np.exp(better.mean() - half), np.exp(better.mean() + half)
                text += f" [{low:.2f}, {high:.2f}]"
                word = "better" if low > 1 else "worse" if high < 1 else "undecided"
            said.append("At equal {}, width {} and {} layers: {}; {}.".format(budget, *size, text, word))
    return said
