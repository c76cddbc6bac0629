"""Folders that a stranger made: what is read of them, and that ordinary ones open as before (attacks: hardening/)."""

import json
import shutil
import struct
from pathlib import Path

import gguf as format
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from support import fixtures, strangers
from surgery.cli import app
from surgery.models import foreign
from surgery.models.errors import ModelError, as_model_error
from surgery.models.loading import plain
from surgery.rebuild import tape


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def test_what_is_saved_brings_no_code_along(folder, tmp_path):
    strangers.TRAPS["code for a known class"][0](folder, tmp_path)
    in_memory = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert in_memory.config.auto_map
    for number, model in enumerate((surgery.load(folder), surgery.load(in_memory, tokenizer=tokenizer))):
        saved = tape.save(tape.together(model, ":"), tmp_path / f"saved {number}")
        assert not list(saved.rglob("*.py"))
        assert not [path for path in saved.glob("*.json") if "auto_map" in path.read_text()]
    assert in_memory.config.auto_map  # the user's model stays as it was


def test_the_model_and_its_tokenizer_keep_their_names_and_their_files(folder):
    model = surgery.load(folder)
    assert plain(model).config._name_or_path == plain(model).name_or_path == str(folder)
    assert model.tokenizer.name_or_path == str(folder)
    kept = [*vars(model.tokenizer).values(), *model.tokenizer.init_kwargs.values()]
    assert not [value for value in kept if isinstance(value, str) and "/surgery-" in value]


def test_a_name_on_the_hub_is_read_from_the_cache_of_the_hub(folder, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--somebody--small"
    snapshot, commit = repository / "snapshots" / ("0" * 40), "0" * 40
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = surgery.load("somebody/small")
    assert plain(model).config._name_or_path == "somebody/small"
    assert model.tokenizer("w1 w2")["input_ids"] == [1, 5, 6]


def test_what_older_versions_saved_beside_the_weights_is_no_stranger(tmp_path):
    for name, kept in (("gpt2", "transformer.h.0.attn.bias"), ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias")):
        place = fixtures.save(name, tmp_path / name)
        weights = load_file(place / "model.safetensors")
        weights |= {kept: torch.ones(1, 1, 4, 4), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        surgery.load(place)


def test_what_the_files_hold_and_what_the_config_says_is_in_the_message(folder):
    strangers.change(folder, "config.json", hidden_size=10**5)
    with pytest.raises(ModelError, match=r"config\.json describes a model of [\d,]+ weights .* only 43,296 weights"):
        surgery.load(folder)
    strangers.change(folder, "config.json", hidden_size=fixtures.D_MODEL, num_hidden_layers=999)
    with pytest.raises(ModelError, match="has num_hidden_layers 999, but 256 is the most that a model of 39 tensors"):
        surgery.load(folder)
    strangers.change(folder, "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"hold 9 weights that the model .* does not have, the first is model\.layers"):
        surgery.load(folder)


@pytest.mark.parametrize("room", [1, 3, -(2**40)])
def test_a_model_without_room_for_a_probe_is_refused(folder, room):
    strangers.change(folder, "config.json", max_position_embeddings=room)
    with pytest.raises(ModelError, match=f"has room for {room} tokens by its configuration"):
        surgery.Stack(surgery.load(folder))


def test_settings_that_are_none_name_their_file(folder):
    for content, complaint in (("[]", "a list, not a JSON object"), (strangers.DEEP, "deeply"), ("{", "is not JSON")):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(ModelError, match=rf"tokenizer_config\.json .*{complaint}"):
            surgery.load(folder)


def test_words_beyond_any_vocabulary_are_refused(folder):
    word = {"content": "x", "special": True}
    strangers.change(folder, "tokenizer_config.json", added_tokens_decoder={"4000000000": word})
    with pytest.raises(ModelError, match=r"tokenizer_config\.json numbers words beyond 10,000,000"):
        surgery.load(folder)


def test_a_tokenizer_that_cannot_be_used_is_a_warning(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "x"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match="has no usable tokenizer"):
        assert surgery.load(folder).tokenizer is None


def test_numbers_that_are_none_are_named_where_they_are():
    model = fixtures.hugging_face("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(ModelError, match=r"embed_tokens\.weight has 32 of 3,072 entries that .* first at \[7, 0\]"):
        surgery.load(model)


def test_a_buffer_may_be_infinite_but_must_be_numbers():
    model = fixtures.hugging_face("llama")
    model.register_buffer("mask", torch.full((4,), float("-inf")))
    surgery.load(model)
    model.mask[2] = float("nan")
    with pytest.raises(ModelError, match=r"mask has 1 of 4 entries that are not finite .* first at \[2\]"):
        surgery.load(model)
    model.mask = torch.tensor([float("inf"), float("-inf")])  # their sum is no number, they are
    surgery.load(model)


def test_a_gguf_file_that_promises_more_than_it_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    for number, (layers, width) in enumerate(((10**9, 32), (1, 10**7))):
        file = format.GGUFWriter(tmp_path / f"{number}.gguf", "llama")
        file.add_block_count(layers)
        file.add_context_length(64)
        file.add_embedding_length(width)
        file.add_feed_forward_length(64)
        file.add_head_count(4)
        file.add_layer_norm_rms_eps(1e-6)
        file.add_vocab_size(96)
        file.add_tensor("token_embd.weight", torch.zeros(96, 32).numpy())
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        cost = strangers.Cost()
        with pytest.raises(ModelError, match=r"has num_hidden_layers 1,000,000,000|has hidden_size 10,000,000"):
            surgery.load(tmp_path / f"{number}.gguf")
        assert not cost.too_much()


def test_what_lies_beside_a_gguf_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
    strangers.change(tmp_path, foreign.ADAPTER, base_model_name_or_path="stranger/base")
    with strangers.watched() as seen, pytest.raises(ModelError, match="cannot read"):
        surgery.load(tmp_path / "model.gguf")
    assert not seen


def test_a_folder_with_markup_for_a_name_can_be_checked(folder, capsys):
    place = folder.rename(folder.with_name("[bold]"))
    app(["check", "--model", str(place)], standalone_mode=False)
    assert "passed" in capsys.readouterr().out


def test_a_panic_is_an_error_and_an_interruption_is_none():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ModelError, match="cannot open it: index out of bounds"), as_model_error("cannot open it"):
        raise panic("index out of bounds\nand more")
    with pytest.raises(KeyboardInterrupt), as_model_error("cannot open it"):
        raise KeyboardInterrupt
