"""Fused layers: what the wiring computes, saved and opened, cached and not; and what cannot be fused says why."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import surgery
from support import fixtures
from support.known_wirings import TOKENS, difference
from surgery.models.errors import ModelError
from surgery.models.layer_sizes import Size
from surgery.models.loading import plain
from surgery.rebuild import fuse, layout

PAIR = ":1 {1.attn | 2.attn} {1.mlp | 2.mlp} 3:"
WHOLE = ":1 {1 | 2} 3:"
ODD = "0 2 {1.attn | 3.attn} {1.mlp | 3.mlp}"  # two layers of one kind, where kinds alternate
FUSED = {
    "llama": PAIR,
    "mistral": PAIR,
    "qwen2": PAIR,
    "qwen3": PAIR,
    "gemma2": ODD,
    "gemma3": ODD,
    "native-ln": PAIR,
    "native-rms": PAIR,
    "native-gated": PAIR,
    "native-attention-only": WHOLE,
}
APART = ("qwen3", "gemma2", "gemma3")  # whose norms stay apart
REFUSED = {
    "gpt2": "divides d_model among its heads",
    "gptj": "no bias that could take it over",
    "gpt_neox": "divides d_model among its heads",
    "opt": "divides d_model among its heads",
    "phi3": "cannot have layers with d_mlp 128, n_heads 8",
    "olmo2": "norms all heads at once",
    "mixtral": "have experts",
    "qwen3_moe": "have experts",
}


def made(config):
    """A random model of a class that is not in the matrix, opened."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.08))
    return surgery.load(model, tokenizer=fixtures.tokenizer())


def test_every_architecture_is_fused_or_refused():
    assert FUSED.keys() | REFUSED.keys() == {*fixtures.ARCHITECTURES, *fixtures.NATIVE}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_computes_the_wiring(opened, name):
    stack, before = opened(name), opened(name).run(TOKENS)
    fused = fuse.together(stack.model, FUSED[name])
    assert fused.cfg.n_layers == 3
    wide = Size(None if name.endswith("only") else 128, 8, branches=2 if name in APART else 1)
    assert sorted(layout.sizes(fused), key=str) == sorted([Size(), wide, Size()], key=str)
    assert difference(fused(TOKENS), stack.run(TOKENS, FUSED[name])) < 1e-5
    assert difference(stack.run(TOKENS, FUSED[name]), before) > 1e-2
    assert torch.equal(stack.run(TOKENS), before)
    if (twin := plain(fused)) is not None:
        assert difference(twin(TOKENS).logits, fused(TOKENS)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_in_double_precision_to_its_rounding(load, name):
    with fixtures.ThroughoutDouble():
        model = load(name, dtype=torch.float64)
        fused = fuse.together(model, FUSED[name])
        assert difference(fused(TOKENS), surgery.Stack(model).run(TOKENS, FUSED[name])) < 1e-10


@pytest.mark.parametrize(
    ("config", "wiring"),
    [
        (transformers.Starcoder2Config, PAIR),  # LayerNorm, biases, rotary positions, a plain MLP
        (transformers.PhiConfig, WHOLE),  # one LayerNorm, from which attention and MLP both read
        (transformers.GemmaConfig, PAIR),  # a norm whose gain is 1 + weight
    ],
)
def test_other_kinds_of_layer(config, wiring):
    options = {"head_dim": 8} if config is transformers.GemmaConfig else {}
    model = made(config(**fixtures._rope, **options))
    fused = fuse.together(model, wiring)
    assert difference(fused(TOKENS), surgery.Stack(model).run(TOKENS, wiring)) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fused_says_why(opened, name):
    with pytest.raises(ModelError, match=REFUSED[name]):
        fuse.together(opened(name).model, PAIR)


@pytest.mark.parametrize(
    "wiring",
    ["{0.attn | 1.attn} 0.mlp 1.mlp 2:", "mean{0 | 1} 2:", "{0:2 | 2} 3", "0.5*0 1:", "0.attn 1:", "{0 | 1.attn} 2:"],
)
def test_wirings_of_other_forms_are_refused(opened, wiring):
    with pytest.raises(ValueError, match="cannot be one layer"):
        fuse.together(opened("llama").model, wiring)


def test_whole_layers_that_read_after_each_other_are_not_fused(opened):
    with pytest.raises(ModelError, match="differs from running the wiring layer by layer"):
        fuse.together(opened("llama").model, WHOLE)


def test_groups_repeats_and_other_orders_together(opened):
    stack = opened("llama")
    wiring = f"3 {fuse.group([0, 1, 2])} 2 {fuse.group([0, 0])} 1"
    fused = fuse.together(stack.model, wiring)
    assert [size.n_heads for size in layout.sizes(fused)] == [None, 12, None, 8, None]
    assert difference(fused(TOKENS), stack.run(TOKENS, wiring)) < 1e-5


def test_a_fused_model_can_be_fused_again(opened):
    stack = opened("llama")
    once = fuse.together(stack.model, PAIR)
    twice = fuse.together(once, fuse.group([0, 1]) + " 2")
    expected = stack.run(TOKENS, f"{fuse.group([0, 1, 2])} 3")
    assert difference(twice(TOKENS), surgery.Stack(once).run(TOKENS, fuse.group([0, 1]) + " 2")) < 1e-5
    assert difference(twice(TOKENS), expected) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_it_is_saved_and_opened_again(opened, tmp_path, name):
    fused = fuse.together(opened(name).model, FUSED[name])
    layout.save(fused, tmp_path / "fused")
    again = surgery.load(str(tmp_path / "fused"))
    assert torch.equal(again(TOKENS), fused(TOKENS))
    assert layout.sizes(again) == layout.sizes(fused)


def test_layers_of_different_kinds_are_refused_by_name(opened):
    with pytest.raises(ModelError, match="1 is full attention, 2 is sliding attention; fuse layers of one kind"):
        fuse.together(opened("gemma3").model, PAIR)


def test_where_all_layers_are_of_one_shape_plain_hugging_face_opens_it(opened, tmp_path):
    stack = opened("llama")
    wiring = f"{fuse.group([0, 1])} {fuse.group([2, 3])}"
    fused = fuse.together(stack.model, wiring)
    layout.save(fused, tmp_path / "fused")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert reopened.config.num_attention_heads == 8
    assert difference(reopened(TOKENS).logits, stack.run(TOKENS, wiring)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_with_a_cache_it_writes_what_it_writes_without(opened, name):
    fused = plain(fuse.together(opened(name).model, FUSED[name]))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached, recomputed = (fused.generate(TOKENS, **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, recomputed)


def test_its_gradients_are_its_own(opened):
    """Weights are copies: training the fused model leaves the original alone."""
    stack = opened("llama")
    fused = fuse.together(stack.model, PAIR)
    fused(TOKENS).sum().backward()
    assert plain(fused).model.layers[1].mlp.down_proj.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in stack.model.parameters())
