"""Does a walk through the activations that enter the middle help to train a fresh one when real data are scarce?

    python studies/latent_walk.py --out results/latent_walk      # one seed, 1k and 10k tokens, 100 steps: nine minutes
    python studies/latent_walk.py --full                         # three seeds, 1k, 10k and 100k, 600 steps: five hours

On the bundled model, layers 4 to 8 of 12. Are walked activations still such as the model makes (``surgery.manifold``)?
Then, for every amount of real data, a fresh middle is trained (``surgery.graft``) on

    real            the real pairs alone
    relabelled      half of each batch walked, what follows said by the original
    unrelabelled    half of each batch walked, what follows left as it was
    longer          the real pairs alone, for as many steps more as the relabelling cost
    more real       as many real pairs more as could have been harvested for what the relabelling cost

    walk_manifold.csv   distance, neighbours and predictions of walked activations, their controls beside them; .png
    walk_methods.csv    a row per amount of data, method and seed

A hundred steps show that it runs; a middle needs some two hundred to explain anything (``studies/fresh_middle.py``).
The same command goes on where it was killed. Intervals of a row are over prompts; what is said compares methods seed by
seed.
"""

import argparse
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy import stats

import surgery
from surgery import figures, frames, graft, graft_study, layout, manifold, provenance, walk
from surgery.graft import Schedule
from surgery.latents import Latents
from surgery.stack import Stack

SPAN, SHARE, MOST = (4, 9), 0.5, 120_000
KINDS = {"stationary": walk.Stationary(0.9), "tangent": walk.Tangent(0.5)}
SHOWN = {
    "stationary .99": walk.Stationary(0.99),
    "stationary .9": KINDS["stationary"],
    "stationary .5": walk.Stationary(0.5),
    "free .3": walk.Free(0.3),
    "tangent .5": KINDS["tangent"],
    "interpolated": walk.Interpolated(1.0),
}
COLUMNS = graft_study.COLUMNS[graft_study.METHODS] | {"real_tokens": "real tokens that the activations were taken from"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/latent_walk")
    parser.add_argument("--seeds", type=int, help="1, and 3 with --full")
    parser.add_argument("--steps", type=int, help="100, and 600 with --full")
    parser.add_argument("--batch", type=int, default=32, help="problems a step")
    parser.add_argument("--tokens", type=int, nargs="+", help="real tokens; 1000 10000, and 100000 too with --full")
    parser.add_argument("--judged", type=int, default=500, help="held-out problems")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    seeds = args.seeds if args.seeds is not None else (3 if args.full else 1)
    steps = args.steps if args.steps is not None else (600 if args.full else 100)
    amounts = args.tokens or ([1000, 10_000, 100_000] if args.full else [1000, 10_000])
    if min(seeds, steps, args.batch) < 1 or args.judged < 20 or min(amounts) < 600:
        parser.error("--seeds, --steps and --batch are 1 or more, --judged 20 or more, --tokens 600 or more (a batch)")
    torch.set_num_threads(args.threads)

    folder = frames.folder(args.out)
    stack = Stack(surgery.load("babel"))
    data = graft_study.babel(MOST // 4, heldout=args.judged)
    lengths = data.corpus.mask.sum(1).cumsum(0)

    def harvested(tokens: int) -> Latents:
        count = int((lengths <= tokens).sum())
        return graft.latents(stack, data.corpus[:count], *SPAN, folder / f"latents_{count}", dtype=torch.float32)

    report = manifold.report(stack, walk.fit(harvested(20_000)), SHOWN, data.heldout, SPAN[0])
    kinds = {name: str(kind) for name, kind in KINDS.items()}
    manifest = provenance.manifest(stack, data.heldout, seed=0, span=SPAN, steps=steps, seeds=seeds, kinds=kinds)
    frames.write(report, folder / "walk_manifold.csv", manifest, manifold.COLUMNS)
    frames.save({folder / "walk_manifold.png": figures.png(manifold.figure(report))})

    rows = []
    for seed in range(seeds):
        for amount in amounts:
            schedule = Schedule(steps=steps, batch=args.batch, every=max(1, steps // 5), seed=seed)
            for name, pairs, planned in methods(stack, harvested, amount, schedule):
                student = layout.build(stack.model, layout.middle(stack.n_layers, *SPAN), seed)
                where = folder / f"{name.replace(',', '').replace(' ', '_')}_{amount}_{seed}"
                done = graft.fit(stack, student, SPAN, pairs, data.heldout, where, schedule=planned,
                                 answers=data.answers, weigh=data.weigh)  # fmt: skip
                found = graft_study.row(name, seed, done, graft_study.judge(stack, done, pairs, data))
                rows.append(found | {"real_tokens": float(amount)})
                print(f"{amount} tokens, seed {seed}, {name}: {found['damage']:+.3f} nats a token, unexplained "
                      f"{found['unexplained']:.3f}")  # fmt: skip
    frame = pd.DataFrame(rows)
    manifest["settings"]["found"] = said = compared(frame)
    frames.write(frame, folder / "walk_methods.csv", manifest, COLUMNS)
    for sentence in said:
        print(f"\n{sentence}")


def methods(stack: Stack, harvested, amount: int, schedule: Schedule):
    """Name, pairs and schedule of every method for so many real tokens."""
    real = harvested(amount)
    found, copies = walk.fit(real), max(1, -(-schedule.steps * schedule.batch // real.n_prompts))
    options = {"share": SHARE, "copies": copies, "seed": schedule.seed}
    relabelled = {name: walk.relabelled(real, stack, found, kind, **options) for name, kind in KINDS.items()}
    harvest = real.ledger(stack).operations(teacher=True)
    paid = relabelled["tangent"].ledger(stack, schedule).operations(teacher=True) - harvest  # the same for every kind
    more = min(MOST, real.n_tokens + round(paid * real.n_tokens / harvest))
    trial = layout.build(stack.model, layout.middle(stack.n_layers, *SPAN), schedule.seed)
    tokens = real.batch(range(min(16, real.n_prompts))).tokens
    each = graft_study.step_operations(
        stack, trial, SPAN, real, graft_study.Data(tokens, tokens), objective=graft.Objective(), schedule=schedule
    )
    yield "real", real, schedule
    for name, kind in KINDS.items():
        yield f"{name}, relabelled", relabelled[name], schedule
        yield f"{name}, unrelabelled", walk.unrelabelled(real, found, kind, **options), schedule
    yield "longer", real, replace(schedule, steps=schedule.steps + round(paid / each))
    yield "more real", harvested(more), schedule


def compared(frame: pd.DataFrame) -> list[str]:
    """Every method against the real pairs alone, seed by seed."""
    said = []
    for amount, part in frame.groupby("real_tokens"):
        missed = part.pivot(index="seed", columns="method", values="unexplained")
        for name in (name for name in missed if name != "real"):
            gain = missed["real"] - missed[name]
            text, word = f"{gain.mean():+.3f}", "one seed tells nothing"
            if len(gain) > 1:
                half = stats.t.ppf(0.975, len(gain) - 1) * gain.std() / np.sqrt(len(gain))
                text += f" [{gain.mean() - half:+.3f}, {gain.mean() + half:+.3f}]"
                word = "helps" if gain.mean() > half else "harms" if gain.mean() < -half else "undecided"
            said.append(f"{amount:.0f} real tokens, {name}: {text} of the update's variance more explained; {word}.")
    return said


if __name__ == "__main__":
    surgery.cli.script(main)
