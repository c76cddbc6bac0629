"""The three figures of a report, drawn from the frames alone.

``windows`` shows S and R/N of every window as triangles, ``reversion`` kappa and psi by depth with their nulls shaded,
``calibration`` S on networks built to be parallel, serial and in between, beside the model's own. Each returns a
matplotlib ``Figure``; ``png`` turns it into bytes. Colours are safe for the colour-blind.

>>> import pandas
>>> figure = windows(pandas.DataFrame({"start": [0, 1], "stop": [2, 3], "S": [0.4, 0.5], "R_over_N": [0.9, 1.1]}))
>>> png(figure)[1:4]
b'PNG'
"""

import io
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

PRINTED_UP_TO = 16  # layers: beyond, a number no longer fits into its cell
NULLS = {
    "kappa_rotated": ("updates rotated", "#999999"),
    "kappa_token_shuffled": ("updates of other tokens", "#56B4E9"),
    "kappa_order_shuffled": ("layers in random order", "#E69F00"),
    "kappa_untrained": ("untrained weights", "#009E73"),
}
CAUSAL = {
    "kappa_causal_difference": ("along token differences", "o"),
    "kappa_causal_random": ("random directions", "s"),
    "kappa_causal_principal": ("principal directions", "^"),
}
INK, FAINT, ACCENT = "#222222", "#555555", "#D55E00"


