"""What compiling found, in sentences: what is saved within an allowance, against what, and how much faster that is."""

import pandas as pd

from surgery.compiler import frontier
from surgery.compiler.rivals import BLOCK
from surgery.compiler.search import FAMILIES

UNITS = {
    "loss": "nats a token",
    "loglik": "nats an answer",
    "exact": "of the right answers",
    "choice": "of the right choices",
    "credit": "of the letters",
    "kl": "nats a token",
}
OWN = "side by side"


def sentences(
    frame: pd.DataFrame,
    speed: pd.DataFrame,
    drafts: pd.DataFrame,
    allow: float,
    metric: str,
    n_layers: int,
    refused: str = "",
) -> list[str]:
    """What the tables say; ``allow`` is what the user allows, ``refused`` why the model cannot be fused."""
    lines = [_allowed(frame, allow, metric, n_layers)]
    others = [_allowance(frame, limit, n_layers) for limit in frontier.ALLOWANCES if limit != allow]
    lines.append(f"For {', '.join(others)}." if others else "")
    lines.append(_against(frame))
    if refused:
        lines.append(f"It cannot be fused, so it runs no faster: {refused}")
    lines += _speeds(speed) + _drafts(drafts)
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
        f"On {n} fresh texts {best['saved']} of {n_layers} layers in a row are saved for {allow:g} {unit}, {how}: "
        f"{best['wiring']} adds {_cost(best)}."
    )


def _allowance(frame: pd.DataFrame, limit: float, n_layers: int) -> str:
    """How many layers each way saves."""
    saved = {family: int(frontier.within(frame, limit, family)["saved"]) for family in _families(frame)}
    return f"{limit:g}: " + ", ".join(f"{count} {family}" for family, count in saved.items())


def _against(frame: pd.DataFrame) -> str:
    """The frontier beside its rivals, where it has saved about a sixth of the layers."""
    own = frame[frame["family"] == OWN]
    depth = int(frame["depth"].max())
    if not (own["saved"] > 0).any():
        return ""
    saved = min((int(count) for count in own["saved"] if count), key=lambda count: abs(count - depth / 6))
    rows = frame[frame["saved"] == saved]
    parts = []
    for family, of in rows.groupby("family", sort=False):
        if len(of) > 1:
            parts.append(f"{family} {of['cost'].min():+.3f} to {of['cost'].max():+.3f}")
        else:
            parts.append(f"{family} {_cost(of.iloc[0])}")
    return f"Saving {saved} layers adds: {'; '.join(parts)}."


def _speeds(speed: pd.DataFrame) -> list[str]:
    lines = []
    for name, rows in speed.groupby("model", sort=False):
        if name == "original":
            continue
        parts = [
            f"{row['phase']} at batch {row['batch']} {row['ratio']:.2f} [{row['ratio_low']:.2f}, "
            f"{row['ratio_high']:.2f}] (floor {row['floor']:.2f})"
            for _, row in rows.iterrows()
        ]
        lines.append(f"Tokens a second beside the original, {name}: {', '.join(parts)}.")
    return lines


def _drafts(drafts: pd.DataFrame) -> list[str]:
    return [
        f"As a draft for the original, {row['draft']} agrees with it on {row['agreement']:.0%} of tokens. In blocks of "
        f"{row['block']} a step of the original keeps {row['per_step']:.2f} tokens (predicted "
        f"{row['per_step_expected']:.2f}), so writing is {row['ratio']:.2f} times as fast (predicted "
        f"{row['ratio_expected']:.2f}); {row['same']:.0%} of the texts are the original's."
        for _, row in drafts.iterrows()
    ]


def _cost(row: pd.Series) -> str:
    return f"{row['cost']:+.3f} [{row['cost_low']:+.3f}, {row['cost_high']:+.3f}]"


def _families(frame: pd.DataFrame) -> list[str]:
    return [family for family in (*FAMILIES, BLOCK) if (frame["family"] == family).any()]
