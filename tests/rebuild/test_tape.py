"""Taped models: they run as the wiring says, in every way that a model can run, on the weights of the original."""

import copy
import functools

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import surgery
from support import fixtures, random_wirings
from support.known_wirings import GROUPS, SERIAL, SUBLAYERS, TOKENS, difference
from surgery.models import configs
from surgery.models.errors import ModelError
from surgery.models.loading import plain
from surgery.models.weights_hash import weights_sha256
from surgery.rebuild import tape
from surgery.rebuild.passes import compose
from surgery.wiring.value import Wiring

KINDS = ("gpt2", "gpt_neox", "gemma2", "mixtral", "native-gated")  # one of each kind of block


def storages(*models):
    return {p.untyped_storage().data_ptr() for model in models for p in torch.nn.Module.parameters(model)}


def state(model):
    configs = [model.original_model.config.to_dict() if plain(model) else model.cfg.to_dict()]
    configs += [twin.config.to_dict() for twin in [plain(model)] if twin is not None]
    return weights_sha256(model), copy.deepcopy(configs), len(model.hook_dict), model.cfg.n_layers


@pytest.fixture(scope="module")
def taped(opened):
    """A taped model of the matrix, taped once: tests that use it must leave it as it is."""

    @functools.cache
    def made(name, wiring, dtype):
        return tape.together(opened(name, dtype).model, wiring)

    return lambda name, wiring, dtype=torch.float32: made(name, wiring, dtype)


# --- the law: taped runs as wired ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*fixtures.ARCHITECTURES, *fixtures.NATIVE])
def test_taped_equals_wired_and_nothing_is_copied_or_touched(load, opened, taped, name):
    stack, twin = opened(name), plain(opened(name).model)
    for wiring in SERIAL.values() if name in KINDS else (SERIAL["repeat"], SERIAL["skip"]):
        model = taped(name, wiring)
        expected = stack.run(TOKENS, wiring)
        assert difference(surgery.Stack(model).run(TOKENS), expected) < 1e-5
        assert difference(model(TOKENS).detach(), expected) < 1e-5
        assert model.cfg.n_layers == len(model.blocks) == stack.wiring(wiring).depth
        assert storages(model) <= storages(stack.model)
        if twin is not None:
            assert storages(plain(model)) == storages(twin) or wiring == SERIAL["skip"]
            assert plain(model).config.num_hidden_layers == len(model.blocks)
    assert state(stack.model) == state(load(name)), "as if nothing had been taped of it"


@pytest.mark.parametrize(
    ("name", "wiring"),
    [
        *((name, GROUPS["chains"]) for name in [*fixtures.ARCHITECTURES, *fixtures.NATIVE]),
        *((name, SERIAL["repeat"]) for name in ("gpt2", "gpt_neox", "llama", "mixtral", "native-gated")),
    ],
)
def test_taped_equals_wired_in_double_precision(opened, taped, name, wiring):
    """Bridge against bridge: some take softmax in single precision in one kind of attention, not in another."""
    stack = opened(name, torch.float64)
    with stack.model.hooks(fwd_hooks=[("blocks.0.hook_out", lambda x, hook: None)]):
        expected = stack.run(TOKENS, wiring)
    model = taped(name, wiring, torch.float64)
    assert difference(model(TOKENS, use_cache=False).detach(), expected) < 1e-10


@pytest.mark.parametrize("name", [*fixtures.ARCHITECTURES, *fixtures.NATIVE])
def test_what_no_checkpoint_can_express_runs_all_the_same(opened, taped, name):
    stack = opened(name)
    groups = [GROUPS["nested"]] if name not in KINDS else [GROUPS["sum"], GROUPS["last"], GROUPS["nested"]]
    sublayers = list(SUBLAYERS.values()) if name in KINDS else [SUBLAYERS["sublayers in groups"]]
    for wiring in groups if name == "native-attention-only" else [*groups, *sublayers]:
        model = taped(name, wiring)
        expected = stack.run(TOKENS, wiring)
        assert difference(model(TOKENS).detach(), expected) < 1e-5
        assert difference(surgery.Stack(model).run(TOKENS), expected) < 1e-5
        assert storages(model) <= storages(stack.model)


