"""The frontier: fewer layers in a row against the loss that this adds, searched on one half, measured on another.

What a search finds is the best of hundreds and looks better than it is. So every division of the frontier is measured
again on texts that took no part in the search, with intervals that hold at once for all that was searched, blocks of
pairs included (``surgery.stats.comparisons.together``): a division *keeps within* an allowance if its whole interval
does, whichever of the frontier one picks. What is right or wrong (``exact``, ``choice``) has exact intervals, which
also allow for answers that go wrong on none of the texts measured: with n questions and k divisions no drop below about
ln(80 k) / n can be shown, .08 of 96 and 30. For a loss no such bound exists: where all of it comes from one text in
fifty, one set of 96 texts in seven shows none of it, and then it is said to be within any allowance.

Beside each division stand its rivals of equal depth (``surgery.compiler.rivals``), chosen on the same texts and
measured on the others: as many layers left out, a contiguous block of pairs, random pairs, and a span replaced by the
best linear map, which was fitted on texts of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import scipy.stats

from surgery import disk
from surgery.compiler import rivals, search
from surgery.corpus.probes import Encoded
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.scan import scanning
from surgery.scan.scores import Scorer
from surgery.stats import comparisons

COLUMNS: dict[str, str] = search.COLUMNS | {
    "sublayers": "attentions and MLPs in a row that are left, two for a layer",
    "saved": "layers in a row fewer than the model has",
    "cost": "loss added on texts that took no part in the search (nats per token, or what the metric counts)",
    "cost_low": "lower end of its 95 % interval over texts, which holds for all that was searched at once, and for all "
    "rows of a rival",
    "cost_high": "upper end of its 95 % interval",
    "n_prompts": "of how many texts",
}
LINEAR = "linear map"
FUSABLE = ("side by side", "both", rivals.BLOCK)  # families whose divisions can be one layer a group
ALLOWANCES = (0.01, 0.05, 0.1)  # nats per token
COUNTS = ("exact", "choice")  # metrics that are 0 or 1


@dataclass(frozen=True)
class Halves:
    """Texts to choose by, texts to measure on, and texts to fit linear maps to: none is in another.

    Attributes: ``metric``, what is lost: ``loss`` of running text, ``loglik``, ``exact`` or ``choice`` of answers.
    """

    chosen_by: Encoded
    measured_on: Encoded
    fitted_to: Tokens | None = None
    metric: str = "loss"


@with_meanings(COLUMNS)
def measure(
    stack: Stack,
    halves: Halves,
    folder: "str | Path | None" = None,
    *,
    families: Sequence[str] = search.FUSED,
    shallowest: int | None = None,
    limit: float = 1.0,
    beam: int = 2,
    screen: int = 6,
    by: str = "kl",
    precision: str = "float32",
) -> pd.DataFrame:
    """Search, find the rivals, and measure all of them on the other half: ``COLUMNS``.

    Args:
        folder: where scans are kept, so that the same call goes on after a kill.
        families: of ``search.FAMILIES``; by default those that can be built, without ``branches``.
        shallowest, limit, beam, screen: as of ``search.divisions``.
        by: the metric to choose by. The divergence from the unmodified model varies less between texts than what is
            lost on them: where a model is nearly always right, a few texts that go wrong decide the loss, and half of
            the texts cannot know which.
        precision: of the search; what is found is measured in float32.

    >>> import surgery
    >>> stack = surgery.Stack(surgery.load("babel"))
    >>> chosen_by, measured_on = surgery.corpus.probes.named("babel", 16).split(0)
    >>> halves = Halves(chosen_by.encode(stack), measured_on.encode(stack), metric="loglik")
    >>> frame = measure(stack, halves, families=["side by side"], shallowest=11)
    >>> frame[frame["family"] == "side by side"]["saved"].tolist()
    [0, 1]
    """

    scans = None if folder is None else disk.folder(Path(folder) / "scans")
    options: dict[str, Any] = {"metric": by, "precision": precision, "known": {}}
    found = [
        search.divisions(
            stack,
            halves.chosen_by,
            family,
            shallowest=shallowest,
            limit=limit,
            beam=beam,
            screen=screen,
            out=scans,
            **options,
        )
        for family in families
    ]
    depths = {depth for frame in found for depth in frame["depth"]} - {stack.n_layers}
    saved = sorted(int(stack.n_layers - depth) for depth in depths if depth == int(depth))
    found.append(rivals.pairs(stack, halves.chosen_by, saved, out=scans, screen=screen, **options))
    frame = pd.concat(found, ignore_index=True)
    wirings = list(dict.fromkeys(frame["wiring"]))
    rows = scanning.run(
        stack, wirings, halves.measured_on, None if scans is None else scans / "measured.csv", metrics=(halves.metric,)
    )
    if halves.fitted_to is not None:
        spans = rivals.best_spans(stack, halves.chosen_by, saved, out=scans, screen=screen, **options)
        replaced = replaced_by_maps(stack, halves, list(spans.values()), rows)
        rows = pd.concat([rows, replaced], ignore_index=True)
        linear = [
            {"family": LINEAR, "depth": stack.n_layers - count, "wiring": _named(span), "cost_search": float("nan")}
            for count, span in spans.items()
        ]
        frame = pd.concat([frame, pd.DataFrame(linear)], ignore_index=True)
    together = frame["family"].where(~frame["family"].isin([*search.FAMILIES, rivals.BLOCK]), "searched")
    measured = [on_fresh(of, rows, halves.metric) for _, of in frame.groupby(together, sort=False)]
    whole = pd.concat(measured, ignore_index=True).assign(n_prompts=rows["prompt"].nunique())
    in_a_row = (2 * whole["depth"]).astype(int)
    return whole.assign(sublayers=in_a_row, saved=stack.n_layers - whole["depth"])[list(COLUMNS)]


def on_fresh(frame: pd.DataFrame, rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows with what they cost on fresh texts, and intervals that hold for all of them at once."""
    own = rows[rows["wiring"].isin(set(frame["wiring"]))]
    gains = counted(own, metric) if metric in COUNTS else comparisons.together(own, metric)
    ends = (("cost", "gain"), ("cost_low", "gain_high"), ("cost_high", "gain_low"))
    cost = {name: 0.0 - gains[end] for name, end in ends}  # of the original 0, not -0
    return frame.merge(pd.DataFrame({"wiring": gains["wiring"]} | cost), on="wiring", how="left")


