"""How serial are the layers of the bundled model, and does it depend on how many steps a problem has?

    python studies/series_or_parallel.py --out results/series_or_parallel          # about a minute on 2 cores

Writes ``series_by_k.csv`` (a row per window of three layers and k) and prints S of every window, asked for k = 0
(pure translation) to 4 (four functions in a row). The same prompts' null stands beside it: R/N above 1 is response to
what the window itself wrote. Copy this file and put your own model and prompts in.
"""

import argparse

import pandas as pd
import torch

import surgery
from surgery import frames, provenance, series
from surgery.babel import Babel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/series_or_parallel")
    parser.add_argument("--prompts", type=int, default=128, help="problems of each k")
    parser.add_argument("--length", type=int, default=3, help="longest window, in layers")
    args = parser.parse_args()
    torch.set_num_threads(2)

    folder = frames.folder(args.out)
    corpus, stack = Babel(), surgery.Stack(surgery.load("babel"))
    parts = []
    for k in range(5):
        problems = corpus.sample(k, args.prompts, seed=0)
        tokens = stack.tokens([" ".join(corpus.words(problem)[1:]) for problem in problems])
        parts.append(series.windows(stack, tokens, max_length=args.length, damage=False).assign(k=k))
    frame = pd.concat(parts, ignore_index=True)
    manifest = provenance.manifest(stack, tokens, seed=0, note="the tokens named here are those of k = 4")
    columns = {"k": "number of functions that every problem applies"}
    frames.write(frame, folder / "series_by_k.csv", manifest, columns)

    longest = frame[(frame.stop - frame.start == args.length) & (frame.start >= 1)]
    for measure in ("S", "R_over_N"):
        table = longest.pivot(index="start", columns="k", values=measure).round(2)
        print(f"\n{measure} of the window of {args.length} layers that begins at layer ..., by k\n{table.to_string()}")
    low, high = longest[longest.k == 0].set_index("start"), longest[longest.k == 4].set_index("start")
    grown = [start for start in low.index if high.S_low[start] > low.S_high[start]]
    fallen = [start for start in low.index if high.S_high[start] < low.S_low[start]]
    print(
        f"\nFrom k = 0 to k = 4, S rises clearly in the windows that begin at {grown or 'no layer'}, falls clearly in "
        f"those at {fallen or 'no layer'}; in the others the 95 % intervals overlap."
    )


if __name__ == "__main__":
    main()
