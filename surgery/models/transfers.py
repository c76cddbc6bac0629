"""Tensors on their way to the device of a model."""

import torch
from torch import Tensor


def send(x: Tensor, device: "torch.device | str") -> Tensor:
    """``x`` on a device; to a GPU from pinned memory, so that the processor does not wait for the copy.

    >>> send(torch.ones(2), "cpu")
    tensor([1., 1.])
    """
    if torch.device(device).type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
