"""Real input, trained and measured elsewhere: a small Llama on TinyStories, with losses computed without this package.

Skips, saying so, where the files are absent.
"""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

import surgery
from surgery import Stack, Wiring, hooks
from surgery.models.tokens import Tokens

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def material(stories):
    expected = json.loads((stories / "expected.json").read_text())
    lines = (stories.parents[1] / "text" / "tinystories_100.jsonl").read_text().splitlines()
    stack = Stack(surgery.load(stories))
    tokens = stack.tokens([json.loads(line)["text"] for line in lines], max_length=256, prepend_bos=True)
    return stack, tokens, expected


def loss(logits: torch.Tensor, tokens: Tokens) -> float:
    """Nats per predicted token, pooled over all real ones."""
    each = cross_entropy(logits[:, :-1].transpose(1, 2), tokens.ids[:, 1:], reduction="none")
    return float(each.detach().double()[tokens.mask[:, 1:]].mean())


def test_base_loss(material):
    stack, tokens, expected = material
    assert expected["n_layers"] == stack.n_layers
    assert loss(stack.run(tokens), tokens) == pytest.approx(expected["base"], abs=TOLERANCE)


@pytest.mark.parametrize("layer", range(5))
def test_skips_through_stack_and_hooks(material, layer):
    stack, tokens, expected = material
    wanted = pytest.approx(expected["skip"][str(layer)], abs=TOLERANCE)
    assert loss(stack.run(tokens, Wiring.of(5).skip(layer)), tokens) == wanted
    hooked = stack.model.run_with_hooks(tokens.ids, return_type="logits", fwd_hooks=hooks.skip(stack.model, layer))
    assert loss(hooked, tokens) == wanted


def test_every_repeat(material):
    stack, tokens, expected = material
    for span, value in expected["repeat_block_i_j"].items():
        start, stop = map(int, span.split(","))
        found = loss(stack.run(tokens, Wiring.from_rys((start, stop), 5)), tokens)
        assert found == pytest.approx(value, abs=TOLERANCE), span


def test_every_adjacent_swap(material):
    stack, tokens, expected = material
    for layer, value in expected["swap"].items():
        found = loss(stack.run(tokens, Wiring.of(5).swap(int(layer), int(layer) + 1)), tokens)
        assert found == pytest.approx(value, abs=TOLERANCE), layer
