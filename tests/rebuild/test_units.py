"""Which units matter: planted ones are found, dead ones go without loss, at random they do not."""

import pytest
import torch

import surgery
from support.known_wirings import TOKENS, difference
from surgery.models.errors import ModelError
from surgery.models.layer_sizes import Size
from surgery.models.loading import plain
from surgery.models.tokens import Tokens
from surgery.rebuild import layout, units, width

INSIDE = [Size(), Size(40, 2), Size(40, 2), Size()]


def deadened(model, *, neurons=range(40, 64), group=0):
    """Layers 1 and 2 with these neurons and one group of heads silent, by every way in turn."""
    with torch.no_grad():
        for place in (1, 2):
            layer = plain(model).model.layers[place]
            for unit in neurons:
                (layer.mlp.up_proj.weight[unit] if unit % 2 else layer.mlp.down_proj.weight[:, unit]).zero_()
            layer.self_attn.o_proj.weight[:, 16 * group : 16 * group + 16] = 0
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_dead_units_go_without_loss_and_at_random_they_do_not(load, name):
    model = deadened(load(name))
    expected = model(TOKENS).detach()
    thin = width.narrow(model, 1, 3, TOKENS, d_mlp=40, n_heads=2)
    assert layout.sizes(thin) == INSIDE
    assert difference(thin(TOKENS), expected) < 1e-5
    assert difference(surgery.Stack(thin).run(TOKENS), expected) < 1e-5
    by_chance = width.narrow(model, 1, 3, d_mlp=40, n_heads=2, by="random", seed=3)
    assert layout.sizes(by_chance) == INSIDE
    assert difference(by_chance(TOKENS), expected) > 1e-2


@pytest.mark.parametrize(("name", "d_mlp", "heads"), [("gpt2", 128, 4), ("phi3", 64, 4), ("llama", 64, 4)])
def test_all_units_are_the_model_again(opened, name, d_mlp, heads):
    model = opened(name).model
    again = width.narrow(model, 1, 3, TOKENS, d_mlp=d_mlp, n_heads=heads)
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("name", "d_mlp", "heads"), [("gpt2", 128, 4), ("gpt_neox", 64, 4), ("phi3", 64, 4), ("llama", 64, 4)]
)
def test_what_widen_added_narrow_finds_and_removes(opened, name, d_mlp, heads):
    model = opened(name).model
    wide = width.widen(model, 1, 3, d_mlp=d_mlp + 20, n_heads=heads and heads + 4)
    thin = width.narrow(wide, 1, 3, TOKENS, d_mlp=d_mlp, n_heads=heads)
    weights = dict(layout.source_of(model).named_parameters())
    for key, weight in layout.source_of(thin).named_parameters():
        assert torch.equal(weight, weights[key])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_lose_neurons_of_their_own(load, name):
    model = load(name)
    old = units.writers(model, "mlp")[1].count
    wide = width.widen(model, 1, 3, d_mlp=old + 8)
    thin = width.narrow(wide, 1, 3, d_mlp=old, by="magnitude")
    assert torch.equal(plain(thin)(TOKENS).logits, plain(model)(TOKENS).logits)
    with torch.no_grad():
        for expert, dead in enumerate(([3, 9, 21, 30], [0, 1, 2, 3], [28, 29, 30, 31], [4, 8, 12, 16])):
            plain(model).model.layers[1].mlp.experts.down_proj[expert, :, dead] = 0
    fewer = width.narrow(model, 1, 2, d_mlp=old - 4, by="magnitude")
    assert difference(plain(fewer)(TOKENS).logits, plain(model)(TOKENS).logits) < 1e-5
    heard = width.narrow(model, 1, 2, TOKENS, d_mlp=old - 4)
    assert torch.equal(plain(heard)(TOKENS).logits, plain(fewer)(TOKENS).logits)
    with pytest.raises(ModelError, match=r"cannot have layers with d_mlp .* multiple of 16 bytes"):
        width.narrow(model, 1, 3, d_mlp=old - 1, by="magnitude")


@pytest.mark.parametrize("by", ["activation", "magnitude"])
def test_planted_units_rank_first(load, by):
    model = load("llama")
    with torch.no_grad():
        inside = plain(model).model.layers[2]
        inside.mlp.down_proj.weight[:, [5, 50]] *= 100
        inside.self_attn.o_proj.weight[:, 24:32] *= 100  # head 3, of group 1
    neurons = units.importance(model, "mlp", TOKENS, by=by)
    heads = units.importance(model, "attn", TOKENS, by=by)
    assert [tuple(scores.shape) for scores in neurons + heads] == [(64,)] * 4 + [(2,)] * 4
    assert set(neurons[2].topk(2).indices.tolist()) == {5, 50}
    assert heads[2].argmax() == 1
    assert neurons[2][5] > 10 * neurons[2].median() > 0


