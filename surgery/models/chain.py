"""A chain of steps run on a stream, and the width of the stream that it leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.models.engine import Engine, LayerOutput, Recording, Stream
from surgery.wiring import notation
from surgery.wiring.steps import Layer, Parallel, Scaled, Step

Tap = Callable[[Layer, Stream, Stream], "Tensor | None"]


def run_chain(
    engine: Engine,
    recording: Recording,
    steps: Sequence[Step],
    x: Stream,
    tap: Tap | None = None,
    recorded: list[tuple[str, Stream]] | None = None,
) -> LayerOutput:
    """Run a chain of steps on a stream; what leaves each step is added to ``recorded``, with its notation."""
    for step in steps:
        match step:
            case Layer(index, part):
                before, call = x, recording.calls[index]
                x = engine.layer(index, x, call) if part is None else engine.sublayer(index, part, x, call)
                replacement = tap(step, before, x) if tap is not None else None
                x = x if replacement is None else replacement
            case Parallel(branches, mean):
                outputs = [run_chain(engine, recording, branch, x, tap, recorded) for branch in branches]
                x = sum(outputs[1:], outputs[0]) / len(outputs) if mean else x + sum(output - x for output in outputs)
            case Scaled(factor, body):
                x = x + factor * (run_chain(engine, recording, body, x, tap, recorded) - x)
        if recorded is not None:
            recorded.append((notation.write((step,), len(recording.calls)), x))
    return x


def width_after(steps: Sequence[Step], width: int, streams: Sequence[tuple[int, int, int]], name: str) -> int:
    """The width of the stream that leaves a chain of steps, which a stream of ``width`` enters.

    ``streams`` has the widths that each layer of the model ``name`` takes, works in and gives. Raises ValueError where
    they do not fit together.
    """
    for step in steps:
        match step:
            case Layer(index):
                width_in, _, width_out = streams[index]
                if width_in != width:
                    raise ValueError(
                        f"layer {index} of {name} takes a stream of {width_in}, not one of {width}: layers with a "
                        "stream of their own run as a whole, from the first that maps into it to the last"
                    )
                width = width_out
            case Parallel(branches):
                if any(width_after(branch, width, streams, name) != width for branch in branches):
                    raise ValueError("branches beside each other must give the width of stream that they take")
            case Scaled(_, body) if width_after(body, width, streams, name) != width:
                raise ValueError("what is scaled must give the width of stream that it takes")
    return width


def at_positions(x: Tensor, positions: Any) -> Tensor:
    """``x`` [batch, pos, ...] at a slice or indices along pos, at a mask [batch, pos], or everywhere (None)."""
    if positions is None:
        return x
    if isinstance(positions, Tensor) and (positions.dtype == torch.bool or positions.ndim == 2):
        return x[positions.bool()]
    return x[:, positions]
