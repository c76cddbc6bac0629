"""What the tables of mean reversion say, in sentences; the last one is the answer. Pure functions of the tables.

Every sentence is a rule. It claims an effect only if that reaches ``LEAST`` (of a deviation, or of a displacement's
length) and the interval that holds for all layers at once excludes none; it says "no" only if the effect is surely
less; else it leaves the matter open, and says why. Three words are kept apart: an update *runs against* a deviation
(kappa, a slope, which a rotation has as well), a displacement *is shortened* (``remaining``), and the stream *reverts*:
both.

Several layers beside random walks: ``surgery.reversion.say_walks``.
"""

import math
from collections.abc import Mapping

import pandas as pd

from surgery.instruments import massive
from surgery.instruments.massive import DECIDES
from surgery.page.chapters import Sentence, headlines
from surgery.page.phrases import few_prompts, layers, number
from surgery.reversion import files
from surgery.reversion.kappa import WALKS
from surgery.reversion.rules import beyond, judged, weakest
from surgery.reversion.say_walks import decided, noise, panel, windows
from surgery.stats.claims import ABOVE, BELOW, UNDECIDED, WITHIN, Effect, sides
from surgery.stats.drift import LEAST

SAME = 1e-4  # psi this close to 1 is 1: the spread stays
SEEN = {
    "normalised": "divided by each token's own length",
    "principal": "in its fixed principal components",
    "logits": "as centred logits",
}
_ONE = "one token"


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
    raw = tables[files.LAYERS]
    every = headlines(by_layer(raw))
    silent = bool(nothing_to_say(raw))
    for file, say in by_file:
        if file in tables and not silent:
            every += map(Sentence, say(tables[file]))
    if files.ENDS in tables and not silent:
        every += headlines([ends(tables[files.ENDS].iloc[0], raw)])
    if files.DIRECTIONS in tables:
        told = answer(raw, tables[files.DIRECTIONS], tables.get(files.RETURNS))
        every.append(Sentence(told, headline=True, leads=True))
    return every


def nothing_to_say(frame: pd.DataFrame) -> str:
    """Why ``reversion_layers`` allows no claim at all; empty if it does.

    >>> nothing_to_say(pd.DataFrame({"layer": [1], "kappa": 0.3, "kappa_low": math.nan, "n_prompts": 1}))
    'one prompt has no intervals'
    """
    frame = after_first(frame)
    if frame["kappa"].isna().all():
        return "the stream does not vary, so that kappa is undefined"
    if frame["kappa_low"].isna().all():
        alone = "n_prompts" in frame and bool((frame["n_prompts"] == 1).all())
        return "one prompt has no intervals" if alone else "there are no intervals"
    if all(massive.decides(row) for _, row in frame.iterrows()):
        return f"in every layer one token holds more than {DECIDES:.0%} of the variance, and decides what is measured"
    return ""


def by_layer(frame: pd.DataFrame) -> list[str]:
    """Up to five sentences about ``reversion_layers``: kappa against its nulls, displacing the stream, psi."""
    why = nothing_to_say(frame)
    if why:
        return [f"Nothing can be said of mean reversion: {why}."]
    frame = after_first(frame)
    defined = [effect.defined for effect in _slopes(frame, 1)]
    undefined, frame = frame[[not known for known in defined]], frame[defined]
    against, along, unclear = (
        _where(frame, _slopes(frame, sign), word) for sign, word in ((1, "yes"), (-1, "yes"), (1, "undecided"))
    )
    unclear = unclear[~unclear["layer"].isin(along["layer"])]
    texts = []
    if against.empty:
        texts.append(
            f"In none of the {len(frame)} layers looked at is kappa shown to reach {LEAST:g} beyond its rotated and "
            "token-shuffled nulls: no layer as a whole was seen to write against deviations."
        )
    else:
        texts.append(
            f"kappa reaches {LEAST:g} beyond its rotated and token-shuffled nulls in {len(against)} of {len(frame)} "
            f"layers ({layers(against['layer'])}), where it is {_range(against['kappa'])}: their updates run against "
            "the deviation of a token from the mean."
        )
        texts.append(_causal(against) + _spread(against))
    if len(along):
        texts.append(
            f"In {layers(along['layer'])} kappa is below -{LEAST:g} and below its nulls "
            f"({_range(along['kappa'])}): their updates carry deviations further out."
        )
    if len(unclear):
        texts.append(
            f"In {layers(unclear['layer'])} this is undecided: whether kappa is {LEAST:g} or more beyond its nulls was "
            "neither shown nor ruled out."
        )
    if len(undefined):
        texts.append(
            f"Of {layers(undefined['layer'])} nothing is said: kappa is undefined or has no interval, or one token "
            f"holds more than {DECIDES:.0%} of the variance."
        )
    return texts


