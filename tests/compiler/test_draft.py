"""A draft changes nothing but the time: the text is the original's, whatever the draft writes."""

import pytest
import torch

from support import fixtures
from surgery.compiler import draft
from surgery.models.loading import plain
from surgery.rebuild import fuse, tape

PROMPT = torch.tensor([[1, 17, 40, 23, 9, 61]])
PAIR = ":1 {1.attn | 2.attn} {1.mlp | 2.mlp} 3:"


def greedy(model, count):
    return model.generate(PROMPT, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("block", [1, 4, 7])
def test_the_text_is_the_original_s_whoever_drafts(opened, name, block):
    model = opened(name).model
    original, other = plain(model), fixtures.hugging_face(name, seed=7)
    expected = greedy(original, 20)
    drafts = [original, other, plain(tape.together(model, ":2"))]
    if name != "gpt2":
        drafts.append(plain(fuse.together(model, PAIR)))
    for one in drafts:
        made = draft.generate(original, one, PROMPT, 20, block=block)
        assert torch.equal(made.ids, expected)
        assert 0 <= made.acceptance <= 1


def test_the_original_as_its_own_draft_is_kept_whole(opened):
    original = plain(opened("llama").model)
    made = draft.generate(original, original, PROMPT, 21, block=4)
    assert made.kept == (4, 4, 4, 4)
    assert (made.acceptance, made.per_step) == (1, 5)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_texts(opened, count):
    original = plain(opened("llama").model)
    made = draft.generate(original, original, PROMPT, count)
    assert made.ids.shape[1] == PROMPT.shape[1] + count
    assert torch.equal(made.ids, greedy(original, count) if count else PROMPT)


def test_agreement_is_counted_and_predicts_what_a_step_keeps(opened):
    stack = opened("llama")
    tokens = stack.tokens([" ".join(f"w{(i * j) % 80}" for j in range(1, 20)) for i in range(1, 9)])
    assert draft.agreement(stack, ":", tokens) == 1
    shared = draft.agreement(stack, PAIR, tokens)
    same = (stack.run(tokens).argmax(-1) == stack.run(tokens, PAIR).argmax(-1))[tokens.mask]
    assert shared == pytest.approx(float(same.double().mean()))
    per_step, speed = draft.expected(0.5, 2, 0.25)
    assert per_step == pytest.approx(1 + 0.5 + 0.25)
    assert speed == pytest.approx(1.75 / 1.5)
    assert draft.expected(1.0, 3, 0.5) == (4, pytest.approx(1.6))


def test_what_cannot_be_drafted_is_told(opened):
    original = plain(opened("llama").model)
    with pytest.raises(ValueError, match="one prompt at a time"):
        draft.generate(original, original, PROMPT.repeat(2, 1))
    config = fixtures.CONFIGS["llama"]()
    config.vocab_size = 50
    with pytest.raises(ValueError, match="vocabularies of 96 and 50"):
        draft.generate(original, type(original)(config), PROMPT)
