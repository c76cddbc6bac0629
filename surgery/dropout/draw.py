"""The figures of dropout, from its tables, and their captions.

>>> from surgery.dropout import perceptrons
>>> from surgery.page.drawing import png
>>> frame = perceptrons.perceptrons((4,), (1,), (0.0, 0.5), (0, 1), steps=4, every=1, examples=16)
>>> png(stability(frame))[1:4]
b'PNG'
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import viridis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

from surgery.dropout.files import CONFIRMATION, ENSEMBLE, MODELS, PERCEPTRONS, PROBES, STREAM, TOY
from surgery.dropout.mask_ensemble import ARITHMETIC, GEOMETRIC, SCALING
from surgery.dropout.say import dropout_rate, layer_count
from surgery.dropout.stability import EFFECTS, SPREADS, effects, run_statistics
from surgery.dropout.verdicts import ACROSS, CONFIRMED, LOSS, MEASURES, WITHIN, measures_of
from surgery.page.drawing import ACCENT, BLUE, COLOURS, FAINT, GREEN, INK, ORANGE, PINK, plain
from surgery.stats import bootstrap

WAYS = {ARITHMETIC: ACCENT, GEOMETRIC: BLUE, SCALING: INK}  # colours of the ways to average
TOY_PANELS = {
    "features_per_dimension": "Features per dimension\n|W|² / hidden units",
    "effective_features": "The same, free of scale\neffective number of features / hidden units",
    "dimensionality": "Share of a dimension\nD of a represented feature",
    "interference": "Interference\non a represented feature",
}
_RATES = (INK, ACCENT, BLUE, GREEN, PINK, ORANGE)  # colours of the rates
_DASHES = ("-", "--", ":", "-.")


# --- the models ------------------------------------------------------------------------------------------------------


def models(frame: pd.DataFrame) -> Figure:
    """Every measure of ``MEASURES`` over the rate of dropout, a row of panels for each half of the prediction."""
    columns = max(len(measures_of(WITHIN)), len(measures_of(ACROSS)))
    figure = Figure(figsize=(2.7 * columns, 5.4), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for row, half in zip(grid, (WITHIN, ACROSS), strict=True):
        names = measures_of(half)
        for axes in row[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(row, names):
            _, sign, phrase = MEASURES[name]
            for (matched, part), colour in zip(frame.groupby("matched", sort=False), COLOURS):
                axes.plot(part.groupby("rate")[name].mean(), color=colour, label=plain(f"matched {matched}"))
                axes.plot(part["rate"], part[name], ".", color=colour, markersize=4)
            title = phrase + {1: " \u2191", -1: " \u2193", 0: ""}[sign]
            axes.set_title("\n".join(textwrap.wrap(title, 26)), fontsize=8, loc="left")
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
        row[0].set_ylabel(half, fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("dropout in training", fontsize=8)
    grid[0][0].legend(fontsize=7)
    return figure


def confirmation(frame: pd.DataFrame) -> Figure:
    """Additivity of every fresh model over the rate of dropout, a panel per unit, the models of a seed joined."""
    figure = Figure(figsize=(3.4 * len(CONFIRMED), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CONFIRMED)), CONFIRMED, strict=True):
        for (matched, part), colour in zip(frame.groupby("matched", sort=False), COLOURS):
            for number, (_, run) in enumerate(part.groupby("seed")):
                label = plain(f"matched {matched}") if number == 0 else None
                axes.plot(run["rate"], run[name], "o-", color=colour, markersize=3, linewidth=0.8, label=label)
        axes.set_title("\n".join(textwrap.wrap(MEASURES[name][2], 34)), fontsize=8, loc="left")
        axes.set_xlabel("dropout in training", fontsize=8)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=7)
    return figure


def probes(frame: pd.DataFrame) -> Figure:
    """The cost of dropping at test time over the rate in training, a panel per probe and a line per p."""
    kinds = list(dict.fromkeys(frame["probe"]))
    figure = Figure(figsize=(4 * len(kinds), 3.4), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        shown = frame[(frame["probe"] == name) & (frame["matched"] == LOSS)]
        for (p, part), colour in zip(shown.groupby("p"), COLOURS):
            axes.plot(part.groupby("rate")["excess"].mean(), color=colour, label=plain(f"{p:.0%} of the {name}"))
            axes.plot(part["rate"], part["excess"], ".", color=colour, markersize=4)
        axes.set_title(plain(f"{name} dropped at test time"), loc="left", fontsize=10)
        axes.set_xlabel("dropout in training")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("loss above nothing dropped,\nnats per answer token")
    return figure


# --- averages over masks ---------------------------------------------------------------------------------------------


def ensembles(frame: pd.DataFrame) -> Figure:
    """``mask_averages`` of the models with the largest rate, mean over seeds."""
    most = frame[frame["rate"] == frame["rate"].max()]
    return mask_averages(most.groupby(["way", "count"], sort=False).mean(numeric_only=True).reset_index())


def mask_averages(frame: pd.DataFrame) -> Figure:
    """Loss (of the answers, if there are), KL from scaling and variance by the number of masks, with intervals.

    ``frame`` is that of ``mask_ensemble.curve``.
    """
    loss = "cross_entropy_answers" if "cross_entropy_answers" in frame else "cross_entropy"
    panels = {
        loss: "loss\n(nats per answer token)" if loss != "cross_entropy" else "loss\n(nats per token)",
        "kl": "KL from dropout off\n(nats per token)",
        "variance": "variance of the probabilities\nover masks",
    }
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for way in (ARITHMETIC, GEOMETRIC):
            shown = frame[(frame["way"] == way) & frame[name].notna()]
            if len(shown) and not (name == "variance" and way == GEOMETRIC):  # it is of the masks, not of their mean
                low, high = shown[f"{name}_low"], shown[f"{name}_high"]
                axes.fill_between(shown["count"], low, high, color=WAYS[way], alpha=0.2, linewidth=0)
                axes.plot(shown["count"], shown[name], "o-", markersize=4, color=WAYS[way], label=f"{way} mean")
        off = frame.loc[frame["way"] == SCALING].iloc[0]
        if name == loss:
            axes.axhspan(off[f"{name}_low"], off[f"{name}_high"], color=WAYS[SCALING], alpha=0.12, linewidth=0)
            axes.axhline(off[name], color=WAYS[SCALING], linestyle="--", label="scaling (dropout off)")
            axes.legend(frameon=False, fontsize=9)
        if name == "kl" and (frame.loc[frame["count"] > 0, "kl"] > 1e-12).all():
            axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(frame["count"]) - {0}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="masks averaged", ylabel=label)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Averaging over dropout masks, against dropout switched off", x=0.01, ha="left")
    figure.supxlabel("bands: 95 % over prompts", fontsize=9, color=FAINT)
    return figure


# --- stability of training -------------------------------------------------------------------------------------------


def stability(frame: pd.DataFrame) -> Figure:
    """Variance, gradient norm and held-out loss by step, and spreads and effects of dropout by width and depth.

    Above by step, for the deepest of the widest networks, means over seeds. Below variance in training over evaluation
    mode, the spreads by width and the effect of dropout by depth. A panel that the frame has no values for says so.
    """
    runs = run_statistics(frame)
    rates = sorted(frame["rate"].unique().tolist())
    shown = frame[frame["width"] == frame["width"].max()]
    shown = shown[shown["depth"] == shown["depth"].max()]
    shown = shown.assign(shift=shown["variance_training"] / shown["variance"])
    width, depth = (int(shown[name].iloc[0]) for name in ("width", "depth"))
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    (variance, gradient, loss), (shift, by_width, by_depth) = figure.subplots(2, 3)
    _by_step(variance, shown, "variance", rates, "variance of activations")
    _by_step(gradient, shown, "gradient", rates, "norm of the gradient")
    _by_step(shift, shown, "shift", rates, "variance, training over evaluation mode")
    _losses(loss, shown, rates)
    for label, values, style in _spreads_by_width(runs, rates):
        _errors(by_width, values, label=label, **style)
    by_width.set(xlabel="width", ylabel="standard deviation over\nthe last half of the steps")
    for label, values, style in _effects_by_depth(runs[runs["width"] == width], rates):
        _errors(by_depth, values, label=label, **style)
    by_depth.axhline(0, color=INK, linewidth=0.8)
    by_depth.set(xlabel="depth", ylabel="with dropout minus without")
    titles = {
        variance: "Variance",
        gradient: "Gradients",
        loss: "Loss",
        shift: "Variance shift of dropout",
        by_width: "How steady, by width",
        by_depth: "Dropout's effect, by depth",
    }
    for axes, title in titles.items():
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (loss, by_width, by_depth):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(
        f"By step: width {width}, {layer_count(depth)}, means over seeds. By width: all depths; by depth: "
        f"width {width}; 95 % intervals over seeds.",
        fontsize=9,
        color=FAINT,
    )
    return figure


def _by_step(axes: Axes, frame: pd.DataFrame, column: str, rates: Sequence[float], label: str) -> None:
    """A line per layer, its colour by depth, and rate, its dashes; on a logarithmic scale."""
    axes.set(xlabel="training steps", ylabel=label)
    if not (frame[column] > 0).any():
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=FAINT)
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
        Line2D([], [], color=FAINT, linestyle=dashes, label=dropout_rate(rate)) for rate, dashes in zip(rates, _DASHES)
    ]
    axes.legend(handles=handles, framealpha=0.8, edgecolor="none", fontsize=8, ncols=2)


def _losses(axes: Axes, frame: pd.DataFrame, rates: Sequence[float]) -> None:
    """Held-out loss of every rate, and training loss where it was recorded."""
    for rate, colour in zip(rates, _RATES):
        by_step = frame[frame["rate"] == rate].groupby("step")
        axes.plot(by_step["heldout"].mean(), color=colour, label=f"held out, {dropout_rate(rate)}")
        if frame["loss"].notna().any():
            label = f"training, {dropout_rate(rate)}"
            axes.plot(by_step["loss"].mean(), color=colour, linewidth=0.9, linestyle=":", label=label)
    axes.set(xlabel="training steps", ylabel="loss in evaluation mode, nats")


def _spreads_by_width(runs: pd.DataFrame, rates: Sequence[float]) -> Iterator[tuple[str, pd.Series, dict[str, Any]]]:
    for name, dashes in zip(SPREADS, _DASHES):
        for rate, colour in zip(rates, _RATES):
            values = runs[runs["rate"] == rate].groupby(["width", "seed"])[name].mean()
            yield f"{SPREADS[name]}, {dropout_rate(rate)}", values, {"color": colour, "linestyle": dashes}


def _effects_by_depth(runs: pd.DataFrame, rates: Sequence[float]) -> Iterator[tuple[str, pd.Series, dict[str, Any]]]:
    for name, dashes in zip(EFFECTS, _DASHES):
        for rate, colour in list(zip(rates, _RATES))[1:]:
            values = effects(runs, rate, name).groupby(["depth", "seed"]).mean()
            yield f"{EFFECTS[name]}, dropout {rate:g}", values, {"color": colour, "linestyle": dashes}


def _errors(axes: Axes, values: pd.Series, **style: Any) -> None:
    """Mean and interval over seeds of a series indexed by (place, seed), places on a scale of doublings."""
    ends = np.array([bootstrap.t_interval(part.to_numpy()) for _, part in values.groupby(level=0)])
    places = sorted(values.index.get_level_values(0).unique())
    mean, low, high = ends.T
    bars = np.nan_to_num([mean - low, high - mean])
    axes.errorbar(places, mean, bars, marker="o", markersize=4, linewidth=1.3, capsize=2, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(places)


# --- the toy model ---------------------------------------------------------------------------------------------------


def toy_model(frame: pd.DataFrame) -> Figure:
    """The plane of sparsity (across) and dropout (up), after Pona (2023), means over seeds: panels per ``decay``."""
    decays = sorted(frame["decay"].unique())
    figure = Figure(figsize=(15, 3.2 * len(decays) + 0.9), layout="constrained")
    grid = figure.subplots(len(decays), len(TOY_PANELS), squeeze=False, sharex=True, sharey=True)
    for decay, row in zip(decays, grid):
        part = frame[frame["decay"] == decay]
        for (name, title), axes in zip(TOY_PANELS.items(), row):
            plane = part.pivot_table(index="rate", columns="sparsity", values=name, dropna=False)
            norm = Normalize(0, 1) if name == "dimensionality" else Normalize(0, float(np.nanmax(plane)))
            image = axes.imshow(plane, origin="lower", aspect="auto", cmap="viridis", norm=norm)
            axes.set_xticks(range(plane.shape[1]), [f"{sparsity:g}" for sparsity in plane.columns], rotation=60)
            axes.set_yticks(range(plane.shape[0]), [f"{rate:g}" for rate in plane.index])
            axes.spines[["top", "right"]].set_visible(False)
            figure.colorbar(image, ax=axes, shrink=0.85)
            if axes in grid[0]:
                axes.set_title(title, loc="left", fontsize=10)
            if axes in grid[-1]:
                axes.set_xlabel("sparsity")
        row[0].set_ylabel(f"dropout\n(importance x {decay:g} a feature)")
    figure.supxlabel(
        "means over seeds; the first and the last panel fall with the weights' scale, the two between do not",
        fontsize=9,
        color=FAINT,
    )
    return figure


FIGURES: Mapping[str, Callable[[pd.DataFrame], Figure]] = {
    MODELS: models,
    CONFIRMATION: confirmation,
    PROBES: probes,
    ENSEMBLE: ensembles,
    PERCEPTRONS: stability,
    STREAM: stability,
    TOY: toy_model,
}
CAPTIONS = {
    MODELS: "Each measure over the rate of dropout in training, at matched steps and at matched held-out loss: mean "
    "over seeds, every seed a dot. The first of each row decides its half; an arrow shows the direction that was "
    "predicted.",
    CONFIRMATION: "Additivity (0 chain, 1 independent, above 1 backup) of pairs of layers, MLPs and heads in models "
    "trained afresh to confirm it, without and with dropout; the two of a seed joined.",
    PROBES: "Loss above nothing dropped when layers or neurons are dropped at test time, over the rate of dropout in "
    "training, at matched held-out loss: mean over seeds, every seed a dot.",
    ENSEMBLE: "Averages of 1 to 64 subnetworks of the models with the most dropout, beside the same model with nothing "
    "dropped (scaling); mean over seeds.",
    PERCEPTRONS: "Variance of activations and norm of gradients over training, with and without dropout, perceptrons "
    "of several widths and depths.",
    STREAM: "The same of the small models' residual stream, without dropout.",
    TOY: "The toy model of superposition: features per dimension and interference over sparsity and dropout.",
}
