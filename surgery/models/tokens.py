"""A batch of prompts as token ids, and which of them are padding."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from surgery.models.transfers import send


@dataclass(frozen=True)
class Tokens:
    """Token ids of several prompts, padded on the left or on the right to one length.

    The mask may be Hugging Face's ``attention_mask`` of ones and zeros. Raises ValueError if it has another shape.

    >>> len(Tokens.of(torch.tensor([[1, 2, 3], [4, 5, 6]])))
    2
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"]  # True where the token is real; made Boolean

    def __post_init__(self) -> None:
        if self.mask.shape != self.ids.shape:
            raise ValueError(f"the mask has shape {list(self.mask.shape)}, the ids have {list(self.ids.shape)}")
        object.__setattr__(self, "mask", self.mask.bool())

    @classmethod
    def of(cls, tokens: "Tokens | Tensor | Mapping[str, Any]") -> "Tokens":
        """``Tokens`` as they are, or made from ids [batch, pos] without padding, or from what a tokenizer returns.

        Raises ValueError for anything else.
        """
        if isinstance(tokens, Tokens):
            return tokens
        if isinstance(tokens, Mapping) and "input_ids" in tokens:
            batch, mask = cls.of(torch.as_tensor(tokens["input_ids"])), tokens.get("attention_mask")
            return batch if mask is None else cls(batch.ids, torch.as_tensor(mask, device=batch.ids.device))
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.ndim != 2:
            what = type(tokens).__name__
            if isinstance(tokens, Tensor):
                what = f"shape {list(tokens.shape)}, {tokens.dtype}"
            raise ValueError(f"tokens must be integer ids [batch, pos] or what stack.tokens(texts) returns, got {what}")
        unpadded = cls(tokens, torch.ones_like(tokens, dtype=torch.bool))
        unpadded.__dict__["padded_left"] = False  # known without looking
        return unpadded

    def __repr__(self) -> str:
        return f"Tokens({self.summary})"

    @property
    def summary(self) -> str:
        """How many prompts there are, how long they are, and on which side they are padded, in words."""
        lengths = self.mask.sum(1).tolist() or [0]
        low, high, total = min(lengths), max(lengths), sum(lengths)
        each = f"{high} tokens" if low == high else f"{low} to {high} tokens, {total:,} in all"
        side = "left" if self.padded_left else "right"
        padding = f"padded on the {side} to {self.ids.shape[1]}" if total < self.mask.numel() else "no padding"
        return f"{len(self)} prompt{'s' * (len(self) != 1)} of {each}, {padding}, on {self.ids.device}"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, prompts: "slice | Int[Tensor, ' prompt']") -> "Tokens":
        return Tokens(self.ids[prompts], self.mask[prompts])

    def batches(self, size: int) -> Iterator["Tokens"]:
        """Consecutive prompts, in as few batches of at most ``size`` as possible; their sizes differ by 1 at most."""
        count = math.ceil(len(self) / size)
        for i in range(count):
            yield self[math.ceil(i * len(self) / count) : math.ceil((i + 1) * len(self) / count)]

    def to(self, device: "torch.device | str") -> "Tokens":
        """The same prompts on another device."""
        return Tokens(send(self.ids, device), send(self.mask, device))

    def pad(self, count: int, side: str) -> "Tokens":
        """The same prompts with ``count`` more padding tokens on the ``left`` or ``right``."""
        amount = (count, 0) if side == "left" else (0, count)
        return Tokens(torch.nn.functional.pad(self.ids, amount), torch.nn.functional.pad(self.mask, amount))

    def known(self, n_vocab: int) -> "Tokens":
        """The same prompts; padding that the model has no embedding for is replaced by 0, as it is never read.

        Raises ValueError, naming the first prompt, for a real token that the model has no embedding for.
        """
        beyond = (self.ids < 0) | (self.ids >= n_vocab)
        if not beyond.any():
            return self
        if (real := beyond & self.mask).any():
            prompt, pos = real.nonzero()[0].tolist()
            raise ValueError(
                f"prompt {prompt + 1} has id {int(self.ids[prompt, pos])} at position {pos}, ids of this model are 0 "
                f"to {n_vocab - 1}; give a mask where such ids stand for padding"
            )
        return Tokens(self.ids.masked_fill(beyond, 0), self.mask)

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
    def last(self) -> Int[Tensor, " batch"]:
        """Where each prompt's last real token is, whatever the side of the padding: its logits say what comes next.

        ``logits[range(len(tokens)), tokens.last]`` [batch, d_vocab]. ValueError for a prompt that is all padding.

        >>> ids = torch.tensor([[5, 6, 7], [5, 6, 0]])
        >>> Tokens(ids, ids > 0).last.tolist(), Tokens(ids.flip(1), ids.flip(1) > 0).last.tolist()
        ([2, 1], [2, 2])
        """
        if not (real := self.mask.any(1)).all():
            raise ValueError(f"prompt {int((~real).nonzero()[0]) + 1} is all padding, it has no last token")
        return self.mask.long().cumsum(1).argmax(1)

    @cached_property
    def padded_left(self) -> bool:
        """Whether any real token has padding before it; padding after it does not matter to a causal model."""
        return bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any())


