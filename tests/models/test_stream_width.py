"""A stream of its own width inside a span: padded at its borders, learning, saved, run whole; and what cannot be says
why."""

import functools

import pytest
import torch

import surgery
from support import fixtures
from support.known_wirings import TOKENS, difference
from surgery.models import stream_width
from surgery.models.errors import ModelError
from surgery.models.layer_sizes import Size
from surgery.models.loading import plain
from surgery.rebuild import layout, tape, units, weights, width
from surgery.rebuild.layout import Row

INSIDE = [Size(), Size(d_model=48, enters=True), Size(d_model=48, leaves=True), Size()]
PROMPTS = torch.randint(fixtures.N_VOCAB, (12, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def broad(opened):
    """A model with a wider stream in layers 1 and 2, made once: tests that use it must leave it as it is."""

    @functools.cache
    def of(name="llama"):
        return width.widen(opened(name).model, 1, 3, d_model=48)

    return of


def layer(model, place):
    return layout.source_of(model).get_submodule(f"{layout.layers_path(model)}.{place}")


# --- norms and maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_padding_keeps_what_a_norm_gives(kind):
    x = torch.randn(5, 8, dtype=torch.float64) * 1e-2  # small enough for epsilon to matter
    norm, wide = kind(8, eps=1e-5).double(), kind(12, eps=1e-5 * 8 / 12).double()
    norm.weight.data = torch.randn(8).double()
    wide.weight.data[:8] = (8 / 12) ** 0.5 * norm.weight.data
    mean = stream_width.centres(norm, 8)
    assert mean == (kind is torch.nn.LayerNorm)
    given = wide(x @ stream_width.padding(12, 8, mean=mean).double().T)
    assert torch.allclose(given[:, :8], norm(x), rtol=0, atol=1e-12)
    assert given[:, 8:].abs().max() < 1e-12


def test_only_the_first_and_the_last_of_a_run_carry_maps(broad, opened):
    wide = broad()
    assert layout.sizes(wide) == INSIDE
    assert [stream_width.streams(layer(wide, place), 32) for place in range(4)] == [
        (32, 32, 32),
        (32, 48, 48),
        (48, 48, 32),
        (32, 32, 32),
    ]
    one = width.widen(opened("llama").model, 2, 3, d_model=48)
    assert layout.sizes(one)[2] == Size(d_model=48, enters=True, leaves=True)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
def test_heads_that_divide_the_stream_stay_as_wide(broad, name):
    wide = broad(name)
    writer = units.writers(wide, "attn")[1]
    assert writer.rows.shape == (fixtures.N_HEADS, fixtures.D_MODEL // fixtures.N_HEADS, 48)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_one_step_fills_the_new_numbers_each_in_its_own_way(load, name):
    wide = width.widen(load(name), 1, 3, d_model=48)
    plain(wide)(TOKENS, labels=TOKENS).loss.backward()
    enter = layer(wide, 1).enter.weight
    stepped = (enter - enter.grad)[32:].detach()
    apart = torch.cdist(stepped, stepped) + torch.eye(16)
    assert apart.min() > 1e-6
    assert layer(wide, 2).leave.weight.grad is not None


def test_a_fresh_middle_with_a_stream_of_its_own(opened):
    grown = layout.build(opened("llama").model, layout.middle(4, 1, 3, depth=3, d_model=40))
    assert [size.d_model for size in layout.sizes(grown)] == [None, 40, 40, 40, None]
    assert [size.enters for size in layout.sizes(grown)] == [False, True, False, False, False]
    assert [size.leaves for size in layout.sizes(grown)] == [False, False, False, True, False]
    with pytest.raises(ValueError, match="with sizes of its own a layer is fresh"):
        layout.build(opened("llama").model, [Row(0), Row(1, d_model=40)])


# --- back again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "by"),
    [("llama", "pca"), ("llama", "activation"), ("mixtral", "pca"), ("gemma2", "activation"), ("native-rms", "pca")],
)
def test_what_was_padded_can_be_taken_away(broad, opened, name, by):
    base = opened(name).model
    again = width.narrow(broad(name), 1, 3, PROMPTS, d_model=32, by=by)
    assert difference(again(TOKENS), base(TOKENS)) < 1e-4
    by_chance = width.narrow(broad(name), 1, 3, d_model=32, by="random")
    assert difference(by_chance(TOKENS), base(TOKENS)) > 1e-2


def test_principal_components_lose_less_than_chance(opened):
    base = opened("llama").model
    lost = {}
    for by in ("pca", "random"):
        thin = width.narrow(base, 1, 3, PROMPTS, d_model=24, by=by)
        assert [size.d_model for size in layout.sizes(thin)] == [None, 24, 24, None]
        lost[by] = difference(surgery.Stack(thin).run(PROMPTS, ":3"), surgery.Stack(base).run(PROMPTS, ":3"))
    assert lost["pca"] < lost["random"]


def test_importance_of_the_streams_numbers(broad, opened):
    wide = broad()
    by_activation = units.channels(wide, 1, 3, PROMPTS)
    assert by_activation.shape == (48,)
    assert not by_activation[32:].any()
    assert (by_activation[:32] > 0).all()
    stack = opened("llama")
    streams = stack.stream(PROMPTS)[1:3, :, 1:].double()
    expected = (streams.abs() / streams.square().mean(-1, keepdim=True).sqrt()).sum((0, 1, 2))
    assert torch.allclose(by_activation[:32], (48 / 32) ** 0.5 * expected, rtol=1e-4)
    directions = units.components(wide, 1, 3, PROMPTS)
    assert torch.allclose(directions.T @ directions, torch.eye(48).double(), atol=1e-8)
    assert directions[32:, :32].abs().max() < 1e-6


# --- saved, taped, measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_saved_and_opened(broad, tmp_path, name):
    wide = width.widen(broad(name), 1, 3, d_mlp=160)
    with torch.no_grad():  # maps as training leaves them
        layer(wide, 1).enter.weight += 0.1
    opened = surgery.load(layout.save(wide, tmp_path / "broad"))
    assert layout.sizes(opened) == layout.sizes(wide)
    assert torch.equal(plain(opened)(TOKENS).logits, plain(wide)(TOKENS).logits)
    assert difference(opened(TOKENS), wide(TOKENS)) < 1e-5


def test_deeper_dropped_and_taped(broad, opened):
    base, wide = opened("llama").model, broad()
    deep = width.deepen(wide, 1, 3, 5)
    assert [size.enters for size in layout.sizes(deep)] == [False, True, False, False, False, False, False]
    assert difference(deep(TOKENS), base(TOKENS)) < 1e-5
    order = ":1 1:3 1:3 3:"
    taped = tape.together(wide, order)
    assert difference(taped(TOKENS), surgery.Stack(base).run(TOKENS, order)) < 1e-5
    assert difference(surgery.Stack(wide).run(TOKENS, order), surgery.Stack(base).run(TOKENS, order)) < 1e-5
    assert difference(width.drop(deep, [2, 3])(TOKENS), base(TOKENS)) < 1e-5
    for end in (1, 2):
        with pytest.raises(ValueError, match="keep the ends of the run, or leave all of it out"):
            width.drop(wide, [end])
    assert layout.sizes(width.drop(wide, [1, 2])) == [Size()] * 2


def test_opened_proved_and_frozen(broad, opened):
    base, wide = opened("gpt_neox"), surgery.Stack(broad("gpt_neox"))
    assert wide.checks()["passed"].all()
    assert len(wide.checks()) >= 4
    context = wide.context(TOKENS)
    with wide.frozen(context):
        assert difference(wide.run(context), base.run(TOKENS)) < 1e-5
    assert (
        difference(wide.execute("1:3", context.x0, context), base.execute("1:3", context.x0, base.context(TOKENS)))
        < 1e-5
    )


def test_layers_that_do_not_fit_one_another_say_so(broad):
    wide = surgery.Stack(broad())
    for order in (":2 1:", "0 2 3", ":1 {1 | 2} 3", ":1 2:"):
        with pytest.raises(ValueError, match=r"takes a stream of \d+, not one of \d+|must give the width"):
            wide.run(TOKENS, order)
    with pytest.raises(ValueError, match=r"layers 1 to 1 .* another width than 32: record them with stack\.run"):
        wide.stream(TOKENS)
    with pytest.raises(ValueError, match="takes a stream of 32 and gives one of 48: it has no update"):
        wide.update(1, torch.zeros(1, 3, 32))
    assert wide.update(0, torch.randn(1, 3, 32)).shape == (1, 3, 32)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2"])
def test_norms_that_a_rotation_does_not_pass(opened, name):
    with pytest.raises(ModelError, match=r"does not pass the norms .* use by='activation'"):
        width.narrow(opened(name).model, 1, 3, PROMPTS, d_model=16, by="pca")


def test_a_part_of_a_run_cannot_have_another_stream(broad):
    wide = broad()
    for start, stop in ((1, 2), (2, 3), (0, 3), (1, 4)):
        with pytest.raises(ValueError, match=r"layers 1 to 2 have a stream of their own: .* \[1, 3\)"):
            width.widen(wide, start, stop, d_model=64)
    assert layout.sizes(width.widen(wide, 1, 3, d_model=64))[1].d_model == 64


def test_scales_of_gemma_are_one_and_their_weight(opened):
    assert weights.offset(layer(opened("gemma2").model, 0).input_layernorm) == 1
    assert weights.offset(layer(opened("llama").model, 0).input_layernorm) == 0
    assert weights.offset(layer(opened("gpt2").model, 0).ln_1) == 0
