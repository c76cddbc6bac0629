"""Slots: a wiring cut into passes that run one after another, each a layer of its own with its own cache.

A model's loop can only run layers in a row. A wiring that is not a row becomes one all the same: the passes in the
order of the notation, and between them little operations on streams that were kept: a branch of a parallel group
begins on the stream that entered the group, its last pass joins what the branches left. So every pass keeps its own
mask, rotary table, hooks and key-value cache, and a group costs no more than its layers.

    :4 {4|5} 6:     pass   0 1 2 3   4                    5                         6 ...
                                     keep x, keep 4(x)    take x, then x + sum of updates

>>> [slot.layer for slot in slots(Wiring.parse(":2 {1:3|3} 3", 4))]
[0, 1, 1, 2, 3, 3]
"""

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

Kept = dict[int, Tensor]


@dataclass(frozen=True)
class Keep:
    """Note the stream under a name."""

    name: int

    def __call__(self, x: Stream, kept: Kept) -> Stream:
        kept[self.name] = x
        return x


@dataclass(frozen=True)
class Take:
    """Go on with a stream that was kept."""

    name: int

    def __call__(self, x: Stream, kept: Kept) -> Stream:
        return kept[self.name]


@dataclass(frozen=True)
class Join:
    """What a parallel group leaves: ``x + sum_b (b(x) - x)`` or ``mean_b b(x)``."""

    start: int
    branches: tuple[int, ...]
    mean: bool

    def __call__(self, x: Stream, kept: Kept) -> Stream:
        outputs, start = [kept[name] for name in self.branches], kept[self.start]
        if self.mean:
            return sum(outputs[1:], outputs[0]) / len(outputs)
        return start + sum(output - start for output in outputs)


@dataclass(frozen=True)
class Damp:
    """What a scaled group leaves: ``x + factor (body(x) - x)``."""

    start: int
    factor: float

    def __call__(self, x: Stream, kept: Kept) -> Stream:
        return kept[self.start] + self.factor * (x - kept[self.start])


Operation = Keep | Take | Join | Damp


@dataclass
class Slot:
    """One pass: a layer or one of its sublayers, what happens to the stream before and after it, and the first and last
    pass of the group that it belongs to (None: of no group)."""

    layer: int
    part: str | None
    before: list[Operation] = field(default_factory=list)
    after: list[Operation] = field(default_factory=list)
    group: tuple[int, int] | None = None


def slots(wiring: Wiring) -> list[Slot]:
    """The passes of a wiring."""
    found: list[Slot] = []
    names = count()
    for step in wiring.steps:
        passes = _passes((step,), names)
        if not isinstance(step, Layer):
            for slot in passes:
                slot.group = (len(found), len(found) + len(passes) - 1)
        found += passes
    return found


def _passes(chain: Chain, names: Iterator[int]) -> list[Slot]:
    found: list[Slot] = []
    for step in chain:
        match step:
            case Layer(index, part):
                passes = [Slot(index, part)]
            case Scaled(factor, body):
                start = next(names)
                passes = _passes(body, names)
                passes[0].before.insert(0, Keep(start))
                passes[-1].after.append(Damp(start, factor))
            case Parallel(branches, mean):
                start, ends, passes = next(names), [], []
                for branch in branches:
                    ends.append(next(names) if branch else start)  # in a mean an empty branch leaves what entered
                    if branch:
                        inside = _passes(branch, names)
                        inside[0].before.insert(0, Take(start) if passes else Keep(start))
                        inside[-1].after.append(Keep(ends[-1]))
                        passes += inside
                passes[-1].after.append(Join(start, tuple(ends), mean))
        found += passes
    return found


def composed(taped: Wiring, wiring: Wiring) -> Wiring:
    """The wiring of the base model that a wiring of the taped model's passes means.

    Raises:
        ValueError: it takes a group of the taped model apart.

    >>> composed(Wiring.parse(":2 1:", 3), Wiring.parse(":2 3 3", 4))
    Wiring.parse(": 2", 3)
    """
    owners: list[tuple[Step, int, int]] = []  # of every pass: its step, and where the step's passes begin and stop
    for step in taped.steps:
        first, stop = len(owners), len(owners) + sum(1 for _ in executions((step,)))
        owners += [(step, first, stop)] * (stop - first)

    def chain(steps: Chain) -> Chain:
        found: list[Step] = []
        i = 0
        while i < len(steps):
            match steps[i]:
                case Layer(index, part):
                    owner, first, stop = owners[index]
                    if isinstance(owner, Layer):
                        found.append(_part_of(owner, index, part))
                    else:
                        if steps[i : i + stop - first] != tuple(map(Layer, range(first, stop))):
                            raise ValueError(
                                f"layers {first} to {stop - 1} of the taped model are one group, "
                                f"{Wiring(taped.n_layers, (owner,))}, and run only together: keep {first}:{stop} whole"
                            )
                        found.append(owner)
                        i += stop - first - 1
                case Scaled(factor, body):
                    found.append(Scaled(factor, chain(body)))
                case Parallel(branches, mean):
                    found.append(Parallel(tuple(map(chain, branches)), mean))
            i += 1
        return tuple(found)

    return Wiring(taped.n_layers, chain(wiring.steps))


