"""The figures of mean reversion, from its tables: by layer, coordinate, window and direction, and displacements.

>>> import pandas as pd
>>> frame = pd.DataFrame({"layer": [1, 2], "kappa": [0.1, 0.2], "kappa_low": 0.0, "kappa_high": 0.3})
>>> len(coordinates(frame.assign(coordinates="raw")).axes)
1
"""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from surgery.page.drawing import (
    ACCENT,
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PINK,
    SKY,
    band,
    line,
    plain,
    triangle,
    unsquashed,
    whiskers,
)
from surgery.reversion import files

KINDS = {
    "difference": ("towards another token", ACCENT),
    "random": ("random", BLUE),
    "principal": ("principal", GREEN),
}
VERDICTS = {
    "reverts": ACCENT,
    "slope": INK,
    "turns": FAINT,
    "persists": GREY,
    "grows": BLUE,
    "undecided": PALE,
}
TITLES = {
    "raw": "the stream itself",
    "normalised": "every token divided by its own length",
    "principal": "fixed principal components",
    "logits": "centred logits, final norm frozen",
}


NULLS = {
    "kappa_rotated": ("updates rotated", GREY),
    "kappa_token_shuffled": ("updates of other tokens", SKY),
    "kappa_order_shuffled": ("layers in random order", ORANGE),
    "kappa_untrained": ("untrained weights", GREEN),
}
CAUSAL = {
    "kappa_causal_difference": ("along token differences", "o"),
    "kappa_causal_random": ("random directions", "s"),
    "kappa_causal_principal": ("principal directions", "^"),
}


def figures(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """The figures of the tables of a folder, by the name of their PNG file."""
    by_name = {"reversion": by_layer(tables[files.LAYERS])}
    for file, draw in (
        (files.COORDINATES, coordinates),
        (files.WINDOWS, windows),
        (files.DIRECTIONS, directions),
        (files.RETURNS, returns),
    ):
        if file in tables:
            by_name[file.removesuffix(".csv")] = draw(tables[file])
    return by_name


def coordinates(frame: pd.DataFrame) -> Figure:
    """kappa by layer in every coordinate, its nulls shaded: ``reversion.layers`` with a column ``coordinates``."""
    names = frame["coordinates"].drop_duplicates().tolist()
    figure = Figure(figsize=(11, 2.6 * len(names) + 0.8), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(len(names), 1, sharex=True)), names, strict=True):
        part = frame[(frame["coordinates"] == name) & ((frame["layer"] >= 1) | (frame["layer"].max() == 0))]
        layers = part["layer"].to_numpy()
        for null, (label, colour) in NULLS.items():
            if null in part and part[null].notna().any():
                band(axes, layers, part, null, colour, f"null: {label}")
        if "kappa_mechanical" in part and part["kappa_mechanical"].notna().any():
            axes.plot(
                layers, part["kappa_mechanical"], "--", color=INK, linewidth=1, label="mechanical: 1 - 1/√(1 + r²)"
            )
        line(axes, layers, part, "kappa", ACCENT, "kappa of the model")
        unsquashed(axes, part["kappa"])
        axes.set_title(plain(f"{name}: {TITLES.get(name, '')}", 80), loc="left", fontsize=10)
        axes.set_ylabel("kappa")
        _finish(axes)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)
    axes.set_xlabel("layer (layer 0 is left out: it starts from the bare embeddings)")
    return figure


