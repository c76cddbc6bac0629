"""A module with a row of layers, opened: the model's own forward, but with the loop over layers left to the caller.

A causal language model does four things: it embeds tokens, prepares what every layer is called with (masks, rotary
tables, positions), runs its layers, and reads the last stream out (final norm, unembedding, soft-capping, scaling).
``Engine`` lets the model do the first, the second and the fourth with its own code and does the third itself: during
one call of the model every layer's ``forward`` is replaced by a stand-in. A stand-in records what it was called with
and passes the stream on unchanged; the last one lets the caller decide what leaves the stack. So nothing here knows an
architecture by name.

Stand-ins (``surgery.models.scopes``) are removed on every way out and act for the caller alone; no weight, hook or
config field is touched. They take the place of the whole call, hooks included, so that a hook on a layer fires when the
layer runs and only then.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.models.scopes import CALL, Scope, own, within
from surgery.models.tokens import Tokens

Stream = Float[Tensor, "batch pos d_model"]
# What leaves a layer, whose stream may have a width of its own (``surgery.models.stream_width``).
LayerOutput = Float[Tensor, "batch pos width_out"]


class _StopError(Exception):
    """Carries the recording out of the model's forward pass."""


@dataclass(frozen=True)
class Call:
    """The arguments that the model calls one layer with, besides the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """One batch as an engine recorded it: the stream that enters layer 0 and the call of every layer."""

    x0: Stream
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Context:
    """One embedded batch: the stream that enters layer 0, and what every layer is called with.

    Made by ``Stack.context``; it can be passed wherever a Stack takes tokens, and saves embedding them again.
    """

    tokens: Tokens
    engine: "Engine"
    recording: Recording

    @property
    def x0(self) -> Stream:
        """The stream that enters layer 0."""
        return self.recording.x0

    def __repr__(self) -> str:
        return f"Context({self.tokens.summary}; d_model {self.x0.shape[-1]}, {self.engine.name} engine)"


@dataclass(frozen=True)
class Parts:
    """The modules of one layer: its two sublayers, which can be silenced, and the norms that read the stream."""

    attn: nn.Module
    mlp: nn.Module | None
    norms: dict[str, nn.Module]


class Engine:
    """A model that can be run layer by layer.

    Attributes: ``name``; ``module``, which is called to run the model; ``layers``, the modules that its loop calls;
    ``parts``, the modules inside each.
    """

    def __init__(self, name: str, module: nn.Module, layers: Sequence[nn.Module], parts: Sequence[Parts]) -> None:
        self.name, self.module, self.layers, self.parts = name, module, tuple(layers), tuple(parts)
        self._form: dict[nn.Module, tuple[type, int]] = {}  # of modules that return a tuple or list: which, how long

    def observe(self, **inputs: Any) -> tuple[list[Stream], Tensor]:
        """Run the untouched model once; return the stream that leaves each layer, and the logits.

        It also records which modules return tuples, so that stand-ins return the same. Cost: 1 F.
        """
        streams: list[Stream] = []

        def heard(module: nn.Module, is_layer: bool) -> Callable[..., Any]:
            module_itself = own(module, CALL)

            def call(*args: Any, **kwargs: Any) -> Any:
                output = module_itself(*args, **kwargs)
                if isinstance(output, tuple | list):
                    self._form[module] = type(output), len(output)
                if is_layer:
                    streams.append(_stream(output))
                return output

            return call

        def run(scope: Scope) -> Any:
            sublayers = [module for parts in self.parts for module in (parts.attn, parts.mlp) if module is not None]
            for module in dict.fromkeys((*sublayers, *self.layers)):
                scope.replace(module, CALL, heard(module, module in self.layers))
            with torch.no_grad():
                return self.module(**inputs)

        return streams, _logits(within(run))

    def record(self, **inputs: Any) -> Recording:
        """Embed a batch and record the call of every layer; neither a layer nor the head runs. Cost: the embedding."""
        try:
            self._forward(None, **inputs)
        except _StopError as stop:
            return stop.args[0]
        raise RuntimeError(f"{type(self.module).__name__} did not call its layers")

    def forward(self, finish: Callable[[Recording], Stream], **inputs: Any) -> Tensor:
        """Embed a batch, let ``finish`` compute the stream that leaves the stack, and return the logits of that."""
        return _logits(self._forward(finish, **inputs))

    def _forward(self, finish: Callable[[Recording], Stream] | None, **inputs: Any) -> Any:
        def run(scope: Scope) -> Any:
            first: list[Stream] = []
            calls: list[Call] = []

            def stand_in(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
                x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                first.append(x)
                calls.append(Call(rest, kwargs))
                if len(calls) < len(self.layers):
                    return self._like(layer, x)
                recording = Recording(first[0], tuple(calls))
                if finish is None:
                    raise _StopError(recording)
                scope.close()  # the real layers are back in place when the caller runs them
                return self._like(layer, finish(recording))

            for layer in self.layers:
                scope.replace(layer, CALL, partial(stand_in, layer))
            return self.module(**inputs)

        return within(run)

    def copied(self, memo: dict[int, Any]) -> "Engine":
        """The same engine with copies of its layers; an object whose id is in ``memo`` is replaced by what is there."""
        own = (self.layers, self.parts, self._form)
        layers, parts, form = copy.deepcopy(own, {**memo, id(self.module): self.module})
        engine = Engine(self.name, self.module, layers, parts)
        engine._form = form
        return engine

    def layer(self, index: int, x: Stream, call: Call) -> LayerOutput:
        """Run one whole layer on any stream, as the model does: ``x + f(x)``, on the device of ``x``."""
        return _stream(self.layers[index](x, *call.args, **call.kwargs)).to(x.device)

    def sublayer(self, index: int, part: str, x: Stream, call: Call) -> Stream:
        """Run only the ``attn`` or the ``mlp`` of a layer: the other sublayer costs nothing and writes zero."""
        parts = self.parts[index]
        other = parts.mlp if part == "attn" else parts.attn
        if other is None:
            return self.layer(index, x, call)

        def zeros(*args: Any, **kwargs: Any) -> Any:
            inputs = args[0] if args else kwargs["hidden_states"]
            return self._like(other, inputs.new_zeros((*inputs.shape[:-1], x.shape[-1])))

        def run(scope: Scope) -> Stream:
            scope.replace(other, CALL, zeros)
            return self.layer(index, x, call)

        return within(run)

    def _like(self, module: nn.Module, x: Tensor) -> Any:
        """``x`` in the form in which ``module`` returns it: alone, or first in a tuple or list."""
        kind, length = self._form.get(module, (None, 0))
        return x if kind is None else kind((x, *[None] * (length - 1)))


def _stream(output: Any) -> Tensor:
    """The stream that a layer gives, which many return first in a tuple or list."""
    return output[0] if isinstance(output, tuple | list) else output


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
