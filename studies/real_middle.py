"""A fresh middle for a pretrained model: eight layers thrown away and trained anew on stored activations.

    python studies/real_middle.py --model smollm2 --out runs/real_middle       # about an hour on 2 cores, resumable

The activations between the frozen ends are harvested once, from Python's manual (or --text), cut into pieces. At equal
operations, the harvest included: the middle trained on activations (``graft``) and on cross entropy alone; beside what
needs no training (no middle, its mean update, the best linear map), and the graft healed with its junction unfrozen.

The middle begins behind layer 11 of SmolLM2, which writes an activation a hundred times the usual size into the first
token of every text: that is one number to learn, all of the squared error, and 3 nats if it is missed.

Whoever learns from text alone also learns what kind of text it is, and comes out below the original's loss on it. So
every method is judged on text of another kind too, the parallel sentences in eight languages.

    real_elsewhere.csv    a row per method: loss added on the parallel sentences
    real_middle.png       the loss that every method adds, on both kinds of text
    graft_methods.csv, graft_curves.csv, graft_ledger.csv, graft.png, report.html    as of ``surgery graft``
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

import surgery
from surgery import disk, graft, models, report
from surgery.corpus import bundled, everyday, splits
from surgery.graft import say, study
from surgery.graft.grafting import Objective, Schedule
from surgery.models.stack import Stack
from surgery.page import drawing
from surgery.rebuild import layout
from surgery.records import manifest, tables
from surgery.stats.bootstrap import described
from surgery.training.ledger import Ledger

ELSEWHERE = {"method": "how the middle came to be"} | described({"damage": "loss added on other text (nats per token)"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", default="runs/real_middle")
    parser.add_argument("--middle", type=int, nargs=2, default=(12, 20), metavar=("START", "STOP"))
    parser.add_argument("--text", type=Path, help="texts to learn from, one a line; by default Python's manual")
    parser.add_argument("--prompts", type=int, default=4000, help="pieces of text")
    parser.add_argument("--max-tokens", type=int, default=48, help="of a piece")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--heal", type=int, default=40, help="steps of healing")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="bf16 trains in half precision")
    args = parser.parse_args()

    folder, (start, stop) = disk.folder(args.out), args.middle
    stack = Stack(surgery.load(args.model))
    text = args.text or written(folder, args.model, stack, args.max_tokens)
    data = splits.texts(stack, text, None, args.prompts, 96, args.max_tokens)
    pairs = graft.latents(stack, data.corpus, start, stop, folder / "latents", dtype=torch.float16, say=print)
    every = max(1, args.steps // 10)
    schedule = Schedule(steps=args.steps, batch=args.batch, every=every, learning_rate=1e-3, precision=args.precision)
    rows, kind, elsewhere = study.maps(stack, pairs, data), "its own problems", data
    if args.model not in models.BUNDLED:
        kind, sentences = "sentences", stack.tokens(everyday.sentences(96), args.max_tokens)
        elsewhere = replace(data, heldout=sentences, answers=None)
    rows_elsewhere = study.maps(stack, pairs, elsewhere)
    print(pd.DataFrame(rows)[["method", "damage", "unexplained"]].round(3).to_string(index=False), flush=True)

    grafts, budget = {}, None
    for name, objective in (("graft", Objective()), ("cross entropy only", Objective(latent=0, cross_entropy=1))):
        student = layout.build_stack(stack, layout.middle(stack.n_layers, start, stop), 0)
        spent, planned = (pairs.ledger(stack) if name == "graft" else Ledger()), schedule
        if budget is not None:
            step = study.step_operations(
                stack, student, (start, stop), pairs, objective=objective, schedule=schedule, parts="middle"
            )
            steps = max(1, round(budget / step))
            planned = replace(schedule, steps=steps, every=max(1, steps // 10))
        grown = graft.fit(
            stack,
            student,
            (start, stop),
            pairs,
            data.stop,
            folder / name.replace(" ", "_"),
            parts="middle",
            objective=objective,
            schedule=planned,
            spent=spent,
            progress=True,
        )
        budget = budget or grown.ledger.operations(teacher=True)
        grafts[name, 0] = grown
        if name == "graft" and args.heal:
            last = replace(schedule, steps=args.heal, every=args.heal, learning_rate=2.5e-4)
            healed = graft.heal(stack, grown, pairs, data.stop, folder / "healed", schedule=last, progress=True)
            grafts["graft, healed", 0] = healed
        for key in [key for key in grafts if key[0] not in {row["method"] for row in rows}]:
            rows.append(study.row(key[0], 0, grafts[key], study.judge(stack, grafts[key], pairs, data)))
            judged = study.judge(stack, grafts[key], pairs, elsewhere).iloc[0]
            rows_elsewhere.append({"method": key[0]} | {str(name): judged[name] for name in judged.index})
            both = f"{rows[-1]['damage']:+.3f} nats a token, on {kind} {judged['damage']:+.3f}"
            print(f"{key[0]}: {both}", flush=True)
    methods = pd.DataFrame(rows)
    sentences = say.methods(methods, stack.n_layers)
    about = manifest.manifest(stack, data.heldout, seed=0, span=[start, stop], found=sentences, text=text.name)
    study.write(folder, methods, grafts, about)
    there = pd.DataFrame(rows_elsewhere)[["method", "damage", "damage_low", "damage_high"]]
    tables.write(there, folder / "real_elsewhere.csv", about, ELSEWHERE)
    disk.save({folder / "real_middle.png": drawing.png(draw(methods, there, kind))})
    print(f"\non {kind}\n{there.round(3).to_string(index=False)}", flush=True)
    print("\n".join(["", *sentences, f"The page is {report.build(folder)}."]))


def draw(methods: pd.DataFrame, there: pd.DataFrame, kind: str) -> Figure:
    """The loss that every method adds, on text like that which it learnt from and on other text."""
    figure = Figure(figsize=(9, 0.6 * len(methods) + 1.4), layout="constrained")
    axes = figure.subplots()
    for shift, (frame, label, colour) in enumerate(
        ((methods, "text like that which it learnt from", drawing.ACCENT), (there, f"other text: {kind}", drawing.BLUE))
    ):
        ends = [frame["damage"] - frame["damage_low"], frame["damage_high"] - frame["damage"]]
        at = [-row - 0.25 * shift for row in range(len(frame))]
        axes.errorbar(frame["damage"], at, xerr=ends, fmt="o", color=colour, label=label)
    axes.set_yticks([-row - 0.125 for row in range(len(methods))], list(methods["method"]))
    axes.axvline(0, color=drawing.INK, linewidth=0.8)
    axes.set(xlabel="loss added (nats a token)")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def written(folder: Path, model: str, stack: Stack, longest: int) -> Path:
    """Python's manual in a file, in pieces of ``longest`` tokens, in random order; for a Babel model its problems."""
    place = folder / "texts.txt"
    if not place.exists():
        pieces = everyday.pieces(stack.tokenizer, longest) if model not in models.BUNDLED else bundled.prompts(600)
        disk.save({place: "\n".join(pieces).encode()})
    return place


if __name__ == "__main__":
    surgery.cli.script(main, "the same command goes on where it was")
