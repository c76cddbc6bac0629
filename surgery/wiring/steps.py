"""Steps: the terms a wiring is made of, and the laws by which two of them mean the same.

A chain takes the residual stream ``x`` through its steps, one after another. ``Layer`` leaves ``x + u(x)``, ``u`` the
layer's update; ``Parallel`` leaves ``x + sum_b (b(x) - x)`` or ``mean_b b(x)`` over its branches; ``Scaled`` leaves
``x + factor * (body(x) - x)``. ``normal_form`` turns a chain into the one form of all that these laws make equal:

- one branch is no group; summed or averaged branches have no order, but each counts: ``{7|7}`` is not ``7``;
- a sum that is alone in a branch of a sum joins it; a mean never joins anything;
- factors of nested scalings multiply; factor 1 is nothing special; factor 0 and empty bodies do nothing.

The laws hold whatever the layers do to the stream, so nothing else is equal: ``7.attn 7.mlp`` is not ``7`` (where
attention and MLP read the same stream, as in GPT-J, they differ), and no factor moves into a group.
"""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

DEEPEST = 32  # groups within groups
LONGEST = 100_000  # steps of a chain; a slip such as "(:)*10000000" must not eat the machine's memory
HALF_OPEN = "a span runs from its first number up to, but without, its second"

Part = Literal["attn", "mlp"]


class WiringError(ValueError):
    """An impossible wiring: one sentence, the offending place if there is one, and an example that works."""

    def __init__(
        self,
        sentence: str,
        n_layers: int | None = None,
        text: str | None = None,
        place: int = 0,
        example: str = ":{stop} {start}:",
    ) -> None:
        lines = [sentence]
        if text is not None:
            lines += ["    " + re.sub(r"\s", " ", text), "    " + " " * place + "^"]
        if n_layers is not None:
            start = n_layers // 3
            stop = start + max(1, n_layers // 6)
            works = example.format(start=start, stop=stop, last=stop - 1)
            lines += [f'for example, "{works}" runs layers {start}:{stop} of {n_layers} twice']
        super().__init__("\n".join(lines))
        self.sentence = sentence


@dataclass(frozen=True)
class Layer:
    """One layer of the model, or one sublayer of it."""

    index: int
    part: Part | None = None


@dataclass(frozen=True)
class Parallel:
    """Branches that read the same stream: their effects summed, or their outputs averaged."""

    branches: "tuple[Chain, ...]"
    mean: bool = False


@dataclass(frozen=True)
class Scaled:
    """A chain whose effect on the stream is multiplied by ``factor``."""

    factor: int | float
    body: "Chain"


Step = Layer | Parallel | Scaled
Chain = tuple[Step, ...]


def normal_form(chain: Iterable[Step], n_layers: int, nested: int = 0) -> Chain:
    """Return the one form that all chains of the same meaning share, built from the inside out.

    >>> normal_form((Scaled(2, (Scaled(0.5, (Layer(3),)),)), Parallel(((Layer(4),), ()))), n_layers=12)
    (Layer(index=3, part=None), Layer(index=4, part=None))
    """
    if nested > DEEPEST:
        raise WiringError(too_deep(), n_layers)
    return tuple(part for step in chain for part in _normal_step(step, n_layers, nested))


def _normal_step(step: Step, n_layers: int, nested: int) -> Chain:
    match step:
        case Layer(index, part):
            if not 0 <= operator.index(index) < n_layers:
                raise WiringError(no_layer(index, n_layers), n_layers)
            if part not in (None, "attn", "mlp"):
                raise WiringError(f"a layer has the parts attn and mlp, not {part!r}", n_layers)
            return (Layer(operator.index(index), part),)
        case Scaled(factor, body):
            factor, inner = float(factor), normal_form(body, n_layers, nested + 1)
            match inner:
                case (Scaled(inner_factor, inner_body),):
                    factor, inner = factor * inner_factor, inner_body
            if not math.isfinite(factor):
                raise WiringError(f"a factor must be a finite number, not {factor}", n_layers)
            if factor in (0, 1):
                return inner if factor else ()
            return (Scaled(factor, inner),) if inner else ()
        case Parallel(branches, mean):
            bodies: list[Chain] = []
            for body in (normal_form(branch, n_layers, nested + 1) for branch in branches):
                match body:
                    case (Parallel(merged, mean=False),) if not mean:
                        bodies += merged
                    case _ if body or mean:  # an empty branch adds nothing to a sum, but counts in a mean
                        bodies.append(body)
            if len(bodies) < 2 or not any(bodies):
                return bodies[0] if bodies else ()
            return (Parallel(tuple(sorted(bodies, key=_order)), bool(mean)),)
    raise TypeError(f"a step of a wiring is a Layer, a Parallel or a Scaled, not {step!r}")


def _order(chain: Chain) -> tuple[Any, ...]:
    """Sorting key of branches: a total order, whole layers before sublayers before groups."""
    return tuple(map(_step_order, chain))


def _step_order(step: Step) -> tuple[Any, ...]:
    match step:
        case Layer(index, part):
            return 0, part or "", index
        case Parallel(branches, mean):
            return 1, mean, tuple(map(_order, branches))
        case Scaled(factor, body):
            return 2, factor, _order(body)


def executions(chain: Iterable[Step]) -> Iterator[Layer]:
    """Yield every layer that runs in a chain, from left to right, inside groups too."""
    for step in chain:
        match step:
            case Layer():
                yield step
            case Scaled(_, body):
                yield from executions(body)
            case Parallel(branches):
                for branch in branches:
                    yield from executions(branch)


def in_parallel(chain: Chain, mean: bool = False) -> Chain:
    """Make the steps of a chain the branches of one group."""
    return (Parallel(tuple((step,) for step in chain), mean),)


def repeat(chain: Chain, times: int) -> Chain:
    """Return the chain run ``times`` times; WiringError if that is no number of times, or too long a chain."""
    if operator.index(times) < 1:
        raise WiringError(f"a group runs at least once, not {times} times")
    if len(chain) * times > LONGEST:
        raise WiringError(f"{times} times {len(chain)} steps are more than the {LONGEST} that a wiring may have")
    return chain * times


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut a list of layers into runs ``(first, last)`` that count up, or down over at least three.

    >>> list(runs([0, 1, 2, 4, 3, 4, 5, 9, 8, 7]))
    [(0, 2), (4, 4), (3, 5), (9, 7)]
    """
    start = 0
    while start < len(indices):
        up, down = (_reach(indices, start, stride) for stride in (1, -1))
        stop = down if down - start > 2 else up
        yield indices[start], indices[stop - 1]
        start = stop


def _reach(indices: Sequence[int], start: int, stride: int) -> int:
    """Return where the run that starts at ``start`` and goes on by ``stride`` stops, exclusively."""
    stop = start + 1
    while stop < len(indices) and indices[stop] == indices[stop - 1] + stride:
        stop += 1
    return stop


def no_layer(index: int, n_layers: int) -> str:
    """Word the error of a layer index outside the model."""
    return f"there is no layer {index} in a model of {n_layers} layers, they are 0 to {n_layers - 1}"


def too_deep() -> str:
    """Word the error of too many nested groups."""
    return f"groups can be nested {DEEPEST} deep at most"
