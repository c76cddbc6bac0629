"""What a step must take at least: layers in a row, bytes of weights read, operations. Where layers side by side pay.

A step takes at least the time of its layers one after another, whatever their size, plus the longer of reading all
weights and computing with them. Layers side by side save the first alone. ``Floor`` predicts the ratio for one model on
one machine, of which three numbers are measured on the spot; ``pays`` shows for which sizes of model that matters.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from surgery.meanings import with_meanings

COLUMNS = {
    "machine": "which machine",
    "phase": "prefill: a prompt of 128 tokens is read; decode: a token is written with a cache",
    "batch": "prompts at once",
    "d_model": "width of the stream; a layer has 12 times its square of weights",
    "ratio": "speed beside the original, as the floor predicts, with a quarter of the layers saved",
}
WIDTHS = tuple(2**power for power in range(6, 15))


@dataclass(frozen=True)
class Machine:
    """Seconds for a layer that has nothing to do, for a byte of weights read, and for an operation of a matrix product.

    >>> Machine(1e-4, 1e-10, 1e-11).layer > 0
    True
    """

    layer: float
    byte: float
    operation: float


# A data sheet, not a measurement: H100 SXM, 3.35 TB/s and 989 TFLOP/s in bfloat16; about 12 kernels a layer,
# of 4 us each when they are launched one by one.
DATA_SHEET = {"H100 (data sheet)": (Machine(layer=48e-6, byte=1 / 3.35e12, operation=1 / 989e12), 2)}


@dataclass(frozen=True)
class Floor:
    """What a model makes a machine do at least: layers in a row, weights read, operations a token."""

    layers: int
    weights: int
    machine: Machine
    size: int = 4  # bytes of a weight

    @classmethod
    def of(cls, model: Any) -> "Floor":
        """Measure the machine, in the model's data type; count its weights without the input embedding."""
        layers = model.config.get_text_config().num_hidden_layers
        head = model.get_output_embeddings()
        inside = {id(p): p for p in model.parameters()}
        inside.pop(id(model.get_input_embeddings().weight), None)
        weights = sum(p.numel() for p in inside.values())
        if head is not None and head.weight is model.get_input_embeddings().weight:
            weights += head.weight.numel()  # tied: read as a matrix all the same
        one = next(model.parameters())
        return cls(layers, weights, machine(one.device, one.dtype), one.element_size())

    def seconds(self, phase: str, batch: int, prompt: int) -> float:
        """The least time of one step: a token for each prompt, or the whole prompt of each."""
        tokens = batch * (prompt if phase == "prefill" else 1)
        work = max(self.weights * self.size * self.machine.byte, 2 * self.weights * tokens * self.machine.operation)
        return self.layers * self.machine.layer + work


_machines: dict[tuple[torch.device, torch.dtype], Machine] = {}


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """This machine, measured once: with a layer of 16 numbers, a product with one vector, and one with many."""
    if (device, dtype) not in _machines:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
        )
        tiny = LlamaForCausalLM(config).to(device, dtype).eval()
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        tall = torch.randn(4096, 4096, device=device, dtype=dtype)
        one, many = (torch.randn(4096, count, device=device, dtype=dtype) for count in (1, 512))
        _machines[device, dtype] = Machine(
            _median(lambda: tiny(token, use_cache=False), device) / 8,
            _median(lambda: tall @ one, device) / (tall.numel() * tall.element_size()),
            _median(lambda: tall @ many, device) / (2 * tall.numel() * 512),
        )
    return _machines[device, dtype]


@torch.no_grad()
def _median(run: Callable[[], Any], device: torch.device, times: int = 7) -> float:
    spent = []
    for _ in range(times + 1):
        start = now(device)
        run()
        spent.append(now(device) - start)
    return statistics.median(spent[1:])


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@with_meanings(COLUMNS)
def pays(here: Machine, size: int = 4, layers: int = 32) -> pd.DataFrame:
    """The ratio that a quarter of ``layers`` saved gives, by the width of the model: ``COLUMNS``.

    ``here`` is this machine, with weights of ``size`` bytes; beside it stands ``DATA_SHEET``.

    >>> frame = pays(Machine(1e-4, 1e-10, 1e-11))
    >>> frame[(frame["phase"] == "decode") & (frame["batch"] == 1)].groupby("machine")["ratio"].max().round(2).iloc[-1]
    np.float64(1.26)
    """
    rows = []
    for name, (machine, bytes_) in {"this machine": (here, size), **DATA_SHEET}.items():
        for phase, batch in (("decode", 1), ("decode", 16), ("prefill", 1), ("prefill", 16)):
            for width in WIDTHS:
                weights = layers * 12 * width**2
                whole = Floor(layers, weights, machine, bytes_).seconds(phase, batch, 128)
                compiled = Floor(layers * 3 // 4, weights, machine, bytes_).seconds(phase, batch, 128)
                rows.append((name, phase, batch, width, whole / compiled))
    return pd.DataFrame(rows, columns=list(COLUMNS))
