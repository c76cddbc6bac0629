"""Running many wirings on one batch within a memory budget, and what that will cost.

Wirings become one graph in which no layer runs twice on the same stream (``surgery.scan.schedule``); streams that wait
for the same layer ride through it as one batch; a stream is forgotten when nothing needs it. What is left is the floor:
the layer executions that remain, times what a layer costs at that batch. Sharing beginnings alone can at most halve a
scan of repeated spans (after the jump every path is its own); the batches are what makes small inputs fast. Probes run
in portions of like length, small enough for the memory and for the processor's caches (``surgery.scan.packing``).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import psutil
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from surgery.corpus.probes import Encoded, ProbeSet
from surgery.models import offload
from surgery.models.half_precision import Layers
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.scan import packing, schedule
from surgery.scan.packing import Inputs
from surgery.scan.scores import Scorer
from surgery.wiring.steps import Layer, Scaled, Step, executions
from surgery.wiring.value import Wiring

_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 32768}  # in one call of a layer: more is no faster (a CPU's caches are full)
_CALL = {"cpu": 6e8, "cuda": 3e10}  # what a call of a layer costs besides arithmetic, in the operations of that time
_BRINGING = 4096.0  # what a portion costs where layers are brought to the device for it, in tokens: about


@dataclass(frozen=True)
class Plan:
    """What a scan will cost, known before it runs.

    Attributes:
        wirings: how many different ones.
        portions: how many portions the probes are scanned in.
        parts, group, order: of the portion with the most tokens: indices of the wirings that run together, part after
            part; how many streams go through a layer at once, at most; the order in which the layers are called.
        executions_naive: layers run on the whole probe set if every wiring ran by itself.
        executions_shared: layers that will run.
        calls: how often a layer is called.
        peak_bytes: memory for streams and a running layer, at most.
        seconds: what the layers will take; NaN if none was timed.
    """

    wirings: int
    portions: int
    parts: tuple[tuple[int, ...], ...]
    group: int
    order: schedule.Order
    executions_naive: float
    executions_shared: float
    calls: int
    peak_bytes: int
    seconds: float

    def __str__(self) -> str:
        in_portions = f" and {self.portions} portions of the probes" if self.portions > 1 else ""
        return (
            f"{self.wirings} wirings: {self.executions_shared:,.0f} layer executions instead of "
            f"{self.executions_naive:,.0f}, in {self.calls:,} calls{in_portions}"
            f"; at most {self.peak_bytes / 2**20:,.0f} MiB at once, about {self.seconds:,.0f} s"
        )


def plan(
    stack: Stack, wirings: Iterable["Wiring | str"], probes: "ProbeSet | Encoded | Tokens", memory: int | None = None
) -> Plan:
    """How a scan would run and what it would cost: executions, calls, memory, time.

    ``memory`` in bytes bounds the streams held and the working memory of a layer; by default half of what is free.
    Cost: a layer, timed three times on a full group.

    >>> from surgery.instruments import known_networks
    >>> tokens = Tokens.of(known_networks.tokens(2, 8))
    >>> plan(Stack(known_networks.random_network()), [":", ":2 1:"], tokens).executions_shared
    11.0
    """
    to_run = distinct(stack, wirings)
    if isinstance(probes, Tokens):
        batches = [probes]
    else:
        encoded = Encoded.of(probes, stack)
        batches = [Inputs.of(part).tokens for part in portions(stack, encoded, memory, wirings=to_run)]
    schemes = [_plan(stack, to_run, batch.ids.numel(), memory) for batch in batches]
    sizes = [batch.ids.numel() for batch in batches]
    largest = max(range(len(batches)), key=sizes.__getitem__)
    context = stack.context(batches[largest].to(stack.device))
    executed = sum(scheme.executions_shared * size for scheme, size in zip(schemes, sizes, strict=True))
    return replace(
        schemes[largest],
        portions=len(batches),
        executions_shared=executed / sum(sizes),
        calls=sum(scheme.calls for scheme in schemes),
        peak_bytes=max(scheme.peak_bytes for scheme in schemes),
        seconds=executed * _seconds(stack, context, schemes[largest].group) / sizes[largest],
    )


def execute(
    stack: Stack,
    wirings: Iterable["Wiring | str"],
    tokens: "Tokens | Tensor",
    consume: "Callable[[int, Float[Tensor, 'batch pos d_model']], None]",
    memory: int | None = None,
    layers: Layers | None = None,
) -> None:
    """Hand the stream that leaves each wiring to ``consume(index, x)`` as it is ready, in no particular order.

    ``layers`` run in place of the stack's own, such as its ``HalfLayers``. ``memory`` and cost: as of ``plan``.
    """
    context = stack.context(Tokens.of(tokens).to(stack.device))
    _execute(
        stack,
        stack if layers is None else layers,
        [stack.wiring(wiring) for wiring in wirings],
        context,
        memory,
        consume,
    )


def measure(
    scorer: Scorer, wirings: Sequence[Wiring], memory: int | None, accept: Callable[[pd.DataFrame], None]
) -> None:
    """Run the wirings in this process, and hand the rows of each to ``accept`` when some have ended."""
    ended: list[tuple[Wiring, Tensor]] = []

    def score() -> None:
        for rows in scorer.tables(ended):
            accept(rows)
        ended.clear()

    def end(index: int, x: Tensor) -> None:
        ended.append((wirings[index], scorer.final(x)))
        if len(ended) == scorer.at_once:
            score()

    _execute(scorer.stack, scorer.layers, wirings, scorer.context, memory, end)
    if ended:
        score()


def distinct(stack: Stack, wirings: Iterable["Wiring | str"]) -> list[Wiring]:
    """The wirings, parsed and checked against the model, each once.

    Raises ValueError for one that the model cannot run.
    """
    return list(dict.fromkeys(stack.wiring(wiring) for wiring in wirings))


def portions(
    stack: Stack,
    encoded: Encoded,
    memory: int | None = None,
    batch_size: int | None = None,
    wirings: Sequence[Wiring] = (),
) -> list[Encoded]:
    """Portions of the probes in which little is padded, and which the processor's caches and the memory (bytes) hold.

    For each a layer and a stream per layer fit into the memory, and none has more than ``batch_size`` probes. The more
    layers the ``wirings`` run (by default once through the model), the finer they are cut.
    """
    memory = free_memory(stack) // 2 if memory is None else memory
    of_token = (_inside(stack) + (stack.n_layers + 2) * stack.d_model) * torch.finfo(stack.dtype).bits // 8
    call = _CALL.get(stack.device.type, 3e9) / (2 * _inside_weights(stack))  # in tokens
    brought = offload.of(stack.model) is not None
    executed = schedule.naive_executions(wirings) / 2 or stack.n_layers  # about half of it is shared
    counts, lengths = Inputs.of(encoded).sizes(encoded)
    parts = packing.portions(
        counts,
        lengths,
        most_tokens=memory // of_token if brought else min(_at_once(stack), memory // of_token),
        most_probes=batch_size or len(counts),
        fixed=_BRINGING if brought else call * (2 * stack.n_layers / executed + 1 / 20),
    )
    return [encoded.portion(part) for part in parts]


def needed(stack: Stack, wirings: Sequence[Wiring], tokens: int, memory: int | None = None) -> int:
    """Bytes that a scan of one portion of so many tokens, padding among them, is planned to take at most."""
    return _plan(stack, wirings, tokens, memory).peak_bytes


def free_memory(stack: Stack) -> int:
    """Free memory in bytes on the device of the model."""
    if stack.device.type == "cuda":
        return int(torch.cuda.mem_get_info(stack.device)[0])
    return int(psutil.virtual_memory().available)


# --- planning --------------------------------------------------------------------------------------------------------


def _plan(stack: Stack, wirings: Sequence[Wiring], tokens: int, memory: int | None) -> Plan:
    """The plan of one batch of so many tokens, padding among them, without timing."""
    size = torch.finfo(stack.dtype).bits // 8
    stream = stack.d_model * tokens * size
    memory = free_memory(stack) // 2 if memory is None else memory
    working = _inside(stack) * tokens * size
    group = max(1, min(_at_once(stack) // tokens, memory // 4 // working))
    alive = max(2, (memory - group * working) // stream - group)
    sweeping = group > 1 or offload.of(stack.model) is not None  # a layer that was brought takes all waiting streams
    orders: tuple[schedule.Order, ...] = ("up", "alternating") if sweeping else ("deep",)
    simulations = [_simulate(wirings, alive, group, order) for order in orders]
    cheapest = min(range(len(orders)), key=lambda place: sum(cost.calls for cost in simulations[place][1]))
    parts, costs = simulations[cheapest]
    peak = max((cost.alive for cost in costs), default=0)
    return Plan(
        wirings=len(wirings),
        portions=1,
        parts=tuple(parts),
        group=group,
        order=orders[cheapest],
        executions_naive=float(schedule.naive_executions(wirings)),
        executions_shared=float(sum(cost.executions for cost in costs)),
        calls=sum(cost.calls for cost in costs),
        peak_bytes=(peak + group) * stream + group * working,
        seconds=math.nan,
    )


def _simulate(
    wirings: Sequence[Wiring], alive: int, group: int, order: schedule.Order
) -> tuple[list[tuple[int, ...]], list[schedule.Cost]]:
    """The parts that need at most ``alive`` streams at once, and what each costs."""
    parts = schedule.split(wirings, alive, group, order) if wirings else []
    return [tuple(part) for part, _ in parts], [cost for _, cost in parts]


def _at_once(stack: Stack) -> int:
    return _TOKENS_AT_ONCE.get(stack.device.type, 8192)


def _inside(stack: Stack) -> int:
    """Numbers that a running layer holds per token beside the streams.

    Its input and output, normed copies, queries, keys and values, the MLP's inside, and about as much again that the
    allocator holds between them (measured).
    """
    return 14 * stack.d_model + 6 * _d_mlp(stack)


def _inside_weights(stack: Stack) -> int:
    """About how many weights a layer multiplies a token with."""
    return stack.d_model * (4 * stack.d_model + 3 * _d_mlp(stack))


def _d_mlp(stack: Stack) -> int:
    return int(getattr(stack.model.cfg, "d_mlp", None) or 4 * stack.d_model)


def _seconds(stack: Stack, context: Context, group: int) -> float:
    """Seconds of one layer on one stream, in a batch of ``group``: the best of three."""
    copies = _copies(stack, context, group)
    x = repeat(context.x0, "batch pos d_model -> (copy batch) pos d_model", copy=group)
    layer = Wiring(stack.n_layers, (Layer(0),))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        stack.execute(layer, x, copies)
        times.append(time.perf_counter() - start)
    return min(times) / group


# --- running ---------------------------------------------------------------------------------------------------------


def _execute(
    stack: Stack,
    layers: Layers,
    wirings: Sequence[Wiring],
    context: Context,
    memory: int | None,
    consume: Callable[[int, Tensor], None],
) -> None:
    """Run the wirings part after part, as planned; ``consume(index, x)`` takes each final stream."""
    scheme = _plan(stack, wirings, context.tokens.ids.numel(), memory)
    for part in scheme.parts:

        def finish(ends: list[int], x: Tensor, part: tuple[int, ...] = part) -> None:
            for end in ends:
                consume(part[end], x)

        _execute_part(stack, layers, [wirings[i] for i in part], context, scheme, finish)


def _execute_part(
    stack: Stack,
    layers: Layers,
    wirings: Sequence[Wiring],
    context: Context,
    scheme: Plan,
    finish: Callable[[list[int], Tensor], None],
) -> None:
    size = len(context.x0)
    contexts: dict[int, Context] = {1: context}
    single = {step: Wiring(stack.n_layers, (step,)) for step in _layers(wirings)}

    def layer(step: Layer, streams: list[Tensor], kept: list[bool]) -> list[Tensor]:
        count = len(streams)
        if count not in contexts:
            contexts[count] = _copies(stack, context, count)
        x = layers.execute(single[step], torch.cat(streams) if count > 1 else streams[0], contexts[count])
        # what is kept longer than its neighbours must not hold their memory
        return [y.clone() if keep and count > 1 else y for y, keep in zip(x.split(size), kept, strict=True)]

    def combine(step: Step, x: Tensor, ends: list[Tensor]) -> Tensor:
        if isinstance(step, Scaled):
            return x + step.factor * (ends[0] - x)
        assert not isinstance(step, Layer)
        return sum(ends[1:], ends[0]) / len(ends) if step.mean else x + sum(end - x for end in ends)

    graph = schedule.Graph(wirings)
    graph.run(context.x0, layer, combine, finish, scheme.group, scheme.order)


def _copies(stack: Stack, context: Context, count: int) -> Context:
    """The call context of ``count`` copies of a batch, without their embeddings."""
    ids, mask = (
        repeat(part, "batch pos -> (copy batch) pos", copy=count) for part in (context.tokens.ids, context.tokens.mask)
    )
    copies = stack.context(Tokens(ids, mask))
    return replace(copies, recording=replace(copies.recording, x0=context.x0))


def _layers(wirings: Sequence[Wiring]) -> set[Layer]:
    return set(itertools.chain.from_iterable(executions(wiring.steps) for wiring in wirings))