def encode(
    tokenizer: Any,
    texts: "str | Sequence[str]",
    n_ctx: int,
    n_vocab: int,
    max_length: int | None = None,
    prepend_bos: bool | None = None,
    padding_side: str = "right",
) -> Tokens:
    """Tokenize ``texts`` into one padded batch.

    Args:
        n_ctx: the most tokens that the model reads.
        n_vocab: how many ids the model has an embedding for.
        max_length: cut prompts to this many tokens (the beginning-of-sequence token counts); None cuts nothing.
        prepend_bos: put the beginning-of-sequence token in front; None leaves that to the tokenizer.
        padding_side: ``"right"`` or ``"left"``.

    Raises:
        ValueError: there is no text, or one has fewer than 2 tokens, more than ``n_ctx``, words that the tokenizer does
            not know, or tokens that the model does not; the message names the first such prompt.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("there is no text to tokenise")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    rows, bos = token_rows(tokenizer, texts), tokenizer.bos_token_id
    if prepend_bos and bos is None:
        raise ValueError("this tokenizer has no beginning-of-sequence token to put in front")
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
        if has_unknown_words(tokenizer, text, row):
            raise ValueError(f"{where} contains words that this model's tokenizer does not know")
        require_known(row, n_vocab, where)
    return padded(rows, tokenizer.pad_token_id, n_vocab, padding_side)


def token_rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as the tokenizer makes them; where a text brings its own beginning mark, only that one.

    Text from a chat template begins with the mark as a word, and the tokenizer puts another in front.
    """
    rows = [list(row) for row in tokenizer(list(texts), return_attention_mask=False)["input_ids"]]
    bos, mark = tokenizer.bos_token_id, tokenizer.bos_token
    if bos is None:
        return rows
    return [
        row[1:] if row[:2] == [bos, bos] and text.lstrip().startswith(mark) else row for row, text in zip(rows, texts)
    ]


def unended_rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """``token_rows`` of texts that go on: without the end mark that a tokenizer may add."""
    rows = token_rows(tokenizer, texts)
    end, mark = tokenizer.eos_token_id, tokenizer.eos_token or ""
    return [row[:-1] if end in row[-1:] and not text.endswith(mark) else row for row, text in zip(rows, texts)]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix of two token sequences.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((n for n, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def joined(prompt: str, answer: str, joiner: str = " ") -> str:
    """A prompt and its answer as one text, ``joiner`` between them unless there is white space at the seam already."""
    apart = not prompt or prompt[-1].isspace() or answer[0].isspace()
    return prompt + ("" if apart else joiner) + answer


def has_unknown_words(tokenizer: Any, text: str, row: Sequence[int]) -> bool:
    """Whether the tokenizer replaced a word of ``text`` by its token for unknown ones (not written in the text itself).

    Cost: none where no such token is among ``row``.
    """
    unknown = {tokenizer.unk_token}
    backend = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown.add(getattr(backend, "unk_token", None))  # what is used, whatever the tokenizer's own settings say
    for mark in unknown - {None}:
        token = tokenizer.convert_tokens_to_ids(mark)
        written = text.count(mark) + (token == tokenizer.bos_token_id) + (token == tokenizer.eos_token_id)
        if token is not None and list(row).count(token) > written:
            return True
    return False


def require_known(row: Sequence[int], n_vocab: int, where: str) -> None:
    """Raise ValueError if the model has no embedding for an id of ``row``; ``where`` names the prompt."""
    if (beyond := max(row, default=0)) >= n_vocab:
        raise ValueError(
            f"{where} has token id {beyond}, the model has {n_vocab} embeddings: its tokenizer knows more tokens than "
            "the model does; resize_token_embeddings adds them"
        )


def padded(rows: Sequence[Sequence[int]], padding: int | None, n_vocab: int, side: str = "right") -> Tokens:
    """Rows of ids as one batch. Padding is never read, so any id that the model knows will do for it."""
    fill = padding if padding is not None and 0 <= padding < n_vocab else 0
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), True
    return Tokens(ids, mask)


# Whatever ``Stack.run`` takes as a batch: besides ``Tokens``, ids [batch, pos], what a Hugging Face tokenizer returns,
# a text or several, and lists of ids.
Batch = Tokens | Tensor | Mapping[str, Any] | str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