def windows(frame: pandas.DataFrame) -> Figure:
    """S of every window, and R/N on a logarithmic scale with its midpoint at 1; first layer across, last layer up."""
    n_layers = int(frame["stop"].max())
    side = float(np.clip(0.42 * n_layers + 1.6, 3.6, 8.0))
    figure = Figure(figsize=(2 * side + 2.2, side + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    triangle(figure, left, frame, "S", n_layers, "viridis", Normalize(0, 1))
    left.set_title("How serial each window is: S\n0 parallel, 1 serial", loc="left")
    ratio = frame["R_over_N"][frame["R_over_N"] > 0].dropna()
    reach = max(2.0, float(np.exp(np.abs(np.log(ratio)).max()))) if len(ratio) else 2.0
    bar = triangle(figure, right, frame, "R_over_N", n_layers, "PuOr_r", LogNorm(1 / reach, reach))
    ticks = [tick for tick in (1 / 50, 1 / 20, 1 / 10, 1 / 5, 1 / 2, 1, 2, 5, 10, 20, 50) if 1 / reach <= tick <= reach]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.2g}"))
    right.set_title("Against any displacement of that size: R/N\nabove 1 reads what the window wrote", loc="left")
    figure.supxlabel(
        "* the stream that enters layer 0 is the bare embedding: read R/N there, not S", fontsize=9, color=FAINT
    )
    return figure


def reversion(frame: pandas.DataFrame) -> Figure:
    """kappa and psi by layer from layer 1 on, with intervals; kappa's nulls as bands, the causal kappas as markers."""
    shown = frame[frame["layer"] >= 1] if len(frame) > 1 else frame
    layers = shown["layer"].to_numpy()
    figure = Figure(figsize=(float(np.clip(0.32 * len(layers) + 5.5, 9, 15)), 6.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, (label, colour) in NULLS.items():
        if name in shown and shown[name].notna().any():
            band(above, layers, shown, name, colour, f"null: {label}")
    offset = 0.12
    for place, (name, (label, marker)) in enumerate(CAUSAL.items()):
        if name in shown and shown[name].notna().any():
            x = layers + offset * (place - 1)
            whiskers(above, x, shown, name, marker=marker, color="#CC79A7", label=f"by intervention: {label}", size=4)
    line(above, layers, shown, "kappa", ACCENT, "kappa of the model")
    above.axhline(0, color=INK, linewidth=0.8)
    above.set_ylabel("kappa (fraction of a deviation\nundone by one layer)")
    above.set_title("Mean reversion by depth: kappa, with what the nulls give shaded", loc="left")
    line(below, layers, shown, "psi", "#0072B2", "psi of the model")
    below.axhline(0, color=INK, linewidth=0.8, label="0: random walk")
    below.axhline(1, color=INK, linewidth=0.8, linestyle="--", label="1: variance stationary")
    below.set_ylabel("psi (2 kappa / r²)")
    below.set_title("Reversion against spreading: psi", loc="left")
    below.set_xlabel("layer" + (" (layer 0 is left out: it starts from the bare embeddings)" if len(frame) > 1 else ""))
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=24))
    for axes in (above, below):
        axes.margins(x=0.02)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    return figure


def calibration(networks: pandas.DataFrame, frame: pandas.DataFrame, name: str = "this model") -> Figure:
    """S of every window of the constructed networks, one row each, and of the model below them.

    ``networks`` has the columns of ``series.windows`` and ``network``.
    """
    rows = [(str(network), part["S"]) for network, part in networks.groupby("network", sort=False)]
    rows.append((name, frame["S"]))
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    for place, (_, column) in enumerate(rows):
        values = column.dropna().sort_values().to_numpy()
        spread = 0.22 * np.sin(np.arange(len(values)) * 2.4)  # golden-angle steps: apart, and the same in every run
        colour = ACCENT if place == len(rows) - 1 else "#0072B2"
        axes.plot(values, place + spread, "o", markersize=4, alpha=0.55, color=colour, markeredgewidth=0)
        if len(values):
            axes.plot([np.median(values)] * 2, [place - 0.34, place + 0.34], color=INK, linewidth=1.8)
    axes.set_yticks(range(len(rows)), [f"{label}  ({column.count()})" for label, column in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.axhline(len(rows) - 1.5, color=INK, linewidth=0.8)
    axes.set_xlabel("S of a window: 0 parallel, 1 serial")
    axes.set_title("The measure on networks of known structure, and on the model", loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("a dot per window (number in brackets), the line at the median", fontsize=9, color=FAINT)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def triangle(
    figure: Figure, axes: Axes, frame: pandas.DataFrame, column: str, n_layers: int, colours: str, norm: Normalize
) -> Colorbar:
    """A column of windows as cells, first layer across, last layer up."""
    starts, stops = frame["start"].to_numpy(int), frame["stop"].to_numpy(int)
    grid = np.full((n_layers, n_layers), np.nan)
    grid[stops - 1, starts] = frame[column]
    image = axes.imshow(grid, origin="lower", cmap=colours, norm=norm, interpolation="nearest")
    if n_layers <= PRINTED_UP_TO:
        _print(axes, grid, image)
    axes.set(xlim=(-0.5, n_layers - 1.5), ylim=(0.5, n_layers - 0.5))
    axes.set(xlabel="first layer of the window", ylabel="last layer of the window")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10], nbins=17))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: "0*" if tick == 0 else f"{tick:.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    return figure.colorbar(image, ax=axes, shrink=0.85)


def _print(axes: Axes, grid: np.ndarray, image: ScalarMappable) -> None:
    for stop, start in np.argwhere(np.isfinite(grid)):
        red, green, blue, _ = image.to_rgba(grid[stop, start])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{grid[stop, start]:.2f}".removeprefix("0")
        axes.text(start, stop, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")


def line(axes: Axes, layers: np.ndarray, frame: pandas.DataFrame, name: str, colour: str, label: str) -> None:
    """A column by layer, its interval shaded."""
    axes.fill_between(layers, frame[f"{name}_low"], frame[f"{name}_high"], color=colour, alpha=0.25, linewidth=0)
    axes.plot(layers, frame[name], "o-", color=colour, markersize=4, linewidth=1.6, label=f"{label} (95 % interval)")


def band(axes: Axes, layers: np.ndarray, frame: pandas.DataFrame, name: str, colour: str, label: str) -> None:
    """The interval of a null by layer."""
    low, high = (frame.get(f"{name}_{end}", frame[name]) for end in ("low", "high"))
    axes.fill_between(layers, low, high, color=colour, alpha=0.4, linewidth=1.2, edgecolor=colour, label=label)


def whiskers(axes: Axes, x: np.ndarray, frame: pandas.DataFrame, name: str, size: int, **style: Any) -> None:
    """A column as markers with their intervals."""
    low, high = (np.abs(frame[name] - frame.get(f"{name}_{end}", frame[name])) for end in ("low", "high"))
    axes.errorbar(x, frame[name], yerr=[low, high], linestyle="none", markersize=size, linewidth=1, alpha=0.8, **style)
