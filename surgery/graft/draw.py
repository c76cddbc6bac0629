"""The figures of fresh middles, from their tables: curves of training, sizes, walked activations, training on walks."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from surgery.graft.walk import LONGER, MORE, REAL
from surgery.page.drawing import ACCENT, BLUE, COLOURS, FAINT, GREY, INK, plain, whiskers

CURVES_CAPTION = (
    "Loss on the prompts that training may be stopped by, against operations, those of the teacher left out and "
    "included, and tokens. Dashed, no training, and line, the original: on the prompts that are reported on."
)
SIZES_CAPTION = (
    "Held-out loss over the MLP width of the new layers, a line per depth: mean over seeds, every seed a dot. Left at "
    "equal tokens, right at equal operations. Line: the original."
)
WALKED_CAPTION = (
    "Walked activations by kind of step, beside steps as long in any direction. Line: the same prompts, not walked. "
    "Squared distance and the share beyond 95 % of real ones look at the distance from the mean alone; holes between "
    "real activations show in the distance to the nearest one, and in the entropy of what the frozen layers predict."
)
WALKS_CAPTION = (
    "Held-out unexplained share of the update and loss over the amount of real tokens, a line per method: mean over "
    "seeds, every seed a dot, set apart sideways. More real stands at the amount that it is compared at. Dashed at 1: "
    "the mean update; line: the original."
)


def curves(frame: pd.DataFrame, methods: pd.DataFrame) -> Figure:
    """Held-out loss of every method against its operations, with the teacher's and without, and its tokens."""
    loss, unit = _loss(frame)
    figure = Figure(figsize=(13, 4.9), layout="constrained")
    panels = {
        "operations": "operations of training",
        "operations_with_teacher": "operations, teacher included",
        "tokens": "tokens trained on",
    }
    axes_of_panels = figure.subplots(1, len(panels), sharey=True)
    colours = dict(zip(frame["method"].unique(), COLOURS * 3))
    unseeded = methods[methods["seed"].isna()]
    trained = unseeded["operations"].notna()
    untrained, snapshots = unseeded[~trained], unseeded[trained]
    for axes, (x, label) in zip(axes_of_panels, panels.items(), strict=True):
        for (method, seed), run in frame.groupby(["method", "seed"], sort=False):
            shown = run[run[x] > 0]
            first = seed == frame.loc[frame["method"] == method, "seed"].iloc[0]
            axes.plot(
                shown[x], shown[loss], color=colours[method], linewidth=1.4, label=plain(method) if first else None
            )
        _levels(axes, untrained, loss)
        if x in snapshots:
            axes.plot(snapshots[x], snapshots[loss], "x", color=INK, label="the whole model's own training")
        axes.axhline(methods[f"{loss}_original"].iloc[0], color=INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    axes_of_panels[0].set_ylabel(f"loss while training, nats per {unit}")
    handles = axes_of_panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def sizes(frame: pd.DataFrame) -> Figure:
    """Held-out loss over width, a line per depth, a panel per budget: means over seeds, every seed as a dot."""
    whole = frame[frame["k"].isna()]
    loss, unit = _loss(frame)
    budgets = list(dict.fromkeys(whole["budget"]))
    figure = Figure(figsize=(5.2 * len(budgets), 4), layout="constrained")
    for axes, budget in zip(np.atleast_1d(figure.subplots(1, len(budgets), sharey=True)), budgets, strict=True):
        of_budget = whole[whole["budget"] == budget]
        for (depth, of_depth), colour in zip(of_budget.groupby("depth"), COLOURS * 2):
            axes.plot(of_depth.groupby("d_mlp")[loss].mean(), color=colour, label=f"{depth} layers")
            axes.plot(of_depth["d_mlp"], of_depth[loss], ".", color=colour)
        axes.axhline(whole[f"{loss}_original"].iloc[0], color=INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        widths = sorted(whole["d_mlp"].unique())
        axes.set_xticks(widths, [f"{width:g}" for width in widths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("MLP width of the new layers")
        axes.set_title(plain(f"equal {budget}"), loc="left")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel(f"held-out loss, nats per {unit}")
    figure.axes[-1].legend(fontsize=8)
    return figure


def walked_activations(frame: pd.DataFrame) -> Figure:
    """Every measure by kind of step, beside its control; the activations as they are as a line."""
    panels = {
        "mahalanobis": "Squared distance / k",
        "beyond_real": "Beyond 95 % of real ones",
        "nearest": "Nearest real one, ratio",
        "entropy": "Entropy (nats)",
    }
    figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
    real, walked = frame[frame["kind"] == REAL].iloc[0], frame[frame["kind"] != REAL]
    kinds = list(dict.fromkeys(walked["kind"]))
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.axhspan(real[f"{name}_low"], real[f"{name}_high"], color=GREY, alpha=0.25, linewidth=0)
        axes.axhline(real[name], color=INK, linewidth=1)
        for control, colour, label in ((False, ACCENT, "walked"), (True, BLUE, "as far, any direction")):
            rows = walked[walked["control"] == control]
            x = np.array([kinds.index(kind) for kind in rows["kind"]]) + (0.15 if control else -0.15)
            whiskers(axes, x, rows, name, 5, fmt="s" if control else "o", color=colour, label=label)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks(range(len(kinds)), [plain(kind) for kind in kinds], rotation=40, ha="right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("line: the same prompts, not walked; 95 % intervals over prompts", fontsize=9, color=FAINT)
    return figure


def walks(frame: pd.DataFrame) -> Figure:
    """Unexplained share and held-out loss over real tokens, a line per method: means, every seed as a dot."""
    loss, unit = _loss(frame)
    panels = {"unexplained": "held-out unexplained share of the update", loss: f"held-out loss, nats per {unit}"}
    names, amounts = list(dict.fromkeys(frame["method"])), sorted(frame["real_tokens"].unique())
    styles = {LONGER: ":", MORE: "-."} | {name: "--" for name in names if name.endswith("unrelabelled")}
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, (name, colour) in enumerate(zip(names, COLOURS * 3)):
            of_method, aside = frame[frame["method"] == name], 1.03 ** (place - (len(names) - 1) / 2)
            mean = of_method.groupby("real_tokens")[column].mean()
            style = {"linestyle": styles.get(name, "-"), "linewidth": 1.4, "marker": "_", "markersize": 9}
            axes.plot(mean.index * aside, mean, color=colour, label=plain(name), **style)
            axes.plot(of_method["real_tokens"] * aside, of_method[column], ".", color=colour)
        axes.set_xscale("log")
        axes.set_xticks(amounts, [f"{amount:,.0f}" for amount in amounts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("real tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left, right = figure.axes
    left.axhline(1, color=FAINT, linestyle="--", linewidth=0.8)
    right.axhline(frame[f"{loss}_original"].iloc[0], color=INK, linewidth=0.8)
    right.set_yscale("log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _loss(frame: pd.DataFrame) -> tuple[str, str]:
    """The loss to draw, that of the answers where there are any, and of what it is nats per."""
    if "cross_entropy_answers" in frame:
        return "cross_entropy_answers", "answer token"
    return "cross_entropy", "token"


def _levels(axes: Axes, methods: pd.DataFrame, loss: str) -> None:
    """A dashed line with its name for each method that takes no training."""
    for place, (_, row) in enumerate(methods.iterrows()):
        axes.axhline(row[loss], color=FAINT, linestyle="--", linewidth=0.8)
        axes.annotate(
            plain(row["method"]),
            (0.99 - 0.33 * place, row[loss]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color=FAINT,
        )
