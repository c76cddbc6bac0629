"""What runs is what the user's model computes now: hooks, edits, replaced parts, each once per pass; or a sentence."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import surgery
from support import fixtures
from surgery import Stack
from surgery.models.errors import ModelError
from surgery.models.loading import plain
from surgery.rebuild import width
from surgery.series.composition import compositions

IDS = torch.randint(4, fixtures.N_VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
        return getattr(found, "logits", found)


class Adapter(nn.Module):
    """A linear map with a low-rank update beside it, as LoRA has."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt"])  # OPT's adapter has permanent hooks of its own
def test_hooks_set_before_the_stack_was_opened_are_heard_until_they_go(load, name, permanent):
    model = load(name)
    quiet = logits(model)
    handle = model.hook_dict["blocks.1.hook_resid_mid"].add_hook(lambda x, hook: 2 * x, is_permanent=permanent)
    loud, stack = logits(model), Stack(model)
    assert not close(loud, quiet)
    assert stack.hooks_listen()
    assert close(stack.run(IDS), loud)
    handle.hook.remove()
    assert not stack.hooks_listen()
    assert close(stack.run(IDS), quiet)
    calls = []
    model.hook_dict["blocks.1.hook_resid_mid"].add_hook(lambda x, hook: calls.append(1), is_permanent=permanent)
    assert close(stack.run(IDS, ":2 1:"), Stack(load(name)).run(IDS, ":2 1:"))
    assert len(calls) == 2


def test_opening_and_checking_do_not_fire_the_users_hooks(load):
    model, calls = load("llama"), []
    model.hook_dict["blocks.1.hook_resid_mid"].add_hook(lambda x, hook: calls.append(1))
    plain(model).model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert Stack(model).checks()["passed"].all()
    assert not calls


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("side", ["bridge", "twin"])
def test_pytorch_hooks_fire_once_per_pass(load, name, side):
    model, calls = load(name), []
    stack = Stack(model)
    inside = plain(model) if side == "twin" else model.original_model
    layer = inside.get_submodule(model.blocks[1].name)
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    inside.get_submodule(model.ln_final.name).register_forward_hook(lambda *_: calls.append("norm"))
    inside.get_submodule(model.embed.name).register_forward_pre_hook(lambda *_: calls.append("embed"))
    stack.run(IDS, ":2 1:")
    assert sorted(calls) == ["embed", "layer", "layer", "norm"]
    calls.clear()
    stack.run(stack.context(IDS), ":", positions=[-1])
    assert calls.count("layer") == 1
    layer.register_forward_hook(lambda module, args, output: 2 * output if isinstance(output, torch.Tensor) else None)
    assert close(stack.run(IDS), logits(inside))


def test_hooks_that_cannot_be_heard_are_said(load):
    model = load("llama")
    stack = Stack(model)
    handle = plain(model).model.layers[1].register_forward_hook(lambda *_: None)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: None)]):
        with pytest.warns(UserWarning, match="hooks on the plain twin of .* are not heard"):
            stack.run(IDS)
    handle.remove()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"on the whole bridge .* register it on model\.original_model"):
        stack.run(IDS)


@pytest.mark.parametrize("side", ["bridge", "twin"])
def test_a_parameter_replaced_on_one_side_is_what_runs(load, side):
    model = load("llama")
    stack, before = Stack(model), logits(model)
    inside = plain(model) if side == "twin" else model.original_model
    norm = inside.get_submodule(model.blocks[2].ln2.name if "." in model.blocks[2].ln2.name else "model.norm")
    norm.weight = nn.Parameter(norm.weight.detach() * 3)
    now = logits(inside)
    assert not close(now, before)
    assert close(stack.run(IDS), now)
    assert close(Stack(model).run(IDS), now)
    assert Stack(model).checks()["passed"].all()
    if side == "twin":
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: None)]):
            with pytest.raises(ValueError, match=r"hooks on the bridge .* cannot be heard: .* load the edited model"):
                stack.run(IDS)


def test_weights_edited_in_place_where_the_bridge_has_copies_are_what_runs(load):
    """GPT-NeoX' adapter copies queries, keys and values: an edit of the plain twin does not reach the bridge."""
    model = load("gpt_neox")
    with torch.no_grad():
        plain(model).gpt_neox.layers[1].attention.query_key_value.weight.mul_(2)
    stack = Stack(model)
    assert stack.bridge_is_stale
    assert close(stack.run(IDS), logits(plain(model)))


@pytest.mark.parametrize("side", ["bridge", "twin"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_so_are_edits_after_the_stack_was_opened(load, name, side):
    model = load(name)
    stack, before = Stack(model), logits(model)
    edited = model.blocks[1].attn.q.weight
    if side == "twin":
        joint = "attn.c_attn" if name == "gpt2" else "attention.query_key_value"
        edited = plain(model).get_submodule(f"{model.blocks[1].name}.{joint}").weight
    with torch.no_grad():
        edited.mul_(3)
    now = logits(model if side == "bridge" else plain(model))
    assert not close(now, before)
    assert close(stack.run(IDS), now)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_bridge_processed_after_the_stack_was_opened_is_what_runs(load, name):
    model = load(name)
    stack = Stack(model)
    before = stack.run(IDS)
    model.enable_compatibility_mode(disable_warnings=True)
    assert close(stack.run(IDS), logits(model))
    if name == "gpt2":  # centring the unembedding shifts the logits
        assert not close(stack.run(IDS), before)


def test_adapters_around_linear_maps_run_and_are_not_read_as_weights(load):
    model = load("llama")
    stack, before = Stack(model), Stack(load("llama")).run(IDS)
    attention = plain(model).model.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    assert close(stack.run(IDS), logits(plain(model)))
    assert not close(stack.run(IDS), before)
    wrapped = copy.deepcopy(plain(model))
    with pytest.raises(ModelError, match=r"layer 1 .* has no single matrix attn\.W_Q"):
        compositions(Stack(surgery.load(wrapped)), draws=1)
    mlp = plain(load("llama"))
    mlp.model.layers[2].mlp.down_proj = Adapter(mlp.model.layers[2].mlp.down_proj)
    with pytest.raises(ModelError, match="is a Adapter"):
        width.narrow(surgery.load(mlp), 2, 3, d_mlp=32)


def test_layers_removed_on_one_side_only(load):
    model = load("llama")
    stack = Stack(model)
    del plain(model).model.layers[2]
    for _ in range(2):
        with pytest.raises(ModelError, match=r"no longer has the layers of its bridge .* load the edited model again"):
            stack.run(IDS)
    model = load("llama")
    stack = Stack(model)
    del model.blocks[2]  # of the bridge
    assert close(stack.run(IDS), Stack(load("llama")).run(IDS, ":2 3:"))
    assert stack.n_layers == 3


def test_a_bridge_can_go(load):
    """What is kept beside a bridge must not keep the bridge alive."""
    model = load("llama")
    Stack(model).run(IDS)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
