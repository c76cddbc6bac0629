"""Redundancy of models that were trained without dropout, as they are: averages of masks, self-repair, backups.

    python studies/real_dropout.py --out runs/real_dropout     # both pretrained models: half an hour on 2 cores

Additivity A of pairs of layers, MLPs and heads (0: needed together, 1: independent, above 1: one does the work of the
other), self-repair of direct effects, and predictions averaged over dropout masks beside dropout off; of each model and
of the same architecture untrained (``surgery.dropout``). A model that was measured on the same texts before is not
measured again.

    real_redundancy.csv   a row per model and grain
    real_repair.csv       a row per model
    real_masks.csv        a row per model, way and number of masks
    real_dropout.png      the first and the last drawn
"""

import argparse

import pandas as pd
from matplotlib.figure import Figure

import surgery
from surgery import disk, models
from surgery.corpus import everyday
from surgery.dropout import mask_ensemble, redundancy
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.records import tables
from surgery.records.manifest import manifest
from surgery.stats.sampling import Sampling

GRAINS = ("layers", "mlps", "heads")
P = 0.1
NAME = {"model": "which model"}
TABLES = {"redundancy": redundancy.COLUMNS, "repair": redundancy.COLUMNS, "masks": mask_ensemble.COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="by default smollm2, gemma3-270m, babel")
    parser.add_argument("--out", default="runs/real_dropout")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=60, help="pairs of each grain, drawn at random")
    args = parser.parse_args()

    folder = disk.folder(args.out)
    files = {folder / f"real_{name}.csv": columns for name, columns in TABLES.items()}
    frames, about = [pd.DataFrame()] * len(files), {}
    if all(file.exists() for file in files):
        frames, about = [tables.read(file) for file in files], tables.read_manifest(next(iter(files)))["of"]
    for name in args.model or ["smollm2", "gemma3-270m", "babel"]:
        stack = surgery.Stack(surgery.load(name))
        tokens = stack.tokens(everyday.texts(name, args.prompts), args.max_tokens)
        source = manifest(stack, tokens, seed=0, pairs=args.pairs)
        if name in about and all(about[name][part] == source[part] for part in ("model", "tokens", "settings")):
            continue
        new = measured(name, stack, tokens, args.pairs)
        frames, about = [pd.concat(both, ignore_index=True) for both in zip(frames, new)], about | {name: source}
        for frame, (file, columns) in zip(frames, files.items()):
            tables.write(frame, file, {"of": about}, NAME | columns)
    disk.save({folder / "real_dropout.png": drawing.png(draw(frames[0], frames[2]))})


def measured(name: str, stack: surgery.Stack, tokens: Tokens, count: int) -> list[pd.DataFrame]:
    """Pairs, self-repair and averages of masks of one model, as of ``TABLES``."""
    pairs, repairs = [], []
    for label, own in ((name, stack), (f"{name}, untrained", surgery.Stack(models.untrained(stack.model)))):
        for grain in GRAINS if own is stack else GRAINS[:1]:
            row = redundancy.additivity(own, tokens, grain, draws=count)
            pairs.append(row.assign(model=label))
            print(f"{label}, {grain}: {said(row.iloc[0], 'additivity')}", flush=True)
        repairs.append(redundancy.self_repair(own, tokens).assign(model=label))
        print(f"{label}, self-repair of the median layer: {repairs[-1]['self_repair'].median():+.2f}", flush=True)
    few = tokens[: min(len(tokens), 12)]
    curve = mask_ensemble.curve(stack, few, written, P, (1, 4, 16), sampling=Sampling(batch_size=4))
    print(curve[["way", "count", "cross_entropy", "excess", "kl"]].round(3).to_string(index=False), flush=True)
    return [pd.concat(pairs), pd.concat(repairs), curve.assign(model=name)]


def written(hook: str) -> bool:
    """Whether what a hook point carries is written to the stream by a sublayer."""
    return hook.endswith(("mlp.hook_out", "attn.hook_out"))


def said(row: pd.Series, name: str) -> str:
    return f"{row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"


def draw(pairs: pd.DataFrame, masks: pd.DataFrame) -> Figure:
    """Left: additivity by grain. Right: what an average of masks costs beside dropout off."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(pairs["model"]))
    for shift, name in enumerate(names):
        rows = pairs[pairs["model"] == name]
        ends = [rows["additivity"] - rows["additivity_low"], rows["additivity_high"] - rows["additivity"]]
        places = [GRAINS.index(grain) + 0.8 * (shift / len(names) - 0.5) for grain in rows["units"]]
        left.errorbar(places, rows["additivity"], yerr=ends, fmt="o", label=name, markersize=4)
    left.set_xticks(range(len(GRAINS)), GRAINS)
    left.axhline(1, color=drawing.INK, linewidth=0.8, linestyle=":")
    left.set(ylabel="additivity A (1: independent)", title="pairs taken out")
    left.legend(frameon=False, fontsize=8)
    for name, rows in masks[masks["way"] != mask_ensemble.SCALING].groupby("model", sort=False):
        for way, of in rows.groupby("way"):
            right.errorbar(of["count"], of["excess"], fmt="o-" if way == "geometric" else "s--", label=f"{name}, {way}")
    right.set_xscale("log")
    right.set(
        xlabel="masks averaged", ylabel="loss above dropout off (nats a token)", title=f"dropout {P} at test time"
    )
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
