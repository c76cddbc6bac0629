"""What the tables of series say, in sentences, and what they leave open. Pure functions of the frames.

Each sentence is a rule, with the least effect that it calls one, its correction, and what it says instead:

===============  ===========================================  ===================================  =====================
sentence         claims that                                  only if                              else
===============  ===========================================  ===================================  =====================
``dependence``   a window is closer to serial, or to          S differs by ``LEAST_S``             "as serial as they",
                 parallel, than untrained layers with                                              "undecided", or why
                 updates of the same size                                                          nothing can be told
``preference``   its layers respond more, or less, to what    the ratio differs from 1 by          the same
                 it wrote than to the same turned at random   ``LEAST_PREFERENCE``
``ranking``      a window is the most serial, or parallel     clear of all windows of its length   how many are not
                                                              by ``LEAST_S``                       told apart
``price``        running it in parallel costs or gains        ``LEAST_NATS``                       "no difference that
                                                                                                   matters", "undecided"
===============  ===========================================  ===================================  =====================

The first two are corrected for each other (Holm). They answer different questions and may go different ways: a layer
that attends to few directions depends little on others, and may yet prefer what they wrote among all it might read.
"""

import pandas as pd

from surgery.page.phrases import claims, few_prompts, number, withheld
from surgery.stats.claims import ABOVE, BELOW, UNDECIDED, WITHIN, Effect, largest, sides

LEAST_S = 0.05
LEAST_PREFERENCE = 0.1  # of preference - 1: random networks read up to .09 in some windows
LEAST_NATS = 0.01


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


def windows(frame: pd.DataFrame) -> list[str]:
    """Summarise ``series_windows``: how serial, against the nulls, where in depth, and at what price in parallel."""
    row = main(frame)
    sentences = [dependence(row)]
    if "preference" in row and not withheld(row, "S"):
        sentences.append(preference(row))
    peers = _peers(frame)
    if len(peers) > 1:
        sentences.append(ranking(peers))
    if "loss_parallel_sum" in row:
        sentences.append(price(row))
    return sentences


def sides_of(row: pd.Series) -> dict[str, str]:
    """Return on which side of its nulls a window lies: ``S`` of the matched sizes, ``preference`` of the rotation.

    ``above``, ``below``, ``within`` the least effect, or ``undecided``, corrected for each other; without the columns
    of a null it has no entry, and all are undecided where nothing may be claimed.
    """
    effects, least = {}, {}
    if "S_excess" in row:
        effects["S"], least["S"] = Effect.of_row(row, "S_excess"), LEAST_S
    if "preference" in row:
        ratio = Effect.of_row(row, "preference")
        effects["preference"] = Effect(ratio.value - 1, ratio.low - 1, ratio.high - 1)
        least["preference"] = LEAST_PREFERENCE
    if withheld(row, "S"):
        return dict.fromkeys(effects, UNDECIDED)
    return dict(zip(effects, sides(list(effects.values()), list(least.values())), strict=True))


def dependence(row: pd.Series) -> str:
    """Say how much the layers of a window depend on one another, beside untrained ones with updates of their size."""
    opening = f"Layers {span(row)} together read S = {number(row, 'S')}, from 0 (parallel) to 1 (serial)"
    if reason := withheld(row, "S"):
        undefined = "no layer after the first writes anything that varies"
        return f"{opening}; nothing is claimed: {undefined if pd.isna(row['S']) else reason}."
    found = sides_of(row)
    if "S" not in found:
        return f"{opening}; S grows with the size of updates, and untrained layers were not measured beside it."
    verdict = {
        ABOVE: "closer to serial than these",
        BELOW: "closer to parallel than these",
        WITHIN: f"as serial as these, within {LEAST_S}",
        UNDECIDED: "whether they differ is undecided",
    }[found["S"]]
    return (
        f"{opening}, where untrained layers with updates of the same size read {number(row, 'S_matched')}: {verdict}."
    )


def preference(row: pd.Series) -> str:
    """Say whether the layers of a window prefer what it wrote to what was there before."""
    found = sides_of(row)
    verdict = {
        ABOVE: "they prefer what the window wrote",
        BELOW: "they prefer what was there before",
        WITHIN: f"they prefer neither, within {LEAST_PREFERENCE:.0%}",
        UNDECIDED: "whether they prefer it is undecided",
    }[found["preference"]]
    apart = found.get("S") == ABOVE != found["preference"]
    return (
        f"{'To depend on a window is not to prefer it: what' if apart else 'What'} the window wrote moves them "
        f"{number(row, 'preference')} times as much as the same turned at random: {verdict}."
    )


def ranking(peers: pd.DataFrame) -> str:
    """Say which of all windows of one length is the most serial and which the most parallel, if any is."""
    length, count = int(peers.iloc[0]["stop"] - peers.iloc[0]["start"]), len(peers)
    shown = "; ".join(f"{number(part, 'S')} in {span(part)}" for part in thirds(peers))
    opening = f"Windows of {length} layers read S = {shown}. Of all {count} of them from layer 1 on, "
    effects = {span(row): Effect.of_row(row, "S") for _, row in peers.iterrows()}
    if any(withheld(row, "S") for _, row in peers.iterrows()):
        return (
            opening
            + "which is the most serial cannot be told: some are undefined, have no interval, or rest on one token."
        )
    claimed = []
    for most, signed in (
        ("serial", effects),
        ("parallel", {span: Effect(-e.value, -e.high, -e.low) for span, e in effects.items()}),
    ):
        among = [span for span in signed if signed[span].high >= max(e.low for e in signed.values()) - LEAST_S]
        top = largest(signed)[0]
        claimed.append(
            f"{top} is the most {most} ({effects[top].value:.2f})"
            if among == [top]
            else f"{len(among)} may be the most {most}"
        )
    return opening + " and ".join(claimed) + "."


