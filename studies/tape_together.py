"""Does a second pass of the bundled model's layers help it to compose further than it was trained to?

    python studies/tape_together.py --out results/tape_together                   # two to three minutes on 2 cores
    python studies/tape_together.py --out results/tape_together_full --full       # four times the problems: 10 minutes
    python studies/tape_together.py --budget 90s                                  # as many problems as fit

The model was trained on chains of k <= 4 functions. Every span of layers gets a second pass, whole or counting half,
on problems of k = 0 to 7. The one with the most exact answers at k >= 5 is chosen on one half of the problems, and all
claims about it come from the other half, beside its controls: random spans of equal length, damped passes, the stream
only resized, the second pass linearised, more passes, spans composed by a beam. Exact answers count, because likelihood
also rises if a model is merely less sure where it errs: what softer answers alone give is printed beside it.

Writes ``spans_by_k.csv`` (search half), ``winners.csv``, ``controls.csv`` (validation half) and two figures. If killed,
it resumes.
"""

import argparse
from dataclasses import replace
from itertools import combinations

import pandas as pd
from matplotlib.figure import Figure

import surgery
from surgery import disk, scan
from surgery.corpus import probes
from surgery.corpus.probes import ProbeSet
from surgery.page import drawing
from surgery.page.drawing import BLUE, PALE
from surgery.planning import sizes
from surgery.planning.machine import Work
from surgery.planning.sizes import ShapeOf
from surgery.records import tables
from surgery.records.manifest import manifest
from surgery.scan import controls, draw, halving, say, search, worth
from surgery.scan.study import WINNERS_COLUMNS
from surgery.stats import comparisons
from surgery.wiring.families import every_repeat
from surgery.wiring.value import Wiring

FAR = ["k=5", "k=6", "k=7"]  # never trained
METRICS = ("exact", "loglik")
SMALL = 0.05  # a gain in exact answers that would not count as a longer reach

STAGES = ({"count": 16}, {"count": 1280})
PASSES, AFTER = 60, 10.0  # of the model over all problems; seconds that are the same for any number of them