def limits(frame: pd.DataFrame) -> list[str]:
    """What ``reversion_layers`` cannot tell."""
    notes = [
        "kappa is a regression over tokens, and a rotation has it too: it becomes a restoring force only where a "
        "displaced stream is shortened. "
        "The model is deterministic; nothing here is noise in time, and no Ornstein-Uhlenbeck process is claimed."
    ]
    if frame["kappa"].isna().all():
        return notes + few_prompts(frame)
    if (frame["layer"] == 0).any() and len(frame) > 1:
        row = frame[frame["layer"] == 0].iloc[0]
        notes.append(
            f"Layer 0 (kappa = {number(row, 'kappa')}) is left out: the stream that enters it is the bare embedding, "
            "often so short that kappa and growth beside it say nothing of later layers."
        )
    if "kappa_untrained" not in frame or frame["kappa_untrained"].isna().all():
        notes.append(
            "The untrained copy of the model was not measured, so what its architecture does by itself is not known."
        )
    else:
        rows = after_first(frame)
        short = _where(rows, _slopes(rows, 1))
        short = short[~(short["kappa_excess_untrained_low"] > 0)]
        if len(short):
            notes.append(f"In {layers(short['layer'])} kappa does not exceed that of the same architecture untrained.")
    return notes + few_prompts(frame)


def coordinates(frame: pd.DataFrame) -> list[str]:
    """One sentence for every coordinate but the raw one: where kappa exceeds its nulls (``reversion.layers``)."""
    texts = []
    for name in (name for name in SEEN if name in set(frame["coordinates"])):
        part = after_first(frame[frame["coordinates"] == name])
        above = _where(part, _slopes(part, 1))["layer"]
        where = f" ({layers(above)})" if len(above) else ""
        where = f"{_of_layers(len(above), len(part))}{where}"
        sentence = f"Seen {SEEN[name]}, kappa reaches {LEAST:g} beyond both random walks in {where}"
        if name == "normalised" and part["kappa"].notna().any():
            more, less = (
                _where(part, [beyond(row, "kappa_corrected", sign=sign) for row in _rows(part)]) for sign in (1, -1)
            )
            sentence += (
                f"; there a random update of the same size reads {part['kappa_mechanical'].mean():.2f} on average by "
                f"arithmetic alone, the model {part['kappa'].mean():.2f}: more by {LEAST:g} in "
                f"{_of_layers(len(more), len(part))}, less in {len(less)}"
            )
        texts.append(sentence + ".")
    return texts


def directions(frame: pd.DataFrame) -> list[str]:
    """How many directions come out shorter, longer, or turned (``directions.layers``); do more than by any map?"""
    shown = after_first(frame)
    shown = shown[shown["decay_low"].notna()]
    if shown.empty:
        return []
    count = shown["verdict"].value_counts()
    predicted = shown.drop_duplicates("layer")["R2"].median()
    drift = f"; the drift predicts {predicted:.2f} of an update's variance in them on held-out prompts"
    drift = "" if math.isnan(predicted) else f"{drift} (median over layers)"
    reverting = reverting_directions(frame)
    if reverting:
        beyond = f"More come out shorter than under the same map turned at random in {_along_directions(reverting)}."
    else:
        beyond = "In no layer do more come out shorter than under the same map turned at random."
    return [
        f"Of {len(shown)} directions looked at, the top principal ones of every layer, {count.get('reverts', 0)} "
        f"come out shorter by {LEAST:g} or more, {count.get('grows', 0)} longer, {count.get('turns', 0)} only turned, "
        f"{count.get('persists', 0)} stay, {count.get('slope', 0)} are shorter by regression and not when moved, and "
        f"{count.get('undecided', 0)} could not be decided{drift}. {beyond}"
    ]


def reverting_directions(frame: pd.DataFrame) -> dict[int, tuple[int, float]]:
    """Return how many directions of a layer revert, and what share of its variance they hold, by layer.

    Only of layers whose balance of reverting and growing exceeds that of the same map turned at random, in all layers
    at once (``directions.layers``).
    """
    found = after_first(frame)
    one_each = found.drop_duplicates("layer")
    balanced = _where(one_each, [beyond(row, "balance_excess", least=0.0) for row in _rows(one_each)])["layer"]
    found = found[(found["verdict"] == "reverts") & found["layer"].isin(balanced)]
    parts = [part for _, part in found.groupby("layer")]
    return {int(part["layer"].iloc[0]): (len(part), float(part["share"].sum())) for part in parts}


