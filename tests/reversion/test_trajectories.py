"""Several layers at once: exact on streams whose rate is known, nothing on walks, and what bad input does."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import network, ou_network, ragged, rng
from surgery import Stack, reversion
from surgery.instruments import known_networks
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.reversion import trajectories
from surgery.stats.sampling import Sampling


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def transformer():
    return Stack(known_networks.random_network(n_layers=4, norm="LN", dtype=torch.float64))


def measured(stack, tokens, batch_size=64, skip_massive=True, **options):
    sampling = Sampling(resamples=40, batch_size=batch_size, skip_massive=skip_massive)
    return trajectories.measure(stack, tokens, draws=2, sampling=sampling, **options)


# --- what is known exactly --------------------------------------------------------------------------------------------


def test_a_window_of_an_ou_stream_takes_back_what_its_layers_take_back_in_turn():
    kappas = np.array([0.1, 0.3, 0.5, -0.1, 0.05])
    moments = measured(Stack(ou_network(kappas)), known_networks.tokens(24, 8))
    frame = trajectories.windows(moments).set_index(["start", "stop"])
    for (start, stop), row in frame.iterrows():
        left = np.prod(1 - kappas[start:stop])
        for end in ("", "_low", "_high"):
            assert row[f"kappa{end}"] == pytest.approx(1 - left, abs=1e-6)
        assert row.growth == pytest.approx(abs(1 - left), abs=1e-6)
        steps = np.concatenate([[1.0], np.cumprod(1 - kappas[start:stop])])
        assert row.variance_ratio == pytest.approx((1 - left) ** 2 / (np.diff(steps) ** 2).sum(), abs=1e-6)
    assert frame.loc[(2, 3), "half_life"] == pytest.approx(1)
    # nothing random in it: each token goes straight to the mean, so its steps all have one direction
    assert frame.loc[(0, 3), "variance_ratio"] > 2


def test_one_phi_for_all_layers_of_an_even_ou_stream():
    moments = measured(Stack(ou_network([0.2] * 6)), known_networks.tokens(24, 8))
    own = trajectories.panel(moments, first_layer=0).query("series == 'model'").set_index("span")
    for name in ("pooled", "weighted"):
        np.testing.assert_allclose(own[name], 0.8, atol=1e-6)
    np.testing.assert_allclose(own["kappa_ou"], -math.log(0.8), atol=1e-6)
    np.testing.assert_allclose(own["half_life"], math.log(2) / -math.log(0.8), atol=1e-5)
    assert own.loc["all", "within"] == pytest.approx(0.8, abs=1e-6)  # no shocks, so none to be wrong about
    assert own["transitions"].tolist() == [6, 2, 2, 2]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_layers_that_write_into_fresh_subspaces_are_a_random_walk(share):
    moments = measured(Stack(known_networks.mixed_network(share, n_layers=6)), known_networks.tokens(32, 8))
    frame = trajectories.windows(moments)
    assert frame.kappa.abs().max() < 1e-6
    np.testing.assert_allclose(frame.variance_ratio, 1, atol=1e-6)
    own = trajectories.panel(moments, first_layer=0).query("series == 'model'")
    np.testing.assert_allclose(own.pooled, 1, atol=1e-6)
    np.testing.assert_allclose(own.within, own.within_walk, atol=1e-6)


def test_a_layer_alone_reads_what_reversion_reads(transformer):
    tokens = known_networks.tokens(20, 9)
    layer = reversion.layers(transformer, tokens, nulls=False, causal=False, sampling=Sampling(resamples=40))
    frame = trajectories.windows(
        trajectories.measure(transformer, tokens, nulls=False, sampling=Sampling(resamples=40)), max_length=1
    )
    for name in ("kappa", "psi", "growth"):
        for end in ("", "_low", "_high"):
            np.testing.assert_allclose(frame[name + end], layer[name + end], rtol=1e-8)
    np.testing.assert_allclose(frame.variance_ratio, 1)


# --- nulls ------------------------------------------------------------------------------------------------------------


def test_the_walks_read_what_theory_says_of_walks(transformer):
    moments = trajectories.measure(transformer, known_networks.tokens(60, 12), draws=6)
    frame = trajectories.windows(moments)
    own = trajectories.panel(moments, first_layer=0).set_index(["series", "span"])
    for null in ("rotated", "token_shuffled"):
        assert frame[f"kappa_{null}"].abs().max() < 0.1
        longer = frame[frame.stop - frame.start > 1]
        assert (longer[f"variance_ratio_{null}"] - 1).abs().max() < 0.1
        row = own.loc[(null, "all")]
        assert row.pooled == pytest.approx(1, abs=0.05)
        assert row.within_excess_low < 0 < row.within_excess_high
    inside = (frame.kappa_rotated_low < 0) & (frame.kappa_rotated_high > 0)
    assert inside.mean() > 0.8


def test_a_short_panel_with_means_reads_reversion_where_there_is_none():
    # Nickell: that is what within_walk is there for
    moments = measured(Stack(known_networks.parallel_network(n_layers=6)), known_networks.tokens(32, 8))
    row = trajectories.panel(moments, first_layer=0).query("series == 'model' and span == 'all'").iloc[0]
    assert row.within < 0.8
    assert abs(row.within_excess) < 1e-6
    assert row.half_panel > row.within


def test_layers_that_undo_each_other_and_layers_that_agree():
    turn = torch.zeros(16, 16, dtype=torch.float64)
    turn[8:, :8] = torch.eye(8)  # the first half of the stream is written into the second, or taken out of it
    embedding = torch.cat(
        [torch.randn(known_networks.D_VOCAB, 8, generator=rng()), torch.zeros(known_networks.D_VOCAB, 8)], 1
    )
    undone, agreed = (
        trajectories.windows(measured(Stack(network([turn, sign * turn], embedding)), known_networks.tokens(24, 8)))
        .set_index(["start", "stop"])
        .loc[(0, 2), ["variance_ratio", "variance_ratio_excess_token_shuffled_high", "kappa"]]
        for sign in (-1, 1)
    )
    assert undone.variance_ratio == pytest.approx(0, abs=1e-9)
    assert undone.variance_ratio_excess_token_shuffled_high < -0.5
    assert agreed.variance_ratio == pytest.approx(2, abs=1e-9)
    assert agreed.kappa == pytest.approx(0, abs=1e-9)


def test_the_correlation_of_shocks_is_the_mean_over_all_pairs_of_tokens(transformer):
    tokens = known_networks.tokens(5, 6)
    tokens[3:] = tokens[2]  # three prompts alike: their shocks are the same
    shocks = np.diff(transformer.stream(tokens)[:, :, 1:].flatten(1, 2).numpy(), axis=0)
    shocks -= shocks.mean(1, keepdims=True)
    pairs = ~np.eye(shocks.shape[1], dtype=bool)
    every = [np.corrcoef(shocks[:, :, i].T)[pairs].mean() for i in range(shocks.shape[2])]
    assert trajectories.cross_correlation(transformer, tokens, 0) == pytest.approx(np.mean(every), rel=1e-6)
    assert math.isnan(trajectories.cross_correlation(transformer, tokens, 0, 1))


# --- coordinates, corpora, bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", ["normalised", "principal", "logits"])
def test_every_coordinate_has_its_windows(transformer, coordinates):
    tokens = known_networks.tokens(20, 9)
    moments = measured(transformer, tokens, coordinates=coordinates)
    frame = trajectories.windows(moments, max_length=1)
    layer = reversion.layers(transformer, tokens, nulls=False, coordinates=coordinates, sampling=Sampling(resamples=40))
    np.testing.assert_allclose(frame.kappa, layer.kappa, rtol=1e-8)
    assert (frame.coordinates == coordinates).all()
    assert set(trajectories.WINDOWS_COLUMNS) >= set(frame)
    assert set(trajectories.PANEL_COLUMNS) >= set(trajectories.panel(moments))


def test_padding_and_batches_change_nothing_but_the_partners(transformer):
    left, right = (trajectories.windows(measured(transformer, ragged(side))) for side in ("left", "right"))
    pd.testing.assert_frame_equal(left, right, rtol=1e-7, atol=1e-9)
    tokens = known_networks.tokens(20, 9)
    whole, split = (trajectories.windows(measured(transformer, tokens, batch_size=size)) for size in (64, 7))
    same = [name for name in whole if "token_shuffled" not in name and not name.startswith("kappa_excess")]
    pd.testing.assert_frame_equal(whole[same], split[same], rtol=1e-8)


def test_no_more_is_kept_of_a_long_corpus(transformer):
    tokens = known_networks.tokens(8, 5)
    short, long = (trajectories.measure(transformer, tokens.repeat(times, 1), nulls=False) for times in (40, 80))
    for moments in (short, long):
        (matrix,) = moments.matrices["model"]
        assert matrix.shape == (401, 5, 5)
    np.testing.assert_allclose(short.matrices["model"][0][0], long.matrices["model"][0][0], rtol=1e-9)
    assert (short.n_prompts, long.n_prompts) == (320, 640)


def test_one_prompt_has_numbers_without_intervals(transformer):
    moments = measured(transformer, known_networks.tokens(1, 12))
    frame, panel = trajectories.windows(moments), trajectories.panel(moments)
    assert frame.kappa.notna().all()
    assert frame.kappa_low.isna().all()
    assert panel.p.isna().all()


def test_two_layers_are_a_window_and_no_panel_of_the_later_ones():
    stack = Stack(known_networks.random_network(n_layers=2))
    moments = measured(stack, known_networks.tokens(12, 8))
    assert len(trajectories.windows(moments)) == 3
    assert trajectories.panel(moments).empty
    whole = trajectories.panel(moments, first_layer=0)
    assert whole.half_panel.isna().all()
    assert whole.within.notna().all()


def test_a_stream_that_does_not_vary_has_no_rate():
    model = network([torch.zeros(8, 8)] * 3, torch.ones(256, 8))
    moments = measured(Stack(model), known_networks.tokens(12, 6))
    frame = trajectories.windows(moments)
    assert frame[["kappa", "psi", "growth", "variance_ratio", "half_life"]].isna().all().all()
    assert trajectories.panel(moments)[["pooled", "within", "z", "p"]].isna().all().all()


def test_half_precision_is_read_in_double():
    full = Stack(known_networks.random_network(n_layers=3))
    half = Stack(known_networks.random_network(n_layers=3, dtype=torch.bfloat16))
    tokens = known_networks.tokens(24, 8)
    kappas = [trajectories.windows(measured(stack, tokens)).kappa for stack in (full, half)]
    np.testing.assert_allclose(kappas[0], kappas[1], atol=0.02)


def test_massive_tokens_are_left_out_and_counted():
    embedding = torch.randn(known_networks.D_VOCAB, 8, generator=rng())
    embedding[7, 3] = 1e5
    stack = Stack(network([-0.2 * torch.eye(8)] * 2, embedding))
    tokens = known_networks.tokens(24, 8)
    tokens[3, 4] = 7
    moments, all_of_them = measured(stack, tokens), measured(stack, tokens, skip_massive=False)
    assert moments.n_massive == int((tokens[:, 1:] == 7).sum()) > 0
    assert all_of_them.n_massive == 0
    np.testing.assert_allclose(trajectories.windows(moments, 1).kappa, 0.2, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"draws": 0}, "draws must be positive"), ({"coordinates": "polar"}, "no coordinates 'polar': choose one of raw")],
)
def test_impossible_wishes(transformer, options, says):
    with pytest.raises(ValueError, match=says):
        trajectories.measure(transformer, known_networks.tokens(4, 4), **options)


def test_a_window_of_no_layers_and_boundaries_outside(transformer):
    moments = trajectories.measure(
        transformer, known_networks.tokens(4, 4), nulls=False, sampling=Sampling(resamples=5)
    )
    with pytest.raises(ValueError, match="a window has 1 to 4 layers"):
        trajectories.windows(moments, 0)
    with pytest.raises(ValueError, match="boundaries are 0 <= in <= out <= 4"):
        trajectories.panel(moments, (3, 9))


def test_a_stream_that_is_not_finite_is_refused():
    model = known_networks.parallel_network()
    opened = Stack(model)
    with torch.no_grad():
        dict(model.named_parameters())["tok_embed._original_component.weight"].fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        trajectories.measure(opened, known_networks.tokens(4, 6))


def test_it_costs_what_the_docstring_says(transformer, monkeypatch):
    stack, seen = Stack(known_networks.random_network(n_layers=3)), []
    layer = Engine.layer
    monkeypatch.setattr(
        Engine, "layer", lambda engine, index, x, call: seen.append(index) or layer(engine, index, x, call)
    )
    for options, cost in (
        ({"nulls": False, "sampling": Sampling(resamples=5, skip_massive=False)}, 1),
        ({"draws": 3}, 5),
        ({"draws": 3, "untrained": stack}, 6),
    ):
        seen.clear()
        options = {"sampling": Sampling(resamples=5)} | options
        trajectories.measure(stack, Tokens.of(known_networks.tokens(4, 5)), **options)
        assert [seen.count(index) for index in range(3)] == [cost] * 3
