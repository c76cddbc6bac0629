"""What the tables of series say, in sentences, and what they leave open. Pure functions of the frames."""

from collections.abc import Sequence

import pandas as pd

from surgery.page.phrases import few_prompts, number


def whole_window(frame: pd.DataFrame) -> pd.Series | None:
    """Return the window of all layers but the first, if it was measured."""
    rows = frame[(frame["start"] == 1) & (frame["stop"] == frame["stop"].max())]
    return rows.iloc[0] if len(rows) else None


def thirds(frame: pd.DataFrame) -> list[pd.Series]:
    """Return up to three windows of one length: the first from layer 1 on, one in the middle, and the last."""
    n_layers = int(frame["stop"].max())
    length = min(max(2, (n_layers - 1) // 3), int((frame["stop"] - frame["start"]).max()))
    last = n_layers - length
    starts = sorted({start for start in (1, (1 + last) // 2, last) if 1 <= start <= last})
    matches = [frame[(frame["start"] == start) & (frame["stop"] == start + length)] for start in starts]
    return [rows.iloc[0] for rows in matches if len(rows)]


def windows(frame: pd.DataFrame, untrained: pd.DataFrame | None = None) -> list[str]:
    """Summarise ``series_windows``: how serial, against the nulls, where in depth, and at what price in parallel.

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


def limits(frame: pd.DataFrame) -> list[str]:
    """State what ``series_windows`` leaves undecided, and what must not be read into it."""
    main = _main(frame)
    notes = []
    if "layernorm_share" in main and pd.notna(main["layernorm_share"]):
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
    return notes + few_prompts(frame)


def known_networks(networks: pd.DataFrame) -> list[str]:
    """Say whether the measure reads what it must on the constructed networks: 0, rising, 1."""
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


def _main(frame: pd.DataFrame) -> pd.Series:
    """Return the window to speak of: all layers but the first, else the middle one of ``thirds``, else the last."""
    whole, parts = whole_window(frame), thirds(frame)
    if whole is not None:
        return whole
    return parts[len(parts) // 2] if parts else frame.iloc[-1]


def _span(row: pd.Series) -> str:
    return f"{int(row['start'])} to {int(row['stop']) - 1}"


def _length(row: pd.Series) -> int:
    return int(row["stop"] - row["start"])


def _side(row: pd.Series) -> str:
    if row["S_low"] > 0.5:
        return "closer to serial"
    if row["S_high"] < 0.5:
        return "closer to parallel"
    return "which of the two it is closer to is undecided"


def _against_null(row: pd.Series) -> str:
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


def _same(frame: pd.DataFrame, window: pd.Series) -> pd.Series | None:
    """Return the row of another frame about the same window, if it has one."""
    rows = frame[(frame["start"] == window["start"]) & (frame["stop"] == window["stop"])]
    return rows.iloc[0] if len(rows) else None


def _against_untrained(row: pd.Series, untrained: pd.Series) -> str:
    return (
        f"The same layers with fresh weights read S = {number(untrained, 'S')}, R/N = {number(untrained, 'R_over_N')}: "
        f"training {_change(row, untrained, 'S')} S and {_change(row, untrained, 'R_over_N')} R/N."
    )


def _change(row: pd.Series, before: pd.Series, name: str) -> str:
    if row[f"{name}_low"] > before[f"{name}_high"]:
        return "raised"
    return "lowered" if row[f"{name}_high"] < before[f"{name}_low"] else "did not clearly change"


def _order(parts: Sequence[pd.Series]) -> str:
    top = max(parts, key=lambda part: part["S"])
    bottom = min(parts, key=lambda part: part["S"])
    claims = []
    if all(top["S_low"] > part["S_high"] for part in parts if part is not top):
        claims.append(f"layers {_span(top)} are the most serial")
    if all(bottom["S_high"] < part["S_low"] for part in parts if part is not bottom):
        claims.append(
            f"layers {_span(bottom)} the most parallel" if claims else f"layers {_span(bottom)} are the most parallel"
        )
    return " and ".join(claims) or "the intervals overlap, so which is the most serial is undecided"


def _price(row: pd.Series) -> str:
    change = f"{number(row, 'loss_parallel_sum')} nats per token"
    if row["loss_parallel_sum_low"] > 0:
        return f"raise the loss by {change}"
    if row["loss_parallel_sum_high"] < 0:
        return f"change the loss by {change}: it falls"
    return f"change the loss by {change}, which includes no change at all"
