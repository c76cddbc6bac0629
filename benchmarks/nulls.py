"""Draw what random networks read from two comparisons of R: with the displacement N, and with rotated writes.

    python benchmarks/nulls.py docs/images/nulls.png          # two minutes on one core

Random networks prefer no direction, so a null must read 1 on them, whatever their activation, norm, attention and size
of updates. R/N does not; R/R rotated and the preference do. The bundled model stands beside them.
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import surgery
from benchmarks.simulations.series import null_readings, random_networks
from surgery.corpus import bundled
from surgery.page import drawing
from surgery.series import window
from surgery.stats.sampling import Sampling

READINGS = {"R_over_N": "R / N", "R_over_rotated": "R / R rotated", "preference": "preference"}


def draw(networks: pd.DataFrame, model: pd.Series) -> Figure:
    """A row for each reading: a dot for every random network, a diamond for the bundled model."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(READINGS):
        spread = [place + 0.22 * (i / (len(networks) - 1) - 0.5) for i in range(len(networks))]
        axes.plot(networks[name], spread, "o", color=drawing.BLUE, alpha=0.6, markersize=5, markeredgewidth=0)
        axes.plot(model[name], place, "D", color=drawing.ACCENT, markersize=8)
    axes.axvline(1, color=drawing.INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
    axes.minorticks_off()
    axes.set_yticks(range(len(READINGS)), list(READINGS.values()))
    axes.set(xlabel="mean over windows of two and three layers from layer 1 on", xlim=(0.9, 3.5), ylim=(2.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{len(networks)} random networks, which prefer nothing (dots), and the bundled model (diamonds)",
        loc="left",
        fontsize=11,
    )
    return figure


def main() -> None:
    stack = surgery.Stack(surgery.load("babel"))
    frame = window.windows(stack, stack.tokens(bundled.prompts(64)), 3, damage=False, sampling=Sampling(resamples=0))
    model = frame[frame["start"] > 0][list(READINGS)].mean()
    networks = null_readings(random_networks())
    print(networks[list(READINGS)].describe().round(2).to_string(), model.round(2).to_string(), sep="\n")
    Path(sys.argv[1]).write_bytes(drawing.png(draw(networks, model)))


if __name__ == "__main__":
    main()
