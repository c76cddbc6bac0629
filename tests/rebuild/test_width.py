"""Wider and deeper: the same logits, room to learn, saved whole; and what cannot be says why."""

from dataclasses import replace

import pytest
import torch

import surgery
from support import fixtures
from support.known_wirings import TOKENS, difference
from surgery.models.errors import ModelError
from surgery.models.layer_sizes import Size
from surgery.models.loading import plain
from surgery.rebuild import layout, units, weights, width

EVERY = (*fixtures.ARCHITECTURES, *fixtures.NATIVE)


def layer(model, place):
    return layout.source_of(model).get_submodule(f"{layout.layers_path(model)}.{place}")


def parameters(model):
    return sum(weight.numel() for weight in layout.source_of(model).parameters())


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_wider_and_deeper_models_have_the_same_logits(opened, name):
    frame = width.exactness({name: opened(name).model})
    assert tuple(frame.columns) == tuple(width.COLUMNS)
    impossible = {"heads"} if name == "olmo2" else {"mlp"} if name == "native-attention-only" else set()
    assert set(frame["part"][frame["refused"] != ""]) == set(frame["part"][frame["difference"].isna()]) == impossible
    assert (frame["difference"].dropna() < 1e-5).all()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "mixtral"])  # one of each kind of block
def test_in_double_precision_to_its_rounding(load, name):
    with fixtures.ThroughoutDouble():
        frame = width.exactness({name: load(name, dtype=torch.float64)})
    assert set(frame["precision"]) == {"float64"}
    assert (frame["difference"].dropna() < 1e-10).all()
    assert frame["difference"].notna().sum() >= 3


@pytest.mark.parametrize("name", ["llama", "mixtral", "native-gated"])
def test_larger_it_is_and_every_way_of_running_agrees(opened, name):
    stack = opened(name)
    base, expected, streams = stack.model, stack.run(TOKENS), stack.stream(TOKENS)
    own = base(TOKENS).detach()
    wide = width.widen(base, 1, 3, d_mlp=96, n_heads=8)
    assert layout.sizes(wide) == [Size(), Size(96, 8), Size(96, 8), Size()]
    assert parameters(wide) > parameters(base)
    assert difference(surgery.Stack(wide).stream(TOKENS), streams) < 1e-5
    assert difference(wide(TOKENS), own) < 1e-5
    if (twin := plain(wide)) is not None:
        assert difference(twin(TOKENS).logits, own) < 1e-5
    assert torch.equal(base(TOKENS), own)
    twice = width.deepen(width.widen(wide, 1, 2, n_heads=12), 1, 3, 4)
    assert layout.sizes(twice)[1:5] == [Size(96, 12), Size(96, 12), Size(96, 8), Size(96, 8)]
    assert difference(twice(TOKENS), expected) < 1e-5


def test_queries_to_a_key_stay_as_many(opened):
    wide = width.widen(opened("llama").model, 1, 3, n_heads=6)
    attention = layer(wide, 1).self_attn
    assert attention.q_proj.weight.shape == (48, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (24, 32)


def test_a_whole_model_wider_is_a_plain_checkpoint(opened):
    wide = width.widen(opened("llama").model, 0, 4, d_mlp=96)
    assert layout.sizes(wide) == [Size()] * 4
    assert plain(wide).config.intermediate_size == 96


def test_inserted_layers_lie_evenly_and_write_nothing(opened):
    base = opened("gpt2").model
    deep = width.deepen(base, 1, 3, 5)
    streams = surgery.Stack(deep).stream(TOKENS)
    silent = [bool(torch.equal(streams[i], streams[i + 1])) for i in range(deep.cfg.n_layers)]
    assert silent == [False, False, True, True, False, True, False]
    assert torch.equal(layer(deep, 2).attn.c_attn.weight, layer(base, 1).attn.c_attn.weight)
    assert torch.equal(layer(deep, 5).attn.c_attn.weight, layer(base, 2).attn.c_attn.weight)


# --- room to learn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old"), [("llama", (64, 4)), ("gpt2", (128, 4)), ("gpt_neox", (64, 4)), ("qwen3_moe", (32, 4))]
)
def test_one_step_makes_new_units_differ(load, name, old):
    wide = width.widen(load(name), 1, 3, d_mlp=old[0] + 8, n_heads=old[1] and old[1] + 4)
    plain(wide)(TOKENS, labels=TOKENS).loss.backward()
    inside = layer(wide, 1)
    for part, count, new in (("mlp", old[0], 8), ("attn", old[1], 4)):
        if count is None:
            continue
        path = units.writers(wide, part)[1].path
        weight = next(w for key, w in inside.named_parameters() if key in (path, f"{path}.weight"))
        written = (weight.grad.T if name == "gpt2" else weight.grad).unflatten(-1, (count + new, -1)).movedim(-2, 0)
        values = (weight.T if name == "gpt2" else weight).unflatten(-1, (count + new, -1)).movedim(-2, 0)
        assert not values[count:].any()
        assert values[:count].flatten(1).any(1).all()
        stepped = (values - written).detach().flatten(1)
        apart = torch.cdist(stepped, stepped) + torch.eye(count + new)
        assert apart[count:].min() > 1e-6
        assert (written[count:].flatten(1).norm(dim=1) > 0).all()


