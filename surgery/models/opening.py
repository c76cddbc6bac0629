"""The engines of a TransformerLens model: one for the bridge's blocks, one for the layers of its plain twin."""

from typing import Any

from torch import nn
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

from surgery.models.engine import Engine, Parts
from surgery.models.errors import ModelError


def bridge_engine(model: TransformerBridge, name: str) -> Engine:
    """The engine of a bridge's own blocks, where hooks fire.

    Raises ModelError for a model without attention in every layer.
    """
    blocks = list(getattr(model, "blocks", []))
    if not blocks or not all(isinstance(getattr(block, "attn", None), AttentionBridge) for block in blocks):
        raise ModelError(
            f"{name} ({model.cfg.architecture}) is not a decoder-only transformer with attention in every layer; "
            "encoder-decoder, state-space and hybrid models cannot be opened"
        )
    parts = []
    for block in blocks:
        mlp = getattr(block, "mlp", None)
        if mlp is not None and mlp.name is None:  # OPT keeps its MLP's matrices in the layer; the last one writes
            mlp = mlp.out
        norms = {key: getattr(block, key) for key in ("ln1", "ln2") if key in block.submodules}
        parts.append(Parts(block.attn, mlp, _without_identity(norms)))
    return Engine("bridge", model.original_model, blocks, parts)


def plain_engine(twin: Any, model: TransformerBridge) -> Engine:
    """The engine of the layers of ``twin``, the plain twin of ``model``."""
    layers, parts = [], []
    for block in model.blocks:
        layer = twin.get_submodule(block.name)
        names = block.submodules
        mlp = names.get("mlp")
        mlp_name = None if mlp is None else (mlp.name or mlp.submodules["out"].name)
        layers.append(layer)
        norms = {key: layer.get_submodule(names[key].name) for key in ("ln1", "ln2") if key in names}
        parts.append(
            Parts(
                layer.get_submodule(names["attn"].name),
                None if mlp_name is None else layer.get_submodule(mlp_name),
                _without_identity(norms),
            )
        )
    return Engine("plain", twin, layers, parts)


def _without_identity(norms: dict[str, Any]) -> dict[str, Any]:
    """Leave out the ``Identity`` that models without normalisation have in a norm's place."""
    return {
        key: norm
        for key, norm in norms.items()
        if not isinstance(getattr(norm, "original_component", norm), nn.Identity)
    }
