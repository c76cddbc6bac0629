"""The figures of a scan, drawn from the tables of ``surgery.stats.comparisons`` alone.

``brain_scan`` shows the gain of every repeated span, first layer across and last layer up (after D. Ng's RYS),
``pareto`` the gain against the layers it costs, ``group_bars`` chosen wirings in every group of probes, ``painters``
the reorder family of Sun et al. (2024, arXiv 2407.09298) by size of the window. Each returns a matplotlib ``Figure``,
which ``surgery.page.drawing.png`` turns into bytes. A gain above 0 is better than the unmodified model, for every
metric. ``of_scan`` draws those that a scan has data for, by the names of their files.

>>> import pandas as pd
>>> from surgery.page.drawing import png
>>> gains = {"wiring": [":2 1:", ":3 1:"], "gain": [0.1, -0.2], "p_max": [0.01, 0.4]}
>>> png(brain_scan(pd.DataFrame(gains), n_layers=4))[1:4]
b'PNG'
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from surgery.page.chapters import Drawing
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
    PRINTED_UP_TO,
    SKY,
    VIOLET,
    plain,
)
from surgery.wiring.value import Wiring

SURE = 0.05  # p_max below which a gain is marked
MOST_WIRINGS = 8  # side by side: one colour each
PALETTE = (BLUE, ACCENT, GREEN, PINK, ORANGE, SKY, GREY, INK)
MARKERS = "os^DvPX*"
UNCHANGED = "the unmodified model"
MOST_GROUPS = 100  # beside each other
MOST_BARS = 4  # wirings in every group of probes, of the winners of a scan
UNITS = {
    "loglik": "nats per answer",
    "exact": "share of answers",
    "credit": "share of an answer",
    "choice": "share of answers",
    "loss": "nats per token",
    "kl": "nats per token",
}


def of_scan(
    table: pd.DataFrame,
    groups: pd.DataFrame,
    n_layers: int,
    metric: str,
    variants: "pd.DataFrame | None" = None,
) -> dict[str, Drawing]:
    """Draw the figures that a scan has data for, by name: brain_scan, pareto, group_bars, painters.

    ``table`` is of the search half, ``groups`` the winners by group on the validation half (empty: no bars),
    ``variants`` the table of the reorder family.
    """
    drawings: dict[str, Drawing] = {}
    unit = UNITS[metric]
    if any(Wiring.parse(wiring, n_layers).repeated_span() for wiring in table["wiring"]):
        caption = "Gain of every span run twice, search half; the bars are means over a column and a row."
        drawings["brain_scan"] = Drawing(brain_scan(table, n_layers, unit=unit), caption)
    if variants is None:
        caption = "Gain against the layers that a wiring runs beyond the model's own, search half."
        drawings["pareto"] = Drawing(pareto(table, n_layers, unit=unit), caption)
    if len(groups):
        caption = "The best of the search half by group of probes, on the validation half."
        best = list(dict.fromkeys(groups["wiring"]))[:MOST_BARS]
        drawings["group_bars"] = Drawing(group_bars(groups, best, unit=unit), caption)
    if variants is not None:
        caption = "The reorder family of Sun et al. (2024) over centred windows of growing size."
        drawings["painters"] = Drawing(painters(variants, _gain_label(unit)), caption)
    return drawings


def brain_scan(table: pd.DataFrame, n_layers: int, times: int = 2, unit: str = "") -> Figure:
    """Draw the gain of every span run ``times`` times; p_max < .05 outlined, means along both edges.

    Spans that were not measured stay grey; a cross marks those that are not finite on some prompt, and their row and
    column have no mean. The colours are symmetric about 0; where the losses dwarf the gains they are logarithmic beyond
    the largest gain.

    Raises ValueError if the table has no such span, or several rows of one (a table by group: choose a group).
    """
    grid, sure = _cells(table, n_layers, times)
    side = float(np.clip(0.42 * n_layers + 1.6, 4.2, 8.5))
    figure = Figure(figsize=(side + 2.9, side + 1.9), layout="constrained")
    spec = figure.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5))
    axes = figure.add_subplot(spec[1, 0])
    image = _heat(axes, grid, n_layers)
    _outline(axes, grid, sure)
    axes.set(xlabel="first layer repeated (start)", ylabel="last layer repeated (stop - 1)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10], nbins=17))
    above, beside = figure.add_subplot(spec[0, 0], sharex=axes), figure.add_subplot(spec[1, 1], sharey=axes)
    places = np.arange(n_layers)
    above.bar(places, _mean(grid, 0), width=0.85, color=_signs(_mean(grid, 0)))
    beside.barh(places, _mean(grid, 1), height=0.85, color=_signs(_mean(grid, 1)))
    above.axhline(0, color=INK, linewidth=0.8)
    beside.axvline(0, color=INK, linewidth=0.8)
    above.set_ylabel("mean gain\nby start", fontsize=9)
    beside.set_xlabel("mean gain\nby stop", fontsize=9)
    above.tick_params(labelbottom=False)
    beside.tick_params(labelleft=False)
    beside.xaxis.set_major_locator(MaxNLocator(2))
    for edge in (above, beside):
        edge.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, ax=beside, shrink=0.85, label=_gain_label(unit))
    _ticks(bar.ax, image)
    above.set_title(f"Gain of running a span {'twice' if times == 2 else f'{times} times'}", loc="left")
    better, worse = (sure & (grid > 0)).sum(), (sure & (grid < 0)).sum()
    note = (
        f"outlined: p_max < {SURE:g}, {better} better, {worse} worse of {np.isfinite(grid).sum()}; grey: not measured"
    )
    if np.isneginf(grid).any():
        note += f"; ×: not finite on some prompt, {np.isneginf(grid).sum()}"
    figure.supxlabel(note, fontsize=9, color=FAINT)
    return figure


def pareto(table: pd.DataFrame, n_layers: int, labels: int = 6, unit: str = "") -> Figure:
    """Draw the gain of every wiring against the layers that it runs beyond the model's own, and the Pareto front.

    The unmodified model is a point as well, and wirings that are cheaper than it can be on the front. The gains on the
    front were chosen for being large and so are too large: measure them again on other probes.
    """
    points = table.dropna(subset=["gain"])
    extra = np.array([Wiring.parse(text, n_layers).depth - n_layers for text in points["wiring"]], dtype=float)
    gain = points["gain"].to_numpy(float)
    sure = (points["p_max"] < SURE).to_numpy() & (gain > 0)
    top, least = max(float(gain.max(initial=0)), 0.0), float(gain.min(initial=0, where=np.isfinite(gain)))
    floor = max(least, -3 * top) if top > 0 else least
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    unsure: dict[str, Any] = {"markersize": 4, "alpha": 0.35, "markeredgewidth": 0, "label": "the others"}
    better: dict[str, Any] = {"markersize": 5.5, "markeredgecolor": INK, "label": f"better, p_max < {SURE:g}"}
    for chosen, style in ((~sure, unsure), (sure, better)):
        axes.plot(extra[chosen], gain[chosen], "o", color=BLUE, **style)
    axes.plot([0], [0], "s", color=INK, markersize=7, label=UNCHANGED)
    front = _front(np.append(extra, 0.0), np.append(gain, 0.0))
    x, y = np.append(extra, 0.0)[front], np.append(gain, 0.0)[front]
    reach = extra[gain >= floor].max(initial=0) + 0.5
    axes.step(
        np.append(x, reach), np.append(y, y[-1]), where="post", color=ACCENT, linewidth=1.8, label="front", zorder=1
    )
    names = np.append(points["wiring"].to_numpy(str), ":")[front]
    best = {place: plain(names[place]) for place in np.argsort(-y)[:labels] if names[place] != ":"}
    left = extra[gain >= floor].min(initial=0) - 0.5
    for place, name in best.items():
        beyond = (x[place] - left) / (reach - left) + 0.011 * len(name) > 1  # the label would leave the figure
        axes.annotate(
            name,
            (x[place], y[place]),
            xytext=(-4 if beyond else 4, 4),
            textcoords="offset points",
            ha="right" if beyond else "left",
            fontsize=8,
        )
    axes.axhline(0, color=INK, linewidth=0.8)
    hidden = int((gain < floor).sum())
    spread = (top - floor) or 1.0
    axes.set_xlim(left, reach)
    axes.set_ylim(floor - 0.05 * spread, top + 0.12 * spread)
    axes.set(xlabel="layers run beyond the model's own", ylabel=_gain_label(unit))
    axes.set_title("What the gain costs in depth", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if hidden:
        figure.supxlabel(f"{hidden} of {len(gain)} wirings lose more than is shown", fontsize=9, color=FAINT)
    _finish(axes)
    return figure


def group_bars(table: pd.DataFrame, wirings: Sequence[str] = (), unit: str = "") -> Figure:
    """Draw the gain of ``wirings`` (by default all) in every group of probes, with intervals; p_max < .05 starred.

    ``table`` is ``comparisons.table(..., by_group=True)``. Raises ValueError for more than 8 wirings, for one that is
    not in the table, and for a table without groups.
    """
    if "group" not in table:
        raise ValueError("the bars need a row per group, from comparisons.table(..., by_group=True)")
    known = list(dict.fromkeys(table["wiring"]))
    names = list(wirings) or known
    absent = [name for name in names if name not in known]
    if absent:
        raise ValueError(f"the wiring {absent[0]} is not in the table")
    if len(names) > MOST_WIRINGS:
        raise ValueError(f"{len(names)} wirings are too many beside each other, choose at most {MOST_WIRINGS}")
    table = table.assign(group=table["group"].fillna("").astype(str))  # a CSV file has no empty text
    every = sorted(set(table["group"]), key=_naturally)
    groups, rows = every[:MOST_GROUPS], table.set_index(["wiring", "group"])
    across = float(np.clip(0.28 * len(groups) * (len(names) + 1) + 3.5, 7, 16))
    figure = Figure(figsize=(across, 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        own = rows.loc[name].reindex(groups)
        broken, own["gain"] = np.isneginf(own["gain"]).to_numpy(), own["gain"].replace(-np.inf, np.nan)
        x = np.arange(len(groups)) + width * (place - (len(names) - 1) / 2)
        axes.bar(x, own["gain"], width * 0.92, color=PALETTE[place], label=plain(name), alpha=0.85)
        ends = [(own["gain"] - own["gain_low"]).abs(), (own["gain_high"] - own["gain"]).abs()]
        axes.errorbar(x, own["gain"], yerr=ends, linestyle="none", ecolor=INK, elinewidth=1)
        for at in x[broken]:
            axes.annotate("×", (at, 0), ha="center", va="center")
        for at, (_, row) in zip(x, own.iterrows()):
            if row["p_max"] < SURE:
                end = np.nanmax([row["gain_high"], row["gain"], 0])
                axes.annotate("*", (at, end), xytext=(0, 0), textcoords="offset points", ha="center", fontsize=13)
    axes.axhline(0, color=INK, linewidth=0.8)
    counts = rows.groupby("group")["n_prompts"].max()
    axes.set_xticks(range(len(groups)), [f"{plain(group or 'all')}\n({counts[group]})" for group in groups])
    more = f"; {len(every) - len(groups)} more are not shown" if len(every) > len(groups) else ""
    axes.set(xlabel=f"group of probes (how many){more}", ylabel=_gain_label(unit))
    axes.set_title("Where it helps: gain by group", loc="left")
    axes.margins(y=0.12)
    figure.supxlabel(
        f"lines: 95 % interval of each bar by itself; *: p_max < {SURE:g} over all rows"
        + "; ×: not finite on some prompt" * bool(np.isneginf(table["gain"]).any()),
        fontsize=9,
        color=FAINT,
    )
    _finish(axes)
    return figure


def painters(table: pd.DataFrame, ylabel: str = "gain over the unmodified model") -> Figure:
    """Draw the gain of every reordering of a centred window by its size, a line per ``variant`` with its interval.

    ``table`` is ``controls.painters(n_layers).merge(comparisons.table(...), on="wiring")``; where a variant has several
    wirings of one size (random orders), gain and interval ends are averaged over them. Raises ValueError for a table
    that does not say ``variant`` and ``size``.
    """
    missing = [name for name in ("variant", "size") if name not in table]
    if missing:
        raise ValueError(f"the table has no column {missing[0]}: merge it with controls.painters(n_layers) on 'wiring'")
    variants = list(dict.fromkeys(table["variant"]))
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    for place, variant in enumerate(variants):
        own = table[table["variant"] == variant].groupby("size")[["gain", "gain_low", "gain_high"]].mean().reset_index()
        own = own.where(np.isfinite(own["gain"]))  # a gap where a wiring is not finite on some prompt
        style: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)]}
        axes.fill_between(own["size"], own["gain_low"], own["gain_high"], color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(own["size"], own["gain"], markersize=5, linewidth=1.6, label=plain(variant), **style)
    axes.axhline(0, color=INK, linewidth=0.8, linestyle="--", label=UNCHANGED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layers in the window", ylabel=ylabel)
    axes.set_title("Middle layers skipped, repeated, reordered, in parallel", loc="left")
    figure.supxlabel("shaded: 95 % interval over prompts", fontsize=9, color=FAINT)
    _finish(axes)
    return figure


def _naturally(name: str) -> list[Any]:
    """Sort key that puts k=10 after k=9, however long a number is."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part) if place % 2 else part for place, part in enumerate(parts)]