def price(row: pd.Series) -> str:
    """Say what running a window in parallel does to the loss."""
    change = f"{number(row, 'loss_parallel_sum', signed=True)} nats per token"
    opening = f"Run in parallel (updates summed), layers {span(row)} change the loss by {change}"
    if reason := withheld(row, "loss_parallel_sum"):
        return f"{opening}; nothing is claimed: {reason}."
    effect = Effect.of_row(row, "loss_parallel_sum")
    return f"{opening}: {claims([effect], LEAST_NATS, '0.01 nats', 'it rises', 'it falls')[0]}."


def priced(row: pd.Series) -> str:
    """Whether a window can run in parallel at no loss: yes, no or undecided."""
    if withheld(row, "loss_parallel_sum"):
        return UNDECIDED
    side = sides([Effect.of_row(row, "loss_parallel_sum")], [LEAST_NATS])[0]
    return {ABOVE: "no", UNDECIDED: UNDECIDED}.get(side, "yes")


def limits(frame: pd.DataFrame) -> list[str]:
    """State what ``series_windows`` leaves undecided, and what must not be read into it."""
    row = main(frame)
    notes = []
    if "layernorm_share" in row and pd.notna(row["layernorm_share"]):
        notes.append(
            f"With the normalisation live, layers {span(row)} read S = {number(row, 'S_live')}; the difference of "
            f"{row['layernorm_share']:+.2f} is rescaling by the normalisation, not reading, and is not counted above."
        )
    first, later = frame[frame["start"] == 0], frame[frame["start"] > 0]
    if later.empty:
        notes.append("Every window starts at layer 0, with the bare embedding, beside which any update is large.")
    elif len(first):
        numbers = first[[not withheld(row, "S") for _, row in first.iterrows()]]
        read = ", ".join(
            f"{name} = {numbers[name].min():.2f} to {numbers[name].max():.2f}"
            for name in ("S", "N")
            if name in first and numbers[name].notna().any()
        )
        notes.append(
            f"Windows that start at layer 0{f' ({read})' if read else ''} are left out of these sentences: the "
            "stream that enters them is the bare embedding, often so short that any first update is large beside it."
        )
    if "preference" in frame and len(later):
        found = pd.DataFrame([sides_of(row) for _, row in later.iterrows()])
        unclear = " and ".join(
            f"{int((found[name] == UNDECIDED).sum())} {words}"
            for name, words in (("S", "in S"), ("preference", "in preference"))
            if name in found
        )
        notes.append(
            f"Of {_windows(len(later))} from layer 1 on, each judged by itself, it is undecided whether they differ "
            f"from their nulls: {unclear}."
        )
    if ((frame["stop"] - frame["start"]) == 2).any():
        notes.append("In windows of two layers one layer follows another, so R = O and S is one number, not two.")
    if "token_share" in frame and frame["token_share"].notna().any():
        notes.append(
            f"{int(frame['n_massive'].max())} tokens of massive activations were left out. Of those measured, one "
            f"token holds up to {frame['token_share'].max():.0%} of a variance, and one dimension up to "
            f"{frame['dimension_share'].max():.0%}."
        )
    undefined = int(frame["S"].isna().sum())
    if undefined:
        notes.append(
            f"S is undefined in {_windows(undefined)}, where no layer after the first writes anything that varies."
        )
    return notes + few_prompts(frame)


def known_networks(networks: pd.DataFrame) -> list[str]:
    """Say whether the measure reads what it must on the constructed networks: 0, rising, 1."""
    S = networks.groupby("network", sort=False)["S"]
    lowest, middle, highest = S.min(), S.median(), S.max()
    mixed = [name for name in middle.index if name.startswith("mixed")]
    values = ", ".join(f"{middle[name]:.2f}" for name in mixed)
    return [
        f"On networks built so that the answer is known, S reads at most {highest['parallel']:.6f} where no layer "
        f"reads another, at least {lowest['serial']:.6f} where each layer reads only the one before, and {values} "
        "(medians) in between: "
        + ("the measure reads what it must." if sound(networks) else "the measure fails: do not use the numbers below.")
    ]


def sound(networks: pd.DataFrame) -> bool:
    """Whether S is 0 on the parallel network, 1 on the serial one, and rises in between."""
    S = networks.groupby("network", sort=False)["S"]
    middle = S.median()
    mixed = list(middle[[name for name in middle.index if name.startswith("mixed")]])
    return bool(S.max()["parallel"] < 1e-5 and S.min()["serial"] > 1 - 1e-5 and mixed == sorted(set(mixed)))


def main(frame: pd.DataFrame) -> pd.Series:
    """Return the window to speak of: all layers but the first, else the middle one of ``thirds``, else the last."""
    whole, parts = whole_window(frame), thirds(frame)
    if whole is not None:
        return whole
    return parts[len(parts) // 2] if parts else frame.iloc[-1]


def _peers(frame: pd.DataFrame) -> pd.DataFrame:
    """Return all windows of the length of ``thirds`` from layer 1 on."""
    parts = thirds(frame)
    if not parts:
        return frame.iloc[:0]
    length = parts[0]["stop"] - parts[0]["start"]
    return frame[(frame["stop"] - frame["start"] == length) & (frame["start"] > 0)]


def _windows(count: int) -> str:
    return f"{count} window{'s' * (count != 1)}"


def span(row: pd.Series) -> str:
    return f"{int(row['start'])} to {int(row['stop']) - 1}"
