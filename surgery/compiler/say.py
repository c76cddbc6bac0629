"""What compiling found, in sentences: what is saved within an allowance, against what, and how much faster that is."""

import math
from collections.abc import Mapping

import pandas as pd

from surgery.compiler import files, frontier
from surgery.compiler.rivals import BLOCK
from surgery.compiler.search import FAMILIES
from surgery.compiler.speed import PLAIN
from surgery.page.phrases import ends, interval

UNITS = {
    "loss": "nats a token",
    "loglik": "nats an answer",
    "exact": "of the right answers",
    "choice": "of the right choices",
    "credit": "of the letters",
    "kl": "nats a token",
}
OWN = "side by side"


def sentences(tables: Mapping[str, pd.DataFrame], allow: float, metric: str, n_layers: int, refused: str) -> list[str]:
    """What the ``tables`` say, by file name; ``allow`` is what the user allows, ``refused`` why the model cannot be
    fused."""
    frame = tables[files.FRONTIER]
    lines = [_allowed(frame, allow, metric, n_layers)]
    others = [_allowance(frame, limit) for limit in frontier.ALLOWANCES if limit != allow]
    lines.append(f"Layers saved within {'; within '.join(others)}." if others else "")
    lines.append(_against(frame))
    lines += _healing(tables[files.HEAL], allow, UNITS[metric]) if files.HEAL in tables else []
    if refused:
        lines.append(f"It cannot be fused, so it runs no faster: {refused}")
    for file, say in ((files.SPEED, _speeds), (files.DRAFT, _drafts)):
        lines += say(tables[file]) if file in tables else []
    return [line for line in lines if line]


def _allowed(frame: pd.DataFrame, allow: float, metric: str, n_layers: int) -> str:
    best = frontier.best(frame, allow)
    unit, n = UNITS[metric], int(frame["n_prompts"].iloc[0])
    if not best["saved"]:
        cheapest = frame[frame["family"].isin(list(FAMILIES)) & (frame["saved"] == 1)].sort_values("cost").iloc[0]
        return (
            f"On {n} fresh texts no wiring is shown to save a layer of {n_layers} for {allow:g} {unit}: the cheapest, "
            f"{cheapest['wiring']}, adds {_cost(cheapest)}."
        )
    how = {"side by side": "side by side", "both": "side by side and left out", BLOCK: "as a block of pairs"}[
        best["family"]
    ]
    return (
        f"On {n} fresh texts {best['saved']:g} of {n_layers} layers in a row are saved for {allow:g} {unit}, {how}: "
        f"{best['wiring']} adds {_cost(best)}."
    )


def _allowance(frame: pd.DataFrame, limit: float) -> str:
    """How many layers each way saves."""
    saved = {family: frontier.within(frame, limit, family)["saved"] for family in _families(frame)}
    return f"{limit:g}: " + ", ".join(f"{count:g} {family}" for family, count in saved.items())


def _against(frame: pd.DataFrame) -> str:
    """The frontier beside its rivals, where it has saved about a sixth of the layers."""
    own = frame[frame["family"] == OWN]
    depth = float(frame["depth"].max())
    if not (own["saved"] > 0).any():
        return ""
    saved = min((count for count in own["saved"] if count), key=lambda count: abs(count - depth / 6))
    rows = frame[frame["saved"] == saved]
    parts = []
    for family, of in rows.groupby("family", sort=False):
        if len(of) > 1:
            parts.append(f"{family} {of['cost'].min():+.3f} to {of['cost'].max():+.3f}")
        else:
            parts.append(f"{family} {_cost(of.iloc[0])}")
    return f"Saving {saved:g} layers adds: {'; '.join(parts)}."


def _healing(healed: pd.DataFrame, allow: float, unit: str) -> list[str]:
    """What healing recovers, at what price, and whether that is within what is allowed."""
    if healed.empty:
        return []
    before, lines = healed.iloc[0], []
    for _, row in healed.iloc[1:].iterrows():
        share = "what is to recover is not clearly above 0"
        if not math.isnan(row["recovered"]):
            share = f"{interval(*ends(row, 'recovered'))} of the loss is recovered"
        lines.append(
            f"Healed by {row['way']} ({int(row['parameters']):,} numbers), it adds {_cost(row)} {unit} where it added "
            f"{_cost(before)}, {'within' if row['cost_high'] <= allow else 'not within'} what is allowed: {share}, for "
            f"{row['operations']:.1e} operations, as many as {row['passes']:,.0f} tokens through the original."
        )
    return lines


def _speeds(speed: pd.DataFrame) -> list[str]:
    lines = []
    for (runs, name), rows in speed.groupby(["runs", "model"], sort=False):
        if name == "original" and runs == PLAIN:
            continue
        parts = [
            f"{row['phase']} at batch {row['batch']} {row['ratio']:.2f} [{row['ratio_low']:.2f}, "
            f"{row['ratio_high']:.2f}]" + (f" (floor {row['floor']:.2f})" if runs == PLAIN else "")
            for _, row in rows.iterrows()
        ]
        how = "" if runs == PLAIN else f" through {runs}"
        lines.append(f"Tokens a second beside the original, {name}{how}: {', '.join(parts)}.")
    return lines


def _drafts(drafts: pd.DataFrame) -> list[str]:
    lines = []
    for _, row in drafts.iterrows():
        predicted = ""
        if not math.isnan(row["agreement_predicted"]):
            low, high = row["agreement_low"], row["agreement_high"]
            predicted = f" (S of its pairs predicted {row['agreement_predicted']:.0%} [{low:.0%}, {high:.0%}])"
        lines.append(
            f"As a draft for the original, with {row['shared']} layers shared, {row['draft']} agrees with it on "
            f"{row['agreement']:.0%} of tokens{predicted}. In blocks of {row['block']} a step of the original keeps "
            f"{row['per_step']:.2f} tokens (expected {row['per_step_expected']:.2f}), so writing is {row['ratio']:.2f} "
            f"times as fast (expected {row['ratio_expected']:.2f}); {row['same']:.0%} of the texts are the original's."
        )
    return lines


def _cost(row: pd.Series) -> str:
    return f"{row['cost']:+.3f} [{row['cost_low']:+.3f}, {row['cost_high']:+.3f}]"


def _families(frame: pd.DataFrame) -> list[str]:
    return [family for family in (*FAMILIES, BLOCK) if (frame["family"] == family).any()]
