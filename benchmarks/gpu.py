"""Which share of a GPU's matrix rate a scan reaches: in float32, in bf16, and with the layers outside the GPU.

    python benchmarks/gpu.py [--model smollm2]

All repeated spans of a model (by default a random Llama of 24 layers, d_model 1024) on 32 prompts of 128 tokens. The
rate of the GPU is that of one large matrix product in the same number format, measured in the same run (TF32 is off, as
torch has it). Operations are two for every token and weight of a layer's matrices, so that attention counts as time but
not as work. Wall clock, median of five rounds after one to warm up. ``--device cpu`` tries the benchmark itself, small.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
import transformers

import surgery
from surgery.models import offload, plain
from surgery.models.half_precision import HalfLayers
from surgery.models.tokens import Tokens
from surgery.scan import execution
from surgery.wiring.families import every_repeat

ROUNDS = 5


def seconds(device: str, run: Callable[[], object]) -> float:
    """Wall clock until the device has done it."""
    times = []
    for _ in range(ROUNDS + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def rate(device: str, size: int, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds(device, lambda: a @ b)


def random_llama(folder: str, width: int, n_layers: int) -> str:
    """The folder, with a random Llama in it."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=11 * width // 4, num_attention_heads=width // 64)
    config = transformers.LlamaConfig(num_hidden_layers=n_layers, vocab_size=4096, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def work(stack: surgery.Stack) -> int:
    """Operations that the matrices of a layer take for a token."""
    layer: Any = plain(stack.model).get_submodule(stack.model.blocks[0].name)
    return 2 * sum(weight.numel() for weight in layer.parameters() if weight.ndim > 1)


def table(model: str, device: str, prompts: int, size: int) -> pd.DataFrame:
    """Seconds of a scan, its rate and the device's in TFLOP/s, and their ratio."""
    stays, outside = (surgery.Stack(surgery.load(model, device=device, offload=away)) for away in (False, True))
    tokens = Tokens.of(torch.randint(stays.d_vocab, (prompts, 128)))
    wirings, rows = list(every_repeat(stays.n_layers)), []
    operations = execution.plan(stays, wirings, tokens).executions_shared * work(stays) * tokens.ids.numel()
    kinds = (("float32", stays, stays), ("bf16", stays, HalfLayers(stays)), ("float32, offloaded", outside, outside))
    for kind, stack, layers in kinds:
        scan = partial(execution.execute, stack, wirings, tokens, lambda index, x: None, layers=layers)
        taken, possible = seconds(device, scan), rate(device, size, torch.bfloat16 if kind == "bf16" else torch.float32)
        rows.append((kind, taken, operations / taken / 1e12, possible / 1e12, operations / taken / possible))
    print(f"layers brought at most {max(offload.of(outside.model).loads.values())} times in {ROUNDS + 1} scans")
    return pd.DataFrame(rows, columns=["layers", "seconds", "TFLOP/s", "of one product", "share"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what surgery.load takes; by default a random Llama")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was run")
        return
    prompts, size, width, n_layers = (32, 8192, 1024, 24) if args.device == "cuda" else (2, 512, 128, 4)
    print(torch.cuda.get_device_name() if args.device == "cuda" else "CPU: a trial of the benchmark, small")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or random_llama(folder, width, n_layers)
        print(table(model, args.device, prompts, size).to_string(index=False))


if __name__ == "__main__":
    main()
