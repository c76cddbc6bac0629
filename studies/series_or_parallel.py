"""Do layers work in series because a problem has several steps, or would they do so anyway?

    python studies/series_or_parallel.py --out results/series_or_parallel          # half a minute on 2 cores
    python studies/series_or_parallel.py --budget 20s                              # as many problems as fit

S and R/R rotated of every window of three layers, on problems with k = 0 (pure translation) to 4 (four functions in a
row), for the bundled model, the same architecture untrained, and a twin of the same size trained on translation alone.
Two questions: does S grow with k (its slope, with an interval over prompts), and is it larger in the middle, layers 4
to 8, than before and after it? (``surgery.anatomy`` divides the bundled model before layers 4 and 9.) Writes
``series_by_k.csv`` (a row per model, k and window) and ``slopes.csv``. R/R rotated above 1 is response to what the
window itself wrote, beyond the same turned at random; S also grows with the size of updates. Copy this file and put in
your own model and prompts.
"""

import argparse

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import surgery
from surgery import disk, models
from surgery.anatomy import ends_against_middle
from surgery.corpus.babel import Babel
from surgery.page import phrases
from surgery.planning import sizes
from surgery.planning.machine import Work
from surgery.planning.sizes import ShapeOf
from surgery.records import manifest, tables
from surgery.series import window
from surgery.stats.bootstrap import columns, interval, measure_columns
from surgery.stats.sampling import Sampling

STEPS = range(5)
PARTS = {"before layer 4": (1, 4), "4 to 8": (4, 9), "from 9 on": (9, 12)}  # windows that lie wholly in them
STAGES = ({"prompts": 16}, {"prompts": 128})
PASSES, AFTER = 4.5, 7.0  # of a model over its problems; seconds that are the same for any number of them
SLOPES = {
    "model": "which model",
    "windows": "first layers of the windows averaged",
    "measure": "S or R_over_rotated",
} | {
    f"slope{end}": f"change of the measure with each step more, k = 0 to 4{what}"
    for end, what in {"": "", "_low": ": lower end of its 95 % interval", "_high": ": upper end"}.items()
}


def work(size: dict[str, int], shape_of: ShapeOf) -> Work:
    return 3 * len(STEPS) * PASSES * shape_of(size["prompts"]).forward


def slope(values: Float[Tensor, "k resample"]) -> Float[Tensor, " resample"]:
    """Return the least-squares slope on k in every resample of the prompts."""
    k = torch.arange(len(values)).double() - (len(values) - 1) / 2
    return k @ values / k.square().sum()


def number(values: Float[Tensor, " resample"]) -> str:
    """Write an estimate with its interval."""
    return phrases.interval(*interval(values), digits=3, signed=True)


def direction(values: Float[Tensor, " resample"], more: str, less: str) -> str:
    """Choose ``more`` or ``less``, if the interval excludes 0."""
    _, low, high = interval(values)
    return more if low > 0 else less if high < 0 else f"neither {more} nor {less} clearly"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/series_or_parallel")
    parser.add_argument("--prompts", type=int, default=128, help="problems of each k")
    parser.add_argument("--length", type=int, default=3, choices=(2, 3), help="layers in a window")
    sizes.add_option(parser)
    args = parser.parse_args()

    folder, corpus, bundled = disk.folder(args.out), Babel(), surgery.load("babel")
    opened = {
        "babel": bundled,
        "untrained": models.untrained(bundled),
        "translation": surgery.load("babel-translation"),
    }
    stacks = {name: surgery.Stack(model) for name, model in opened.items()}
    plan = sizes.settle(args, STAGES, work, stacks["babel"], folder, say=print, after=AFTER)
    rows: list[dict] = []
    slopes: list[dict] = []
    growth: dict[str, Tensor] = {}
    for name, stack in stacks.items():
        profiles = []
        for k in STEPS:
            problems = corpus.sample(k, args.prompts, seed=0)
            tokens = stack.tokens([" ".join(corpus.words(problem)[1:]) for problem in problems])
            sampling = Sampling(seed=k)  # so that the prompts of two k are resampled independently
            profiles.append(ends_against_middle.measure(stack, tokens, args.length, sampling=sampling))
        measured = {
            measure: torch.stack([getattr(profile, measure).T for profile in profiles])
            for measure in ("S", "R_over_rotated")
        }
        for k in STEPS:
            for start in range(measured["S"].shape[1]):
                row = {"model": name, "k": k, "start": start, "stop": start + args.length, "n_prompts": args.prompts}
                rows.append(row | measure_columns({measure: values[k, start] for measure, values in measured.items()}))
        S = measured["S"]
        within = {part: list(range(low, high - args.length + 1)) for part, (low, high) in PARTS.items()}
        print(f"\n== {name}\nS of the windows of {args.length} layers that begin at layer ..., by k")
        print(pd.DataFrame(S[:, :, 0].T.numpy()).loc[1:].round(2).to_string())
        own = {start: slope(S[:, start]) for start in range(1, S.shape[1])}
        up, down = (
            [start for start, values in own.items() if direction(values, "up", "down") == way] for way in ("up", "down")
        )
        print(
            f"From k = 0 to k = 4, S rises clearly in the windows that begin at {up or 'no layer'}, falls clearly in "
            f"those at {down or 'no layer'}; in the others the 95 % interval of the slope contains 0."
        )
        parts = {str(start): [start] for start in own} | within | {"all": list(own)}
        for measure, values in measured.items():
            for part, starts in parts.items():
                change = slope(values[:, starts].mean(1))
                slopes.append({"model": name, "windows": part, "measure": measure} | columns("slope", change))
        for part, starts in within.items():
            change, relative = (slope(values[:, starts].mean(1)) for values in measured.values())
            level = S[:, starts].mean((0, 1))
            print(
                f"Windows {part}: S = {level[0]:.2f} on average; with each step more, S changes by {number(change)} "
                f"({direction(change, 'more', 'less')} serial), R/R rotated by {number(relative)}."
            )
        first, middle, last = (S[:, starts].mean(1) for starts in within.values())
        for k in (0, 4):
            apart = middle[k] - (first[k] + last[k]) / 2
            print(f"At k = {k} the middle is {direction(apart, 'more', 'less')} serial than the ends: {number(apart)}.")
        gained = slope(middle - (first + last) / 2)
        print(f"With each step more the middle gains on the ends by {number(gained)}.")
        growth[name] = slope(S[:, 1:].mean(1))
        print(f"All windows from layer 1 on: S changes by {number(growth[name])} with each step more.")
    print()
    for other in ("untrained", "translation"):
        more = growth["babel"] - growth[other]
        print(
            f"In babel S grows with k {direction(more, 'faster', 'slower')} than in {other}: by {number(more)} a step."
        )

    note = "the model named here is the first of three; the tokens are those of k = 4"
    provenance = manifest.manifest(stacks["babel"], tokens, seed=0, note=note)
    meanings = window.COLUMNS | {
        "model": "babel, the same untrained, or trained on k = 0 alone",
        "k": "functions that a problem applies",
    }
    tables.write(pd.DataFrame(rows), folder / "series_by_k.csv", provenance, meanings)
    tables.write(pd.DataFrame(slopes), folder / "slopes.csv", provenance, SLOPES)
    sizes.tell(plan, print)


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
