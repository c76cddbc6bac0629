"""Many wirings as one graph in which no layer runs twice on the same stream, and the order in which to run it.

Wirings that begin alike share their beginning: their steps form a trie in which every node is a stream. Branches of a
group hang off the node that the group reads, so ``{*4:6}`` and ``{*4:7}`` share layers 4 and 5 on it, and a damped pass
shares the pass.

The graph runs in sweeps over the layers; each layer takes all streams that wait for it in one call (up to ``group`` of
them). A full repeat scan of L layers, L (L + 1) / 2 wirings, takes two sweeps; reversed spans take three if sweeps go
``alternating`` up and down. Where one stream fills a call by itself, ``deep`` runs one after another to its end
instead. A stream is forgotten as soon as nothing needs it any more. ``simulate`` counts the executions, the calls and
the most streams alive at once without a model; ``split`` cuts the wirings into parts that stay within a number of
streams.

There is no torch in here: a stream is whatever ``run`` starts from.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from surgery.wiring.steps import Chain, Layer, Parallel, Scaled, Step, WiringError, executions
from surgery.wiring.value import Wiring

MOST_STREAMS = 10_000_000  # of a graph: two gigabytes, and three times what a full scan of 200 layers takes

Order = Literal["up", "alternating", "deep"]


@dataclass(eq=False, slots=True)
class Node:
    """A stream: what a chain of steps makes of the embedding."""

    parent: "Node | None" = None
    step: Step | None = None
    ends: "tuple[Node, ...]" = ()  # of a group: the streams that leave its branches
    children: "dict[Step, Node]" = field(default_factory=dict)
    wirings: list[int] = field(default_factory=list)  # that end here
    needed: int = 0  # how many nodes and wirings still need it
    value: Any = None

    @property
    def is_layer(self) -> bool:
        return isinstance(self.step, Layer)


@dataclass(frozen=True)
class Cost:
    """What it takes to run a graph.

    Attributes:
        executions: layers run; a sublayer is one half.
        calls: how often a layer is called.
        alive: the most streams held at once.
    """

    executions: float
    calls: int
    alive: int


class Graph:
    """All streams that the wirings pass through, each once. Raises WiringError for more than ``MOST_STREAMS``."""

    def __init__(self, wirings: Sequence[Wiring]) -> None:
        self.size = 0
        self.root = Node()
        for index, wiring in enumerate(wirings):
            end = self._follow(self.root, wiring.steps)
            end.wirings.append(index)
            end.needed += 1

    def _follow(self, node: Node, chain: Chain) -> Node:
        for step in chain:
            node = node.children.get(step) or self._grow(node, step)
        return node

    def _grow(self, node: Node, step: Step) -> Node:
        match step:
            case Layer():
                ends: tuple[Node, ...] = ()
            case Parallel(branches):
                ends = tuple(self._follow(node, branch) for branch in branches)
            case Scaled(_, body):
                ends = (self._follow(node, body),)
        self.size += 1
        if self.size > MOST_STREAMS:
            raise WiringError(f"these wirings pass through more than {MOST_STREAMS:,} streams: run fewer at once")
        child = Node(node, step, ends)
        node.children[step] = child
        for source in {id(source): source for source in (node, *ends)}.values():
            source.needed += 1
        return child

    def nodes(self) -> Iterator[Node]:
        """Yield every stream once."""
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def run(
        self,
        start: Any,
        layer: Callable[[Layer, list[Any], list[bool]], list[Any]],
        combine: Callable[[Step, Any, list[Any]], Any],
        finish: Callable[[list[int], Any], None],
        group: int,
        order: Order = "up",
    ) -> Cost:
        """Run everything; a graph runs only once.

        Args:
            start: the stream that enters layer 0.
            layer: ``layer(step, streams, kept)`` runs a layer on streams and returns what leaves it; ``kept`` says for
                each whether more than one thing needs the result.
            combine: ``combine(step, x, ends)`` closes a group that reads ``x`` and whose branches leave ``ends``.
            finish: ``finish(wirings, x)`` takes the final stream of these wirings.
            group: the most streams in a call of ``layer``.
            order: in which the layers are called.
        """
        ready: list[Node] = []  # layers whose stream has arrived
        pending: dict[int, int] = {}  # groups: how many of their ends are still missing
        alive = peak = calls = 0
        executed = 0.0

        def arrive(node: Node, value: Any) -> None:
            nonlocal alive, peak
            arriving = [(node, value)]
            while arriving:
                node, value = arriving.pop()
                node.value = value
                alive += 1
                peak = max(peak, alive)
                if node.wirings:
                    finish(node.wirings, value)
                    release(node)
                for child in list(node.children.values()):
                    if isinstance(child.step, Layer):
                        ready.append(child)
                    else:
                        pending[id(child)] = len({id(end) for end in child.ends} - {id(node)})
                        if not pending[id(child)]:  # every branch of it is empty
                            arriving.append(close(child))
                for group_node in groups_of.get(id(node), ()):
                    pending[id(group_node)] -= 1
                    if not pending[id(group_node)]:
                        arriving.append(close(group_node))

        def close(node: Node) -> tuple[Node, Any]:
            assert node.parent is not None
            assert node.step is not None
            value = combine(node.step, node.parent.value, [end.value for end in node.ends])
            for source in {id(source): source for source in (node.parent, *node.ends)}.values():
                release(source)
            return node, value

        def release(node: Node, count: int = 1) -> None:
            nonlocal alive
            node.needed -= count
            if not node.needed:
                node.value = None
                alive -= 1

        groups_of: dict[int, list[Node]] = {}
        every_step: set[Layer] = set()
        for node in self.nodes():
            if isinstance(node.step, Layer):
                every_step.add(node.step)
            for end in {id(end): end for end in node.ends}.values():
                if end is not node.parent:
                    groups_of.setdefault(id(end), []).append(node)

        for node in self.nodes():  # an end counts once, however many wirings share it: they are finished together
            if node.wirings:
                node.needed -= len(node.wirings) - 1
        arrive(self.root, start)
        alternating = order == "alternating"
        for batch in _one_by_one(ready) if order == "deep" else _sweeps(ready, every_step, group, alternating):
            step, sources = batch[0].step, [node.parent for node in batch]
            assert isinstance(step, Layer)
            values = layer(step, [source.value for source in sources if source], [node.needed > 1 for node in batch])
            executed += len(batch) * (1 if step.part is None else 0.5)
            calls += 1
            for node, source, value in zip(batch, sources, values, strict=True):
                assert source is not None
                release(source)
                arrive(node, value)
        return Cost(executed, calls, peak)


def _one_by_one(ready: list[Node]) -> Iterator[list[Node]]:
    """Yield the stream made last: each runs to its end before the next, and so stays in the processor's caches."""
    while ready:
        yield [ready.pop()]


