"""Measuring neither depends on modes of the model, of autograd and of torch, nor changes them."""

import contextlib

import pytest
import torch

import surgery
from support import fixtures
from surgery import Stack
from surgery.models.loading import plain

IDS = torch.randint(4, fixtures.N_VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def random_model(name: str):
    """A model of the matrix whose dropout would show."""
    config = fixtures.CONFIGS[name]()
    for key in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.5)
    torch.manual_seed(0)
    return type(fixtures.hugging_face(name))(config).eval()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_training_mode_dropout_and_gradient_checkpointing_stay_out_of_measurements(name):
    model = surgery.load(random_model(name))
    stack = Stack(model)
    expected = stack.run(IDS)
    state, twin = torch.get_rng_state(), plain(model)
    twin.train()
    twin.gradient_checkpointing_enable()
    model.train()
    modes = [module.training for module in (*model.modules(), *twin.modules())]
    assert torch.equal(stack.run(IDS), expected)
    assert torch.equal(stack.stream(IDS), Stack(model).stream(IDS))
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: None)]):
        assert (stack.run(IDS) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert stack.checks()["passed"].all()
    assert [module.training for module in (*model.modules(), *twin.modules())] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.is_gradient_checkpointing


def test_loading_leaves_the_mode_of_the_users_model_alone():
    model = random_model("gpt2").train()
    stack = Stack(surgery.load(model))
    assert model.training
    assert model.transformer.h[0].training
    assert torch.equal(stack.run(IDS), stack.run(IDS))


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.inference_mode(),
        lambda: torch.enable_grad(),
    ],
)
def test_what_surrounds_a_measurement_does_not_change_it(load, surroundings):
    stack = Stack(load("llama"))
    wirings = (":", ":2 1:", "0 {1|2.attn} 3")
    expected = [stack.run(IDS, wiring) for wiring in wirings]
    stream = stack.stream(IDS)
    with surroundings():
        for wiring, logits in zip(wirings, expected):
            assert torch.equal(stack.run(IDS, wiring), logits)
        assert torch.equal(stack.stream(IDS), stream)
        assert Stack(load("llama")).checks()["passed"].all()


def test_the_default_number_format_does_not_matter(load):
    stack = Stack(load("gemma2"))
    expected = stack.run(IDS)
    with contextlib.ExitStack() as restored:
        restored.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        assert torch.equal(stack.run(IDS), expected)
        assert torch.get_default_dtype() == torch.float64
        assert Stack(load("gemma2")).checks()["passed"].all()


def test_a_cache_that_the_configuration_asks_for_is_not_used(load):
    model = load("llama")
    plain(model).config.use_cache = True
    stack = Stack(model)
    assert torch.equal(stack.run(IDS, ":2 1:"), Stack(load("llama")).run(IDS, ":2 1:"))
    assert plain(model).config.use_cache is True
