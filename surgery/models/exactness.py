"""How far two computations of the same thing differ, and how far they may.

Differences are always relative: the largest absolute difference over the largest absolute value expected.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from surgery.models.errors import ModelError

# Of a model of up to 12 layers; rounding adds up with depth (on Gemma 3 270M, 24 layers deep, up to 1e-5 in float32).
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@runtime_checkable
class StackLike(Protocol):
    """The attributes of a ``Stack`` that these functions read."""

    name: str
    tolerance: float
    n_layers: int
    d_vocab: int
    n_ctx: int
    device: torch.device


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a fraction of the largest absolute value expected.

    >>> relative_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    0.5
    """
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """The largest relative difference that counts as exact in weights of ``dtype``, ``depth`` layers deep.

    >>> tolerance(torch.float32, 24)
    2e-05
    """
    return TOLERANCES[dtype] * (_growth(depth) if dtype in (torch.float32, torch.float64) else 1.0)


def _growth(depth: int) -> float:
    return max(1.0, depth / 12)


def rerun_tolerance(stack: StackLike, depth: int = 0) -> float:
    """How far the same layers, run in another way, may differ: rebuilt as a model ``depth`` deep, or on more tokens.

    That is the stack's tolerance, but at least that of single precision: many models compute norms or softmax in it
    whatever their weights, and not every way of running them does so alike.
    """
    return max(stack.tolerance, TOLERANCES[torch.float32] * _growth(max(depth, stack.n_layers)))


def probe_ids(stack: StackLike, spare: int = 0, length: int = 8) -> Int[Tensor, "2 pos"]:
    """Two prompts of up to ``length`` random tokens, the same for one vocabulary; ``spare`` positions stay free.

    They begin alike: a causal model gives both the same logits in the first half. Raises ModelError for a model without
    room for them.
    """
    if stack.n_ctx <= spare:
        raise ModelError(
            f"{stack.name} has room for {stack.n_ctx} tokens by its configuration (max_position_embeddings); surgery "
            f"needs {spare + 1} or more to prove that it is opened exactly"
        )
    generator, size = torch.Generator().manual_seed(0), (2, min(length, stack.n_ctx - spare))
    ids = torch.randint(stack.d_vocab, size, generator=generator, device="cpu")
    ids[1, : size[1] // 2] = ids[0, : size[1] // 2]
    return ids.to(stack.device)


def require_same(actual: Tensor, expected: Tensor, stack: StackLike, what: str, depth: int = 0) -> None:
    """Raise ``ModelError`` unless ``actual`` (named by ``what``) is within ``rerun_tolerance`` of ``expected``."""
    difference, allowed = relative_difference(actual, expected), rerun_tolerance(stack, depth)
    if not difference <= allowed:
        raise ModelError(
            f"{stack.name}: {what} differs from running the wiring layer by layer by {difference:.1e} of the logits' "
            f"size, allowed is {allowed:.0e}"
        )
