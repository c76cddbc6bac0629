r"""Wiring: the order in which the layers of a model run, as an immutable value. There is no model or torch in here.

A wiring is a chain of steps. Each step takes the residual stream ``x`` and leaves the stream that the next step reads:

==================  =======================================  ========================================
step                what it leaves                           notation
==================  =======================================  ========================================
``Layer``           ``x + u(x)``, ``u`` the layer's update   ``7``, ``7.attn``, ``7.mlp``
``Parallel``        ``x + sum_b (b(x) - x)``                 ``{3|4|5}`` or ``{*3:6}``, ``{3:5 | 7}``
``Parallel``, mean  ``mean_b b(x)``                          ``mean{*3:6}``
``Scaled``          ``x + factor * (body(x) - x)``           ``0.5*(3:6)``, ``0.5*7``
==================  =======================================  ========================================

The notation is Python's slices over layers (half-open, zero-based, negative and open ends, steps), one after the other
in the order in which they run, but an index outside the model is an error and never clipped. A number before a group
scales its effect, a number after a group repeats it: ``2*(3:6)`` is twice the update, ``(3:6)*2`` are two passes.

    ":"                                  the model as it is
    ":52 45:"                            layers 45 to 51 run twice
    ":10 (10:14)*3 14:"                  three times
    ":10 14:"                            without layers 10 to 13
    ":10 13:9:-1 14:"                    in reverse
    ":10 {*10:14} 14:"                   in parallel on the same input, updates summed (``{10|11|12|13}``)
    ":10 mean{*10:14} 14:"               in parallel, outputs averaged (Sun et al. 2024, arXiv 2407.09298)
    ":10 {10:12 | 12:14} 14:"            two chains in parallel
    ":7 7.attn 8.attn 7.mlp 8.mlp 9:"    sublayers; ``7:9.attn`` is ``7.attn 8.attn``
    ":20 0.5*(12:20) 20:"                a damped second pass

Two wirings are equal if they mean the same by the laws in ``surgery.wiring.steps``; ``str`` and ``parse`` are inverse.

>>> wiring = Wiring.of(12).repeat(4, 6).skip(9)
>>> wiring
Wiring.parse(":6 4:7 8:", 12)
>>> wiring == Wiring.parse("0:4 (4:6)*2 6 8:", 12), wiring.depth
(True, 13)
"""

import operator
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.outside import shown
from surgery.wiring import formats, notation
from surgery.wiring.steps import (
    HALF_OPEN,
    Chain,
    Layer,
    Parallel,
    Scaled,
    Step,
    WiringError,
    executions,
    in_parallel,
    normal_form,
    repeat,
    require_layers,
)

if TYPE_CHECKING:
    from surgery.wiring.drawing import Drawing

__all__ = [
    "Chain",
    "Layer",
    "Parallel",
    "Scaled",
    "Step",
    "Wiring",
    "WiringError",
]


