"""A TransformerLens model opened up as ``embed -> layers -> readout``.

    stack = surgery.Stack(surgery.load("babel"))
    tokens = stack.tokens(["p3 pf1 pf4 >other", "o1 >plain"])
    logits = stack.run(tokens, ":4 4:8 4:8 8:")      # the middle twice

The model's own code embeds, prepares the call of each layer (masks, rotary tables, positions; recorded once per batch),
computes each layer and reads out the last stream; the Stack only decides the order. It owns no weights and changes
nothing in the model. While hooks are attached to the model, its own (bridge) blocks run, so that the hooks fire, once
per pass; otherwise the plain twin that ``surgery.load`` keeps runs, with its fast attention. When it is opened it
proves itself: the identity wiring must give the model's own logits, or it refuses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery.models import stream_width
from surgery.models.engine import Engine, LayerOutput, Recording, Stream, replaced_forward
from surgery.models.errors import ModelError
from surgery.models.exactness import TOLERANCES, probe_ids, relative_difference
from surgery.models.loading import plain
from surgery.models.norms import FrozenNorm
from surgery.models.opening import bridge_engine, plain_engine
from surgery.models.tokens import Tokens, encode
from surgery.models.weights_hash import weights_sha256
from surgery.wiring.steps import executions
from surgery.wiring.value import Layer, Parallel, Scaled, Step, Wiring

Tap = Callable[[Layer, Stream, Stream], "Tensor | None"]


@dataclass(frozen=True)
class Context:
    """One embedded batch: the stream that enters layer 0, and what every layer is called with.

    Made by ``Stack.context``; it can be passed wherever a Stack takes tokens, and saves embedding them again.
    """

    tokens: Tokens
    engine: Engine
    recording: Recording

    @property
    def x0(self) -> Stream:
        """The stream that enters layer 0."""
        return self.recording.x0


class Stack:
    """A ``TransformerBridge`` (from ``surgery.load`` or your own) as ``embed -> layers -> readout``.

    Attributes:
        model: the bridge, as it was given.
        name: what the model is called in messages and manifests.
        n_layers, d_model, d_vocab, n_ctx: its depth, the width of its stream, its vocabulary and its longest prompt.
        device, dtype: of the weights.
        tolerance: the largest relative difference from the model's own logits that counts as exact in this dtype.

    Raises:
        ModelError: the model is not a decoder-only transformer with attention in every layer, has weights that are not
            finite, or its identity wiring does not give its own logits.
        TypeError: ``model`` is not a ``TransformerBridge``.

    Opening costs 4 F on two short random prompts.

    >>> import surgery
    >>> stack = Stack(surgery.load("babel"))
    >>> tokens = stack.tokens(["p3 pf1 pf4 >other", "o1 >plain"])
    >>> bool(torch.allclose(stack.run(tokens, ":"), stack.run(tokens), atol=1e-5))
    True
    """

    def __init__(self, model: TransformerBridge) -> None:
        if not isinstance(model, TransformerBridge):
            raise TypeError(
                f"Stack opens a TransformerBridge, not a {type(model).__name__}: try Stack(surgery.load(...))"
            )
        self.model = model
        self.name: str = str(model.cfg.model_name)
        self._bridge = bridge_engine(model, self.name)
        twin = plain(model)
        self._plain = None if twin is None else plain_engine(twin, model)
        self.n_layers = len(self._bridge.layers)
        self.d_model, self.d_vocab, self.n_ctx = (
            int(getattr(model.cfg, key)) for key in ("d_model", "d_vocab", "n_ctx")
        )
        self._streams = [stream_width.streams(block.original_component, self.d_model) for block in model.blocks]
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.tolerance = TOLERANCES[self.dtype]
        points = {id(point): point for point in model.hook_dict.values()}.values()
        self._silent_points = [point for point in points if not point.fwd_hooks and not point.bwd_hooks]
        self._resident = [(p, len(p.fwd_hooks), len(p.bwd_hooks)) for p in points if p.fwd_hooks or p.bwd_hooks]
        self._hashed: tuple[tuple[tuple[int, int], ...], str] | None = None
        self._prove()

    # --- running -----------------------------------------------------------------------------------------------------

    def tokens(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        *,
        prepend_bos: bool | None = None,
        padding_side: str = "right",
    ) -> Tokens:
        """Tokenize ``texts`` into one padded batch on the model's device; see ``surgery.models.tokens.encode``.

        Raises:
            ValueError: the model has no tokenizer, or ``encode`` cannot use the texts.
        """
        if self.model.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: pass token ids [batch, pos] instead of texts")
        return encode(self.model.tokenizer, texts, self.n_ctx, max_length, prepend_bos, padding_side).to(self.device)

    def run(
        self,
        tokens: "Tokens | Tensor | Context",
        wiring: "Wiring | str" = ":",
        tap: Tap | None = None,
        positions: "slice | Sequence[int] | Bool[Tensor, 'batch pos'] | None" = None,
        *,
        grad: bool = False,
    ) -> Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "chosen d_vocab"]:
        """Run a batch through a wiring and return the logits. Cost: ``wiring.depth / n_layers`` F.

        Args:
            tokens: a batch, or its ``context``.
            wiring: a ``Wiring`` or its notation; ``":"`` is the model as it is.
            tap: ``tap(layer, before, after)`` is called after every pass with the streams that enter and leave it
                [batch, pos, d_model]; what it returns, if not None, replaces ``after``.
            positions: read out only these: a slice or indices along pos, or a mask [batch, pos], which gives logits
                [chosen, d_vocab].
            grad: record the graph for a backward pass.

        Raises:
            ValueError: ``tokens`` are not integer ids, or the wiring is not one of this model (see ``wiring``).
        """
        wiring, engine = self.wiring(wiring), self._engine()
        with torch.set_grad_enabled(grad):
            if engine is self._plain and (positions is not None or isinstance(tokens, Context)):
                context = self.context(tokens)
                stream = self.execute(wiring, context.x0, context, tap, grad=grad)
                return self.readout(_at_positions(stream, positions), grad=grad)

            def finish(recording: Recording) -> Stream:
                return self._chain(engine, recording, wiring.steps, recording.x0, tap)

            batch = tokens.tokens if isinstance(tokens, Context) else Tokens.of(tokens)
            return _at_positions(engine.forward(finish, **self.inputs(batch)), positions)

    def context(self, tokens: "Tokens | Tensor | Context") -> Context:
        """Embed a batch once, to run many wirings on it. A context is returned as it is. Cost: the embedding."""
        if isinstance(tokens, Context):
            return tokens
        batch, engine = Tokens.of(tokens), self._engine()
        with torch.no_grad():
            return Context(batch, engine, engine.record(**self.inputs(batch)))

    def execute(
        self, wiring: "Wiring | str", x: Stream, context: Context, tap: Tap | None = None, *, grad: bool = False
    ) -> LayerOutput:
        """Run ``x`` through a wiring anywhere in the stack and return the stream that leaves it.

        ``execute("4:8", x_4, context)`` gives ``x_8``. ``tap`` and ``grad`` are as in ``run``.

        Args:
            x: the stream [batch, pos, d_model] that enters the wiring.
            context: the batch whose masks and positions the layers are called with.

        Raises:
            ValueError: the wiring is not one of this model, or its first layer takes a stream of another width.

        Cost: ``wiring.depth / n_layers`` F.
        """
        context = self._current(context)
        with torch.set_grad_enabled(grad):
            return self._chain(context.engine, context.recording, self.wiring(wiring, x.shape[-1]).steps, x, tap)

    def update(self, layer: int, x: Stream, context: Context | None = None, *, grad: bool = False) -> Stream:
        """The update ``f_l(x)``, which one layer adds to the stream ``x``. Cost: 1 / n_layers F.

        Args:
            layer: its index; negative ones count from the end.
            context: the batch that ``x`` belongs to; None means unpadded prompts of the shape of ``x``.

        Raises:
            ValueError: there is no such layer, or the stream that leaves it has another width than the one it takes.
        """
        if not -self.n_layers <= layer < self.n_layers:
            raise ValueError(f"layer {layer}: {self.name} has layers 0 to {self.n_layers - 1}")
        if (width_in := self._streams[layer][0]) != (width_out := self._streams[layer][2]):
            raise ValueError(
                f"layer {layer} of {self.name} takes a stream of {width_in} and gives one of {width_out}: it has no "
                "update; execute it, or the whole run of layers between two borders"
            )
        if context is None:
            context = self.context(torch.zeros(x.shape[:2], dtype=torch.long, device=self.device))
        context = self._current(context)
        with torch.set_grad_enabled(grad):
            return context.engine.layer(layer, x, context.recording.calls[layer]) - x

    def stream(self, tokens: "Tokens | Tensor | Context") -> Float[Tensor, "layer_plus_1 batch pos d_model"]:
        """``x_0 .. x_L`` of the unmodified run: entry l enters layer l, the last one leaves the last layer.

        Raises:
            ValueError: some layers give a stream of another width, so that the streams cannot be stacked.

        Cost: 1 F without the head.
        """
        context = self._current(self.context(tokens))
        if inside := [layer for layer, (_, _, width_out) in enumerate(self._streams) if width_out != self.d_model]:
            raise ValueError(
                f"layers {inside[0]} to {inside[-1]} of {self.name} give a stream of another width than "
                f"{self.d_model}: record them with stack.run(tokens, tap=...), or measure the model it was made from"
            )
        streams = [context.x0]
        with torch.no_grad():
            for layer, call in enumerate(context.recording.calls):
                streams.append(context.engine.layer(layer, streams[-1], call))
        return torch.stack(streams)

    def readout(self, x: Float[Tensor, "... d_model"], *, grad: bool = False) -> Float[Tensor, "... d_vocab"]:
        """The logits of any stream: final norm, unembedding, and soft-capping or scaling where the model has them.

        The model's own head computes them, in a run on prompts of one token in which the vectors of ``x`` leave the
        last layer. Cost: the head.
        """
        engine = self.fastest_engine
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        vectors = rearrange(x, "... d_model -> (...) 1 d_model")
        with torch.set_grad_enabled(grad):
            logits = engine.forward(lambda _: vectors, **self.inputs(Tokens.of(ids)))
        return logits.reshape(*x.shape[:-1], -1)

    @contextmanager
    def frozen(self, context: Context, scales: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Context manager: norms that read the stream keep the denominators of the unmodified run of this batch.

        Norms on a sublayer's output and inside attention stay live: they cannot pass the size of one layer's update on
        to another. Streams that run inside must have the shape of the batch. Entering costs 1 F, or nothing if
        ``scales`` (from ``norm_scales``) are given.

        Raises:
            ValueError: the model has a norm whose denominator cannot be determined (the message names it), or a stream
                of another shape runs inside.
        """
        context = self._current(context)
        scales = self.norm_scales(context) if scales is None else scales
        with ExitStack() as freezing:
            for name, norm in self._norms(context.engine).items():
                freezing.enter_context(replaced_forward(norm.module, _with_scale(norm, scales[name])))
            yield

    def norm_scales(self, tokens: "Tokens | Tensor | Context") -> dict[str, Float[Tensor, "batch pos 1"]]:
        """Denominators of the norms that read the stream in the unmodified run, by their hook names in TransformerLens.

        Raises ValueError as ``frozen`` does. Cost: 1 F without the head.
        """
        context = self._current(self.context(tokens))
        scales: dict[str, Tensor] = {}
        with ExitStack() as recorders:
            for name, norm in self._norms(context.engine).items():

                def record(_: Any, args: tuple, norm: FrozenNorm = norm, name: str = name) -> None:
                    scales[name] = norm.scale(args[0])

                recorders.callback(norm.module.register_forward_pre_hook(record).remove)
            self.execute(":", context.x0, context)
        return scales

    def wiring(self, wiring: "Wiring | str", width: int | None = None) -> Wiring:
        """Parse and check a wiring of this model, which a stream of ``width`` (by default d_model) enters.

        Raises:
            ValueError: it is made for another number of layers, runs sublayers that this model does not have or that
                do not add up to its layers, or a layer takes a stream of another width than the layer before gives.
        """
        wiring = Wiring.parse(wiring, self.n_layers) if isinstance(wiring, str) else wiring
        if wiring.n_layers != self.n_layers:
            raise ValueError(f"{wiring!r} is for {wiring.n_layers} layers, {self.name} has {self.n_layers}")
        parts = {layer.part for layer in executions(wiring.steps) if layer.part is not None}
        if parts and not parts <= self._exact_sublayers:
            exact = ", ".join(self._exact_sublayers)
            why = f"have only {exact}" if exact else "cannot be split exactly"
            raise ValueError(f"{str(wiring)!r} runs sublayers, but the layers of {self.name} {why}")
        if self._resized:
            self._width(wiring.steps, self.d_model if width is None else width)
        return wiring

    def _width(self, steps: tuple[Step, ...], width: int) -> int:
        """The width of the stream that leaves these steps, which a stream of ``width`` enters."""
        for step in steps:
            match step:
                case Layer(index):
                    width_in, _, width_out = self._streams[index]
                    if width_in != width:
                        raise ValueError(
                            f"layer {index} of {self.name} takes a stream of {width_in}, not one of {width}: layers "
                            "with a stream of their own run as a whole, from the first that maps into it to the last"
                        )
                    width = width_out
                case Parallel(branches):
                    if any(self._width(branch, width) != width for branch in branches):
                        raise ValueError("branches beside each other must give the width of stream that they take")
                case Scaled(_, body) if self._width(body, width) != width:
                    raise ValueError("what is scaled must give the width of stream that it takes")
        return width

    # --- proving -----------------------------------------------------------------------------------------------------

    def checks(self) -> pd.DataFrame:
        """The exactness checks of this model, one a row: check, compared_with, largest_difference, tolerance, passed.

        Differences are relative to the largest value compared. Cost: about 12 F on two short random prompts.
        """
        tokens = self._probe()
        context, own = self.context(tokens), self._own_logits(tokens)
        rows = [("identity wiring", "the model's own logits", relative_difference(self.run(tokens), own))]
        if self._plain is not None:
            both = (engine.observe(**self.inputs(tokens))[0] for engine in (self._plain, self._bridge))
            difference = max(relative_difference(*pair) for pair in zip(*both, strict=True))
            rows.append(("stream of the plain twin", "the bridge's blocks", difference))
        last = torch.zeros_like(tokens.mask)
        last[:, -1] = True
        difference = relative_difference(self.run(tokens, ":", positions=last), own[:, -1])
        rows.append(("readout at chosen positions", "all logits", difference))
        for side in ("left", "right"):
            padded = tokens.pad(3, side)
            logits = rearrange(own, "batch pos d_vocab -> (batch pos) d_vocab")
            difference = relative_difference(self.run(padded)[padded.mask], logits)
            rows.append((f"prompts padded on the {side}", "unpadded", difference))
        if not self._resized:  # sublayers and streams of several widths cannot be compared
            streams = self.stream(tokens)
            sublayers = f"attention {'beside' if self.parallel_sublayers else 'then'} MLP, every layer"
            rows.append((sublayers, "whole layers", self._sublayer_difference(context, streams)))
            with self.frozen(context):
                difference = relative_difference(self.stream(context), streams)
            rows.append(("norms frozen at their own scales", "live norms", difference))
        frame = pd.DataFrame(rows, columns=["check", "compared_with", "largest_difference"])
        frame["tolerance"] = self.tolerance
        frame["passed"] = frame["largest_difference"] <= self.tolerance
        return frame

    @cached_property
    def parallel_sublayers(self) -> bool:
        """Whether attention and MLP of a layer read the same stream (GPT-J, GPT-NeoX); decided by running both ways."""
        tokens = self._probe()
        context, streams = self.context(tokens), self.stream(tokens)
        x, engine, call = streams[0], context.engine, context.recording.calls[0]
        with torch.no_grad():
            attn = engine.sublayer(0, "attn", x, call)
            together = attn + engine.sublayer(0, "mlp", x, call) - x
            after = engine.sublayer(0, "mlp", attn, call)
        return relative_difference(together, streams[1]) < relative_difference(after, streams[1])

    def _sublayer_difference(self, context: Context, streams: Tensor) -> float:
        """The largest relative difference of attention and MLP, run one by one, from whole layers."""
        engine, worst = context.engine, 0.0
        for layer, call in enumerate(context.recording.calls):
            x = streams[layer]
            with torch.no_grad():
                composed = engine.sublayer(layer, "attn", x, call)
                if engine.parts[layer].mlp is not None:
                    from_stream = x if self.parallel_sublayers else composed
                    composed = composed + (engine.sublayer(layer, "mlp", from_stream, call) - from_stream)
            worst = max(worst, relative_difference(composed, streams[layer + 1]))
        return worst

    def _prove(self) -> None:
        """Raise ModelError unless the identity wiring gives the model's own logits."""
        tokens = self._probe()
        streams, own = self._bridge.observe(**self.inputs(tokens))
        if not torch.isfinite(own).all():
            raise ModelError(self._not_finite())
        model_logits = self._own_logits(tokens)
        twin, self._plain = self._plain, None
        self._require("identity wiring through the bridge's blocks", self.run(tokens), model_logits)
        if twin is None:
            return
        twin_streams, twin_logits = twin.observe(**self.inputs(tokens))
        pairs = ((twin_logits, own), (twin_streams[-1], streams[-1]))
        # A twin that disagrees means that the bridge was edited or processed after loading: then the bridge, which the
        # user works with, is what is measured.
        if max(relative_difference(*pair) for pair in pairs) <= self.tolerance:
            self._plain = twin
            self._require("identity wiring through the plain twin", self.run(tokens), model_logits)

    def _require(self, check: str, actual: Tensor, expected: Tensor) -> None:
        difference = relative_difference(actual, expected)
        if not difference <= self.tolerance:
            raise ModelError(
                f"{self.name} cannot be opened exactly: {check} differs from the model's own logits by "
                f"{difference:.1e} of their size, allowed is {self.tolerance:.0e}"
            )

    def _own_logits(self, tokens: Tokens) -> Tensor:
        with torch.no_grad():
            return self.model(tokens.ids, return_type="logits", use_cache=False)

    def _probe(self) -> Tokens:
        return Tokens.of(probe_ids(self, spare=3))

    def _not_finite(self) -> str:
        broken = [name for name, weight in self.model.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            first, rest = broken[0].replace("._original_component", ""), len(broken) - 1
            more = f" and {rest} more" if rest else ""
            return f"{self.name} has weights that are not finite (NaN or infinity): {first}{more}"
        return f"{self.name} gives logits that are not finite on random tokens though all its weights are"

    @property
    def fastest_engine(self) -> Engine:
        """The engine of the plain twin where there is one, even while hooks are attached; else that of the bridge."""
        return self._plain or self._bridge

    @property
    def has_twin(self) -> bool:
        """Whether a plain twin agrees with the bridge; False where the bridge was edited after loading."""
        return self._plain is not None

    @property
    def sha256(self) -> str:
        """``weights_sha256`` of the weights that run, which the card of an exported model also names.

        Computed once, and again after an edit that autograd's version counters notice (one through ``.data`` is not).
        """
        module = self.model if self._plain is None else self._plain.module
        edition = tuple((id(weight), weight._version) for weight in module.parameters())  # noqa: SLF001 (no other name)
        if self._hashed is None or self._hashed[0] != edition:
            self._hashed = edition, weights_sha256(module)
        return self._hashed[1]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _engine(self) -> Engine:
        return self._bridge if self._plain is None or self.hooks_listen() else self._plain

    def _current(self, context: Context) -> Context:
        """The same batch recorded by the engine that runs now: hooks may have come or gone since."""
        return context if context.engine is self._engine() else self.context(context.tokens)

    def hooks_listen(self) -> bool:
        """Whether hooks were attached after the Stack was opened (some adapters have permanent hooks of their own)."""
        for point in self._silent_points:  # a plain loop: this runs before everything, over hundreds of points
            if point.fwd_hooks or point.bwd_hooks:
                return True
        return any(len(point.fwd_hooks) > fwd or len(point.bwd_hooks) > bwd for point, fwd, bwd in self._resident)

    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """The arguments to call the model with: ids, and for prompts padded on the left the mask and positions."""
        inputs: dict[str, Any] = {"input_ids": tokens.ids, "use_cache": False}
        if tokens.padded_left:
            inputs |= {"attention_mask": tokens.mask.long(), "position_ids": tokens.positions}
        return inputs

    def _norms(self, engine: Engine) -> dict[str, FrozenNorm]:
        def probe(layer: int) -> Tensor:
            width, generator = self._streams[layer][1], torch.Generator().manual_seed(0)
            return torch.randn(4, width, generator=generator).to(self.device, self.dtype)

        with torch.no_grad():
            return {
                f"blocks.{layer}.{name}.hook_scale": FrozenNorm(module, probe(layer))
                for layer, parts in enumerate(engine.parts)
                for name, module in parts.norms.items()
            }

    def _chain(
        self, engine: Engine, recording: Recording, steps: tuple[Step, ...], x: Stream, tap: Tap | None
    ) -> LayerOutput:
        """Run a chain of steps on a stream."""
        for step in steps:
            match step:
                case Layer(index, part):
                    before, call = x, recording.calls[index]
                    x = engine.layer(index, x, call) if part is None else engine.sublayer(index, part, x, call)
                    replacement = tap(step, before, x) if tap is not None else None
                    x = x if replacement is None else replacement
                case Parallel(branches, mean):
                    outputs = [self._chain(engine, recording, branch, x, tap) for branch in branches]
                    if mean:
                        x = sum(outputs[1:], outputs[0]) / len(outputs)
                    else:
                        x = x + sum(output - x for output in outputs)
                case Scaled(factor, body):
                    x = x + factor * (self._chain(engine, recording, body, x, tap) - x)
        return x

    @cached_property
    def _resized(self) -> bool:
        """Whether some layers have a stream with a width of its own (``surgery.models.stream_width``)."""
        return any(set(streams) != {self.d_model} for streams in self._streams)

    @cached_property
    def _exact_sublayers(self) -> frozenset[str]:
        """The sublayers that can run on their own, because together they give the whole layer again."""
        tokens = self._probe()
        context = self.context(tokens)
        if self._resized or self._sublayer_difference(context, self.stream(context)) > self.tolerance:
            return frozenset()
        return frozenset(["attn"] if self._bridge.parts[0].mlp is None else ["attn", "mlp"])


def _with_scale(norm: FrozenNorm, scale: Tensor) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[:-1] != scale.shape[:-1]:
            raise ValueError(
                f"frozen norms belong to a batch of shape {list(scale.shape[:-1])}, the stream has {list(x.shape[:-1])}"
            )
        return norm.with_scale(x, scale)

    return forward


def _at_positions(x: Tensor, positions: Any) -> Tensor:
    if positions is None:
        return x
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return x[positions]
    return x[:, positions]
