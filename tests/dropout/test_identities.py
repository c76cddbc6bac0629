import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, LlamaConfig

import surgery
from support import fixtures
from support.exact_networks import rng
from surgery import dropout, hooks
from surgery.dropout import identities
from surgery.models.loading import plain

RATES = (0.0, 0.1, 0.5, 0.9)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def close(found, expected, tolerance=1e-12):
    return bool((found - expected).abs().max() <= tolerance * max(1, float(expected.abs().max())))


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("n", [1, 5, 12])
def test_all_masks_are_there_once_and_their_probabilities_are_those_of_independent_units(n, p):
    kept, share = dropout.masks(n, p)
    assert len({tuple(row) for row in kept.tolist()}) == len(kept) == 2**n
    assert share.sum().item() == pytest.approx(1, abs=1e-12)
    assert close(share @ kept.double(), torch.full((n,), 1 - p, dtype=torch.float64))
    pairs = torch.einsum("m,mi,mj->ij", share, kept.double(), kept.double())
    assert close(pairs, (1 - p) ** 2 + p * (1 - p) * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("n", [1, 4, 12])
def test_inverted_dropout_keeps_the_expectation_and_has_the_variance_of_the_formula(n, p):
    weights, x = drawn(3, n), drawn(n, seed=1)
    kept, share = dropout.masks(n, p)
    outputs = (kept * x / (1 - p)) @ weights.T
    mean = share @ outputs
    assert close(mean, weights @ x)
    assert close(share @ (outputs - mean).square(), dropout.output_variance(weights, x, p), 1e-11)


def test_sampled_masks_agree_with_the_formulas():
    weights, x, p, count = drawn(40), drawn(40, seed=1), 0.3, 20_000
    y = (torch.rand(count, 40, generator=rng(2)) >= p) * x / (1 - p) @ weights
    variance = dropout.output_variance(weights, x, p)
    assert abs(y.mean() - weights @ x) < 4 * (variance / count).sqrt()
    assert y.var().item() == pytest.approx(float(variance), rel=0.05)


@pytest.mark.parametrize("p", RATES)
def test_variance_in_training_is_that_over_data_and_masks(p):
    data = 1.5 + drawn(1000)
    kept, share = torch.tensor([0.0, 1.0]), torch.tensor([p, 1 - p], dtype=torch.float64)
    values = data[:, None] * kept / (1 - p)
    brute = (values.square() @ share).mean() - (values @ share).mean() ** 2
    found = dropout.training_variance(data.mean(), data.var(correction=0), p)
    assert close(found, brute)
    assert found >= data.var(correction=0)
    assert (found == data.var(correction=0)) == (p == 0)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5])
def test_a_chain_of_layers_against_every_mask_of_every_layer(p):
    data, maps = 0.5 + drawn(50, 3), [drawn(3, 3, seed=seed) for seed in (1, 2)]
    kept, share = dropout.masks(3, p)
    first = (data[:, None] * kept / (1 - p)) @ maps[0].T  # data, mask, unit
    second = (first[:, :, None] * kept / (1 - p)) @ maps[1].T  # data, mask, mask, unit
    frame = dropout.chain(maps, data.mean(0), data.T.cov(correction=0), p)
    for row, values, weight in (
        (frame.iloc[0], first, share),
        (frame.iloc[1], second, share[:, None] * share),
    ):
        weight = (weight / len(data)).expand(values.shape[:-1])[..., None]
        over = tuple(range(values.ndim - 1))
        mean = (weight * values).sum(over)
        assert row["training"] == pytest.approx(float((weight * (values - mean).square()).sum(over).mean()), rel=1e-10)
    assert frame["testing"].tolist() == pytest.approx(
        [float(y.var(0, correction=0).mean()) for y in (data @ maps[0].T, data @ maps[0].T @ maps[1].T)], rel=1e-10
    )
    assert (frame["shift"].to_numpy() >= 1 - 1e-12).all()
    assert list(frame) == list(dropout.CHAIN)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("n", [1, 6, 12])
def test_the_geometric_mean_over_all_masks_is_the_scaled_layer_and_the_arithmetic_is_not(n, p):
    weights, x, bias = 2 * drawn(5, n), drawn(n, seed=1), drawn(5, seed=2)
    scaled = (weights @ x + bias).softmax(0)
    assert close(dropout.geometric_mean(weights, x, p, bias), scaled)
    assert close(dropout.geometric_mean(weights, x, p), (weights @ x).softmax(0))
    gap = float((dropout.arithmetic_mean(weights, x, p, bias) - scaled).abs().max())
    assert gap < 1e-12 if p == 0 else gap > 0.01


@pytest.mark.parametrize(
    "call",
    [
        lambda: dropout.masks(3, 1.0),
        lambda: dropout.masks(3, -0.1),
        lambda: dropout.output_variance(drawn(2), drawn(2), 1.0),
        lambda: dropout.training_variance(drawn(2), drawn(2), 2.0),
        lambda: dropout.geometric_mean(drawn(2, 2), drawn(2), float("nan")),
    ],
)
def test_a_rate_that_is_none(call):
    with pytest.raises(ValueError, match="from 0 to below 1; got p="):
        call()


