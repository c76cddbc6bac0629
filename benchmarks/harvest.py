"""What does keeping activations cost beside running the model? Tokens a second of ``harvest.harvest`` and of a forward.

    python benchmarks/harvest.py

Both on the same batches (prompts of similar length together, padded to the longest), interleaved, medians over rounds
with quartiles of the ratio. The forward is the whole model with its head and keeps nothing. The harvest runs the layers
before ``stop`` and does all the rest: hashes weights and corpus, converts, writes, hashes, flushes to the disk, opens
again. ``process`` is time of the processor, ``wall`` what the clock says, so the disk counts there. At ``stop = L``
only the head is saved, and the ratio is what the harvest's own work costs. The second table is what reading back costs,
beside the layers that the pairs stand for.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

import surgery
from surgery.models.tokens import Tokens
from surgery.training import harvest as harvesting


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=12, num_attention_heads=8, vocab_size=2048
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def prompts(stack: surgery.Stack, n_prompts: int, longest: int) -> Tokens:
    """Random tokens, lengths from half the longest to the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (n_prompts, 1), generator=generator)
    return Tokens(
        torch.randint(stack.d_vocab, (n_prompts, longest), generator=generator), torch.arange(longest) < lengths
    )


def forward(stack: surgery.Stack, corpus: Tokens, batch_size: int) -> None:
    lengths = corpus.mask.sum(1)
    for some in lengths.argsort(descending=True, stable=True).tensor_split(-(-len(corpus) // batch_size)):
        longest = int(lengths[some].max())
        stack.run(Tokens(corpus.ids[some, :longest], corpus.mask[some, :longest]))


def harvest(stack: surgery.Stack, corpus: Tokens, span: tuple[int, int], batch_size: int, dtype: torch.dtype) -> None:
    folder = tempfile.mkdtemp()
    harvesting.harvest(stack, corpus, *span, folder, batch_size=batch_size, dtype=dtype)
    shutil.rmtree(folder)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    wall, process = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - process, time.perf_counter() - wall


def compare(stack: surgery.Stack, corpus: Tokens, span: tuple[int, int], batch_size: int, rounds: int) -> dict:
    runs = {
        "forward": partial(forward, stack, corpus, batch_size),
        "harvest": partial(harvest, stack, corpus, span, batch_size, torch.float16),
    }
    for run in runs.values():
        run()
    times = np.array([[seconds(run) for run in runs.values()] for _ in range(rounds)])  # round, run, clock
    row: dict[str, object] = {}
    for clock, name in enumerate(("process", "wall")):
        speeds = int(corpus.mask.sum()) / np.median(times[:, :, clock], axis=0)
        low, middle, high = np.quantile(times[:, 0, clock] / times[:, 1, clock], [0.25, 0.5, 0.75])
        row |= {f"forward, tok/s {name}": round(speeds[0]), f"harvest, tok/s {name}": round(speeds[1])}
        row |= {f"harvest/forward {name}": f"{middle:.2f} [{low:.2f}, {high:.2f}]"}
    return row


def reading(stack: surgery.Stack, corpus: Tokens, span: tuple[int, int], batch_size: int, rounds: int) -> dict:
    """Milliseconds for a batch of random prompts, mapped and padded, and tokens a second of moments and verify."""
    with tempfile.TemporaryDirectory() as folder:
        found = harvesting.harvest(stack, corpus, *span, Path(folder), shard_tokens=int(corpus.mask.sum()) // 4)
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0)).tolist()[:batch_size]
        pairs = found.batch(order)
        context = stack.context(pairs.tokens)
        runs = {
            "batch, ms": lambda: found.batch(order),
            "its teacher, ms": lambda: stack.execute(f":{span[1]}", context.x0, context),
        }
        row = {name: 1000 * float(np.median([seconds(run)[0] for _ in range(rounds)])) for name, run in runs.items()}
        for name, run in {"moments, tok/s": found.moments, "verify, tok/s": found.verify}.items():
            row[name] = found.n_tokens / float(np.median([seconds(run)[0] for _ in range(rounds)]))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--prompts", type=int, default=1024, help="of babel; the llama, four times as long, has a quarter"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, reads = [], []
    for name, model, longest, share in (("babel", "babel", 16, 1), ("llama, d 256", llama(), 64, 4)):
        stack = surgery.Stack(surgery.load(model))
        corpus = prompts(stack, args.prompts // share, longest)
        sizes = {"model": name, "tokens": int(corpus.mask.sum())}
        for span in ((4, 9), (1, stack.n_layers)):
            rows.append(sizes | {"span": f"[{span[0]}, {span[1]})"} | compare(stack, corpus, span, 64, args.rounds))
        reads.append(sizes | reading(stack, corpus, (4, 9), 64, args.rounds))
    print(pd.DataFrame(rows).T.to_string(header=False))
    print("\nReading back, batches of 64 prompts")
    print(pd.DataFrame(reads).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
