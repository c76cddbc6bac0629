"""A batch of prompts as token ids, and which of them are padding."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Token ids of several prompts, padded on the left or on the right to one length.

    >>> len(Tokens.of(torch.tensor([[1, 2, 3], [4, 5, 6]])))
    2
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]  # True where the token is real

    @classmethod
    def of(cls, tokens: "Tokens | Tensor") -> "Tokens":
        """``Tokens`` as they are, or made from ids [batch, pos] without padding.

        Raises ValueError for anything else.
        """
        if isinstance(tokens, Tokens):
            return tokens
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.ndim != 2:
            what = type(tokens).__name__
            if isinstance(tokens, Tensor):
                what = f"shape {list(tokens.shape)}, {tokens.dtype}"
            raise ValueError(f"tokens must be integer ids [batch, pos] or what stack.tokens(texts) returns, got {what}")
        unpadded = cls(tokens, torch.ones_like(tokens, dtype=torch.bool))
        unpadded.__dict__["padded_left"] = False  # known without looking
        return unpadded

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, prompts: slice) -> "Tokens":
        return Tokens(self.ids[prompts], self.mask[prompts])

    def batches(self, size: int) -> Iterator["Tokens"]:
        """Consecutive prompts, in as few batches of at most ``size`` as possible; their sizes differ by 1 at most."""
        count = math.ceil(len(self) / size)
        for i in range(count):
            yield self[math.ceil(i * len(self) / count) : math.ceil((i + 1) * len(self) / count)]

    def to(self, device: "torch.device | str") -> "Tokens":
        """The same prompts on another device."""
        return Tokens(self.ids.to(device), self.mask.to(device))

    def pad(self, count: int, side: str) -> "Tokens":
        """The same prompts with ``count`` more padding tokens on the ``left`` or ``right``."""
        amount = (count, 0) if side == "left" else (0, count)
        return Tokens(torch.nn.functional.pad(self.ids, amount), torch.nn.functional.pad(self.mask, amount))

    def ensemble(self, skip_first: bool = True) -> Bool[Tensor, "batch pos"]:
        """Which positions count in a measurement: the real tokens; with ``skip_first`` without each prompt's first.

        The first position attends to itself alone and often carries activations a hundred times the usual size.
        """
        return self.mask & (self.positions > 0) if skip_first else self.mask

    @cached_property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Position of each token in its own prompt, from 0; padding before it also has 0."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)

    @cached_property
    def padded_left(self) -> bool:
        """Whether any real token has padding before it; padding after it does not matter to a causal model."""
        return bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any())


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    n_ctx: int,
    max_length: int | None = None,
    prepend_bos: bool | None = None,
    padding_side: str = "right",
) -> Tokens:
    """Tokenize ``texts`` into one padded batch.

    Args:
        n_ctx: the most tokens that the model reads.
        max_length: cut prompts to this many tokens (the beginning-of-sequence token counts); None cuts nothing.
        prepend_bos: put the beginning-of-sequence token in front; None leaves that to the tokenizer.
        padding_side: ``"right"`` or ``"left"``.

    Raises:
        ValueError: there is no text, or one has fewer than 2 tokens, more than ``n_ctx``, or words that the tokenizer
            does not know; the message names the first such prompt.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("there is no text to tokenise")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    rows = [list(row) for row in tokenizer(texts, return_attention_mask=False)["input_ids"]]
    bos, padding, end = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    if prepend_bos is not None and bos is not None:
        rows = [row[1:] if row[:1] == [bos] else row for row in rows]
        rows = [[bos, *row] for row in rows] if prepend_bos else rows
    rows = [row[:max_length] for row in rows]
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        where = f"prompt {i + 1} ({text[:40]!r}{'...' if len(text) > 40 else ''})"
        if len(row) < 2:
            raise ValueError(f"{where} has {len(row)} token{'s' * (len(row) != 1)}; a prompt needs at least 2")
        if len(row) > n_ctx:
            raise ValueError(f"{where} has {len(row)} tokens, the model reads {n_ctx}; cut it with max_length={n_ctx}")
        if padding is not None and padding != end and padding in row:
            raise ValueError(f"{where} contains words that this model's tokenizer does not know")
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long) + (padding or 0)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), True
    return Tokens(ids, mask)
