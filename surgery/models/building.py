"""TransformerLens builds a bridge in about half the time: by the same steps, which look at less.

Most of that time goes to its search for hooks, which asks every component for each name in its ``dir``. A component has
some hundred names, nearly all of them methods of its class, and methods are no hooks. The rest goes to copying hook
points, most of whose state is empty.
"""

import builtins
import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import transformer_bridge

from surgery.models.scopes import ForAll, scope

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def quickly() -> Iterator[None]:
    """Context manager: bridges are built with the same hooks under the same names, in about half the time.

    Fresh modules begin with random weights, which are then replaced: the caller's random numbers stay where they were.
    """
    with torch.random.fork_rng(devices=[]), scope() as opened:
        for step in _steps:
            step.until_closed(opened)
        yield


def _names(component: Any) -> list[str]:
    """What ``dir`` gives for a module, without the methods and constants of its class."""
    kind: Any = type(component)
    if kind.__dir__ is not nn.Module.__dir__:
        return builtins.dir(component)
    own = (vars(component), component._parameters, component._modules, component._buffers)  # noqa: SLF001
    names = {name for part in own for name in part if name[0].isalpha()}  # private ones are skipped anyway
    return sorted(names.union(_of_class(kind)))


@cache
def _of_class(kind: Any) -> tuple[str, ...]:
    """The attributes of a class that may be a hook or compute one."""
    found = ((name, inspect.getattr_static(kind, name, None)) for name in builtins.dir(kind))
    return tuple(name for name, value in found if isinstance(value, HookPoint) or _computes(value))


def _computes(value: Any) -> bool:
    """Whether a class attribute is a property, of any kind."""
    method = inspect.isroutine(value) or isinstance(value, classmethod | staticmethod)
    return hasattr(type(value), "__get__") and not method


def _copied(hook: HookPoint, memo: dict[int, Any]) -> HookPoint:
    """What ``copy.deepcopy`` gives for a hook point; what is empty is not sent through it."""
    memo[id(hook)] = again = HookPoint.__new__(HookPoint)
    for name, value in vars(hook).items():
        empty = type(value) in _CONTAINERS and not value
        vars(again)[name] = type(value)() if empty else copy.deepcopy(value, memo)
    return again


def _read(owner: Any, name: str) -> Any:
    return vars(owner).get(name)


def _write(owner: Any, name: str, value: Any) -> None:
    if value is not None:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


_steps = [
    ForAll(partial(_read, owner, name), partial(_write, owner, name), quick)
    for owner, name, quick in ((transformer_bridge, "dir", _names), (HookPoint, "__deepcopy__", _copied))
    if name not in vars(owner)  # else TransformerLens has its own
]
