"""The conditions under which a model is measured, whatever the caller has set: nothing random, no autocast."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from surgery.models.scopes import Scope, scope


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
    _number_format.set(opened)
    if torch.get_default_device().type != "cpu":
        cpu = torch.device("cpu")
        opened.undoing(lambda: cpu.__exit__(None, None, None) if torch.get_default_device().type == "cpu" else None)
        cpu.__enter__()


class _NumberFormat:
    """Torch's default number format, which all threads share: the last to leave float32 puts back what was there."""

    def __init__(self) -> None:
        self._before = torch.float32
        self._users: set[Scope] = set()
        self._changing = threading.RLock()

    def set(self, opened: Scope) -> None:
        """Make it float32 until the scope closes."""
        if torch.get_default_dtype() == torch.float32 and not self._users:
            return
        with self._changing:
            if not self._users:
                self._before = torch.get_default_dtype()
            opened.undoing(partial(self._leave, opened))
            self._users.add(opened)
            torch.set_default_dtype(torch.float32)

    def _leave(self, opened: Scope) -> None:
        with self._changing:
            self._users.discard(opened)
            if not self._users:
                torch.set_default_dtype(self._before)


_number_format = _NumberFormat()
