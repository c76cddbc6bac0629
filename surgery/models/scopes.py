"""Changes to a model that act for their caller alone and end with the call, whatever happens.

A ``Scope`` is a stretch of execution: one call of a Stack, or the inside of ``stack.frozen``. It records every change
before it makes it and undoes all of them when it closes. Closing is begun again where an interruption (Ctrl-C) came
into it, and what even that left is undone when the scope around it closes or the model is next used.

Its *stand-ins*, which run in place of a module's own code, act only for the thread (or asyncio task) that opened the
scope. Whoever else calls the module meanwhile gets the module's own answer; so does everybody once the scope is closed,
even from a stand-in that an interruption left where it was.

>>> import torch
>>> module = torch.nn.Identity()
>>> with scope() as opened:
...     opened.replace(module, FORWARD, lambda x: x + 1)
...     module(1), own(module, FORWARD)(1)
(2, 1)
>>> module(1), "forward" in vars(module)
(1, False)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from torch import nn

FORWARD = "forward"  # the module's own computation: hooks on the module run around it
CALL = "_compiled_call_impl"  # the whole call, hooks included: what torch asks for first; module.compile() sets it

Result = TypeVar("Result")
_absent = object()
_changing = threading.RLock()  # held for a few instructions: stand-ins of several threads can share a module
_open: "ContextVar[tuple[Scope, ...]]" = ContextVar("_open", default=())  # those of this thread or asyncio task


class Scope:
    """Changes that are undone together. Use ``within`` or ``scope``, which close it on every way out."""

    def __init__(self) -> None:
        self.alive = True
        self._undo: list[Callable[[], Any]] = []
        self.inside: set[Scope] = set()
        around = [scope for scope in _open.get() if scope.alive]
        self._outer = around[-1] if around else None
        if self._outer is not None:
            self._outer.inside.add(self)
        _open.set((*around, self))

    def acts(self) -> bool:
        """Whether it is open, and was opened by this thread or asyncio task."""
        return self.alive and self in _open.get()

    def undoing(self, undo: Callable[[], Any]) -> None:
        """Have ``undo`` called when the scope closes. Call this before making the change: ``undo`` may run twice."""
        self._undo.append(undo)

    def replace(self, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        """Run ``call`` in place of the module's ``FORWARD`` or ``CALL``."""
        self._stand_in(module, name, lambda _: call)

    def around(self, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        """Run ``call(inner, *args, **kwargs)`` in place of the module's ``FORWARD`` or ``CALL``.

        ``inner`` is what would run without it: the module's own, or a stand-in that was there before.
        """
        self._stand_in(
            module, name, lambda stand_in: lambda *args, **kwargs: call(stand_in.below(self), *args, **kwargs)
        )

    def _stand_in(self, module: nn.Module, name: str, made: "Callable[[StandIn], Callable[..., Any]]") -> None:
        with _changing:
            there = vars(module).get(name)
            stand_in = there if isinstance(there, StandIn) else StandIn(module, name)
            self.undoing(stand_in.leave)
            stand_in.calls = (*stand_in.calls, (self, made(stand_in)))
            vars(module)[name] = stand_in

    def close(self) -> None:
        """Undo everything, the last change first. Closing twice is closing once."""
        if not (self.alive or self._undo or self.inside):
            return
        self.alive = False  # from here on, none of its stand-ins acts
        for scope in tuple(self.inside):
            scope.close()
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        _open.set(tuple([scope for scope in _open.get() if scope is not self]))
        if self._outer is not None:
            self._outer.inside.discard(self)


class StandIn:
    """What a module has in place of its own code while scopes replace it; for all others it calls the module's own."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.before = vars(module).get(name, _absent)  # accelerate and others keep theirs there
        self.own: Callable[..., Any] = getattr(module, name) or module._call_impl  # noqa: SLF001 (torch's other one)
        self.calls: tuple[tuple[Scope, Callable[..., Any]], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for scope, call in reversed(self.calls):
            if scope.acts():
                return call(*args, **kwargs)
        return self.own(*args, **kwargs)

    def below(self, upper: Scope) -> Callable[..., Any]:
        """What runs without the stand-in of ``upper``."""
        calls: list[Callable[..., Any]] = [self.own]
        for scope, call in self.calls:
            if scope is upper:
                break
            if scope.acts():
                calls.append(call)
        return calls[-1]

    def leave(self) -> None:
        """Drop the calls of closed scopes; with the last, the module has again what it had before."""
        with _changing:
            self.calls = tuple([(scope, call) for scope, call in self.calls if scope.alive])
            if self.calls or vars(self.module).get(self.name) is not self:
                return
            if self.before is _absent:
                del vars(self.module)[self.name]
            else:
                vars(self.module)[self.name] = self.before

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.module, self.name, None if self.before is _absent else self.before)


def _copied(module: nn.Module, name: str, before: Any) -> Any:
    """What a copy of a module, made while a stand-in is in place, has there: what the module itself computes."""
    return partial(getattr(type(module), name), module) if before is None else before


def own(module: nn.Module, name: str) -> Callable[..., Any]:
    """A module's own ``FORWARD`` or ``CALL``, whatever stands in for it."""
    there = vars(module).get(name)
    return (there if isinstance(there, StandIn) else StandIn(module, name)).own


def is_replaced(module: nn.Module) -> bool:
    """Whether the module has a forward that is not its class', stand-ins aside."""
    there = vars(module).get(FORWARD, _absent)
    return (there.before if isinstance(there, StandIn) else there) is not _absent


def within(body: Callable[[Scope], Result]) -> Result:
    """Run ``body`` with a scope of its own, and return what it gives."""
    opened = Scope()
    try:
        try:
            return body(opened)
        finally:
            opened.close()
    finally:
        opened.close()  # again: an interruption may have come into the first, or before it


@contextmanager
def scope() -> Iterator[Scope]:
    """Context manager: a scope that is open inside."""
    opened = Scope()
    try:
        try:
            yield opened
        finally:
            opened.close()
    finally:
        opened.close()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context manager: ``forward`` runs instead of the module's own; hooks on the module run."""
    with scope() as opened:
        opened.replace(module, FORWARD, forward)
        yield


class ForAll:
    """A setting of the whole process: the first scope that wants it changes it, the last puts back what was there.

    ``read`` gives the setting, ``write`` changes it, and ``wanted`` is what scopes want it to be.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any], wanted: Any) -> None:
        self._read, self._write, self._wanted = read, write, wanted
        self._before: Any = None
        self._users: set[Scope] = set()
        self._changing = threading.RLock()

    def until_closed(self, opened: Scope) -> None:
        """Have the setting as it is wanted until the scope closes."""
        if not self._users and self._read() == self._wanted:
            return
        with self._changing:
            if not self._users:
                self._before = self._read()
            opened.undoing(partial(self._leave, opened))
            self._users.add(opened)
            self._write(self._wanted)

    def _leave(self, opened: Scope) -> None:
        with self._changing:
            self._users.discard(opened)
            if not self._users:
                self._write(self._before)