def _part_of(owner: Layer, index: int, part: Any) -> Layer:
    if owner.part is not None and part not in (None, owner.part):
        raise ValueError(f"layer {index} of the taped model runs only {owner.index}.{owner.part}: it has no {part}")
    return Layer(owner.index, owner.part or part)


def install(
    layers: Sequence[nn.Module], parts: Sequence[Parts], wired: Sequence[Slot], d_model: int, forward: Callable
) -> None:
    """Make a model whose layers are the passes, one after another, do what the groups and sublayers among them ask.

    ``forward`` runs the model once on anything, to see which sublayers return tuples.
    """
    silent = {
        index: parts[index].mlp if slot.part == "attn" else parts[index].attn
        for index, slot in enumerate(wired)
        if slot.part is not None
    }
    lengths = _tuple_lengths([module for module in silent.values() if module is not None], forward)
    for index, module in silent.items():
        if module is not None:
            module.__dict__["forward"] = _Silence(index, d_model, lengths.get(module))
    running = _Running()
    for index, (layer, slot) in enumerate(zip(layers, wired, strict=True)):
        if slot.group is not None:
            layer.__dict__["forward"] = _Pass(layer, layer.forward, index, slot, running)


def _tuple_lengths(modules: Sequence[nn.Module], forward: Callable) -> dict[nn.Module, int]:
    lengths: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, tuple):
            lengths[module] = len(output)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return lengths


class _Running:
    """What the passes of one model share while it runs: the streams kept, and which pass of a group came last."""

    def __init__(self) -> None:
        self.kept: Kept = {}
        self.last: int | None = None

    def leave(self) -> None:
        self.kept.clear()
        self.last = None


class _Pass:
    """The forward of a layer that is a pass of a group. A class, so that a deep copy of the model gets its own."""

    def __init__(self, layer: nn.Module, forward: Callable, index: int, slot: Slot, running: _Running) -> None:
        self.layer, self.forward, self.index, self.slot, self.running = layer, forward, index, slot, running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, last = self.slot.group or (self.index, self.index)
        in_order = self.index == first or self.running.last == self.index - 1
        if not in_order or getattr(self.layer, "_start_at_layer_idx", None) == self.index:
            self.running.leave()
            raise RuntimeError(
                f"layers {first} to {last} of this taped model are one group and run only together and in order: "
                f"nothing can begin at layer {self.index}, nor run it again by itself (gradient checkpointing would)"
            )
        if self.index == first:
            self.running.leave()
        try:
            x = args[0] if args else kwargs["hidden_states"]
            for operation in self.slot.before:
                x = operation(x, self.running.kept)
            output = self.forward(x, *args[1:], **kwargs) if args else self.forward(**{**kwargs, "hidden_states": x})
            x = output[0] if isinstance(output, tuple) else output
            for operation in self.slot.after:
                x = operation(x, self.running.kept)
        except BaseException:
            self.running.leave()
            raise
        self.running.last = self.index
        if self.index == last:
            self.running.leave()
        return (x, *output[1:]) if isinstance(output, tuple) else x


class _Silence:
    """The forward of a sublayer that does not run: it writes zero, and keeps the length of its slot in the cache."""

    def __init__(self, index: int, d_model: int, length: int | None) -> None:
        self.index, self.d_model, self.length = index, d_model, length

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        for given in (*args, *kwargs.values()):
            if isinstance(given, Cache):  # positions and masks are made from the length of a slot
                empty = x.new_zeros((x.shape[0], 1, x.shape[1], 1))
                given.update(empty, empty, self.index)
        zeros = x.new_zeros((*x.shape[:-1], self.d_model))
        return zeros if self.length is None else (zeros, *[None] * (self.length - 1))
