"""Does a pretrained model do better if some of its layers run twice, or if one of them is left out?

    python studies/real_repeats.py --model smollm2 --out runs/real_repeats          # an hour on 2 cores

The best repeated spans on four kinds of questions (arithmetic, recall, tracking, running text), searched in rounds with
half of the probes and measured again on the other half, with every control of ``surgery scan``: what they gain in
likelihood, in right answers, and beside a temperature. Then every layer left out, and replaced by the mean of its
neighbours' weights (``surgery.rebuild.averaging``): arXiv 2603.19348 reports that SmolLM2-135M gains by losing layers
14 and 17 in that way, and that layer 11 multiplies its perplexity by 600, from ten sentences. If it is killed, the same
command goes on where it was.

    <probes>/         a folder for each kind, as of ``surgery scan``
    repeats.csv       the ten best of each, and what became of them
    anti_layers.csv   a row per layer and kind of text: loss without it, and with its neighbours' mean
    anti_layers.png   the same drawn
"""

import argparse

import pandas as pd
from matplotlib.figure import Figure

import surgery
from surgery import disk
from surgery.corpus import everyday, probes
from surgery.graft import reinitialise
from surgery.page import drawing
from surgery.rebuild import averaging
from surgery.records import tables
from surgery.records.manifest import manifest
from surgery.scan import study as scan_study
from surgery.stats.sampling import Sampling

SETS = {"arithmetic": "loglik", "recall": "loglik", "tracking": "loglik", "text": "loss"}
CLAIMED = {14: -0.006, 17: -0.006, 11: 6.4}  # arXiv 2603.19348: change of the loss, log of that of perplexity
REPEATS = {"probes": "kind of questions", "baseline": "whether the model does the task"} | scan_study.WINNERS_COLUMNS
ANTI = {"kind": "kind of text"} | reinitialise.COLUMNS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", default="runs/real_repeats")
    parser.add_argument("--count", type=int, default=192, help="questions of each kind, both halves together")
    parser.add_argument("--share", type=float, default=0.15, help="of a full scan")
    parser.add_argument("--prompts", type=int, default=96, help="texts of each kind for the anti-layers, at most 96")
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    args = parser.parse_args()

    folder = disk.folder(args.out)
    stack = surgery.Stack(surgery.load(args.model))
    source = manifest(
        stack, stack.tokens(everyday.texts(args.model, args.prompts), 64), seed=0, count=args.count, share=args.share
    )
    found = []
    for name in args.sets:
        text = probes.text(everyday.texts(args.model, args.count // 2, seed=1), max_tokens=48)
        asked = text if name == "text" else probes.named(name, args.count, seed=7)
        result = scan_study.measure(
            stack, asked, folder / name, metric=SETS[name], share=args.share, precision="bf16", say=print, progress=True
        )
        print("\n".join([f"\n{name}", *result.sentences]), flush=True)
        does = "does it" if result.baseline.done else "not shown to"
        found.append(result.winners.assign(probes=name, baseline=does))
        tables.write(pd.concat(found, ignore_index=True), folder / "repeats.csv", source, REPEATS)

    changed = stack, surgery.Stack(averaging.neighbours(stack.model))
    rows = []
    for kind, texts in everyday.of_each_kind(args.model, args.prompts).items():
        tokens = stack.tokens(texts, 64)
        frame = reinitialise.layers(stack, tokens, initial=changed[1].model, sampling=Sampling(batch_size=16))
        rows.append(frame.assign(kind=kind))
        print("\n".join([f"\n{kind}", *anti_layers(frame)]), flush=True)
    frame = pd.concat(rows, ignore_index=True)
    tables.write(frame, folder / "anti_layers.csv", source, ANTI)
    disk.save({folder / "anti_layers.png": drawing.png(draw(frame))})


def anti_layers(frame: pd.DataFrame) -> list[str]:
    """What replacing and leaving out layers does, in sentences."""
    lines = []
    for name, done in (("damage", "replaced by its neighbours' mean"), ("damage_skip", "left out")):
        gains = frame[frame[f"{name}_high"] < 0]
        named = ", ".join(
            f"{row.layer} ({getattr(row, name):+.3f} [{getattr(row, name + '_low'):+.3f}, "
            f"{getattr(row, name + '_high'):+.3f}])"
            for row in gains.itertuples()
        )
        least = frame.nsmallest(1, name).iloc[0]
        most = frame.nlargest(1, name).iloc[0]
        lowered = f"layers {named} lower" if len(gains) else "no layer lowers"
        lines.append(
            f"{done}: {lowered} the loss; the least damage is that of layer {least['layer']:.0f}, {least[name]:+.3f} "
            f"[{least[f'{name}_low']:+.3f}, {least[f'{name}_high']:+.3f}] nats a token, the most that of layer "
            f"{most['layer']:.0f}, {most[name]:+.2f}"
        )
    by_layer = frame.set_index("layer")
    for layer, claim in CLAIMED.items():
        if layer in by_layer.index:
            row = by_layer.loc[layer]
            lines.append(
                f"layer {layer}, replaced: {row['damage']:+.3f} [{row['damage_low']:+.3f}, {row['damage_high']:+.3f}] "
                f"nats a token; reported: {claim:+.3f}"
            )
    return lines


def draw(frame: pd.DataFrame) -> Figure:
    """The loss without every layer, and with its neighbours' mean in its place."""
    kinds = list(frame.groupby("kind", sort=False))
    figure = Figure(figsize=(11, 3.4 * len(kinds)), layout="constrained")
    for axes, (kind, rows) in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds):
        for shift, (name, label, colour) in enumerate(
            (("damage_skip", "left out", drawing.BLUE), ("damage", "mean of its neighbours", drawing.ACCENT))
        ):
            ends = [rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
            axes.errorbar(rows["layer"] + 0.2 * shift, rows[name], yerr=ends, fmt="o", color=colour, label=label)
        axes.axhline(0, color=drawing.INK, linewidth=0.8)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_title(f"on {kind}", loc="left")
        axes.set(xlabel="layer", ylabel="loss added (nats a token)")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
