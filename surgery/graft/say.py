"""What the tables of fresh middles say, in sentences, and what they leave open. Pure functions of the frames.

Every claim is one of ``stats.claims``: beyond a least effect, within it, or undecided; those of a function are one
family.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from surgery.graft.walk import LONGER, MORE, REAL
from surgery.page import phrases
from surgery.stats.claims import ABOVE, BELOW, UNDECIDED, Effect, sides

TIMES = 1.05  # the least ratio of losses that matters
GAINED = 0.01  # the least gain that matters, of the update's variance
JUDGED_BY: dict[
    str, tuple[str, float]
] = {  # how a step is on the manifold or off it, and the least change that matters
    "mahalanobis": ("squared distance", 0.05),
    "beyond_real": ("share beyond 95 % of real ones", 0.01),
    "nearest": ("distance to the nearest real one", 0.05),
    "entropy": ("entropy", 0.02),
}


# --- methods of making a middle --------------------------------------------------------------------------------------


def methods(frame: pd.DataFrame, n_layers: int) -> list[str]:
    """How close each method of ``graft_methods.csv`` comes to the original, and what it spent."""
    first = frame.iloc[0]
    start, stop = int(first["start"]), int(first["stop"])
    sentences = [
        f"Layers {start} to {stop - 1} of {n_layers} replaced. The loss of the original is "
        f"{phrases.value(first['cross_entropy_original'], 3)} nats a token on "
        f"{int(first['n_prompts'])} held-out prompts."
    ]
    for _, row in frame.iterrows():
        name = str(row["method"])
        text = f"{name[0].upper()}{name[1:]}: {phrases.number(row, 'damage', 3, signed=True)} nats a token"
        if not np.isnan(row["unexplained"]):  # it is NaN for a model whose ends are others
            text += f", unexplained {phrases.number(row, 'unexplained', 3)}"
        if "exact" in frame:
            text += f", exact answers {phrases.number(row, 'exact', 3)}"
            text += f" (original {phrases.value(row['exact_original'], 3)})"
        if row.get("operations", 0) > 0:
            text += f"; {row['operations']:.2g} operations, {row['operations_with_teacher']:.2g} with the teacher's"
        sentences.append(text + ".")
    return sentences


# --- sizes -----------------------------------------------------------------------------------------------------------


def sizes(frame: pd.DataFrame, usual: tuple[int, int]) -> list[str]:
    """For each budget and size: is it better than a middle of the ``usual`` width and depth, over seeds?

    Compared are ratios of held-out losses: seeds in pairs, a t interval of their logarithms. A ratio matters from
    ``TIMES`` on, and all sizes are one family.
    """
    found = ratios(frame, usual)
    claims = phrases.claims([*found.values()], np.log(TIMES), f"less than {TIMES} times", "better", "worse")
    return [f"{name}: {_times(ratio)}; {claim}." for (name, ratio), claim in zip(found.items(), claims, strict=True)]


def ratios(frame: pd.DataFrame, usual: tuple[int, int]) -> dict[str, Effect]:
    """The logarithm of how many times as small a loss each budget and size has as the ``usual`` one, over seeds."""
    loss = "cross_entropy_answers" if "cross_entropy_answers" in frame else "cross_entropy"
    whole, found = frame[frame["k"].isna()], dict[str, Effect]()
    for budget, of_budget in whole.groupby("budget", sort=False):
        losses = {
            size: np.log(of_size.set_index("seed")[loss])  # they span orders of magnitude
            for size, of_size in of_budget.groupby(["d_mlp", "depth"])
        }
        for size in (size for size in losses if size != usual and usual in losses):
            name = f"At equal {budget}, width {size[0]} and {size[1]} layers"
            found[name] = Effect.of_seeds(losses[usual] - losses[size])
    return found


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

    A step is off by a measure if that has changed from the same prompts unwalked, to either side, by more than the
    least effect of ``JUDGED_BY``; it is on the manifold if no measure has; else it is undecided. All measures of all
    kinds are one family. It is nearer than its control if its change is smaller, by as much, and the two intervals do
    not meet.
    """
    sentences, real = list[str](), frame[frame["kind"] == REAL].iloc[0]
    flags = frame["control"].astype(bool)
    walked, controls = frame[(frame["kind"] != REAL) & ~flags], frame[flags].set_index("kind")
    changes = [[Effect.of_row(row, f"{name}_change") for name in JUDGED_BY] for _, row in walked.iterrows()]
    least = [bound for _, bound in JUDGED_BY.values()]
    family = iter(sides([change for of_kind in changes for change in of_kind], least * len(changes)))
    for (_, row), of_kind in zip(walked.iterrows(), changes, strict=True):
        off, undecided, nearer = list[str](), list[str](), list[str]()
        control = controls.loc[row["kind"]]
        for (name, (words, bound)), change in zip(JUDGED_BY.items(), of_kind, strict=True):
            side, other = next(family), Effect.of_row(control, f"{name}_change")
            if side in (ABOVE, BELOW):
                off.append(
                    f"{words} {phrases.number(row, name)} where real ones have {phrases.value(real[name])} and the "
                    f"control {phrases.value(control[name])}"
                )
            elif side == UNDECIDED:
                undecided.append(f"{words} ({change.missing})" if change.missing else words)
            apart = change.low > other.high or change.high < other.low
            if change.defined and other.defined and apart and abs(other.value) - abs(change.value) > bound:
                nearer.append(words)
        side = f"off the manifold: {', '.join(off)}" if off else "on the manifold as far as these measures show"
        if undecided and not off:
            side = f"undecided by {', '.join(undecided)}"
        sentences.append(
            f"{row['kind']}, {phrases.value(row['moved'])} of the spread moved: {side}. Nearer to real activations "
            f"than steps as long in any direction by {', '.join(nearer) or 'none of these measures'}."
        )
    return sentences


