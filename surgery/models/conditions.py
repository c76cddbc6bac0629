"""The conditions under which a model is measured, whatever the caller has set: nothing random, no autocast."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def measuring(training: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Context manager: modules that are in ``training`` mode are in evaluation mode (no dropout, no gradient
    checkpointing), autocast is off, and torch's defaults are its own; then everything is as before."""
    try:
        for module in training:
            vars(module)["training"] = False  # as the attribute, without torch's search for what it might be
        with ExitStack() as restored:
            if torch.is_autocast_enabled(device.type):
                restored.enter_context(torch.autocast(device.type, enabled=False))
            restored.enter_context(defaults())
            yield
    finally:
        for module in training:
            vars(module)["training"] = True


@contextmanager
def defaults() -> Iterator[None]:
    """Context manager: new tensors are float32 and on the CPU unless said otherwise."""
    with ExitStack() as restored:
        if (dtype := torch.get_default_dtype()) != torch.float32:
            restored.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            restored.enter_context(torch.device("cpu"))
        yield
