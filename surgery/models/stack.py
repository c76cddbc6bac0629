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
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformers import PreTrainedTokenizerBase

from surgery.models import freezing, proof, turns, twin
from surgery.models.chain import Tap, at_positions, run_chain, width_after
from surgery.models.conditions import measure
from surgery.models.deciding import Decision, decide
from surgery.models.engine import Context as Context
from surgery.models.engine import Engine, LayerOutput, Recording, Stream
from surgery.models.exactness import tolerance
from surgery.models.loading import load
from surgery.models.norms import FrozenNorm
from surgery.models.opening import bridge_engine
from surgery.models.scopes import Scope, scope
from surgery.models.tokens import Batch, Tokens, encode
from surgery.models.weights_hash import edition, weights_sha256
from surgery.outside import shown
from surgery.wiring.steps import executions
from surgery.wiring.value import Wiring

Result = TypeVar("Result")


class Stack:
    """A ``TransformerBridge`` (from ``surgery.load`` or your own) as ``embed -> layers -> readout``.

    Anything else that ``surgery.load`` takes (a name, a folder, a Hugging Face model) is loaded first. What runs is
    what the model computes at that moment: hooks, replaced parameters and modules are heard, also those that came or
    went after the Stack was opened. Whatever mode the model is in, it is measured in evaluation mode, without autocast,
    and left as it was, also when a call is interrupted.

    Threads can share a model. A call waits until no other thread is in a call of a Stack on that model, and acts for
    its own thread only: whoever calls the model itself meanwhile gets the model's answer, and ``frozen`` freezes norms
    for the thread (or asyncio task) that is inside. Only training mode and torch's default number format are the same
    for all threads, and TransformerLens' bridge is not made to be called by two threads at once; the plain twin is.

    Attributes:
        model: the bridge.
        name: what the model is called in messages and manifests.
        n_layers, d_model, d_vocab, n_ctx: its depth, the width of its stream, its vocabulary and its longest prompt.
        device, dtype: of the weights.
        tolerance: the largest relative difference from the model's own logits that counts as exact in this dtype.

    Raises:
        ModelError: the model is not a decoder-only transformer with attention in every layer, has weights that are not
            finite, its identity wiring does not give its own logits, or TransformerLens' wrapper computes others than
            the model itself.
        TypeError: ``model`` is none of these.

    Opening costs 4 F on two short random prompts.

    >>> import surgery
    >>> stack = Stack(surgery.load("babel"))
    >>> tokens = stack.tokens(["p3 pf1 pf4 >other", "o1 >plain"])
    >>> bool(torch.allclose(stack.run(tokens, ":"), stack.run(tokens), atol=1e-5))
    True
    """

    def __init__(self, model: "TransformerBridge | nn.Module | str | Path") -> None:
        if not isinstance(model, TransformerBridge | nn.Module | str | Path):
            raise TypeError(
                f"Stack opens a TransformerBridge, or what surgery.load takes, not a {type(model).__name__}"
            )
        self.model = model = load(model)
        self.name: str = str(model.cfg.model_name)
        self.d_model, self.d_vocab, self.n_ctx = (
            int(getattr(model.cfg, key)) for key in ("d_model", "d_vocab", "n_ctx")
        )
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._hashed: tuple[bytes, str] | None = None
        self._in_turn(lambda _: self._settle())

    def __repr__(self) -> str:
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        exact = f"checked to give the model's own logits within {self.tolerance:.0e}"
        return f"Stack({shown(self.name, 60)}: {self.n_layers} layers, d_model {self.d_model}, {where}, {exact})"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer as it was given to ``surgery.load`` (or set on the model since)."""
        return twin.tokenizer(self.model)

    # --- running -----------------------------------------------------------------------------------------------------

    def tokens(
        self,
        texts: "str | Sequence[str]",
        max_length: int | None = None,
        *,
        prepend_bos: bool | None = None,
        padding_side: str = "right",
    ) -> Tokens:
        """Tokenize ``texts`` into one padded batch on the model's device; see ``surgery.models.tokens.encode``.

        Raises:
            ValueError: the model has no tokenizer, or ``encode`` cannot use the texts.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: pass token ids [batch, pos] instead of texts")
        rows = encode(self.tokenizer, texts, self.n_ctx, self.d_vocab, max_length, prepend_bos, padding_side)
        return rows.to(self.device)

    def run(
        self,
        tokens: "Batch | Context",
        wiring: "Wiring | str" = ":",
        tap: Tap | None = None,
        positions: "slice | Sequence[int] | Bool[Tensor, 'batch pos'] | Int[Tensor, 'batch pos'] | None" = None,
        *,
        grad: bool = False,
    ) -> Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "chosen d_vocab"]:
        """Run a batch through a wiring and return the logits. Cost: ``wiring.depth / n_layers`` F.

        Args:
            tokens: a batch (``Tokens``, ids [batch, pos], what a tokenizer returns, or texts), or its ``context``.
            wiring: a ``Wiring`` or its notation; ``":"`` is the model as it is.
            tap: ``tap(layer, before, after)`` is called after every pass with the streams that enter and leave it
                [batch, pos, d_model]; what it returns, if not None, replaces ``after``.
            positions: read out only these: a slice or indices along pos, or a mask [batch, pos], which gives logits
                [chosen, d_vocab].
            grad: record the graph for a backward pass.

        Raises:
            ValueError: ``tokens`` are not ids that this model knows, or the wiring is not one of this model (see
                ``wiring``).
        """

        def run(engine: Engine) -> Tensor:
            steps = self.wiring(wiring).steps
            in_parts = engine is self._decision.plain and not self._decision.snapshots[1].listening()
            if in_parts and (positions is not None or isinstance(tokens, Context)):
                context = self._current(tokens, engine)
                stream = run_chain(engine, context.recording, steps, context.x0, tap)
                return self.readout(at_positions(stream, positions), grad=grad)

            def finish(recording: Recording) -> Stream:
                return run_chain(engine, recording, steps, recording.x0, tap)

            batch = tokens.tokens if isinstance(tokens, Context) else self._batch(tokens)
            return at_positions(engine.forward(finish, **self.inputs(batch)), positions)

        return self._measured(run, grad)

    def context(self, tokens: "Batch | Context") -> Context:
        """Embed a batch once, to run many wirings on it. A context is returned as it is. Cost: the embedding."""
        if isinstance(tokens, Context):
            return tokens
        batch = self._batch(tokens)
        return self._measured(lambda engine: Context(batch, engine, engine.record(**self.inputs(batch))))

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

        def execute(engine: Engine) -> LayerOutput:
            steps = self.wiring(wiring, x.shape[-1]).steps
            return run_chain(engine, self._current(context, engine).recording, steps, x, tap)

        return self._measured(execute, grad)

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
        width_in, _, width_out = self._decision.streams[layer]
        if width_in != width_out:
            raise ValueError(
                f"layer {layer} of {self.name} takes a stream of {width_in} and gives one of {width_out}: it has no "
                "update; execute it, or the whole run of layers between two borders"
            )

        def update(engine: Engine) -> Stream:
            of_x = self._current(torch.zeros(x.shape[:2], dtype=torch.long) if context is None else context, engine)
            return engine.layer(layer, x, of_x.recording.calls[layer]) - x

        return self._measured(update, grad)

    def stream(
        self, tokens: "Batch | Context", wiring: "Wiring | str" = ":"
    ) -> Float[Tensor, "pass_plus_1 batch pos d_model"]:
        """The streams of a run, by default of the unmodified one: ``x_0 .. x_L``.

        Entry 0 enters the stack, entry n leaves the n-th pass of ``wiring.layers``, the last one is read out. A pass is
        one layer or sublayer; of branches beside each other and of scaled chains, each pass gives the stream that
        leaves it inside its branch, and an entry after the group is what the group gives (``record`` names them all).

        Raises:
            ValueError: some layers give a stream of another width, so that the streams cannot be stacked.

        Cost: ``wiring.depth / n_layers`` F without the head.
        """
        widths = [width_out for _, _, width_out in self._decision.streams]
        if inside := [layer for layer, width in enumerate(widths) if width != self.d_model]:
            raise ValueError(
                f"layers {inside[0]} to {inside[-1]} of {self.name} give a stream of another width than "
                f"{self.d_model}: record them with stack.run(tokens, tap=...), or measure the model it was made from"
            )
        return torch.stack([x for _, x in self.record(tokens, wiring)])

    def record(self, tokens: "Batch | Context", wiring: "Wiring | str" = ":") -> list[tuple[str, Stream]]:
        """What a wiring computed on the way: (notation, stream that leaves it) for every pass and group, in order.

        The first entry is ``("embed", x_0)``; the last is the stream that is read out. A group (branches beside each
        other, a scaled chain) has an entry of its own after those of what is inside it.

        Cost: ``wiring.depth / n_layers`` F without the head.

        >>> import surgery
        >>> stack = Stack(surgery.load("babel"))
        >>> [name for name, _ in stack.record("p3 pf1 >other", ":2 {2|5} 4")]
        ['embed', '0', '1', '2', '5', '{2 | 5}', '4']
        """

        def record(engine: Engine) -> list[tuple[str, Stream]]:
            context, steps = self._current(tokens, engine), self.wiring(wiring).steps
            recorded: list[tuple[str, Stream]] = [("embed", context.x0)]
            run_chain(engine, context.recording, steps, context.x0, None, recorded)
            return recorded

        return self._measured(record)

    def readout(self, x: Float[Tensor, "... d_model"], *, grad: bool = False) -> Float[Tensor, "... d_vocab"]:
        """The logits of any stream: final norm, unembedding, and soft-capping or scaling where the model has them.

        The model's own head computes them, in a run on prompts of one token in which the vectors of ``x`` leave the
        last layer. Cost: the head.
        """

        def readout(opened: Scope) -> Tensor:
            engine = self.fastest_engine
            measure(opened, self._decision.training(engine), self.device, grad)
            vectors = rearrange(x, "... d_model -> (...) 1 d_model")
            ids = torch.zeros(vectors.shape[:2], dtype=torch.long, device=self.device)
            logits = engine.forward(lambda _: vectors, **self.inputs(Tokens.of(ids)))
            return logits.reshape(*x.shape[:-1], -1)

        return self._in_turn(readout)

    @contextmanager
    def frozen(self, context: Context, state: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Context manager: norms that read the stream keep denominators and means of the unmodified run of this batch.

        Norms on a sublayer's output and inside attention stay live: they cannot pass the size of one layer's update on
        to another. Streams that run inside must have the shape of the batch. Entering costs 1 F, or nothing if
        ``state`` (from ``norm_state``) is given; of ``norm_scales``, only denominators are kept.

        Raises:
            ValueError: the model has a norm whose denominator cannot be determined (the message names it), or a stream
                of another shape runs inside.
        """
        with scope() as opened:

            def freeze(engine: Engine) -> None:
                states = self.norm_state(context) if state is None else state
                freezing.freeze(opened, self._norms(engine), states)

            self._measured(freeze)
            yield

    def norm_scales(self, tokens: "Batch | Context") -> dict[str, Float[Tensor, "batch pos 1"]]:
        """Denominators of the norms that read the stream in the unmodified run, by their hook names in TransformerLens.

        Raises ValueError as ``frozen`` does. Cost: 1 F without the head.
        """
        return {name: state[..., :1] for name, state in self.norm_state(tokens).items()}

    def norm_state(
        self, tokens: "Batch | Context", wiring: "Wiring | str" = ":"
    ) -> dict[str, Float[Tensor, "batch pos numbers"]]:
        """Denominator and, in LayerNorm, mean of the norms that read the stream, by hook name.

        Of a run of ``wiring``, by default the unmodified one; of a norm that runs several times, the last. Raises
        ValueError as ``frozen`` does. Cost: 1 F without the head.
        """

        def record(engine: Engine) -> dict[str, Tensor]:
            context = self._current(tokens, engine)
            return freezing.recorded(self._norms(engine), lambda: self.execute(wiring, context.x0, context))

        return self._measured(record)

    def wiring(self, wiring: "Wiring | str", width: int | None = None) -> Wiring:
        """Parse and check a wiring of this model, which a stream of ``width`` (by default d_model) enters.

        Raises:
            ValueError: it is made for another number of layers, runs sublayers that this model does not have or that
                do not add up to its layers, or a layer takes a stream of another width than the layer before gives.
        """
        wiring = Wiring.parse(wiring, self.n_layers) if isinstance(wiring, str) else wiring
        if wiring.n_layers != self.n_layers:
            raise ValueError(f"{shown(str(wiring))!r} is for {wiring.n_layers} layers, {self.name} has {self.n_layers}")
        parts = {layer.part for layer in executions(wiring.steps) if layer.part is not None}
        if parts and not parts <= self.exact_sublayers:
            exact = ", ".join(self.exact_sublayers)
            why = f"have only {exact}" if exact else "cannot be split exactly"
            raise ValueError(f"{shown(str(wiring))!r} runs sublayers, but the layers of {self.name} {why}")
        if self.resized:
            width_after(wiring.steps, self.d_model if width is None else width, self._decision.streams, self.name)
        return wiring

    # --- proving -----------------------------------------------------------------------------------------------------

    def checks(self, length: int = 8) -> pd.DataFrame:
        """The exactness checks of this model, one a row: check, compared_with, largest_difference, tolerance, passed.

        Differences are relative to the largest value compared. Hooks of the user's stay silent. Cost: about 12 F on two
        random prompts of ``length`` tokens.
        """

        def checks(opened: Scope) -> pd.DataFrame:
            self._settle_if_changed()
            twin.silence(opened, self._decision.snapshots)
            for engine in self.engines:
                measure(opened, self._decision.training(engine), self.device)
            return proof.checks(self, length)

        return self._in_turn(checks)

    @property
    def parallel_sublayers(self) -> bool:
        """Whether attention and MLP of a layer read the same stream (GPT-J, GPT-NeoX); decided by running both ways."""
        return self._derived("parallel_sublayers", proof.parallel_sublayers)

    @property
    def exact_sublayers(self) -> frozenset[str]:
        """The sublayers that can run on their own, because together they give the whole layer again."""
        return self._derived("exact_sublayers", proof.exact_sublayers)

    @property
    def resized(self) -> bool:
        """Whether some layers have a stream with a width of its own (``surgery.models.stream_width``)."""
        return any(set(widths) != {self.d_model} for widths in self._decision.streams)

    def _derived(self, name: str, compute: Callable[["Stack"], Any]) -> Any:
        """What ``compute`` finds out about the model while the user's hooks are silent, once for every decision."""

        def derive(opened: Scope) -> Any:
            derived = self._decision.derived
            if name not in derived:
                twin.silence(opened, self._decision.snapshots)
                measure(opened, self._decision.training(self.fastest_engine), self.device)
                derived[name] = compute(self)
            return derived[name]

        derived = self._decision.derived
        return derived[name] if name in derived else self._in_turn(derive)

    def _settle(self) -> None:
        """Decide which engine runs, and prove it (``surgery.models.deciding``)."""
        bridge = bridge_engine(self.model, self.name)
        self.n_layers = len(bridge.layers)
        self.tolerance = tolerance(self.dtype, self.n_layers)
        self._decision: Decision = decide(self, bridge)  # last: after an interruption the next call decides again

    @property
    def fastest_engine(self) -> Engine:
        """The engine of the plain twin where there is one, even while hooks are attached; else that of the bridge."""
        return self._decision.plain or self._decision.bridge

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that compute this model: that of the bridge, and of the plain twin, without one that is stale."""
        decision = self._decision
        sides = None if decision.stale else decision.bridge, decision.plain
        return tuple(engine for engine in sides if engine is not None)

    @property
    def bridge_is_stale(self) -> bool:
        """Whether the plain twin was edited where the bridge does not see it, so that hooks cannot be heard."""
        return self._decision.stale

    @property
    def has_twin(self) -> bool:
        """Whether a plain twin agrees with the bridge; False where the bridge was edited after loading."""
        return self._decision.plain is not None

    @property
    def sha256(self) -> str:
        """``weights_sha256`` of the weights that run, which the card of an exported model also names.

        Computed once, and again after any edit of the weights. Cost: reading them, in a tenth of the time of the hash.
        """
        module = self.model if (plain := self._decision.plain) is None else plain.module
        now = edition(module.parameters())
        if self._hashed is None or self._hashed[0] != now:
            self._hashed = now, weights_sha256(module)
        return self._hashed[1]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _in_turn(self, body: Callable[[Scope], Result]) -> Result:
        """Run ``body`` when no other thread measures this model, and undo whatever it changes."""
        return turns.take(twin.shared(self.model), body)

    def _measured(self, body: Callable[[Engine], Result], grad: bool = False) -> Result:
        """Run ``body`` in turn, with the engine that runs now, under the conditions of a measurement."""

        def measured(opened: Scope) -> Result:
            engine = self._engine()
            measure(opened, self._decision.training(engine), self.device, grad)
            return body(engine)

        return self._in_turn(measured)

    def _engine(self) -> Engine:
        """The engine that runs now; decided again if parts of the model were replaced, or one side was edited."""
        self._settle_if_changed()
        return self._decision.engine(self.name)

    def _settle_if_changed(self) -> None:
        if not self._decision.holds():
            self._settle()

    def _batch(self, tokens: Any) -> Tokens:
        """Whatever a user may give as a batch, as ids that the model knows, on its device.

        Raises ValueError for an empty batch, and for ids that the model has no embedding or no position for.
        """
        if isinstance(tokens, str) or (isinstance(tokens, list | tuple) and tokens and isinstance(tokens[0], str)):
            return self.tokens(tokens)
        if isinstance(tokens, list | tuple):
            tokens = torch.tensor(tokens)
            tokens = tokens[None] if tokens.ndim == 1 else tokens  # one prompt
        batch = Tokens.of(tokens)
        if not batch.ids.numel():
            raise ValueError(f"there is nothing to run: the batch has shape {list(batch.ids.shape)}")
        if batch.ids.shape[1] > self.n_ctx and self.model.cfg.positional_embedding_type == "standard":
            raise ValueError(f"prompts of {batch.ids.shape[1]} tokens: {self.name} has {self.n_ctx} positions")
        return batch.known(self.d_vocab).to(self.device)

    def _current(self, tokens: "Batch | Context", engine: Engine) -> Context:
        """A batch as the engine that runs now records it: hooks may have come or gone since its context was made."""
        if isinstance(tokens, Context) and tokens.engine is engine:
            return tokens
        return self.context(tokens.tokens if isinstance(tokens, Context) else tokens)

    def hooks_listen(self) -> bool:
        """Whether the user's hooks are attached to the bridge or its twin (some adapters have hooks of their own)."""
        return any(snapshot.listening() for snapshot in self._decision.snapshots)

    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """The arguments to call the model with: ids, and for prompts padded on the left the mask and positions."""
        inputs: dict[str, Any] = {"input_ids": tokens.ids, "use_cache": False}
        if tokens.padded_left:
            inputs |= {"attention_mask": tokens.mask.long(), "position_ids": tokens.positions}
        return inputs

    def _norms(self, engine: Engine) -> dict[str, FrozenNorm]:
        def probes(layer: int) -> Tensor:
            width, generator = self._decision.streams[layer][1], torch.Generator().manual_seed(0)
            return torch.randn(4, width, generator=generator).to(self.device, self.dtype)

        return freezing.norms(engine, probes)
