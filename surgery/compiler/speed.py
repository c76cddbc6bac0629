"""How fast models run, side by side: reading a prompt, and writing with a cache, one token after another.

Machines are shared and noisy, so all models take turns, round by round, and what counts is the ratio within a round:
its median, with an interval over rounds. ``floor`` says what a step must take at least, from a model of three numbers
measured on the spot: time per layer that runs whatever its size, time per byte of weights that is read, time per
operation. Layers side by side save the first alone, so that is where a compiled model can win.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

COLUMNS = {
    "model": "which model",
    "phase": "prefill: a prompt is read; decode: tokens are written with a cache, one after another",
    "batch": "prompts at once",
    "per_second": "tokens a second, of all prompts together (median over rounds)",
    "ratio": "tokens a second, as a multiple of the first model's in the same round (median)",
    "ratio_low": "lower end of its 95 % interval over rounds",
    "ratio_high": "upper end of its 95 % interval",
    "floor": "the same ratio as the model of the floor predicts",
    "rounds": "how often each model was timed",
}
PHASES = ("prefill", "decode")


@torch.no_grad()
def measure(
    models: Mapping[str, nn.Module],
    *,
    batches: tuple[int, ...] = (1, 16),
    prompt: int = 128,
    written: int = 16,
    rounds: int = 9,
    d_vocab: int = 1000,
) -> pd.DataFrame:
    """Time Hugging Face models side by side: a row (``COLUMNS``) per model, phase and batch, the first is the original.

    Cost: every model reads ``prompt`` tokens and writes ``written``, for every batch and round, and once to warm up.
    """
    floors = {name: Floor.of(model) for name, model in models.items()}
    rows = []
    for batch in batches:
        ids = torch.randint(d_vocab, (batch, prompt), generator=torch.Generator().manual_seed(0))
        seconds: dict[tuple[str, str], list[float]] = {(name, phase): [] for name in models for phase in PHASES}
        for turn in range(rounds + 1):
            for name, model in models.items():
                for phase, spent in zip(PHASES, _once(model, ids.to(next(model.parameters()).device), written)):
                    if turn:  # the first warms up
                        seconds[name, phase].append(spent)
        first = next(iter(models))
        for phase in PHASES:
            count = batch * (prompt if phase == "prefill" else written)
            expected = {name: floors[name].seconds(phase, batch, prompt) for name in models}
            for name in models:
                own, base = np.array(seconds[name, phase]), np.array(seconds[first, phase])
                low, middle, high = _interval(base / own)
                rows.append(
                    {
                        "model": name,
                        "phase": phase,
                        "batch": batch,
                        "per_second": count / statistics.median(own),
                        "ratio": middle,
                        "ratio_low": low,
                        "ratio_high": high,
                        "floor": expected[first] / expected[name],
                        "rounds": rounds,
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _once(model: Any, ids: torch.Tensor, written: int) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens written after it."""
    start = _now(ids.device)
    output = model(ids, use_cache=True)
    read = _now(ids.device)
    token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    for _ in range(written):
        output = model(token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    return read - start, _now(ids.device) - read


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _interval(ratios: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """The median of ratios, between the ends of its bootstrap interval."""
    drawn = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(np.median(ratios)), float(high)


# --- the floor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Seconds for a layer that has nothing to do, for a byte of weights read, and for an operation of a matrix product.

    >>> Machine(1e-4, 1e-10, 1e-11).layer > 0
    True
    """

    layer: float
    byte: float
    operation: float


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
        start = _now(device)
        run()
        spent.append(_now(device) - start)
    return statistics.median(spent[1:])