def _gain_label(unit: str) -> str:
    return "gain over the unmodified model" + (f" ({unit})" if unit else "")


def _cells(table: pd.DataFrame, n_layers: int, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Gains, and whether each is sure, at [stop - 1, start]."""
    grid, sure = np.full((n_layers, n_layers), np.nan), np.full((n_layers, n_layers), False)
    seen = set()
    for wiring, gain, p_max in zip(table["wiring"], table["gain"], table["p_max"]):
        span = Wiring.parse(wiring, n_layers).repeated_span(times)
        if span is None:
            continue
        if span in seen:
            raise ValueError(f"the span {span} has several rows; of a table by group, draw one group at a time")
        seen.add(span)
        start, stop = span
        grid[stop - 1, start], sure[stop - 1, start] = gain, p_max < SURE
    if not seen:
        raise ValueError(f"none of the {len(table)} wirings runs one span {times} times and nothing else")
    return grid, sure


def _heat(axes: Axes, grid: np.ndarray, n_layers: int) -> AxesImage:
    absent = np.where(np.isnan(grid) & (np.arange(n_layers)[:, None] >= np.arange(n_layers)), 1.0, np.nan)
    axes.imshow(absent, origin="lower", cmap=ListedColormap([PALE]), interpolation="nearest", aspect="auto")
    image = axes.imshow(grid, origin="lower", cmap="PuOr_r", norm=_norm(grid), interpolation="nearest", aspect="auto")
    for stop, start in np.argwhere(np.isneginf(grid)):
        axes.text(start, stop, "×", ha="center", va="center")
    if n_layers <= PRINTED_UP_TO:
        for stop, start in np.argwhere(np.isfinite(grid)):
            red, green, blue, _ = image.to_rgba(grid[stop, start])
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            colour = "white" if dark else "black"
            axes.text(start, stop, _short(grid[stop, start]), ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlim=(-0.5, n_layers - 0.5), ylim=(-0.5, n_layers - 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return image


def _norm(grid: np.ndarray) -> Normalize:
    values = grid[np.isfinite(grid)]
    reach = float(np.abs(values).max(initial=0)) or 1.0
    near = float(values.max(initial=0)) or float(np.median(np.abs(values)))
    near = max(near, reach / 1000)
    return SymLogNorm(near, vmin=-reach, vmax=reach) if reach > 4 * near else Normalize(-reach, reach)


def _ticks(axes: Axes, image: AxesImage) -> None:
    if not isinstance(image.norm, SymLogNorm):
        return
    near, reach = image.norm.linthresh, float(image.norm.vmax or 1)
    near = float(f"{near:.1g}")
    beyond = [near * 10**power for power in range(1, 9) if near * 10**power <= reach]
    axes.yaxis.set_major_locator(FixedLocator([-tick for tick in beyond[::-1]] + [-near, 0, near] + beyond))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.4g}"))


def _outline(axes: Axes, grid: np.ndarray, sure: np.ndarray) -> None:
    """Draw a line around the sure gains, a thinner one where sure losses end (not around what was not measured)."""
    gains, losses = np.pad(sure & (grid > 0), 1), np.pad(sure & (grid < 0), 1)
    there = np.pad(np.isfinite(grid), 1)
    for mask, everywhere, width in ((losses, False, 0.8), (gains, True, 1.8)):
        across = (mask[1:, 1:-1] != mask[:-1, 1:-1]) & (everywhere | (there[1:, 1:-1] & there[:-1, 1:-1]))
        along = (mask[1:-1, 1:] != mask[1:-1, :-1]) & (everywhere | (there[1:-1, 1:] & there[1:-1, :-1]))
        lines = [[(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)] for y, x in np.argwhere(across)]
        lines += [[(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)] for y, x in np.argwhere(along)]
        axes.add_collection(LineCollection(lines, colors=INK, linewidths=width, capstyle="projecting"))


def _short(value: float) -> str:
    digits = 2 if abs(value) < 1 else 1 if abs(value) < 10 else 0
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def _mean(grid: np.ndarray, axis: int) -> np.ndarray:
    count = np.isfinite(grid).sum(axis)
    mean = np.sum(grid, axis=axis, where=np.isfinite(grid)) / np.maximum(count, 1)
    return np.where((count > 0) & ~np.isneginf(grid).any(axis), mean, np.nan)


def _signs(values: np.ndarray) -> list[str]:
    return [ACCENT if value > 0 else VIOLET for value in values]


def _front(cost: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Indices of the points that gain more than everything as cheap or cheaper, cheapest first."""
    order = np.lexsort((-gain, cost))
    reached = np.maximum.accumulate(gain[order])
    better = np.append(True, reached[1:] > reached[:-1])
    return order[better]


def _finish(axes: Axes) -> None:
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
