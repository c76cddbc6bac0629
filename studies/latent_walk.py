"""Does a walk through the activations that enter the middle help to train a fresh one when real data are scarce?

    python studies/latent_walk.py --out results/latent_walk      # one seed, 1k and 10k tokens, 100 steps: three minutes
    python studies/latent_walk.py --full                         # three seeds, 1k, 10k and 100k, 600 steps: 45 minutes

On the bundled model, layers 4 to 8 of 12. Do walked activations still look like those that the model makes
(``surgery.graft.manifold``)? Then, for every amount of real data, a fresh middle is trained
(``surgery.graft.walk_study``) on

    real            the real pairs alone
    relabelled      half of each batch walked, with the original's x_stop for it
    unrelabelled    half of each batch walked, with x_stop left as it was
    longer          the real pairs alone, for as many more steps as the relabelling cost
    more real       as many more real pairs as could have been harvested for what the relabelling cost

    walk_manifold.csv   distance, neighbours and predictions of walked activations, their controls beside them; .png
    walk_methods.csv    a row per amount of data, method and seed; .png
    report.html         all of it on one page

A hundred steps show that it runs; a middle needs some two hundred to explain anything (``studies/fresh_middle.py``).
If it is killed, the same command goes on where it was. Intervals of a row are over prompts; the sentences compare
methods seed by seed.
"""

import argparse

import surgery
from surgery import disk
from surgery.corpus import splits
from surgery.graft import manifold, say, walk, walk_study
from surgery.graft.grafting import Schedule
from surgery.models.stack import Stack
from surgery.records import manifest

SPAN, MOST = (4, 9), 160_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/latent_walk")
    parser.add_argument("--seeds", type=int, help="1, and 3 with --full")
    parser.add_argument("--steps", type=int, help="100, and 600 with --full")
    parser.add_argument("--batch", type=int, default=32, help="problems a step")
    parser.add_argument("--tokens", type=int, nargs="+", help="real tokens; 1000 10000, and 100000 too with --full")
    parser.add_argument("--kinds", nargs="+", choices=list(walk_study.KINDS), default=["stationary"])
    parser.add_argument("--judged", type=int, default=500, help="held-out problems")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    seeds = args.seeds if args.seeds is not None else (3 if args.full else 1)
    steps = args.steps if args.steps is not None else (600 if args.full else 100)
    amounts = args.tokens or ([1000, 10_000, 100_000] if args.full else [1000, 10_000])
    if min(seeds, steps, args.batch) < 1 or args.judged < 20 or min(amounts) < 600:
        parser.error("--seeds, --steps and --batch are 1 or more, --judged 20 or more, --tokens 600 or more (a batch)")

    folder = disk.folder(args.out)
    stack = Stack(surgery.load("babel"))
    data = splits.babel(MOST // 4, heldout=args.judged)
    harvested = walk_study.harvester(stack, data.corpus, SPAN, folder)

    report = manifold.report(stack, walk.fit(harvested(20_000)), walk_study.SHOWN, data.heldout, SPAN[0])
    kinds = {name: walk_study.KINDS[name] for name in args.kinds}
    settings = {
        "span": SPAN,
        "steps": steps,
        "seeds": seeds,
        "kinds": {name: str(kind) for name, kind in kinds.items()},
    }
    source = manifest.manifest(stack, data.heldout, seed=0, **settings)
    walk_study.write(folder, {walk_study.MANIFOLD: report}, source)

    schedule = Schedule(steps=steps, batch=args.batch, every=max(1, steps // 5))
    options = {
        "amounts": amounts,
        "most": MOST,
        "seeds": range(seeds),
        "schedule": schedule,
        "kinds": kinds,
        "say": print,
    }
    frame = walk_study.run(stack, harvested, data, folder, **options)
    source["settings"]["found"] = sentences = say.walked_activations(report) + say.walks(frame)
    walk_study.write(folder, {walk_study.METHODS: frame}, source)
    surgery.report.build(folder)
    for sentence in sentences:
        print(f"\n{sentence}")


if __name__ == "__main__":
    surgery.cli.script(main)
