"""What a sweep of ``surgery.dropout.toy_model`` says about dropout: paired differences, a sentence, the phase picture.

``differences`` compares every rate with no dropout at equal sparsity and seed, after as many steps and at the same
evaluation loss; ``found`` puts it into words, ``draw`` shows the plane of sparsity and rate after Pona (2023). The
sweep without dropout in it is the control.

>>> from surgery.dropout import toy_model
>>> frame = toy_model.sweep((0.0, 0.9), (0.0, 0.5), (0, 1), n_features=6, n_hidden=2, steps=20)
>>> found(frame).startswith("With importance falling by 0.7")
True
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from surgery.dropout.toy_model import MATCHED
from surgery.page.drawing import FAINT
from surgery.page.phrases import number
from surgery.stats.bootstrap import t_interval, verdict

SMALL = 0.01  # a change in a measure below which nothing is said of it, however sure
DIFFERENCES: dict[str, str] = {
    "decay": "importance of a feature over that of the one before it",
    "rate": "probability that dropout sets a hidden unit to 0 in training",
    "sparsity": "probability that a feature is 0; empty: the mean over all sparsities of the sweep",
    "measure": "which measure of the sweep",
    "control": "the model without dropout, same sparsity and seed: 'steps' trained as long, 'loss' when its loss was as"
    " high",
    "difference": "measure with dropout minus measure of the control, mean over seeds",
    "difference_low": "lower end of its 95 % interval by Student's t over seeds, paired",
    "difference_high": "upper end of it",
    "verdict": "higher, lower or undecided",
    "n_seeds": "pairs",
}
_PANELS = {
    "features_per_dimension": "Features per dimension\n|W|² / hidden units",
    "effective_features": "The same, free of scale\neffective number of features / hidden units",
    "dimensionality": "Share of a dimension\nD of a represented feature",
    "interference": "Interference\non a represented feature",
}
_WORDS = {
    "effective_features": "effective features per dimension",
    "dimensionality": "a feature's share of a dimension",
    "features_per_dimension": "features per dimension, shrinking weights included,",
    "interference": "interference",
}


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Every rate against none, paired by sparsity and seed: ``DIFFERENCES``, a row per rate, sparsity (and their mean),
    measure and control.

    Equal loss is reached by stopping the control early, so that what it has not yet learned counts as well: there its
    initial weights, random directions all, still show.
    """
    rows = []
    for decay, part in frame.groupby("decay"):
        cells = part.set_index(["sparsity", "seed"])
        none = cells[cells["rate"] == 0]
        for rate, dropped in cells[cells["rate"] > 0].groupby("rate"):
            for name in MATCHED:
                controls = {"steps": none[name], "loss": dropped[f"{name}_matched"]}
                for control, values in controls.items():
                    change = (dropped[name] - values).unstack("seed")
                    means = {np.nan: change.dropna().mean()} | {at: row.dropna() for at, row in change.iterrows()}
                    row = {"decay": decay, "rate": rate, "measure": name, "control": control}
                    rows += [row | {"sparsity": at} | _compared(seeds) for at, seeds in means.items() if len(seeds)]
    return pd.DataFrame(rows, columns=list(DIFFERENCES))


def _compared(seeds: pd.Series) -> dict[str, Any]:
    mean, low, high = t_interval(seeds.to_numpy())
    ends = {"difference": mean, "difference_low": low, "difference_high": high}
    return ends | {"verdict": verdict(low, high, "higher", "lower"), "n_seeds": len(seeds)}


def found(frame: pd.DataFrame) -> str:
    """Does dropout lower superposition at equal sparsity? One sentence for every ``decay`` in the sweep.

    Less superposition is what both measures that do not depend on the scale of W say: fewer effective features, and a
    larger share of a dimension for each, by at least ``SMALL``; more, the reverse of both.
    """
    return " ".join(_sentence(decay, frame[frame["decay"] == decay]) for decay in sorted(frame["decay"].unique()))


def _sentence(decay: float, frame: pd.DataFrame) -> str:
    table = differences(frame)
    overall, single = table["sparsity"].isna(), table["sparsity"].notna()
    steps, matched = table["control"] == "steps", table["control"] == "loss"
    last = table[overall & steps & (table["rate"] == table["rate"].max())].set_index("measure")
    numbers = ", ".join(f"{words} {number(last.loc[name], 'difference')}" for name, words in _WORDS.items())
    kind = "With all features equally important" if decay == 1 else f"With importance falling by {decay:g} a feature"
    return (
        f"{kind}, in the mean over {frame['sparsity'].nunique()} sparsities dropout "
        f"{_does(table[overall & steps], 'rate')} (at rate {table['rate'].max():g}, {frame['seed'].nunique()} seeds "
        f"paired: {numbers}); taken singly it {_does(table[single & steps], 'sparsity')}; beside models without it "
        f"stopped early at equal loss it {_does(table[overall & matched], 'rate')}."
    )


def _does(table: pd.DataFrame, axis: str) -> str:
    """``lowers superposition at rate 0.2, 0.5 and raises it at rate 0.1``: where it is sure and not ``SMALL``."""
    table = table[table["difference"].abs() >= SMALL].fillna({"sparsity": -1})
    verdicts = table.pivot(index=["rate", "sparsity"], columns="measure", values="verdict")
    verdicts = verdicts.reindex(columns=list(_WORDS))
    said: list[str] = []
    for verb, features, share in (("lowers", "lower", "higher"), ("raises", "higher", "lower")):
        sure = verdicts[(verdicts["effective_features"] == features) & (verdicts["dimensionality"] == share)]
        places = ", ".join(f"{place:g}" for place in sorted(set(sure.index.get_level_values(axis))))
        if places:
            said.append(f"{verb} {'it' if said else 'superposition'} at {axis} {places}")
    return " and ".join(said) or "surely changes superposition nowhere"


def draw(frame: pd.DataFrame) -> Figure:
    """The plane of sparsity (across) and dropout (up), means over seeds: a row of panels per ``decay``."""
    decays = sorted(frame["decay"].unique())
    figure = Figure(figsize=(15, 3.2 * len(decays) + 0.9), layout="constrained")
    grid = figure.subplots(len(decays), len(_PANELS), squeeze=False, sharex=True, sharey=True)
    for decay, row in zip(decays, grid):
        part = frame[frame["decay"] == decay]
        for (name, title), axes in zip(_PANELS.items(), row):
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
