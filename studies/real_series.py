"""Do the layers of a pretrained model work in series or in parallel, and how far back does each of them read?

    python studies/real_series.py --out runs/real_series      # every model of the atlas: ten minutes on 2 cores
    python studies/real_series.py --model smollm2 --model babel

Reads from the atlas (``studies/atlas.py``) S of every window of layers beside untrained layers with updates of the same
size, and what running it in parallel costs; measures the horizon: the loss of the model if each layer hears only the
last k layers (``surgery.series.horizon``), beside as many others, and of the same architecture untrained. Every two
layers in a row are run side by side once more on texts that the atlas has not seen: as whole layers, and with the two
MLPs reading what both attentions left.

    real_series.csv     a row per model, kind of text and window: S, preference, cost in parallel
    real_sublayers.csv  a row per attention and MLP next to each other: S, preference
    real_pairs.csv      a row per model and two layers side by side: what that costs on fresh texts
    real_horizon.csv    a row per model, kind of text, k and choice of the layers heard
    real_series.png     S and the cost of windows over depth, and the horizon
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import surgery
from surgery import atlas, disk, models, scan, series
from surgery.corpus import everyday, probes
from surgery.page import drawing
from surgery.records import tables
from surgery.records.manifest import manifest
from surgery.series import horizon, window
from surgery.stats import comparisons
from surgery.stats.sampling import Sampling

FREE = 0.01  # nats: what may be called free
SHOWN = 3  # layers in the windows that are drawn
PARTS = ("sublayers", "horizon", "pairs")
PAIRS = {
    "model": "which model",
    "form": "layers: both read the same stream; sublayers: both attentions do, then both MLPs",
    "layer": "the first of the two",
    "wiring": "in the notation of surgery.Wiring",
    "loss": "loss added (nats per token; of the bundled model per answer)",
    "loss_low": "lower end of its 95 % interval over texts, which holds for all rows of the model at once",
    "loss_high": "upper end of its 95 % interval",
    "n_prompts": "texts",
}
NAMES = {"model": "which model; untrained: the same architecture with fresh weights", "kind": atlas.ITEMS["kind"]}
COLUMNS = NAMES | window.COLUMNS | {name: atlas.WIRINGS[name] for name in ("loss", "loss_low", "loss_high", "p_max")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/real_series")
    parser.add_argument("--atlas", help="folder of an atlas; by default the bundled one")
    parser.add_argument("--model", action="append", help="of the atlas, by default all but the untrained ones")
    parser.add_argument("--prompts", type=int, default=24, help="texts of each kind for the horizon")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--fresh", type=int, default=128, help="texts to run every two layers side by side on")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    args = parser.parse_args()
    names = args.model or [name for name in atlas.models(args.atlas) if not name.endswith("-untrained")]

    folder, about = disk.folder(args.out), {}
    frames, halves = list[pd.DataFrame](), list[pd.DataFrame]()
    pairs, horizons = list[pd.DataFrame](), list[pd.DataFrame]()
    for name in names:
        frames.append(side_by_side(name, args.atlas).assign(model=name))
        stack = surgery.Stack(surgery.load(name))
        fresh = surgery.Stack(models.untrained(stack.model))
        for kind, texts in everyday.of_each_kind(name, args.prompts).items():
            tokens = stack.tokens(texts, args.max_tokens)
            about[f"{name}, {kind}"] = manifest(stack, tokens, seed=0)
            if "sublayers" in args.parts:
                neighbours = series.windows(
                    stack, tokens, 2, damage=False, grain="sublayer", untrained=fresh, sampling=Sampling(batch_size=12)
                )
                halves.append(neighbours.assign(model=name, kind=kind))
            if "horizon" in args.parts:
                for label, own in ((name, stack), (f"{name} untrained", fresh)):
                    frame = horizon.losses(own, tokens, sampling=Sampling(batch_size=12))
                    horizons.append(frame.assign(model=label, kind=kind))
        print("\n".join(said(frames[-1], pd.concat(horizons) if horizons else None, name)), flush=True)
        if halves:
            print("\n".join(within(pd.concat(halves), name)), flush=True)
        if "pairs" in args.parts:
            of_model = of_two(stack, name, args.fresh, args.max_tokens, folder / f"{name}_pairs.csv")
            pairs.append(of_model.assign(model=name))
            print("\n".join(free(of_model)), flush=True)
    windows = pd.concat(frames, ignore_index=True)
    tables.write(windows[[c for c in COLUMNS if c in windows]], folder / "real_series.csv", {"of": about}, COLUMNS)
    for part, measured, meaning in (
        ("sublayers", halves, NAMES | window.COLUMNS),
        ("pairs", pairs, PAIRS),
        ("horizon", horizons, NAMES | horizon.COLUMNS),
    ):
        if measured:
            frame = pd.concat(measured, ignore_index=True).dropna(axis=1, how="all")
            tables.write(frame, folder / f"real_{part}.csv", {"of": about}, meaning)
    if horizons:
        heard = pd.concat(horizons, ignore_index=True)
        disk.save({folder / "real_series.png": drawing.png(draw(windows, heard, names))})


def side_by_side(name: str, folder: str | None) -> pd.DataFrame:
    """Every window of a model: its S, and what running it in parallel costs."""
    windows, wirings = (atlas.read(name, rows, folder) for rows in ("windows", "wirings"))
    parallel = wirings[wirings["family"] == "parallel"]
    cost = parallel[["kind", "start", "stop", "loss", "loss_low", "loss_high", "p_max"]]
    return windows.merge(cost, on=["kind", "start", "stop"], how="left")


def of_two(stack: surgery.Stack, name: str, count: int, longest: int, out: Path) -> pd.DataFrame:
    """What it costs to run two layers side by side, for all of them but layer 0, on texts that the atlas has not."""
    rows = []
    for a in range(1, stack.n_layers - 1):
        forms = {"layers": f"{{{a} | {a + 1}}}", "sublayers": f"{{{a}.attn | {a + 1}.attn}} {{{a}.mlp | {a + 1}.mlp}}"}
        for form, both in forms.items():
            wiring = stack.wiring(f":{a} {both} {f'{a + 2}:' if a + 2 < stack.n_layers else ''}")
            rows.append({"form": form, "layer": a, "wiring": str(wiring)})
    if name in models.BUNDLED:
        asked, metric = probes.named("babel", count, seed=3), "loglik"
    else:
        asked, metric = probes.text(everyday.texts(name, count, seed=3), max_tokens=longest), "loss"
    scanned = scan.run(stack, [row["wiring"] for row in rows], asked, out, metrics=(metric,), progress=True)
    gains = comparisons.together(scanned, metric)
    cost = {"loss": -gains["gain"], "loss_low": -gains["gain_high"], "loss_high": -gains["gain_low"]}
    costs = pd.DataFrame({"wiring": gains["wiring"], **cost, "n_prompts": scanned["prompt"].nunique()})
    return pd.DataFrame(rows).merge(costs, on="wiring")


def free(pairs: pd.DataFrame) -> list[str]:
    """Which two layers can run side by side, in sentences."""
    lines = [""]
    for form, rows in pairs.groupby("form"):
        cheap = rows[rows["loss_high"] < FREE]
        named = ", ".join(f"{row.layer} and {row.layer + 1} ({row.loss:+.3f})" for row in cheap.itertuples())
        best = rows.loc[rows["loss"].idxmin()]
        lines.append(
            f"two {form} side by side cost less than {FREE} nats, shown on {best['n_prompts']} fresh texts: "
            f"{named or 'none'}; cheapest {best['layer']} and {best['layer'] + 1}, {best['loss']:+.4f} "
            f"[{best['loss_low']:+.4f}, {best['loss_high']:+.4f}]; median {rows['loss'].median():+.3f}"
        )
    return lines


def said(windows: pd.DataFrame, heard: pd.DataFrame | None, name: str) -> list[str]:
    """What was found of one model, in sentences."""
    lines = [f"\n{name}"]
    for kind, rows in windows.groupby("kind"):
        later = rows[rows["start"] > 0]
        three = later[later["stop"] - later["start"] == SHOWN]
        free = later[later["loss_high"] < FREE].sort_values(["stop", "start"])
        longest = (free["stop"] - free["start"]).max() if len(free) else 0
        named = ", ".join(f"{a} to {b - 1}" for a, b in free[["start", "stop"]].to_numpy()[:8])
        more, less = (int((three[end] * sign > 0).sum()) for end, sign in (("S_excess_low", 1), ("S_excess_high", -1)))
        slope = np.polyfit(three["start"], three["S_excess"], 1)[0] * (three["start"].max() - three["start"].min())
        lines.append(
            f"{kind}: windows of {SHOWN} layers have S = {three['S'].min():.2f} to {three['S'].max():.2f}, untrained "
            f"layers with updates of that size {three['S_matched'].mean():.2f} on average; {more} of {len(three)} are "
            f"more serial than those, {less} less; from the first to the last their excess changes by {slope:+.2f}. "
            f"{len(free)} of {len(later)} windows from layer 1 on run in parallel for less than {FREE} nats"
            + (f", the longest of {longest} layers: {named}." if len(free) else ".")
        )
        if heard is None:
            continue
        own = heard[(heard["model"] == name) & (heard["kind"] == kind)]
        last = own[own["heard"] == "last"].set_index("k")
        enough = last[last["loss_high"] < 0.1].index
        other = own[own["heard"] != "last"].groupby(["heard", "k"])["loss"].mean()
        k = int(enough.min()) if len(enough) else int(last.index.max())
        beside = ", ".join(f"{other[h, k]:+.2f} if they hear {k} {h} ones" for h in ("first", "random"))
        ends = f"[{last.loc[k, 'loss_low']:+.3f}, {last.loc[k, 'loss_high']:+.3f}]"
        lines.append(
            f"{kind}: the loss is within 0.1 nats of the whole model's if each layer hears the last {k} of "
            f"{last.index.max()} ({last.loc[k, 'loss']:+.3f} {ends}; {beside})."
        )
    return lines


def within(pairs: pd.DataFrame, name: str) -> list[str]:
    """What neighbouring sublayers do, in sentences."""
    lines = []
    for kind, rows in pairs[(pairs["model"] == name) & (pairs["start"] > 1)].groupby("kind"):
        inside = rows["start"] % 2 == 0
        means = [part[["S", "S_matched"]].mean() for part in (rows[inside], rows[~inside])]
        of = [f"{mean['S']:.2f} (untrained of that size {mean['S_matched']:.2f})" for mean in means]
        lines.append(f"{kind}: S of an attention and its own MLP is {of[0]}, of an MLP and the next attention {of[1]}.")
    return lines


def draw(windows: pd.DataFrame, heard: pd.DataFrame, names: list[str]) -> Figure:
    """A column a model: S of windows over depth, what they cost in parallel, and the horizon."""
    figure = Figure(figsize=(4.4 * len(names), 9), layout="constrained")
    grid = figure.subplots(3, len(names), squeeze=False)
    for column, name in enumerate(names):
        kinds = windows[windows["model"] == name].groupby("kind", sort=False)
        for colour, (kind, rows) in zip((drawing.ACCENT, drawing.BLUE), kinds):
            three = rows[(rows["stop"] - rows["start"] == SHOWN) & (rows["start"] > 0)]
            middle = three["start"] + (SHOWN - 1) / 2
            ends = [three["S"] - three["S_low"], three["S_high"] - three["S"]]
            grid[0, column].errorbar(middle, three["S"], yerr=ends, fmt="o-", color=colour, markersize=3, label=kind)
            grid[0, column].plot(middle, three["S_matched"], ":", color=colour, label=f"{kind}, untrained of that size")
            ends = [three["loss"] - three["loss_low"], three["loss_high"] - three["loss"]]
            grid[1, column].errorbar(middle, three["loss"], yerr=ends, fmt="o-", color=colour, markersize=3)
            own = heard[(heard["model"] == name) & (heard["kind"] == kind)]
            for style, which in zip(("o-", "x--", "s:"), horizon.HEARD):
                curve = own[own["heard"] == which].groupby("k")["loss"].mean()
                label = f"{kind}: the {which} k" if which != "random" else f"{kind}: k at random"
                grid[2, column].plot(curve.index + 1, curve, style, color=colour, markersize=3.5, label=label)
        grid[0, column].set_title(name, loc="left")
        grid[1, column].axhline(FREE, color=drawing.INK, linewidth=0.8, linestyle=":")
        grid[1, column].set_yscale("symlog", linthresh=0.1)
        grid[2, column].set_yscale("symlog", linthresh=0.1)
        grid[2, column].set_xscale("log")
        labels = f"S of windows of {SHOWN} layers", "cost in parallel (nats a token)", "loss added (nats a token)"
        for row, label in enumerate(labels):
            grid[row, column].set_ylabel(label if column == 0 else "")
            grid[row, column].set_xlabel("layer" if row < 2 else "1 + layers heard, k")
            grid[row, column].spines[["top", "right"]].set_visible(False)
        for row in (0, 2):
            grid[row, column].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
