"""Where do input translation, reasoning and output translation begin and end, and are the ends wired more in parallel?

    python studies/anatomy.py --out results/anatomy                      # half a minute on 2 cores
    python studies/anatomy.py --budget 45s                               # as many prompts and problems as fit
    python studies/anatomy.py --model FOLDER --text prose=a.txt --text sums=b.txt

Without ``--model``: the bundled model on problems of k = 0 (pure translation) and k = 4 (four functions), the same
architecture untrained, and its twin that was trained on translation alone. Boundaries are found on one half of the
prompts, the ends compared with the middle on the other. Writes the files of ``surgery.anatomy.study``, a folder a
model. Any other model reads the bundled parallel sentences, and prompts from one or more text files, a kind each.
"""

import argparse
from functools import partial
from pathlib import Path

import surgery
from surgery import disk, models, scan, wiring
from surgery.anatomy import boundaries, convergence, say, study
from surgery.corpus import probes
from surgery.corpus.babel import Babel
from surgery.corpus.text_files import read_prompts
from surgery.planning import sizes
from surgery.planning.machine import Work
from surgery.planning.sizes import ShapeOf
from surgery.scan import levels
from surgery.stats.sampling import Sampling

STAGES = ({"prompts": 16, "probes": 4}, {"prompts": 96, "probes": 12})
AFTER = 6.0  # seconds a model that are the same for any number of them


def work(size: dict[str, int], shape_of: ShapeOf, models: int, kinds: int, lengths: int) -> Work:
    """The anatomy on prompts of every kind, and a full scan of the probes: of problems as many of every length."""
    asked = shape_of(lengths * size["probes"])
    scanned = levels.scanned(asked, levels.repeats(asked.n_layers, asked.n_layers))
    return models * (study.cost(asked.n_layers, kinds=True) * shape_of(kinds * size["prompts"]).forward + scanned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/anatomy")
    parser.add_argument(
        "--model", help="a folder or name for surgery.load; the bundled model and its twins if not given"
    )
    parser.add_argument(
        "--text", action="append", default=[], metavar="KIND=FILE", help="prompts of a kind, one a line"
    )
    parser.add_argument("--prompts", type=int, default=96, help="prompts of each kind")
    parser.add_argument("--probes", type=int, default=12, help="scanned problems of each k; for text: prompts")
    parser.add_argument("--length", type=int, default=2, help="layers in a window")
    parser.add_argument("--resamples", type=int, default=boundaries.SAMPLING.resamples)
    sizes.add_option(parser)
    args = parser.parse_args()
    if args.model and not args.text:
        parser.error("--model needs prompts: give --text KIND=FILE, once for every kind")

    folder = disk.folder(args.out)
    files = dict(option.split("=", 1) for option in args.text) if args.model else {}
    if args.model:
        opened = {Path(args.model).name: surgery.load(args.model)}
    else:
        opened = {"babel": surgery.load("babel")}
        opened["untrained"] = models.untrained(opened["babel"])
        opened["translation"] = surgery.load("babel-translation")
    stacks = {name: surgery.Stack(model) for name, model in opened.items()}
    first = next(iter(stacks.values()))
    alike = [text for file in files.values() for _, text in read_prompts(file, args.prompts)]
    plan = sizes.settle(
        args,
        STAGES,
        partial(work, models=len(stacks), kinds=len(files) or 2, lengths=1 if files else 5),
        first,
        folder,
        first.tokens(alike, first.n_ctx) if alike else None,
        say=print,
        after=AFTER * len(stacks),
    )
    if args.model:
        prompts = [(text, kind) for kind, file in files.items() for _, text in read_prompts(file, args.prompts)]
        utterances, metric = convergence.parallel(), "loss"
        questions = probes.text([text for text, _ in prompts][: args.probes])
    else:
        corpus = Babel()
        prompts = [
            (" ".join(corpus.words(problem)[1:]), f"k={k}")
            for k in (0, 4)
            for problem in corpus.sample(k, args.prompts, 0)
        ]
        utterances, metric = convergence.babel(), "loglik"
        questions = probes.babel(args.probes, range(5))

    for name, stack in stacks.items():
        tokens = stack.tokens([text for text, _ in prompts], stack.n_ctx)
        repeats = wiring.every_repeat(stack.n_layers)
        rows = scan.run(stack, repeats, questions, metrics=(metric,))
        anatomy = study.measure(
            stack,
            tokens,
            disk.folder(folder / name),
            [kind for _, kind in prompts],
            utterances=utterances,
            scan=rows,
            metric=metric,
            length=args.length,
            sampling=Sampling(resamples=args.resamples),
        )
        print(f"\n== {name}\n")
        for title, frame in (
            ("Boundaries, share of resampled prompts", anatomy.boundaries),
            ("Number of breaks", anatomy.segments.drop(columns=["heldout_error_low", "heldout_error_high"])),
            ("Detectors", anatomy.detectors),
            (
                "Content against language",
                anatomy.convergence.frame[["layer", "same_content", "same_language", "neither"]],
            ),
            (
                "Ends minus middle",
                anatomy.ends[
                    ["kind", "D", "D_low", "D_high", "D_in", "D_out", "D_over_rotated", "p_windows", "p_rotated"]
                ],
            ),
        ):
            print(f"{title}\n{frame.round(2).to_string(index=False)}\n")
        print(*say.sentences(anatomy.tables, stack.n_layers), sep="\n")
    sizes.tell(plan, print)


if __name__ == "__main__":
    surgery.cli.script(main, "the files that are there are whole")
