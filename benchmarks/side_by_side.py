"""How much faster are pairs of layers side by side, fused, than the original and than as many layers left out?

    python benchmarks/side_by_side.py babel smollm2 gemma3-270m        # 5 to 10 minutes for each pretrained model
    python benchmarks/side_by_side.py babel --torch-compile            # minutes of compiling more

Speed depends on how many layers wait for others, not on which: the pairs are the last ones that can be fused, but for
the last layer. What they cost is another question, that of ``surgery compile``.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

import surgery
from surgery.compiler import speed
from surgery.models.errors import ModelError
from surgery.models.loading import plain
from surgery.rebuild import fuse, tape

SHARES = (1 / 7, 1 / 3)  # of the layers


def wiring(starts: Sequence[int], n_layers: int) -> str:
    """Every layer of ``starts`` side by side with the next.

    >>> wiring([1], 4)
    '0 {1.attn | 2.attn} {1.mlp | 2.mlp} 3'
    """
    second = {start + 1 for start in starts}
    pairs = {n: f"{{{n}.attn | {n + 1}.attn}} {{{n}.mlp | {n + 1}.mlp}}" for n in starts}
    return " ".join(pairs.get(n, str(n)) for n in range(n_layers) if n not in second)


def last_pairs(model: Any, count: int) -> tuple[list[int], Any]:
    """Where the last ``count`` pairs that fuse begin, and the fused model. Raises ModelError if there are fewer."""
    n_layers, starts = model.cfg.n_layers, []
    fused, start = None, n_layers - 3
    while start >= 0 and len(starts) < count:
        try:
            fused = fuse.together(model, wiring([start, *starts], n_layers))
            starts.insert(0, start)
            start -= 2
        except ModelError:  # layers of different kinds
            start -= 1
    if len(starts) < count:
        raise ModelError(f"only {len(starts)} pairs of this model's layers fuse, not {count}")
    return starts, fused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["babel"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-compile", action="store_true", help="the smaller share only, plain and compiled")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        model = surgery.load(name)
        n_layers = model.cfg.n_layers
        for share in SHARES[: 1 if args.torch_compile else None]:
            starts, fused = last_pairs(model, max(1, round(share * n_layers)))
            left_out = " ".join(str(n) for n in range(n_layers) if n - 1 not in starts)
            models = {
                "original": plain(model),
                "fused": plain(fused),
                "left out": plain(tape.together(model, left_out)),
            }
            frame = speed.measure(models, rounds=args.rounds, d_vocab=len(model.tokenizer), compiled=args.torch_compile)
            print(f"\n{name}, {n_layers - len(starts)} of {n_layers} layers in a row: {wiring(starts, n_layers)}")
            with pd.option_context("display.width", 200, "display.max_columns", None):
                print(frame.round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
