"""Does a walk through the activations that enter the middle help to train a fresh one when real data are scarce?

    python studies/latent_walk.py --out results/latent_walk      # one seed, 1k and 10k tokens, 100 steps: three minutes
    python studies/latent_walk.py --full                         # three seeds, 1k, 10k and 100k, 600 steps: 45 minutes
    python studies/latent_walk.py --budget 10m                   # as many steps, amounts of data and seeds as fit

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
from collections.abc import Sequence
from functools import partial

import surgery
from surgery import disk
from surgery.corpus import splits
from surgery.graft import levels, manifold, say, walk, walk_study
from surgery.graft.grafting import Schedule
from surgery.models.stack import Stack
from surgery.planning import sizes
from surgery.planning.machine import Work
from surgery.planning.sizes import ShapeOf
from surgery.records import manifest

SPAN, MOST = (4, 9), 160_000
AMOUNTS, FITTED = (1000, 10_000, 100_000), 20_000  # real tokens to train on, and those that the walks are fitted to
STAGES = (
    {"judged": 50, "steps": 20, "seeds": 1, "amounts": 1},
    {"judged": 500, "steps": 100, "amounts": 2},
    {"steps": 600, "amounts": 3},
    {"seeds": 3},
)
AFTER = 10.0  # seconds to draw the figures and write the page


def work(size: dict[str, int], shape_of: ShapeOf, amounts: Sequence[int], kinds: Sequence[str], batch: int) -> Work:
    """The harvests, the walks looked at, and a training by every method for each amount and seed."""
    prompt, judged, steps = shape_of(1), shape_of(size["judged"]), size["steps"]
    schedule, asked = Schedule(batch=batch, every=max(1, steps // 5)), amounts[: size["amounts"]]
    usual = levels.training(prompt, steps, size["judged"], SPAN, schedule=schedule)
    longer = levels.training(prompt, round(1.2 * steps), size["judged"], SPAN, schedule=schedule)
    walked = 0.5 * steps * batch * (SPAN[1] - SPAN[0]) / prompt.n_layers * prompt.forward
    of_amount = (2 + len(kinds) + ("stationary" in kinds)) * usual + longer + len(kinds) * walked
    tokens = FITTED + sum(asked) + size["seeds"] * sum(min(MOST, amount + 6 * steps * batch) for amount in asked)
    looked_at = (len(walk_study.SHOWN) + 1) * (judged.forward + judged.readout)
    tried = Work(forward=levels.OPENED * prompt.n_layers)
    return (
        levels.harvest(prompt, round(tokens / prompt.tokens), SPAN)
        + looked_at
        + size["seeds"] * len(asked) * (of_amount + tried)
    )


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
    sizes.add_option(parser)
    args = parser.parse_args()
    given = [number for number in (args.seeds, args.steps, args.batch) if number is not None]
    amounts = args.tokens or list(AMOUNTS)
    if min(given) < 1 or args.judged < 20 or min(amounts) < 600:
        parser.error("--seeds, --steps and --batch are 1 or more, --judged 20 or more, --tokens 600 or more (a batch)")

    folder = disk.folder(args.out)
    stack = Stack(surgery.load("babel"))
    args.amounts = len(args.tokens) if args.tokens else None
    cost = partial(work, amounts=amounts, kinds=args.kinds, batch=args.batch)
    plan = sizes.settle(args, STAGES, cost, stack, folder, say=print, after=AFTER)
    seeds = args.seeds if args.seeds is not None else (3 if args.full else 1)
    steps = args.steps if args.steps is not None else (600 if args.full else 100)
    amounts = amounts[: args.amounts if args.amounts is not None else (3 if args.full else 2)]
    data = splits.babel(MOST // 4, heldout=args.judged)
    harvested = walk_study.harvester(stack, data.corpus, SPAN, folder)

    report = manifold.report(stack, walk.fit(harvested(FITTED)), walk_study.SHOWN, data.heldout, SPAN[0])
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
    sizes.tell(plan, print)


if __name__ == "__main__":
    surgery.cli.script(main)
