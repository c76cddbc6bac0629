"""The sizes of a layer, and configurations that say them: MLP width, attention heads, width of the stream."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from surgery.models import stream_width
from surgery.models.errors import ModelError

WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


class Size(NamedTuple):
    """What of a layer is not as the configuration says: MLP width, heads, width of its stream; None where it is.

    In a stream of its own width a layer ``enters``, ``leaves``, both or neither: it carries the map from, to the
    model's.
    """

    d_mlp: int | None = None
    n_heads: int | None = None
    d_model: int | None = None
    enters: bool = False
    leaves: bool = False


CONFIGURED = Size()


def configured(config: Any) -> Size:
    """The sizes that a configuration gives all layers; None where it has no single width."""
    told = text(config)
    found = {getattr(told, key) or 4 * d_model(config) for key in widths(config)}
    heads = getattr(told, "n_heads", None) or told.num_attention_heads
    return Size(found.pop() if len(found) == 1 else None, heads, d_model(config))


def resized(config: Any, size: Size) -> Any:
    """A copy of a configuration that says ``size`` for all layers; None leaves what it says.

    Raises ModelError for a width that it has no place for, and heads that its keys cannot be shared among.
    """
    (d_mlp, n_heads, stream, *_), config = size, copy.deepcopy(config)
    told, native, heads = text(config), not isinstance(config, PreTrainedConfig), configured(config).n_heads
    if d_mlp:
        if not widths(config):
            raise ModelError(
                f"the configuration of {type(told).__name__} has no MLP width to set, so no layer can be {d_mlp} wide: "
                "leave d_mlp out"
            )
        for key in widths(config):
            setattr(told, key, d_mlp)
    if (n_heads or stream) and not native:
        told.head_dim = getattr(told, "head_dim", None) or told.hidden_size // heads
    if stream:
        if not d_mlp:  # else GPT-2 would take four times the new width
            config = resized(config, Size(configured(config).d_mlp)) if widths(config) else config
            told = text(config)
        setattr(told, "d_model" if native else "hidden_size", stream)
    if n_heads:
        heads_key, keys_key = (
            ("n_heads", "n_key_value_heads") if native else ("num_attention_heads", "num_key_value_heads")
        )
        keys = getattr(told, keys_key, None)
        if keys and n_heads * keys % heads:
            raise ModelError(
                f"here {heads} heads share {keys} keys, so {n_heads} cannot: make n_heads a multiple of {heads // keys}"
            )
        setattr(told, heads_key, n_heads)
        if keys:
            setattr(told, keys_key, n_heads * keys // heads)
    return config


def d_model(config: Any) -> int:
    """Width of the model's stream."""
    return text(config).hidden_size if isinstance(config, PreTrainedConfig) else config.d_model


def said(size: Size) -> str:
    """In words what of a layer's size is not configured."""
    return ", ".join(f"{name} {value}" for name, value in zip(Size._fields[:3], size) if value)


def widths(config: Any) -> list[str]:
    """What a configuration calls the widths of its MLPs."""
    if not isinstance(config, PreTrainedConfig):
        return [] if config.attn_only else ["d_mlp"]
    return [key for key in WIDTHS if hasattr(text(config), key) and isinstance(getattr(text(config), key), int | None)]


def text(config: Any) -> Any:
    """The part of a configuration that is about the text."""
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


FORMAT = 1


MARK = "own_size"  # a layer with sizes of its own carries them in this attribute, through copies and tapes


def opener(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class whose ``from_pretrained`` opens a folder with ``surgery.json``."""
    try:
        said = json.loads((folder / "surgery.json").read_text(encoding="utf-8"))
        found, rows = said["format"], [Size(**row) for row in said["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/surgery.json does not say the sizes of the layers: save the model again") from error
    if found != FORMAT:
        raise ModelError(f"{folder}/surgery.json has format {found!r}, this surgery reads {FORMAT}: update it")
    if len(rows) != config.get_text_config().num_hidden_layers or not all(
        size is None or (isinstance(size, int) and size > 0) for row in rows for size in row[:3]
    ):
        raise ModelError(
            f"{folder}/surgery.json must give every one of the {config.get_text_config().num_hidden_layers} layers of "
            "config.json a d_mlp, n_heads and d_model, each null or 1 and more: save the model again"
        )
    return sized_class(AutoModelForCausalLM._model_mapping[type(config)], rows)  # noqa: SLF001


def sized_class(base: type[PreTrainedModel], own: Sequence[Size]) -> type[PreTrainedModel]:
    """``base`` as a class whose new models have layers of these sizes; the models themselves are of ``base``."""

    class Shaped(base):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            others = {size: base(resized(config, size)) for size in dict.fromkeys(own) if size != CONFIGURED}
            place_layers(
                layer_list(self, len(own)),
                {size: layer_list(other, len(own)) for size, other in others.items()},
                own,
                config,
            )
            for layer in layer_list(self, len(own)):
                for module in layer.modules():
                    if isinstance(getattr(module, "config", None), PreTrainedConfig):
                        module.config = config.get_text_config()
            self.__class__ = base

    Shaped.__module__, Shaped.__name__ = base.__module__, base.__name__
    return Shaped


def layer_list(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of the model's layers: the outermost that has one module for each."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)


def place_layers(row: nn.ModuleList, others: Mapping[Size, nn.ModuleList], own: Sequence[Size], config: Any) -> None:
    for place, size in enumerate(own):
        if size != CONFIGURED:
            old, new = row[place], others[size][place]
            if size.d_model is not None and size.n_heads is None and _head_widths(old) != _head_widths(new):
                stream_width.attention(new, old)
            _require_size(old, new, size)
            if size.d_model is not None:
                stream_width.carry(new, old, d_model(config), size.d_model, enters=size.enters, leaves=size.leaves)
            row[place] = new
            setattr(new, MARK, size)


def _require_size(old: nn.Module, new: nn.Module, size: Size) -> None:
    """Not every class follows its configuration: some fix the MLP's width, or divide d_model among the heads."""
    d_mlp, n_heads, d_model, *_ = size
    if d_mlp and not any(dim in (d_mlp, 2 * d_mlp) for p in new.parameters() for dim in p.shape):
        raise ModelError(f"{type(new).__name__} has no MLP that can be {d_mlp} wide: leave d_mlp out")
    if (n_heads or d_model) and (not _head_widths(new) or _head_widths(new) != _head_widths(old)):
        raise ModelError(
            f"{type(new).__name__} divides d_model among its heads, so that {said(size)} would make heads of "
            "another width: leave n_heads out"
        )
    if d_model and not any(d_model in p.shape for p in new.parameters()):
        raise ModelError(f"{type(new).__name__} has no stream that can be {d_model} wide: leave d_model out")


def _head_widths(layer: nn.Module) -> set[int]:
    widths = (getattr(module, key, None) for module in layer.modules() for key in stream_width.HEAD_WIDTHS)
    return {width for width in widths if isinstance(width, int)}
