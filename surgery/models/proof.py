"""The proof that a Stack is exact: every way to run its layers against the model's own logits."""

from typing import Any

import pandas as pd
import torch
from einops import rearrange
from torch import Tensor

from surgery.models import finite
from surgery.models.errors import ModelError
from surgery.models.exactness import probe_ids, relative_difference
from surgery.models.tokens import Tokens

# ``stack`` is a ``surgery.models.stack.Stack``, which imports this module.


def probe(stack: Any, length: int = 8) -> Tokens:
    """Two prompts of up to ``length`` random tokens; 3 positions stay free for padding."""
    return Tokens.of(probe_ids(stack, spare=3, length=length))


def checks(stack: Any, length: int = 8) -> pd.DataFrame:
    """The rows of ``Stack.checks``, on two prompts of ``length`` tokens."""
    tokens = probe(stack, length)
    context, own = stack.context(tokens), own_logits(stack, tokens)
    rows = [("identity wiring", "the model's own logits", relative_difference(stack.run(tokens), own))]
    if (engines := stack.engines)[1:]:
        both = (engine.observe(**stack.inputs(tokens))[0] for engine in engines)
        difference = max(relative_difference(*pair) for pair in zip(*both, strict=True))
        rows.append(("stream of the plain twin", "the bridge's blocks", difference))
    last = torch.zeros_like(tokens.mask)
    last[:, -1] = True
    difference = relative_difference(stack.run(tokens, ":", positions=last), own[:, -1])
    rows.append(("readout at chosen positions", "all logits", difference))
    for side in ("left", "right"):
        padded = tokens.pad(3, side)
        logits = rearrange(own, "batch pos d_vocab -> (batch pos) d_vocab")
        difference = relative_difference(stack.run(padded)[padded.mask], logits)
        rows.append((f"prompts padded on the {side}", "unpadded", difference))
    if not stack.resized:  # sublayers and streams of several widths cannot be compared
        streams = stack.stream(tokens)
        if stack.exact_sublayers:  # else wirings of sublayers are refused
            sublayers = f"attention {'beside' if stack.parallel_sublayers else 'then'} MLP, every layer"
            rows.append((sublayers, "whole layers", sublayer_difference(stack, context, streams)))
        with stack.frozen(context):
            difference = relative_difference(stack.stream(context), streams)
        rows.append(("norms frozen at their own scales", "live norms", difference))
    frame = pd.DataFrame(rows, columns=["check", "compared_with", "largest_difference"])
    frame["tolerance"] = stack.tolerance
    frame["passed"] = frame["largest_difference"] <= stack.tolerance
    return frame


def sublayer_difference(stack: Any, context: Any, streams: Tensor) -> float:
    """The largest relative difference of attention and MLP, run one by one, from whole layers."""
    engine, worst = context.engine, 0.0
    for layer, call in enumerate(context.recording.calls):
        x = streams[layer]
        with torch.no_grad():
            composed = engine.sublayer(layer, "attn", x, call)
            if engine.parts[layer].mlp is not None:
                from_stream = x if stack.parallel_sublayers else composed
                composed = composed + (engine.sublayer(layer, "mlp", from_stream, call) - from_stream)
        worst = max(worst, relative_difference(composed, streams[layer + 1]))
    return worst


def parallel_sublayers(stack: Any) -> bool:
    """Whether attention and MLP of the first layer read the same stream: whether that gives the whole layer."""
    context = stack.context(probe(stack))
    streams, engine, call = stack.stream(context), context.engine, context.recording.calls[0]
    x = streams[0]
    attn = engine.sublayer(0, "attn", x, call)
    together = attn + engine.sublayer(0, "mlp", x, call) - x
    after = engine.sublayer(0, "mlp", attn, call)
    return relative_difference(together, streams[1]) < relative_difference(after, streams[1])


def exact_sublayers(stack: Any) -> frozenset[str]:
    """The sublayers that can run on their own, because together they give the whole layer again."""
    context = stack.context(probe(stack))
    if stack.resized or sublayer_difference(stack, context, stack.stream(context)) > stack.tolerance:
        return frozenset()
    return frozenset(["attn"] if context.engine.parts[0].mlp is None else ["attn", "mlp"])


def require_causal(stack: Any, logits: Tensor) -> None:
    """Raise ModelError if the logits of the two probes differ where they have the same tokens so far."""
    half = logits.shape[1] // 2
    if half and relative_difference(logits[1, :half], logits[0, :half]) > max(stack.tolerance, 1e-4):
        raise ModelError(
            f"{stack.name} is not causal: what comes later changes the logits before it. surgery opens decoder-only "
            "language models (for a BERT-like one, is_decoder=True in its configuration makes it one)"
        )


def own_logits(stack: Any, tokens: Tokens) -> Tensor:
    """The logits that the model which is measured gives by itself: the bridge, or a plain twin that was edited."""
    with torch.no_grad():
        if stack.bridge_is_stale:
            return stack.fastest_engine.observe(**stack.inputs(tokens))[1]
        return bridge_logits(stack.model, tokens)


def bridge_logits(model: Any, tokens: Tokens) -> Tensor:
    """The logits that a bridge gives by itself."""
    return model(tokens.ids, return_type="logits", use_cache=False)


def require(stack: Any, check: str, actual: Tensor, expected: Tensor) -> None:
    """Raise ModelError if ``actual`` is further from ``expected`` than the tolerance."""
    difference = relative_difference(actual, expected)
    if not difference <= stack.tolerance:
        raise ModelError(
            f"{stack.name} cannot be opened exactly: {check} differs from the model's own logits by "
            f"{difference:.1e} of their size, allowed is {stack.tolerance:.0e}"
        )


def not_finite(model: Any, name: str) -> str:
    """Why a model's logits are not finite, in a sentence."""
    if broken := finite.not_finite(model):
        return f"{name} has weights that are not finite: {broken}"
    return f"{name} gives logits that are not finite on random tokens though all its weights are"
