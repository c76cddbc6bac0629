"""One module with a row of layers, opened: the model's own forward with the layer loop taken out of its hands.

A causal language model does four things: it embeds tokens, prepares what every layer is called with (masks, rotary
tables, positions), runs its layers, and reads the last stream out (final norm, unembedding, soft-capping, scaling).
``Engine`` lets the model do the first, the second and the fourth with its own code and does the third itself: during
one call of the model every layer's ``forward`` is stood in for. A stand-in notes what it was called with and hands
the stream on unchanged; the last one lets the caller decide what leaves the stack. So nothing here knows an
architecture by name.

Stand-ins are instance attributes and are removed on every way out; no weight, hook or config field is touched.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Stream = Float[Tensor, "batch pos d_model"]
Given = Float[
    Tensor, "batch pos given"
]  # what leaves layers, which may be as wide as they say (``surgery.models.stream_width``)


class _StopError(Exception):
    """Carries the recording out of the model's forward."""


@dataclass(frozen=True)
class Call:
    """What the model calls one layer with, beside the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """One batch as an engine saw it: the stream that enters layer 0 and every layer's call."""

    x0: Stream
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Parts:
    """The modules of one layer: its two sublayers (whose output can be silenced) and the norms that read the stream."""

    attn: nn.Module
    mlp: nn.Module | None
    norms: dict[str, nn.Module]


class Engine:
    """``module`` is called to run the model, ``layers`` are what its loop calls, ``parts`` the modules inside each."""

    def __init__(self, name: str, module: nn.Module, layers: Sequence[nn.Module], parts: Sequence[Parts]) -> None:
        self.name, self.module, self.layers, self.parts = name, module, tuple(layers), tuple(parts)
        self._arity: dict[nn.Module, int] = {}  # of modules that return a tuple: its length

    def observe(self, **inputs: Any) -> tuple[list[Stream], Tensor]:
        """Run the untouched model once; returns the stream that leaves each layer, and the logits.

        Notes on the way which modules return tuples, so that stand-ins can do as they do. Cost: 1 F.
        """
        streams: list[Stream] = []

        def note(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self._arity[module] = len(output)

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            streams.append(output[0] if isinstance(output, tuple) else output)

        sublayers = [module for parts in self.parts for module in (parts.attn, parts.mlp) if module is not None]
        handles = [module.register_forward_hook(note) for module in (*self.layers, *sublayers)]
        handles += [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            with torch.no_grad():
                return streams, _logits(self.module(**inputs))
        finally:
            for handle in handles:
                handle.remove()

    def record(self, **inputs: Any) -> Recording:
        """Embed a batch and note every layer's call; no layer runs, nor the head."""
        try:
            self._forward(None, **inputs)
        except _StopError as stop:
            return stop.args[0]
        raise RuntimeError(f"{type(self.module).__name__} did not call its layers")

    def forward(self, finish: Callable[[Recording], Stream], **inputs: Any) -> Tensor:
        """Embed a batch, let ``finish`` make of it the stream that leaves the stack, and return what the head makes
        of that."""
        return _logits(self._forward(finish, **inputs))

    def _forward(self, finish: Callable[[Recording], Stream] | None, **inputs: Any) -> Any:
        first: list[Stream] = []
        calls: list[Call] = []
        with ExitStack() as standing_in:

            def stand_in(layer: nn.Module) -> Callable[..., Any]:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                    first.append(x)
                    calls.append(Call(rest, kwargs))
                    if len(calls) < len(self.layers):
                        return self._like(layer, x)
                    recording = Recording(first[0], tuple(calls))
                    if finish is None:
                        raise _StopError(recording)
                    standing_in.close()  # the real layers are back in place when the caller runs them
                    return self._like(layer, finish(recording))

                return forward

            for layer in self.layers:
                standing_in.enter_context(replaced_forward(layer, stand_in(layer)))
            return self.module(**inputs)

    def layer(self, index: int, x: Stream, call: Call) -> Given:
        """One whole layer on any stream, as the model computes it: ``x + f(x)``, on the device where ``x`` lies."""
        output = self.layers[index](x, *call.args, **call.kwargs)
        return (output[0] if isinstance(output, tuple) else output).to(x.device)

    def sublayer(self, index: int, part: str, x: Stream, call: Call) -> Stream:
        """The layer with its other sublayer, ``attn`` or ``mlp``, costing nothing and writing zero."""
        parts = self.parts[index]
        other = parts.mlp if part == "attn" else parts.attn
        if other is None:
            return self.layer(index, x, call)

        def zeros(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            return self._like(other, given.new_zeros((*given.shape[:-1], x.shape[-1])))

        with replaced_forward(other, zeros):
            return self.layer(index, x, call)

    def _like(self, module: nn.Module, x: Tensor) -> Any:
        arity = self._arity.get(module)
        return x if arity is None else (x, *[None] * (arity - 1))


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call ``forward`` instead of the module's own within the context."""
    own = module.__dict__.get("forward")  # accelerate and others keep theirs there
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
