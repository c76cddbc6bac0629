"""What all figures share: one palette, which the colour-blind can tell apart, and marks for intervals and windows.

Figures are matplotlib's ``Figure``; ``png`` turns them into bytes, the same bytes for the same figure.

>>> png(Figure(figsize=(1, 1)))[1:4]
b'PNG'
"""

import io
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator

from surgery.outside import shown

PRINTED_UP_TO = 16  # layers; in deeper models a number no longer fits into its cell
# The one palette: Okabe and Ito's (2008), which the colour-blind can tell apart, and greys.
INK, FAINT, GREY, PALE = "#222222", "#555555", "#999999", "#CCCCCC"
ACCENT, BLUE, GREEN, PINK, ORANGE, SKY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
VIOLET = "#7B6BB0"
COLOURS = (ACCENT, BLUE, GREEN, PINK, ORANGE, SKY, INK)  # of lines that are told apart by colour alone


def plain(text: object, most: int = 40) -> str:
    r"""Text from outside (a group, a folder, a wiring) as a figure shows it, whatever it holds.

    It is one line of at most ``most`` characters, no mathematics, and a character that the font lacks is written as its
    number: two groups in a script without glyphs stay apart. Every label that is not our own goes through this.

    >>> plain("$a$_1"), plain("_a\n\u4e2d")
    ('\\$a\\$_1', ' _a\\n\\u4e2d')
    """
    font = get_font(findfont(FontProperties()))
    there = (c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in shown(str(text), most))
    label = "".join(there).replace("$", r"\$")
    return f" {label}" if not label or label.startswith("_") else label  # or a legend leaves it out


def png(figure: Figure) -> bytes:
    """The bytes of a figure's PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def triangle(
    figure: Figure, axes: Axes, frame: pd.DataFrame, column: str, n_layers: int, colours: str, norm: Normalize
) -> Colorbar:
    """Draw a column of windows as cells, first layer across, last layer up; return the colour bar.

    ``frame`` has the layers [start, stop) of each window; ``colours`` names a colour map.
    """
    starts, stops = frame["start"].to_numpy(int), frame["stop"].to_numpy(int)
    grid = np.full((n_layers, n_layers), np.nan)
    grid[stops - 1, starts] = frame[column]
    image = axes.imshow(grid, origin="lower", cmap=colours, norm=norm, interpolation="nearest")
    if n_layers <= PRINTED_UP_TO:
        _print_numbers(axes, grid, image)
    axes.set(xlim=(-0.5, n_layers - 1.5), ylim=(0.5, n_layers - 0.5))
    axes.set(xlabel="first layer of the window", ylabel="last layer of the window")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10], nbins=17))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: "0*" if tick == 0 else f"{tick:.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    return figure.colorbar(image, ax=axes, shrink=0.85)


def _print_numbers(axes: Axes, grid: np.ndarray, image: ScalarMappable) -> None:
    for stop, start in np.argwhere(np.isfinite(grid)):
        red, green, blue, _ = image.to_rgba(grid[stop, start])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{grid[stop, start]:.2f}".removeprefix("0")
        axes.text(start, stop, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")


def line(axes: Axes, layers: np.ndarray, frame: pd.DataFrame, name: str, colour: str, label: str) -> None:
    """Draw a column by layer, with its interval shaded."""
    axes.fill_between(layers, frame[f"{name}_low"], frame[f"{name}_high"], color=colour, alpha=0.25, linewidth=0)
    axes.plot(layers, frame[name], "o-", color=colour, markersize=4, linewidth=1.6, label=f"{label} (95 % interval)")


def unsquashed(axes: Axes, values: pd.Series) -> None:
    """Make an axis logarithmic beyond where most values lie, if a few are so far out that they would squash the others.

    >>> axes = Figure().subplots()
    >>> unsquashed(axes, pd.Series([0.1, 0.1, 0.2, 0.1, 9.0]))
    >>> axes.get_yscale()
    'symlog'
    """
    if linear := linear_up_to(values):
        axes.set_yscale("symlog", linthresh=linear)


def linear_up_to(values: pd.Series) -> float | None:
    """Three quarters of the values, if the largest is ten times beyond them; None if none is."""
    sizes = values[np.isfinite(values.astype(float))].abs()
    if len(sizes) > 3 and sizes.max() > 10 * (most := max(float(sizes.quantile(0.75)), 1e-6)):
        return most
    return None


def band(axes: Axes, layers: np.ndarray, frame: pd.DataFrame, name: str, colour: str, label: str) -> None:
    """Shade the interval of a null by layer."""
    low, high = (frame.get(f"{name}_{end}", frame[name]) for end in ("low", "high"))
    axes.fill_between(layers, low, high, color=colour, alpha=0.4, linewidth=1.2, edgecolor=colour, label=label)


def whiskers(axes: Axes, x: np.ndarray, frame: pd.DataFrame, name: str, size: int, **style: Any) -> None:
    """Draw a column as markers with their intervals."""
    low, high = (np.abs(frame[name] - frame.get(f"{name}_{end}", frame[name])) for end in ("low", "high"))
    axes.errorbar(x, frame[name], yerr=[low, high], linestyle="none", markersize=size, linewidth=1, alpha=0.8, **style)
