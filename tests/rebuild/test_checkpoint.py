"""Taped models as plain checkpoints: they open without this package, whole or not at all."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from support import fixtures
from support.known_wirings import GROUPS, SERIAL, SUBLAYERS, TOKENS, difference
from surgery.models.loading import plain
from surgery.rebuild import checkpoint, tape
from surgery.wiring.value import Wiring


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "repeat") for name in fixtures.ARCHITECTURES),
        *((name, "reverse") for name in ("gpt2", "gemma2", "gemma3", "qwen3_moe")),  # with layers of two kinds, and not
    ],
)
def test_a_saved_model_opens_without_this_package(opened, tmp_path, name, kind):
    stack, wiring = opened(name), SERIAL[kind]
    expected = stack.run(TOKENS, wiring)
    folder = tape.save(tape.together(stack.model, wiring), tmp_path / kind)
    with torch.no_grad():
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if name == "gemma2":
            saved.set_attn_implementation("eager")  # torch's fast attention cannot soft-cap
        assert difference(saved(TOKENS).logits, expected) < 1e-5
    again = surgery.Stack(surgery.load(folder))
    assert difference(again.run(TOKENS), expected) < 1e-5
    twin = plain(stack.model)
    tied = twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    assert (saved.get_input_embeddings().weight is saved.get_output_embeddings().weight) is tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w1 w2 w9")["input_ids"] == stack.model.tokenizer("w1 w2 w9")["input_ids"]
    assert Wiring.from_mergekit((folder / "mergekit.yaml").read_text(), 4) == stack.wiring(wiring)
    card = (folder / "README.md").read_text()
    assert f"`{stack.wiring(wiring)}`" in card
    assert stack.name in card
    assert stack.sha256 in card
    assert again.sha256 in card
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_the_command_on_the_card_makes_the_same_model(load, tmp_path, monkeypatch):
    folder = tape.save(tape.together(load("llama"), SERIAL["repeat"]), tmp_path / "first")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    exec(code, {})
    for name in ("model.safetensors", "config.json", "README.md", "mergekit.yaml", "tokenizer.json"):
        assert (tmp_path / "again" / "folder" / name).read_bytes() == (folder / name).read_bytes(), name


def test_sharded_sources_and_targets(tmp_path):
    fixtures.hugging_face("llama").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    fixtures.tokenizer().save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    model = surgery.load(tmp_path / "source")
    folder = tape.save(tape.together(model, SERIAL["repeat"]), tmp_path / "taped", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert difference(opened(TOKENS).logits.detach(), surgery.Stack(model).run(TOKENS, SERIAL["repeat"])) < 1e-5


def test_the_bundled_model_with_its_tokenizer(tmp_path):
    model = surgery.load("babel")
    stack, wiring = surgery.Stack(model), ":4 4:8 4:8 8:"
    tape.save(tape.together(model, wiring), tmp_path / "babel")
    saved = surgery.Stack(surgery.load(tmp_path / "babel"))
    texts = ["p3 pf1 pf4 >other", "o1 >plain"]
    tokens = stack.tokens(texts)
    assert torch.equal(saved.tokens(texts).ids, tokens.ids)
    assert difference(saved.run(tokens)[tokens.mask], stack.run(tokens, wiring)[tokens.mask]) < 1e-5


def test_what_cannot_be_saved_says_so(load, tmp_path):
    model = load("gpt_neox")
    for wiring in (*GROUPS.values(), *SUBLAYERS.values()):
        taped = tape.together(model, wiring)
        with pytest.raises(ValueError, match=r"a plain checkpoint cannot express .* Save the base model and this wir"):
            tape.save(taped, tmp_path / "taped")
    with pytest.raises(ValueError, match="no Hugging Face form"):
        tape.save(tape.together(load("native-ln"), ":"), tmp_path / "taped")
    with torch.no_grad():
        model.blocks[1].attn.q.weight.zero_()  # GPT-NeoX' bridge has weights of its own here
    taped = tape.together(model, ":3 1:")
    assert difference(taped(TOKENS).detach(), surgery.Stack(model).run(TOKENS, ":3 1:")) < 1e-5
    with pytest.raises(ValueError, match="edited or processed where its Hugging Face model does not see it"):
        tape.save(taped, tmp_path / "taped")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(load, tmp_path):
    taped = tape.together(load("llama"), ":3 1:")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("years")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            tape.save(taped, tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    tape.save(taped, tmp_path / "empty")
    tape.save(taped, tmp_path / "deep" / "down", check=False)
    assert (tmp_path / "deep" / "down" / "config.json").is_file()
    with pytest.raises(FileExistsError):
        tape.save(taped, tmp_path / "empty")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "full"), ValueError])
def test_whole_or_not_at_all(load, tmp_path, monkeypatch, error):
    taped = tape.together(load("llama"), ":3 1:")

    def fails(*args, **kwargs):
        raise error

    for owner, name in ((type(taped.tokenizer), "save_pretrained"), (checkpoint, "_reopened"), (os, "replace")):
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, fails)
            with pytest.raises(type(error) if isinstance(error, OSError) else error) as raised:
                tape.save(taped, tmp_path / "taped")
        if isinstance(error, OSError):
            assert "cannot write" in str(raised.value)
            assert "no space left on the disk" in str(raised.value)
        assert not list(tmp_path.iterdir())
    tape.save(taped, tmp_path / "taped")