@hypothesis.settings(max_examples=10)
@hypothesis.given(random_wirings.chains(fixtures.N_LAYERS, shortest=1))
def test_any_wiring_at_all(chain):
    try:
        wiring = Wiring(fixtures.N_LAYERS, chain)
    except ValueError:
        hypothesis.reject()
    stack = in_double_precision()
    found = tape.together(stack.model, wiring)(TOKENS).detach()
    assert difference(found, stack.run(TOKENS, wiring)) < 1e-10


@functools.cache
def in_double_precision():
    return surgery.Stack(fixtures.native("native-gated", dtype=torch.float64))


# --- generating ------------------------------------------------------------------------------------------------------


def greedy(run, tokens, count):
    for _ in range(count):
        tokens = torch.cat([tokens, run(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def bridge_generates(taped, prompt, cached, count=4):
    return taped.generate(
        prompt, max_new_tokens=count, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached, verbose=False
    )


def plain_generates(taped, prompt, mask, cached, count=4):
    hugging_face = plain(taped)
    hugging_face.generation_config.eos_token_id = None
    hugging_face.generation_config.pad_token_id = 0
    return hugging_face.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, use_cache=cached)


@pytest.mark.parametrize("name", fixtures.ARCHITECTURES)
def test_generating_with_a_cache_is_generating_without_and_by_hand(opened, taped, name):
    stack = opened(name)
    prompt = TOKENS[:, :5]
    serial = SERIAL.values() if name in ("llama", "gemma2") else [SERIAL["repeat"]]
    for wiring in (*serial, GROUPS["nested"], SUBLAYERS["sublayers"]):
        model = taped(name, wiring)
        by_hand = greedy(lambda tokens, wiring=wiring: stack.run(tokens, wiring), prompt, 4)
        for cached in (True, False):
            assert torch.equal(bridge_generates(model, prompt, cached), by_hand)
            assert torch.equal(plain_generates(model, prompt, torch.ones_like(prompt), cached), by_hand)


@pytest.mark.parametrize("name", fixtures.ARCHITECTURES)
def test_logits_token_by_token_through_the_cache(opened, taped, name):
    """Greedy tokens could agree by luck; logits far beyond the sliding window do not."""
    for wiring in (SERIAL["repeat"], GROUPS["nested"], SUBLAYERS["sublayers in groups"]):
        model = taped(name, wiring)
        expected = opened(name).run(TOKENS, wiring)
        for hugging_face in (plain(model), model.original_model):
            with torch.no_grad():
                output = hugging_face(TOKENS[:, :3], use_cache=True)
                found = [output.logits]
                for i in range(3, TOKENS.shape[1]):
                    output = hugging_face(TOKENS[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
                    found.append(output.logits)
            assert difference(torch.cat(found, 1), expected) < 1e-5
            cache = output.past_key_values
            assert len(cache.layers) == len(model.blocks)
            assert {cache.get_seq_length(slot) for slot in range(len(model.blocks))} == {TOKENS.shape[1]}


@pytest.mark.parametrize("name", fixtures.ARCHITECTURES)
def test_left_padding(opened, taped, name):
    prompt = TOKENS[:, :5]
    padded = torch.nn.functional.pad(prompt, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (3, 0))
    for wiring in (SERIAL["repeat"], SUBLAYERS["sublayers in groups"]):
        model = taped(name, wiring)
        expected = opened(name).run(prompt, wiring)
        assert difference(model(padded, attention_mask=mask).detach()[:, 3:], expected) < 1e-5
        unpadded = plain_generates(model, prompt, torch.ones_like(prompt), True)
        for cached in (True, False):
            assert torch.equal(plain_generates(model, padded, mask, cached)[:, 3:], unpadded)


# --- hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "native-rms"])
def test_every_pass_has_its_own_hooks(opened, taped, name):
    for wiring in (SERIAL["repeat"], GROUPS["sum"], SUBLAYERS["sublayers"]):
        model = taped(name, wiring)
        passes = []
        opened(name).run(TOKENS, wiring, tap=lambda layer, *streams, passes=passes: passes.append(streams))
        logits, cache = model.run_with_cache(TOKENS)
        assert len(passes) == model.cfg.n_layers
        for i, (before, after) in enumerate(passes):
            assert difference(cache[f"blocks.{i}.hook_resid_pre"], before) < 1e-5
            assert difference(cache[f"blocks.{i}.hook_resid_post"], after) < 1e-5
        assert f"blocks.{len(passes)}.hook_resid_pre" not in cache
        seen = []
        hook = (f"blocks.{len(passes) - 1}.hook_resid_pre", lambda x, hook, seen=seen: seen.append(x) or x.flip(1))
        assert not torch.allclose(model.run_with_hooks(TOKENS, fwd_hooks=[hook]), logits, atol=1e-3)
        assert len(seen) == 1
        assert torch.equal(model(TOKENS), logits)


def test_an_exception_inside_a_group_leaves_nothing_behind(taped):
    model = taped("llama", ":1 {1 2|3} 3")
    expected = model(TOKENS)

    def fails(x, hook):
        raise ZeroDivisionError

    for block in range(5):
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{block}.hook_out", fails)])
        assert torch.equal(model(TOKENS), expected)


def test_the_layers_of_a_group_run_together_or_not_at_all(opened, taped):
    model = taped("llama", ":1 {1 2|3} 3")  # 0 | 1 2 3 | 4
    stack, base = surgery.Stack(model), opened("llama")
    assert difference(stack.run(TOKENS, ":4 1:4 4"), base.run(TOKENS, "0 {1 2|3} {1 2|3} 3")) < 1e-5
    for wiring in (":2 3:", "0 2 1 3 4", "2 4"):
        with pytest.raises(RuntimeError, match="layers 1 to 3 of this taped model are one group"):
            stack.run(TOKENS, wiring)
    x = stack.context(TOKENS).x0
    with pytest.raises(RuntimeError, match="nothing can begin at layer 2"):
        stack.update(2, x)
    with pytest.raises(RuntimeError, match="nothing can begin at layer 2"):
        model(x, start_at_layer=2)
    _, cache = model.run_with_cache(TOKENS)
    assert difference(model(TOKENS, stop_at_layer=3), cache["blocks.3.hook_in"]) < 1e-6
    assert difference(model(cache["blocks.4.hook_in"], start_at_layer=4), model(TOKENS)) < 1e-5


def test_a_deep_copy_runs_on_its_own_weights(taped):
    model = taped("llama", GROUPS["chains"])
    before = model(TOKENS).detach()
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.blocks[1].mlp.out.weight.zero_()
    assert not torch.allclose(again(TOKENS), before, atol=1e-3)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "native-ln"])
def test_a_taped_model_can_be_processed(load, name):
    model = load(name)
    taped = tape.together(model, SERIAL["repeat"])
    expected, untouched = taped(TOKENS).log_softmax(-1).detach(), model(TOKENS).detach()
    taped.enable_compatibility_mode(disable_warnings=True)
    assert difference(taped(TOKENS).log_softmax(-1).detach(), expected) < 1e-5
    assert torch.equal(model(TOKENS), untouched)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ModelError, match="tape the model as it was loaded"):
        tape.together(model, ":")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tolerance"),  # these Llamas' norms run in single precision whatever their weights are
    [("gpt2", 1e-10), ("gpt_neox", 1e-10), ("native-ln", 1e-10), ("llama", 1e-5), ("mixtral", 1e-5)],
)
@pytest.mark.parametrize("wiring", [SERIAL["repeat"], GROUPS["nested"]])
def test_gradients_flow_into_the_shared_weights(load, name, tolerance, wiring):
    model = load(name, dtype=torch.float64)
    taped = tape.together(model, wiring)
    twin, hugging_face = (plain(model), plain(taped)) if plain(model) else (model, taped)
    twin.zero_grad()
    surgery.Stack(model).run(TOKENS, wiring, grad=True).square().mean().backward()
    expected = {key: p.grad.clone() for key, p in twin.named_parameters() if p.grad is not None}
    twin.zero_grad()
    output = hugging_face(TOKENS)
    getattr(output, "logits", output).square().mean().backward()
    assert len(expected) > 10
    for key, parameter in twin.named_parameters():
        if key in expected:
            assert (parameter.grad - expected[key]).abs().max() <= tolerance * expected[key].abs().max(), key


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "llama"])
def test_training_a_pass_through_the_bridge_trains_its_layer(load, name):
    model = load(name)
    taped = tape.together(model, SERIAL["repeat"])
    assert taped.blocks[1].attn.q.weight is taped.blocks[3].attn.q.weight
    taped(TOKENS).square().mean().backward()
    with torch.no_grad():
        taped.blocks[1].attn.q.weight.sub_(taped.blocks[1].attn.q.weight.grad * 10)
        taped.blocks[1].mlp.out.weight.sub_(taped.blocks[1].mlp.out.weight.grad * 10)
    assert taped.blocks[3].attn.q.weight.grad is not None
    assert difference(taped(TOKENS).detach(), surgery.Stack(model).run(TOKENS, SERIAL["repeat"])) < 1e-5
    assert difference(surgery.Stack(taped).run(TOKENS), taped(TOKENS).detach()) < 1e-5


