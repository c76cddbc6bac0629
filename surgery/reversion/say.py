"""What the tables of mean reversion say, in sentences; the last one is the answer. Pure functions of the tables.

As in ``surgery.page.phrases`` a sentence claims something only when an interval lies wholly on one side, by more than
rounding, and nulls speak before numbers do: reversion is what exceeds random walks with updates of the same size.

>>> import pandas as pd
>>> row = {"series": "model", "span": "all", "start": 1, "stop": 9, "within": 0.5, "within_walk": 0.7}
>>> pooled = {"pooled": 0.9, "pooled_low": 0.8, "pooled_high": 0.95}
>>> ends = {"within_excess": -0.2, "within_excess_low": -0.3, "within_excess_high": -0.1}
>>> panel(pd.DataFrame([row | pooled | ends]))[0].split(": ")[-1]
'shocks are taken back faster than there.'
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from surgery.page.chapters import Sentence, headlines
from surgery.page.phrases import few_prompts, layers, number, value
from surgery.reversion import files
from surgery.reversion.directions import PERSISTS

ROUNDING = 1e-4  # no claim rests on less
WALKS = ("rotated", "token_shuffled")
SEEN = {
    "normalised": "divided by each token's own length",
    "principal": "in its fixed principal components",
    "logits": "as centred logits",
}
_LIKE_A_WALK = "this could not be distinguished from a random walk"
_NETWORK = {
    "token_shuffled": "with updates of other tokens",
    "rotated": "with rotated updates",
    "untrained": "untrained",
}


def sentences(tables: Mapping[str, pd.DataFrame]) -> list[Sentence]:
    """All that the tables of a folder say, the answer last; headlines are the layers, the ends and the answer."""
    by_file = (
        (files.COORDINATES, coordinates),
        (files.WINDOWS, windows),
        (files.PANEL, panel),
        (files.DIRECTIONS, directions),
        (files.RETURNS, returns),
        (files.NOISE, noise),
    )
    every = headlines(by_layer(tables[files.LAYERS]))
    for file, say in by_file:
        if file in tables:
            every += map(Sentence, say(tables[file]))
    if files.ENDS in tables:
        every += headlines([ends(tables[files.ENDS].iloc[0])])
    if files.DIRECTIONS in tables:
        every += headlines([answer(tables[files.LAYERS], tables.get(files.PANEL), tables[files.DIRECTIONS])])
    return every


def by_layer(frame: pd.DataFrame) -> list[str]:
    """Up to four sentences about ``reversion_layers``: kappa against its nulls, displacing the stream, psi."""
    frame = _later(frame)
    reverting = frame[frame["kappa_excess_low"] > 0]
    below = (frame["kappa_excess_rotated_high"] < 0) & (frame["kappa_excess_token_shuffled_high"] < 0)
    spreading = frame[below & (frame["kappa_high"] < 0)]
    unclear = frame[~((frame["kappa_excess_low"] > 0) | below)]
    texts = []
    if reverting.empty:
        texts.append(
            f"In none of the {len(frame)} layers looked at does kappa exceed its rotated and token-shuffled nulls: no "
            "mean reversion was found."
        )
    else:
        texts.append(
            f"kappa exceeds its rotated and token-shuffled nulls in {len(reverting)} of {len(frame)} layers "
            f"({layers(reverting['layer'])}), where it is {_range(reverting['kappa'])}: their updates run against the "
            f"deviation of a token from the mean.{_chance(reverting, frame)}"
        )
        texts.append(_causal(reverting) + _spread(reverting))
    if len(spreading):
        texts.append(
            f"In {layers(spreading['layer'])} kappa is below 0 and below its nulls "
            f"({_range(spreading['kappa'])}): their updates carry deviations further out."
        )
    if len(unclear):
        texts.append(
            f"In {layers(unclear['layer'])} the interval of the excess includes 0: a weak reversion is neither "
            "shown nor ruled out."
        )
    return texts


def limits(frame: pd.DataFrame) -> list[str]:
    """What ``reversion_layers`` cannot tell."""
    notes = [
        "kappa is a regression over tokens: it becomes a restoring force only where displacing the stream agrees. "
        "The model is deterministic; nothing here is noise in time, and no Ornstein-Uhlenbeck process is claimed."
    ]
    if (frame["layer"] == 0).any() and len(frame) > 1:
        row = frame[frame["layer"] == 0].iloc[0]
        notes.append(
            f"Layer 0 (kappa = {number(row, 'kappa')}) is left out: the stream that enters it is the bare embedding, "
            "and kappa and growth beside so small a stream mean nothing."
        )
    if "kappa_untrained" not in frame or frame["kappa_untrained"].isna().all():
        notes.append(
            "The untrained copy of the model was not measured, so what its architecture does by itself is not known."
        )
    else:
        later = _later(frame)
        short = later[(later["kappa_excess_low"] > 0) & ~(later["kappa_excess_untrained_low"] > 0)]
        if len(short):
            notes.append(f"In {layers(short['layer'])} kappa does not exceed that of the same architecture untrained.")
    return notes + few_prompts(frame)


def coordinates(frame: pd.DataFrame) -> list[str]:
    """One sentence for every coordinate but the raw one: where kappa exceeds its nulls (``reversion.layers``)."""
    texts = []
    for name in (name for name in SEEN if name in set(frame["coordinates"])):
        part = _later(frame[frame["coordinates"] == name])
        above = part[part["kappa_excess_low"] > 0]["layer"]
        where = f" ({layers(above)})" if len(above) else ""
        sentence = f"Seen {SEEN[name]}, kappa exceeds both random walks in {_of_layers(len(above), len(part))}{where}"
        if name == "normalised" and part["kappa"].notna().any():
            more = part[part["kappa_corrected_low"] > ROUNDING]
            less = part[part["kappa_corrected_high"] < -ROUNDING]
            sentence += (
                f"; there a random update of the same size reads {part['kappa_mechanical'].mean():.2f} on average by "
                f"arithmetic alone, the model {part['kappa'].mean():.2f}: more than that in "
                f"{_of_layers(len(more), len(part))}, less in {len(less)}"
            )
        texts.append(sentence + ".")
    return texts


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
        common = {-1: "deviations are taken back", 0: _LIKE_A_WALK, 1: "deviations grow"}[_pooled(row, frame)]
        own = {-1: "shocks are taken back faster than there", 0: _LIKE_A_WALK, 1: "shocks live on longer than there"}[
            _within(row, frame)
        ]
        texts.append(
            f"As one autoregression over {span}, phi is {number(row, 'pooled')} about one mean for all tokens "
            f"(a random walk: 1{_beside(frame, 'pooled')}): {common}. With a mean for every token it is "
            f"{row['within']:.2f}, where a random walk with increments of these sizes reads {row['within_walk']:.2f} "
            f"(difference {number(row, 'within_excess')}{_beside(frame, 'within_excess')}): {own}."
        )
    return texts


def directions(frame: pd.DataFrame) -> list[str]:
    """How many directions revert, persist and grow (``directions.layers``)."""
    shown = _later(frame)
    shown = shown[shown["decay"].notna()]
    if shown.empty:
        return []
    count = shown["verdict"].value_counts()
    reverting = shown[shown["verdict"] == "reverts"]
    where = f" ({layers(set(reverting['layer']))})" if len(reverting) else ""
    predicted = shown.drop_duplicates("layer")["R2"].median()
    drift = f"; the drift predicts {predicted:.2f} of an update's variance in them on held-out prompts"
    drift = "" if math.isnan(predicted) else f"{drift} (median over layers)"
    return [
        f"Of {len(shown)} directions looked at, the top principal ones of every layer, {count.get('reverts', 0)} "
        f"revert{where}, {count.get('grows', 0)} grow, {count.get('persists', 0)} do neither, and "
        f"{count.get('undecided', 0)} could not be decided{drift}."
    ]


def returns(frame: pd.DataFrame) -> list[str]:
    """What is left of displacements at the end of the model (``returns.curves``)."""
    texts = []
    small = frame[(frame["size"] == frame["size"].min()) & frame["remaining"].notna()]
    final = small[small["layer"] + small["q"] == (small["layer"] + small["q"]).max()]
    for kind, part in final.groupby("kind", sort=False):
        first = part.loc[part["layer"].idxmin()]
        back = (part["remaining_high"] < 1 - ROUNDING) & (part["along_high"] < 1 - ROUNDING)
        further = (part["remaining_low"] > 1 + ROUNDING) | (part["along_low"] > 1 + ROUNDING)
        outcomes = [
            f"from {layers(part[which]['layer'])} {what}"
            for what, which in (
                ("it has gone back, in part or wholly", back),
                ("it has grown", further),
                ("neither could be decided", ~(back | further)),
            )
            if which.any()
        ]
        texts.append(
            f"A displacement ({kind}, {first['size']:g} of the spread) made at layer {int(first['layer'])} leaves the "
            f"model {number(first, 'remaining')} times as long, and {number(first, 'along')} of it is left along "
            f"itself; {', '.join(outcomes)}."
        )
    return texts


def ends(row: pd.Series) -> str:
    """Whether reversion is stronger in the ends (``trajectories.ends``): kappa, and kappa beyond the walks."""
    if pd.isna(row["difference"]):
        return (
            "Whether reversion is stronger in the ends could not be tested: a part has no layer, or the stream does "
            "not vary."
        )
    middle = layers(range(max(1, int(row["boundary_in"])), int(row["boundary_out"])))
    values = f"kappa {number(row, 'kappa_ends')} in the ends, {number(row, 'kappa_middle')} in {middle}"
    both = ["difference", "excess"] if "excess" in row else ["difference"]
    for place, other, sides in (
        ("ends", "middle", [row[f"{name}_low"] for name in both]),
        ("middle", "ends", [-row[f"{name}_high"] for name in both]),
    ):
        if min(sides) > ROUNDING and not any(map(pd.isna, sides)):
            if row[f"kappa_{place}_low"] > 0:
                return f"Reversion is stronger in the {place}: {values}."
            if row[f"kappa_{place}_high"] < 0:
                return f"Deviations grow in the {place} too, though less than in the {other}: {values}."
            return (
                f"kappa is higher in the {place}, but whether deviations revert there could not be decided: {values}."
            )
    return f"Whether reversion is stronger in the ends could not be decided: {values}."


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
    elif all(own["lambda_low"] > walk["lambda_high"] for walk in walks):
        comparison = "more than in random walks of the same updates"
    elif all(own["lambda_high"] < walk["lambda_low"] for walk in walks):
        comparison = "less than in random walks of the same updates"
    else:
        comparison = "not shown to differ from random walks of the same updates"
    enough = "" if own["enough"] == "yes" else f" Too few lines to rely on: {own['enough'].removeprefix('no: ')}."
    return [
        f"Lines of thought: the noise beside a rotation and stretch of the cloud goes as exp(lambda depth), lambda "
        f"{number(own, 'lambda')} per layer{beside}: {comparison} "
        f"(published: 0.18 in GPT-2 medium, 0.27 in Llama 2 7B).{enough}"
    ]


def answer(raw: pd.DataFrame, whole: pd.DataFrame | None, drift: pd.DataFrame | None) -> str:
    """Reverts, does not, or only in these layers and directions: from layers (with causes), panel and directions.

    It reverts where every layer from 1 on restores and the panel, if there is one, agrees about one mean for all
    tokens. It does not where nothing exceeds the walks and, in every layer, kappa lies below ``directions.PERSISTS``.
    """
    later = _later(raw)
    slopes = set(later[later["kappa_excess_low"] > 0]["layer"])
    forces = set(later[later["restoring"] == "yes"]["layer"]) if "restoring" in later else set()
    reverting = set() if drift is None else set(_later(drift).query("verdict == 'reverts'")["layer"])
    over = None if whole is None else next((_over_all(row, whole) for _, row in _whole(whole).iterrows()), None)
    begin = "In one sentence: on these prompts"
    if len(forces) == len(later) and over in (None, -1):
        together = "" if over is None else ", and over all layers together"
        return f"{begin} the stream reverts to a mean in every layer ({layers(forces)}), as a force{together}."
    if not slopes | forces | reverting and over != -1:
        left = set(later[~(later["kappa_high"] < PERSISTS)]["layer"])
        if not left:
            return (
                f"{begin} the stream does not revert to a mean: no layer takes back as much as {PERSISTS:g} of a "
                "deviation, and neither a layer nor a direction looked at was seen to revert more than random walks "
                "with updates of the same size do."
            )
        if len(left) == len(later):
            return f"{begin} it could not be decided whether the stream reverts to a mean: no reversion was shown."
        return f"{begin} no reversion to a mean was shown, but in {layers(left)} it is not ruled out either."
    parts = [
        f"{how} in {layers(where)}"
        for how, where in (
            ("as a force", forces),
            ("as a slope that displacing the stream does not confirm", slopes - forces),
            ("along single directions", reverting),
        )
        if where
    ] or ["in no layer by itself"]
    panel_words = {-1: "it does too", 0: "this could not be decided", 1: "deviations grow"}
    more = "" if over is None else f"; over all layers together {panel_words[over]}"
    return f"{begin} the stream reverts to a mean only in part: {', '.join(parts)}{more}."


def _later(frame: pd.DataFrame) -> pd.DataFrame:
    """All but layer 0, which starts from the bare embedding, unless there is no other."""
    return frame[frame["layer"] > 0] if frame["layer"].max() > 0 else frame


def _of_layers(count: int, total: int) -> str:
    return f"{count or 'none'} of {total} layer{'s' * (total != 1)}"


def _whole(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["series"] == "model") & (frame["span"] == "all")]


def _pooled(row: pd.Series, frame: pd.DataFrame) -> int:
    return _side(row, frame, "pooled", 1.0)


def _within(row: pd.Series, frame: pd.DataFrame) -> int:
    return _side(row, frame, "within_excess", 0.0)


def _over_all(row: pd.Series, frame: pd.DataFrame) -> int:
    """-1 taken back, 1 growing: about the common mean or, where that is undecided, about a mean of each token's own."""
    return _pooled(row, frame) or min(_within(row, frame), 0)