@pytest.mark.parametrize("n", [0, 17])
def test_too_many_masks(n):
    with pytest.raises(ValueError, match=f"for 1 to 16 units, not for {n}"):
        dropout.masks(n)


# --- what is still on --------------------------------------------------------------------------------------------

GPT2 = ("attn_pdrop", "resid_pdrop", "embd_pdrop")


def gpt2(n_layer=2, **rates):
    config = GPT2Config(**fixtures._gpt2 | {"n_layer": n_layer} | dict.fromkeys(GPT2, 0.0) | rates)
    return AutoModelForCausalLM.from_config(config).eval()


def llama(rate, n_layers=2):
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**fixtures._rope | {"num_hidden_layers": n_layers}, attention_dropout=rate)
    )


@pytest.mark.parametrize(
    ("rate", "named"),
    [
        ("embd_pdrop", ["transformer.drop"]),
        (
            "attn_pdrop",
            [
                "transformer.h.0.attn",
                "transformer.h.0.attn.attn_dropout",
                "transformer.h.1.attn",
                "transformer.h.1.attn.attn_dropout",
            ],
        ),
        (
            "resid_pdrop",
            [
                "transformer.h.0.attn.resid_dropout",
                "transformer.h.0.mlp.dropout",
                "transformer.h.1.attn.resid_dropout",
                "transformer.h.1.mlp.dropout",
            ],
        ),
    ],
)
def test_each_rate_of_a_gpt2_is_found_where_it_acts(rate, named):
    model = gpt2(**{rate: 0.3})
    assert dropout.live(model) == []
    assert dropout.live(model.train()) == named
    assert dropout.live(model.eval()) == []
    assert dropout.live(gpt2().train()) == []  # training mode alone is not random


def test_one_module_left_in_training_mode_is_found():
    model = gpt2(resid_pdrop=0.1)
    model.transformer.h[1].mlp.dropout.train()
    assert dropout.live(model) == ["transformer.h.1.mlp.dropout"]


def test_functional_dropout_of_attention_is_found_by_its_rate_and_by_running():
    model = llama(0.2)
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert dropout.live(model.train()) == names == list(identities._structure(model)) == identities._running(model, 96)
    assert dropout.live(llama(0.0).train()) == dropout.live(model.eval()) == []


def test_a_rate_that_only_the_config_has_is_found_by_running():
    config = FalconConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.3,
        new_decoder_architecture=False,
        parallel_attn=True,
        bias=True,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    assert set(identities._running(model, 96)) <= set(dropout.live(model))
    assert {"transformer.h.0", "transformer.h.1"} <= set(identities._running(model, 96))


def test_a_rate_too_small_to_be_drawn_is_found_by_structure():
    model = gpt2(embd_pdrop=1e-9).train()
    assert identities._running(model, 96) == []
    assert dropout.live(model) == ["transformer.drop"]


@pytest.mark.parametrize("made", [lambda: gpt2(1, resid_pdrop=0.2), lambda: llama(0.2, 1)], ids=["gpt2", "llama"])
def test_a_bridge_and_its_twin_are_told_apart(made):
    model = surgery.load(made().eval())
    dropout.require_off(model)
    model.train()
    inside = dropout.live(model)
    assert inside
    assert not any(name.startswith("twin: ") or "_original_component" in name for name in inside)
    with pytest.raises(ValueError, match=r"still random: .*\. Type model\.eval\(\) first"):
        dropout.require_off(model)
    plain(model).train()
    with pytest.raises(ValueError, match=r"Type model\.eval\(\) and surgery\.models\.plain\(model\)\.eval\(\) first"):
        dropout.require_off(model)
    model.eval()
    assert dropout.live(model)
    assert all(name.startswith("twin: ") for name in dropout.live(model))
    plain(model).eval()
    dropout.require_off(model)


def test_random_hooks_are_found_and_a_subnetwork_is_not_random():
    model = surgery.load(gpt2(1, embd_pdrop=0.2))
    name = "blocks.0.mlp.hook_out"
    with model.hooks(fwd_hooks=hooks.dropout(model, name, 0.2)):
        assert dropout.live(model) == [name]
        with pytest.raises(ValueError, match=r"still random: blocks.0.mlp.hook_out. Type model.reset_hooks\(\) first"):
            dropout.require_off(model)
    with model.hooks(fwd_hooks=hooks.dropout(model, name, 0.2, shared=True)):
        dropout.require_off(model)


@pytest.mark.parametrize("made", [lambda: surgery.load("babel"), fixtures.native], ids=["babel", "native"])
def test_models_that_have_no_dropout_are_as_random_in_training_mode(made):
    model = made().train()
    dropout.require_off(model)


def test_looking_changes_nothing():
    model = gpt2(**dict.fromkeys(GPT2, 0.2)).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    dropout.live(model)
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
