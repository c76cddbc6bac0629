"""A model's layers with their matrices in bfloat16, kept beside the model: half the memory traffic, twice the speed.

Matrices are multiplied in bfloat16 with sums in float32, as under autocast; the stream between layers, norms, masks and
rotary tables stay in float32, and so does the head, which is the model's own. The model itself is not touched.

>>> import torch
>>> from surgery import Stack, models
>>> stack = Stack(models.load("babel"))
>>> context, half = stack.context(stack.tokens("p3 pf1 >other")), HalfLayers(stack)
>>> x, exact = half.execute(":", context.x0, context), stack.execute(":", context.x0, context)
>>> x.dtype, 0 < float((x - exact).norm() / exact.norm()) < 0.02
(torch.float32, True)

Cost: a copy of the layers, of half the size.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from surgery.models import offload
from surgery.models.chain import run_chain
from surgery.models.conditions import measure
from surgery.models.engine import Context, LayerOutput, Stream
from surgery.models.precisions import PRECISIONS
from surgery.models.scopes import Scope, within
from surgery.models.stack import Stack
from surgery.wiring.value import Wiring


@runtime_checkable
class Layers(Protocol):
    """Whatever runs a stream through a wiring: a Stack, or its layers in half precision."""

    def execute(self, wiring: "Wiring | str", x: Stream, context: Context) -> LayerOutput: ...


class HalfLayers:
    """The layers of a stack as they are now, in bfloat16; they run as ``Stack.execute`` does.

    Attributes:
        nbytes: what the copy takes in memory.

    Raises ValueError for a model that is not in float32, for one whose layers are offloaded, and while hooks are
    attached, which the copy would not have.
    """

    def __init__(self, stack: Stack) -> None:
        if stack.dtype != torch.float32:
            kind = str(stack.dtype).removeprefix("torch.")
            raise ValueError(f"bf16 is a copy of a model in float32, and {stack.name} was loaded in {kind}: load it so")
        if offload.of(stack.model) is not None:
            raise ValueError(
                f"bf16 is a copy of all layers on the device, and those of {stack.name} are offloaded from it: "
                "load it in bfloat16 instead"
            )
        if stack.hooks_listen():
            raise ValueError(
                f"hooks are attached to {stack.name}, and a copy in bf16 would not have them: take them off, or "
                "measure in float32"
            )
        self.stack, engine = stack, stack.fastest_engine
        parameters = {id(p): _halved(p) for layer in engine.layers for p in layer.parameters()}
        self.engine = engine.copied(parameters)
        for layer in self.engine.layers:
            layer.eval()
        self.nbytes = sum(p.nbytes for p in parameters.values())

    def execute(self, wiring: "Wiring | str", x: Stream, context: Context) -> LayerOutput:
        """Run ``x`` through a wiring and return the stream that leaves it, in float32. Cost: as there."""
        steps = self.stack.wiring(wiring, x.shape[-1]).steps

        def execute(opened: Scope) -> LayerOutput:
            measure(opened, (), self.stack.device)
            with torch.autocast(self.stack.device.type, torch.bfloat16):
                return run_chain(self.engine, context.recording, steps, x)

        return within(execute)


def layers_of(stack: Stack, precision: str) -> Layers:
    """The layers of a stack in one of ``PRECISIONS``; for float32 the stack itself. Raises ValueError for another."""
    if precision not in PRECISIONS:
        raise ValueError(f"there is no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    return stack if precision == "float32" else HalfLayers(stack)


def named(stack: Stack, precision: str) -> str:
    """What files say about the numbers of a scan: ``bf16``, or the type that the model was loaded in."""
    return precision if precision != "float32" else str(stack.dtype).removeprefix("torch.")


def _halved(parameter: nn.Parameter) -> nn.Parameter:
    """A copy: of a matrix in bfloat16, of a vector (biases, scales of norms) as it is."""
    kind = torch.bfloat16 if parameter.ndim > 1 else parameter.dtype
    return nn.Parameter(parameter.detach().to(kind, copy=True), requires_grad=False)
