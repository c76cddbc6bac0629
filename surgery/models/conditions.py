"""The conditions under which a model is measured, whatever the caller has set: nothing random, no autocast."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from surgery.models.scopes import ForAll, Scope, scope

_number_format = ForAll(torch.get_default_dtype, torch.set_default_dtype, torch.float32)


def measure(opened: Scope, training: Sequence[nn.Module], device: torch.device, grad: bool = False) -> None:
    """Until the scope closes, modules that are in ``training`` mode are in evaluation mode (no dropout, no gradient
    checkpointing), autocast is off, torch's defaults are its own, and the graph is recorded only with ``grad``."""
    opened.undoing(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    torch.set_grad_enabled(grad)
    if training:
        opened.undoing(partial(_set_modes, training, True))
        _set_modes(training, False)
    if torch.is_autocast_enabled(device.type):
        opened.undoing(partial(torch.set_autocast_enabled, device.type, True))
        torch.set_autocast_enabled(device.type, False)
    set_defaults(opened)


def _set_modes(modules: Sequence[nn.Module], training: bool) -> None:
    for module in modules:
        vars(module)["training"] = training  # as the attribute, without torch's search for what it might be


@contextmanager
def defaults() -> Iterator[None]:
    """Context manager: new tensors are float32 and on the CPU unless said otherwise."""
    with scope() as opened:
        set_defaults(opened)
        yield


def set_defaults(opened: Scope) -> None:
    """Until the scope closes, new tensors are float32 and on the CPU unless said otherwise."""
    _number_format.until_closed(opened)
    if torch.get_default_device().type != "cpu":
        cpu = torch.device("cpu")
        opened.undoing(lambda: cpu.__exit__(None, None, None) if torch.get_default_device().type == "cpu" else None)
        cpu.__enter__()
