"""Configurations that describe a model with other layers than the one they were written for."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# Lists of layer indices. Any other list of the configuration that is as long as the model is deep has an entry a layer.
_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "global_attn_layers", "full_attn_idxs")


def rewrite(config: PreTrainedConfig, layers: Sequence[int], n_layers: int) -> None:
    """Make the configuration of a model of ``n_layers`` layers describe a model of ``layers`` of them, in place.

    >>> from transformers import GPT2Config
    >>> config = GPT2Config(n_layer=3)
    >>> rewrite(config, [0, 1, 1, 2], 3)
    >>> config.n_layer
    4
    """
    common = vars(PreTrainedConfig())
    step = getattr(config, "decoder_sparse_step", None)
    if isinstance(step, int) and step > 1:  # one in every ``step`` original layers is a mixture of experts
        dense = {layer for layer in range(n_layers) if (layer + 1) % step} | set(config.mlp_only_layers or ())
        config.mlp_only_layers, config.decoder_sparse_step = sorted(dense), 1
    if isinstance(first := getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = sum(layer < first for layer in layers)
    for key, value in list(vars(config).items()):
        if not isinstance(value, list | tuple) or key in common or key.endswith(("token_id", "token_ids")):
            continue
        if key in _INDICES:
            setattr(config, key, [slot for slot, layer in enumerate(layers) if layer in value])
        elif len(value) == n_layers and key != "attention_types":
            setattr(config, key, type(value)(value[layer] for layer in layers))
    if hasattr(config, "attention_types"):  # GPT-Neo's run-length code of attention_layers
        config.attention_types = [[list(config.attention_layers), 1]]
    config.num_hidden_layers = len(layers)


def own_layers(config: PreTrainedConfig, layers: Sequence[nn.Module]) -> PreTrainedConfig:
    """A copy of a model's configuration for the layers that it really has: some may have been removed from its list.

    Which ones they were is read from the index that each keeps; where there is none, the first ones are taken.
    """
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    before, kept = text.num_hidden_layers, [_index(layer) for layer in layers]
    if len(layers) != before:
        known = len(set(kept)) == len(kept) and all(0 <= layer < before for layer in kept)
        rewrite(text, kept if known else range(len(layers)), before)
    return config


def _index(layer: nn.Module) -> int:
    found = [getattr(module, "layer_idx", None) for module in layer.modules()]
    return next((index for index in found if isinstance(index, int)), -1)
