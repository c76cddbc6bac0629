"""The figures of series: S and preference of every window, and S on networks whose answer is known."""

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from surgery.page.drawing import ACCENT, BLUE, FAINT, INK, plain, triangle


def windows(frame: pd.DataFrame) -> Figure:
    """S of every window, and its preference on a logarithmic scale around 1; first layer across, last layer up."""
    n_layers = int(frame["stop"].max())
    side = float(np.clip(0.42 * n_layers + 1.6, 3.6, 8.0))
    figure = Figure(figsize=(2 * side + 2.2, side + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    triangle(figure, left, frame, "S", n_layers, "viridis", Normalize(0, 1))
    left.set_title("How serial each window is: S\n0 parallel, 1 serial", loc="left")
    ratio = frame["preference"][frame["preference"] > 0].dropna()
    reach = max(2.0, float(np.exp(np.abs(np.log(ratio)).max()))) if len(ratio) else 2.0
    bar = triangle(figure, right, frame, "preference", n_layers, "PuOr_r", LogNorm(1 / reach, reach))
    ticks = [tick for tick in (1 / 50, 1 / 20, 1 / 10, 1 / 5, 1 / 2, 1, 2, 5, 10, 20, 50) if 1 / reach <= tick <= reach]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.2g}"))
    right.set_title("Response to what the window wrote, over\nthat to the same turned at random", loc="left")
    figure.supxlabel(
        "* what enters layer 0 is the bare embedding, beside which any update is large", fontsize=9, color=FAINT
    )
    return figure


def known_networks(networks: pd.DataFrame, frame: pd.DataFrame, name: str = "this model") -> Figure:
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
        colour = ACCENT if place == len(rows) - 1 else BLUE
        axes.plot(values, place + spread, "o", markersize=4, alpha=0.55, color=colour, markeredgewidth=0)
        if len(values):
            axes.plot([np.median(values)] * 2, [place - 0.34, place + 0.34], color=INK, linewidth=1.8)
    axes.set_yticks(range(len(rows)), [f"{plain(label)}  ({column.count()})" for label, column in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.axhline(len(rows) - 1.5, color=INK, linewidth=0.8)
    axes.set_xlabel("S of a window: 0 parallel, 1 serial")
    axes.set_title("The measure on networks of known structure, and on the model", loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("a dot per window (number in brackets), the line at the median", fontsize=9, color=FAINT)
    return figure
