"""Targets by text: their first tokens, and what cannot be told apart by one."""

from types import SimpleNamespace

import pytest
import torch

from surgery.corpus import probes
from surgery.models.targets import Prompt, Targets


def test_targets_are_the_first_tokens_after_the_prompt(opened):
    stack = opened("llama")
    asked = [Prompt("w1 w2", ("w3 w9", "w4")), Prompt("w5", ("w6", "w7", "w8"))]
    targets = Targets.of(stack, asked)
    words = stack.tokens(["w1 w2 w3", "w1 w2 w4", "w5 w6", "w5 w7", "w5 w8"])
    first = words.ids[range(5), words.last].tolist()
    assert targets.ids.tolist() == [[*first[:2], first[0]], first[2:]]
    assert targets.weights.tolist() == [[1, -1, 0], [1, -0.5, -0.5]]
    ids = [row[mask].tolist() for row, mask in zip(targets.tokens.ids, targets.tokens.mask)]
    assert ids == [row[mask].tolist() for text in ("w1 w2", "w5") for row, mask in _rows(stack.tokens(text))]


def _rows(tokens):
    return zip(tokens.ids, tokens.mask)


def test_the_difference_is_the_first_minus_the_mean_of_the_others(opened):
    targets = Targets.of(opened("llama"), [Prompt("w1 w2", ("w3", "w4")), Prompt("w5", ("w6", "w7", "w8"))])
    logits = torch.tensor([[2.0, 5.0, 2.0], [4.0, 1.0, 3.0]])
    difference, first = targets.compare(logits, torch.arange(2))
    assert difference.tolist() == [-3.0, 2.0]
    assert first.tolist() == [False, True]


def test_a_probe_with_choices_makes_a_prompt():
    probe = probes.Probe("w1 w2", "w3", choices=("w4", "w3"))
    assert probes.Prompt(probe.prompt, probe.answers) == Prompt("w1 w2", ("w3", "w4"))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (("w1", ("w2 w3", "w2 w4")), r"prompt 1 \('w1'\): the targets 'w2 w3' and 'w2 w4' begin with the same token"),
        (("w1", ("w2", "zebra")), "target 'zebra': it contains words that this model's tokenizer does not know"),
    ],
)
def test_targets_that_no_single_token_tells_apart_are_refused(opened, prompt, said):
    with pytest.raises(ValueError, match=said):
        Targets.of(opened("llama"), [Prompt(*prompt)])


class Merging:
    """A tokenizer of letters that has one token for ``ab``."""

    bos_token_id = eos_token_id = pad_token_id = bos_token = eos_token = unk_token = None

    def __call__(self, texts, return_attention_mask):
        return {"input_ids": [[ord(letter) for letter in text.replace("ab", "x")] for text in texts]}


def test_a_target_that_shares_a_token_with_the_prompt_is_refused():
    stack = SimpleNamespace(tokenizer=Merging(), d_vocab=256, n_ctx=8, device="cpu", name="letters")
    with pytest.raises(ValueError, match="the target 'b' has no token of its own there"):
        Targets.of(stack, [Prompt("ca", ("c", "b"))], joiner="")
    assert Targets.of(stack, [Prompt("ca", ("c", "d"))], joiner="").ids.tolist() == [[ord("c"), ord("d")]]


@pytest.mark.parametrize(
    ("text", "targets", "said"),
    [
        ("w1", ("w2",), "needs two targets or more, the right one first, not 1"),
        ("w1", ("w2", "w2"), "a target is given twice"),
        ("w1", ("w2", " "), "a target is empty"),
        (" ", ("w2", "w3"), "the text of a prompt is empty"),
        ("w1", "w2", "targets are several texts"),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused(text, targets, said):
    with pytest.raises(ValueError, match=said):
        Prompt(text, targets)
