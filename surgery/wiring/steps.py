"""Steps: the terms a wiring is made of, and the laws by which two of them mean the same.

A chain takes the residual stream ``x`` through its steps, one after another. ``Layer`` leaves ``x + u(x)``, ``u`` the
layer's update; ``Parallel`` leaves ``x + sum_b (b(x) - x)`` or ``mean_b b(x)`` over its branches; ``Scaled`` leaves
``x + factor * (body(x) - x)``. ``normal_form`` turns a chain into the one form of all that these laws make equal:

- one branch is no group; summed or averaged branches have no order, but each counts: ``{7|7}`` is not ``7``;
- a sum that is alone in a branch of a sum joins it; a mean never joins anything;
- factors of nested scalings multiply; factor 1 is nothing special; factor 0 and empty bodies do nothing.

The laws hold whatever the layers do to the stream, so nothing else is equal: ``7.attn 7.mlp`` is not ``7`` (where
attention and MLP read the same stream, as in GPT-J, they differ), and no factor moves into a group.

A few characters, or a few objects that share their parts, can stand for more steps than there is memory. So a wiring
has at most ``LONGEST`` of them, counted before they are made, and what it costs to make grows with their number.
"""

import math
import operator
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from surgery.outside import printable, shown

DEEPEST = 32  # groups within groups
LONGEST = 100_000  # steps in all, those inside groups and the groups too; also the layers of a model
BESIDE = 50  # characters of a text that an error shows on either side of its place
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
            lines += _marked(text, place)
        if n_layers is not None:
            start = n_layers // 3
            stop = start + max(1, n_layers // 6)
            works = example.format(start=start, stop=stop, last=stop - 1)
            lines += [f'for example, "{works}" runs layers {start}:{stop} of {n_layers} twice']
        super().__init__("\n".join(lines))
        self.sentence = sentence


def _marked(text: str, place: int) -> list[str]:
    """The text around a place, on one line that prints, and a caret under the place."""
    start, stop = max(0, place - BESIDE), place + BESIDE
    before, after = (printable(re.sub(r"\s", " ", part)) for part in (text[start:place], text[place:stop]))
    before, after = ("..." if start else "") + before, after + ("..." if stop < len(text) else "")
    columns = sum(unicodedata.east_asian_width(letter) in "WF" for letter in before) + len(before)
    columns -= sum(unicodedata.category(letter) in ("Mn", "Me") for letter in before)  # accents stand on others
    return [f"    {before}{after}", "    " + " " * columns + "^"]


@dataclass(frozen=True)
class Layer:
    """One layer of the model, or one sublayer of it."""

    index: int
    part: Part | None = None

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorting key of steps: a total order, whole layers before sublayers before groups."""
        return 0, self.part or "", self.index


@dataclass(frozen=True)
class Parallel:
    """Branches that read the same stream: their effects summed, or their outputs averaged."""

    branches: "tuple[Chain, ...]"
    mean: bool = False

    @cached_property
    def order(self) -> tuple[Any, ...]:
        """Sorting key of steps; kept, so that groups within groups do not make it again and again."""
        return 1, self.mean, tuple(map(_order, self.branches))


@dataclass(frozen=True)
class Scaled:
    """A chain whose effect on the stream is multiplied by ``factor``."""

    factor: int | float
    body: "Chain"

    @cached_property
    def order(self) -> tuple[Any, ...]:
        """Sorting key of steps; kept, so that groups within groups do not make it again and again."""
        return 2, self.factor, _order(self.body)


Step = Layer | Parallel | Scaled
Chain = tuple[Step, ...]


def normal_form(chain: Iterable[Step], n_layers: int) -> Chain:
    """Return the one form that all chains of the same meaning share, built from the inside out.

    Raises WiringError for a layer that the model does not have, a factor that is not finite, too many steps and too
    many groups within groups; TypeError for what is no step, index or factor. Cost: linear in the number of steps.

    >>> normal_form((Scaled(2, (Scaled(0.5, (Layer(3),)),)), Parallel(((Layer(4),), ()))), n_layers=12)
    (Layer(index=3, part=None), Layer(index=4, part=None))
    """
    return _Normal(n_layers).chain(chain)


class _Normal:
    """Builds a normal form, and counts what it reads: each step, and each empty branch or body as one."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers, self.size = n_layers, 0

    def error(self, sentence: str) -> WiringError:
        return WiringError(sentence, self.n_layers)

    def count(self) -> None:
        self.size += 1
        if self.size > LONGEST:
            raise self.error(too_long())

    def chain(self, chain: Iterable[Step], nested: int = 0) -> Chain:
        if nested > DEEPEST:
            raise self.error(too_deep())
        steps: list[Step] = []
        for step in chain:
            self.count()
            steps += self.step(step, nested)
        return tuple(steps)

    def inside(self, chain: Iterable[Step], nested: int) -> Chain:
        steps = self.chain(chain, nested + 1)
        if not steps:
            self.count()
        return steps

    def step(self, step: Step, nested: int) -> Chain:
        match step:
            case Layer(index, part):
                index = operator.index(index)
                if not 0 <= index < self.n_layers:
                    raise self.error(no_layer(index, self.n_layers))
                if not (part is None or (isinstance(part, str) and part in ("attn", "mlp"))):
                    raise self.error(f"a layer has the parts attn and mlp, not {quoted(part)}")
                return (layer(index, part),)
            case Scaled(factor, body):
                return self.scaled(_finite(factor), self.inside(body, nested))
            case Parallel(branches, mean):
                mean, bodies = _truth(mean), list[Chain]()
                for body in (self.inside(branch, nested) for branch in branches):
                    match body:
                        case (Parallel(merged, mean=False),) if not mean:
                            bodies += merged
                        case _ if body or mean:  # an empty branch adds nothing to a sum, but counts in a mean
                            bodies.append(body)
                if len(bodies) < 2 or not any(bodies):
                    return bodies[0] if bodies else ()
                return (Parallel(tuple(sorted(bodies, key=_order)), mean),)
        raise TypeError(f"a step of a wiring is a Layer, a Parallel or a Scaled, not {shown(step)}")

    def scaled(self, factor: float, body: Chain) -> Chain:
        match body:
            case (Scaled(inner_factor, inner_body),):
                factor, body = factor * inner_factor, inner_body
        if not math.isfinite(factor):
            raise self.error(f"a factor must be a finite number, not {factor}")
        if factor in (0, 1):
            return body if factor else ()
        return (Scaled(factor, body),) if body else ()


@lru_cache(maxsize=10_000)
def layer(index: int, part: Part | None) -> Layer:
    """The layer, or a sublayer of it, always the same object: thousands of wirings then take a tenth of the memory."""
    return Layer(index, part)


def _finite(factor: Any) -> float:
    if isinstance(factor, (str, bytes, bytearray)):  # which float reads
        raise TypeError(f"a factor is a number, not {quoted(factor)}")
    try:
        return float(factor)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
    except ValueError:  # a Decimal's signalling NaN
        return math.nan


def _truth(value: Any) -> bool:
    try:
        return bool(value)
    except ValueError:  # an array of several
        raise TypeError(f"a group is a mean or is none, {shown(value)} says neither") from None


def _order(chain: Chain) -> tuple[Any, ...]:
    return tuple(step.order for step in chain)


def size_of(chain: Iterable[Step]) -> int:
    """How many steps a chain in normal form has, groups and what is inside them counted; an empty branch is one."""
    return sum(1 + sum(max(1, size_of(body)) for body in _bodies(step)) for step in chain)


def _bodies(step: Step) -> "tuple[Chain, ...]":
    """The chains inside a group; a layer has none."""
    match step:
        case Scaled(_, body):
            return (body,)
        case Parallel(branches):
            return branches
    return ()


def executions(chain: Iterable[Step]) -> Iterator[Layer]:
    """Yield every layer that runs in a chain, from left to right, inside groups too."""
    for step in chain:
        if isinstance(step, Layer):
            yield step
        for body in _bodies(step):
            yield from executions(body)


def in_parallel(chain: Chain, mean: bool = False) -> Chain:
    """Make the steps of a chain the branches of one group."""
    return (Parallel(tuple((step,) for step in chain), mean),)


def repeat(chain: Chain, times: int) -> Chain:
    """Return the chain run ``times`` times; WiringError if that is no number of times, or too long a chain."""
    return chain * require_times(size_of(chain), times)


def require_times(size: int, times: int) -> int:
    """Return how many times ``size`` steps run; WiringError if that is no number of times, or too many steps."""
    times = operator.index(times)
    if times < 1:
        raise WiringError(f"a group runs at least once, not {shown(times)} times")
    if size * times > LONGEST:
        raise WiringError(f"{shown(times)} times {size} steps are more than the {LONGEST} that a wiring may have")
    return times


def require_layers(n_layers: int) -> int:
    """Return the number of layers of a model as a plain int; WiringError if no model has so many."""
    n_layers = operator.index(n_layers)
    if n_layers < 1:
        raise WiringError(f"a model has at least one layer, not {shown(n_layers)}")
    if n_layers > LONGEST:
        raise WiringError(f"a model has at most {LONGEST} layers, not {shown(n_layers)}")
    return n_layers


def require_text(text: str, form: str) -> str:
    """Return a text as it is; TypeError for anything else."""
    if not isinstance(text, str):
        raise TypeError(f"{form} is a text, not {quoted(text)}")
    return text


def extend(indices: list[int], more: range) -> None:
    """Add a span of layers to a list; WiringError, before it grows, if that is too long a wiring."""
    if len(indices) + len(more) > LONGEST:
        raise WiringError(too_long())
    indices += more


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
    return f"there is no layer {shown(index)} in a model of {n_layers} layers, they are 0 to {n_layers - 1}"


def too_deep() -> str:
    """Word the error of too many nested groups."""
    return f"groups can be nested {DEEPEST} deep at most"


def too_long() -> str:
    """Word the error of too many steps."""
    return f"a wiring has at most {LONGEST} steps, those inside groups and the groups counted"


def quoted(value: Any) -> str:
    """A value as Python would write it, for a message, and not too long."""
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)
