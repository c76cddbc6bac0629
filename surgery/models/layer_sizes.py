"""The sizes of a layer (MLP width, attention heads, width of the stream), and configurations that express them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from surgery.models import branch_norms, stream_width
from surgery.models.errors import ModelError
from surgery.outside import shown

WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
FORMAT = 1  # of ``surgery.json``
SIZE_ATTRIBUTE = "own_size"  # where a layer with sizes of its own carries them, through copies and tapes


class Size(NamedTuple):
    """Per-layer overrides of the configuration: MLP width, heads, width of the stream; None where it holds.

    In a run of layers whose stream has a width of its own, the layer that ``enters`` carries the map from the model's
    stream, the layer that ``leaves`` the map back. A layer of several ``branches`` is as many layers side by side whose
    norms stay apart (``surgery.models.branch_norms``). ``biases`` are the projections that have a bias though those of
    their class have none, so that the shift of the norm before can be in it.
    """

    d_mlp: int | None = None
    n_heads: int | None = None
    d_model: int | None = None
    enters: bool = False
    leaves: bool = False
    branches: int = 1
    biases: tuple[str, ...] = ()


CONFIGURED = Size()


def configured(config: Any) -> Size:
    """The sizes that a configuration gives to all layers; a d_mlp of None where it has no single MLP width."""
    inner = text_config(config)
    mlp_widths = {getattr(inner, key) or 4 * d_model(config) for key in widths(config)}
    heads = getattr(inner, "n_heads", None) or inner.num_attention_heads
    return Size(mlp_widths.pop() if len(mlp_widths) == 1 else None, heads, d_model(config))


def resized(config: Any, size: Size) -> Any:
    """A copy of a configuration with ``size`` for all layers; where ``size`` is None it stays as it is.

    Raises ModelError for an MLP width that it has no place for, and for heads that its keys cannot be shared among.
    """
    (d_mlp, n_heads, stream, *_), config = size, copy.deepcopy(config)
    inner, native, heads = text_config(config), not isinstance(config, PreTrainedConfig), configured(config).n_heads
    if d_mlp:
        if not widths(config):
            raise ModelError(
                f"the configuration of {type(inner).__name__} has no MLP width to set, so no layer can be {d_mlp} "
                "wide: leave d_mlp out"
            )
        for key in widths(config):
            setattr(inner, key, d_mlp)
    if (n_heads or stream) and not native:
        inner.head_dim = getattr(inner, "head_dim", None) or inner.hidden_size // heads
    if stream:
        if not d_mlp:  # otherwise GPT-2 would take four times the new width
            config = resized(config, Size(configured(config).d_mlp)) if widths(config) else config
            inner = text_config(config)
        setattr(inner, "d_model" if native else "hidden_size", stream)
    if n_heads:
        heads_key, keys_key = (
            ("n_heads", "n_key_value_heads") if native else ("num_attention_heads", "num_key_value_heads")
        )
        keys = getattr(inner, keys_key, None)
        if keys and n_heads * keys % heads:
            raise ModelError(
                f"here {heads} heads share {keys} keys, so {n_heads} cannot: make n_heads a multiple of {heads // keys}"
            )
        setattr(inner, heads_key, n_heads)
        if keys:
            setattr(inner, keys_key, n_heads * keys // heads)
    return config


def d_model(config: Any) -> int:
    """Width of the model's stream."""
    return text_config(config).hidden_size if isinstance(config, PreTrainedConfig) else config.d_model


def overrides(size: Size) -> str:
    """The overrides of a layer's size in words, empty if there are none.

    >>> overrides(Size(d_mlp=64, n_heads=8))
    'd_mlp 64, n_heads 8'
    """
    return ", ".join(f"{name} {value}" for name, value in zip(Size._fields[:3], size) if value)


def widths(config: Any) -> list[str]:
    """The names under which a configuration keeps the widths of its MLPs."""
    if not isinstance(config, PreTrainedConfig):
        return [] if config.attn_only else ["d_mlp"]
    inner = text_config(config)
    return [key for key in WIDTHS if hasattr(inner, key) and isinstance(getattr(inner, key), int | None)]


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text, where a model also reads other things."""
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


def model_class(entries: Any, config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class whose ``from_pretrained`` opens a folder with ``surgery.json``, which holds ``entries``.

    Raises ModelError for entries that are damaged, of another format, or not of this many layers; ``name`` is the
    model's.
    """
    try:
        file_format, rows = (
            entries["format"],
            [Size(**row)._replace(biases=tuple(row.get("biases", ()))) for row in entries["rows"]],
        )
    except (LookupError, TypeError) as error:
        raise ModelError(f"{name}: surgery.json does not say the sizes of the layers: save the model again") from error
    if file_format != FORMAT:
        raise ModelError(
            f"{name}: surgery.json has format {shown(file_format)}, this surgery reads {FORMAT}: update it"
        )
    layers = text_config(config).num_hidden_layers
    if len(rows) != layers or not all(map(_is_size, rows)):
        raise ModelError(
            f"{name}: surgery.json must give every one of the {layers} layers of config.json a d_mlp, n_heads and "
            "d_model, each null or 1 and more: save the model again"
        )
    base = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001
    return sized_class(base, rows)


