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
    "gpt2": PAIR,
    "gptj": WHOLE,
    "gpt_neox": WHOLE,
    "opt": PAIR,
    "phi3": PAIR,
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
    d_mlp = {"native-attention-only": None, "gpt2": 256, "gptj": 256}.get(name, 128)
    biases = tuple(f"attn.{part}_proj" for part in "kqv") if name == "gptj" else ()
    wide = Size(d_mlp, 8, branches=2 if name in APART else 1, biases=biases)
    assert sorted(layout.sizes(fused), key=str) == sorted([Size(), wide, Size()], key=str)
    assert difference(fused(TOKENS), stack.run(TOKENS, FUSED[name])) < 1e-5
    assert difference(stack.run(TOKENS, FUSED[name]), before) > 1e-2
    assert torch.equal(stack.run(TOKENS), before)
    if (twin := plain(fused)) is not None:
        assert difference(twin(TOKENS).logits, fused(TOKENS)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "gptj", "gpt_neox", "opt", "phi3"])
def test_in_double_precision_to_its_rounding(load, name):
    with fixtures.ThroughoutDouble():
        model = load(name, dtype=torch.float64)
        fused = fuse.together(model, FUSED[name])
        assert difference(fused(TOKENS), surgery.Stack(model).run(TOKENS, FUSED[name])) < 1e-10


GPT_NEO = dict(hidden_size=32, num_layers=4, num_heads=4, vocab_size=96, max_position_embeddings=64, bos_token_id=1)


@pytest.mark.parametrize(
    ("config", "options", "wiring"),
    [
        (transformers.Starcoder2Config, fixtures._rope, PAIR),  # LayerNorm, biases, rotary positions, a plain MLP
        (transformers.PhiConfig, fixtures._rope, WHOLE),  # one LayerNorm, from which attention and MLP both read
        (transformers.GemmaConfig, fixtures._rope | {"head_dim": 8}, PAIR),  # a norm whose gain is 1 + weight
        (transformers.StableLmConfig, fixtures._rope, PAIR),  # LayerNorm with a shift, no biases, gated MLP
        (transformers.NemotronConfig, fixtures._rope, PAIR),  # the same with a gain of 1 + weight, plain MLP
        (transformers.GPTNeoConfig, GPT_NEO | {"attention_types": [[["global"], 4]]}, PAIR),  # attention in attention
    ],
)
def test_other_kinds_of_layer(config, options, wiring):
    model = made(config(**options))
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


@pytest.mark.parametrize(
    ("name", "wiring", "instead"), [("llama", WHOLE, "7.attn | 8.attn} {7.mlp"), ("gpt_neox", PAIR, "{7 | 8}")]
)
def test_groups_in_the_other_form_are_not_fused(opened, name, wiring, instead):
    with pytest.raises(ModelError, match=r"differs from running .* layer by layer .* write groups as ") as error:
        fuse.together(opened(name).model, wiring)
    assert instead in str(error.value)


def test_groups_repeats_and_other_orders_together(opened):
    stack = opened("llama")
    wiring = f"3 {fuse.group([0, 1, 2])} 2 {fuse.group([0, 0])} 1"
    fused = fuse.together(stack.model, wiring)
    assert [size.n_heads for size in layout.sizes(fused)] == [None, 12, None, 8, None]
    assert difference(fused(TOKENS), stack.run(TOKENS, wiring)) < 1e-5


@pytest.mark.parametrize(
    ("name", "group"), [("llama", fuse.group), ("gptj", lambda layers: "{" + " | ".join(map(str, layers)) + "}")]
)
def test_a_fused_model_can_be_fused_again(opened, name, group):
    stack = opened(name)
    once = fuse.together(stack.model, FUSED[name])
    twice = fuse.together(once, group([0, 1]) + " 2")
    expected = stack.run(TOKENS, f"{group([0, 1, 2])} 3")
    assert difference(twice(TOKENS), surgery.Stack(once).run(TOKENS, group([0, 1]) + " 2")) < 1e-5
    assert difference(twice(TOKENS), expected) < 1e-5


def test_a_fused_layer_has_the_weights_of_one(opened):
    """Weights are put side by side once: nothing is left to be put together when it runs."""
    for name in ("gpt2", "gptj", "llama"):
        fused = fuse.together(opened(name).model, FUSED[name])
        layers = layout.source_of(fused).get_submodule(layout.layers_path(fused))
        single, wide = ({key for key, _ in layers[place].named_parameters()} for place in (0, 1))
        assert wide - single == {f"{projection}.bias" for projection in layout.sizes(fused)[1].biases}


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2", "gptj", "phi3"])
def test_it_is_saved_and_opened_again(opened, tmp_path, name):
    fused = fuse.together(opened(name).model, FUSED[name])
    layout.save(fused, tmp_path / "fused")
    again = surgery.load(str(tmp_path / "fused"))
    assert torch.equal(again(TOKENS), fused(TOKENS))
    assert layout.sizes(again) == layout.sizes(fused)


def test_layers_of_different_kinds_are_refused_by_name(opened):
    with pytest.raises(ModelError, match="1 is full attention, 2 is sliding attention; fuse layers of one kind"):
        fuse.together(opened("gemma3").model, PAIR)
    with pytest.raises(ModelError, match="1 is local, 2 is global; fuse layers of one kind"):
        fuse.together(made(transformers.GPTNeoConfig(**GPT_NEO, attention_types=[[["global", "local"], 2]])), PAIR)


def test_one_key_for_all_heads_is_refused_where_the_class_has_no_other(opened):
    with pytest.raises(ModelError, match="share a key among all heads"):
        fuse.together(made(transformers.GPTBigCodeConfig(**fixtures._gpt2)), PAIR)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_where_all_layers_are_of_one_shape_plain_hugging_face_opens_it(opened, tmp_path, name):
    stack = opened(name)
    wiring = f"{fuse.group([0, 1])} {fuse.group([2, 3])}"
    fused = fuse.together(stack.model, wiring)
    layout.save(fused, tmp_path / "fused")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert reopened.config.num_attention_heads == 8
    assert difference(reopened(TOKENS).logits, stack.run(TOKENS, wiring)) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "stablelm"])
def test_where_the_class_has_no_such_layers_only_surgery_opens_it(opened, tmp_path, name):
    model = made(transformers.StableLmConfig(**fixtures._rope)) if name == "stablelm" else opened(name).model
    wiring = f"{fuse.group([0, 1])} {fuse.group([2, 3])}"
    folder = layout.save(fuse.together(model, wiring), tmp_path / "fused")
    assert difference(surgery.load(folder)(TOKENS), surgery.Stack(model).run(TOKENS, wiring)) < 1e-5
    assert "only `surgery.load` opens this folder" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gptj", "gpt_neox", "phi3"])
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
