"""A full scan of repeated spans against rebuilding the layer list and running the whole model for each, as others do.

    python benchmarks/scan.py

The same Llama of 24 layers (d_model 256) and the same batch, both ways in turns; the naive loop is timed on every tenth
wiring and scaled by the layers that it runs. One thread, process time; and two threads, wall clock, beside a process
that keeps one core busy, where a loop of small calls waits for its second thread at every one of them. ``over floor``
is the scan's time over layer executions that remain times the best measured time of one layer at that batch. Memory is
what the process grows by while a scan is given a budget.
"""

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable

import pandas as pd
import psutil
import torch
import transformers

import surgery
from surgery import scan
from surgery.models.loading import plain
from surgery.models.tokens import Tokens
from surgery.scan import schedule
from surgery.wiring.families import every_repeat

SIZES = ((1, 8), (2, 64), (16, 128))


def model() -> surgery.Stack:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=24, num_attention_heads=8, vocab_size=512
    )
    return surgery.Stack(surgery.load(transformers.AutoModelForCausalLM.from_config(config)))


@torch.no_grad()
def naive(stack: surgery.Stack, wirings: list, tokens: torch.Tensor, clock: Callable) -> tuple[float, dict]:
    """Seconds per layer execution, and the final streams, of a layer list rebuilt for every wiring."""
    base, finals = plain(stack.model).base_model, {}
    row, norm, seconds, executions = base.layers, base.norm, 0.0, 0
    base.norm = torch.nn.Identity()
    try:
        for index in range(0, len(wirings), 10):
            layers = wirings[index].layers
            start = clock()
            base.layers = torch.nn.ModuleList(row[layer] for layer in layers)
            base.config.num_hidden_layers = len(layers)
            finals[index] = base(tokens, use_cache=False).last_hidden_state
            seconds += clock() - start
            executions += len(layers)
    finally:
        base.layers, base.norm, base.config.num_hidden_layers = row, norm, len(row)
    return seconds / executions, finals


def best_layer(stack: surgery.Stack, tokens: torch.Tensor, group: int, clock: Callable) -> float:
    """Best seconds of one layer on one stream in a full batch."""
    context = stack.context(tokens.repeat(group, 1))
    times = []
    for _ in range(20):
        start = clock()
        stack.update(3, context.x0, context)
        times.append(clock() - start)
    return min(times) / group


def compare(stack: surgery.Stack, batch: int, pos: int, rounds: int, clock: Callable) -> dict:
    tokens, wirings = torch.randint(stack.d_vocab, (batch, pos)), list(every_repeat(24))
    scheme = scan.plan(stack, wirings, Tokens.of(tokens))
    scans, loops, floors, worst = [], [], [], 0.0
    for _ in range(rounds):
        seconds, finals = naive(stack, wirings, tokens, clock)
        loops.append(seconds * schedule.naive_executions(wirings))
        found = {}

        def keep(index: int, x: torch.Tensor, finals: dict = finals, found: dict = found) -> None:
            if index in finals:
                found[index] = x

        start = clock()
        scan.execute(stack, wirings, tokens, keep)
        scans.append(clock() - start)
        floors.append(best_layer(stack, tokens, scheme.group, clock))
        worst = max(worst, *(float((found[i] - x).abs().max() / x.abs().max()) for i, x in finals.items()))
    ratios = sorted(loop / scanned for loop, scanned in zip(loops, scans, strict=True))
    return {
        "batch": f"{batch} x {pos}",
        "naive, s": round(statistics.median(loops), 1),
        "scan, s": round(statistics.median(scans), 1),
        "faster": f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
        "over floor": round(min(scans) / (scheme.executions_shared * min(floors)), 2),
        "executions": f"{scheme.executions_naive:,.0f} -> {scheme.executions_shared:,.0f}",
        "calls": scheme.calls,
        "largest difference": f"{worst:.0e}",
    }


def memory(budget: int) -> dict:
    """What a fresh process grows by while it scans 16 x 128 tokens within a budget: its resident size, every 2 ms."""
    torch.set_num_threads(1)
    stack = model()
    tokens, wirings = torch.randint(stack.d_vocab, (16, 128)), list(every_repeat(24))[::6]
    process, peak, over = psutil.Process(), [0], threading.Event()
    stack.run(tokens[:1, :2])  # the code that a first run loads is not the scan's
    before = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    scan.execute(stack, wirings, tokens, lambda index, x: None, budget)
    over.set()
    watcher.join()
    planned = scan.plan(stack, wirings, Tokens.of(tokens), budget).peak_bytes
    return {"budget, MiB": budget >> 20, "planned": planned >> 20, "grown by": (peak[0] - before) >> 20}


def spin() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    stack, rows = model(), []
    torch.set_num_threads(1)
    for batch, pos in SIZES:
        rows.append({"threads": "1"} | compare(stack, batch, pos, args.rounds, time.process_time))
        print(rows[-1], flush=True)
    torch.set_num_threads(2)
    neighbour = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    neighbour.start()
    try:
        rows.append({"threads": "2, shared"} | compare(stack, 2, 64, args.rounds, time.perf_counter))
    finally:
        neighbour.kill()
    torch.set_num_threads(1)
    print(pd.DataFrame(rows).to_string(index=False))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        print(pd.DataFrame(fresh.map(memory, [512 << 20, 64 << 20], chunksize=1)).to_string(index=False))


if __name__ == "__main__":
    main()
