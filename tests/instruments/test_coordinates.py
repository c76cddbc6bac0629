"""Coordinates keep what they claim to keep: inner products, sums, and the part that random updates leave in place."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import network, ou_network, ragged, rng
from surgery import Stack, models
from surgery.corpus import bundled
from surgery.instruments import known_networks
from surgery.instruments.coordinates import COORDINATES, MEANINGS, coordinate_map, mechanical
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import frozen_head
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling

KINDS = ["gpt2", "llama", "gptj", "native-ln", "native-gated"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def opened(stack, tokens, batch_size=64):
    ensemble = Ensemble(Tokens.of(tokens), Sampling(batch_size=batch_size))
    return ensemble, stack.context(ensemble.tokens)


def gram(x):
    flat = x.flatten(0, -2)
    return flat @ flat.T


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_logit_coordinates_have_the_inner_products_of_centred_logits(load, name):
    stack = Stack(load(name, dtype=torch.float64))
    ensemble, context = opened(stack, torch.randint(4, 90, (3, 6), generator=rng()))
    stream = stack.stream(context)
    found = coordinate_map("logits", stack, ensemble)
    for x in (stream[0], stream[2], stream[-1]):
        with frozen_head(stack, stream[-1].flatten(0, 1)):
            explicit = stack.readout(x.flatten(0, 1)) - stack.readout(torch.zeros_like(x).flatten(0, 1))
        explicit = (explicit - explicit.mean(-1, keepdim=True)).double()  # the native ones run in single precision
        expected = gram(explicit)
        torch.testing.assert_close(gram(found.map(x, context)), expected, rtol=0, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_of_the_clean_final_stream_they_differ_as_its_live_logits_do(load, name):
    stack = Stack(load(name, dtype=torch.float64))
    ensemble, context = opened(stack, torch.randint(4, 90, (3, 6), generator=rng()))
    final = stack.stream(context)[-1]
    z, live = coordinate_map("logits", stack, ensemble).map(final, context), stack.readout(final)
    live = live - live.mean(-1, keepdim=True)
    expected = torch.cdist(live.flatten(0, 1), live.flatten(0, 1))
    torch.testing.assert_close(torch.cdist(z.flatten(0, 1), z.flatten(0, 1)), expected, rtol=1e-4, atol=1e-4)


def test_without_a_final_norm_they_are_the_centred_logits_themselves():
    stack = Stack(known_networks.serial_network(n_layers=2, dtype=torch.float64))
    ensemble, context = opened(stack, known_networks.tokens(4, 6))
    logits = stack.readout(context.x0)
    logits = logits - logits.mean(-1, keepdim=True)
    found = coordinate_map("logits", stack, ensemble).map(context.x0, context)
    torch.testing.assert_close(gram(found), gram(logits))


@pytest.mark.parametrize("batch_size", [2, 64])
def test_every_batch_has_its_own_denominators(batch_size):
    stack = Stack(known_networks.random_network(n_layers=2, d_model=16))
    ids = known_networks.tokens(4, 6)
    ensemble, whole = opened(stack, ids)
    found = coordinate_map("logits", stack, ensemble)
    expected = found.map(whole.x0, whole)
    for _ in range(2):
        parts = [found.map(context.x0, context) for context in map(stack.context, ids.split(batch_size))]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-5)


def test_one_direction_that_all_logits_share_is_not_read(load):
    stack = Stack(load("gpt2", dtype=torch.float64))  # LayerNorm: the mean over d_model is taken away
    ensemble, context = opened(stack, torch.randint(4, 90, (2, 4), generator=rng()))
    found = coordinate_map("logits", stack, ensemble)
    z = found.map(context.x0, context)
    assert z.shape[-1] == stack.d_model - 1
    torch.testing.assert_close(found.map(context.x0 + 5, context), z, rtol=1e-6, atol=1e-6)


def test_a_head_that_caps_its_logits_is_refused(load):
    stack = Stack(load("gemma2"))
    ensemble, _ = opened(stack, torch.randint(4, 90, (2, 4), generator=rng()))
    with pytest.raises(ValueError, match="it caps its logits"):
        coordinate_map("logits", stack, ensemble)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COORDINATES)
def test_maps_are_linear_where_they_say_so_and_nowhere_else(name):
    stack = Stack(known_networks.random_network(n_layers=3, d_model=24, norm="LN"))
    ensemble, context = opened(stack, known_networks.tokens(6, 5))
    x = stack.stream(context)[1].double()
    u = torch.randn(x.shape, generator=rng(), dtype=torch.float64)
    found = coordinate_map(name, stack, ensemble)
    together, apart = found.map(x + 3 * u, context), found.map(x, context) + 3 * found.map(u, context)
    assert torch.allclose(together, apart, rtol=1e-9, atol=1e-9) is found.linear
    assert found.meaning == MEANINGS[name]
    assert together.dtype == torch.float64


@pytest.mark.parametrize("name", COORDINATES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_hold_nan_and_is_nobodys(name, side, monkeypatch):
    stack = Stack(known_networks.random_network(n_layers=2, d_model=16))
    tokens = ragged(side)
    ensemble, context = opened(stack, tokens)
    expected = coordinate_map(name, stack, ensemble).map(context.x0, context)[tokens.mask]
    padding, run = ~tokens.mask.unsqueeze(-1), Engine.layer

    def filled(engine, index, x, call):
        return run(engine, index, x.nan_to_num(), call).masked_fill(padding, math.nan)

    monkeypatch.setattr(Engine, "layer", filled)
    x = context.x0.masked_fill(padding, math.nan)
    found = coordinate_map(name, stack, ensemble).map(x, context)[tokens.mask]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COORDINATES)
def test_half_precision_is_mapped_in_double(name):
    ids = known_networks.tokens(8, 6)
    half, full = (Stack(known_networks.random_network(2, 16, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    found, expected = (
        gram(coordinate_map(name, stack, opened(stack, ids)[0]).map(stack.context(ids).x0, stack.context(ids)))
        for stack in (half, full)
    )
    assert found.dtype == torch.float64
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_coordinate_nobody_knows_is_refused():
    stack = Stack(known_networks.random_network(n_layers=1))
    with pytest.raises(ValueError, match=r"^there are no coordinates 'log': choose one of raw, normalised"):
        coordinate_map("log", stack, opened(stack, known_networks.tokens(2, 4))[0])


# --- normalised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centres", [False, True])
def test_a_normalised_stream_is_root_d_long_and_knows_no_scale(centres):
    stack = Stack(known_networks.random_network(2, 16, norm="LN" if centres else "RMS"))
    ensemble, context = opened(stack, known_networks.tokens(4, 6))
    found = coordinate_map("normalised", stack, ensemble)
    z = found.map(context.x0, context)
    torch.testing.assert_close(z.norm(dim=-1), torch.full((4, 6), 4.0, dtype=torch.float64))
    torch.testing.assert_close(found.map(1e-20 * context.x0.double(), context) / z, torch.ones_like(z), atol=1, rtol=0)
    torch.testing.assert_close(found.map(100 * context.x0.double(), context), z)
    assert (float(z.mean(-1).abs().max()) < 1e-12) is centres
    assert torch.equal(found.map(0 * context.x0, context), torch.zeros(4, 6, 16, dtype=torch.float64))


@pytest.mark.parametrize("r", [0.1, 0.3, 0.6, 1.5])
def test_random_updates_revert_a_normalised_stream_mechanically_and_a_raw_one_not(r):
    d_model = 400
    stack = Stack(network([torch.zeros(d_model, d_model)], torch.randn(256, d_model, generator=rng())))
    ensemble, context = opened(stack, known_networks.tokens(32, 8))
    x = context.x0
    u = torch.randn(x.shape, generator=rng(1), dtype=x.dtype)
    u = u - (u * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True) * x
    u = r * x.norm(dim=-1, keepdim=True) * u / u.norm(dim=-1, keepdim=True)

    def kappa(name):
        found = coordinate_map(name, stack, ensemble)
        before, after = (found.map(y, context).flatten(0, 1) for y in (x, x + u))
        before, after = before - before.mean(0), after - after.mean(0)
        return 1 - float((before * after).sum() / before.square().sum())

    assert kappa("normalised") == pytest.approx(mechanical(r), abs=2e-3)
    assert abs(kappa("raw")) < 2e-3


def test_mechanical_reversion_takes_numbers_columns_and_tensors():
    assert mechanical(0.3) == pytest.approx(1 - 0.958, abs=1e-3)
    assert mechanical(0.0) == 0
    expected = [mechanical(r) for r in (0.1, 2.0)]
    for kind in (np.array, pd.Series, lambda values: torch.tensor(values, dtype=torch.float64)):
        assert mechanical(kind([0.1, 2.0])).tolist() == pytest.approx(expected)


# --- principal --------------------------------------------------------------------------------------------------------


def test_principal_components_are_orthonormal_and_the_best_of_the_pooled_stream():
    stack = Stack(known_networks.random_network(n_layers=3, d_model=12))
    ensemble, context = opened(stack, known_networks.tokens(24, 6))
    stream = stack.stream(context)[:, ensemble.mask].double()
    cloud = stream - stream.mean(1, keepdim=True)
    shares = cloud / cloud.square().sum((1, 2), keepdim=True).sqrt()
    found = coordinate_map("principal", stack, ensemble, components=5)
    basis = found.map(torch.eye(12).unsqueeze(0), context)[0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    singular = torch.linalg.svdvals(shares.flatten(0, 1))
    torch.testing.assert_close((shares @ basis).flatten(0, 1).norm(dim=0), singular[:5])


def test_a_layer_a_thousand_times_as_large_does_not_decide_alone():
    grow = torch.diag(torch.tensor([0.0, 0.0, 0.0, 999.0]))  # the last stream is all fourth coordinate
    embedding = torch.randn(256, 4, generator=rng()) * torch.tensor([3.0, 2.0, 0.1, 1.0])
    stack = Stack(network([torch.zeros(4, 4), grow], embedding))
    ensemble, context = opened(stack, known_networks.tokens(64, 8))
    basis = coordinate_map("principal", stack, ensemble, components=2).map(torch.eye(4).unsqueeze(0), context)[0]
    assert sorted(basis.abs().argmax(0).tolist()) == [0, 3]


def test_of_a_stream_with_few_dimensions_there_are_few_components():
    embedding = torch.zeros(256, 8)
    embedding[:, 2:4] = torch.randn(256, 2, generator=rng())
    stack = Stack(network([torch.zeros(8, 8)], embedding))
    ensemble, context = opened(stack, known_networks.tokens(16, 6))
    assert coordinate_map("principal", stack, ensemble).map(context.x0, context).shape[-1] == 2


def test_a_constant_stream_has_none_and_a_count_of_none_is_refused():
    stack = Stack(network([torch.zeros(8, 8)], torch.randn(1, 8, generator=rng()).expand(256, 8)))
    ensemble, _ = opened(stack, known_networks.tokens(4, 6))
    with pytest.raises(ValueError, match="the same at all 20 tokens"):
        coordinate_map("principal", stack, ensemble)
    stack = Stack(ou_network([0.1]))
    with pytest.raises(ValueError, match=r"^components must be positive, got 0$"):
        coordinate_map("principal", stack, opened(stack, known_networks.tokens(4, 6))[0], components=0)


def test_coordinates_of_a_real_model():
    stack = Stack(models.load("babel"))
    ensemble, context = opened(stack, stack.tokens(bundled.prompts(4)))
    widths = [coordinate_map(name, stack, ensemble).map(context.x0, context).shape[-1] for name in COORDINATES]
    assert widths[:3] == [stack.d_model, stack.d_model, 16]
    assert 16 < widths[3] <= stack.d_model
