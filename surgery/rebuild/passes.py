"""A wiring as passes that run one after another, each a slot of the taped model with its own key-value cache.

A model's loop can only run layers in a row. Any other wiring becomes a row too: its passes in the order of the
notation, and between them small operations on streams that were saved. A branch of a parallel group begins on the
stream that entered the group; the last pass joins what the branches gave. So every pass keeps its own mask, rotary
table, hooks and key-value cache, and a group costs no more than its layers.

    :4 {4|5} 6:     pass   0 1 2 3   4                    5                         6 ...
                                     save x, save 4(x)    load x, then x + sum of updates

>>> [slot.layer for slot in slots(Wiring.parse(":2 {1:3|3} 3", 4))]
[0, 1, 1, 2, 3, 3]
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from surgery.models.engine import Parts, Stream
from surgery.wiring.steps import Chain, executions
from surgery.wiring.value import Layer, Parallel, Scaled, Step, Wiring

Streams = dict[int, Tensor]  # that are saved between the passes of a group, by name


@dataclass(frozen=True)
class Save:
    """Save the stream under a name."""

    name: int

    def __call__(self, x: Stream, streams: Streams) -> Stream:
        streams[self.name] = x
        return x


@dataclass(frozen=True)
class Load:
    """Continue with a stream that was saved."""

    name: int

    def __call__(self, x: Stream, streams: Streams) -> Stream:
        return streams[self.name]


@dataclass(frozen=True)
class Join:
    """Compute what leaves a parallel group: ``x + sum_b (b(x) - x)`` or ``mean_b b(x)``."""

    start: int
    branches: tuple[int, ...]
    mean: bool

    def __call__(self, x: Stream, streams: Streams) -> Stream:
        outputs, start = [streams[name] for name in self.branches], streams[self.start]
        if self.mean:
            return sum(outputs[1:], outputs[0]) / len(outputs)
        return start + sum(output - start for output in outputs)


@dataclass(frozen=True)
class Damp:
    """Compute what leaves a scaled group: ``x + factor (body(x) - x)``."""

    start: int
    factor: float

    def __call__(self, x: Stream, streams: Streams) -> Stream:
        return streams[self.start] + self.factor * (x - streams[self.start])


Operation = Save | Load | Join | Damp


@dataclass
class Slot:
    """One pass of a wiring.

    Attributes: ``layer`` and ``part``, what runs (None: the whole layer); ``before`` and ``after``, the operations on
    the stream around it; ``group``, the first and last pass of the group that it belongs to (None: it is in no group).
    """

    layer: int
    part: str | None
    before: list[Operation] = field(default_factory=list)
    after: list[Operation] = field(default_factory=list)
    group: tuple[int, int] | None = None


def slots(wiring: Wiring) -> list[Slot]:
    """The passes of a wiring, in the order in which they run."""
    passes: list[Slot] = []
    names = count()
    for step in wiring.steps:
        of_step = _passes((step,), names)
        if not isinstance(step, Layer):
            for slot in of_step:
                slot.group = (len(passes), len(passes) + len(of_step) - 1)
        passes += of_step
    return passes


def _passes(chain: Chain, names: Iterator[int]) -> list[Slot]:
    result: list[Slot] = []
    for step in chain:
        match step:
            case Layer(index, part):
                passes = [Slot(index, part)]
            case Scaled(factor, body):
                start = next(names)
                passes = _passes(body, names)
                passes[0].before.insert(0, Save(start))
                passes[-1].after.append(Damp(start, factor))
            case Parallel(branches, mean):
                start, ends, passes = next(names), [], []
                for branch in branches:
                    ends.append(next(names) if branch else start)  # an empty branch of a mean gives what entered
                    if branch:
                        inside = _passes(branch, names)
                        inside[0].before.insert(0, Load(start) if passes else Save(start))
                        inside[-1].after.append(Save(ends[-1]))
                        passes += inside
                passes[-1].after.append(Join(start, tuple(ends), mean))
        result += passes
    return result


def compose(taped: Wiring, wiring: Wiring) -> Wiring:
    """Express ``wiring``, which counts the passes of ``taped``, as a wiring of the base model.

    Raises:
        ValueError: it splits a group of the taped model.

    >>> compose(Wiring.parse(":2 1:", 3), Wiring.parse(":2 3 3", 4))
    Wiring.parse(": 2", 3)
    """
    owners: list[
        tuple[Step, int, int]
    ] = []  # of every pass: its step, and where the passes of that step start and stop
    for step in taped.steps:
        first, stop = len(owners), len(owners) + sum(1 for _ in executions((step,)))
        owners += [(step, first, stop)] * (stop - first)

    def chain(steps: Chain) -> Chain:
        result: list[Step] = []
        i = 0
        while i < len(steps):
            match steps[i]:
                case Layer(index, part):
                    owner, first, stop = owners[index]
                    if isinstance(owner, Layer):
                        result.append(_part_of(owner, index, part))
                    else:
                        if steps[i : i + stop - first] != tuple(map(Layer, range(first, stop))):
                            raise ValueError(
                                f"layers {first} to {stop - 1} of the taped model are one group, "
                                f"{Wiring(taped.n_layers, (owner,))}, and run only together: keep {first}:{stop} whole"
                            )
                        result.append(owner)
                        i += stop - first - 1
                case Scaled(factor, body):
                    result.append(Scaled(factor, chain(body)))
                case Parallel(branches, mean):
                    result.append(Parallel(tuple(map(chain, branches)), mean))
            i += 1
        return tuple(result)

    return Wiring(taped.n_layers, chain(wiring.steps))


def _part_of(owner: Layer, index: int, part: Any) -> Layer:
    """The ``part`` of the layer of the base model that the taped model's layer ``index`` is."""
    if owner.part is not None and part not in (None, owner.part):
        raise ValueError(f"layer {index} of the taped model runs only {owner.index}.{owner.part}: it has no {part}")
    return Layer(owner.index, owner.part or part)


