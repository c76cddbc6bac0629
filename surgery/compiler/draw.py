"""The figure of a compiled model: what saved layers cost, and how much faster it runs."""

import pandas as pd
from matplotlib.figure import Figure

from surgery.compiler.floor import Machine, pays
from surgery.compiler.say import UNITS
from surgery.compiler.speed import PLAIN
from surgery.page.drawing import ACCENT, BLUE, COLOURS, INK


def frontier(frame: pd.DataFrame, speed: pd.DataFrame, allow: float, metric: str) -> Figure:
    """Left, cost over layers saved, a line per family; right, where it was timed, speed beside the original's."""
    figure = Figure(figsize=(12 if len(speed) else 7.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2 if len(speed) else 1, squeeze=False, width_ratios=(1.5, 1) if len(speed) else (1,))[0]
    left = panels[0]
    families = frame["family"].unique()
    for place, (family, colour) in enumerate(zip(families, COLOURS * 3)):
        rows = frame[(frame["family"] == family) & (frame["saved"] > 0)]
        at = rows["saved"] + 0.1 * (place - len(families) / 2)
        if rows["saved"].duplicated().any():
            left.plot(at, rows["cost"], ".", color=colour, label=family, alpha=0.6)
        else:
            ends = [(rows["cost"] - rows["cost_low"]).clip(lower=0), (rows["cost_high"] - rows["cost"]).clip(lower=0)]
            left.errorbar(at, rows["cost"], yerr=ends, fmt="o-", color=colour, label=family, markersize=4, linewidth=1)
    left.axhline(allow, color=INK, linestyle=":", linewidth=1)
    left.axhline(0, color=INK, linewidth=0.8)
    left.set_yscale("symlog", linthresh=0.1)
    left.set(xlabel="layers in a row saved", ylabel=f"loss added, {UNITS[metric]}")
    left.legend(frameon=False, fontsize=8)
    if len(speed):
        right, speed = panels[1], speed[speed["runs"] == PLAIN]
        others = [name for name in speed["model"].unique() if name != "original"]
        labels = [f"{phase}, batch {batch}" for phase, batch in dict.fromkeys(zip(speed["phase"], speed["batch"]))]
        for place, (name, colour) in enumerate(zip(others, (ACCENT, BLUE, *COLOURS[2:]))):
            rows = speed[speed["model"] == name]
            at = [n + 0.2 * (place - (len(others) - 1) / 2) for n in range(len(rows))]
            ends = [rows["ratio"] - rows["ratio_low"], rows["ratio_high"] - rows["ratio"]]
            right.errorbar(rows["ratio"], at, xerr=ends, fmt="o", color=colour, label=name, markersize=5)
            right.plot(rows["floor"], at, "|", color=colour, markersize=10)
        right.axvline(1, color=INK, linewidth=0.8)
        right.set_yticks(range(len(labels)), labels)
        right.set(xlabel="tokens a second, original = 1 (bars: the floor)")
        right.legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def floor(machine: Machine) -> Figure:
    """What a quarter of the layers saved gains at most, over the width of the model, by machine, phase and batch."""
    frame = pays(machine)
    names = list(frame["machine"].unique())
    figure = Figure(figsize=(5.2 * len(names), 3.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names):
        of_machine = frame[frame["machine"] == name]
        lines = dict.fromkeys(zip(of_machine["phase"], of_machine["batch"]))
        for (phase, batch), colour, width in zip(lines, COLOURS, (6, 4, 2.5, 1)):  # seen where one lies on another
            rows = of_machine[(of_machine["phase"] == phase) & (of_machine["batch"] == batch)]
            label = f"{phase}, batch {batch}"
            axes.plot(rows["d_model"], rows["ratio"], color=colour, linewidth=width, label=label)
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="d_model", title=name)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("speed, original = 1")
    panels[-1].legend(frameon=False, fontsize=8)
    return figure
