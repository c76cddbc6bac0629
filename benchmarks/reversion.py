"""What do the measures of mean reversion cost, in forward passes, seconds and memory? On the bundled model, 12 layers.

    python benchmarks/reversion.py

First, executions of layers over 12 beside the formula of each measure's docstring, and process time in units of F: the
stream through all layers once, without the head, best of five. What a measure takes beyond its forward passes is
statistics. Then, for two corpora of which one has ten times the prompts (random tokens), what a fresh process grows by
while it measures trajectories, layers and directions, beside what all activations of one pass would take in float32.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import psutil
import timing
import torch

import surgery
from surgery import models, reversion
from surgery.corpus import bundled
from surgery.models.engine import Engine
from surgery.reversion import cloud, directions, returns, study, trajectories
from surgery.stats.sampling import Sampling

L, DRAWS = 12, 4


def measures(stack: surgery.Stack, untrained: surgery.Stack, tokens) -> dict[str, tuple[float, Callable]]:
    """Name, F by the docstring (1 F for massive activations included), and the call."""
    slope = 1 + 1 + 1 + DRAWS
    curves = 1 + 3 + 3 * 2 * 1 * (L + 1) / 2
    return {
        "reversion.layers": (slope + 3 + 6 * DRAWS, lambda: reversion.layers(stack, tokens)),
        "  causal=False": (slope, lambda: reversion.layers(stack, tokens, causal=False)),
        "  causal=False, untrained": (
            slope + 1,
            lambda: reversion.layers(stack, tokens, causal=False, untrained=untrained),
        ),
        "  principal": (
            slope + 1,
            lambda: reversion.layers(stack, tokens, causal=False, coordinates="principal"),
        ),
        "  logits": (
            1 + 2 * (slope - 1),  # a second F for each walk in which they are used; not that for massive activations
            lambda: reversion.layers(stack, tokens, causal=False, coordinates="logits"),
        ),
        "  normalised": (slope + 1, lambda: reversion.layers(stack, tokens, causal=False, coordinates="normalised")),
        "trajectories.measure": (1 + 1 + DRAWS, lambda: trajectories.measure(stack, tokens)),
        "  untrained": (1 + 1 + DRAWS + 1, lambda: trajectories.measure(stack, tokens, untrained=untrained)),
        "trajectories.cross_correlation": (2, lambda: trajectories.cross_correlation(stack, tokens)),
        "directions.layers": (2 + 1, lambda: directions.layers(stack, tokens)),
        "returns.curves, all layers": (curves, lambda: returns.curves(stack, tokens, sizes=(0.1,))),
        "  frozen": (curves + 1, lambda: returns.curves(stack, tokens, sizes=(0.1,), frozen=True)),
        "cloud.noise": (2 + 1, lambda: cloud.noise(stack, tokens)),
        "cloud.fit, 3 rows": (2 * 3 + 1, lambda: cloud.fit(stack, tokens)),
        "cloud.growth": (1 + 1, lambda: cloud.growth(stack, tokens)),
        "study.measure": (
            115 + 12,
            lambda: study.measure(stack, tokens, Path(tempfile.mkdtemp()), untrained),
        ),
    }


def passes(run: Callable[[], object]) -> tuple[float, float]:
    """Executions of layers over their number, and process time."""
    own, count = Engine.layer, [0]

    def counted(*args, **kwargs):
        count[0] += 1
        return own(*args, **kwargs)

    with patch.object(Engine, "layer", counted):
        taken = timing.seconds(run)
    return count[0] / L, taken


def costs(prompts: int) -> pd.DataFrame:
    stack = surgery.Stack(surgery.load("babel"))
    untrained = surgery.Stack(models.untrained(stack.model))
    tokens = stack.tokens(bundled.prompts(prompts))
    batches = list(tokens.batches(64))
    F = min(timing.seconds(lambda: [stack.stream(batch) for batch in batches]) for _ in range(5))
    rows = []
    for name, (stated, run) in measures(stack, untrained, tokens).items():
        executed, taken = passes(run)
        executed /= len(batches)
        row = {"measure": name, "stated, F": stated, "executed, F": executed}
        rows.append(row | {"time, F": taken / F, "seconds": taken})
    print(f"{prompts} prompts, {int(tokens.mask.sum())} tokens, F = {1000 * F:.0f} ms, one thread")
    return pd.DataFrame(rows)


def grown(prompts: int, pos: int) -> None:
    """In a process of its own: print by how many MB its peak grows while it measures."""
    stack = surgery.Stack(surgery.load("babel"))
    tokens = torch.randint(stack.d_vocab, (prompts, pos), generator=torch.Generator().manual_seed(0))
    every = (
        trajectories.measure,
        partial(reversion.layers, causal=False),
        directions.layers,
    )
    for measure in every:
        measure(stack, tokens[:2], sampling=Sampling(resamples=2))  # loads what the first run loads
    before = psutil.Process().memory_info().rss
    for measure in every:
        measure(stack, tokens)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before / 2**20)


def memory(sizes: tuple[int, int], pos: int) -> pd.DataFrame:
    rows = []
    for prompts in sizes:
        command = [sys.executable, __file__, "--grown", str(prompts), "--pos", str(pos)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        activations = prompts * pos * (L + 1) * 128 * 4 / 2**20
        rows.append(
            {
                "prompts": prompts,
                "tokens": prompts * pos,
                "grown by, MB": float(done.stdout),
                "all activations, MB": activations,
                "wall, s": time.perf_counter() - start,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs=2, default=(512, 5120), help="prompts of the two corpora")
    parser.add_argument("--pos", type=int, default=32, help="their tokens each")
    parser.add_argument("--grown", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.grown:
        return grown(args.grown, args.pos)
    print(costs(args.prompts).round(2).to_string(index=False))
    print("\nMemory of trajectories.measure, reversion.layers(causal=False) and directions.layers, batches of 64")
    print(memory(tuple(args.sizes), args.pos).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
