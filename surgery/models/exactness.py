"""How far two computations of the same thing are apart, and how far they may be.

A difference is always relative: the largest difference over the largest value expected.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from surgery.models.errors import ModelError

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@runtime_checkable
class Opened(Protocol):
    """What this needs to know of a ``Stack``."""

    name: str
    tolerance: float
    d_vocab: int
    n_ctx: int
    device: torch.device


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value expected."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def rebuilt_tolerance(stack: Opened) -> float:
    """How far a rebuilt model may be from the wiring it was built from: the stack's own tolerance, but at least 1e-5.

    Many models take norms or softmax in single precision whatever their weights, and not every way of running them
    does so alike.
    """
    return max(stack.tolerance, 1e-5)


def probe_ids(stack: Opened, spare: int = 0) -> Int[Tensor, "2 pos"]:
    """Two prompts of up to 8 random tokens, the same ones for the same vocabulary; ``spare`` positions of the context
    stay free."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(stack.d_vocab, (2, min(8, stack.n_ctx - spare)), generator=generator).to(stack.device)


def require_same(found: Tensor, expected: Tensor, stack: Opened, what: str) -> None:
    """Raise ``ModelError`` unless ``found`` (named by ``what``) is within ``rebuilt_tolerance`` of ``expected``."""
    difference, allowed = relative_difference(found, expected), rebuilt_tolerance(stack)
    if not difference <= allowed:
        raise ModelError(
            f"{stack.name}: {what} differs from running the wiring layer by layer by {difference:.1e} of the logits' "
            f"size, allowed is {allowed:.0e}"
        )
