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
_HEADS_ATTRIBUTE = "own_heads"  # where attention with heads of its own carries how many


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

    For classes that divide the stream among the heads, so that a wider stream would make wider heads, and more heads
    narrower ones.
    """
    name, inside = attention(like)
    for path, old in list(inside.named_modules()):
        if isinstance(old, nn.Linear | Conv1D):
            thinner = layer.get_parameter(f"{name}.{path}.weight")
            weight = max(thinner, old.weight, key=Tensor.numel)  # fresh, and larger than needed
            writes = path.rpartition(".")[2] in OUTPUT_MATRICES
            stream = 0 if writes != isinstance(old, Conv1D) else 1
            shape = [thinner.shape[axis] if axis == stream else size for axis, size in enumerate(old.weight.shape)]
            old.weight = nn.Parameter(weight.detach()[tuple(map(slice, shape))].clone())
            if writes and old.bias is not None:
                old.bias = nn.Parameter(weight.new_zeros(shape[stream]))
            sizes = ("nx", "nf") if isinstance(old, Conv1D) else ("out_features", "in_features")
            for key, size in zip(sizes, shape, strict=True):
                setattr(old, key, size)
    setattr(layer, name, inside)


def attention(layer: nn.Module) -> tuple[str, nn.Module]:
    """The attention of a layer, and its name there."""
    parts = ((name, part, part.modules()) for name, part in layer.named_children())
    return next((name, part) for name, part, inside in parts if any(hasattr(m, k) for m in inside for k in HEAD_WIDTHS))


class Overlaid:
    """A configuration in which some entries are others, and all else is read from ``config`` as it is now."""

    def __init__(self, config: Any, **entries: Any) -> None:
        vars(self).update(_config=config, **entries)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in vars(self):  # while it is copied
            raise AttributeError(name)
        return getattr(vars(self)["_config"], name)


def own_heads(inside: nn.Module, config: Any, heads: int, keys: int | None) -> None:
    """Let an attention, and the bridge that will be built on it, count its own heads, not those of ``config``."""
    for module in inside.modules():
        if hasattr(module, "config"):
            vars(module)["config"] = Overlaid(config, num_attention_heads=heads, num_key_value_heads=keys)
    setattr(inside, _HEADS_ATTRIBUTE, {"n_heads": heads, "n_key_value_heads": keys})


@contextmanager
def split_by_own_width() -> Iterator[None]:
    """Context manager: TransformerLens splits joint queries, keys and values by their own stream and own heads."""
    with scope() as opened:
        _splitting.until_closed(opened)
        yield


_original = JointQKVAttentionBridge.set_original_component


def _by_own_width(self: JointQKVAttentionBridge, component: nn.Module) -> None:
    own = dict(getattr(component, _HEADS_ATTRIBUTE, {}))
    if hasattr(component, _WIDTH_ATTRIBUTE):
        own["d_model"] = getattr(component, _WIDTH_ATTRIBUTE)
    shared: Any = self.config  # what every layer's attention and the adapter read
    before = {name: getattr(shared, name) for name in own}
    try:
        for name, size in own.items():
            setattr(shared, name, size)
        _original(self, component)
    finally:
        for name, size in before.items():
            setattr(shared, name, size)
    if "n_heads" in own:
        self.config = Overlaid(shared, **getattr(component, _HEADS_ATTRIBUTE))
        self.qkv_conversion_rule.n_heads = own["n_heads"]


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
