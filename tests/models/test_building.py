"""A bridge that is built quickly is the bridge that TransformerLens builds."""

from collections.abc import Sized
from contextlib import nullcontext

import pytest
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import transformer_bridge

from support import fixtures
from surgery.models import building


def hooks(model):
    """Every name in the registry, the place of its hook point among all of them, and that hook point's state."""
    places = {hook: place for place, hook in enumerate(dict.fromkeys(model._hook_registry.values()))}
    return [(name, places[hook], state(hook)) for name, hook in model._hook_registry.items()]


def state(hook):
    """Containers by their kind and size, for what is in them (functions, classes) is made anew with every bridge."""
    kinds = {key: type(value).__name__ for key, value in vars(hook).items()}
    sizes = {key: len(value) for key, value in vars(hook).items() if isinstance(value, Sized)}
    return hook.name, hook.training, hook.backward_scale, hook.pos_dim, kinds, sizes


@pytest.mark.parametrize("name", [*fixtures.ARCHITECTURES, *fixtures.NATIVE])
def test_hooks_are_the_same_under_the_same_names(load, monkeypatch, name):
    model, searched = load(name), []
    with monkeypatch.context() as slow:
        slow.setattr(building, "quickly", nullcontext)
        slow.setattr(transformer_bridge, "dir", lambda part: searched.append(part) or dir(part), raising=False)
        expected = hooks(load(name))
    assert searched, "TransformerLens looks for hooks in another way: surgery.models.building is of no use"
    assert len(expected) > 50
    assert hooks(model) == expected
    own = [value for hook in set(model._hook_registry.values()) for value in vars(hook).values()]
    containers = [value for value in own if isinstance(value, dict | list | set)]
    assert len(set(map(id, containers))) == len(containers), "no two hook points share a list of hooks"


def test_transformer_lens_is_as_before_afterwards():
    before = dict(vars(HookPoint)), dict(vars(transformer_bridge))
    with pytest.raises(ZeroDivisionError), building.quickly(), building.quickly():
        assert 1 / ("dir" not in vars(transformer_bridge))
    assert (dict(vars(HookPoint)), dict(vars(transformer_bridge))) == before
