"""Does the bundled model's residual stream revert to a mean, and does any layer push a displaced stream back?

    python studies/mean_reversion.py --out results/mean_reversion                  # about a minute on 2 cores

Writes ``reversion_by_size.csv``: kappa of every layer with its nulls, and the causal kappa at two sizes of displacement
(a tenth of the stream's spread, and all of it). A regression kappa above its nulls is only a correlation until the
displaced stream agrees at both sizes. Copy this file and put your own model and prompts in.
"""

import argparse

import pandas as pd
import torch

import surgery
from surgery import frames, models, provenance, reversion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/mean_reversion")
    parser.add_argument("--prompts", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(2)

    folder = frames.folder(args.out)
    stack = surgery.Stack(surgery.load("babel"))
    tokens = stack.tokens(models.bundled_prompts(args.prompts))
    parts = [reversion.layers(stack, tokens, size=size).assign(size=size) for size in (0.1, 1.0)]
    frame = pd.concat(parts, ignore_index=True)
    columns = {"size": "length of a displacement as a fraction of the stream's spread"}
    frames.write(frame, folder / "reversion_by_size.csv", provenance.manifest(stack, tokens, seed=0), columns)

    causal = [f"kappa_causal_{kind}" for kind in ("difference", "random", "principal")]
    shown = ["kappa", "kappa_excess_low", "kappa_excess", "kappa_excess_high", *causal, "restoring"]
    for size, part in frame.groupby("size"):
        print(f"\ndisplaced by {size} of the spread\n{part.set_index('layer')[shown].round(3).to_string()}")
    agree = frame.groupby("layer")["restoring"].agg(lambda words: (words == "yes").all())
    print(f"\nLayers that push back at both sizes, above their nulls: {agree[agree].index.tolist() or 'none'}")


if __name__ == "__main__":
    main()