def _side(row: pd.Series, frame: pd.DataFrame, name: str, walk: float) -> int:
    """-1 below what a walk reads and below the walks' own intervals, 1 above them all, 0 if undecided."""
    walks = _of_walks(frame)
    if row[f"{name}_high"] < min([walk, *walks.get(f"{name}_low", [])]) - ROUNDING:
        return -1
    return int(row[f"{name}_low"] > max([walk, *walks.get(f"{name}_high", [])]) + ROUNDING)


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
    lows, highs = _excess_ends(row, "low"), _excess_ends(row, "high")
    if not lows:
        return "to be compared with random walks"
    if max(highs) < -ROUNDING:
        return "later layers undo what earlier ones wrote"
    if min(lows) > ROUNDING:
        return "later layers go on in the direction of earlier ones"
    return "whether later layers undo or continue earlier ones could not be decided"


def _excess_ends(row: pd.Series, end: str) -> Sequence[float]:
    names = [f"variance_ratio_excess_{name}_{end}" for name in WALKS]
    return [float(row[name]) for name in names if name in row]


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.3f}", f"{values.max():.3f}"
    return low if low == high else f"{low} to {high}"


def _chance(reverting: pd.DataFrame, frame: pd.DataFrame) -> str:
    if len(reverting) > max(1.0, 0.05 * len(frame)):
        return ""
    return f" With {len(frame)} intervals of 95 %, so few would be no surprise where there is none."