def _along_directions(found: Mapping[int, tuple[int, float]]) -> str:
    counts, shares = zip(*found.values(), strict=True)
    many = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    held = (
        f"{min(shares):.0%}"
        if f"{min(shares):.0%}" == f"{max(shares):.0%}"
        else f"{min(shares):.0%} to {max(shares):.0%}"
    )
    hold = "it holds" if max(counts) == 1 else "they hold"
    return f"{layers(found)}: along {many} direction{'s' * (max(counts) > 1)}, {hold} {held} of the variance"


def returns(frame: pd.DataFrame) -> list[str]:
    """What is left of displacements at the end of the model (``returns.curves``)."""
    texts = []
    final = _at_the_end(frame)
    ends_found = sides([beyond(row, "remaining", origin=1, least=0.0) for row in _rows(final)], LEAST)
    final = final.assign(end=[_ONE if decided(row) else end for end, (_, row) in zip(ends_found, final.iterrows())])
    words = {
        BELOW: "it ends shorter",
        ABOVE: "it ends longer",
        WITHIN: "it ends as long as it was",
        UNDECIDED: "this could not be decided",
        _ONE: f"nothing is claimed, as one token holds more than {DECIDES:.0%} of the variance",
    }
    for kind, part in final.groupby("kind", sort=False):
        first = part[part["layer"] == part["layer"].min()].iloc[0]
        outcomes = [
            f"from {layers(part[part['end'] == end]['layer'])} {what}"
            for end, what in words.items()
            if (part["end"] == end).any()
        ]
        texts.append(
            f"A displacement ({kind}, {first['size']:g} of the spread) made at layer {int(first['layer'])} leaves the "
            f"model {number(first, 'remaining')} times as long, and {number(first, 'along')} of it is left along "
            f"itself; {', '.join(outcomes)}."
        )
    return texts


def _at_the_end(frame: pd.DataFrame) -> pd.DataFrame:
    """The smallest displacements where they leave the model; none without an interval."""
    small = frame[(frame["size"] == frame["size"].min()) & frame["remaining_low"].notna()]
    return small[small["layer"] + small["q"] == (small["layer"] + small["q"]).max()]


def ends(row: pd.Series, raw: pd.DataFrame) -> str:
    """Whether reversion is stronger in the ends (``trajectories.ends``): kappa beyond the walks, and as a force.

    ``raw`` are the layers: reversion is spoken of only where one of them restores.
    """
    if pd.isna(row["difference"]):
        return (
            "Whether kappa is higher in the ends or in the middle could not be tested: a part has no layer, or the "
            "stream does not vary."
        )
    inside = range(max(1, int(row["boundary_in"])), int(row["boundary_out"]))
    values = f"kappa {number(row, 'kappa_ends')} in the ends, {number(row, 'kappa_middle')} in {layers(inside)}"
    if reason := decided(row):
        return f"Whether kappa differs between the ends and the middle is not told, {values}: {reason}."
    both = ["difference", "excess"] if "excess" in row else ["difference"]
    for place, other, sign in (("ends", "middle", 1), ("middle", "ends", -1)):
        if judged([weakest([beyond(row, name, sign=sign) for name in both])]) == ["yes"]:
            if row[f"kappa_{place}_high"] < 0:
                return f"Deviations grow in the {place} too, though less than in the {other}: {values}."
            if _forces(after_first(raw)) & {
                layer for layer in raw["layer"] if (layer in inside) == (place == "middle")
            }:
                return f"Reversion is stronger in the {place}: {values}."
            return f"kappa is higher in the {place}, but no layer there is shown to restore: {values}."
    if judged([beyond(row, "difference", sign=sign) for sign in (1, -1)]) == ["no", "no"]:
        return f"kappa is as high in the ends as in the middle, within {LEAST:g}: {values}."
    return f"Whether kappa is higher in the ends or in the middle could not be decided: {values}."


