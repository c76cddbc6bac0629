"""Is a wider, narrower, deeper or shallower reasoning block better, at equal tokens and at equal operations?

    python studies/width_of_thought.py --out results/width_of_thought     # one seed, 100 steps: three minutes
    python studies/width_of_thought.py --full                             # three seeds, 1,000 steps: forty minutes
    python studies/width_of_thought.py --budget 10m                       # as many steps and seeds as fit

On the bundled model, layers 4 to 8 of 12 (MLP width 384) are trained anew on the activations between the frozen ends
(``surgery.graft``): with a third of the width and three times it, with three layers and eight. At equal tokens every
size makes the same steps; at equal operations a smaller one makes more.

    width_of_thought.csv   a row per budget, width, depth, seed and k (all problems where k is empty)
    width_of_thought.png   held-out loss over width and over depth
    report.html            all of it on one page

If it is interrupted or killed, the same command goes on where it was. Intervals of a row are over prompts; the
sentences compare sizes seed by seed.
"""

import argparse
from functools import partial

import surgery
from surgery import disk, graft
from surgery.corpus import splits
from surgery.graft import levels, say, size_study
from surgery.graft.grafting import Schedule
from surgery.models.stack import Stack
from surgery.planning import sizes
from surgery.planning.machine import Work
from surgery.planning.sizes import ShapeOf
from surgery.records import manifest

SPAN, WIDTH, DEPTH = (4, 9), 384, 5
STAGES = (
    {"prompts": 2000, "judged": 50, "steps": 10, "seeds": 1},
    {"prompts": 20_000, "judged": 500, "steps": 100},
    {"steps": 1000},
    {"seeds": 3},
)
AFTER = 5.0  # seconds to draw the figure and write the page


def work(size: dict[str, int], shape_of: ShapeOf, cells: list[tuple[int, int]], batch: int) -> Work:
    """The harvest; every size at equal tokens, and as long as the usual one at equal operations; two steps of each."""
    prompt, judged = shape_of(1), 2 * size["judged"]  # by k too
    schedule = Schedule(batch=batch, every=max(1, size["steps"] // 5))

    def trained(width: int, depth: int, steps: int) -> Work:
        return levels.training(prompt, steps, judged, SPAN, depth=depth, d_mlp=width, schedule=schedule)

    tried = sum((trained(width, depth, 2) for width, depth in cells), trained(WIDTH, DEPTH, 2))
    at_tokens = sum((trained(width, depth, size["steps"]) for width, depth in cells), Work())
    at_operations = (len(cells) - 1) * trained(WIDTH, DEPTH, size["steps"])  # the usual size is not trained twice
    return levels.harvest(prompt, size["prompts"], SPAN) + tried + size["seeds"] * (at_tokens + at_operations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/width_of_thought")
    parser.add_argument("--seeds", type=int, help="1, and 3 with --full")
    parser.add_argument("--steps", type=int, help="at the original's size; 100, and 1000 with --full")
    parser.add_argument("--batch", type=int, default=32, help="problems a step")
    parser.add_argument("--widths", type=int, nargs="*", default=[128, 1152], help="beside the original's 384")
    parser.add_argument("--depths", type=int, nargs="*", default=[3, 8], help="beside the original's 5")
    parser.add_argument("--prompts", type=int, default=20_000, help="of the corpus")
    parser.add_argument("--judged", type=int, default=500, help="held-out problems")
    parser.add_argument("--full", action="store_true")
    sizes.add_option(parser)
    args = parser.parse_args()
    given = [number for number in (args.seeds, args.steps, args.batch) if number is not None]
    if min(given) < 1 or args.judged < 10:
        parser.error("--seeds, --steps and --batch are 1 or more, --judged 10 or more: two problems of each k")

    folder = disk.folder(args.out)
    stack = Stack(surgery.load("babel"))
    cells = [
        *((width, DEPTH) for width in {WIDTH, *args.widths}),
        *((WIDTH, depth) for depth in {*args.depths} - {DEPTH}),
    ]
    plan = sizes.settle(
        args, STAGES, partial(work, cells=cells, batch=args.batch), stack, folder, say=print, after=AFTER
    )
    seeds = args.seeds if args.seeds is not None else (3 if args.full else 1)
    steps = args.steps if args.steps is not None else (1000 if args.full else 100)
    data = splits.babel(args.prompts, heldout=args.judged)
    pairs = graft.latents(stack, data.corpus, *SPAN, folder / "latents", say=print)
    schedule = Schedule(steps=steps, batch=args.batch, every=max(1, steps // 5))
    grid = {"widths": sorted({WIDTH, *args.widths}), "depths": sorted({DEPTH, *args.depths})}
    options = {"cross": (WIDTH, DEPTH), "seeds": range(seeds), "schedule": schedule, "parts": splits.by_k(data)}
    frame = size_study.run(stack, pairs, data, folder / "cells", **grid, **options)
    usual = (WIDTH, DEPTH)
    sentences = say.sizes(frame, usual) + say.sizes_by_k(size_study.by_k(frame, usual), usual)
    settings = {"span": SPAN, "steps": steps, "seeds": seeds, "usual": usual, "found": sentences}
    size_study.write(folder, frame, manifest.manifest(stack, data.heldout, seed=0, **settings))
    surgery.report.build(folder)
    for sentence in sentences:
        print(f"\n{sentence}")
    sizes.tell(plan, print)


if __name__ == "__main__":
    surgery.cli.script(main)