def counted(rows: pd.DataFrame, metric: str, level: float = 0.95) -> pd.DataFrame:
    """``comparisons.together`` of a metric that is 0 or 1: wiring, gain, gain_low, gain_high, from exact intervals.

    A share of answers is won and another lost; each has its Clopper-Pearson interval (1934), at a level that makes all
    of them hold at once (Bonferroni). A bootstrap has no width where no answer changed, however few there were.
    An answer whose score is not finite counts as lost. The unmodified model gains 0.
    """
    wide = comparisons.differences(rows, metric)
    count, won, lost = wide.notna().sum(), (wide > 0).sum(), (wide < 0).sum()
    changed = wide.columns != ":"
    tail = (1 - level) / 4 / max(1, int(changed.sum()))

    def least(of: pd.Series) -> pd.Series:
        return pd.Series(scipy.stats.beta.ppf(tail, of, count - of + 1), of.index).fillna(0.0)

    def most(of: pd.Series) -> pd.Series:
        return pd.Series(scipy.stats.beta.isf(tail, of + 1, count - of), of.index).fillna(1.0)

    ends = {"gain": (won - lost) / count, "gain_low": least(won) - most(lost), "gain_high": most(won) - least(lost)}
    frame = pd.DataFrame(ends)
    frame.loc[~changed] = 0.0
    return frame.reset_index().assign(wiring=wide.columns.astype(str))[["wiring", *ends]]


def within(frame: pd.DataFrame, allowance: float, family: str = "side by side") -> pd.Series:
    """The shallowest row of a family whose whole interval is below the allowance; the model itself if there is none."""
    kept = frame[((frame["family"] == family) & (frame["cost_high"] <= allowance)) | (frame["saved"] == 0)]
    return kept.sort_values("depth", kind="stable").iloc[0]


def best(frame: pd.DataFrame, allowance: float) -> pd.Series:
    """The shallowest row within the allowance of the families that can be fused."""
    present = [family for family in FUSABLE if (frame["family"] == family).any()]
    return min((within(frame, allowance, family) for family in present), key=lambda row: row["depth"])


def replaced_by_maps(
    stack: Stack, halves: Halves, spans: Sequence[tuple[int, int]], rows: pd.DataFrame
) -> pd.DataFrame:
    """Rows, as of ``scan.run``, of spans replaced by the best linear map."""
    assert halves.fitted_to is not None
    scorer = Scorer(stack, halves.measured_on, (halves.metric,))
    context, parts = scorer.context, []
    baseline = rows.drop_duplicates("prompt").set_index("prompt")["baseline"]
    for start, stop in spans:
        affine = rivals.linear_map(stack, halves.fitted_to, start, stop)
        x = affine(stack.execute(f":{start}", context.x0, context), context)
        if stop < stack.n_layers:
            x = stack.execute(f"{stop}:", x, context)
        parts.append(scorer.rows(_named((start, stop)), x))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(baseline=frame["prompt"].map(baseline))[list(rows.columns)]


def _named(span: tuple[int, int]) -> str:
    return f"a linear map for {span[0]}:{span[1]}"
