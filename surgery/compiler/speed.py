"""How fast models run, side by side: reading a prompt, and writing with a cache, one token after another.

Machines are shared and noisy, so all models take turns, round by round, and what counts is the ratio within a round:
its median, with an interval over rounds. ``floor`` is the ratio that ``surgery.compiler.floor`` predicts. ``compiled``
times every model a second time through ``torch.compile``, which saves time between kernels as well; there the cache has
its full length from the start, as one that grows would be compiled anew for every token.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch._dynamo import config as dynamo
from transformers import Cache, StaticCache

from surgery.compiler.floor import Floor, now
from surgery.meanings import with_meanings

COLUMNS = {
    "model": "which model",
    "runs": "plain, or through torch.compile",
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
PLAIN, COMPILED = "plain", "torch.compile"
# Models of one class share a limit of compilations; behind it they would run as they are, and be timed as compiled.
_ONLY_COMPILED = dynamo.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)


@with_meanings(COLUMNS)
@torch.no_grad()
def measure(
    models: Mapping[str, nn.Module],
    *,
    batches: tuple[int, ...] = (1, 16),
    prompt: int = 128,
    written: int = 16,
    rounds: int = 9,
    d_vocab: int = 1000,
    compiled: bool = False,
) -> pd.DataFrame:
    """Time Hugging Face models side by side: a row (``COLUMNS``) per model, phase and batch, the first is the original.

    With ``compiled`` also each with ``torch.compile``, beside the original without it.

    Cost: every model reads ``prompt`` tokens and writes ``written``, for every batch and round, and once to warm up;
    ``compiled`` twice that, and minutes of compiling.
    """
    floors = {name: Floor.of(model) for name, model in models.items()}
    every = [(name, runs) for runs in (PLAIN, COMPILED)[: 1 + compiled] for name in models]
    callables = {(name, runs): models[name] if runs == PLAIN else torch.compile(models[name]) for name, runs in every}
    first, rows = every[0], []
    for batch in batches:
        ids = torch.randint(d_vocab, (batch, prompt), generator=torch.Generator().manual_seed(0))
        seconds: dict[tuple[str, str], dict[str, list[float]]] = {one: {phase: [] for phase in PHASES} for one in every}
        for turn in range(rounds + 1):
            for name, runs in every:
                cache = None if runs == PLAIN else StaticCache(models[name].config, prompt + written)
                with _ONLY_COMPILED:
                    spent = _once(callables[name, runs], ids.to(next(models[name].parameters()).device), written, cache)
                for phase, one in zip(PHASES, spent):
                    if turn:  # the first warms up
                        seconds[name, runs][phase].append(one)
        for phase in PHASES:
            count = batch * (prompt if phase == "prefill" else written)
            expected = {name: floors[name].seconds(phase, batch, prompt) for name in models}
            for name, runs in every:
                own, base = np.array(seconds[name, runs][phase]), np.array(seconds[first][phase])
                low, middle, high = _interval(base / own)
                rows.append(
                    {
                        "model": name,
                        "runs": runs,
                        "phase": phase,
                        "batch": batch,
                        "per_second": count / statistics.median(own),
                        "ratio": middle,
                        "ratio_low": low,
                        "ratio_high": high,
                        "floor": expected[first[0]] / expected[name],
                        "rounds": rounds,
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _once(model: Any, ids: torch.Tensor, written: int, cache: Cache | None) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens written after it; ``cache`` is an empty one, or None for the usual."""
    start = now(ids.device)
    output = model(ids, past_key_values=cache, use_cache=True)
    read = now(ids.device)
    token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    for _ in range(written):
        output = model(token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    return read - start, now(ids.device) - read


def _interval(ratios: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """The median of ratios, between the ends of its bootstrap interval."""
    drawn = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(np.median(ratios)), float(high)
