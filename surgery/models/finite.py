"""Whether the numbers of a model are numbers, looked at once when it is opened."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from surgery.models.weights_hash import unwrapped


def not_finite(model: nn.Module) -> str:
    """Which weights of a model are not finite: the first tensor with its first such index, and how many; else empty.

    Parameters must be finite. Buffers may hold infinities, which masks are made of, but not NaN. Cost: one sum over all
    weights, 0.1 s for 135 million.

    >>> not_finite(nn.Linear(2, 3))
    ''
    """
    looked_at = [(name, _bad(weight, torch.isfinite)) for name, weight in model.named_parameters()]
    looked_at += [(name, _bad(buffer, _is_number)) for name, buffer in model.named_buffers()]
    broken = [(name, bad) for name, bad in looked_at if bad is not None]
    if not broken:
        return ""
    name, bad = broken[0]
    first = tuple(int(axis[0]) for axis in torch.nonzero(bad, as_tuple=True))
    others = f", and {len(broken) - 1} other tensors have some" if broken[1:] else ""
    return (
        f"{unwrapped(name)} has {int(bad.sum()):,} of {bad.numel():,} entries that are not finite (NaN or "
        f"infinity), the first at {list(first)}{others}"
    )


def _bad(tensor: Tensor, accepts: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Where a tensor has entries that ``accepts`` refuses; None if it has none."""
    if not tensor.is_floating_point() or tensor.is_meta or torch.isfinite(tensor.detach().sum()):
        return None  # a sum is finite only if all its terms are, and much quicker than a look at each
    bad = ~accepts(tensor.detach())
    return bad if bad.any() else None


def _is_number(tensor: Tensor) -> Tensor:
    return ~torch.isnan(tensor)
