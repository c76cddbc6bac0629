"""Lengths of logits from a quadratic form: what readouts give, in every architecture whose head is linear."""

import pytest
import torch

from support import fixtures
from surgery import Stack
from surgery.instruments import known_networks, linear_head
from surgery.instruments.readout import frozen_head, logits
from surgery.series import attribution
from surgery.stats.sampling import Sampling

BENDING = ("gemma2",)  # soft-capped logits


@pytest.mark.parametrize("name", [*fixtures.ARCHITECTURES, *fixtures.NATIVE])
def test_the_form_is_the_length_of_the_readouts(name, load):
    stack = Stack(load(name))
    gram = linear_head.head_gram(stack)
    assert (gram is None) == (name in BENDING)
    if gram is None:
        return
    stream = stack.stream(known_networks.tokens(3, 7) % 96)
    clean, other = stream[-1].flatten(0, 1), stream[2].flatten(0, 1)
    with frozen_head(stack, clean):
        apart = (logits(stack, clean) - logits(stack, other)).double()
    expected = (apart - apart.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(linear_head.squares(stack, gram, clean, clean - other), expected, rtol=1e-4, atol=1e-8)


def test_a_head_that_is_replaced_is_not_taken_for_linear():
    stack = Stack(known_networks.random_network())
    module = stack.fastest_engine.module.get_submodule(stack.model.unembed.name)
    hook = module.register_forward_hook(lambda _, __, y: y.tanh())
    try:
        assert linear_head.head_gram(stack) is None
    finally:
        hook.remove()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["llama", "gptj", "native-ln"])
def test_effects_are_the_same_with_and_without_readouts(name, frozen, load, monkeypatch):
    stack, tokens, sampling = Stack(load(name)), known_networks.tokens(6, 8) % 96, Sampling(resamples=10, batch_size=4)
    assert stack.d_vocab > stack.d_model
    quick = attribution.effects(stack, tokens, frozen=frozen, sampling=sampling)
    monkeypatch.setattr(linear_head, "head_gram", lambda stack: None)
    slow = attribution.effects(stack, tokens, frozen=frozen, sampling=sampling)
    for column in ("TE", "DE", "IE", "M", "M_low", "M_high"):
        assert quick[column].tolist() == pytest.approx(slow[column].tolist(), rel=1e-4, abs=1e-6), column
