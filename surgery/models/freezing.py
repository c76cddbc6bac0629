"""The norms that read the stream of a model: their state in a run, and running them with a given state."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.models.engine import Engine
from surgery.models.norms import FrozenNorm
from surgery.models.scopes import FORWARD, Scope, within

State = dict[str, Float[Tensor, "batch pos numbers"]]  # denominator and perhaps mean of every norm, by hook name


def norms(engine: Engine, probes: Callable[[int], Tensor]) -> dict[str, FrozenNorm]:
    """The norms that read the stream, by hook name; ``probes(layer)`` are vectors [n, width] to try them on.

    Raises ValueError for a norm whose denominator cannot be determined.
    """
    with torch.no_grad():
        return {
            f"blocks.{layer}.{name}.hook_scale": FrozenNorm(module, probes(layer))
            for layer, parts in enumerate(engine.parts)
            for name, module in parts.norms.items()
        }


def recorded(norms: dict[str, FrozenNorm], run: Callable[[], Any]) -> State:
    """The state of live norms during ``run``; of a norm that runs several times, the last."""
    state: State = {}

    def recording(norm: FrozenNorm, name: str) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            state[name] = norm.state(x)
            return norm.forward(x, *args, **kwargs)

        return forward

    def record(scope: Scope) -> State:
        for name, norm in norms.items():
            scope.replace(norm.module, FORWARD, recording(norm, name))
        run()
        return state

    return within(record)


def freeze(scope: Scope, norms: dict[str, FrozenNorm], state: State) -> None:
    """Until the scope closes, norms use the denominators and means of ``state``, also for copies of the batch."""
    for name, norm in norms.items():
        scope.replace(norm.module, FORWARD, _with_state(norm, state[name]))


def _with_state(norm: FrozenNorm, state: Tensor) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copies, rest = divmod(len(x), len(state))
        if not copies or rest or x.shape[1:-1] != state.shape[1:-1]:
            raise ValueError(
                f"frozen norms belong to a batch of shape {list(state.shape[:-1])}, the stream has {list(x.shape[:-1])}"
            )
        return norm.with_state(x, state if copies == 1 else state.repeat(copies, 1, 1))

    return forward
