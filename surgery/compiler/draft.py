r"""A compiled model drafts, the original verifies: the original's own text, perhaps faster.

The draft writes ``block`` tokens, one after another; the original reads them all in one step and keeps as many as it
would have written itself, and one more that it writes there (Leviathan et al. 2023, arXiv 2211.17192; here greedy, so
what comes out is the original's greedy text, whatever the draft does: a poor one only costs time). A fused model is a
draft with the original's vocabulary, and no training.

If the draft agrees at a share ``a`` of places, a step of the original keeps on average ``(1 - a^(block + 1)) / (1 -
a)`` tokens; with a draft that takes ``c`` of the original's time a token, it is faster by that over ``block c + 1``
(``expected``). ``agreement`` measures ``a`` beforehand, on running text. What text a model writes itself is easier to
agree on than what others wrote, so the prediction is on the careful side.

Control: the draft that is the original with its last layers left out (early exit), ``search.skips``.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

COLUMNS = {
    "draft": "which model drafts",
    "agreement": "share of tokens, on running text, on which it agrees with the original: measured beforehand",
    "block": "tokens drafted for a step of the original, chosen for this agreement and time",
    "per_step_expected": "tokens that a step of the original keeps, as the agreement predicts",
    "per_step": "tokens that it keeps in texts that it writes",
    "ratio_expected": "tokens a second beside the original alone, as agreement and time predict",
    "ratio": "the same, measured (median over prompts)",
    "ratio_low": "smallest of all prompts",
    "ratio_high": "largest of all prompts",
    "same": "share of prompts whose text is the original's to the last token",
    "n_prompts": "prompts",
}


@dataclass(frozen=True)
class Drafted:
    """A text that was drafted and verified.

    Attributes: ``ids``, prompt and text; ``kept``, how many drafted tokens each step of the original kept; ``block``,
    how many it was offered.
    """

    ids: Int[Tensor, "1 pos"]
    kept: tuple[int, ...]
    block: int

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were looked at and kept: the first that is refused ends a step."""
        looked_at = sum(min(kept + 1, self.block) for kept in self.kept)
        return sum(self.kept) / looked_at if looked_at else float("nan")

    @property
    def per_step(self) -> float:
        """Tokens written for every step of the original."""
        return sum(kept + 1 for kept in self.kept) / max(1, len(self.kept))


