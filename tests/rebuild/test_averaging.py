"""A model of its neighbours' means: every weight of every layer, everything else untouched, and refused in words."""

import pytest
import torch

import surgery
from surgery import Stack, graft
from surgery.instruments import known_networks
from surgery.models.errors import ModelError
from surgery.rebuild import averaging, layout


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "gpt_neox", "qwen3_moe"])
def test_every_layer_is_the_mean_of_its_neighbours(name, model_folder):
    model = surgery.load(model_folder(name))
    own, mean = (layout.source_of(part) for part in (model, averaging.neighbours(model)))
    path, before, after = layout.layers_path(model), dict(layout.tensors(own)), dict(layout.tensors(mean))
    last = len(model.blocks) - 1
    for key, value in before.items():
        if not key.startswith(path + ".") or not value.is_floating_point():
            assert torch.equal(after[key], value), key
            continue
        layer, rest = key.removeprefix(path + ".").split(".", 1)
        beside = [n for n in (int(layer) - 1, int(layer) + 1) if 0 <= n <= last]
        expected = torch.stack([before[f"{path}.{n}.{rest}"] for n in beside]).mean(0)
        assert torch.equal(after[key], expected), key


def test_layers_that_are_alike_are_replaced_for_nothing():
    model = surgery.load("babel")
    source = layout.source_of(model)
    for layer in source.model.layers[1:]:
        layer.load_state_dict(source.model.layers[0].state_dict())
    stack = Stack(model)
    tokens = stack.tokens(["p3 pf1 >other", "p1 pf2 pf4 >plain"])
    frame = graft.reinitialise.layers(stack, tokens, initial=averaging.neighbours(model))
    assert frame.damage.abs().max() < 1e-5
    assert frame.damage_skip.abs().max() > 1e-3


def test_one_layer_has_no_neighbour():
    with pytest.raises(ModelError, match="no neighbour"):
        averaging.neighbours(known_networks.random_network(n_layers=1))