def _sweeps(ready: list[Node], steps: Iterable[Layer], group: int, alternating: bool) -> Iterator[list[Node]]:
    """Yield the streams that wait for a layer, layer after layer, up and up again or up and down.

    Layers for which nothing waits cost nothing, however many sweeps a wiring takes.
    """
    upwards = sorted(steps, key=lambda step: (step.index, step.part or ""))
    places = {step: place for place, step in enumerate(upwards)}
    waiting: dict[Layer, list[Node]] = {}
    ahead: list[int] = []  # places, times the direction, at which this sweep will stop: a heap
    behind: list[int] = []  # those that wait for the next sweep
    direction, here = 1, -1
    while True:
        for node in ready:
            assert isinstance(node.step, Layer)
            if node.step not in waiting:
                place = direction * places[node.step]
                if place > here:
                    heapq.heappush(ahead, place)
                else:
                    behind.append(direction * place)
            waiting.setdefault(node.step, []).append(node)
        ready.clear()
        if not ahead:
            if not behind:
                return
            direction = -direction if alternating else direction
            ahead, behind = sorted(direction * place for place in behind), []
        here = heapq.heappop(ahead)
        nodes = waiting.pop(upwards[direction * here])
        for first in range(0, len(nodes), group):
            yield nodes[first : first + group]


