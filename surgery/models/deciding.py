"""Which of a model's two engines runs, the bridge's or that of its plain twin, and the proof that it is exact."""

import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgery.models import proof, stream_width, twin
from surgery.models.chain import run_chain
from surgery.models.conditions import measure
from surgery.models.engine import Engine, Recording, Stream
from surgery.models.errors import ModelError, first_line
from surgery.models.exactness import relative_difference
from surgery.models.opening import plain_engine
from surgery.models.scopes import Scope, within
from surgery.models.tokens import Tokens
from surgery.wiring.value import Wiring

# ``stack`` is a ``surgery.models.stack.Stack``, which imports this module.


@dataclass(frozen=True)
class Decision:
    """What was decided, and about what.

    Attributes:
        bridge: the engine of the bridge's blocks.
        plain: that of the plain twin; None where there is none that counts.
        stale: whether the plain twin was edited where the bridge does not see it.
        snapshots: of the bridge and, if there is one, its twin.
        copies: whether the bridge has copies of some weights, so that an edit can reach one side only.
        streams: the widths of stream that every layer takes, works in and gives.
        derived: what a Stack found out since about this model.
    """

    bridge: Engine
    plain: Engine | None
    stale: bool
    snapshots: tuple[twin.Snapshot, ...]
    copies: bool
    streams: list[tuple[int, int, int]]
    derived: dict[str, Any] = field(default_factory=dict)

    def holds(self) -> bool:
        """Whether no module or parameter was replaced since, nor one side edited."""
        return not any(one.replaced() or (self.copies and one.edited()) for one in self.snapshots)

    def training(self, engine: Engine) -> list[Any]:
        """The modules of an engine's model that are in training mode."""
        return self.snapshots[0 if engine is self.bridge else 1].training()

    def engine(self, name: str) -> Engine:
        """The engine that runs while the hooks that are attached now are; ``name`` is the model's."""
        bridge, beside = self.snapshots[0], self.snapshots[1:]
        if self.plain is not None and not bridge.listening():
            return self.plain
        if self.stale:
            raise ValueError(
                f"hooks on the bridge of {name} cannot be heard: surgery.models.plain(model) was edited where "
                "the bridge does not see it; load the edited model again with surgery.load(plain(model))"
            )
        if bridge.root_listens():
            raise ValueError(
                f"a PyTorch hook on the whole bridge of {name} is not heard when layers run one by one; "
                "register it on model.original_model"
            )
        if self.plain is not None and beside[0].listening():
            warnings.warn(
                f"hooks on the plain twin of {name} are not heard while the bridge has hooks too", stacklevel=10
            )
        return self.bridge


def decide(stack: Any, bridge: Engine) -> Decision:
    """Decide which engine runs, and prove it.

    Bridge and plain twin must agree. If they do not, one of them was edited since it was loaded, and that one is what
    the user has and what runs; if neither was, TransformerLens computes something else than the model. Raises
    ModelError as ``Stack`` does. Cost: 4 F on two short prompts.
    """
    return within(partial(_decide, stack, bridge))


def _decide(stack: Any, bridge: Engine, scope: Scope) -> Decision:
    model, name, beside = stack.model, stack.name, twin.twin_of(stack.model)
    snapshots = [twin.Snapshot(model, None if beside is None else beside.bridge_at_birth)]
    if beside is not None:
        snapshots.append(twin.Snapshot(beside.module, beside.at_birth))
    copies = any(snapshots[0].has_weights_besides(other) for other in snapshots[1:])
    streams = [stream_width.streams(block.original_component, stack.d_model) for block in model.blocks]
    decision = Decision(bridge, None, False, tuple(snapshots), copies, streams)
    tokens = proof.probe(stack)
    twin.silence(scope, snapshots)
    measure(scope, snapshots[0].training(), stack.device)
    bridge_streams, own = _observe(stack, bridge, tokens, "TransformerLens' wrapper of it")
    if not torch.isfinite(own).all():
        raise ModelError(proof.not_finite(model, name))
    proof.require_causal(stack, own)
    model_logits = proof.bridge_logits(model, tokens)
    proof.require(stack, "identity wiring through the bridge's blocks", _identity(stack, bridge, tokens), model_logits)
    if beside is None:
        return decision
    try:
        engine = plain_engine(beside.module, model)
    except AttributeError as error:
        raise ModelError(
            f"the plain twin of {name} no longer has the layers of its bridge ({first_line(error)}); load "
            "the edited model again: surgery.load(surgery.models.plain(model))"
        ) from error
    measure(scope, snapshots[1].training(), stack.device)
    twin_streams, twin_logits = _observe(stack, engine, tokens, "the model itself")
    pairs = ((twin_logits, own), (twin_streams[-1], bridge_streams[-1]))
    difference = max(relative_difference(*pair) for pair in pairs)
    agree = difference <= stack.tolerance
    if not agree:
        if difference <= 1e-5 or beside.bridge_at_birth.touched(besides=beside.at_birth):
            return decision  # in double precision norms and softmax may round; else the bridge was edited: it counts
        if not beside.at_birth.touched():
            raise ModelError(
                f"{name} cannot be opened: TransformerLens' wrapper of {type(beside.module).__name__} "
                f"gives other logits than the model itself, by {difference:.1e} of their size (allowed is "
                f"{stack.tolerance:.0e}); report it to TransformerLens. If you edited one of the two "
                "through .data, edit under torch.no_grad() instead"
            )
    expected = model_logits if agree else twin_logits
    proof.require(stack, "identity wiring through the plain twin", _identity(stack, engine, tokens), expected)
    return replace(decision, plain=engine, stale=not agree)


def _observe(stack: Any, engine: Engine, tokens: Tokens, what: str) -> tuple[list[Stream], Tensor]:
    try:
        return engine.observe(**stack.inputs(tokens))
    except Exception as error:  # the model's own code, which raises its own kinds
        message = f"{stack.name} cannot be opened: {what} fails on two prompts of {tokens.ids.shape[1]} tokens"
        raise ModelError(f"{message} ({type(error).__name__}: {first_line(error)})") from error


def _identity(stack: Any, engine: Engine, tokens: Tokens) -> Tensor:
    """The logits of the identity wiring."""
    steps = Wiring.parse(":", stack.n_layers).steps

    def finish(recording: Recording) -> Stream:
        return run_chain(engine, recording, steps, recording.x0)

    return engine.forward(finish, **stack.inputs(tokens))
