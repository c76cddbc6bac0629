"""A model whose every layer has the mean of its neighbours' weights: what an "anti-layer" is measured with.

If layers change smoothly with depth, layer l can be replaced by the mean of layers l - 1 and l + 1. arXiv 2603.19348
(2026) calls layers of SmolLM2-135M whose replacement *lowers* perplexity anti-layers, from ten sentences. Take the
layers one at a time, with an interval over many:

    graft.reinitialise.layers(stack, tokens, initial=averaging.neighbours(model))

whose ``damage`` is that of the replacement and ``damage_skip`` that of leaving the layer out. The end layers have one
neighbour, whose weights they get.
"""

import torch
from transformer_lens import TransformerBridge

from surgery.models.errors import ModelError
from surgery.models.loading import untrained
from surgery.rebuild.layout import layers_path, source_of, tensors


def neighbours(model: TransformerBridge) -> TransformerBridge:
    """Return the model with every layer's weights the mean of those of the layers before and behind it.

    All else is the model's own. Cost: no forward pass; memory for a second model.

    Raises ModelError for a model of one layer, or whose layers have weights of different shapes.

    >>> import surgery
    >>> model = surgery.load("babel")
    >>> mean = source_of(neighbours(model)).model.layers[1].mlp.up_proj.weight
    >>> before, behind = (source_of(model).model.layers[n].mlp.up_proj.weight for n in (0, 2))
    >>> torch.equal(mean, (before + behind) / 2)
    True
    """
    result = untrained(model)
    own, made = source_of(model), source_of(result)
    made.load_state_dict(own.state_dict())
    path = layers_path(model)
    source, target = (list(part.get_submodule(path).children()) for part in (own, made))
    if len(source) < 2:
        raise ModelError(f"{model.cfg.model_name} has one layer, which has no neighbour")
    by_layer = [dict(tensors(layer)) for layer in source]
    if len({tuple((name, tuple(value.shape)) for name, value in values.items()) for values in by_layer}) > 1:
        raise ModelError(f"the layers of {model.cfg.model_name} have weights of different shapes: no mean can be taken")
    with torch.no_grad():
        for number, layer in enumerate(target):
            beside = [by_layer[n] for n in (number - 1, number + 1) if 0 <= n < len(source)]
            for name, value in tensors(layer):
                if value.is_floating_point():
                    value.copy_(torch.stack([values[name] for values in beside]).mean(0))
    return result
