"""Clouds of lines with known noise give it back; lines without noise have none; nulls are random walks."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import network, ou_network, parameters, ragged, rng
from surgery import Stack, models
from surgery.corpus import bundled
from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.records import tables
from surgery.reversion import cloud
from surgery.reversion.cloud import NULLS, PUBLISHED, Clouds, Residuals, fit, growth, line, noise
from surgery.stats.bootstrap import rotation, weights
from surgery.stats.sampling import Sampling

SPREAD = torch.tensor([30.0, 15.0, 8.0, 4.0, 2.0])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def turn(d_model, seed):
    return rotation(torch.from_numpy(np.random.default_rng(seed).standard_normal((d_model, d_model))))


def simulated(rate, level, depths=7, rows=1000, seed=0, turned=True):
    """Lines that are stretched by ``exp(rate / 2)`` a layer, turned, and blurred: every pair of depths has noise of
    ``2 level exp(rate stop)`` per coordinate."""
    draw = rng(seed)
    place = SPREAD * torch.randn(rows, len(SPREAD), generator=draw)
    blur = math.sqrt(level) * torch.randn(depths, rows, len(SPREAD), generator=draw)
    factor = (rate * torch.arange(depths) / 2).exp()[:, None, None]
    stream = (factor * (place + blur)).double()
    return torch.stack([x @ turn(len(SPREAD), 10 + i) for i, x in enumerate(stream)]) if turned else stream


def read(stream, units=100, centred=True, pieces=1):
    clouds = Clouds(len(stream), stream.shape[-1])
    for part in stream.tensor_split(pieces, 1):
        clouds.add(part)
    residuals = Residuals(clouds.components(centred), units)
    unit = torch.arange(stream.shape[1]) % units
    for some, part in zip(unit.tensor_split(pieces), stream.tensor_split(pieces, 1)):
        residuals.add(some, part)
    return residuals


def explicit(residuals, stream, start, stop):
    """What the map leaves over, from the matrices."""
    found = residuals.components
    matrix = found.basis[stop] @ torch.diag(residuals.stretch(start, stop)) @ found.basis[start].T
    return stream[stop] - found.mean[stop] - (stream[start] - found.mean[start]) @ matrix.T


# --- simulated lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.18, 0.0, -0.1])
def test_the_rate_of_the_noise_is_recovered_within_its_interval(rate):
    covered = 0
    for seed in range(20):
        row = read(simulated(rate, 0.02, seed=seed)).fit(1, 6, weights(100, 200, seed))
        assert row["lambda"] == pytest.approx(rate, abs=0.02)
        assert row["alpha"] == pytest.approx(0.04, rel=0.15)
        covered += row["lambda_low"] < rate < row["lambda_high"]
    assert covered >= 16
    assert (row["r2"] > 0.95) is (rate != 0)
    assert abs(row["excess_kurtosis"]) < 0.1
    assert row["isotropy"] > 0.95
    assert row["n_pairs"] == 15


def test_lines_without_noise_have_none_and_no_rate():
    residuals = read(simulated(0.3, 0.0))
    draws = weights(100, 20)
    assert max(float(residuals.unexplained(*pair, draws).max()) for pair in combinations(range(7), 2)) < 1e-12
    row = residuals.fit(0, 6, draws)
    assert math.isnan(row["lambda"])
    assert math.isnan(row["alpha"])
    assert math.isnan(row["excess_kurtosis"])
    assert row["n_pairs"] == 0


def test_a_random_walk_with_growing_steps_has_a_rate_too():
    steps = (0.15 * torch.arange(7)).exp()[:, None, None] * torch.randn(7, 1000, 5, generator=rng()) / 10
    stream = (SPREAD * torch.randn(1000, 5, generator=rng(1)) + steps.cumsum(0)).double()
    assert read(stream).fit(1, 6, weights(100, 0))["lambda"] > 0.2


def test_the_residual_is_what_spreads_and_correlations_say():
    stream = simulated(0.2, 3.0, rows=200)
    residuals, draws = read(stream), weights(100, 0)
    y, variance = residuals.components.rotate(stream), residuals.components.variance
    for start, stop in combinations(range(7), 2):
        rho = (y[start] * y[stop]).mean(0) / (variance[start] * variance[stop]).sqrt()
        expected = 2 * variance[stop] * (1 - rho)
        left = explicit(residuals, stream, start, stop)
        torch.testing.assert_close(left.square().mean(0).sum(), expected.sum())
        assert residuals.noise(start, stop, draws).item() == pytest.approx(float(expected.mean()))
        assert residuals.unexplained(start, stop, draws).item() == pytest.approx(
            float(expected.sum() / variance[stop].sum())
        )
        if stop == start + 1:
            torch.testing.assert_close(residuals.components.step[start], expected)
            assert (rho >= 0).all()


def test_components_are_principal_and_neither_batches_nor_turns_matter():
    stream = simulated(0.2, 0.5, turned=False)
    draws = weights(100, 10)
    whole = read(stream)
    centred = stream - stream.mean(1, keepdim=True)
    torch.testing.assert_close(whole.components.variance.sqrt(), torch.linalg.svdvals(centred) / math.sqrt(1000))
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    turned = torch.stack([x @ turn(5, i) @ mirror for i, x in enumerate(stream)])
    for other in (read(stream, pieces=7), read(turned, pieces=3), read(turned + 100)):
        assert other.fit(0, 6, draws) == pytest.approx(whole.fit(0, 6, draws), rel=1e-6)


def test_noise_in_one_coordinate_is_not_isotropic():
    stream = simulated(0.0, 0.0, turned=False)
    stream[..., 2] += 0.3 * torch.randn(7, 1000, generator=rng(3))
    row = read(stream).fit(0, 6, weights(100, 0))
    assert row["isotropy"] == pytest.approx(1 / 5, abs=0.01)
    assert row["top_quarter"] == pytest.approx(float((SPREAD**2)[:2].sum() / (SPREAD**2).sum()), abs=0.01)


def test_kurtosis_is_that_of_each_component_by_itself():
    stream = simulated(0.2, 0.0, turned=False)
    tails = torch.randn(7, 1000, 5, generator=rng(3)).double() ** 3 / 20
    residuals = read(stream + tails)
    found = residuals.kurtosis(2, weights(100, 50))
    left = explicit(residuals, stream + tails, 2, 3) @ residuals.components.basis[3]
    expected = (left**4).mean(0) / (left**2).mean(0) ** 2 - 3
    assert found[0].item() == pytest.approx(float(expected.mean()))
    assert found[0] > 3
    assert found[1:].std() > 0.1


def test_uncentred_clouds_are_read_from_the_origin():
    stream = simulated(0.1, 0.2, turned=False)
    near, far = (read(stream + shift, centred=False).fit(1, 6, weights(100, 0)) for shift in (0, 1000))
    assert far["unexplained"] < near["unexplained"] / 100  # the mean is most of the stream and is carried on
    still = read(stream - stream.mean(1, keepdim=True), centred=False).fit(1, 6, weights(100, 0))
    assert still == pytest.approx(read(stream).fit(1, 6, weights(100, 0)), rel=1e-6, nan_ok=True)


def test_fewer_lines_than_dimensions_have_fewer_components():
    stream = torch.randn(4, 6, 20, generator=rng()).double()
    residuals = read(stream, units=6)
    assert residuals.components.rank == [5] * 4
    row = residuals.fit(0, 3, weights(6, 20))
    assert np.isfinite(list(row.values())).all()
    assert row["n_components"] == 5


def test_a_component_without_spread_is_not_stretched():
    stream = torch.zeros(2, 50, 3, dtype=torch.float64)
    stream[0, :, 0], stream[1] = torch.randn(50, generator=rng()), torch.randn(50, 3, generator=rng(1))
    residuals = read(stream, units=50)
    assert residuals.components.rank == [1, 3]
    assert residuals.stretch(0, 1)[1:].tolist() == [0, 0]
    left = explicit(residuals, stream, 0, 1)
    assert residuals.noise(0, 1, weights(50, 0)).item() == pytest.approx(float(left.square().mean()))


@pytest.mark.parametrize(("x", "y"), [([], []), ([3.0], [1.0]), ([2.0, 2.0], [1.0, 4.0])])
def test_a_line_needs_two_places(x, y):
    _, slope, r2 = line(torch.tensor(x), torch.tensor([y, y]).reshape(2, len(x)))
    assert slope.isnan().all()
    assert r2.isnan().all()


def test_a_line_is_that_of_least_squares():
    x, y = torch.arange(6).double(), torch.randn(3, 6, generator=rng()).double()
    intercept, slope, r2 = line(x, y)
    for i, row in enumerate(y.numpy()):
        expected = np.polyfit(x.numpy(), row, 1)
        assert [slope[i].item(), intercept[i].item()] == pytest.approx(expected.tolist())
        assert r2[i].item() == pytest.approx(np.corrcoef(x.numpy(), row)[0, 1] ** 2)


# --- networks ---------------------------------------------------------------------------------------------------------


def test_an_ou_stream_is_a_cloud_that_shrinks_without_noise():
    stack = Stack(ou_network([0.1, 0.3, -0.2], d_model=8))
    frame = noise(stack, known_networks.tokens(64, 6), sampling=Sampling(resamples=20))
    assert frame.unexplained.abs().max() < 1e-12
    assert len(frame) == 6
    row = fit(stack, known_networks.tokens(64, 6), nulls=False, sampling=Sampling(resamples=20)).iloc[0]
    assert row.n_pairs == 0
    assert math.isnan(row["lambda"])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_series_and_parallel_alike_grow_by_what_layers_add(share):
    stack, ids = Stack(known_networks.mixed_network(share)), known_networks.tokens(24, 8)
    frame = growth(stack, ids, sampling=Sampling(resamples=50))
    norm = stack.stream(ids)[:, :, 1:].double().norm(dim=-1).log().mean((1, 2)).exp()
    np.testing.assert_allclose(frame.norm, norm[:-1])
    np.testing.assert_allclose(frame.norm_growth, norm[1:] / norm[:-1])
    assert (frame.norm_growth_low > 1).all()
    slope = np.polyfit(np.arange(1, 7), np.log(norm[1:]), 1)[0]
    np.testing.assert_allclose(frame.norm_growth_fitted, np.exp(slope))


@pytest.mark.parametrize("factor", [1.045, 0.9])
def test_exponential_growth_is_recovered_exactly(factor):
    stack = Stack(ou_network([1 - factor] * 6, mean=0.0))
    frame = growth(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=20))
    for name in ("norm_growth", "norm_growth_fitted"):
        for end in ("", "_low", "_high"):
            np.testing.assert_allclose(frame[name + end], factor, rtol=1e-6)
    np.testing.assert_allclose(frame.norm_growth_r2, 1)


@pytest.mark.parametrize("null", NULLS)
def test_nulls_keep_every_update_but_not_where_it_goes(null):
    stack = Stack(known_networks.random_network(n_layers=3, d_model=16))
    ensemble = Ensemble(Tokens.of(known_networks.tokens(40, 6)), Sampling(batch_size=16))
    real, walk, again = (
        torch.cat([x for _, x in cloud._lines(stack, ensemble, which)], 1) for which in (None, null, null)
    )
    assert torch.equal(walk, again)
    torch.testing.assert_close(walk[0], real[0])
    updates, moved = real.diff(dim=0), walk.diff(dim=0)
    size, other = updates.norm(dim=-1), moved.norm(dim=-1)
    if null == "rotated":
        torch.testing.assert_close(other, size)
        torch.testing.assert_close(torch.cdist(moved, moved), torch.cdist(updates, updates), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(other.sort(1).values, size.sort(1).values)
    assert ((updates - moved).norm(dim=-1) > 1e-3 * size).double().mean() > 0.99
    cosine = torch.nn.functional.cosine_similarity(updates - updates.mean(1, keepdim=True), moved, dim=-1)
    assert cosine.mean().abs() < 0.1


def test_the_nulls_of_a_deterministic_map_are_noisy():
    spread = torch.randn(256, 6, generator=rng()) * torch.tensor([9.0, 7.0, 5.0, 3.0, 2.0, 1.0])
    stack = Stack(network([torch.eye(6) / 3] * 4, spread))
    frame = fit(stack, known_networks.tokens(200, 6), untrained=stack, sampling=Sampling(resamples=20)).set_index(
        "network"
    )
    assert frame.index.tolist() == ["model", *NULLS, "untrained"]
    assert frame.unexplained["model"] < 1e-12
    assert (frame.unexplained_low[list(NULLS)] > 0.05).all()
    assert (frame["lambda_low"][list(NULLS)] > 0.1).all()
    pd.testing.assert_series_equal(frame.loc["model"], frame.loc["untrained"], check_names=False)


def test_first_and_last_choose_the_pairs():
    stack, ids = Stack(known_networks.random_network(n_layers=4, d_model=16)), known_networks.tokens(60, 6)
    pairs = noise(stack, ids, sampling=Sampling(resamples=0))
    for first, last in ((1, 4), (0, 3), (2, 4)):
        row = fit(stack, ids, first=first, last=last, nulls=False, sampling=Sampling(resamples=0)).iloc[0]
        chosen = pairs[(pairs.start >= first) & (pairs.stop <= last)]
        slope, intercept = np.polyfit(chosen.stop, np.log(chosen.noise), 1)
        assert [row["lambda"], row.alpha] == pytest.approx([slope, np.exp(intercept)])
        assert row.unexplained == pytest.approx(chosen.unexplained.mean())
        assert row.isotropy == pytest.approx(chosen.isotropy.mean())
        assert row.excess_kurtosis == pytest.approx(chosen.excess_kurtosis.mean())
        assert row.n_pairs == len(chosen)


def test_two_layers_have_one_pair_and_no_line_but_from_the_embedding_on():
    stack, ids = Stack(known_networks.random_network(n_layers=2, d_model=16)), known_networks.tokens(60, 6)
    late, all_depths = (
        fit(stack, ids, first=first, nulls=False, sampling=Sampling(resamples=20)).iloc[0] for first in (1, 0)
    )
    assert math.isnan(late["lambda"])
    assert late.n_pairs == 1
    assert all_depths["lambda_low"] < all_depths["lambda"] < all_depths["lambda_high"]


def test_lines_are_those_of_last_tokens_wherever_padding_lies(monkeypatch):
    stack = Stack(known_networks.random_network(n_layers=3, d_model=16))
    run, padding = Engine.layer, None

    def filled(engine, index, x, call):
        return run(engine, index, x.nan_to_num(), call).masked_fill(padding, math.nan)

    right, left = ragged("right"), ragged("left")
    plain = noise(stack, right, sampling=Sampling(resamples=20)), growth(stack, right, sampling=Sampling(resamples=20))
    monkeypatch.setattr(Engine, "layer", filled)
    for tokens in (right, left):
        padding = ~tokens.mask.unsqueeze(-1)
        for measure, expected in zip((noise, growth), plain):
            pd.testing.assert_frame_equal(measure(stack, tokens, sampling=Sampling(resamples=20)), expected, rtol=1e-3)
    assert (plain[0].n_tokens == 12).all()
    assert plain[0].enough[0] == "no: 12 lines in 16 dimensions, give 48 or more"
    padding = ~right.mask.unsqueeze(-1)
    assert (noise(stack, right, every_token=True, sampling=Sampling(resamples=20)).n_tokens == sum(range(1, 13))).all()


def test_half_precision_reads_nearly_the_same():
    half, full = (
        fit(
            Stack(known_networks.random_network(3, 16, dtype=dtype)),
            known_networks.tokens(96, 6),
            nulls=False,
            sampling=Sampling(resamples=20),
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half["lambda"][0] == pytest.approx(full["lambda"][0], abs=0.05)
    assert half.unexplained[0] == pytest.approx(full.unexplained[0], rel=0.1)


def test_a_constant_stream_has_no_noise_and_nothing_to_explain():
    stack = Stack(network([torch.eye(8)] * 3, torch.randn(1, 8, generator=rng()).expand(256, 8)))
    frame = noise(stack, known_networks.tokens(6, 5), sampling=Sampling(resamples=20))
    assert (frame.noise == 0).all()
    assert frame[["unexplained", "excess_kurtosis", "isotropy"]].isna().all(axis=None)
    assert (frame.n_components == 0).all()
    row = fit(stack, known_networks.tokens(6, 5), sampling=Sampling(resamples=20)).iloc[0]
    assert row[["lambda", "alpha", "r2", "unexplained", "top_quarter"]].isna().all()


def test_one_prompt_has_no_interval_and_two_lines_are_no_cloud():
    stack = Stack(known_networks.random_network(n_layers=3, d_model=16))
    one = known_networks.tokens(1, 12)
    frame = noise(stack, one, every_token=True)
    assert frame.noise.notna().all()
    assert frame[["noise_low", "noise_high"]].isna().all(axis=None)
    assert growth(stack, one).norm_growth_low.isna().all()
    with pytest.raises(ValueError, match=r"^a cloud needs 3 lines at the least and better 48 \(3 d_model\), there are"):
        noise(stack, known_networks.tokens(2, 6))


@pytest.mark.parametrize("measure", [noise, fit, growth])
def test_every_column_is_explained_and_comes_back(measure, tmp_path):
    stack = Stack(known_networks.random_network(n_layers=3, d_model=16))
    frame = measure(stack, known_networks.tokens(50, 6), sampling=Sampling(resamples=20))
    path = tables.write(frame, tmp_path / "cloud.csv", {}, cloud.COLUMNS)
    pd.testing.assert_frame_equal(tables.read(path), frame)
    assert set(frame) <= set(cloud.COLUMNS)


def test_what_cannot_be_measured_is_refused_in_a_sentence():
    stack, ids = Stack(known_networks.random_network(n_layers=3, d_model=16)), known_networks.tokens(6, 5)
    with pytest.raises(ValueError, match=r"^there is no null 'random': choose one of token_shuffled, rotated, or"):
        noise(stack, ids, null="random")
    for bad in ({"first": 3}, {"first": -1}, {"first": 2, "last": 2}, {"last": 4}):
        with pytest.raises(ValueError, match=r"^depths go from 0 to 3 and first before last"):
            fit(stack, ids, **bad)
    with pytest.raises(ValueError, match=r"^first is a depth before the last, 3: 0 to 2, got 3$"):
        growth(stack, ids, first=3)
    with torch.no_grad():
        parameters(stack.model)["layers.1.mlp.fc_out.weight"][0, 0] = math.nan
    for skip_massive in (True, False):
        with pytest.raises(ValueError, match=r"^the stream.* is not finite at layer 1: "):
            noise(stack, ids, sampling=Sampling(skip_massive=skip_massive))


def test_tokens_of_massive_activations_are_left_out_of_every_network():
    embedding = torch.randn(256, 8, generator=rng())
    embedding[7, 3] = 1e6
    tame = torch.randn(256, 8, generator=rng(1))  # the model's massive tokens are left out here too
    stack, other = (Stack(network([turn(8, 0).float() / 4] * 3, found)) for found in (embedding, tame))
    ids = torch.randint(8, 256, (40, 6), generator=rng())
    ids[5, -1] = ids[6, 2] = 7
    frame = fit(stack, ids, untrained=other, sampling=Sampling(resamples=20))
    assert (frame.n_tokens == 39).all()
    assert (frame["top_quarter"] < 0.7).all()
    assert (fit(stack, ids, nulls=False, sampling=Sampling(resamples=20, skip_massive=False)).n_tokens == 40).all()
    assert (noise(stack, ids, every_token=True, sampling=Sampling(resamples=20)).n_tokens == 198).all()
    without, whole = (
        growth(stack, ids, sampling=Sampling(resamples=20, skip_massive=skip)).norm[0] for skip in (True, False)
    )
    assert without < whole


@pytest.mark.parametrize("skip_massive", [False, True])
def test_it_costs_what_the_docstrings_say(monkeypatch, skip_massive):
    stack, seen = Stack(known_networks.random_network(n_layers=3, d_model=16)), []
    layer = Engine.layer
    monkeypatch.setattr(
        Engine, "layer", lambda engine, index, x, call: seen.append(index) or layer(engine, index, x, call)
    )
    for measure, options, cost in ((noise, {}, 2), (fit, {"untrained": stack}, 8), (growth, {}, 1)):
        seen.clear()
        tokens, sampling = known_networks.tokens(8, 5), Sampling(resamples=5, skip_massive=skip_massive)
        measure(stack, tokens, sampling=sampling, **options)
        assert [seen.count(index) for index in range(3)] == [cost + skip_massive] * 3


def test_a_real_model_and_what_is_published():
    stack = Stack(models.load("babel"))
    frame = fit(stack, stack.tokens(bundled.prompts(60)), last=4, nulls=False, sampling=Sampling(resamples=20))
    assert 0 < frame.unexplained[0] < 2
    assert {key for numbers in PUBLISHED.values() for key in numbers} <= set(cloud.COLUMNS)
