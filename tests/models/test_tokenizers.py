"""The tokenizer stays the user's, and padding and ids mean what they say."""

import jaxtyping
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import surgery
from support import fixtures
from surgery import Stack
from surgery.corpus.probes import Probe, ProbeSet
from surgery.models.loading import plain
from surgery.models.tokens import Tokens
from surgery.models.twin import tokenizer as tokenizer_of
from surgery.rebuild import tape

TEXTS = ["w1 w2 w3 w4", "w9 w4"]


def given(bos: bool = True, **changes) -> PreTrainedTokenizerFast:
    """The matrix' tokenizer with or without a beginning mark in front, and with other settings."""
    tokenizer = fixtures.tokenizer()
    if not bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("where", ["in memory", "in a folder"])
def test_there_is_a_beginning_mark_where_the_tokenizer_puts_one_and_nowhere_else(bos, where, tmp_path):
    tokenizer, model = given(bos), fixtures.hugging_face("llama")
    ids = tokenizer(TEXTS)["input_ids"]
    assert ids[1] == [1, 13, 8][not bos :]
    if where == "in memory":
        bridge = surgery.load(model, tokenizer=tokenizer)
        assert bridge.tokenizer is tokenizer
    else:
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        bridge = surgery.load(tmp_path)
    stack = Stack(bridge)
    assert [row[mask].tolist() for row, mask in zip(*vars(stack.tokens(TEXTS)).values())] == ids
    assert bridge.to_tokens(TEXTS[0])[0].tolist() == ids[0]
    encoded = ProbeSet("one", (Probe("w1 w2", "w3 w4"),)).encode(stack)
    assert encoded.tokens.ids[0].tolist() == ids[0]
    with torch.no_grad():
        expected = plain(bridge)(torch.tensor(ids[:1])).logits
    assert close(stack.run(TEXTS[0]), expected)
    assert close(bridge(TEXTS[0], return_type="logits"), expected)


def test_a_model_without_a_beginning_mark_gets_no_end_mark_in_front():
    tokenizer = given(bos=False, bos_token=None, pad_token=None)
    before = str(tokenizer)
    bridge = surgery.load(fixtures.hugging_face("llama"), tokenizer=tokenizer)
    assert bridge.to_tokens("w1 w2").tolist() == [[5, 6]]
    assert Stack(bridge).tokens(["w1 w2"]).ids.tolist() == [[5, 6]]
    assert str(tokenizer) == before
    assert tokenizer_of(bridge) is tokenizer
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        Stack(bridge).tokens(["w1 w2"], prepend_bos=True)


def test_added_tokens_and_another_padding_are_kept_also_when_saved(tmp_path):
    model, tokenizer = fixtures.hugging_face("llama"), given()
    tokenizer.add_tokens(["<think>"])
    tokenizer.pad_token = "<eos>"
    model.resize_token_embeddings(len(tokenizer))
    bridge = surgery.load(model, tokenizer=tokenizer)
    assert Stack(bridge).tokens(["w1 <think> w2"]).ids.tolist() == [[1, 5, 96, 6]]
    saved = AutoTokenizer.from_pretrained(tape.save(tape.together(bridge, ":3 1:"), tmp_path / "taped"))
    assert saved("w1 <think> w2")["input_ids"] == [1, 5, 96, 6]
    assert (saved.pad_token, len(saved)) == ("<eos>", 97)


def test_a_text_that_brings_its_beginning_mark_has_one():
    stack = Stack(surgery.load(fixtures.hugging_face("llama"), tokenizer=given()))
    assert stack.tokens(["<bos> w1 w2"]).ids.tolist() == [[1, 5, 6]]
    assert ProbeSet("one", (Probe("<bos> w1", "w2"),)).encode(stack).tokens.ids.tolist() == [[1, 5, 6]]


@pytest.mark.parametrize("padding", ["<pad>", "<bos>", "<eos>", "[PAD]", None])
def test_padding_is_never_read(padding):
    tokenizer = given()
    if padding == "[PAD]":  # beyond the embedding
        tokenizer.add_special_tokens({"pad_token": padding})
    tokenizer.pad_token = padding
    stack = Stack(surgery.load(fixtures.hugging_face("gpt2"), tokenizer=tokenizer))
    for side in ("left", "right"):
        tokens = stack.tokens(TEXTS, padding_side=side)
        assert tokens.mask.sum(1).tolist() == [5, 3]
        assert close(stack.run(tokens)[1][tokens.mask[1]], stack.run([TEXTS[1]])[0])


def test_what_a_tokenizer_returns_is_a_batch():
    tokenizer = given(padding_side="left")
    stack = Stack(surgery.load(fixtures.hugging_face("qwen2"), tokenizer=tokenizer))
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert batch["attention_mask"].dtype == torch.int64
    expected = stack.run(stack.tokens(TEXTS, padding_side="left"))
    assert close(stack.run(batch), expected)
    assert close(stack.run(Tokens(batch["input_ids"], batch["attention_mask"])), expected)
    chosen = stack.run(batch, positions=batch["attention_mask"])
    assert chosen.shape == (8, fixtures.N_VOCAB)
    masked = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert close(stack.run(Tokens(masked, batch["attention_mask"])), expected)
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="mask"):
        Tokens(batch["input_ids"], batch["attention_mask"][:, 1:])


def test_words_that_look_like_padding_are_words_and_unknown_ones_are_named(opened):
    stack = opened("llama")
    assert stack.tokens(["w1 <pad> w2"]).mask.all()
    assert stack.tokens(["w1 <unk> w2"]).ids.tolist() == [[1, 5, 3, 6]]  # written so by the user
    with pytest.raises(ValueError, match=r"prompt 2 \('w3 elephant'\) contains words that .* does not know"):
        stack.tokens(["w1 w2", "w3 elephant"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[4, -100, 5]]), "prompt 1 has id -100 at position 1, ids of this model are 0 to 95"),
        (torch.tensor([[4, 5], [4, 96]]), "prompt 2 has id 96 at position 1"),
        (torch.zeros(2, 0, dtype=torch.long), r"nothing to run: the batch has shape \[2, 0\]"),
        (torch.zeros(0, 3, dtype=torch.long), r"nothing to run: the batch has shape \[0, 3\]"),
        (torch.ones(1, 65, dtype=torch.long), "prompts of 65 tokens: .* has 64 positions"),
        ([], "tokens must be integer ids"),
        ([""], "has 1 token; a prompt needs at least 2"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(opened, tokens, message):
    with pytest.raises(ValueError, match=message):
        opened("gpt2").run(tokens)


def test_ids_that_the_tokenizer_knows_and_the_model_does_not_are_named():
    tokenizer = given()
    tokenizer.add_tokens(["<think>"])
    stack = Stack(surgery.load(fixtures.hugging_face("llama"), tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"prompt 1 .* has token id 96, the model has 96 embeddings"):
        stack.tokens(["w1 <think>"])
    with pytest.raises(ValueError, match=r"probe 1 .* has token id 96"):
        ProbeSet("one", (Probe("w1", "<think>"),)).encode(stack)


def test_a_stack_opens_what_load_takes(model_folder):
    folder = model_folder("llama")
    tokens = torch.arange(4, 12)[None]
    expected = Stack(surgery.load(folder)).run(tokens)
    for model in (folder, str(folder), plain(surgery.load(folder))):
        assert torch.equal(Stack(model).run(tokens), expected)
    assert torch.equal(Stack(folder).run([4, 5, 6]), Stack(folder).run(torch.tensor([[4, 5, 6]])))