def _is_size(size: Size) -> bool:
    """Whether the fields have the types that they are declared with."""
    numbers = (value is None or (type(value) is int and value > 0) for value in size[:3])
    flags = all(type(value) is bool for value in (size.enters, size.leaves))
    names = all(type(name) is str for name in size.biases)
    return all(numbers) and flags and names and type(size.branches) is int and size.branches > 0


def sized_class(base: type[PreTrainedModel], sizes: Sequence[Size]) -> type[PreTrainedModel]:
    """``base`` as a class whose new models have layers of these sizes; the models themselves are of ``base``."""

    class Shaped(base):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            layers = layer_list(self, len(sizes))
            divides = any(size.n_heads for size in sizes) and divides_stream(base, config, layers[0])
            resized_layers = {
                size: _fresh(base, config, size, len(sizes), divides)
                for size in dict.fromkeys(sizes)
                if size != CONFIGURED
            }
            place_layers(layers, resized_layers, sizes, config)
            text = config.get_text_config()
            for layer, size in zip(layers, sizes, strict=True):
                for module in layer.modules():
                    if isinstance(getattr(module, "config", None), PreTrainedConfig):
                        module.config = text
                if size.n_heads:
                    keys = getattr(text_config(resized(config, size)), "num_key_value_heads", None)
                    stream_width.own_heads(stream_width.attention(layer)[1], text, size.n_heads, keys)
            self.__class__ = base

    Shaped.__module__, Shaped.__name__ = base.__module__, base.__name__
    return Shaped


def divides_stream(base: type[PreTrainedModel], config: PreTrainedConfig, layer: nn.Module) -> bool:
    """Whether a class divides its stream among its heads, so that they are wider where it is; ``layer`` is its first.

    Then no configuration can express more heads of the same width.
    """
    with torch.device("meta"):
        wide = base(resized(config, Size(d_model=2 * d_model(config))))
    return _head_widths(layer_list(wide, text_config(config).num_hidden_layers)[0]) != _head_widths(layer)


def _fresh(
    base: type[PreTrainedModel], config: PreTrainedConfig, size: Size, n_layers: int, divides: bool
) -> nn.ModuleList:
    """The layers of a new model of this size.

    Where the class ``divides`` the stream among the heads, their attention is that of a model whose stream is wider by
    as much as there are more heads, cut back to the stream of ``config``.
    """
    if not (divides and size.n_heads and size.d_model is None):
        return layer_list(base(resized(config, size)), n_layers)
    layers = layer_list(base(resized(config, Size(size.d_mlp))), n_layers)
    inner = text_config(config)
    stream = size.n_heads * (inner.hidden_size // inner.num_attention_heads)
    with torch.device("meta"):  # only its attention is needed
        wide = base(resized(config, Size(size.d_mlp, size.n_heads, stream)))
    for layer, like in zip(layers, layer_list(wide, n_layers), strict=True):
        inside = stream_width.attention(like)[1]
        if (device := next(layer.parameters()).device).type != "meta":
            inside.to_empty(device=device).apply(wide._init_weights)  # noqa: SLF001
        stream_width.keep_heads(layer, like)
    return layers


def layer_list(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The model's list of layers: the outermost list with ``n_layers`` modules."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)


def place_layers(
    layers: nn.ModuleList, resized_layers: Mapping[Size, nn.ModuleList], sizes: Sequence[Size], config: Any
) -> None:
    """Replace each of ``layers`` that has a size of its own by the layer of that size at the same place.

    Raises ModelError where the architecture's layers do not follow the size.
    """
    for place, size in enumerate(sizes):
        if size != CONFIGURED:
            old, new = layers[place], resized_layers[size][place]
            if size.d_model is not None and size.n_heads is None and _head_widths(old) != _head_widths(new):
                stream_width.keep_heads(new, old)
            _require_size(old, new, size)
            if size.d_model is not None:
                stream_width.add_borders(
                    new, old, d_model(config), size.d_model, enters=size.enters, leaves=size.leaves
                )
            if size.branches > 1:
                branch_norms.divide(new, size.branches)
            branch_norms.add_biases(new, size.biases)
            layers[place] = new
            setattr(new, SIZE_ATTRIBUTE, size)


def _require_size(old: nn.Module, new: nn.Module, size: Size) -> None:
    """Raise ModelError unless ``new`` has the size: some classes fix the MLP's width, or divide d_model among heads."""
    d_mlp, n_heads, d_model, *_ = size
    if d_mlp and not any(dim in (d_mlp, 2 * d_mlp) for p in new.parameters() for dim in p.shape):
        raise ModelError(f"{type(new).__name__} has no MLP that can be {d_mlp} wide: leave d_mlp out")
    if (n_heads or d_model) and (not _head_widths(new) or _head_widths(new) != _head_widths(old)):
        raise ModelError(
            f"{type(new).__name__} divides d_model among its heads, so that {overrides(size)} would make heads of "
            "another width: leave n_heads out"
        )
    if d_model and not any(d_model in p.shape for p in new.parameters()):
        raise ModelError(f"{type(new).__name__} has no stream that can be {d_model} wide: leave d_model out")


def _head_widths(layer: nn.Module) -> set[int]:
    values = (getattr(module, key, None) for module in layer.modules() for key in stream_width.HEAD_WIDTHS)
    return {value for value in values if isinstance(value, int)}
