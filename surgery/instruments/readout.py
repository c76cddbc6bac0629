"""Logits of many streams: a portion at a time, in single precision or better, with a head that can be kept linear.

The logits of a whole batch at a large vocabulary would take gigabytes, so read out many tokens by ``portions``:

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.random_network())
>>> x = torch.randn(5, stack.d_model)
>>> round(sum(float(log_probabilities(stack, x[rows]).exp().sum()) for rows in portions(stack, x)), 4)
5.0

Whoever wants the probability of a few words only reads the ``logits`` and their ``normaliser``, which makes no copy of
them: on a vocabulary of 262,144 words that takes half of the time of ``log_probabilities``.

Cost: one readout a vector. Memory: ``LOGITS_AT_ONCE`` numbers, or those of ``LEAST_AT_ONCE`` vectors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from surgery.models.norms import FrozenNorm
from surgery.models.scopes import replaced_forward
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

LOGITS_AT_ONCE = 2**24  # 64 MiB of float32
LEAST_AT_ONCE = 128  # vectors: for fewer, reading the matrix of the head takes longer than the arithmetic
_IN_CACHE = 2**18  # numbers


def portions(stack: Stack, x: Float[Tensor, "row ..."] | Int[Tensor, "row ..."]) -> Iterator[Int[Tensor, " some"]]:
    """Yield index chunks small enough to read out at once, together all rows of ``x``, on its device."""
    yield from torch.arange(len(x), device=x.device).split(at_once(stack))


def at_once(stack: Stack) -> int:
    """How many vectors to read out at once."""
    return max(LEAST_AT_ONCE, LOGITS_AT_ONCE // stack.d_vocab)


def logits(stack: Stack, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Return the model's logits of streams that leave its last layer, in float32 or float64."""
    y = stack.readout(x)
    return y if y.dtype == torch.float64 else y.float()


def log_probabilities(stack: Stack, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Return the log-probabilities (nats) of the next token, in float32 or float64."""
    return logits(stack, x).log_softmax(-1)


def normaliser(logits: Float[Tensor, "row d_vocab"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Return the largest logit of every row, and the sum of ``exp(logit - largest)`` over its words.

    The log-probability of a word is ``logit - largest - log(sum)``, and the largest is alone where the sum is below 2.
    The sum is NaN where the logits give no probabilities: one of them is NaN or infinitely large, or all are -inf.

    >>> logits = torch.tensor([[1.0, 3.0, 2.0]])
    >>> largest, total = normaliser(logits)
    >>> torch.allclose(logits - largest - total.log(), logits.log_softmax(1))
    True
    """
    rows = len(logits) if logits.is_cuda else max(1, _IN_CACHE // logits.shape[-1])
    largest = [part.amax(-1) for part in logits.split(rows)]
    totals = [part.sub(top[:, None]).exp_().sum(-1) for part, top in zip(logits.split(rows), largest, strict=True)]
    return torch.cat(largest), torch.cat(totals)


def predicting_positions(
    tokens: Tokens, mask: Bool[Tensor, "prompt pos"] | None = None
) -> Bool[Tensor, "prompt pos_minus_1"]:
    """Mark the tokens (of ``mask``, all real ones by default) that a real token follows."""
    return (tokens.mask if mask is None else mask)[:, :-1] & tokens.mask[:, 1:]


def final_norm(stack: Stack) -> FrozenNorm | None:
    """Return the norm before the head, which gives its denominators; None for a model without one."""
    module = stack.fastest_engine.module.get_submodule(stack.model.ln_final.name)
    if isinstance(getattr(module, "original_component", module), nn.Identity):
        return None
    probe = torch.randn(4, stack.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return FrozenNorm(module, probe.to(stack.device, stack.dtype))


@contextmanager
def frozen_head(stack: Stack, x: Float[Tensor, "row d_model"]) -> Iterator[None]:
    """Context manager: ``stack.readout`` of as many vectors keeps the final norm's denominators at those of ``x``.

    A model without a final norm reads out as usual. Raises ValueError for a norm whose denominator cannot be found.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.random_network())
    >>> x = torch.randn(3, stack.d_model)
    >>> with frozen_head(stack, x):
    ...     twice = stack.readout(2 * x)
    >>> bool(torch.allclose(twice, 2 * stack.readout(x), atol=1e-4))
    True
    """
    norm = final_norm(stack)
    if norm is None:
        yield
        return
    with torch.no_grad():
        scale = norm.scale(x)

    def forward(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return norm.with_state(y, scale.reshape(*y.shape[:-1], 1))

    with replaced_forward(norm.module, forward):
        yield