def walks(frame: pd.DataFrame) -> list[str]:
    """Every method of ``walk_methods.csv`` against the real pairs alone, then ``walks_for_their_price``."""
    found = gains(frame)
    claims = _claims([*found.values()], "helps", "harms")
    sentences = [f"{name}: {said}." for name, said in zip(found, claims, strict=True)]
    return sentences + walks_for_their_price(frame)


def gains(frame: pd.DataFrame) -> dict[str, Effect]:
    """How much more of the update's variance each method explains than the real pairs alone, over seeds."""
    return {
        f"{amount:,.0f} real tokens, {name}": Effect.of_seeds(unexplained[REAL] - unexplained[name])
        for amount, unexplained in _unexplained(frame)
        for name in unexplained.columns
        if name != REAL
    }


def walks_for_their_price(frame: pd.DataFrame) -> list[str]:
    """Does a relabelled walk help more than as much more real data, and more than as many more steps?"""
    names, gains = list[str](), list[Effect]()
    for amount, unexplained in _unexplained(frame):
        for name in (name for name in unexplained.columns if name.endswith(", relabelled")):
            names.append(f"{amount:,.0f} real tokens, {name}")
            gains += [Effect.of_seeds(unexplained[control] - unexplained[name]) for control in (MORE, LONGER)]
    claims = iter(_claims(gains, "helps more", "helps less"))
    return [
        f"{name}, against as much more real data for the same price: {data}. Against as many more steps: {steps}."
        for name, data, steps in zip(names, claims, claims, strict=True)
    ]


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


def _times(ratio: Effect) -> str:
    """A ratio of losses, from the effect on their logarithms."""
    value, low, high = (float(np.exp(end)) for end in (ratio.value, ratio.low, ratio.high))
    return f"{phrases.value(value)} times as small a loss {phrases.bracket(low, high)}".strip()


def _unexplained(frame: pd.DataFrame) -> Iterator[tuple[Any, pd.DataFrame]]:
    """For each amount of real tokens the unexplained share, a row per seed and a column per method in their order."""
    for amount, of_amount in frame.groupby("real_tokens"):
        table = of_amount.pivot(index="seed", columns="method", values="unexplained")
        yield amount, table[list(dict.fromkeys(of_amount["method"]))]


def _claims(gains: Sequence[Effect], above: str, below: str) -> list[str]:
    """Gains of the update's variance explained, each with what may be claimed of it."""
    claims = phrases.claims(gains, GAINED, f"less than {GAINED}", above, below)
    return [
        f"{phrases.interval(*gain[:3], 3, signed=True)} of the update's variance more explained; {claim}"
        for gain, claim in zip(gains, claims, strict=True)
    ]
