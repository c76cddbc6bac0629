"""A full scan of repeated spans against rebuilding the layer list and running the whole model for each, as others do.

    python benchmarks/scan.py

The same Llama of 24 layers (d_model 256), the same prompts; process time, one thread. The naive loop is timed on
every tenth wiring and scaled by the layers that it runs. ``over floor`` is the scan's time over layer executions that
remain times the best measured time of one layer at that batch. The largest difference between the two ways' final
streams is printed too.
"""

import argparse
import time

import pandas as pd
import torch
import transformers

import surgery
from surgery import scan, schedule
from surgery.models import plain
from surgery.tokens import Tokens
from surgery.wiring import every_repeat


def model() -> surgery.Stack:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=24, num_attention_heads=8, vocab_size=512
    )
    return surgery.Stack(surgery.load(transformers.AutoModelForCausalLM.from_config(config)))


@torch.no_grad()
def naive(stack: surgery.Stack, wirings: list, tokens: torch.Tensor) -> tuple[float, dict[int, torch.Tensor]]:
    """Seconds per layer execution, and the final streams, of a layer list rebuilt for every wiring."""
    base, finals = plain(stack.model).base_model, {}
    row, norm, seconds, executions = base.layers, base.norm, 0.0, 0
    base.norm = torch.nn.Identity()
    try:
        for index in range(0, len(wirings), 10):
            layers = wirings[index].layers
            start = time.process_time()
            base.layers = torch.nn.ModuleList(row[layer] for layer in layers)
            base.config.num_hidden_layers = len(layers)
            finals[index] = base(tokens, use_cache=False).last_hidden_state
            seconds += time.process_time() - start
            executions += len(layers)
    finally:
        base.layers, base.norm, base.config.num_hidden_layers = row, norm, len(row)
    return seconds / executions, finals


def best_layer(stack: surgery.Stack, tokens: torch.Tensor, group: int) -> float:
    """Best seconds of one layer on one stream in a full batch."""
    context = stack.context(tokens.repeat(group, 1))
    times = []
    for _ in range(20):
        start = time.process_time()
        stack.update(3, context.x0, context)
        times.append(time.process_time() - start)
    return min(times) / group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stack, wirings, rows = model(), list(every_repeat(24)), []
    for batch, pos in ((2, 64), (16, 128)):
        tokens = torch.randint(stack.d_vocab, (batch, pos))
        scheme = scan.plan(stack, wirings, Tokens.of(tokens))
        scans, per_layer, floors, worst = [], [], [], 0.0
        for _ in range(args.rounds):
            seconds, finals = naive(stack, wirings, tokens)
            per_layer.append(seconds)
            found = {}

            def keep(index: int, x: torch.Tensor, finals: dict = finals, found: dict = found) -> None:
                if index in finals:
                    found[index] = x

            start = time.process_time()
            scan.execute(stack, wirings, tokens, keep)
            scans.append(time.process_time() - start)
            floors.append(best_layer(stack, tokens, scheme.group))
            worst = max(worst, *(float((found[i] - x).abs().max() / x.abs().max()) for i, x in finals.items()))
        all_naive = [seconds * schedule.naive_executions(wirings) for seconds in per_layer]
        ratios = sorted(n / s for n, s in zip(all_naive, scans, strict=True))
        rows.append(
            {
                "batch": f"{batch} x {pos}",
                "naive, s": round(sorted(all_naive)[len(all_naive) // 2], 1),
                "scan, s": round(sorted(scans)[len(scans) // 2], 1),
                "faster": f"{ratios[len(ratios) // 2]:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
                "over floor": round(min(scans) / (scheme.executions_shared * min(floors)), 2),
                "calls": scheme.calls,
                "peak MiB": round(scheme.peak_bytes / 2**20),
                "largest difference": f"{worst:.0e}",
            }
        )
        print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