def windows(frame: pd.DataFrame) -> Figure:
    """The variance ratio of every window and its kappa beyond the random walks; first layer across, last layer up."""
    n_layers = int(frame["stop"].max())
    side = float(np.clip(0.42 * n_layers + 1.6, 3.6, 8.0))
    figure = Figure(figsize=(2 * side + 2.2, side + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    longer = frame[(frame["stop"] - frame["start"] > 1) & (frame["start"] > 0)]
    reach = max(1.05, float(longer["variance_ratio"].max()), 2 - float(longer["variance_ratio"].min()))
    triangle(figure, left, longer, "variance_ratio", n_layers, "PuOr_r", Normalize(2 - reach, reach))
    left.set_title("Variance ratio\nbelow 1 later layers undo earlier ones", loc="left")
    later, name = frame[frame["start"] > 0], "kappa_excess" if "kappa_excess" in frame else "kappa"
    most = max(0.01, float(later[name].abs().max()))
    triangle(figure, right, later, name, n_layers, "PuOr", TwoSlopeNorm(0, -most, most))
    right.set_title(f"{name.replace('_', ' ')}\nabove 0 it writes against deviations", loc="left")
    figure.supxlabel("windows from layer 1 on", fontsize=9, color=FAINT)
    return figure


def directions(frame: pd.DataFrame) -> Figure:
    """How fast deviations along a layer's directions decay, against updates of other tokens; below, the eigenvalues of
    what one layer leaves of them, on the complex plane."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2.4))
    shown = frame[frame["layer"] >= 1] if frame["layer"].max() > 0 else frame
    layers = np.sort(shown["layer"].unique())
    by_layer = shown.groupby("layer")["decay_null"]
    low = shown.groupby("layer")["decay_null_low"].min() if "decay_null_low" in shown else by_layer.min()
    high = shown.groupby("layer")["decay_null_high"].max() if "decay_null_high" in shown else by_layer.max()
    style = {"color": SKY, "alpha": 0.35, "linewidth": 0}
    for layer, label in zip(layers, ["null: updates of other tokens"] + [None] * len(layers)):
        above.fill_between([layer - 0.38, layer + 0.38], low[layer], high[layer], label=label, **style)
    for verdict, colour in VERDICTS.items():
        part = shown[shown["verdict"] == verdict]
        place = part["layer"] + 0.6 * (part["rank"] / max(1, frame["rank"].max()) - 0.5)
        above.vlines(place, part["decay_low"], part["decay_high"], color=colour, linewidth=1, alpha=0.7)
        above.plot(place, part["decay"], "o", color=colour, markersize=3.5, label=verdict)
    above.axhline(0, color=INK, linewidth=0.8)
    above.set_ylabel("part of a deviation\ntaken back by one layer")
    above.set_xlabel("layer; within a layer from the fastest direction to the slowest")
    above.set_title("Which directions revert: eigenvalues of the symmetric part of the drift", loc="left")
    _finish(above)
    above.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)
    circle = np.linspace(0, np.pi, 200)
    below.plot(np.cos(circle), np.sin(circle), color=INK, linewidth=0.8, label="1: neither grows nor decays")
    real, imaginary = (shown["modulus"] * part(shown["angle"]) for part in (np.cos, np.sin))
    points = below.scatter(real, imaginary, c=shown["layer"], s=14, cmap="viridis")
    figure.colorbar(points, ax=below, label="layer", shrink=0.9)
    below.set_aspect("equal")
    below.set(xlabel="real part", ylabel="imaginary part")
    below.set_title("What one layer leaves of a deviation: eigenvalues of I - K, upper half", loc="left")
    _finish(below, integer=False)
    below.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False, fontsize=8)
    return figure


def returns(frame: pd.DataFrame, size: float | None = None) -> Figure:
    """What is left of a displacement made at a layer, layer by layer: its length above, its own direction below."""
    size = float(frame["size"].min()) if size is None else size
    shown = frame[frame["size"] == size]
    kinds = [kind for kind in KINDS if kind in set(shown["kind"])]
    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False)
    starts = np.sort(shown["layer"].unique())
    colours = Normalize(0, max(1, starts.max()))
    palette = matplotlib.colormaps["viridis"]
    for column, kind in enumerate(kinds):
        for layer in starts:
            part = shown[(shown["kind"] == kind) & (shown["layer"] == layer)].sort_values("q")
            place = np.concatenate([[layer], layer + part["q"]])
            for axes, name in ((grid[0, column], "remaining"), (grid[1, column], "along")):
                axes.plot(place, np.concatenate([[1.0], part[name]]), color=palette(colours(layer)), linewidth=1.4)
        grid[0, column].set_title(KINDS[kind][0], loc="left", fontsize=10)
        grid[0, column].set_yscale("log")
        grid[1, column].set_xlabel("layer that the stream enters")
        for axes in grid[:, column]:
            axes.axhline(1, color=INK, linewidth=0.8)
            _finish(axes)
        grid[1, column].axhline(0, color=INK, linewidth=0.8, linestyle=":")
    grid[0, 0].set_ylabel("length left")
    grid[1, 0].set_ylabel("left along itself")
    figure.suptitle(
        f"Displacements of {size:g} of the stream's spread, followed through the later layers", x=0.01, ha="left"
    )
    figure.supxlabel(
        "a restoring force brings the length below 1, a rotation only what is left along itself; a colour per layer",
        fontsize=9,
        color=FAINT,
    )
    return figure


def _finish(axes: Axes, integer: bool = True) -> None:
    if integer:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=24))
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def by_layer(frame: pd.DataFrame) -> Figure:
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
            whiskers(above, x, shown, name, marker=marker, color=PINK, label=f"by intervention: {label}", size=4)
    line(above, layers, shown, "kappa", ACCENT, "kappa of the model")
    unsquashed(above, shown["kappa"])
    above.axhline(0, color=INK, linewidth=0.8)
    above.set_ylabel("kappa (fraction of a deviation\nundone by one layer)")
    above.set_title("Mean reversion by depth: kappa, with what the nulls give shaded", loc="left")
    line(below, layers, shown, "psi", BLUE, "psi of the model")
    unsquashed(below, shown["psi"])
    below.axhline(0, color=INK, linewidth=0.8, label="0: random walk")
    below.axhline(1, color=INK, linewidth=0.8, linestyle="--", label="1: variance stationary")
    below.set_ylabel("psi (2 kappa / r²)")
    below.set_title("Reversion against spreading: psi", loc="left")
    below.set_xlabel("layer" + (" (layer 0 is left out: it starts from the bare embeddings)" if len(frame) > 1 else ""))
    for axes in (above, below):
        _finish(axes)
        axes.margins(x=0.02)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    return figure