def work(size: dict[str, int], shape_of: ShapeOf) -> Work:
    """All spans on one half of the problems, the search in rounds and by a beam, the winners on the other half."""
    return PASSES * shape_of(5 * (size["count"] // 4) + 3 * size["count"]).forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/tape_together")
    parser.add_argument("--count", type=int, help="problems of each k >= 5; a quarter below")
    parser.add_argument("--full", action="store_true")
    sizes.add_option(parser)
    args = parser.parse_args()

    folder = disk.folder(args.out)
    stack = surgery.Stack(surgery.load("babel"))
    plan = sizes.settle(args, STAGES, work, stack, folder, say=print, after=AFTER)
    n_layers, spans = stack.n_layers, list(every_repeat(stack.n_layers))
    count = args.count or (1280 if args.full else 320)
    problems = probes.babel(count // 4, range(5)).probes + probes.babel(count, range(5, 8)).probes
    halves = ProbeSet("babel", problems).split()
    far_search, far_validation = (
        replace(half, probes=tuple(probe for probe in half.probes if probe.group in FAR)) for half in halves
    )
    on_search, on_validation = (half.encode(stack) for half in halves)
    passes = {
        str(controls.damped(n_layers, start, stop, factor)): (start, stop, factor)
        for factor in (1, 0.5)
        for start, stop in combinations(range(n_layers + 1), 2)
    }

    together = {"cluster": "cluster"}  # problems of one k and pair of languages are drawn together
    searched = scan.run(stack, passes, on_search, folder / "search.csv", metrics=METRICS)
    searched = worth.clustered(searched, on_search)
    by_k = comparisons.table(searched, "exact", by_group=True, **together)
    table = comparisons.table(far(searched), "exact", **together)
    best = table.nlargest(10, "gain")["wiring"].tolist()
    start, stop, factor = passes[best[0]]

    quick = halving.search(stack, spans, far_search)
    whole = far(searched)[far(searched)["wiring"].isin(quick.table["wiring"])]
    recall = halving.recall(quick.table, whole).set_index("looked_at")["recall"]
    promising = [passes[wiring][:2] for wiring in quick.table["wiring"][:12]]
    beam = search.beam(stack, far_search, width=4, depth=2, spans=promising)
    composed = beam[beam["level"] > 1].nlargest(1, "gain").iloc[0]

    random_spans = [wiring.repeated_span() for wiring in controls.random_spans(n_layers, start, stop)]
    rows = [("chosen", best[0])]
    rows += [(f"second pass x {share}", str(controls.damped(n_layers, start, stop, share))) for share in (0.25, 0.5, 1)]
    rows += [(f"{n} passes", str(Wiring.of(n_layers).repeat(start, stop, n))) for n in (3, 4, 5)]
    rows += [("random span", str(controls.damped(n_layers, *span, factor))) for span in random_spans if span]
    rows += [("beam", composed["wiring"]), ("norm-only", "norm-only"), ("linearised", "linearised")]
    listed = pd.DataFrame(rows, columns=["control", "wiring"])
    wirings = [*best, *listed["wiring"][:-2]]
    validated = scan.run(stack, wirings, on_validation, folder / "validation.csv", metrics=METRICS)
    validated = worth.clustered(validated, on_validation)
    winners = comparisons.winners(far(searched), far(validated), "exact", top=10, **together)
    unmodified = validated[validated["wiring"] == best[0]].set_index(["prompt", "metric"])["baseline"]
    streams = worth.by_streams(stack, on_validation, start, stop, METRICS)
    streams["baseline"] = unmodified.loc[pd.MultiIndex.from_frame(streams[["prompt", "metric"]])].to_numpy()
    streams = pd.concat([validated, worth.clustered(streams, on_validation)], ignore_index=True)
    measured = listed.merge(comparisons.table(far(streams), "exact", **together), on="wiring")
    by_loglik = comparisons.table(far(streams), "loglik", **together).set_index("wiring")
    measured["gain_loglik"] = by_loglik.loc[measured["wiring"], "gain"].to_numpy()
    softer = worth.softened(stack, far_search.encode(stack), far_validation.encode(stack), "loglik")[1]
    softened = softer.mean() - far(validated).query("wiring == @best[0] and metric == 'loglik'")["baseline"].mean()

    print_spans(by_k, searched)
    print("\nSecond passes, whole or half, k >= 5:")
    print(say.baseline(worth.baseline(stack, ProbeSet("far", far_search.probes + far_validation.probes), "exact")))
    luck = comparisons.expected_best(far(searched), "exact", **together)
    print("\n".join([*say.search(table, luck, "exact"), *say.validation(winners, "exact")]))
    print_reach(winners.iloc[0], validated)
    shown = measured.assign(**{name: 100 * measured[name] for name in ("gain", "gain_low", "gain_high")})
    columns = ["control", "wiring", "gain", "gain_low", "gain_high", "gain_loglik"]
    print("\nBeside its controls, k >= 5, validation half (gain: percentage points of exact answers; nats for loglik)")
    print(shown[columns].round(2).to_string(index=False))
    print(
        f"\nIn likelihood the winner gains {by_loglik.loc[best[0], 'gain']:+.2f} nats per answer at k >= 5. The logits "
        "of the unmodified model, divided by a temperature chosen on the search half, gain "
        f"{softened:+.2f}, without one more exact answer.\n"
        f"The search in rounds took {quick.effort.share:.0%} of a full scan; of its true ten best it has "
        f"{recall[10]:.0%} among its first 10, {recall[20]:.0%} among 20, {recall[30]:.0%} among 30 (by likelihood).\n"
        f"The beam's best of {len(beam)} wirings, {composed['wiring']}, had claimed {composed['gain']:+.2f} nats per "
        f"answer on the search half and gains {by_loglik.loc[composed['wiring'], 'gain']:+.2f} on the other."
    )

    provenance = manifest(stack, on_validation.tokens, seed=0, note="the tokens of the validation half")
    meaning = {
        **WINNERS_COLUMNS,
        "control": "what stands beside the winner",
        "gain_loglik": "the same in nats per answer",
    }
    for name, frame in (("spans_by_k", by_k), ("winners", winners), ("controls", measured)):
        tables.write(frame, folder / f"{name}.csv", provenance, meaning)
    brain_scan = draw.brain_scan(table, n_layers, unit="share of exact answers, k = 5 to 7")
    disk.save(
        {
            folder / "brain_scan.png": drawing.png(brain_scan),
            folder / "tape_together.png": drawing.png(reach_and_controls(validated, measured, best[0])),
        }
    )
    sizes.tell(plan, print)


def far(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of problems that are longer than any in training."""
    return frame[frame["group"].isin(FAR)]


def print_spans(by_k: pd.DataFrame, searched: pd.DataFrame) -> None:
    print(
        "Which second passes, whole or half, help which k (search half, exact answers, p_max over all of them and k):"
    )
    share = searched[searched["metric"] == "exact"].groupby("group")["baseline"].mean()
    for group, rows in by_k.groupby("group"):
        sure, best = rows[rows["p_max"] < 0.05], rows.nlargest(1, "gain").iloc[0]
        helped = f"the best is {best['wiring']}, {100 * best['gain']:+.1f} points" if best["gain"] > 0 else "none gains"
        print(
            f"  {group}: {share[group]:6.1%} exact as it is; {(sure['gain'] > 0).sum()} of {len(rows)} help and "
            f"{(sure['gain'] < 0).sum()} harm beyond luck; {helped}"
        )


def print_reach(row: pd.Series, validated: pd.DataFrame) -> None:
    low, high = row["gain_low_validation"], row["gain_high_validation"]
    if low > 0:
        word = "extends" if high >= SMALL else "helps a little at the edge, but does not extend"
    else:
        word = "may or may not extend" if high >= SMALL else "does not extend"
    print(
        f"\nA second pass {word} the reach: {row['wiring']}, the best of the search half, gains "
        f"{100 * row['gain_validation']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] percentage points of exact answers "
        f"on {row['n_prompts_validation']} fresh problems of k = 5 to 7, where it had claimed "
        f"{100 * row['gain_search']:+.1f}. (Not extended: the interval excludes {100 * SMALL:.0f} points.)"
    )
    rows = comparisons.table(validated, "exact", by_group=True, cluster="cluster")
    share = validated[validated["metric"] == "exact"].groupby("group")["baseline"].mean()
    for _, own in rows[rows["wiring"] == row["wiring"]].sort_values("group").iterrows():
        ends = ", ".join(f"{100 * own[end]:+.1f}" for end in ("gain_low", "gain_high"))
        print(f"  {own['group']}: {share[own['group']]:6.1%} as it is, {100 * own['gain']:+.1f} [{ends}] points")


def reach_and_controls(validated: pd.DataFrame, measured: pd.DataFrame, winner: str) -> Figure:
    """Left: exact answers by k, the model and more and more passes. Right: the gain at k >= 5 beside its controls."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    lines = [(":", "the model as it is"), (winner, f"chosen: {winner}")]
    more = measured[measured["control"].str.endswith("passes") | (measured["control"] == "second pass x 1")]
    lines += [(row.wiring, row.control) for row in more.itertuples() if row.wiring != winner]
    shares = comparisons.table(validated.assign(baseline=0.0), "exact", by_group=True, cluster="cluster")
    shares = shares.set_index("wiring")
    own = validated[validated["wiring"] == winner]
    clean = own.assign(wiring=":", value=own["baseline"], baseline=0.0)
    clean = comparisons.table(clean, "exact", by_group=True, cluster="cluster")
    shares = pd.concat([shares, clean.set_index("wiring")])
    for place, (wiring, label) in enumerate(lines):
        rows = shares.loc[wiring].sort_values("group")
        k = rows["group"].str.removeprefix("k=").astype(int) + 0.06 * (place - 2)
        ends = [100 * (rows["gain"] - rows["gain_low"]), 100 * (rows["gain_high"] - rows["gain"])]
        style = {"color": draw.PALETTE[place], "marker": draw.MARKERS[place], "markersize": 4.5}
        left.errorbar(k, 100 * rows["gain"], yerr=ends, label=label, linewidth=1.4, elinewidth=1, **style)
    left.axhline(10, color=drawing.FAINT, linewidth=0.8, linestyle=":", label="chance")
    left.axvspan(4.5, 7.4, color=PALE, zorder=0, label="never trained")
    left.set(xlabel="k: functions in the chain", ylabel="exact answers (%)", ylim=(0, 104), xlim=(-0.4, 7.4))
    left.set_title("How far the model composes", loc="left")
    left.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 0.12))
    names = {"chosen": f"chosen: {winner}", "random span": "random spans", "beam": "best of the beam"}
    names |= {name: f"{name} (whole pass)" for name in ("norm-only", "linearised")}
    order = list(dict.fromkeys(measured["control"]))
    for place, control in enumerate(order):
        for row in measured[measured["control"] == control].itertuples():
            ends = [[100 * (row.gain - row.gain_low)], [100 * (row.gain_high - row.gain)]]
            colour = drawing.ACCENT if control == "chosen" else BLUE
            faint = 0.35 if control == "random span" else 1
            right.errorbar([100 * row.gain], [place], xerr=ends, fmt="o", color=colour, markersize=4.5, alpha=faint)
    right.set_yticks(range(len(order)), [names.get(control, control) for control in order])
    right.invert_yaxis()
    right.axvline(0, color=drawing.INK, linewidth=0.8)
    right.set_xlabel("gain at k = 5 to 7 (percentage points of exact answers)")
    right.set_title("The chosen span beside its controls", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", alpha=0.2)
    figure.supxlabel(
        "validation half; lines: 95 % interval over problems; the span was chosen on the other half",
        fontsize=9,
        color=drawing.FAINT,
    )
    return figure


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
