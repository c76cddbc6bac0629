import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from support import fixtures
from surgery.corpus import bundled
from surgery.models.errors import ModelError
from surgery.models.loading import plain, untrained


def test_a_folder_a_model_in_memory_and_a_bridge_are_the_same_model(model_folder):
    folder = model_folder("llama")
    tokens = torch.arange(4, 14)[None]
    from_folder = surgery.load(folder)
    memory = transformers.AutoModelForCausalLM.from_pretrained(folder)
    from_memory = surgery.load(memory)
    assert plain(from_memory) is memory
    assert surgery.load(from_folder) is from_folder
    assert torch.allclose(from_folder(tokens), from_memory(tokens), atol=1e-6)
    assert torch.allclose(memory(tokens).logits, from_folder(tokens), atol=1e-5)
    assert from_folder.tokenizer("w1 w2")["input_ids"] == [1, 5, 6]


def test_a_bridge_from_elsewhere_has_no_plain_twin():
    assert plain(fixtures.native()) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "native-rms"])
def test_untrained_is_the_same_architecture_with_other_weights(load, name):
    model = load(name)
    fresh, again, other = untrained(model, seed=1), untrained(model, seed=1), untrained(model, seed=2)
    tokens = torch.arange(4, 14)[None]
    assert fresh.cfg.n_layers == model.cfg.n_layers
    assert torch.equal(fresh(tokens), again(tokens))
    assert not torch.allclose(fresh(tokens), other(tokens), atol=1e-3)
    assert not torch.allclose(fresh(tokens), model(tokens), atol=1e-3)
    assert surgery.Stack(fresh).checks()["passed"].all()


def test_untrained_leaves_the_random_state_alone(load):
    model = load("llama")
    before = torch.get_rng_state()
    untrained(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_such_model():
    with pytest.raises(ModelError, match=r"no model 'no/such-model'.*bundled model"):
        surgery.load("no/such-model")


@pytest.mark.parametrize("place", ["/no/such/folder", "./models/mine", "~/models/mine"])
def test_no_such_folder(place):
    with pytest.raises(ModelError, match=f"there is no folder {place}"):
        surgery.load(place)


def test_folders_that_are_not_models(tmp_path, model_folder):
    with pytest.raises(ModelError, match=r"without config\.json"):
        surgery.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        surgery.load(tmp_path)
    with pytest.raises(ModelError, match="is a file; give the folder"):
        surgery.load(tmp_path / "config.json")


def test_broken_weights(tmp_path):
    folder = fixtures.save("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = {name: tensor for name, tensor in weights.items() if "layers.2.mlp.up_proj" not in name}
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .* model\.layers\.2\.mlp\.up_proj"):
        surgery.load(folder)
    (folder / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ModelError, match="cannot open the model in"):
        surgery.load(folder)


def test_pickled_weights_are_not_opened(tmp_path):
    folder = fixtures.save("llama", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors \(pickled"):
        surgery.load(folder)


def test_encoder_decoders_are_refused(tmp_path):
    config = transformers.T5Config(vocab_size=96, d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=16)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(ModelError, match="encoder-decoder"):
            surgery.load(source)


def test_bundled_prompts_are_seeded_and_balanced():
    prompts = bundled.prompts(80, seed=1)
    assert len(prompts) == 80
    assert prompts == bundled.prompts(80, seed=1)
    assert prompts != bundled.prompts(80, seed=2)
    assert sum(prompt.startswith("p") for prompt in prompts) == 20
    assert [len(bundled.prompts(count)) for count in (1, 3, 7)] == [1, 3, 7]
