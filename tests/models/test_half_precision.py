"""Layers in bfloat16 beside a model: near it, apart from it, and told from it in files."""

import pytest
import torch

import surgery
from support import fixtures
from surgery import Stack
from surgery.models.half_precision import HalfLayers, layers_of
from surgery.models.tokens import Tokens

EVERY = (*fixtures.ARCHITECTURES, *fixtures.NATIVE)


@pytest.mark.parametrize("name", EVERY)
def test_streams_are_near_those_in_float32_and_the_model_is_untouched(load, name):
    stack = Stack(load(name))
    before = stack.sha256
    context = stack.context(Tokens.of(torch.randint(4, fixtures.N_VOCAB, (3, 9))))
    half = HalfLayers(stack)
    wirings = [":", ":3 1:", ":1 {1:3|2} 0.5*(2:4)", *([] if "attention-only" in name else [":2 2.mlp 2.attn 3:"])]
    for wiring in wirings:
        exact, x = stack.execute(wiring, context.x0, context), half.execute(wiring, context.x0, context)
        assert x.dtype == torch.float32
        difference = float((x - exact).norm() / (exact - context.x0).norm())
        assert 1e-5 < difference < 0.05, (wiring, difference)
    assert stack.sha256 == before
    weights = [p for layer in stack.fastest_engine.layers for p in layer.parameters()]
    assert half.nbytes == sum(p.nbytes / (2 if p.ndim > 1 else 1) for p in weights)
    assert {p.dtype for p in weights} == {torch.float32}


def test_it_is_the_model_at_that_moment_in_evaluation_mode_without_a_graph(load):
    stack = Stack(load("gpt2"))
    context = stack.context(Tokens.of(torch.randint(4, fixtures.N_VOCAB, (3, 9))))
    stack.model.train()
    half = HalfLayers(stack)
    with torch.enable_grad():
        x = half.execute(":", context.x0, context)
    assert not x.requires_grad
    assert torch.equal(x, half.execute(":", context.x0, context))  # no dropout
    assert stack.model.training
    with torch.no_grad():
        next(stack.fastest_engine.layers[1].parameters()).mul_(1.5)
    assert torch.equal(x, half.execute(":", context.x0, context))
    assert not torch.equal(x, HalfLayers(stack).execute(":", context.x0, context))


def test_hooks_other_types_and_other_precisions_are_refused(load, model_folder):
    stack = Stack(load("gpt2"))
    with pytest.raises(ValueError, match="no precision 'int8'; there are float32, bf16"):
        layers_of(stack, "int8")
    assert layers_of(stack, "float32") is stack
    with stack.model.hooks([("blocks.1.hook_out", lambda x, hook: x)]), pytest.raises(ValueError, match="hooks are"):
        HalfLayers(stack)
    double = Stack(surgery.load(model_folder("gpt2"), dtype=torch.float64))
    with pytest.raises(ValueError, match="was loaded in float64"):
        HalfLayers(double)
