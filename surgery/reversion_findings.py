"""What the tables of mean reversion say, in sentences; the last one is the answer. Pure functions of the frames.

As in ``surgery.findings`` a sentence claims something only when an interval lies wholly on one side, and nulls speak
before numbers do: reversion is what exceeds a random walk with updates of the same size.

>>> import pandas
>>> row = {"series": "model", "span": "all", "start": 1, "stop": 9, "within": 0.5, "within_walk": 0.7}
>>> ends = {"within_excess": -0.2, "within_excess_low": -0.3, "within_excess_high": -0.1, "pooled": 0.9}
>>> panel(pandas.DataFrame([row | ends]))[0].split(": ")[-1]
'shocks are taken back faster.'
"""

from collections.abc import Iterable

import pandas

from surgery.findings import layers, number

SEEN = {
    "normalised": "divided by each token's own length",
    "principal": "in its fixed principal components",
    "logits": "as centred logits",
}


def coordinates(frame: pandas.DataFrame) -> list[str]:
    """One sentence for every coordinate but the raw one: where kappa exceeds its nulls (``reversion.layers``)."""
    sentences = []
    for name in (name for name in SEEN if name in set(frame["coordinates"])):
        part = frame[(frame["coordinates"] == name) & (frame["layer"] > 0)]
        above = part[part["kappa_excess_low"] > 0]
        where = f"in {layers(above['layer'])}" if len(above) else "in no layer"
        sentence = f"Seen {SEEN[name]}, kappa exceeds both random walks {where} of {len(part)}"
        if name == "normalised":
            lower = part[part["kappa_corrected_high"] < 0]
            sentence += (
                f"; there a random update of the same size reads {part['kappa_mechanical'].mean():.2f} on average by "
                f"arithmetic alone, the model {part['kappa'].mean():.2f}, less than that in {len(lower)} layers"
            )
        sentences.append(sentence + ".")
    return sentences


def windows(frame: pandas.DataFrame) -> list[str]:
    """The variance ratio of all layers from the first on, against the walks (``trajectories.windows``)."""
    whole = frame[(frame["start"] == min(1, frame["stop"].max() - 1)) & (frame["stop"] == frame["stop"].max())]
    last = whole.iloc[0]
    inner = frame[(frame["start"] == last["start"]) & (frame["stop"] == last["stop"] - 1)]
    rows = [row for row in (last, *(row for _, row in inner.iterrows())) if row["stop"] - row["start"] > 1]
    return [
        f"Layers {int(row['start'])} to {int(row['stop']) - 1} together: kappa {number(row, 'kappa')}, variance ratio "
        f"{number(row, 'variance_ratio')}{_walks(row)}: later layers {_momentum(row)}."
        for row in rows
    ]


def panel(frame: pandas.DataFrame) -> list[str]:
    """Whether a shock lives shorter than in a random walk with these increments (``trajectories.panel``)."""
    found = frame[(frame["series"] == "model") & (frame["span"] == "all")]
    sentences = []
    for _, row in found.iterrows():
        within = f"{row['within']:.2f} with a mean for every token"
        if row["within_excess_high"] < 0:
            said = "shocks are taken back faster"
        elif row["within_excess_low"] > 0:
            said = "shocks live on longer, and grow" if row["pooled"] > 1 else "shocks live on longer"
        else:
            said = "the difference could not be told from 0"
        sentences.append(
            f"As one autoregression over layers {int(row['start'])} to {int(row['stop']) - 1}, phi lies between "
            f"{within} and {row['pooled']:.2f} without; a random walk with increments of these sizes would read "
            f"{row['within_walk']:.2f} instead of the first (difference {number(row, 'within_excess')}): {said}."
        )
    return sentences


def directions(frame: pandas.DataFrame) -> list[str]:
    """How many directions revert, persist and grow (``directions.layers``)."""
    shown = frame[frame["layer"] > 0] if frame["layer"].max() > 0 else frame
    count = shown["verdict"].value_counts()
    reverting = shown[shown["verdict"] == "reverts"]
    where = f" ({layers(reverting['layer'].unique())})" if len(reverting) else ""
    return [
        f"Of {len(shown)} directions looked at, the top principal ones of every layer, {count.get('reverts', 0)} "
        f"revert{where}, {count.get('grows', 0)} grow, {count.get('persists', 0)} do neither, and of "
        f"{count.get('undecided', 0)} it could not be told from updates of other tokens; the drift predicts "
        f"{shown.drop_duplicates('layer')['R2'].median():.2f} of an update's variance in them on held-out prompts "
        "(median over layers)."
    ]


def returns(frame: pandas.DataFrame) -> list[str]:
    """What is left of displacements at the end of the model (``returns.curves``)."""
    sentences = []
    small = frame[frame["size"] == frame["size"].min()]
    final = small[small["layer"] + small["q"] == (small["layer"] + small["q"]).max()]
    for kind, part in final.groupby("kind", sort=False):
        first = part.iloc[0]
        back = part[(part["remaining_high"] < 1) & (part["along_high"] < 1)]
        said = f"it has gone back from {layers(back['layer'])}" if len(back) else "from no layer has it gone back"
        sentences.append(
            f"A displacement ({kind}, {first['size']:g} of the spread) made at layer {int(first['layer'])} leaves the "
            f"model {number(first, 'remaining')} times as long, {number(first, 'along')} of it in its own direction; "
            f"{said}."
        )
    return sentences


