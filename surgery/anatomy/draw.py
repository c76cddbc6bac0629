"""The figures of the anatomy, from its tables: the boundaries by every detector, convergence, and D.

>>> import pandas as pd
>>> frame = pd.DataFrame({"layer": [0, 1], "same_content": [0.1, 0.2], "same_language": [0.2, 0.1]})
>>> len(convergence(frame.assign(neither=0.0)).axes)
1
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from surgery.anatomy.files import BOUNDARIES, CONVERGENCE, DETECTORS, ENDS
from surgery.page.drawing import ACCENT, BLUE, FAINT, GREY, INK, plain

KINDS = {
    "same_content": ("same content, other language", ACCENT),
    "same_language": ("same language, other content", BLUE),
    "neither": ("neither", GREY),
}


def figures(tables: Mapping[str, pd.DataFrame], n_layers: int) -> dict[str, Figure]:
    """The figures of the tables of a folder, by the name of their PNG file."""
    by_name = {
        "anatomy_boundaries": boundaries(tables[BOUNDARIES], tables[DETECTORS], n_layers),
        "anatomy_ends": ends(tables[ENDS]),
    }
    if CONVERGENCE in tables:
        by_name["anatomy_convergence"] = convergence(tables[CONVERGENCE])
    return by_name


def boundaries(posterior: pd.DataFrame, detectors: pd.DataFrame, n_layers: int) -> Figure:
    """Above, the probability of each boundary by layer; below, where every detector puts them, with intervals."""
    names = detectors["detector"].drop_duplicates().tolist()
    figure = Figure(figsize=(9, 0.36 * len(names) + 3.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, max(2, 0.36 * len(names))))
    for boundary, colour in (("in", ACCENT), ("out", BLUE)):
        share = posterior[posterior["boundary"] == boundary]
        label = f"boundary: {boundary}"
        above.bar(share["layer"], share["probability"], width=0.6, color=colour, alpha=0.8, label=label)
        placed = detectors[(detectors["boundary"] == boundary) & detectors["layer"].notna()]
        rows = [names.index(name) for name in placed["detector"]]
        below.hlines(rows, placed["layer_low"], placed["layer_high"], color=colour, linewidth=2, alpha=0.6)
        below.plot(placed["layer"], rows, "o", color=colour)
    above.set(ylim=(0, 1), ylabel="share of resamples")
    above.set_title("Where input, middle and output part meet", loc="left")
    above.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    below.set_yticks(range(len(names)), [plain(name) for name in names])
    below.set(ylim=(len(names) - 0.5, -0.5), xlim=(-0.5, n_layers + 0.5), xlabel="first layer behind the boundary")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def convergence(frame: pd.DataFrame) -> Figure:
    """SC, SL and neither by layer, intervals shaded (``surgery.anatomy.convergence.COLUMNS``)."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, (label, colour) in KINDS.items():
        axes.plot(frame["layer"], frame[name], "o-", color=colour, markersize=4, label=label)
        if f"{name}_low" in frame:
            axes.fill_between(frame["layer"], frame[f"{name}_low"], frame[f"{name}_high"], color=colour, alpha=0.2)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="layer that the stream enters", ylabel="cosine of two sentences\nlayer mean subtracted")
    axes.set_title("Does content count for more than language?", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    return figure


def ends(frame: pd.DataFrame) -> Figure:
    """D, of each end too, and D of R/R_rotated with intervals, a row per kind of prompts
    (``surgery.anatomy.ends_against_middle.COLUMNS``)."""
    figure = Figure(figsize=(9, 0.6 * len(frame) + 2.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shown = {"D": ("both ends", ACCENT), "D_in": ("first end", BLUE), "D_out": ("last end", GREY)}
    for axes, names, label in ((left, shown, "of S"), (right, {"D_over_rotated": shown["D"]}, "of R/R rotated")):
        for place, (name, (which, colour)) in enumerate(names.items()):
            value, low, high = (frame[f"{name}{end}"].astype(float) for end in ("", "_low", "_high"))
            heights = [row + 0.2 * place for row in range(len(frame))]
            axes.hlines(heights, low, high, color=colour, linewidth=2)
            axes.plot(value, heights, "o", color=colour, label=which)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title(f"ends minus middle, {label}", loc="left")
        axes.set_yticks(range(len(frame)), [plain(kind) for kind in frame["kind"]])
        axes.set_ylim(len(frame) - 0.3, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.supxlabel("below 0 the ends are more parallel, above 0 the middle is", fontsize=9, color=FAINT)
    return figure