# --- where models come from, and taping again ------------------------------------------------------------------------


def test_a_bridge_from_elsewhere_is_taped_too(model_folder):
    from transformer_lens import TransformerBridge

    for name in ("gpt2", "llama"):
        model = TransformerBridge.boot_transformers(str(model_folder(name)), device="cpu")
        taped = tape.together(model, SERIAL["repeat"])
        assert difference(taped(TOKENS).detach(), surgery.Stack(model).run(TOKENS, SERIAL["repeat"])) < 1e-5
        prompt = TOKENS[:, :5]
        assert torch.equal(bridge_generates(taped, prompt, True), bridge_generates(taped, prompt, False))
        assert storages(taped) <= storages(model)


@pytest.mark.parametrize("name", ["llama", "native-gated"])
def test_taping_again_composes(load, name):
    model = load(name)
    stack = surgery.Stack(model)
    once = tape.together(model, ":2 1:")  # 0 1 1 2 3
    twice = tape.together(once, "::-1")
    assert tape.wiring_of(once) == Wiring.parse(":2 1:", 4)
    assert tape.wiring_of(twice) == Wiring.parse("3 2 1 1 0", 4)
    assert tape.base_of(twice) is model
    assert difference(twice(TOKENS).detach(), stack.run(TOKENS, "3 2 1 1 0")) < 1e-5
    assert difference(twice(TOKENS).detach(), surgery.Stack(once).run(TOKENS, "::-1")) < 1e-5
    grouped = tape.together(once, ":2 {2|3} 0.5*(1 4)")
    assert tape.wiring_of(grouped) == Wiring.parse(":2 {1|2} 0.5*(1 3)", 4)
    again = tape.together(grouped, "0 2:4 2:4 4:6")  # 0 1 | {2 3} | 0.5*(4 5)
    assert tape.wiring_of(again) == Wiring.parse("0 {1|2} {1|2} 0.5*(1 3)", 4)
    assert difference(again(TOKENS).detach(), stack.run(TOKENS, tape.wiring_of(again))) < 1e-5
    with pytest.raises(ValueError, match=r"layers 2 to 3 of the taped model are one group, \{\*1:3\}"):
        tape.together(grouped, ":3 4:")


