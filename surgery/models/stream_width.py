"""Runs of layers whose stream has a width of its own: the maps into it and out of it, which its layers carry.

Inside such a run the stream has ``d'`` numbers instead of the model's ``d``. The first layer of the run maps the stream
from ``d`` to ``d'``, the last one maps it back; both maps are matrices that train with the layers (``enter`` and
``leave``). A fresh map into a wider stream pads it so that the norms inside see the same directions, and the map out
drops what was added:

* a norm that divides by the root mean square: pad with zeros, ``rms' = sqrt(d / d') rms``;
* a norm that also subtracts the mean (LayerNorm): pad with the mean, which adds no deviation, ``var' = (d / d') var``.

So ``scale' = sqrt(d / d') scale`` and ``eps' = (d / d') eps`` leave the normed stream unchanged, in exact arithmetic
(LEMON, Wang et al. 2023, arXiv 2310.07999, pads LayerNorm so). Every norm of a run has its epsilon set by this rule.

The ends of a run are marked by ``enters`` and ``leaves``, which travel with its layers through tapes and copies: a run
that is taped twice enters and leaves twice.
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
from surgery.models.scopes import ForAll, scope

HEAD_WIDTHS = ("head_dim", "head_size", "d_head")  # what attention modules call it
OUTPUT_MATRICES = ("c_proj", "out_proj", "dense", "o_proj")  # what models call the matrix that attention writes with
_WIDTH_ATTRIBUTE = "stream_width"  # where the modules of a layer with a stream of its own carry its width


def add_borders(layer: nn.Module, like: nn.Module, d_model: int, width: int, *, enters: bool, leaves: bool) -> None:
    """Give ``layer``, whose stream is ``width`` wide, the maps from and to ``d_model``, and its norms their epsilon.

    ``like`` is the same layer with a stream of ``d_model``; comparing them tells the norms of the stream from others.
    """
    for module in layer.modules():
        setattr(module, _WIDTH_ATTRIBUTE, width)
    norms = list(_norms(layer, like, width))
    for norm, eps in norms:
        setattr(norm, eps, getattr(norm, eps) * d_model / width)
    weight = next(layer.parameters())
    if enters or leaves:
        if enters:
            mean = bool(norms) and centres(norms[0][0], width)
            layer.add_module("enter", _linear(padding(width, d_model, mean=mean), weight))
        if leaves:
            layer.add_module("leave", _linear(torch.eye(d_model, width), weight))
        layer_class: Any = type(layer)
        layer.__class__ = _bordered(layer_class)


def keep_heads(layer: nn.Module, like: nn.Module) -> None:
    """Give ``layer`` the attention of ``like``, with matrices that read and write the stream of ``layer``.

    For classes that divide the stream among the heads, so that a wider stream would make wider heads.
    """
    name, inside = next((name, m) for name, m in like.named_children() if any(hasattr(m, key) for key in HEAD_WIDTHS))
    for path, old in list(inside.named_modules()):
        if isinstance(old, nn.Linear | Conv1D):
            weight = layer.get_parameter(f"{name}.{path}.weight")  # fresh, and larger than needed
            stream = 0 if (path in OUTPUT_MATRICES) != isinstance(old, Conv1D) else 1
            block = [slice(None) if axis == stream else slice(size) for axis, size in enumerate(old.weight.shape)]
            old.weight = nn.Parameter(weight.detach()[tuple(block)].clone())
            if path in OUTPUT_MATRICES and old.bias is not None:
                old.bias = nn.Parameter(torch.zeros_like(weight[:, 0] if stream == 0 else weight[0]))
            sizes = ("nx", "nf") if isinstance(old, Conv1D) else ("out_features", "in_features")
            for key, size in zip(sizes, old.weight.shape, strict=True):
                setattr(old, key, size)
    setattr(layer, name, inside)


@contextmanager
def split_by_own_width() -> Iterator[None]:
    """Context manager: TransformerLens splits joint queries, keys and values by the width of their own stream."""
    with scope() as opened:
        _splitting.until_closed(opened)
        yield


_original = JointQKVAttentionBridge.set_original_component


def _by_own_width(self: JointQKVAttentionBridge, component: nn.Module) -> None:
    config = getattr(getattr(self.split_qkv_matrix, "__self__", None), "cfg", None)
    if config is None or not hasattr(component, _WIDTH_ATTRIBUTE):
        return _original(self, component)
    d_model, config.d_model = config.d_model, getattr(component, _WIDTH_ATTRIBUTE)
    try:
        _original(self, component)
    finally:
        config.d_model = d_model


_splitting = ForAll(
    lambda: JointQKVAttentionBridge.set_original_component,
    lambda method: setattr(JointQKVAttentionBridge, _original.__name__, method),
    _by_own_width,
)


def with_own_epsilons(bridge: TransformerBridge) -> TransformerBridge:
    """The bridge, with every norm of a resized layer set to its module's epsilon instead of the configuration's."""
    for block in bridge.blocks:
        if hasattr(block.original_component, _WIDTH_ATTRIBUTE):
            for norm in block.modules():
                if isinstance(norm, NormalizationBridge) and hasattr(norm.original_component, "eps"):
                    norm.config = copy.copy(norm.config)
                    norm.config.eps = norm.original_component.eps
    return bridge


def padding(wide: int, d_model: int, *, mean: bool) -> Float[Tensor, "wide d_model"]:
    """The matrix that pads a stream to ``wide`` numbers, with zeros or with its mean.

    >>> padding(3, 2, mean=True) @ torch.tensor([1.0, 3.0])
    tensor([1., 3., 2.])
    """
    matrix = torch.eye(wide, d_model)
    if mean:
        matrix[d_model:] = 1 / d_model
    return matrix


def centres(norm: nn.Module, width: int) -> bool:
    """Whether a norm of ``width`` numbers subtracts their mean."""
    weight = next(norm.parameters())
    if weight.is_meta:  # the weights, and the map in, are about to be read from a file
        return False
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        return FrozenNorm(norm, probe).centres


def streams(layer: nn.Module, d_model: int) -> tuple[int, int, int]:
    """The widths of the stream that enters a layer, inside it, and that leaves it."""
    inside = getattr(layer, _WIDTH_ATTRIBUTE, d_model)
    return d_model if hasattr(layer, "enter") else inside, inside, d_model if hasattr(layer, "leave") else inside


@cache
def _bordered(layer_class: Any) -> Any:
    """A subclass of a layer's class, with the maps around what it computes."""

    class Bordered(layer_class):
        @wraps(layer_class.forward)
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            enter, leave = self._modules.get("enter"), self._modules.get("leave")
            output = super().forward(hidden_states if enter is None else enter(hidden_states), *args, **kwargs)
            if leave is None:
                return output
            return (leave(output[0]), *output[1:]) if isinstance(output, tuple) else leave(output)

    Bordered.__module__, Bordered.__name__ = layer_class.__module__, layer_class.__name__
    return Bordered


def _norms(layer: nn.Module, like: nn.Module, width: int) -> Iterator[tuple[nn.Module, str]]:
    """Yield the norms of the stream, each with the name of its epsilon."""
    before = dict(like.named_modules())
    for name, module in layer.named_modules():
        shapes = [getattr(getattr(norm, "weight", None), "shape", None) for norm in (module, before.get(name))]
        eps = next((key for key in ("eps", "variance_epsilon") if hasattr(module, key)), None)
        if eps and shapes[0] == (width,) != shapes[1]:
            yield module, eps


def _linear(matrix: Float[Tensor, "out in"], like: Tensor) -> nn.Linear:
    width_out, width_in = matrix.shape
    linear = nn.Linear(width_in, width_out, bias=False, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(matrix)
    return linear