@torch.no_grad()
def generate(
    original: Any, draft: Any, ids: Int[Tensor, "prompt pos"], max_new_tokens: int = 32, *, block: int = 4
) -> Drafted:
    """Write the original's greedy text after ``ids``, drafted by ``draft``: two Hugging Face models of one vocabulary.

    Nothing stops it but ``max_new_tokens``. Cost: a step of the original for every ``per_step`` tokens, and ``block``
    steps of the draft.

    Raises ValueError for more than one prompt, an empty one, a block below 1, and models of different vocabularies.

    >>> import surgery
    >>> from surgery.rebuild import fuse
    >>> model = surgery.load("babel")
    >>> plain = surgery.models.plain
    >>> small = plain(fuse.together(model, ":2 {2.attn | 3.attn} {2.mlp | 3.mlp} 4:"))
    >>> ids = model.tokenizer("p3 pf1 >other", return_tensors="pt")["input_ids"]
    >>> generate(plain(model), small, ids, 3).ids.shape[1] - ids.shape[1]
    3
    """
    if ids.shape[0] != 1 or not ids.shape[1] or block < 1:
        raise ValueError(f"one prompt at a time, of one token or more, in blocks of 1 or more; got {tuple(ids.shape)}")
    sizes = [model.config.get_text_config().vocab_size for model in (original, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models have vocabularies of {sizes[0]} and {sizes[1]} words: a draft needs the same one")
    writer, drafter = _Writer(original), _Writer(draft)
    whole, wanted = ids, ids.shape[1] + max_new_tokens
    if max_new_tokens > 0:
        whole = torch.cat([whole, writer.next(whole, 1)], 1)
    kept: list[int] = []
    while whole.shape[1] < wanted:
        offered = min(block, wanted - whole.shape[1])
        drafted = whole
        for _ in range(offered):
            drafted = torch.cat([drafted, drafter.next(drafted, 1)], 1)
        own = writer.next(drafted, offered + 1)  # after the last token, and after every drafted one
        agree = int((own[0, :offered] == drafted[0, -offered:]).cumprod(0).sum())
        whole = torch.cat([whole, own[:, : agree + 1]], 1)
        kept.append(agree)
        for model in (writer, drafter):
            model.forget(whole.shape[1] - 1)
    return Drafted(whole[:, :wanted], tuple(kept), block)


class _Writer:
    """A model with its key-value cache, which is cut back to what is kept of a text."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.read = model, None, 0

    def next(self, ids: Int[Tensor, "1 pos"], count: int) -> Int[Tensor, "1 count"]:
        """The likeliest tokens after each of the last ``count`` tokens."""
        new = ids[:, self.read :].to(next(self.model.parameters()).device)
        output = self.model(new, past_key_values=self.cache, use_cache=True)
        self.cache, self.read = output.past_key_values, ids.shape[1]
        return output.logits[:, -count:].argmax(-1).to(ids.device)

    def forget(self, length: int) -> None:
        """Keep the first ``length`` tokens at most."""
        if self.cache is not None and self.read > length:
            self.cache.crop(length - self.read)  # how many to remove, below 0
            self.read = length


@torch.no_grad()
def agreement(stack: Stack, wiring: str, tokens: Tokens, batch_size: int = 8) -> float:
    """The share of tokens after which both have the same likeliest next one; the last of a prompt counts too.

    Cost: 2 F and as many readouts.
    """
    same = total = 0
    for batch in tokens.batches(batch_size):
        mask = batch.mask
        first = stack.run(batch).argmax(-1)[mask]
        second = stack.run(batch, wiring).argmax(-1)[mask]
        same, total = same + int((first == second).sum()), total + int(mask.sum())
    return same / total


def expected(agreement: float, block: int, cost: float) -> tuple[float, float]:
    """Tokens for every step of the original, and how many times as fast writing is.

    Args:
        agreement: share of tokens on which draft and original agree.
        cost: time of the draft for a token, as a share of the original's.

    >>> [round(value, 2) for value in expected(0.8, 4, 0.5)]
    [3.36, 1.12]
    """
    per_step = block + 1.0 if agreement >= 1 else (1 - agreement ** (block + 1)) / (1 - agreement)
    return per_step, per_step / (block * cost + 1)


def best_block(agreement: float, cost: float, most: int = 16) -> int:
    """The block for which ``expected`` is fastest.

    >>> best_block(0.9, 0.3), best_block(0.5, 0.9)
    (5, 1)
    """
    return max(range(1, most + 1), key=lambda block: expected(agreement, block, cost)[1])


def measure(
    stack: Stack,
    original: Any,
    drafts: Mapping[str, tuple[Any, str, float]],
    tokens: Tokens,
    prompts: Sequence[Int[Tensor, "1 pos"]],
    max_new_tokens: int = 24,
) -> pd.DataFrame:
    """Predict and measure every draft: a row (``COLUMNS``) each.

    ``drafts`` has the model that drafts, its wiring, and its time for a token as a share of the original's; ``tokens``
    are what agreement is measured on, ``prompts`` what is written on. Models take turns at every prompt.
    """
    rows = []
    for name, (model, wiring, cost) in drafts.items():
        shared = agreement(stack, wiring, tokens)
        block = best_block(shared, cost)
        per_step, speed = expected(shared, block, cost)
        ratios, kept, same = [], list[int](), []
        for ids in prompts:
            start = time.perf_counter()
            alone = _greedy(original, ids, max_new_tokens)
            middle = time.perf_counter()
            made = generate(original, model, ids, max_new_tokens, block=block)
            ratios.append((middle - start) / (time.perf_counter() - middle))
            kept += made.kept
            same.append(torch.equal(made.ids, alone))
        rows.append(
            {
                "draft": name,
                "agreement": shared,
                "block": block,
                "per_step_expected": per_step,
                "per_step": float(np.mean([count + 1 for count in kept])),
                "ratio_expected": speed,
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "same": float(np.mean(same)),
                "n_prompts": len(prompts),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


@torch.no_grad()
def _greedy(model: Any, ids: Int[Tensor, "1 pos"], count: int) -> Int[Tensor, "1 pos"]:
    """The model's own greedy text."""
    writer, whole = _Writer(model), ids
    for _ in range(count):
        whole = torch.cat([whole, writer.next(whole, 1)], 1)
    return whole
