"""What the tables of fresh middles say, in sentences, and what they leave open. Pure functions of the frames."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from surgery.graft.walk import LONGER, MORE, REAL
from surgery.page import phrases
from surgery.stats.bootstrap import t_interval, verdict

JUDGED_BY: dict[str, str] = {  # the measures by which a step is on the manifold or off it
    "mahalanobis": "squared distance",
    "beyond_real": "share beyond 95 % of real ones",
    "nearest": "distance to the nearest real one",
    "entropy_change": "change of entropy",
}


# --- methods of making a middle --------------------------------------------------------------------------------------


def methods(frame: pd.DataFrame, n_layers: int) -> list[str]:
    """How close each method of ``graft_methods.csv`` comes to the original, and what it spent."""
    first = frame.iloc[0]
    start, stop = int(first["start"]), int(first["stop"])
    sentences = [
        f"Layers {start} to {stop - 1} of {n_layers} replaced. The loss of the original is "
        f"{first['cross_entropy_original']:.3f} nats a token on {int(first['n_prompts'])} held-out prompts."
    ]
    for _, row in frame.iterrows():
        name = str(row["method"])
        text = f"{name[0].upper()}{name[1:]}: {phrases.number(row, 'damage', 3, signed=True)} nats a token"
        if not np.isnan(row["unexplained"]):  # it is NaN for a model whose ends are others
            text += f", unexplained {phrases.number(row, 'unexplained', 3)}"
        if "exact" in frame:
            text += f", exact answers {phrases.number(row, 'exact', 3)} (original {row['exact_original']:.3f})"
        if row.get("operations", 0) > 0:
            text += f"; {row['operations']:.2g} operations, {row['operations_with_teacher']:.2g} with the teacher's"
        sentences.append(text + ".")
    return sentences


# --- sizes -----------------------------------------------------------------------------------------------------------


def sizes(frame: pd.DataFrame, usual: tuple[int, int]) -> list[str]:
    """For each budget and size: is it better than a middle of the ``usual`` width and depth, over seeds?

    Compared are ratios of held-out losses: seeds in pairs, a t interval of their logarithms.
    """
    sentences = list[str]()
    loss = "cross_entropy_answers" if "cross_entropy_answers" in frame else "cross_entropy"
    whole = frame[frame["k"].isna()]
    for budget, of_budget in whole.groupby("budget", sort=False):
        losses = {
            size: np.log(of_size.set_index("seed")[loss])  # they span orders of magnitude
            for size, of_size in of_budget.groupby(["d_mlp", "depth"])
        }
        for size in (size for size in losses if size != usual and usual in losses):
            mean, low, high = t_interval((losses[usual] - losses[size]).dropna().to_numpy())
            times, ends = phrases.value(float(np.exp(mean))), phrases.bracket(float(np.exp(low)), float(np.exp(high)))
            width, depth = size
            sentences.append(
                f"At equal {budget}, width {width} and {depth} layers: {times} times as small a loss"
                f"{ends and ' ' + ends}; {verdict(low, high, 'better', 'worse')}."
            )
    return sentences


def sizes_by_k(compared: pd.DataFrame, usual: tuple[int, int]) -> list[str]:
    """For each budget and size of ``size_study.by_k``: exact answers at each k, and whether the ``usual`` size gives
    as many."""
    sentences = []
    others = compared.dropna(subset=["verdict"])
    for (budget, width, depth), of_size in others.groupby(["budget", "d_mlp", "depth"], sort=False):
        values = "; ".join(
            f"k = {row['k']:.0f} {row['exact']:.3f}, {phrases.number(row, 'gain', 3, signed=True)} {row['verdict']}"
            for _, row in of_size.iterrows()
        )
        sentences.append(
            f"Exact answers at equal {budget}, width {width} and {depth} layers, and their difference from width "
            f"{usual[0]} and {usual[1]} layers: {values}."
        )
    return sentences


# --- walks -----------------------------------------------------------------------------------------------------------


def walked_activations(frame: pd.DataFrame) -> list[str]:
    """For each kind of step: is it on the manifold or off it, by which measures, and is its control farther off?

    A step is off by a measure if its interval and that of the same prompts unwalked do not meet, on either side. It is
    nearer than its control if its value is nearer to the unwalked one and the two intervals do not meet.
    """
    sentences, real = list[str](), frame[frame["kind"] == REAL].iloc[0]
    for kind, of_kind in frame[frame["kind"] != REAL].groupby("kind", sort=False):
        walked, control = (of_kind[of_kind["control"] == flag].iloc[0] for flag in (False, True))
        nearer = [
            words
            for name, words in JUDGED_BY.items()
            if _apart(walked, control, name) and abs(walked[name] - real[name]) < abs(control[name] - real[name])
        ]
        off = ", ".join(
            f"{words} {phrases.number(walked, name)} where real ones have {real[name]:.2f} and the control "
            f"{control[name]:.2f}"
            for name, words in JUDGED_BY.items()
            if _apart(walked, real, name)
        )
        side = f"off the manifold: {off}" if off else "on the manifold as far as these measures show"
        sentences.append(
            f"{kind}, {walked['moved']:.2f} of the spread moved: {side}. Nearer to real activations than steps as long "
            f"in any direction by {', '.join(nearer) or 'none of them'}."
        )
    return sentences


def walks(frame: pd.DataFrame) -> list[str]:
    """Every method of ``walk_methods.csv`` against the real pairs alone, then ``walks_for_their_price``."""
    sentences = []
    for amount, unexplained in _unexplained(frame):
        for name in (name for name in unexplained.columns if name != REAL):
            gain, side = _gain(unexplained[REAL] - unexplained[name])
            sentences.append(
                f"{amount:,.0f} real tokens, {name}: {gain} of the update's variance more explained; {side}."
            )
    return sentences + walks_for_their_price(frame)


def walks_for_their_price(frame: pd.DataFrame) -> list[str]:
    """Does a relabelled walk help more than as much more real data, and more than as many more steps?"""
    sentences = []
    for amount, unexplained in _unexplained(frame):
        for name in (name for name in unexplained.columns if name.endswith(", relabelled")):
            sides = ("helps more", "helps less")
            data, steps = (_gain(unexplained[control] - unexplained[name], *sides) for control in (MORE, LONGER))
            sentences.append(
                f"{amount:,.0f} real tokens, {name}, against as much more real data for the same price: {data[0]} of "
                f"the update's variance more explained; {data[1]}. Against as many more steps: {steps[0]}; {steps[1]}."
            )
    return sentences


def short_of_real_data(frame: pd.DataFrame) -> list[str]:
    """Where "more real" got clearly less than the price of the relabelling, because there were no more real data."""
    sentences = []
    for amount, of_amount in frame.groupby("real_tokens"):
        spent = of_amount.groupby("method")["operations_with_teacher"].mean()
        price = spent.filter(like=", relabelled").max() - spent[REAL]
        if (paid := spent[MORE] - spent[REAL]) < 0.9 * price:
            harvested = of_amount.loc[of_amount["method"] == MORE, "harvested"].mean()
            sentences.append(
                f"At {amount:,.0f} real tokens more real had {harvested:,.0f}, for {paid / price:.0%} of what the "
                f"relabelling cost: there were no more, and beside it the walk looks better than it is."
            )
    return sentences


def _apart(row: pd.Series, other: pd.Series, name: str) -> bool:
    """Whether two intervals do not meet."""
    return bool(row[f"{name}_low"] > other[f"{name}_high"] or row[f"{name}_high"] < other[f"{name}_low"])


def _unexplained(frame: pd.DataFrame) -> Iterator[tuple[Any, pd.DataFrame]]:
    """For each amount of real tokens the unexplained share, a row per seed and a column per method in their order."""
    for amount, of_amount in frame.groupby("real_tokens"):
        table = of_amount.pivot(index="seed", columns="method", values="unexplained")
        yield amount, table[list(dict.fromkeys(of_amount["method"]))]


def _gain(differences: pd.Series, above: str = "helps", below: str = "harms") -> tuple[str, str]:
    mean, low, high = t_interval(differences.dropna().to_numpy())
    return phrases.interval(mean, low, high, 3, signed=True), verdict(low, high, above, below)
