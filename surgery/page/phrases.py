"""Sentences that say what the numbers show, and what they could not tell. Pure functions of the frames.

A sentence claims something only when a 95 % interval lies wholly on one side: of 0.5 for S, of 1 for R/N, of 0 for
kappa's excess over its nulls. Otherwise it says that this could not be told. Windows are chosen beforehand (all layers
but the first, and three windows of equal length), never because their value is the largest.

>>> import pandas
>>> flat = {"start": [1], "stop": [3], "S": [0.2], "S_low": [0.1], "S_high": [0.3]}
>>> series(pandas.DataFrame(flat))[0]
'Layers 1 to 2 together read S = 0.20 [0.10, 0.30], from 0 (parallel) to 1 (serial): closer to parallel.'
"""

import math
from collections.abc import Iterable, Sequence

import pandas

FEW_PROMPTS = 20  # below, a bootstrap over prompts gives intervals that are too narrow


def number(row: pandas.Series, name: str, digits: int = 2) -> str:
    """``0.63 [0.60, 0.66]``, or the value alone where no interval could be made."""
    value, low, high = (float(row.get(key, math.nan)) for key in (name, f"{name}_low", f"{name}_high"))
    if math.isnan(value):
        return "undefined"
    if math.isnan(low) or math.isnan(high):
        return f"{value:.{digits}f} (no interval)"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def layers(indices: Iterable[int]) -> str:
    """``[1, 2, 3, 7]`` -> ``layers 1 to 3, 7``; ``[2]`` -> ``layer 2``."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    named = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer {named}" if named.isdecimal() else f"layers {named}"


def whole(frame: pandas.DataFrame) -> pandas.Series | None:
    """The window of all layers but the first, where it was measured."""
    found = frame[(frame["start"] == 1) & (frame["stop"] == frame["stop"].max())]
    return found.iloc[0] if len(found) else None


def thirds(frame: pandas.DataFrame) -> list[pandas.Series]:
    """Up to three windows of one length: first from layer 1, one in the middle, and the last."""
    n_layers = int(frame["stop"].max())
    length = min(max(2, (n_layers - 1) // 3), int((frame["stop"] - frame["start"]).max()))
    last = n_layers - length
    starts = sorted({start for start in (1, (1 + last) // 2, last) if 1 <= start <= last})
    found = [frame[(frame["start"] == start) & (frame["stop"] == start + length)] for start in starts]
    return [rows.iloc[0] for rows in found if len(rows)]


def series(frame: pandas.DataFrame, untrained: pandas.DataFrame | None = None) -> list[str]:
    """A few sentences about ``series_windows``: how serial, against the nulls, where in depth, at what price.

    ``untrained`` is the same measurement on the same architecture with fresh weights.
    """
    parts, main = thirds(frame), _main(frame)
    sentences = [
        f"Layers {_span(main)} together read S = {number(main, 'S')}, from 0 (parallel) to 1 (serial): {_side(main)}."
    ]
    if "R_over_N" in main:
        sentences.append(
            f"Against the displacement null they read R/N = {number(main, 'R_over_N')}: {_against_null(main)}."
        )
    fresh = None if untrained is None else _same(untrained, main)
    if fresh is not None:
        sentences.append(_against_untrained(main, fresh))
    if len(parts) > 1:
        values = "; ".join(f"{number(part, 'S')} in layers {_span(part)}" for part in parts)
        sentences.append(f"Windows of {_length(parts[0])} layers read S = {values}: {_order(parts)}.")
    if "loss_parallel_sum" in main:
        sentences.append(f"Run in parallel (updates summed), layers {_span(main)} {_price(main)}.")
    return sentences


def series_untold(frame: pandas.DataFrame) -> list[str]:
    """What ``series_windows`` cannot tell, and what must not be read into it."""
    main = _main(frame)
    notes = []
    if "layernorm_share" in main and pandas.notna(main["layernorm_share"]):
        notes.append(
            f"With the normalisation live, layers {_span(main)} read S = {number(main, 'S_live')}; the difference of "
            f"{main['layernorm_share']:+.2f} is rescaling by the normalisation, not reading, and is not counted above."
        )
    first, later = frame[frame["start"] == 0], frame[frame["start"] > 0]
    if later.empty:
        notes.append("Every window starts at layer 0, with the bare embedding: read R/N, not S.")
    elif len(first):
        nulls = f", N = {first['N'].min():.2f} to {first['N'].max():.2f}" if "N" in first else ""
        notes.append(
            f"Windows that start at layer 0 (S = {first['S'].min():.2f} to {first['S'].max():.2f}{nulls}) are left "
            "out of these sentences: the stream that enters them is the bare embedding, beside which any first "
            "update is large."
        )
    if "R_over_N_low" in frame and len(later):
        unclear = later[~((later["R_over_N_low"] > 1) | (later["R_over_N_high"] < 1))]
        notes.append(
            f"In {len(unclear)} of {len(later)} windows from layer 1 on, the interval of R/N includes 1: there S is "
            "no more than the size of what the window wrote accounts for."
        )
    undefined = int(frame["S"].isna().sum())
    if undefined:
        notes.append(f"S is undefined in {undefined} windows, where no layer after the first writes anything.")
    return notes + _few(frame)


def reversion(frame: pandas.DataFrame) -> list[str]:
    """Up to four sentences about ``reversion_layers``: kappa against its nulls, displacing the stream, psi."""
    frame = _without_first(frame)
    reverting = frame[frame["kappa_excess_low"] > 0]
    below = (frame["kappa_excess_rotated_high"] < 0) & (frame["kappa_excess_token_shuffled_high"] < 0)
    spreading = frame[below & (frame["kappa_high"] < 0)]
    unclear = frame[~((frame["kappa_excess_low"] > 0) | below)]
    sentences = []
    if reverting.empty:
        sentences.append(
            f"In none of the {len(frame)} layers looked at does kappa exceed its rotated and token-shuffled nulls: no "
            "mean reversion was found."
        )
    else:
        sentences.append(
            f"kappa exceeds its rotated and token-shuffled nulls in {len(reverting)} of {len(frame)} layers "
            f"({layers(reverting['layer'])}), where it is {_range(reverting['kappa'])}: their updates run against the "
            f"deviation of a token from the mean.{_chance(reverting, frame)}"
        )
        sentences.append(_causal(reverting) + _spread(reverting))
    if len(spreading):
        sentences.append(
            f"In {layers(spreading['layer'])} kappa is below 0 and below its nulls "
            f"({_range(spreading['kappa'])}): their updates carry deviations further out."
        )
    if len(unclear):
        sentences.append(
            f"In {layers(unclear['layer'])} the interval of the excess includes 0: a weak reversion is neither "
            "shown nor ruled out."
        )
    return sentences


def reversion_untold(frame: pandas.DataFrame) -> list[str]:
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
        later = _without_first(frame)
        short = later[(later["kappa_excess_low"] > 0) & ~(later["kappa_excess_untrained_low"] > 0)]
        if len(short):
            notes.append(f"In {layers(short['layer'])} kappa does not exceed that of the same architecture untrained.")
    return notes + _few(frame)


def calibration(networks: pandas.DataFrame) -> list[str]:
    """Whether the measure reads what it must on the constructed networks: 0, rising, 1."""
    S = networks.groupby("network", sort=False)["S"]
    lowest, middle, highest = S.min(), S.median(), S.max()
    mixed = [name for name in middle.index if name.startswith("mixed")]
    sound = (
        highest["parallel"] < 1e-5 and lowest["serial"] > 1 - 1e-5 and list(middle[mixed]) == sorted(set(middle[mixed]))
    )
    values = ", ".join(f"{middle[name]:.2f}" for name in mixed)
    return [
        f"On networks built so that the answer is known, S reads at most {highest['parallel']:.6f} where no layer "
        f"reads another, at least {lowest['serial']:.6f} where each layer reads only the one before, and {values} "
        "(medians) in between: "
        f"{'the measure reads what it must' if sound else 'the measure fails, and the numbers below must not be used'}."
    ]


def _main(frame: pandas.DataFrame) -> pandas.Series:
    """The window to speak of: all layers but the first, else the middle one of ``thirds``, else the last."""
    found, parts = whole(frame), thirds(frame)
    if found is not None:
        return found
    return parts[len(parts) // 2] if parts else frame.iloc[-1]


def _span(row: pandas.Series) -> str:
    return f"{int(row['start'])} to {int(row['stop']) - 1}"


def _length(row: pandas.Series) -> int:
    return int(row["stop"] - row["start"])


def _side(row: pandas.Series) -> str:
    if row["S_low"] > 0.5:
        return "closer to serial"
    if row["S_high"] < 0.5:
        return "closer to parallel"
    return "which of the two it is closer to could not be told"


def _against_null(row: pandas.Series) -> str:
    if row["R_over_N_low"] > 1:
        return "they respond to what the window itself wrote more than a reader without preference would"
    if row["R_over_N_high"] < 1:
        return (
            "they respond to what the window itself wrote less than a reader without preference would, and rather "
            "read what was there before"
        )
    return (
        "the interval includes 1, so S is no more than the size of what was written accounts for, and selective "
        "reading was not shown"
    )


def _same(frame: pandas.DataFrame, window: pandas.Series) -> pandas.Series | None:
    """The row of another frame about the same window, where it has one."""
    found = frame[(frame["start"] == window["start"]) & (frame["stop"] == window["stop"])]
    return found.iloc[0] if len(found) else None


def _against_untrained(row: pandas.Series, untrained: pandas.Series) -> str:
    return (
        f"The same layers with fresh weights read S = {number(untrained, 'S')}, R/N = {number(untrained, 'R_over_N')}: "
        f"training {_change(row, untrained, 'S')} S and {_change(row, untrained, 'R_over_N')} R/N."
    )


def _change(row: pandas.Series, before: pandas.Series, name: str) -> str:
    if row[f"{name}_low"] > before[f"{name}_high"]:
        return "raised"
    return "lowered" if row[f"{name}_high"] < before[f"{name}_low"] else "did not clearly change"


def _order(parts: Sequence[pandas.Series]) -> str:
    top = max(parts, key=lambda part: part["S"])
    bottom = min(parts, key=lambda part: part["S"])
    claims = []
    if all(top["S_low"] > part["S_high"] for part in parts if part is not top):
        claims.append(f"layers {_span(top)} are the most serial")
    if all(bottom["S_high"] < part["S_low"] for part in parts if part is not bottom):
        claims.append(
            f"layers {_span(bottom)} the most parallel" if claims else f"layers {_span(bottom)} are the most parallel"
        )
    return " and ".join(claims) or "the intervals overlap, so which is the most serial could not be told"


def _price(row: pandas.Series) -> str:
    change = f"{number(row, 'loss_parallel_sum')} nats per token"
    if row["loss_parallel_sum_low"] > 0:
        return f"raise the loss by {change}"
    if row["loss_parallel_sum_high"] < 0:
        return f"change the loss by {change}: it falls"
    return f"change the loss by {change}, which includes no change at all"


def _range(values: pandas.Series) -> str:
    low, high = f"{values.min():.3f}", f"{values.max():.3f}"
    return low if low == high else f"{low} to {high}"


def _chance(reverting: pandas.DataFrame, frame: pandas.DataFrame) -> str:
    if len(reverting) > max(1.0, 0.05 * len(frame)):
        return ""
    return f" With {len(frame)} intervals of 95 %, so few would be no surprise where there is none."


def _causal(reverting: pandas.DataFrame) -> str:
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


def _spread(reverting: pandas.DataFrame) -> str:
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
        else " Whether it outweighs what the same updates add could not be told."
    )


def _few(frame: pandas.DataFrame) -> list[str]:
    if "n_prompts" not in frame or frame["n_prompts"].min() >= FEW_PROMPTS:
        return []
    count = int(frame["n_prompts"].min())
    return [
        f"{count} prompt{'s' * (count != 1)} only: intervals from fewer than {FEW_PROMPTS} are too narrow or missing."
    ]


def _without_first(frame: pandas.DataFrame) -> pandas.DataFrame:
    return frame[frame["layer"] >= 1] if len(frame) > 1 else frame
