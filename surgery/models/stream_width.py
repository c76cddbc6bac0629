"""The borders of a span whose stream has a width of its own: maps into it and out of it, which its layers carry.

Between layers of another width than the model's the stream has theirs. The first of such a run maps the stream of
``d`` numbers that it is given to ``d'``, its last one maps back; both maps are matrices that train with the layers
(``enter`` and ``leave``). A fresh map into a wider stream pads it so that the norms inside see the same directions,
and the map out forgets what was added:

* a norm that takes the root mean square: pad with zeros, ``rms' = sqrt(d / d') rms``;
* a norm that also takes the mean off (LayerNorm): pad with the mean, which adds no deviation, ``var' = (d / d') var``.

So ``scale' = sqrt(d / d') scale`` and ``eps' = (d / d') eps`` make the normed stream what it was, in exact arithmetic
(LEMON, Wang et al. 2023, arXiv 2310.07999, pads LayerNorm so). Every norm of a run has its epsilon set by this rule.

A run of layers is told by ``enters`` and ``leaves``, which travel with its layers through tapes and copies: a run taped
twice enters and leaves twice.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge
from transformers.pytorch_utils import Conv1D

from surgery.models.norms import FrozenNorm

HEAD_WIDTHS = ("head_dim", "head_size", "d_head")  # what modules of attention call it
_MARK = "stream_width"  # modules of layers with a stream of their own carry its width in this attribute
WRITES = ("c_proj", "out_proj", "dense", "o_proj")  # what models call the matrix that attention writes with


def carry(layer: nn.Module, like: nn.Module, d_model: int, own: int, *, enters: bool, leaves: bool) -> None:
    """Give ``layer``, whose stream is ``own`` wide, the maps from and to ``d_model``, and its norms their epsilon.

    ``like`` is the same layer of a stream of ``d_model``, which tells the norms of the stream from others.
    """
    for module in layer.modules():
        setattr(module, _MARK, own)
    norms = list(_norms(layer, like, own))
    for norm, eps in norms:
        setattr(norm, eps, getattr(norm, eps) * d_model / own)
    weight = next(layer.parameters())
    if enters or leaves:
        if enters:
            mean = bool(norms) and centres(norms[0][0], own)
            layer.add_module("enter", _linear(padding(own, d_model, mean=mean), weight))
        if leaves:
            layer.add_module("leave", _linear(torch.eye(d_model, own), weight))
        kind: Any = type(layer)
        layer.__class__ = _bordered(kind)


def attention(layer: nn.Module, like: nn.Module) -> None:
    """Give ``layer``, of another stream than ``like``, the heads of ``like`` where its class divides the stream among
    them: its attention, whose matrices take that stream and give it."""
    name, inside = next((name, m) for name, m in like.named_children() if any(hasattr(m, key) for key in HEAD_WIDTHS))
    for path, old in list(inside.named_modules()):
        if isinstance(old, nn.Linear | Conv1D):
            weight = layer.get_parameter(f"{name}.{path}.weight")  # fresh, of which a part will do
            stream = 0 if (path in WRITES) != isinstance(old, Conv1D) else 1
            kept = [slice(None) if axis == stream else slice(size) for axis, size in enumerate(old.weight.shape)]
            old.weight = nn.Parameter(weight.detach()[tuple(kept)].clone())
            if path in WRITES and old.bias is not None:
                old.bias = nn.Parameter(torch.zeros_like(weight[:, 0] if stream == 0 else weight[0]))
            sizes = ("nx", "nf") if isinstance(old, Conv1D) else ("out_features", "in_features")
            for key, size in zip(sizes, old.weight.shape, strict=True):
                setattr(old, key, size)
    setattr(layer, name, inside)


@contextmanager
def bridged() -> Iterator[None]:
    """Within it TransformerLens takes joint queries, keys and values apart by the width of their own stream."""
    apart = JointQKVAttentionBridge.set_original_component

    def own(self: JointQKVAttentionBridge, component: nn.Module) -> None:
        config = getattr(getattr(self.split_qkv_matrix, "__self__", None), "cfg", None)
        if config is None or not hasattr(component, _MARK):
            return apart(self, component)
        d_model, config.d_model = config.d_model, getattr(component, _MARK)
        try:
            apart(self, component)
        finally:
            config.d_model = d_model

    setattr(JointQKVAttentionBridge, apart.__name__, own)
    try:
        yield
    finally:
        setattr(JointQKVAttentionBridge, apart.__name__, apart)


def told(bridge: TransformerBridge) -> TransformerBridge:
    """The bridge, whose norms go by the epsilon of their own module where the configuration says another."""
    for block in bridge.blocks:
        if hasattr(block.original_component, _MARK):
            for norm in block.modules():
                if isinstance(norm, NormalizationBridge) and hasattr(norm.original_component, "eps"):
                    norm.config = copy.copy(norm.config)
                    norm.config.eps = norm.original_component.eps
    return bridge


def padding(wide: int, d_model: int, *, mean: bool) -> Float[Tensor, "wide d_model"]:
    """The stream as it is, and after it zeros or its mean.

    >>> padding(3, 2, mean=True) @ torch.tensor([1.0, 3.0])
    tensor([1., 3., 2.])
    """
    matrix = torch.eye(wide, d_model)
    if mean:
        matrix[d_model:] = 1 / d_model
    return matrix


def centres(norm: nn.Module, width: int) -> bool:
    """Whether a norm takes the mean off."""
    weight = next(norm.parameters())
    if weight.is_meta:  # about to be filled from a file, whose maps say it
        return False
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        return FrozenNorm(norm, probe).centres


def streams(layer: nn.Module, d_model: int) -> tuple[int, int, int]:
    """Width of the stream that a layer takes, has inside and gives."""
    inside = getattr(layer, _MARK, d_model)
    return d_model if hasattr(layer, "enter") else inside, inside, d_model if hasattr(layer, "leave") else inside


@cache
def _bordered(kind: Any) -> Any:
    """The class of a layer, with maps around what it computes."""

    class Bordered(kind):
        @wraps(kind.forward)
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            enter, leave = self._modules.get("enter"), self._modules.get("leave")
            output = super().forward(hidden_states if enter is None else enter(hidden_states), *args, **kwargs)
            if leave is None:
                return output
            return (leave(output[0]), *output[1:]) if isinstance(output, tuple) else leave(output)

    Bordered.__module__, Bordered.__name__ = kind.__module__, kind.__name__
    return Bordered


def _norms(layer: nn.Module, like: nn.Module, own: int) -> Iterator[tuple[nn.Module, str]]:
    """The norms of the stream, and what they call their epsilon."""
    before = dict(like.named_modules())
    for name, module in layer.named_modules():
        shapes = [getattr(getattr(norm, "weight", None), "shape", None) for norm in (module, before.get(name))]
        eps = next((key for key in ("eps", "variance_epsilon") if hasattr(module, key)), None)
        if eps and shapes[0] == (own,) != shapes[1]:
            yield module, eps


def _linear(matrix: Float[Tensor, "out in"], like: Tensor) -> nn.Linear:
    given, taken = matrix.shape
    linear = nn.Linear(taken, given, bias=False, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(matrix)
    return linear