def _causal(reverting: pd.DataFrame) -> str:
    if "restoring" not in reverting:
        return "Whether they restore a displaced stream was not measured."
    agreed = reverting[reverting["restoring"] == "yes"]
    refuted = reverting[reverting["restoring"] == "no"]
    if len(agreed) == len(reverting):
        return "Displacing the stream confirms a restoring pull there."
    if len(refuted) == len(reverting):
        return "Displacing the stream contradicts it there: this is correlation, not a restoring force."
    confirmed = f"in {layers(agreed['layer'])}" if len(agreed) else "in none of them"
    against = f" and contradicts it in {layers(refuted['layer'])}" if len(refuted) else ""
    return f"Displacing the stream confirms a restoring pull {confirmed}{against}; the others stay correlations."


def _spread(reverting: pd.DataFrame) -> str:
    growing = reverting[reverting["psi_high"] < 1]
    shrinking = reverting[reverting["psi_low"] > 1]
    parts = []
    if len(growing):
        parts.append(
            f"smaller than what the same update adds in {layers(growing['layer'])} (psi below 1, spread grows)"
        )
    if len(shrinking):
        parts.append(f"larger in {layers(shrinking['layer'])} (psi above 1, spread shrinks)")
    return (
        f" The pull is {' and '.join(parts)}."
        if parts
        else " Whether it outweighs what the same updates add could not be decided."
    )