def simulate(wirings: Sequence[Wiring], group: int = 2**31, order: Order = "up") -> Cost:
    """Count what running the wirings together costs, without a model.

    >>> from surgery.wiring import every_repeat
    >>> simulate(list(every_repeat(12))).executions, simulate(list(every_repeat(12))).calls
    (662.0, 24)
    """
    nothing: Any = 0
    return Graph(wirings).run(
        nothing,
        lambda step, values, kept: [nothing] * len(values),
        lambda step, x, ends: nothing,
        lambda wirings, x: None,
        group,
        order,
    )


def split(
    wirings: Sequence[Wiring], alive: int, group: int = 2**31, order: Order = "up"
) -> list[tuple[list[int], Cost]]:
    """Cut the wirings into parts that each need at most ``alive`` streams at once: their indices, and what each costs.

    A part of a single wiring may need more. Neighbours in the order of their steps stay together: they share the most.
    """
    parts: list[tuple[list[int], Cost]] = []
    waiting = [_neighbours(wirings)]
    while waiting:
        part = waiting.pop()
        cost = simulate([wirings[index] for index in part], group, order)
        if len(part) > 1 and cost.alive > alive:
            half = len(part) // 2
            waiting += [part[half:], part[:half]]
        else:
            parts.append((part, cost))
    return parts


def shards(wirings: Sequence[Wiring], count: int) -> list[list[int]]:
    """Cut the wirings into at most ``count`` parts of about the same cost, to run in different places.

    Returns their indices. What two parts have in common runs once in each, so the cuts fall where neighbours share
    least, up to a quarter of a part from where they would be even.

    >>> from surgery.wiring import every_repeat
    >>> wirings = list(every_repeat(12))
    >>> parts = shards(wirings, 8)
    >>> sum(simulate([wirings[i] for i in part]).executions for part in parts), simulate(wirings).executions
    (715.0, 662.0)
    """
    order = _neighbours(wirings)
    shared = [0.0, *(_shared_beginning(wirings[a], wirings[b]) for a, b in itertools.pairwise(order))]
    own = (wirings[index].depth - common for index, common in zip(order, shared, strict=True))
    before = list(itertools.accumulate(own, initial=0.0))
    even = before[-1] / count
    cuts = {0, len(order)}
    for k in range(1, count):
        near = [i for i in range(1, len(order)) if abs(before[i] - k * even) <= even / 4]
        if near:
            cuts.add(min(near, key=lambda i: (shared[i], abs(before[i] - k * even))))
    return [order[first:last] for first, last in itertools.pairwise(sorted(cuts))]


def naive_executions(wirings: Iterable[Wiring]) -> float:
    """Layers run if every wiring runs by itself; a sublayer is one half."""
    return sum((float(wiring.depth) for wiring in wirings), 0.0)


def _neighbours(wirings: Sequence[Wiring]) -> list[int]:
    """Indices of the wirings in the order of their steps: neighbours share the most."""
    return sorted(range(len(wirings)), key=lambda index: [_sort_key(step) for step in wirings[index].steps])


def _shared_beginning(a: Wiring, b: Wiring) -> float:
    """How many layers two wirings share from the beginning on."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.steps, b.steps))
    return sum((0.5 if layer.part else 1.0 for layer in executions(step for step, _ in alike)), 0.0)


def _sort_key(step: Step) -> tuple:
    match step:
        case Layer(index, part):
            return 0, index, part or ""
        case _:
            return 1, repr(step), ""
