"""Muon for CPUs: torch's, but several times as fast, with matrices of one shape at once and in float32.

``torch.optim.Muon`` orthogonalises one matrix at a time in bfloat16, which most CPUs multiply six times as slowly as
float32; in a small model that was four fifths of a training step. Here matrices of one shape are one batched product.
Rate, momentum, decay and state are torch's, so checkpoints of the one open in the other. ``HalfMuon`` iterates in
bfloat16 after all, for training in that precision on CPUs that multiply it in tiles (AMX): eight times as fast there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

AT_ONCE = 2**24  # numbers in a batch of matrices, at most


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with ``orthogonalised`` in place of its own; control: that one."""

    half = False  # whether to iterate in bfloat16 on a CPU too

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as torch's optimisers make it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, weights, gradients, momenta)
            for places in _same_shape(weights):
                updates = [self._update(group, gradients[i], momenta[i]) for i in places]
                steps = group["ns_coefficients"], group["ns_steps"], group["eps"], self.half
                rate = group["lr"] * torch.optim._muon._adjust_lr(1.0, group["adjust_lr_fn"], weights[places[0]].shape)  # noqa: SLF001
                for i, update in zip(places, orthogonalised(torch.stack(updates), *steps), strict=True):
                    weights[i].mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        return loss

    @staticmethod
    def _update(group: dict[str, Any], gradient: Tensor, momentum: Tensor) -> Tensor:
        momentum.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


class HalfMuon(Muon):
    """Muon that iterates in bfloat16, as torch's does."""

    half = True


def of_precision(precision: str) -> type[Muon]:
    """The Muon to train with in one of ``precisions.MIXED``: in bfloat16 only where this CPU is fast in it."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return HalfMuon if precision == "bf16" and tiles() else Muon


def orthogonalised(
    matrices: Float[Tensor, "matrix out in"],
    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
    half: bool = False,
) -> Float[Tensor, "matrix out in"]:
    """Bring the singular values of every matrix near 1, between .7 and 1.2, by Newton-Schulz iterations.

    The coefficients are Jordan's (2024). On a GPU, and with ``half`` on any device, they run in bfloat16. Cost:
    ``steps`` times three products of the smaller side.

    >>> torch.linalg.svdvals(orthogonalised(torch.randn(1, 8, 4))).max() < 1.3
    tensor(True)
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if half or matrices.is_cuda else torch.float32)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _same_shape(weights: Sequence[Tensor]) -> list[list[int]]:
    """The places of weights of the same shape, device and type, at most ``AT_ONCE`` numbers at a time."""
    batches: dict[Any, list[list[int]]] = {}
    for i, weight in enumerate(weights):
        groups = batches.setdefault((weight.shape, weight.device, weight.dtype), [[]])
        if groups[-1] and (len(groups[-1]) + 1) * weight.numel() > AT_ONCE:
            groups.append([])
        groups[-1].append(i)
    return [group for groups in batches.values() for group in groups]