@dataclass(frozen=True, repr=False)
class Wiring:
    """The order in which the layers of a model with ``n_layers`` run. A value: equality and hash are by meaning.

    Methods that take positions count the top-level steps of this wiring, negative positions from the end as in Python;
    in the untouched model they are the layers. So they compose from left to right: in ``Wiring.of(32).repeat(10, 14)``
    position 14 is the second pass of layer 10. A parallel or scaled group is one step, a sublayer too. Every method
    returns a new wiring, and raises ``WiringError`` for a span that is empty or leaves the wiring, and for more than
    ``LONGEST`` steps (``surgery.wiring.steps``), those inside groups counted; what is no number, step or text is a
    TypeError.

    Cost of one run: ``depth / n_layers`` forward passes. Control to compare with: ``Wiring.of(n_layers)``.
    """

    n_layers: int
    steps: Chain

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_layers", require_layers(self.n_layers))
        steps = normal_form(self.steps, self.n_layers)
        if not steps:
            raise WiringError("this wiring is empty, no layer runs", self.n_layers)
        object.__setattr__(self, "steps", steps)

    @classmethod
    def of(cls, n_layers: int) -> "Wiring":
        """Return the model as it is: every layer once, in order."""
        return cls._of_layers(range(require_layers(n_layers)), n_layers)

    @classmethod
    def parse(cls, text: str, n_layers: int) -> "Wiring":
        """Read the notation (see the module); a ``WiringError`` shows the place where it goes wrong."""
        steps = notation.read(text, n_layers)
        try:
            return cls(n_layers, steps)
        except WiringError as error:
            raise WiringError(error.sentence, n_layers, text) from None

    def __str__(self) -> str:
        return notation.write(self.steps, self.n_layers)

    def __repr__(self) -> str:
        return f'Wiring.parse("{self}", {self.n_layers})'

    def __add__(self, other: "Wiring") -> "Wiring":
        """This wiring, and then the other on the stream that it leaves."""
        if not isinstance(other, Wiring):
            return NotImplemented
        if self.n_layers != other.n_layers:
            raise WiringError(f"wirings of {self.n_layers} and of {other.n_layers} layers cannot follow each other")
        return Wiring(self.n_layers, self.steps + other.steps)

    @property
    def layers(self) -> tuple[int, ...]:
        """Index of every layer or sublayer that runs, in the order of the notation."""
        return tuple(layer.index for layer in executions(self.steps))

    @property
    def depth(self) -> int | float:
        """Number of layers that run, a sublayer counting one half: the cost in units of one layer of a forward pass."""
        halves = sum(2 if layer.part is None else 1 for layer in executions(self.steps))
        return halves / 2 if halves % 2 else halves // 2

    @property
    def is_serial(self) -> bool:
        """Whether whole layers run one after another, without groups, scaling or sublayers."""
        return all(isinstance(step, Layer) and step.part is None for step in self.steps)

    @property
    def is_identity(self) -> bool:
        """Whether this is the model as it is."""
        return self.is_serial and self.layers == tuple(range(self.n_layers))

    def draw(self) -> "Drawing":
        """Return an SVG image of the wiring, which a notebook shows; its ``str`` is the text (see ``wiring.drawing``).

        >>> Wiring.of(12).repeat(4, 8).draw().n_boxes
        16
        """
        from surgery.wiring import drawing

        return drawing.draw(self.steps, self.n_layers, str(self))

    def repeat(self, start: int, stop: int, times: int = 2) -> "Wiring":
        """Run the span ``times`` times in all: ``Wiring.of(80).repeat(45, 52)`` is ``":52 45:"`` (Ng's RYS)."""
        return self._rewire(start, stop, lambda span: repeat(span, times))

    def skip(self, start: int, stop: int | None = None) -> "Wiring":
        """Leave the span out, or the one step at ``start``: ``Wiring.of(32).skip(3)`` is ``":3 4:"``."""
        start = self._position(start)
        return self._rewire(start, start + 1 if stop is None else stop, lambda span: ())

    def swap(self, a: int, b: int) -> "Wiring":
        """Swap two steps: ``Wiring.of(32).swap(3, 8)`` is ``":3 8 4:8 3 9:"``."""
        steps = list(self.steps)
        a, b = self._position(a), self._position(b)
        steps[a], steps[b] = steps[b], steps[a]
        return Wiring(self.n_layers, tuple(steps))

    def reverse(self, start: int, stop: int) -> "Wiring":
        """Run the span backwards: ``Wiring.of(32).reverse(10, 14)`` is ``":10 13:9:-1 14:"``."""
        return self._rewire(start, stop, lambda span: span[::-1])

    def shuffle(self, start: int = 0, stop: int | None = None, *, seed: int) -> "Wiring":
        """Run the span in a random order other than the present one; equal seeds give equal orders."""

        def shuffled(span: Chain) -> Chain:
            if len(set(span)) < 2:
                text = notation.write(span, self.n_layers)
                raise WiringError(f"there is no other order of {shown(text)}", self.n_layers)
            generator, order = random.Random(seed), list(span)
            while tuple(order) == span:
                generator.shuffle(order)
            return tuple(order)

        return self._rewire(start, len(self.steps) if stop is None else stop, shuffled)

    def parallel(self, start: int, stop: int, mean: bool = False) -> "Wiring":
        """Run the span's steps on the same stream: ``Wiring.of(32).parallel(3, 6)`` is ``":3 {*3:6} 6:"``."""
        return self._rewire(start, stop, lambda span: in_parallel(span, mean))

    def loop(self, start: int, stop: int, times: int, mean: bool = False) -> "Wiring":
        """Run the span in parallel ``times`` times: looped parallel (Sun et al. 2024, arXiv 2407.09298, average)."""
        return self._rewire(start, stop, lambda span: repeat(in_parallel(span, mean), times))

    def scale(self, start: int, stop: int, factor: int | float) -> "Wiring":
        """Multiply the span's effect: ``Wiring.of(32).scale(3, 6, 0.5)`` is ``":3 0.5*(3:6) 6:"``."""
        return self._rewire(start, stop, lambda span: (Scaled(factor, span),))

    def _rewire(self, start: int, stop: int, rewrite: Callable[[Chain], Chain]) -> "Wiring":
        size, start, stop = len(self.steps), operator.index(start), operator.index(stop)
        if not (-size <= start <= size and -size <= stop <= size):
            span = f"{shown(start)}:{shown(stop)}"
            raise WiringError(f"the span {span} leaves this wiring of {size} steps", self.n_layers)
        first, last, _ = slice(start, stop).indices(size)
        if first >= last:
            raise WiringError(f"the span {start}:{stop} is empty, {HALF_OPEN}", self.n_layers)
        return Wiring(self.n_layers, self.steps[:first] + rewrite(self.steps[first:last]) + self.steps[last:])

    def _position(self, at: int) -> int:
        size, at = len(self.steps), operator.index(at)
        if not -size <= at < size:
            raise WiringError(f"there is no position {shown(at)} in this wiring of {size} steps", self.n_layers)
        return at % size

    def _serial(self, form: str) -> tuple[int, ...]:
        if not self.is_serial:
            this = shown(str(self))
            raise WiringError(f"{form} can only say whole layers one after another, and this wiring is {this}")
        return self.layers

    def repeated_span(self, times: int = 2) -> tuple[int, int] | None:
        """Return ``(start, stop)`` of the one span that this wiring runs ``times`` times; None for any other wiring.

        >>> Wiring.parse(":6 4:", 12).repeated_span(), Wiring.parse(":6 8:", 12).repeated_span()
        ((4, 6), None)
        """
        if not self.is_serial:
            return None
        blocks = self.to_rys()
        start, stop = blocks[0]
        repeats = len(blocks) == operator.index(times) - 1 and len(set(blocks)) == 1
        return (start, stop) if start < stop and repeats else None

    @classmethod
    def from_rys(cls, spec: "str | Sequence[int] | Sequence[Sequence[int]]", n_layers: int) -> "Wiring":
        """Read RYS blocks: ``(45, 52)``, ``[(3, 6), (4, 6)]`` or ``"3,6;4,6"``; see ``surgery.wiring.formats``."""
        return cls._of_layers(formats.read_rys(spec, n_layers), n_layers)

    def to_rys(self) -> list[tuple[int, int]]:
        """Return the RYS blocks that run the same layers; ``WiringError`` if this wiring is not serial."""
        return formats.write_rys(self._serial("RYS blocks"), self.n_layers)

    @classmethod
    def from_paths(cls, text: str, n_layers: int) -> "Wiring":
        """Read inclusive paths: ``"0..14,12,13,14,15..39"`` or ``"..15,11.."``; see ``surgery.wiring.formats``."""
        return cls._of_layers(formats.read_paths(text, n_layers), n_layers)

    def to_paths(self) -> str:
        """Return the inclusive paths that run the same layers; ``WiringError`` if this wiring is not serial."""
        return formats.write_paths(self._serial("inclusive paths"))

    @classmethod
    def from_mergekit(cls, text: str, n_layers: int) -> "Wiring":
        """Read a mergekit passthrough configuration of one model; see ``surgery.wiring.formats``."""
        return cls._of_layers(formats.read_mergekit(text, n_layers), n_layers)

    def to_mergekit(self, model_name: str) -> str:
        """Return the mergekit configuration that builds this wiring; ``WiringError`` if it is not serial."""
        return formats.write_mergekit(self._serial("mergekit"), model_name)

    @classmethod
    def _of_layers(cls, indices: Iterable[int], n_layers: int) -> "Wiring":
        return cls(n_layers, tuple(map(Layer, indices)))