def test_the_seed_draws_the_new_units(opened):
    base = opened("llama").model
    one, again, other = (width.widen(base, 1, 3, d_mlp=96, seed=seed) for seed in (1, 1, 2))
    up = [layer(model, 1).mlp.up_proj.weight for model in (one, again, other)]
    assert torch.equal(up[0], up[1])
    assert not torch.equal(up[0][64:], up[2][64:])
    assert torch.equal(up[0][:64], layer(base, 1).mlp.up_proj.weight)


# --- saved and opened ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "heads"), [("llama", 8), ("gemma2", 8), ("phi3", 8), ("mixtral", 6)])
def test_saved_and_opened(opened, tmp_path, name, heads):
    wide = width.deepen(width.widen(opened(name).model, 1, 3, d_mlp=96, n_heads=heads), 1, 3, 3)
    opened = surgery.load(layout.save(wide, tmp_path / "wide"))
    assert layout.sizes(opened) == layout.sizes(wide)
    assert torch.equal(plain(opened)(TOKENS).logits, plain(wide)(TOKENS).logits)


# --- fewer -----------------------------------------------------------------------------------------------------------


def test_dropped_layers(opened):
    base = opened("mistral").model
    assert difference(width.drop(base, [1, 3])(TOKENS), surgery.Stack(base).run(TOKENS, "0 2")) < 1e-5


def test_fewer_layers_drop_those_of_least_influence(opened):
    deep = width.deepen(opened("llama").model, 1, 3, 4)  # layers 2 and 4 are silent
    fewer = width.deepen(deep, 1, 5, 2, tokens=TOKENS)
    assert fewer.cfg.n_layers == 4
    assert difference(fewer(TOKENS), deep(TOKENS)) < 1e-5
    assert width.deepen(deep, 1, 5, 1, tokens=TOKENS).cfg.n_layers == 3


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked(opened):
    base = opened("llama").model
    for start, stop in ((-1, 2), (2, 2), (3, 5)):
        for made in (
            lambda start, stop: width.widen(base, start, stop, d_mlp=96),
            lambda start, stop: width.narrow(base, start, stop, d_mlp=6, by="random"),
            lambda start, stop: width.deepen(base, start, stop, 6),
        ):
            with pytest.raises(ValueError, match=r"of 4: give 0 <= start < stop <= 4"):
                made(start, stop)
    for call, message in (
        (lambda: width.widen(base, 1, 3), "no size is given: give d_mlp, n_heads, d_model or several"),
        (lambda: width.widen(base, 1, 3, d_model=31), r"the stream is 32 wide, more than asked for: use width\.narrow"),
        (lambda: width.narrow(base, 1, 3, TOKENS, d_model=33), r"32 wide, less than asked for: use width\.widen"),
        (lambda: width.widen(base, 1, 3, d_model=0), "d_model = 0: give 1 or more"),
        (lambda: width.narrow(base, 1, 3, d_model=16), "needs tokens: give stack.tokens"),
        (lambda: width.narrow(base, 1, 3, TOKENS, d_model=16, d_mlp=8, by="pca"), "goes with d_model alone"),
        (
            lambda: width.narrow(base, 1, 3, TOKENS, d_model=16, by="luck"),
            "give by of activation, magnitude, random, or pca",
        ),
        (lambda: width.narrow(base, 1, 3), "no size is given"),
        (lambda: width.widen(base, 1, 3, d_mlp=63), r"layer 1 has 64 neurons, more than asked for: use width\.narrow"),
        (lambda: width.widen(base, 1, 3, n_heads=2), r"layer 1 has 4 heads, more than asked for: use width\.narrow"),
        (lambda: width.narrow(base, 1, 3, d_mlp=65), r"layer 1 has 64 neurons, fewer than asked for: use width\.widen"),
        (lambda: width.narrow(base, 1, 3, n_heads=6), r"layer 1 has 4 heads, fewer than asked for: use width\.widen"),
        (lambda: width.widen(base, 1, 3, n_heads=7), "2 heads share a key, so 7 cannot: make n_heads a multiple of 2"),
        (lambda: width.widen(base, 1, 3, d_mlp=0), "d_mlp = 0: give 1 or more"),
        (lambda: width.widen(base, 1, 3, n_heads=-2), "n_heads = -2: give 1 or more"),
        (lambda: width.deepen(base, 1, 3, 0), r"depth = 0: give 1 or more; .* width\.drop"),
        (lambda: width.deepen(base, 1, 3, 1), r"1 of 2 layers: give tokens .* width\.drop"),
        (lambda: width.drop(base, []), "give some of the layers 0 to 3, and not all"),
        (lambda: width.drop(base, [4]), "give some of the layers 0 to 3"),
        (lambda: width.drop(base, [0, 1, 2, 3]), "and not all"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ModelError, match=r"has no mlp: leave its size out"):
        width.widen(opened("native-attention-only").model, 1, 3, d_mlp=96)
    with pytest.raises(ModelError, match="divides d_model among its heads"):
        width.widen(opened("gpt2").model, 1, 3, n_heads=8, d_model=48)


def test_layers_that_zero_output_weights_do_not_silence(opened, monkeypatch):
    by_layer = weights.by_layer

    def all_reading(model):
        return [{name: replace(weight, role="reads") for name, weight in of.items()} for of in by_layer(model)]

    monkeypatch.setattr(weights, "by_layer", all_reading)
    with pytest.raises(ModelError, match=r"do not follow the rules of surgery\.rebuild\.weights"):
        width.deepen(opened("llama").model, 1, 3, 4)
