"""What a scan found and what it leaves open, in sentences. Pure functions of ``surgery.stats.comparisons``' tables.

First stands what the unmodified model can do. If that is not shown to be above chance, no winner is named and nothing
else is said of any wiring. A wiring is called better or worse only if p_max < .05, which allows for how many were
tried, and the effect is ``worth.LEAST_GAIN`` or more; a gain is confirmed only on probes that took no part in choosing
it, and only if no temperature gains as much. One prompt says nothing. That nothing was found is said as plainly, and so
is on how many prompts the model, or a wiring, gives no finite number.

>>> import pandas as pd
>>> gains = {"gain": [0.1], "gain_low": [-0.1], "gain_high": [0.3], "p": [0.3], "p_max": [0.3], "q": [0.3]}
>>> frame = pd.DataFrame({"wiring": [":3 1:"], **gains, "n_prompts": [40]})
>>> search(frame, Luck(1, 40, 0, 0.0, 0.2), "loglik")[0]
'1 wiring was tried on 40 prompts. The largest gain is that of :3 1:, +0.10 [-0.10, +0.30] nats per answer.'
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from surgery.page.phrases import value
from surgery.planning.budget import told
from surgery.scan.halving import Effort
from surgery.scan.worth import LEAST, LEAST_GAIN, MOST_NOT_FINITE, Baseline
from surgery.stats.comparisons import FEW, FEW_CLUSTERS, Luck

SURE = 0.05
NAMED = 5  # wirings listed by name, at most
_CONTROLS = {
    "random span": "random spans of its length",
    "damped 0.5": "half of the second pass",
    "norm-only": "the stream only resized",
    "linearised": "the second pass linearised",
}
UNITS = {
    "loglik": (1, 2, "nats per answer"),
    "exact": (100, 1, "percentage points of exact answers"),
    "credit": (100, 1, "percentage points of an answer"),
    "choice": (100, 1, "percentage points of right choices"),
    "loss": (1, 3, "nats per token"),
    "kl": (1, 3, "nats of divergence per token"),
}


def findings(
    table: pd.DataFrame,
    winners: pd.DataFrame,
    luck: Luck,
    baseline_: Baseline,
    controls: pd.DataFrame,
    effort: Effort | None = None,
) -> list[str]:
    """The sentences to read first: ``baseline``, ``search``, ``validation``, ``beside``; without a task the first.

    ``effort`` is of a search in rounds, None for a full scan.
    """
    first, metric = baseline(baseline_), baseline_.metric
    if not baseline_.sound:
        return [
            first,
            f"So no winner is named among {_wirings(len(_tried(table)))}: the prompts that are left are not a fair "
            "sample. A model that gives no finite number may have a broken weight, or overflow in its dtype.",
        ]
    if not baseline_.done:
        return [
            first,
            f"So no winner is named among {_wirings(len(_tried(table)))}: where the model cannot do a task, whatever "
            "makes it less sure of what it says gains in likelihood. Ask it something that it can do.",
        ]
    return [
        first,
        *search(table, luck, metric, effort),
        *validation(winners, metric),
        *beside(winners, controls, baseline_),
    ]


def baseline(found: Baseline) -> str:
    """What the unmodified model can do, against chance, and whether it does the task at all."""
    scale, digits, unit = _unit(found.measure)
    chance = value(scale * found.chance, digits)
    against = {
        "exact": f"{chance} % by chance (the answers of other questions)",
        "choice": f"{chance} % by chance",
        "loss": f"{chance} if all tokens were alike",
    }[found.measure]
    ends = ", ".join(value(scale * end, digits) for end in (found.low, found.high))
    better = "less" if found.measure == "loss" else "more"
    also = "" if found.metric == found.measure else f"; {_amount(found.scored, found.metric)}"
    said = (
        f"The model as it is: {_amount(found.value, found.measure)} on {_count(found.prompts, 'prompt')}, against "
        f"{against}, {value(scale * found.above, digits)} [{ends}] {unit.split(' of ')[0]} {better}{also}."
    )
    if found.not_finite:
        said += (
            f" On {found.not_finite} of {found.prompts + found.not_finite} prompts it gives no finite number; these "
            "are left out for every wiring."
        )
    if not found.sound:
        return f"{said} That is more than one in {1 / MOST_NOT_FINITE:.0f}."
    if found.done:
        return f"{said} It does this task."
    least = f"{scale * LEAST[found.measure]:g} {unit.split(' of ')[0]}"
    return f"{said} It is not shown to do this task: the low end of that interval must be above {least}."


def beside(winners: pd.DataFrame, controls: pd.DataFrame, found: Baseline) -> list[str]:
    """What stands beside the winners: right answers, a temperature, and the controls of the first confirmed repeat."""
    sentences, metric = [], found.metric
    claimed = winners[~winners["verdict"].isin(["no gain", "not above chance"])]
    if len(claimed) and "beyond" in claimed and claimed["beyond"].notna().any():
        best = claimed.nlargest(1, "gain_validation").iloc[0]
        sentences.append(_temperature(best, found))
    for winner, rows in list(controls.groupby("winner", sort=False))[:1]:
        sentences.append(_controls(str(winner), rows, metric))
    return sentences


def _temperature(row: pd.Series, found: Baseline) -> str:
    measure = "credit" if found.measure == "loss" else found.measure
    answers = pd.Series({end: row[f"answers{end[4:]}"] for end in ("gain", "gain_low", "gain_high")})
    gained = f"In right answers the best on fresh probes, {row['wiring']}, gains {_gain(answers, measure)}."
    share = row["by_temperature"]
    if not row["temperature"] >= LEAST_GAIN.get(found.metric, 0):
        explained = f"{_signed(row['temperature'], found.metric)}, next to nothing"
    else:
        part = "" if math.isnan(share) else f", {100 * share:.0f} % of what the wiring gains"
        explained = f"{_signed(row['temperature'], found.metric)}{part}"
    beyond = row["p_beyond"] < SURE and row["beyond"] > 0
    verdict = (
        "the rest is not explained by it"
        if beyond
        else "the wiring is not shown to gain more than that, so its gain may be no more than a change in how sure the "
        "model is"
    )
    return (
        f"{gained} One temperature for the logits of the unmodified model, chosen on the search half, gains "
        f"{explained}: {verdict}."
    )


def _controls(winner: str, rows: pd.DataFrame, metric: str) -> str:
    others = rows[rows["control"] != "repeat"]
    parts = []
    for control, of_control in others.groupby("control", sort=False):
        name = _CONTROLS.get(str(control), str(control))
        gains = of_control["gain"][np.isfinite(of_control["gain"])]
        count = f" ({len(gains)}, on average)" if len(gains) > 1 else ""
        broken = len(of_control) - len(gains)
        no_number = f"{', ' if len(gains) else ' '}{broken} not finite" if broken else ""
        average = f"{count} {_signed(gains.mean(), metric, unit=False)}" if len(gains) else ""
        parts.append(f"{name}{average}{no_number}")
    own = rows.loc[rows["control"] == "repeat", "gain"].iloc[0]
    as_good = others[~((others["p_less"] < SURE) & (others["less"] > 0))]
    names = list(dict.fromkeys(_CONTROLS.get(str(control), str(control)) for control in as_good["control"]))
    verdict = (
        "it gains more than each of them"
        if not names
        else f"it is not shown to gain more than {_listed(names)}, so what helps need not be what these layers compute"
    )
    return f"Beside {winner} ({_signed(own, metric)}), on the same probes: {', '.join(parts)}; {verdict}."


def best_groups(table: pd.DataFrame, found: Baseline) -> list[str]:
    """``groups`` of the three best with an introduction, from the validation half; nothing without groups or a task."""
    best = list(dict.fromkeys(table["wiring"]))[:3]
    if not best or not found.done:
        return []
    return ["By group, on the validation half (p_max over all rows of it):", *groups(table, found.metric, best)]


def painters(table: pd.DataFrame, metric: str) -> list[str]:
    """The variants in the order of their damage at the middle size, and the largest window each is not shown to harm.

    ``table`` is ``controls.painters(n_layers)`` with the comparison of every wiring. The random order shows whether
    order matters, the skip whether a layer is needed at all.
    """
    sizes = sorted(table["size"].unique())
    size = sizes[len(sizes) // 2]
    middle = table[table["size"] == size].groupby("variant")["gain"].mean().sort_values(ascending=False)
    order = ", ".join(f"{variant} {_signed(gain, metric, unit=False)}" for variant, gain in middle.items())
    harmless = table[np.isfinite(table["gain"]) & ~((table["p_max"] < SURE) & (table["gain"] < 0))]
    largest = harmless.groupby("variant")["size"].max()
    sentences = [f"A centred window of {size} layers, from the least harmful change on: {order} ({_unit(metric)[2]})."]
    if len(largest):
        named = ", ".join(f"{variant} ({size} layers)" for variant, size in largest.items())
        sentences.append(f"The largest window at which a change is not shown to harm: {named}.")
    else:
        sentences.append("Every variant harms at every size, beyond luck.")
    return sentences + _not_finite(table)


def search(table: pd.DataFrame, luck: Luck, metric: str, effort: Effort | None = None) -> list[str]:
    """How many wirings were tried, the largest gain, what luck alone gives, which are better or worse beyond luck."""
    tried = _tried(table)
    if tried.empty:
        return ["Nothing was tried: the table holds no wiring except the unmodified model."]
    if tried["n_prompts"].max() < 2:
        return [f"{_wirings(len(tried))} on one prompt: nothing can be told from luck."]
    best = tried.sort_values("gain", ascending=False, kind="stable").iloc[0]
    count = f"{_wirings(len(tried))} {'was' if len(tried) == 1 else 'were'} tried on {_prompts(tried)}."
    if effort is not None:
        count = _searched(tried, effort, metric)
    if np.isneginf(best["gain"]):
        return [count, *_not_finite(tried)]
    if not best["gain"] > 0:
        return [
            f"{count} None gains anything; the least harmful, {best['wiring']}, reads {_gain(best, metric)}.",
            _beyond(tried, best, metric),
            *_not_finite(tried),
        ]
    return [
        f"{count} The largest gain is that of {best['wiring']}, {_gain(best, metric)}.",
        _luck(best, luck, metric),
        _beyond(tried, best, metric),
        *_not_finite(tried),
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
    if len(claimed) > 1 and math.isfinite(after):
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
    for wiring, every in table.groupby("wiring", sort=False):
        rows = every[every["gain"] != -math.inf]
        if wiring == ":" or (len(wirings) and wiring not in wirings):
            continue
        sure = _sure(rows, metric)
        parts = [
            f"{verb} {', '.join(_in_group(row, metric) for _, row in part.iterrows())}"
            for verb, part in (("helps", sure[sure["gain"] > 0]), ("harms", sure[sure["gain"] < 0]))
            if len(part)
        ]
        rest = len(rows) - len(sure)
        without = every.loc[every["gain"] == -math.inf, "group"]
        broken = f"; it is not finite on some probes of {_names(without)}" if len(without) else ""
        if not parts:
            sentences.append(f"In none of {len(rows)} groups was an effect of {wiring} shown{broken}.")
        else:
            elsewhere = f"; in the other {rest} no effect was shown" if rest else ""
            sentences.append(f"{wiring} {' and '.join(parts)}{elsewhere}{broken} ({_unit(metric)[2]}).")
    return sentences


def limits(table: pd.DataFrame, winners: pd.DataFrame | None = None, effort: Effort | None = None) -> list[str]:
    """What the numbers leave open, and what must not be read into them."""
    tried = _tried(table)
    notes = ["Each interval is of one wiring by itself; that of the best does not allow for its having been chosen."]
    if effort is not None:
        notes.append(
            "Gains of the search half are estimates, and the largest were chosen: they may be optimistic or, where a "
            "gain stands alone among its neighbours, too low. Those on fresh probes are neither."
        )
    if winners is None:
        notes.append("No gain was measured again on fresh probes, so none is more than a candidate.")
    unclear = int(((tried["p_max"] >= SURE) & np.isfinite(tried["gain"])).sum())
    if unclear:
        notes.append(f"For {_wirings(unclear)} of {len(tried)} a small effect is neither shown nor ruled out.")
    partial = int((tried["n_prompts"] < tried["n_prompts"].max()).sum())
    if partial and effort is None:
        verb = "is" if partial == 1 else "are"
        notes.append(f"{_wirings(partial)} could not be measured on every prompt, and {verb} compared on the rest.")
    most = int(tried["n_prompts"].max()) if len(tried) else 0
    if effort is not None:
        most = effort.probes
    if most < FEW:
        notes.append(
            f"{_count(most, 'prompt')} in the search half, fewer than {FEW}: only large effects can be shown, and "
            "where gains are very skewed p of a single wiring is too small and its interval too narrow."
        )
    units = int(tried["n_units"].max()) if len(tried) and "n_units" in tried and effort is None else most
    if units < most:
        notes.append(f"Prompts of one cluster are drawn together: {most} prompts count as {units}.")
        if units < FEW_CLUSTERS:
            notes.append(f"{_count(units, 'cluster')} are too few to show much: fewer than {FEW_CLUSTERS}.")
    return notes


def planned(plan: Mapping[str, Any] | None) -> list[str]:
    """What was cut to fit into a budget of time, if anything was."""
    sentence = told(plan["budget"], plan["cuts"]) if plan else ""
    return [sentence] if sentence else []


def _not_finite(tried: pd.DataFrame) -> list[str]:
    """Which wirings give no finite number on how many prompts, if any do."""
    if "n_not_finite" not in tried or not tried["n_not_finite"].any():
        return []
    broken = tried[tried["n_not_finite"] > 0].sort_values("n_not_finite", ascending=False, kind="stable")
    named = pd.Series(
        [f"{row.wiring} on {row.n_not_finite} of {row.n_prompts}" for row in broken.head(NAMED).itertuples()]
    )
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    verbs, each = ("gives", "that counts") if len(broken) == 1 else ("give", "each counts")
    return [
        f"{_wirings(len(broken))} of {len(tried)} {verbs} no finite number on some of the prompts, though the "
        f"unmodified model does ({', '.join(named)}{more}): {each} as a loss without bound, whatever it gains "
        "on the others."
    ]


def _searched(tried: pd.DataFrame, effort: Effort, metric: str) -> str:
    measured = int((tried["n_prompts"] > 0).sum())
    count = (
        f"{_wirings(len(tried))} were searched by successive halving, with {100 * effort.share:.0f} % of the layer "
        f"executions of a full scan of {_count(effort.probes, 'prompt')}: {measured} were measured, each on some of "
        "the prompts, and what a full scan would read is estimated from them and their neighbours."
    )
    if not effort.stopped:
        return count
    return (
        f"{count} It stopped after {_count(effort.rounds, 'round')}: no wiring beats the unmodified model by "
        f"{_signed(LEAST_GAIN.get(metric, 0), metric)} (with 95 % confidence in all of them together)."
    )


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


def _beyond(tried: pd.DataFrame, best: pd.Series, metric: str) -> str:
    sure = _sure(tried, metric)
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
        "not finite": "on some prompts it gives no finite number, though the unmodified model does",
        "as a temperature": "it gains no more, for all that is shown, than a temperature does",
        "too small": "too small to matter",
    }[row["verdict"]]


def _tally(verdicts: pd.Series) -> str:
    verbs = {
        "survived": "survived",
        "survived in part": "survived in part",
        "vanished": "shrank to what may be nothing",
        "undecided": "could not be decided",
        "reversed": "turned into losses",
        "not finite": "gave no finite number on some prompt",
        "as a temperature": "gained no more, for all that is shown, than a temperature does",
        "too small": "gained too little to matter",
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
    return _count(count, "wiring")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _sure(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows with an effect beyond luck that is not too small to matter."""
    return rows[(rows["p_max"] < SURE) & (rows["gain"].abs() >= LEAST_GAIN.get(metric, 0))]


def _prompts(rows: pd.DataFrame, column: str = "n_prompts") -> str:
    return _count(int(rows[column].max()) if len(rows) else 0, "prompt")


def _unit(metric: str) -> tuple[int, int, str]:
    return UNITS.get(metric, (1, 3, f"of {metric}"))


def _amount(number: float, metric: str) -> str:
    """``84.8 % of exact answers``, ``-1.21 nats per answer``."""
    scale, digits, unit = _unit(metric)
    text = value(scale * number, digits)
    return f"{text} % {unit.split('points of ')[1]}" if scale == 100 else f"{text} {unit}"


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
