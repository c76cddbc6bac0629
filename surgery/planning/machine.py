"""How long this machine takes for what measures do: a layer, its gradient, a readout, and float64 products.

Every measure documents its cost in forward passes F. ``Work`` says the same in units that a machine's speed turns into
seconds; ``Machine.of`` measures that speed on the model itself, in about as long as ten forward passes.

>>> work = Work(forward=1000, readouts=10)
>>> machine = Machine(forward=1e-3, backward=3e-3, readouts=1e-2, products=1e-9)
>>> round(machine.seconds(work), 3), round(machine.seconds(2 * work + Work(backward=100)), 3)
(1.1, 2.5)
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from einops import rearrange

from surgery.instruments import readout
from surgery.models.half_precision import HalfLayers
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens

TOKENS = 1024  # at most, in the batch on which layers are timed
READ_OUT = 128  # tokens
ROUNDS = 3  # the median counts: the fastest is too hopeful on a machine that others use too


@dataclass(frozen=True)
class Work:
    """What a measure makes a machine do.

    Attributes:
        forward: layers run, times the tokens that they run on.
        backward: layers that a gradient passes through, times tokens; the forward pass that it needs is included.
        readouts: tokens whose next-token distribution over the whole vocabulary is computed.
        products: multiply-adds of the statistics, in float64.
        memory: bytes at once, beside the weights; of several pieces of work the most.
    """

    forward: float = 0.0
    backward: float = 0.0
    readouts: float = 0.0
    products: float = 0.0
    memory: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        both = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return Work(**both | {"memory": max(self.memory, other.memory)})

    def __rmul__(self, times: float) -> "Work":
        scaled = {field.name: times * getattr(self, field.name) for field in fields(self)}
        return Work(**scaled | {"memory": self.memory})


@dataclass(frozen=True)
class Machine:
    """Seconds for one unit of each kind of ``Work``, for one model on one machine.

    ``half`` is how long a layer takes in bfloat16, as a share of what it takes in float32; 1 where there is no such
    copy of the model.
    """

    forward: float
    backward: float
    readouts: float
    products: float
    half: float = 1.0

    def seconds(self, work: Work) -> float:
        """How long the work will take."""
        return sum(
            getattr(self, kind) * getattr(work, kind) for kind in ("forward", "backward", "readouts", "products")
        )

    @classmethod
    def of(cls, stack: Stack, tokens: Tokens) -> "Machine":
        """Time the first prompts of ``tokens``, some ``TOKENS`` tokens of them, on ``stack``.

        Cost: 6 F and 3 F with gradients of these prompts, and as many readouts of ``READ_OUT`` tokens.
        """
        count = max(1, TOKENS // tokens.ids.shape[1])
        batch = Tokens(tokens.ids[:count], tokens.mask[:count]).to(stack.device)
        context = stack.context(batch)
        units = stack.n_layers * batch.ids.numel()  # padding runs too
        final = stack.execute(":", context.x0, context)
        rows = rearrange(final, "batch pos d_model -> (batch pos) d_model")[:READ_OUT]
        square = torch.ones(stack.d_model, stack.d_model, dtype=torch.float64)

        def forward() -> object:
            return stack.execute(":", context.x0, context)

        def backward() -> object:
            x = context.x0.detach().clone().requires_grad_()
            with torch.enable_grad():
                end = stack.execute(":", x, context, grad=True).float().square().mean()
            return torch.autograd.grad(end, x)

        half, seconds = _half(stack, context), _median(forward, stack)
        return cls(
            forward=seconds / units,
            backward=_median(backward, stack) / units,
            readouts=_median(lambda: readout.log_probabilities(stack, rows), stack) / len(rows),
            products=_median(lambda: square @ square, stack) / stack.d_model**3,
            half=1.0 if half is None else min(1.0, _median(half, stack) / seconds),
        )


def _half(stack: Stack, context: Context) -> "Callable[[], object] | None":
    """A forward pass with the layers in bfloat16; None for a model that has no such copy."""
    try:
        layers = HalfLayers(stack)
    except ValueError:
        return None
    return lambda: layers.execute(":", context.x0, context)


def _median(run: Callable[[], object], stack: Stack) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        if stack.device.type == "cuda":
            torch.cuda.synchronize(stack.device)
        times.append(time.perf_counter() - start)
    middle = sorted(times)[ROUNDS // 2]
    return middle if math.isfinite(middle) and middle > 0 else 1e-9
