"""Make the atlas: what every simple rewiring does to a model, on two kinds of text. ``surgery.atlas`` reads it.

    python studies/atlas.py --model smollm2 --out runs/atlas         # half an hour to an hour on 2 cores
    python studies/atlas.py --model babel --out runs/atlas           # a minute or two
    python studies/atlas.py --model babel-untrained --out runs/atlas

Every span repeated, skipped and run in parallel, every two layers swapped: of the loss on each text; and S of every
window of layers beside the same architecture untrained. Texts are Python's manual and the parallel sentences
(``surgery.corpus.everyday``), or your own with ``--text KIND=FILE``; Babel models are asked their own problems, and
their loss is that of the answers. If it is killed, the same command goes on where it was.
"""

import argparse
import time
from pathlib import Path

import pandas as pd

import surgery
from surgery import atlas, disk, memory, models, series
from surgery.corpus import everyday, probes
from surgery.corpus.probes import Encoded, ProbeSet
from surgery.models.precisions import PRECISIONS
from surgery.records.manifest import manifest
from surgery.series import window
from surgery.stats.sampling import Sampling

UNTRAINED = "-untrained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="babel", help="a folder or name for surgery.load; -untrained: fresh weights")
    parser.add_argument("--out", default="runs/atlas")
    parser.add_argument("--text", action="append", default=[], metavar="KIND=FILE", help="texts of a kind, one a line")
    parser.add_argument("--prompts", type=int, default=24, help="texts of the manual; half as many sentences")
    parser.add_argument("--max-tokens", type=int, default=48, help="where texts are cut")
    parser.add_argument("--longest", type=int, default=12, help="layers in a window")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of repeats, skips and swaps: bf16 takes half the time, and errs by some 0.01 nats; the rest is float32",
    )
    args = parser.parse_args()
    files = dict(option.partition("=")[::2] for option in args.text)
    if not all(files.values()) or args.prompts < 2:
        parser.error("--text is KIND=FILE, and --prompts 2 or more")

    folder, start = disk.folder(args.out), time.monotonic()
    model = surgery.load(args.model.removesuffix(UNTRAINED))
    if args.model.endswith(UNTRAINED):
        model = models.untrained(model)
    stack, name = surgery.Stack(model), Path(args.model).name
    asked = of_each_kind(args.model, files, args.prompts, args.max_tokens)
    exactness = {row.check: row.largest_difference for row in stack.checks().itertuples()}

    items, wirings, windows = [], [], []
    for kind, questions in asked.items():
        encoded = questions.encode(stack)
        for chosen, precision in ((("parallel",), "float32"), (("repeat", "skip", "swap"), args.precision)):
            out = folder / f"{name}_{kind}_{chosen[0]}.csv"
            rows, table = atlas.rewired(stack, encoded, out, chosen, precision=precision, progress=True)
            items.append(rows.assign(kind=kind))
            wirings.append(table.assign(kind=kind))
        windows.append(windows_of(stack, encoded, args.longest).assign(kind=kind))
        print(
            f"{name}, {kind}: {len(rows.item.unique())} texts, {(time.monotonic() - start) / 60:.1f} minutes",
            flush=True,
        )
    source = manifest(
        stack,
        next(iter(asked.values())).encode(stack).tokens,
        seed=0,
        exactness=exactness,
        texts={kind: [len(questions.probes), questions.sha256] for kind, questions in asked.items()},
        max_tokens=args.max_tokens,
        precision=args.precision,
        seconds=round(time.monotonic() - start),
        peak_memory=memory.peak(),
    )
    all_windows = pd.concat(windows, ignore_index=True).dropna(axis=1, how="all")
    meaning = window.COLUMNS | {"kind": atlas.ITEMS["kind"]}
    atlas.write(
        folder, name, *(pd.concat(part, ignore_index=True) for part in (items, wirings)), all_windows, source, meaning
    )
    for family, rows in atlas.read(name, folder=folder).groupby("family"):
        least = rows.nsmallest(1, "loss").iloc[0]
        free = (rows["loss_high"] < 0.01).sum()
        cost = f"{least['loss']:+.3f} nats ({least['wiring']}, {least['kind']})"
        print(f"{family}: the least damage is {cost}; {free} of {len(rows)} cost less than 0.01 nats")


def of_each_kind(model: str, files: dict[str, str], count: int, longest: int) -> dict[str, ProbeSet]:
    """What the model is asked, by kind: of the files, a Babel model's own problems, or what every machine has."""
    if files:
        return {kind: probes.text(file, count, longest) for kind, file in files.items()}
    if model.removesuffix(UNTRAINED) in models.BUNDLED:
        return {"babel": probes.named("babel", 5 * count)}
    texts = {"manual": everyday.manual(count), "sentences": everyday.sentences(max(2, count // 2))}
    return {kind: probes.text(of_kind, max_tokens=longest) for kind, of_kind in texts.items()}


def windows_of(stack: surgery.Stack, asked: Encoded, most: int) -> pd.DataFrame:
    """S of every window of at most ``most`` layers, beside the same architecture untrained."""
    untrained = surgery.Stack(models.untrained(stack.model))
    return series.windows(
        stack,
        asked.tokens,
        min(most, stack.n_layers),
        damage=False,
        untrained=untrained,
        sampling=Sampling(batch_size=16),
    )


if __name__ == "__main__":
    surgery.cli.script(main)