@hypothesis.given(st.data())
def test_composition_means_running_the_wiring_of_the_wiring(data):
    row = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    taped = Wiring.parse(" ".join(map(str, row)), 6)
    chain = data.draw(random_wirings.chains(len(row), shortest=1))
    try:
        wiring = Wiring(len(row), chain)
    except ValueError:
        hypothesis.reject()

    def renamed(steps):
        return tuple(
            type(step)(row[step.index], step.part)
            if hasattr(step, "index")
            else type(step)(step.factor, renamed(step.body))
            if hasattr(step, "factor")
            else type(step)(tuple(map(renamed, step.branches)), step.mean)
            for step in steps
        )

    assert random_wirings.meaning(compose(taped, wiring).steps) == random_wirings.meaning(renamed(wiring.steps))


def test_bad_input(load):
    model = load("llama")
    with pytest.raises(ValueError, match="there is no layer 5"):
        tape.together(model, ":5")
    with pytest.raises(ValueError, match="is for 5 layers"):
        tape.together(model, Wiring.of(5))
    taped = tape.together(model, ":3 1:")
    with pytest.raises(ValueError, match="is for 4 layers"):
        tape.together(taped, Wiring.of(4))
    for question in (tape.wiring_of, tape.base_of, lambda model: tape.save(model, "nowhere")):
        with pytest.raises(ValueError, match="this model is not taped"):
            question(model)
    with pytest.raises(ValueError, match="have only attn"):
        tape.together(load("native-attention-only"), "0.mlp 1:")
    halved = tape.together(model, "0.attn 1:")
    with pytest.raises(ValueError, match=r"runs only 0\.attn"):
        tape.together(halved, "0.mlp 1:")
    taped.blocks[1].mlp.out.original_component.weight = torch.nn.Parameter(torch.zeros(32, 64))
    with pytest.raises(ModelError, match="changed since it was taped"):
        tape.together(taped, ":")