def ends(row: pandas.Series) -> str:
    """Whether reversion is stronger in the ends (``trajectories.ends``)."""
    if pandas.isna(row["difference"]):
        return "Whether reversion is stronger in the ends could not be asked: a part has no layer."
    values = (
        f"kappa {number(row, 'kappa_ends')} in the ends, {number(row, 'kappa_middle')} in layers "
        f"{int(row['boundary_in'])} to {int(row['boundary_out']) - 1}"
    )
    name = "excess" if "excess" in row else "difference"
    if row["difference_low"] > 0 and row[f"{name}_low"] > 0:
        if row["kappa_ends_low"] > 0:
            return f"Reversion is stronger in the ends: {values}."
        return f"The ends revert no more than the middle grows less: {values}."
    if row["difference_high"] < 0 and row[f"{name}_high"] < 0:
        if row["kappa_middle_low"] > 0:
            return f"Reversion is stronger in the middle: {values}."
        return f"Reversion is not stronger in the ends; they carry deviations out faster than the middle: {values}."
    return f"Whether reversion is stronger in the ends could not be told: {values}."


def noise(frame: pandas.DataFrame) -> list[str]:
    """Lines of thought: the exponent of the noise beside its nulls (``lines_of_thought.fit``)."""
    rows = {str(row["network"]): row for _, row in frame.iterrows()}
    own = rows["model"]
    nulls = [f"{number(rows[name], 'lambda')} {_WALK[name]}" for name in _WALK if name in rows]
    beside = f"; {', '.join(nulls)}" if nulls else ""
    walks = [rows[name]["lambda_high"] for name in ("token_shuffled", "rotated") if name in rows]
    more = "more than a random walk of the same updates shows" if walks and own["lambda_low"] > max(walks) else (
        "no more than random walks of the same updates show" if walks else "to be compared with random walks"
    )  # fmt: skip
    enough = "" if own["enough"] == "yes" else f" Too few lines to rely on: {own['enough'].removeprefix('no: ')}."
    return [
        f"Lines of thought: the noise beside a rotation and stretch of the cloud grows as exp(lambda depth), lambda "
        f"{number(own, 'lambda')} per layer{beside}: {more} (published: 0.18 in GPT-2 medium, 0.27 in Llama 2 7B)."
        f"{enough}"
    ]


def answer(raw: pandas.DataFrame, whole: pandas.DataFrame | None, drift: pandas.DataFrame | None) -> str:
    """Reverts, does not, or only in these layers and directions: from layers (with causes), panel and directions."""
    later = raw[raw["layer"] > 0] if raw["layer"].max() > 0 else raw
    forces = later[later["restoring"] == "yes"]["layer"] if "restoring" in later else later["layer"][:0]
    slopes = later[later["kappa_excess_low"] > 0]["layer"]
    taken_back = None
    if whole is not None:
        found = whole[(whole["series"] == "model") & (whole["span"] == "all")]
        taken_back = bool((found["within_excess_high"] < 0).all()) if len(found) else None
    reverting: list[int] = []
    if drift is not None:
        reverting = sorted(set(drift[(drift["verdict"] == "reverts") & (drift["layer"] > 0)]["layer"]))
    if len(forces) and taken_back and len(forces) == len(later):
        return "In one sentence: on these prompts the stream reverts to a mean, in every layer, and as a force."
    if not len(slopes) and not len(reverting):
        return (
            "In one sentence: on these prompts the stream does not revert to a mean, in no layer and in none of the "
            "directions looked at beyond what updates of the same size do by chance."
        )
    parts = []
    if len(forces):
        parts.append(f"as a force in {layers(forces)}")
    if rest := sorted(set(slopes) - set(forces)):
        parts.append(f"as a slope that displacing the stream does not confirm in {layers(rest)}")
    if len(reverting):
        parts.append(f"along single directions in {layers(reverting)}")
    over = {True: "; over all layers together too", False: "; over all layers together it does not", None: ""}
    return f"In one sentence: the stream reverts only in part, {', '.join(parts)}{over[taken_back]}."


_WALK = {
    "token_shuffled": "with updates of other tokens",
    "rotated": "with rotated updates",
    "untrained": "untrained",
}


def _walks(row: pandas.Series) -> str:
    if "variance_ratio_rotated" not in row:
        return ""
    return (
        f" (random walks {row['variance_ratio_rotated']:.2f} and {row['variance_ratio_token_shuffled']:.2f}; 1 is no "
        "memory)"
    )


def _momentum(row: pandas.Series) -> str:
    names = ["variance_ratio_excess_rotated", "variance_ratio_excess_token_shuffled"]
    lows, highs = _of(row, names, "low"), _of(row, names, "high")
    if highs and max(highs) < 0:
        return "undo what earlier ones wrote"
    if lows and min(lows) > 0:
        return "go on in the direction of earlier ones"
    return "neither undo nor continue earlier ones beyond chance"


def _of(row: pandas.Series, names: Iterable[str], end: str) -> list[float]:
    return [float(row[f"{name}_{end}"]) for name in names if f"{name}_{end}" in row]
