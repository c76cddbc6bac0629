"""Models of kept, fresh and mixed layers: exact where all is kept, new where it says so, and saved whole."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import surgery
from support import fixtures
from support.known_wirings import TOKENS, difference
from surgery.models.errors import ModelError
from surgery.models.layer_sizes import Size
from surgery.models.loading import plain
from surgery.models.weights_hash import weights_sha256
from surgery.rebuild import layout, tape
from surgery.rebuild.layout import Row, build, middle

KEPT = middle(4, 1, 3, old=1.0)
WIDER = ["gpt2", "opt", "phi3", "qwen3_moe", "native-ln"]


def storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def layer(model, place):
    """Parameters of a layer by name; of the plain twin where there is one."""
    module = layout.source_of(model).get_submodule(f"{layout.layers_path(model)}.{place}")
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(model):
    return weights_sha256(model), layout.config_of(model).to_dict(), model.cfg.n_layers, len(model.hook_dict)


# --- what is built ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*fixtures.ARCHITECTURES, *fixtures.NATIVE])
def test_all_kept_is_the_model_again(opened, name):
    base = opened(name).model
    before, expected = state(base), base(TOKENS).detach()
    again = build(base, KEPT)
    assert torch.equal(again(TOKENS), expected)
    assert not storages(layout.source_of(again)) & storages(layout.source_of(base))
    assert not storages(again) & storages(base)
    assert state(base) == before
    assert torch.equal(base(TOKENS), expected)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "native-rms"])
def test_the_ends_are_the_old_ones_and_the_middle_is_new(opened, name):
    base = opened(name).model
    before = state(base)
    deeper = build(base, middle(4, 1, 3, depth=3))
    assert deeper.cfg.n_layers == len(deeper.blocks) == 5
    assert same(layer(deeper, 0), layer(base, 0))
    assert same(layer(deeper, 4), layer(base, 3))
    matrices = [key for key, weight in layer(deeper, 1).items() if weight.ndim > 1]
    for place, like in ((1, 1), (2, 2), (3, 2)):
        assert not any(torch.equal(layer(deeper, place)[key], layer(base, like)[key]) for key in matrices)
    outside = dict(layout.source_of(base).named_parameters())
    for key, parameter in layout.source_of(deeper).named_parameters():
        if not key.startswith(layout.layers_path(base) + "."):
            assert torch.equal(parameter, outside[key])
    assert difference(deeper(TOKENS), base(TOKENS)) > 1e-3
    assert state(base) == before


@pytest.mark.parametrize("name", ["mistral", "native-ln"])
def test_the_seed_decides_and_the_caller_s_is_untouched(opened, name):
    base, rows = opened(name).model, middle(4, 1, 3, d_mlp=48)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = build(base, rows, seed=1), build(base, rows, seed=1), build(base, rows, seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert weights_sha256(one) == weights_sha256(again)
    for place in (1, 2):
        assert not same(layer(one, place), layer(other, place))
        assert same(layer(one, 0), layer(other, 0))
    assert not same(layer(one, 1), layer(one, 2))


@pytest.mark.parametrize("name", WIDER)
def test_layers_of_their_own_width(opened, name):
    base = opened(name).model
    wide = build(base, middle(4, 1, 3, d_mlp=160))
    assert layout.sizes(wide) == [Size(), Size(160), Size(160), Size()]
    count = [sum(weight.numel() for weight in layer(wide, place).values()) for place in range(4)]
    assert count[0] == count[3] < count[1] == count[2]
    assert same(layer(wide, 3), layer(base, 3))
    _, cache = wide.run_with_cache(TOKENS)  # the bridge's hooks run in layers of any size
    assert difference(surgery.Stack(wide).stream(TOKENS)[2], cache["blocks.1.hook_out"]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "native-gated", "phi3"])
def test_layers_with_heads_of_their_own(opened, name):
    base = opened(name).model
    more = build(base, middle(4, 1, 3, n_heads=8))
    _, cache = more.run_with_cache(TOKENS)
    assert [cache[f"blocks.{place}.attn.hook_pattern"].shape[1] for place in range(4)] == [4, 8, 8, 4]
    keys = [cache[f"blocks.{place}.attn.hook_k"].shape[-2:] for place in range(4)]
    assert keys[1] == keys[2] == (2 * keys[0][0], keys[0][1])
    assert keys[0] == keys[3]


def test_old_is_the_share_of_the_old_weights(opened):
    base = opened("llama").model
    half, fresh = build(base, middle(4, 1, 3, old=0.25), seed=3), build(base, middle(4, 1, 3), seed=3)
    for key, found in layer(half, 2).items():
        assert torch.allclose(found, 0.25 * layer(base, 2)[key] + 0.75 * layer(fresh, 2)[key], atol=1e-7)


@pytest.mark.parametrize("name", ["gemma2", "native-gated"])
def test_kept_layers_in_another_order_run_as_the_wiring(opened, name):
    base = opened(name).model
    assert (
        difference(build(base, list(map(Row, (0, 2, 1, 1, 3))))(TOKENS), surgery.Stack(base).run(TOKENS, "0 2 1 1 3"))
        < 1e-5
    )


@pytest.mark.parametrize("name", ["llama", "native-ln"])
def test_building_again_composes_and_sizes_carry_over(opened, name):
    wide = build(opened(name).model, middle(4, 1, 3, d_mlp=160, n_heads=8))
    again = build(wide, [Row(0), Row(1), Row(1, 0.0), Row(2, 0.0, d_mlp=40), Row(3)], seed=4)
    assert layout.sizes(again) == [Size(), Size(160, 8), Size(160, 8), Size(40, 8), Size()]
    assert same(layer(again, 1), layer(wide, 1))
    assert torch.equal(build(wide, KEPT)(TOKENS), wide(TOKENS))
    back = build(wide, [Row(0), Row(1, 0.0, d_mlp=64, n_heads=4), Row(3)])
    assert layout.sizes(back) == [Size()] * 3


def test_given_weights_in_a_given_shape(opened):
    base = opened("gpt_neox").model  # whose bridge splits query, key and value: weights have to be there before it does
    target = build(base, middle(4, 1, 3, d_mlp=160), seed=9)
    weights = dict(plain(target).named_parameters())
    found = layout.shaped(base, [Row(0), Row(1, d_mlp=160), Row(2, d_mlp=160), Row(3)], seed=0, weights=weights)
    assert torch.equal(found(TOKENS), target(TOKENS))
    assert torch.equal(plain(found)(TOKENS).logits, plain(target)(TOKENS).logits)
    for name, message in (
        ("nothing", "there is no weight nothing"),
        ("gpt_neox.layers.1.mlp.dense_h_to_4h.bias", "new mo"),
    ):
        with pytest.raises(ModelError, match=message):
            layout.shaped(base, KEPT, weights={name: torch.zeros(3)})


# --- saved and opened ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "own"),
    [
        ("gpt2", {}, False),  # tied embeddings
        ("qwen3_moe", {"depth": 3}, False),
        ("gpt_neox", {"d_mlp": 160, "depth": 1}, True),
        ("gpt2", {"n_heads": 2}, True),
        ("gemma2", {"d_mlp": 160, "n_heads": 8, "depth": 3}, True),
        ("mixtral", {"d_mlp": 160, "n_heads": 2}, True),
    ],
)
def test_saved_and_opened(opened, tmp_path, name, sizes, own):
    model = build(opened(name).model, middle(4, 1, 3, **sizes))
    folder = layout.save(model, tmp_path / "new")
    opened = surgery.load(folder)
    assert torch.equal(plain(opened)(TOKENS).logits, plain(model)(TOKENS).logits)
    assert layout.sizes(opened) == layout.sizes(model)
    assert opened.tokenizer("w1 w2 w9")["input_ids"] == model.tokenizer("w1 w2 w9")["input_ids"]
    for one in (opened, model):
        tied = plain(one).get_input_embeddings().weight is plain(one).get_output_embeddings().weight
        assert tied is plain(one).config.tie_word_embeddings
    assert (folder / "surgery.json").is_file() is own
    assert ("only `surgery.load` opens this folder" in (folder / "README.md").read_text()) is own
    if own:
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(folder)
    else:
        with torch.no_grad():
            assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits, plain(model)(TOKENS).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_one_size_for_all_layers_is_a_plain_checkpoint(opened, tmp_path):
    folder = layout.save(build(opened("llama").model, [Row(0, 0.0, d_mlp=160, n_heads=2)] * 3), tmp_path / "new")
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert (opened.config.num_hidden_layers, opened.config.intermediate_size) == (3, 160)
    assert (opened.config.num_attention_heads, opened.config.num_key_value_heads, opened.config.head_dim) == (2, 1, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(opened, tmp_path, dtype):
    base = opened("mixtral", dtype=dtype).model
    assert torch.equal(build(base, KEPT)(TOKENS), base(TOKENS))
    model = build(base, middle(4, 1, 3, d_mlp=160))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    opened = surgery.load(layout.save(model, tmp_path / "new"), dtype=dtype)
    assert torch.equal(plain(opened)(TOKENS).logits, plain(model)(TOKENS).logits)


def test_trained_opened_and_built_again(load, tmp_path):
    model = build(load("llama"), middle(4, 1, 3, d_mlp=160))
    plain(model)(TOKENS).logits.square().mean().backward()
    with torch.no_grad():
        for parameter in plain(model).model.layers[1].parameters():
            parameter.sub_(parameter.grad)
    opened = surgery.load(layout.save(model, tmp_path / "new", max_shard_size="20KB"))
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2
    assert torch.equal(opened(TOKENS), model(TOKENS))
    assert torch.equal(build(opened, KEPT)(TOKENS), model(TOKENS))
    taped = tape.together(opened, ":3 1:")
    twice = surgery.load(layout.save(taped, tmp_path / "twice"))
    assert difference(twice(TOKENS), surgery.Stack(model).run(TOKENS, ":3 1:")) < 1e-5


def test_broken_folders(opened, tmp_path):
    folder = layout.save(build(opened("llama").model, middle(4, 1, 3, d_mlp=160)), tmp_path / "new")
    text = (folder / "surgery.json").read_text()
    said = json.loads(text)
    for broken, message in (
        ("{", "is not JSON"),
        (json.dumps({"format": 1}), "does not say the sizes"),
        (json.dumps(said | {"format": 2}), "has format 2, this surgery reads 1"),
        (json.dumps(said | {"rows": said["rows"][1:]}), "every one of the 4 layers"),
        (text.replace("160", "-160"), "each null or 1 and more"),
        (text.replace("160", "161"), "cannot open|wrong shape"),
        (text.replace("160", "null"), "cannot open|wrong shape"),
        (text.replace('"d_mlp": 160', '"biases": ["mlp.act_fn"], "d_mlp": 160'), "no projection without bias at mlp.a"),
        (text.replace('"d_mlp": 160', '"biases": [1], "d_mlp": 160'), "each null or 1 and more"),
    ):
        (folder / "surgery.json").write_text(broken)
        with pytest.raises(ModelError, match=message):
            surgery.load(folder)
    (folder / "surgery.json").write_text(text)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .*model\.layers\.1\.mlp\.up_proj\.weight"):
        surgery.load(folder)


def test_what_cannot_be_saved_says_so(opened, tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face form to save"):
        layout.save(build(opened("native-ln").model, KEPT), tmp_path / "new")
    model = build(opened("gpt_neox").model, KEPT)
    with torch.no_grad():
        model.blocks[1].attn.q.weight.zero_()  # GPT-NeoX' bridge has weights of its own here
    with pytest.raises(ValueError, match=r"where its Hugging Face model does not see it: edit plain.* then save"):
        layout.save(model, tmp_path / "new")
    with pytest.raises(ModelError, match=r"where its Hugging Face model does not see it: edit plain.* then build"):
        build(model, KEPT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        layout.save(build(opened("gpt2").model, KEPT), tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.txt"]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_rows_of_a_middle():
    assert middle(5, 1, 4) == (Row(0), Row(1, 0.0), Row(2, 0.0), Row(3, 0.0), Row(4))
    assert [row.like for row in middle(12, 4, 9, depth=2)[4:6]] == [5, 7]
    assert [row.like for row in middle(12, 4, 9, depth=10)[4:14]] == [4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    assert middle(4, 1, 3, depth=0) == (Row(0), Row(3))
    assert middle(4, 0, 3)[0] == Row(0, 0.0)
    for start, stop in ((2, 2), (3, 2), (-1, 2), (2, 5), (0, 4)):
        with pytest.raises(ValueError, match=r"give 0 <= start < stop <= 4, with at least one layer kept"):
            middle(4, start, stop)
    with pytest.raises(ValueError, match="depth = -1"):
        middle(4, 1, 3, depth=-1)


def test_bad_rows(opened):
    base = opened("llama").model
    for old in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"share of the old weights, from 0 \(fresh\) to 1 \(kept\)"):
            Row(0, old)
    with pytest.raises(ValueError, match="d_mlp = 0: give 1 or more"):
        Row(0, 0.0, d_mlp=0)
    for like in (-1, 4):
        with pytest.raises(ValueError, match="has layers 0 to 3"):
            build(base, [Row(like)])
    with pytest.raises(ValueError, match="no rows"):
        build(base, [])
    for old in (1.0, 0.5):
        with pytest.raises(ValueError, match=r"old weights have the old size; .* old=0\.0"):
            build(base, [Row(0), Row(1, old, d_mlp=160)])
    assert layout.sizes(build(base, [Row(0), Row(1, 1.0, d_mlp=64, n_heads=4)])) == [Size()] * 2
    with pytest.raises(ModelError, match="4 heads share 2 keys, so 3 cannot: make n_heads a multiple of 2"):
        build(base, middle(4, 1, 3, n_heads=3))


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("gpt2", {"n_heads": 2, "d_model": 48}, "divides d_model among its heads"),
        ("opt", {"n_heads": 8, "d_model": 48}, "divides d_model among its heads"),
        ("olmo2", {"n_heads": 8}, "cannot have layers with n_heads 8 of their own"),
        ("native-attention-only", {"d_mlp": 160}, "no MLP width to set"),
    ],
)
def test_sizes_that_an_architecture_cannot_have(opened, name, sizes, message):
    with pytest.raises(ModelError, match=message):
        build(opened(name).model, middle(4, 1, 3, **sizes))
