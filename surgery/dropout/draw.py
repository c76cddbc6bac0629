"""Variance of activations, gradients and losses over training, with and without dropout, as one figure.

>>> from surgery.page import drawing
>>> from surgery.dropout import stability
>>> frame = stability.perceptrons((4,), (1,), (0.0, 0.5), (0, 1), steps=4, every=1, examples=16)
>>> drawing.png(draw(frame))[1:4]
b'PNG'
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import viridis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter

from surgery.dropout.stability import SHOWS, SPREADS, counted, effects, named, settled
from surgery.page import drawing
from surgery.page.drawing import ACCENT, BLUE, GREEN, INK, ORANGE, PINK
from surgery.stats import bootstrap as stats

_COLOURS = (INK, ACCENT, BLUE, GREEN, PINK, ORANGE)  # of the rates
_DASHES = ("-", "--", ":", "-.")


def draw(frame: pd.DataFrame) -> Figure:
    """Above by step, for the deepest of the widest networks: variance, gradient norm, held-out loss (means over
    seeds). Below variance in training over evaluation mode, the spreads by width and what dropout changes by depth.

    A panel that the frame has nothing for says so.
    """
    runs = settled(frame)
    rates = sorted(frame["rate"].unique().tolist())
    shown = frame[frame["width"] == frame["width"].max()]
    shown = shown[shown["depth"] == shown["depth"].max()]
    width, depth = (int(shown[name].iloc[0]) for name in ("width", "depth"))
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    above, below = figure.subplots(2, 3)
    for axes, column, label in (
        (above[0], "variance", "variance of activations"),
        (above[1], "gradient", "norm of the gradient"),
        (below[0], "shift", "variance, training over evaluation mode"),
    ):
        _by_step(axes, shown.assign(shift=shown["variance_training"] / shown["variance"]), column, rates)
        axes.set_ylabel(label)
    for rate, colour in zip(rates, _COLOURS):
        of_rate = shown[shown["rate"] == rate].groupby("step")
        above[2].plot(of_rate["heldout"].mean(), color=colour, label=f"held out, {named(rate)}")
        if shown["loss"].notna().any():
            above[2].plot(
                of_rate["loss"].mean(), color=colour, linewidth=0.9, linestyle=":", label=f"training, {named(rate)}"
            )
    above[2].set(xlabel="training steps", ylabel="loss in evaluation mode, nats")
    for name, dashes in zip(SPREADS, _DASHES):
        for rate, colour in zip(rates, _COLOURS):
            values = runs[runs["rate"] == rate].groupby(["width", "seed"])[name].mean()
            _errors(below[1], values, color=colour, linestyle=dashes, label=f"{SPREADS[name]}, {named(rate)}")
    below[1].set(xlabel="width", ylabel="standard deviation over\nthe last half of the steps")
    for name, dashes in zip(SHOWS, _DASHES):
        for rate, colour in list(zip(rates, _COLOURS))[1:]:
            values = effects(runs[runs["width"] == width], rate, name).groupby(["depth", "seed"]).mean()
            _errors(below[2], values, color=colour, linestyle=dashes, label=f"{SHOWS[name]}, dropout {rate:g}")
    below[2].axhline(0, color=drawing.INK, linewidth=0.8)
    below[2].set(xlabel="depth", ylabel="with dropout minus without")
    for axes, title in zip(
        (*above, *below),
        (
            "Variance",
            "Gradients",
            "Loss",
            "Variance shift of dropout",
            "How steady, by width",
            "Dropout's effect, by depth",
        ),
        strict=True,
    ):
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (above[2], *below[1:]):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(
        f"By step: width {width}, {counted(depth)}, means over seeds. By width: all depths; by depth: "
        f"width {width}; 95 % intervals over seeds.",
        fontsize=9,
        color=drawing.FAINT,
    )
    return figure


def _by_step(axes: Axes, frame: pd.DataFrame, column: str, rates: Sequence[float]) -> None:
    """A line per layer, its colour by depth, and rate, its dashes; on a logarithmic scale."""
    axes.set_xlabel("training steps")
    if not (frame[column] > 0).any():
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=drawing.FAINT)
        return
    layers = sorted(frame.loc[frame[column].notna(), "layer"].unique())
    colours = {layer: viridis(0.9 * i / max(1, len(layers) - 1)) for i, layer in enumerate(layers)}
    for rate, dashes in zip(rates, _DASHES):
        for layer, part in frame[(frame["rate"] == rate) & frame["layer"].isin(layers)].groupby("layer"):
            axes.plot(part.groupby("step")[column].mean(), dashes, color=colours[layer], linewidth=1.3)
    axes.set_yscale("log")
    ends = layers if len(layers) <= 6 else [layers[0], layers[len(layers) // 2], layers[-1]]
    handles = [Line2D([], [], color=colours[layer], label=f"layer {layer}") for layer in ends]
    handles += [
        Line2D([], [], color=drawing.FAINT, linestyle=dashes, label=named(rate)) for rate, dashes in zip(rates, _DASHES)
    ]
    axes.legend(handles=handles, framealpha=0.8, edgecolor="none", fontsize=8, ncols=2)


def _errors(axes: Axes, values: pd.Series, **style: Any) -> None:
    """Mean and interval over seeds of what is indexed by (place, seed), places on a scale of doublings."""
    ends = np.array([stats.t_interval(part.to_numpy()) for _, part in values.groupby(level=0)])
    places = sorted(values.index.get_level_values(0).unique())
    axes.errorbar(
        places,
        ends[:, 0],
        np.nan_to_num([ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 0]]),
        marker="o",
        markersize=4,
        linewidth=1.3,
        capsize=2,
        **style,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(places)
