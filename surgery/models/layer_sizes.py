"""The sizes of a layer, and configurations that say them: MLP width, attention heads, width of the stream."""

import copy
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

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