def answer(raw: pd.DataFrame, drift: pd.DataFrame, back: pd.DataFrame | None = None) -> str:
    """Reverts, does not, or only in these layers and directions: from layers, directions and returns.

    It reverts where every layer from 1 on restores and displacements, if they were followed, leave the model shorter.
    It does not where in every layer kappa is surely below ``LEAST`` or a displaced stream is surely not shortened, and
    in no layer more directions revert than a map turned at random would have.
    """
    begin = "In one sentence: on these prompts"
    why = nothing_to_say(raw)
    if why:
        return f"{begin} nothing can be said of reversion to a mean: {why}."
    later = after_first(raw)
    forces, along = _forces(later), reverting_directions(drift)
    over = None if back is None or _at_the_end(back).empty else _shortened(back)
    if len(forces) == len(later) and over in (None, True):
        together = "" if over is None else ", and over all layers together"
        return f"{begin} the stream reverts to a mean in every layer ({layers(forces)}), as a force{together}."
    along = {layer: found for layer, found in along.items() if layer not in forces}
    if forces or along:
        parts = [f"as a force in {layers(forces)}"] if forces else []
        parts += [f"in {_along_directions(along)}"] if along else []
        more = "" if over is not False else "; that displacements leave the model shorter is not shown"
        return f"{begin} the stream reverts to a mean only in part: {'; '.join(parts)}{more}."
    left = left_open(later)
    if not left:
        return (
            f"{begin} the stream does not revert to a mean: in no layer does kappa reach {LEAST:g} while displacements "
            "of every kind get shorter by as much, and in none do more directions revert than under the same map "
            "turned at random."
        )
    if len(left) == len(later):
        return f"{begin} it could not be decided whether the stream reverts to a mean: no reversion was shown."
    return f"{begin} no reversion to a mean was shown, but in {layers(left)} it is not ruled out either."


def left_open(frame: pd.DataFrame) -> set[int]:
    """The layers in which a restoring force is not ruled out."""
    open_ = frame["restoring"] != "no" if "restoring" in frame else ~(frame["kappa_high"] < LEAST)
    return set(frame[open_]["layer"])


def _slopes(frame: pd.DataFrame, sign: int) -> list[Effect]:
    """By how much kappa, times ``sign``, exceeds ``LEAST`` beyond both walks: the weakest of the three, by layer."""
    names = ["kappa", *(f"kappa_excess_{walk}" for walk in WALKS)]
    return [weakest([beyond(row, name, sign=sign) for name in names]) for row in _rows(frame)]


def _where(frame: pd.DataFrame, effects: list[Effect], word: str = "yes") -> pd.DataFrame:
    """The rows whose effect is there, is not, or is undecided; corrected for their number."""
    return frame[[found == word for found in judged(effects)]]


def _rows(frame: pd.DataFrame) -> list[dict]:
    return frame.to_dict("records")


def _forces(frame: pd.DataFrame) -> set[int]:
    return set(frame[frame["restoring"] == "yes"]["layer"]) if "restoring" in frame else set()


def _shortened(frame: pd.DataFrame) -> bool:
    """Whether displacements of every kind, made at the first layer followed, leave the model shorter."""
    final = _at_the_end(frame)
    first = final[final["layer"] == final["layer"].min()]
    return judged([weakest([beyond(row, "remaining", origin=1, sign=-1) for row in _rows(first)])]) == ["yes"]


def after_first(frame: pd.DataFrame) -> pd.DataFrame:
    """All but layer 0, which starts from the bare embedding, unless there is no other."""
    return frame[frame["layer"] > 0] if frame["layer"].max() > 0 else frame


def _of_layers(count: int, total: int) -> str:
    return f"{count or 'none'} of {total} layer{'s' * (total != 1)}"


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.3f}", f"{values.max():.3f}"
    return low if low == high else f"{low} to {high}"


def _causal(against: pd.DataFrame) -> str:
    if "restoring" not in against:
        return "Whether they shorten a displaced stream was not measured."
    words = {
        "yes": "confirms a restoring pull in {}",
        "no": f"shows no force in {{}}, where some kind is shortened by less than {LEAST:g}: a correlate, a turn, or a "
        "pull along few directions",
        "undecided": "leaves it open in {}",
    }
    found = {word: against[against["restoring"] == word]["layer"] for word in words}
    parts = [words[word].format(layers(where)) for word, where in found.items() if len(where)]
    return f"Displacing the stream {', and '.join(parts)}."


def _spread(against: pd.DataFrame) -> str:
    kinds = {
        "smaller than what the same update adds in {} (psi below 1, spread grows)": against["psi_high"] < 1 - SAME,
        "larger in {} (psi above 1, spread shrinks)": against["psi_low"] > 1 + SAME,
        "as large in {} (psi 1, spread stays)": (against["psi_low"] >= 1 - SAME) & (against["psi_high"] <= 1 + SAME),
    }
    parts = [text.format(layers(against[which]["layer"])) for text, which in kinds.items() if which.any()]
    return (
        f" What runs against a deviation is {' and '.join(parts)}."
        if parts
        else " Whether it outweighs what the same updates add could not be decided."
    )
