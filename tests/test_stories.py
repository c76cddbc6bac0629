"""Real input, trained and measured elsewhere: a small Llama on TinyStories, with losses computed without this package.

Skips, saying so, where the files are absent.
"""

import json
from collections.abc import Callable
from functools import partial

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


def loss(run: Callable[[Tokens], torch.Tensor], tokens: Tokens) -> float:
    """Nats per predicted token, pooled over all real ones; ``run`` gives the logits of a batch."""
    total, count = 0.0, 0
    for batch in tokens.batches(10):
        each = cross_entropy(run(batch)[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
        kept = each.detach().double()[batch.mask[:, 1:]]
        total, count = total + float(kept.sum()), count + len(kept)
    return total / count


def test_base_loss(material):
    stack, tokens, expected = material
    assert expected["n_layers"] == stack.n_layers
    assert loss(stack.run, tokens) == pytest.approx(expected["base"], abs=TOLERANCE)


@pytest.mark.parametrize("layer", range(5))
def test_skips_through_stack_and_hooks(material, layer):
    stack, tokens, expected = material
    wanted = pytest.approx(expected["skip"][str(layer)], abs=TOLERANCE)
    assert loss(partial(stack.run, wiring=Wiring.of(5).skip(layer)), tokens) == wanted

    def hooked(batch: Tokens) -> torch.Tensor:
        return stack.model.run_with_hooks(batch.ids, return_type="logits", fwd_hooks=hooks.skip(stack.model, layer))

    assert loss(hooked, tokens) == wanted


def test_every_two_layers_repeated(material):
    stack, tokens, expected = material
    for span, value in expected["repeat_block_i_j"].items():
        start, stop = map(int, span.split(","))
        if stop - start != 2:  # the scan holds itself against all of these numbers
            continue
        found = loss(partial(stack.run, wiring=Wiring.from_rys((start, stop), 5)), tokens)
        assert found == pytest.approx(value, abs=TOLERANCE), span


def test_every_adjacent_swap(material):
    stack, tokens, expected = material
    for layer, value in expected["swap"].items():
        found = loss(partial(stack.run, wiring=Wiring.of(5).swap(int(layer), int(layer) + 1)), tokens)
        assert found == pytest.approx(value, abs=TOLERANCE), layer