def test_importance_is_what_is_written(opened):
    model = opened("gpt2").model  # whose weights lie transposed
    _, cache = model.run_with_cache(TOKENS)
    act = cache["blocks.1.mlp.out.hook_in"][:, 1:].abs().sum((0, 1))
    expected = act * plain(model).transformer.h[1].mlp.c_proj.weight.norm(dim=1)
    assert torch.allclose(units.importance(model, "mlp", TOKENS)[1].float(), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_importance_of_experts_is_what_each_writes_of_the_tokens_routed_to_it(load, name):
    model = load(name)
    block = plain(model).model.layers[1].mlp
    experts, heard = block.experts, []
    with torch.no_grad():
        experts.down_proj[2, :, 7] = 0
    with block.register_forward_pre_hook(lambda _, args: heard.append(args[0])), torch.no_grad():
        plain(model)(TOKENS)
    expected = torch.zeros(4, experts.down_proj.shape[2])
    for x in heard[0][:, 1:].flatten(0, 1):
        share = (block.gate.weight @ x).softmax(0)
        chosen = share.topk(2).indices
        for expert in chosen:
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            act = torch.nn.functional.silu(gate) * up
            written = (experts.down_proj[expert] * act).norm(dim=0)  # of every neuron by itself
            expected[expert] += (written * share[expert] / _norm(model, share, chosen)).detach()
    found = units.importance(model, "mlp", TOKENS)
    assert torch.allclose(found[1].float(), expected, rtol=1e-4, atol=1e-6)
    assert found[1][2, 7] == 0
    assert (found[1] == 0).sum() == 1
    padded = units.importance(model, "mlp", Tokens.of(TOKENS).pad(3, "left"), batch_size=1)
    assert all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(padded, found, strict=True))


def _norm(model, share, chosen):
    """What the router divides by: the shares of those chosen, where they are to add up to 1."""
    return share[chosen].sum() if getattr(plain(model).config, "norm_topk_prob", True) else 1.0


def test_experts_of_an_unusual_form_are_told(load):
    model = load("mixtral")
    plain(model).model.layers[1].mlp.experts.has_bias = True
    with pytest.raises(ModelError, match=r"have biases or no gate, .* cannot be recorded: use by='magnitude'"):
        units.importance(model, "mlp", TOKENS)


def test_padding_and_the_first_token_do_not_count(opened):
    model, tokens = opened("llama").model, Tokens.of(TOKENS)
    expected = units.importance(model, "mlp", tokens)
    for side in ("left", "right"):
        padded = units.importance(model, "mlp", tokens.pad(3, side), batch_size=1)
        assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(padded, expected, strict=True))


def test_hooks_are_gone_and_random_goes_by_seed(opened):
    model = opened("llama").model
    units.importance(model, "mlp", TOKENS)
    assert not any(module._forward_pre_hooks for module in plain(model).modules())
    one, again, other = (units.importance(model, "mlp", by="random", seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_saved_and_opened(opened, tmp_path):
    thin = width.narrow(opened("llama").model, 1, 3, TOKENS, d_mlp=40, n_heads=2)
    opened = surgery.load(layout.save(thin, tmp_path / "thin"))
    assert layout.sizes(opened) == INSIDE
    assert torch.equal(plain(opened)(TOKENS).logits, plain(thin)(TOKENS).logits)


def test_bad_questions(opened):
    model = opened("llama").model
    for call, message in (
        (
            lambda: units.importance(model, "heart"),
            "give a part of mlp, attn and by of activation, magnitude, random",
        ),
        (lambda: units.importance(model, "mlp", by="taste"), "and by of activation, magnitude, random"),
        (lambda: units.importance(model, "mlp"), r"needs tokens: give stack\.tokens"),
        (lambda: units.importance(model, "mlp", TOKENS[:, :1]), "no token beyond each prompt's first"),
        (lambda: units.importance(opened("native-attention-only").model, "mlp", TOKENS), "has no mlp"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", ["native-ln", "native-gated"])
def test_units_of_native_models_are_heard(opened, name):
    base = opened(name).model
    found = units.importance(base, "mlp", TOKENS)
    written = {}
    hooks = [(f"blocks.{layer}.mlp.out.hook_in", lambda x, hook: written.update({hook.name: x})) for layer in range(4)]
    base.run_with_hooks(TOKENS, fwd_hooks=hooks)
    for layer, (heard, writer) in enumerate(zip(found, units.writers(base, "mlp"), strict=True)):
        each = written[f"blocks.{layer}.mlp.out.hook_in"][:, 1:].abs().sum((0, 1)).double()
        assert torch.allclose(heard, each * writer.rows.double().flatten(1).norm(dim=1), rtol=1e-4)
