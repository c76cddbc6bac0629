"""What a scan found and what it leaves open, in sentences. Pure functions of ``surgery.stats.comparisons``' tables.

A wiring is called better or worse only if p_max < .05, which allows for how many were tried; a gain is confirmed only
on probes that took no part in choosing it. That nothing was found is said as plainly.

>>> import pandas as pd
>>> gains = {"gain": [0.1], "gain_low": [-0.1], "gain_high": [0.3], "p": [0.3], "p_max": [0.3], "q": [0.3]}
>>> frame = pd.DataFrame({"wiring": [":3 1:"], **gains, "n_prompts": [40]})
>>> search(frame, Luck(1, 40, 0, 0.0, 0.2), "loglik")[0]
'1 wiring was tried on 40 prompts. The largest gain is that of :3 1:, +0.10 [-0.10, +0.30] nats per answer.'
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from surgery.page.phrases import few_prompts, value
from surgery.stats.comparisons import Luck

SURE = 0.05
NAMED = 5  # wirings listed by name, at most
UNITS = {
    "loglik": (1, 2, "nats per answer"),
    "exact": (100, 1, "percentage points of exact answers"),
    "credit": (100, 1, "percentage points of an answer"),
    "choice": (100, 1, "percentage points of right choices"),
    "loss": (1, 3, "nats per token"),
    "kl": (1, 3, "nats of divergence per token"),
}


def search_and_validation(table: pd.DataFrame, winners: pd.DataFrame, luck: Luck, metric: str) -> list[str]:
    """The sentences to read first: ``search``, then ``validation``."""
    return [*search(table, luck, metric), *validation(winners, metric)]


def best_groups(table: pd.DataFrame, metric: str) -> list[str]:
    """``groups`` of the three best with an introduction, from the validation half; nothing if there are no groups."""
    best = list(dict.fromkeys(table["wiring"]))[:3]
    if not best:
        return []
    return ["By group, on the validation half (p_max over all rows of it):", *groups(table, metric, best)]


def painters(table: pd.DataFrame, metric: str) -> list[str]:
    """The variants in the order of their damage at the middle size, and the largest window each is not shown to harm.

    ``table`` is ``controls.painters(n_layers)`` with the comparison of every wiring. The random order shows whether
    order matters, the skip whether a layer is needed at all.
    """
    sizes = sorted(table["size"].unique())
    size = sizes[len(sizes) // 2]
    middle = table[table["size"] == size].groupby("variant")["gain"].mean().sort_values(ascending=False)
    order = ", ".join(f"{variant} {_signed(gain, metric, unit=False)}" for variant, gain in middle.items())
    harmless = table[~((table["p_max"] < SURE) & (table["gain"] < 0))]
    largest = harmless.groupby("variant")["size"].max()
    sentences = [f"A centred window of {size} layers, from the least harmful change on: {order} ({_unit(metric)[2]})."]
    if len(largest):
        named = ", ".join(f"{variant} ({size} layers)" for variant, size in largest.items())
        sentences.append(f"The largest window at which a change is not shown to harm: {named}.")
    else:
        sentences.append("Every variant harms at every size, beyond luck.")
    return sentences


def search(table: pd.DataFrame, luck: Luck, metric: str) -> list[str]:
    """How many wirings were tried, the largest gain, what luck alone gives, which are better or worse beyond luck."""
    tried = _tried(table)
    if tried.empty:
        return ["Nothing was tried: the table holds no wiring except the unmodified model."]
    best = tried.sort_values("gain", ascending=False, kind="stable").iloc[0]
    count = f"{_wirings(len(tried))} {'was' if len(tried) == 1 else 'were'} tried on {_prompts(tried)}."
    if not best["gain"] > 0:
        return [
            f"{count} None gains anything; the least harmful, {best['wiring']}, reads {_gain(best, metric)}.",
            _beyond(tried, best),
        ]
    return [
        f"{count} The largest gain is that of {best['wiring']}, {_gain(best, metric)}.",
        _luck(best, luck, metric),
        _beyond(tried, best),
    ]


def validation(winners: pd.DataFrame, metric: str) -> list[str]:
    """What the largest gains of the search half were worth on probes that did not choose them."""
    claimed = winners[winners["verdict"] != "no gain"]
    if claimed.empty:
        return ["The search half showed no gain, so there was none to measure again."]
    scale, digits, unit = _unit(metric)
    before, after = claimed["gain_search"].mean() * scale, claimed["gain_validation"].mean() * scale
    confirmed = claimed[claimed["verdict"].isin(["survived", "survived in part"])]
    first = claimed.iloc[0]
    validated = pd.Series({end: first[f"{end}_validation"] for end in ("gain", "gain_low", "gain_high")})
    sentences = [
        f"The {_largest(len(claimed))} measured again on {_prompts(claimed, 'n_prompts_validation')} that took no part "
        f"in the choice: {_tally(claimed['verdict'])}.",
        f"The best of the search, {first['wiring']}, had claimed {_signed(first['gain_search'], metric)} and reads "
        f"{_gain(validated, metric)} there: {_verdict(first)}.",
    ]
    if len(claimed) > 1:
        claim, worth = (value(gain, digits, signed=True) for gain in (before, after))
        sentences.append(
            f"Averaged over them, {claim} {unit} was claimed and {worth} found: {_share(before, after)}. Gains chosen "
            "for being the largest shrink on fresh probes even where a wiring helps (regression to the mean)."
        )
    if confirmed.empty:
        sentences.append("No gain was confirmed on fresh probes: nothing was found that is worth keeping.")
    else:
        sentences.append(f"Confirmed on fresh probes: {_names(confirmed['wiring'])}.")
    return sentences


def groups(table: pd.DataFrame, metric: str, wirings: Sequence[str] = ()) -> list[str]:
    """A sentence per wiring (of ``wirings``, by default all): the groups of probes that it helps, and that it harms."""
    sentences = []
    for wiring, rows in table.groupby("wiring", sort=False):
        if wiring == ":" or (len(wirings) and wiring not in wirings):
            continue
        sure = rows[rows["p_max"] < SURE]
        parts = [
            f"{verb} {', '.join(_in_group(row, metric) for _, row in part.iterrows())}"
            for verb, part in (("helps", sure[sure["gain"] > 0]), ("harms", sure[sure["gain"] < 0]))
            if len(part)
        ]
        rest = len(rows) - len(sure)
        if not parts:
            sentences.append(f"In none of {len(rows)} groups was an effect of {wiring} shown.")
        else:
            elsewhere = f"; in the other {rest} no effect was shown" if rest else ""
            sentences.append(f"{wiring} {' and '.join(parts)}{elsewhere} ({_unit(metric)[2]}).")
    return sentences


def limits(table: pd.DataFrame, winners: pd.DataFrame | None = None) -> list[str]:
    """What the numbers leave open, and what must not be read into them."""
    tried = _tried(table)
    notes = ["Each interval is of one wiring by itself; that of the best does not allow for its having been chosen."]
    if winners is None:
        notes.append("No gain was measured again on fresh probes, so none is more than a candidate.")
    unclear = int((tried["p_max"] >= SURE).sum())
    if unclear:
        notes.append(f"For {_wirings(unclear)} of {len(tried)} a small effect is neither shown nor ruled out.")
    partial = int((tried["n_prompts"] < tried["n_prompts"].max()).sum())
    if partial:
        verb = "is" if partial == 1 else "are"
        notes.append(f"{_wirings(partial)} could not be measured on every prompt, and {verb} compared on the rest.")
    most = int(tried["n_prompts"].max()) if len(tried) else 0
    return notes + few_prompts(pd.DataFrame({"n_prompts": [most]}))


def _luck(best: pd.Series, luck: Luck, metric: str) -> str:
    if np.isnan(luck.mean):
        return "All are clearly worse than the unmodified model, so luck could not have made one of them the best."
    if best["gain"] > luck.high:
        place = "beyond both"
    else:
        place = "above the first and within the second" if best["gain"] > luck.mean else "below even the first"
    return (
        f"If none had any effect, the best of {luck.wirings} would still gain {_signed(luck.mean, metric)} on average, "
        f"and {_signed(luck.high, metric, unit=False)} or more in one scan of twenty. "
        f"The largest gain is {place}."
    )


def _beyond(tried: pd.DataFrame, best: pd.Series) -> str:
    sure = tried[tried["p_max"] < SURE]
    better = sure[sure["gain"] > 0].sort_values("gain", ascending=False)
    worse = int((sure["gain"] < 0).sum())
    harm = f"{worse} {'is' if worse == 1 else 'are'} worse beyond luck"
    if better.empty:
        gains = tried[tried["gain"] > 0]
        least = f" (smallest p_max of a gain: {gains['p_max'].min():.2f})" if len(gains) else ""
        return (
            f"Each held against its own spread, none gains more than luck allows{least}: no improvement was found; "
            f"{harm}."
        )
    without = "" if best["wiring"] in set(better["wiring"]) else "; the largest gain is not among them"
    verb = "gains" if len(better) == 1 else "gain"
    return (
        f"Each held against its own spread, {len(better)} {verb} more than luck allows ({_names(better['wiring'])})"
        f"{without}; {harm}."
    )


def _verdict(row: pd.Series) -> str:
    share = f"{100 * row['survived']:.0f} % of the claim"
    interval = f"[{100 * row['survived_low']:.0f} %, {100 * row['survived_high']:.0f} %]"
    return {
        "survived": f"it survived, {share} {interval}",
        "survived in part": f"it survived in part, {share} {interval}",
        "vanished": "less than claimed, and not shown to be any",
        "undecided": "too uncertain to say whether anything survived",
        "reversed": "it is worse than the unmodified model",
    }[row["verdict"]]


def _tally(verdicts: pd.Series) -> str:
    verbs = {
        "survived": "survived",
        "survived in part": "survived in part",
        "vanished": "shrank to what may be nothing",
        "undecided": "could not be decided",
        "reversed": "turned into losses",
    }
    counts = verdicts.value_counts()
    return ", ".join(f"{counts[verdict]} {verb}" for verdict, verb in verbs.items() if verdict in counts)


def _share(before: float, after: float) -> str:
    return f"{100 * after / before:.0f} % survived" if after > 0 else "nothing survived"


def _largest(count: int) -> str:
    return "largest gain was" if count == 1 else f"{count} largest gains were"


def _names(wirings: pd.Series) -> str:
    listed = ", ".join(wirings.head(NAMED))
    return listed if len(wirings) <= NAMED else f"{listed} and {len(wirings) - NAMED} more"


def _in_group(row: pd.Series, metric: str) -> str:
    return f"{row['group'] or 'probes without a group'} ({_signed(row['gain'], metric, unit=False)})"


def _tried(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["wiring"] != ":") & table["gain"].notna()]


def _wirings(count: int) -> str:
    return f"{count} wiring{'s' * (count != 1)}"


def _prompts(rows: pd.DataFrame, column: str = "n_prompts") -> str:
    count = int(rows[column].max()) if len(rows) else 0
    return f"{count} prompt{'s' * (count != 1)}"


def _unit(metric: str) -> tuple[int, int, str]:
    return UNITS.get(metric, (1, 3, f"of {metric}"))


def _signed(gain: float, metric: str, unit: bool = True) -> str:
    scale, digits, words = _unit(metric)
    text = value(scale * gain, digits, signed=True)
    if gain and not math.isnan(gain) and not float(text):
        text = f"{scale * gain:+.0e}"  # not nothing, only small
    return text + f" {words}" * unit


def _gain(row: pd.Series, metric: str) -> str:
    """``+0.53 [+0.40, +0.66] nats per answer``; as ``phrases.interval``, but small numbers do not round to nothing."""
    if np.isnan(row["gain_low"]) or np.isnan(row["gain_high"]):
        return f"{_signed(row['gain'], metric)} (no interval)"
    gain, low, high = (_signed(row[end], metric, unit=False) for end in ("gain", "gain_low", "gain_high"))
    return f"{gain} [{low}, {high}] {_unit(metric)[2]}"
