"""What is said of several layers at once beside random walks: windows, an autoregression over depth, lines of thought.

The rules are those of ``surgery.reversion.say``: an effect is claimed if it reaches ``LEAST`` beyond every walk, and
what the architecture untrained earns as well is said not to be more.

>>> import pandas as pd
>>> row = {"series": "model", "span": "all", "start": 1, "stop": 9, "within": 0.5, "within_walk": 0.7}
>>> pooled = {"pooled": 0.9, "pooled_low": 0.8, "pooled_high": 0.95}
>>> ends = {"within_excess": -0.2, "within_excess_low": -0.3, "within_excess_high": -0.1}
>>> panel(pd.DataFrame([row | pooled | ends]))[0].split(": ")[-1]
'shocks are forgotten faster than there.'
"""

import math

import pandas as pd

from surgery.instruments import massive
from surgery.page.phrases import layers, number, value
from surgery.reversion.kappa import WALKS
from surgery.reversion.rules import beyond, judged, weakest
from surgery.stats.claims import ABOVE, BELOW
from surgery.stats.drift import LEAST

_LIKE_A_WALK = "this could not be distinguished from a random walk"
_NETWORK = {
    "token_shuffled": "with updates of other tokens",
    "rotated": "with rotated updates",
    "untrained": "untrained",
}


def windows(frame: pd.DataFrame) -> list[str]:
    """Do later layers undo earlier ones, all from layer 1 on and all but the last (``trajectories.windows``)?"""
    last = frame["stop"].max()
    whole = frame[(frame["start"] == 1) & (frame["stop"] >= max(last - 1, 3))].sort_values("stop", ascending=False)
    return [
        f"{layers(range(int(row['start']), int(row['stop']))).capitalize()} together: kappa {number(row, 'kappa')}, "
        f"variance ratio {number(row, 'variance_ratio')}{_walks(row)}: {_momentum(row)}."
        for _, row in whole.iterrows()
    ]


def panel(frame: pd.DataFrame) -> list[str]:
    """Do deviations from one mean live shorter than in a random walk, and those from a mean of each token's own?

    (``trajectories.panel``.) A stream that runs straight to one mean has no shocks: then only the first says so.
    """
    texts = []
    for _, row in _whole(frame).iterrows():
        span = layers(range(int(row["start"]), int(row["stop"])))
        if pd.isna(row["pooled"]):
            texts.append(f"As one autoregression over {span} the stream cannot be read: it does not vary.")
            continue
        if reason := decided(row):
            texts.append(
                f"As one autoregression over {span}, phi is {number(row, 'pooled')} about one mean for all tokens, and "
                f"{row['within']:.2f} with a mean for every token: {reason}."
            )
            continue
        common = {
            -1: "less of a deviation is left along itself than there, be it shortened or turned",
            0: _LIKE_A_WALK,
            1: "deviations grow along themselves",
        }[_side(row, frame, "pooled", 1.0)]
        straight = " (as where the stream runs straight to one mean)" * (_side(row, frame, "pooled", 1.0) < 0)
        own = {
            -1: "shocks are forgotten faster than there",
            0: _LIKE_A_WALK,
            1: f"shocks live on longer than there{straight}",
        }[_side(row, frame, "within_excess", 0.0)]
        common += _no_more(row, frame, "pooled", _side(row, frame, "pooled", 1.0))
        own += _no_more(row, frame, "within_excess", _side(row, frame, "within_excess", 0.0))
        texts.append(
            f"As one autoregression over {span}, phi is {number(row, 'pooled')} about one mean for all tokens "
            f"(a random walk: 1{_beside(frame, 'pooled')}): {common}. With a mean for every token it is "
            f"{row['within']:.2f}, where a random walk with increments of these sizes reads {row['within_walk']:.2f} "
            f"(difference {number(row, 'within_excess')}{_beside(frame, 'within_excess')}): {own}."
        )
    return texts