def install(
    layers: Sequence[nn.Module], parts: Sequence[Parts], passes: Sequence[Slot], d_model: int, forward: Callable
) -> None:
    """Make a model whose layers are ``passes`` run their groups and sublayers.

    ``forward`` runs the model once on any input, to see which sublayers return tuples.
    """
    silent = {
        index: parts[index].mlp if slot.part == "attn" else parts[index].attn
        for index, slot in enumerate(passes)
        if slot.part is not None
    }
    lengths = _tuple_lengths([module for module in silent.values() if module is not None], forward)
    for index, module in silent.items():
        if module is not None:
            module.__dict__["forward"] = _Silence(index, d_model, lengths.get(module))
    progress = _Progress()
    for index, (layer, slot) in enumerate(zip(layers, passes, strict=True)):
        if slot.group is not None:
            layer.__dict__["forward"] = _Pass(layer, layer.forward, index, slot, progress)


def _tuple_lengths(modules: Sequence[nn.Module], forward: Callable) -> dict[nn.Module, int]:
    lengths: dict[nn.Module, int] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, tuple):
            lengths[module] = len(output)

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return lengths


class _Progress(threading.local):
    """What the passes of a model share while it runs: the saved streams, and which pass of a group ran last.

    Every thread that runs the model has its own.
    """

    def __init__(self) -> None:
        self.streams: Streams = {}
        self.last: int | None = None

    def reset(self) -> None:
        self.streams.clear()
        self.last = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Progress, ()  # a copy of the model begins anew


class _Pass:
    """The forward of a layer that is a pass of a group. A class, so that a deep copy of the model gets its own."""

    def __init__(self, layer: nn.Module, forward: Callable, index: int, slot: Slot, progress: _Progress) -> None:
        self.layer, self.forward, self.index, self.slot, self.progress = layer, forward, index, slot, progress

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, last = self.slot.group or (self.index, self.index)
        in_order = self.index == first or self.progress.last == self.index - 1
        if not in_order or getattr(self.layer, "_start_at_layer_idx", None) == self.index:
            self.progress.reset()
            raise RuntimeError(
                f"layers {first} to {last} of this taped model are one group and run only together and in order: "
                f"nothing can begin at layer {self.index}, nor run it again by itself (gradient checkpointing would)"
            )
        if self.index == first:
            self.progress.reset()
        try:
            x = args[0] if args else kwargs["hidden_states"]
            for operation in self.slot.before:
                x = operation(x, self.progress.streams)
            output = self.forward(x, *args[1:], **kwargs) if args else self.forward(**{**kwargs, "hidden_states": x})
            x = output[0] if isinstance(output, tuple) else output
            for operation in self.slot.after:
                x = operation(x, self.progress.streams)
        except BaseException:
            self.progress.reset()
            raise
        self.progress.last = self.index
        if self.index == last:
            self.progress.reset()
        return (x, *output[1:]) if isinstance(output, tuple) else x


class _Silence:
    """The forward of a sublayer that does not run: it writes zero, and lets its slot of the cache grow all the same."""

    def __init__(self, index: int, d_model: int, length: int | None) -> None:
        self.index, self.d_model, self.length = index, d_model, length

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Cache):  # positions and masks are computed from the length of a slot
                empty = x.new_zeros((x.shape[0], 1, x.shape[1], 1))
                argument.update(empty, empty, self.index)
        zeros = x.new_zeros((*x.shape[:-1], self.d_model))
        return zeros if self.length is None else (zeros, *[None] * (self.length - 1))