# --- configurations --------------------------------------------------------------------------------------------------


def test_lists_with_an_entry_for_every_layer_follow():
    config = transformers.SmolLM3Config(
        num_hidden_layers=3, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5, eos_token_id=[5, 6, 7]
    )
    configs.rewrite(config, [0, 1, 1, 2, 0], 3)
    assert config.num_hidden_layers == 5
    assert config.no_rope_layers == [1, 0, 0, 1, 1]
    assert config.layer_types == ["full_attention", *["sliding_attention"] * 2, *["full_attention"] * 2]
    assert config.eos_token_id == [5, 6, 7]
    config = transformers.GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]])
    configs.rewrite(config, [0, 1, 1, 2], 4)
    again = transformers.GPTNeoConfig(**config.to_dict())
    assert again.attention_layers == ["global", "local", "local", "global"]
    config = transformers.DeepseekV3Config(num_hidden_layers=4, first_k_dense_replace=2)
    configs.rewrite(config, [0, 1, 1, 2], 4)
    assert config.first_k_dense_replace == 3
    config = transformers.Qwen3MoeConfig(num_hidden_layers=4, mlp_only_layers=[0, 1, 2, 3])
    configs.rewrite(config, [3, 3], 4)
    assert config.mlp_only_layers == [0, 1]


_UNUSUAL = {
    "smollm3": lambda: transformers.SmolLM3Config(
        **fixtures._rope, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=5
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **fixtures._rope, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **fixtures._rope,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=2,
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **fixtures._rope,
        head_dim=8,
        num_local_experts=2,
        intermediate_size_mlp=64,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0, 1, 0],
        attention_chunk_size=4,
    ),
}


@pytest.mark.parametrize("name", _UNUSUAL)
def test_layers_that_differ_keep_their_kind(monkeypatch, tmp_path, name):
    monkeypatch.setitem(fixtures.CONFIGS, name, _UNUSUAL[name])
    model = surgery.load(fixtures.hugging_face(name))
    for i, wiring in enumerate(["1 0 0 3 2", "0 0 2 2"]):
        taped = tape.together(model, wiring)
        expected = surgery.Stack(model).run(TOKENS, wiring)
        assert difference(taped(TOKENS).detach(), expected) < 1e-5
        saved = AutoModelForCausalLM.from_pretrained(tape.save(taped, tmp_path / str(i)))
        assert difference(saved(TOKENS).logits.detach(), expected) < 1e-5


def test_layers_that_know_their_place_are_refused(monkeypatch, tmp_path):
    config = lambda: transformers.GPT2Config(**fixtures._gpt2, scale_attn_by_inverse_layer_idx=True)  # noqa: E731
    monkeypatch.setitem(fixtures.CONFIGS, "gpt2", config)
    model = surgery.load(fixtures.hugging_face("gpt2"))
    with pytest.raises(ModelError, match="differs from running the wiring layer by layer"):
        tape.together(model, ":3 1:")
    config = lambda: transformers.DeepseekV3Config(  # noqa: E731
        **{**fixtures._rope, "num_key_value_heads": 4},
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        num_experts_per_tok=2,
        first_k_dense_replace=2,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        moe_intermediate_size=16,
        n_shared_experts=1,
    )
    monkeypatch.setitem(fixtures.CONFIGS, "deepseek_v3", config)
    model = surgery.load(fixtures.hugging_face("deepseek_v3"))
    taped = tape.together(model, ":2 1:")
    saved = AutoModelForCausalLM.from_pretrained(tape.save(taped, tmp_path / "dense first"))
    assert difference(saved(TOKENS).logits.detach(), surgery.Stack(model).run(TOKENS, ":2 1:")) < 1e-5
    taped = tape.together(model, ":3 1:")  # a dense layer after a mixture of experts: it runs, no checkpoint can say it
    with pytest.raises(ModelError, match=r"a plain checkpoint cannot express this order of layers.*the checkpoint: "):
        tape.save(taped, tmp_path / "dense later")
    assert [path.name for path in tmp_path.iterdir()] == ["dense first"]