def noise(frame: pd.DataFrame) -> list[str]:
    """Lines of thought: the exponent of the noise beside its nulls (``cloud.fit``)."""
    rows = {str(row["network"]): row for _, row in frame.iterrows()}
    own = rows["model"]
    if pd.isna(own["lambda"]):
        return [
            "Lines of thought: a rotation and stretch of the cloud leaves no noise at two depths or more, so none "
            "grows."
        ]
    nulls = [f"{number(rows[name], 'lambda')} {_NETWORK[name]}" for name in _NETWORK if name in rows]
    beside = f" ({', '.join(nulls)})" if nulls else ""
    walks = [rows[name] for name in WALKS if name in rows]
    if not walks:
        comparison = "to be compared with random walks"
    elif all(own["lambda_low"] > walk["lambda_high"] and own["lambda"] >= walk["lambda"] + LEAST for walk in walks):
        comparison = "more than in random walks of the same updates" + _no_more(own, frame, "lambda", 1, "network")
    elif all(own["lambda_high"] < walk["lambda_low"] and own["lambda"] <= walk["lambda"] - LEAST for walk in walks):
        comparison = "less than in random walks of the same updates" + _no_more(own, frame, "lambda", -1, "network")
    else:
        comparison = "not shown to differ from random walks of the same updates"
    enough = "" if own["enough"] == "yes" else f" Too few lines to rely on: {own['enough'].removeprefix('no: ')}."
    return [
        f"Lines of thought: the noise beside a rotation and stretch of the cloud goes as exp(lambda depth), lambda "
        f"{number(own, 'lambda')} per layer{beside}: {comparison} "
        f"(published: 0.18 in GPT-2 medium, 0.27 in Llama 2 7B).{enough}"
    ]


def _whole(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["series"] == "model") & (frame["span"] == "all")]


def _side(row: pd.Series, frame: pd.DataFrame, name: str, walk: float) -> int:
    """-1 below what a walk reads and below the walks' own intervals, 1 above them all, 0 if undecided."""
    walks, side = _of_walks(frame), beyond(row, name, origin=walk, least=0.0).side(LEAST)
    if side == BELOW and row[f"{name}_high"] < min([walk, *walks.get(f"{name}_low", [])]):
        return -1
    return int(side == ABOVE and row[f"{name}_low"] > max([walk, *walks.get(f"{name}_high", [])]))


def _no_more(row: pd.Series, frame: pd.DataFrame, name: str, side: int, networks: str = "series") -> str:
    """What must be added to a claim that the architecture untrained earns as well; nothing if it does not."""
    for _, fresh in frame[frame[networks] == "untrained"].iterrows() if side else ():
        if "span" in fresh and fresh["span"] != row["span"]:
            continue
        if not (row[f"{name}_high"] < fresh[f"{name}_low"] if side < 0 else row[f"{name}_low"] > fresh[f"{name}_high"]):
            return ", but not shown to be more so than in the same architecture untrained"
    return ""


def decided(row: pd.Series) -> str:
    """Why nothing is claimed of a row in which one token holds too much of the variance; nothing if none does."""
    share = float(row.get("token_share", math.nan))
    return f"nothing is claimed, as one token holds {share:.0%} of the variance" if massive.decides(row) else ""


def _of_walks(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["series"].isin(WALKS) & (frame["span"] == "all")]


def _beside(frame: pd.DataFrame, name: str) -> str:
    values = [number(row, name) for _, row in _of_walks(frame).iterrows()]
    return f"; walks of its updates {' and '.join(values)}" if values else ""


def _walks(row: pd.Series) -> str:
    if "variance_ratio_rotated" not in row:
        return ""
    first, second = (value(row[f"variance_ratio_{name}"]) for name in WALKS)
    return f" (random walks {first} and {second}; 1 is no memory)"


def _momentum(row: pd.Series) -> str:
    if reason := decided(row):
        return reason
    names = [f"variance_ratio_excess_{walk}" for walk in WALKS if f"variance_ratio_excess_{walk}" in row]
    if not names:
        return "to be compared with random walks"
    back = " (and both run against deviations)" if row.get("kappa_low", math.nan) > LEAST else ""
    for sign, words in (
        (-1, "the updates of later layers run against those of earlier ones"),
        (1, f"later layers go on in the direction of earlier ones{back}"),
    ):
        if judged([weakest([beyond(row, name, sign=sign) for name in names])]) == ["yes"]:
            return words
    return "whether later layers run against earlier ones or go on could not be decided"
