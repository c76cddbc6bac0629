"""One call at a time: whoever else wants to measure the same model waits.

Models are not made for threads. TransformerLens' blocks keep the shape of a batch between one module and the next, some
rotary embeddings keep their table, and a mode (training or evaluation) is one for all. So there is a lock for every
model. It is held during a call of a Stack and not in between: not inside ``stack.frozen``, nor between two calls.
A call inside a call, in a tap, goes on at once; if it is of another model, it waits for that model's turn (two threads
that do so crosswise would wait for each other).

The lock belongs to the module that several Stacks and bridges of one model share. It is found by that module and kept
nowhere else, so models and Stacks can be copied and pickled as before.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from surgery.models.scopes import Scope, within

Result = TypeVar("Result")


class _Turn:
    """The lock of a model, the threads that wait for it, and the scope of the call that held it last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waiting: set[int] = set()
        self.scope: Scope | None = None

    def let_others(self) -> None:
        """Step back while others have been waiting: a lock goes to whoever asks first when it is free."""
        before = set(self.waiting)
        for _ in range(50):  # and then go on: it is a courtesy, nothing depends on it
            if not before & self.waiting:
                return
            time.sleep(0.001)


_turns: "weakref.WeakKeyDictionary[nn.Module, _Turn]" = weakref.WeakKeyDictionary()
_finding = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turns.clear)  # a child has none of the threads that hold locks


def take(module: nn.Module, body: Callable[[Scope], Result]) -> Result:
    """Run ``body`` with a scope of its own when it is this thread's turn to use ``module``; return what it gives."""
    turn = _turns.get(module)
    if turn is None:
        with _finding:
            turn = _turns.setdefault(module, _Turn())
    if turn.lock._is_owned():  # type: ignore[attr-defined] # noqa: SLF001 (threading.Condition asks so too)
        return within(body)
    me = threading.get_ident()
    if turn.waiting:
        turn.let_others()
    try:
        turn.waiting.add(me)
        with turn.lock:  # in C: no interruption comes between taking it and holding it
            turn.waiting.discard(me)
            if turn.scope is not None:
                turn.scope.close()  # if interruptions came even into the closing of the last call

            def first(opened: Scope) -> Result:
                turn.scope = opened
                return body(opened)

            return within(first)
    finally:
        turn.waiting.discard(me)
