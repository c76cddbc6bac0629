import math

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import network, ou_network, ragged, rng
from surgery import Stack, models
from surgery.corpus import bundled
from surgery.instruments import known_networks
from surgery.models.engine import Engine
from surgery.reversion.directions import COLUMNS, RIDGES, Regression, Spectrum, layers, summary, verdict
from surgery.stats.bootstrap import described, weights
from surgery.stats.drift import Step
from surgery.stats.sampling import Sampling

MEASURES = ("decay", "modulus", "share", "pc_kappa", "pc_share", "share_x", "share_u")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def every_token_once(n_prompts=32, length=8, seed=0):
    """Random tokens of which none comes twice, so that they are as many independent draws; the first is left out."""
    ids = torch.randperm(n_prompts * length, generator=rng(seed)).view(n_prompts, length)
    return torch.cat([torch.zeros(n_prompts, 1, dtype=torch.long), ids], 1)


def noisy_network(drift, noise=1.0, seed=0):
    """``u = -drift x + noise``: the noise of every token is kept in coordinates of its own, too small to be principal.

    It follows neither from ``x`` nor from anything that the top components show.
    """
    d = len(drift)
    cloud = normal(256, 2 * d, seed=seed)
    embedding = torch.cat([torch.linalg.qr(cloud[:, :d])[0] * 16 + 3, cloud[:, d:] / 100], 1)
    layer = torch.zeros(2 * d, 2 * d, dtype=torch.float64)
    layer[:d, :d], layer[:d, d:] = -drift, noise * 100 * torch.eye(d)
    return Stack(network([layer], embedding))


# --- what is known beforehand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [None, 0.0])
def test_the_drift_of_linear_layers_is_recovered_though_it_is_not_normal(ridge):
    d = 6
    drifts = [0.4 * torch.eye(d) + 0.3 * normal(d, d, seed=seed).triu() for seed in range(2)]
    drifts.append(0.3 * normal(d, d, seed=2))  # some of its eigenvalues are complex
    mean = torch.full((d,), 2.0, dtype=torch.float64)
    stack = Stack(network([-a for a in drifts], mean + normal(256, d), [a @ mean for a in drifts]))
    frame = layers(
        stack, known_networks.tokens(24, 8), components=d, ridge=ridge, sampling=Sampling(resamples=20, batch_size=10)
    )
    assert len(frame) == 3 * d
    for layer, a in enumerate(drifts):
        rows = frame[frame.layer == layer]
        left = np.linalg.eigvals(np.eye(d) - a.numpy())
        left = left[np.argsort(abs(left))]
        assert rows["rank"].tolist() == list(range(d))
        for end in ("", "_low", "_high"):
            np.testing.assert_allclose(rows[f"decay{end}"], np.linalg.eigvalsh((a + a.T) / 2)[::-1], atol=1e-7)
            np.testing.assert_allclose(rows[f"modulus{end}"], abs(left), atol=1e-7)
            np.testing.assert_allclose(rows[f"R2{end}"], 1, atol=1e-7)
        np.testing.assert_allclose(rows.angle, abs(np.angle(left)), atol=1e-7)
        np.testing.assert_allclose(rows.share.sum(), 1)
        np.testing.assert_allclose(rows.share_u, 1)
        assert (rows.ridge == 0).all()
    assert frame.angle[frame.layer == 2].between(0.01, math.pi - 0.01).any()


def test_in_fewer_directions_it_is_the_drift_within_the_principal_components():
    d, k = 8, 3
    a, spread = 0.4 * normal(d, d), torch.tensor([9.0, 6, 4, 2, 1, 0.5, 0.3, 0.1], dtype=torch.float64)
    stack, tokens = Stack(network([-a], 5 + normal(256, d, seed=1) * spread)), known_networks.tokens(24, 8)
    frame = layers(stack, tokens, components=k, ridge=0.0, sampling=Sampling(resamples=0))
    x = stack.stream(tokens)[0, :, 1:].flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    basis = vectors.T.flip(0)[:k]
    within = basis @ a @ basis.T
    np.testing.assert_allclose(frame.pc_kappa, within.diagonal(), atol=1e-9)
    np.testing.assert_allclose(frame.pc_share, values.flip(0)[:k] / values.sum(), rtol=1e-9)
    np.testing.assert_allclose(frame.share_x, values.flip(0)[:k].sum() / values.sum(), rtol=1e-9)
    update = a @ torch.cov(x.T, correction=0) @ a.T
    np.testing.assert_allclose(frame.share_u, (basis @ update @ basis.T).trace() / update.trace(), rtol=1e-9)
    np.testing.assert_allclose(frame.decay, torch.linalg.eigvalsh((within + within.T) / 2).flip(0), atol=1e-9)


def test_each_direction_is_told_by_its_own_verdict():
    d = 4
    stack = noisy_network(torch.diag(torch.tensor([0.5, -0.4, 0.0, 0.0], dtype=torch.float64)), noise=0.1)
    frame = layers(stack, every_token_once(), components=d, sampling=Sampling(resamples=200))
    assert frame.verdict.tolist() == ["reverts", "persists", "persists", "grows"]
    np.testing.assert_allclose(frame.decay, [0.5, 0, 0, -0.4], atol=0.03)
    np.testing.assert_allclose(frame.share, 0.25, atol=0.02)
    (row,) = summary(frame).to_dict("records")
    assert [row[name] for name in ("reverts", "persists", "grows", "undecided")] == [1, 2, 1, 0]
    assert row["share_persists"] == pytest.approx(0.5, abs=0.03)
    assert row["kappa"] == pytest.approx((0.5 - 0.4) / 4, abs=0.03)


def test_deviations_that_grow_before_they_die_show_in_decay_and_not_in_modulus():
    drift = torch.tensor([[0.5, 3.0], [0.0, 0.5]], dtype=torch.float64)
    frame = layers(noisy_network(drift, noise=0.01), every_token_once(), components=2, sampling=Sampling(resamples=100))
    assert frame.verdict.tolist() == ["turns", "grows"]  # the first is thrown past the mean, further than it was
    assert (frame.modulus_high < 0.6).all()
    np.testing.assert_allclose(frame.decay, [2, -1], atol=0.02)


def test_nothing_reverts_in_parallel():
    frame = layers(Stack(known_networks.parallel_network()), known_networks.tokens(), sampling=Sampling(resamples=50))
    assert set(frame.verdict) == {"persists"}
    assert frame[["decay", "decay_low", "decay_high", "decay_null_high"]].abs().max(axis=None) < 1e-6
    assert (frame.modulus - 1).abs().max() < 1e-6
    assert frame.R2.isna().all()  # nothing of the update is in these directions
    assert frame.share_u.max() < 1e-9


def test_an_ornstein_uhlenbeck_stream_reverts_in_all_directions_alike():
    frame = layers(Stack(ou_network([0.1, 0.4, -0.2])), known_networks.tokens(24, 8), sampling=Sampling(resamples=50))
    for layer, kappa in enumerate((0.1, 0.4, -0.2)):
        rows = frame[frame.layer == layer]
        np.testing.assert_allclose(rows[["decay", "decay_low", "decay_high", "pc_kappa"]], kappa, atol=1e-5)
        np.testing.assert_allclose(rows.modulus, 1 - kappa, atol=1e-5)
    assert summary(frame).reverts.tolist() == [16, 16, 0]
    assert summary(frame).grows.tolist() == [0, 0, 16]


def test_updates_that_have_nothing_to_do_with_the_stream_get_no_verdict():
    k, n = 8, 256
    spreads = []
    for seed in range(8):
        stack = noisy_network(torch.zeros(k, k, dtype=torch.float64), seed=seed)
        frame = layers(
            stack, every_token_once(seed=seed), components=k, ridge=0.0, sampling=Sampling(resamples=100, seed=seed)
        )
        assert not set(frame.verdict) & {"reverts", "grows"}
        assert frame.R2_low[0] < frame.R2_null_high[0]
        assert frame.R2[0] == pytest.approx(frame.R2_null[0], abs=0.04)
        assert frame.decay_null_low.iloc[-1] < frame.decay.iloc[-1] < frame.decay[0] < frame.decay_null_high[0]
        spreads.append(frame.decay[0])
    # the symmetric part of a matrix of independent slopes, of variance 1 / n each, has its edge at sqrt(2 k / n)
    assert np.mean(spreads) == pytest.approx(math.sqrt(2 * k / n), rel=0.25)


def test_the_penalty_is_chosen_by_what_predicts_other_prompts():
    k, tokens = 8, every_token_once()
    assert layers(Stack(ou_network([0.3])), tokens % 256, sampling=Sampling(resamples=0)).ridge.eq(0).all()
    noisy = layers(noisy_network(0.02 * torch.eye(k).double()), tokens, components=k, sampling=Sampling(resamples=0))
    assert noisy.ridge[0] == max(RIDGES)
    free = layers(
        noisy_network(0.02 * torch.eye(k).double()), tokens, components=k, ridge=0.0, sampling=Sampling(resamples=0)
    )
    assert noisy.R2[0] > free.R2[0]
    assert noisy.decay[0] < free.decay[0]


# --- the regression from sums -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panel():
    z = 3 + normal(12, 7, 4) * torch.tensor([4.0, 2, 1, 0.5])
    return z, 1 - 0.3 * z @ normal(4, 4, seed=1) + normal(12, 7, 4, seed=2)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_drift_is_ridge_regression_on_the_prompts_that_were_drawn(panel, ridge):
    resampled = torch.randint(3, (4, 12), generator=rng()).double()
    found = Regression.of(*panel).weighted(resampled).drift(ridge)
    for weight, drift in zip(resampled, found):
        z, w = (a[torch.arange(12).repeat_interleave(weight.long())].flatten(0, 1).numpy() for a in panel)
        z, w = z - z.mean(0), w - w.mean(0)
        penalty = ridge * np.trace(z.T @ z) / 4 * np.eye(4)
        np.testing.assert_allclose(drift, -np.linalg.solve(z.T @ z + penalty, z.T @ w).T, rtol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_held_out_prompts_are_predicted_by_the_others(panel, ridge):
    error = total = 0.0
    for part in range(5):
        out = np.arange(12) % 5 == part
        z, w = (a[~out].flatten(0, 1).numpy() for a in panel)
        new, target = (a[out].flatten(0, 1).numpy() for a in panel)
        centred = z - z.mean(0)
        penalty = ridge * np.trace(centred.T @ centred) / 4 * np.eye(4)
        slope = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (w - w.mean(0)))
        error += ((target - w.mean(0) - (new - z.mean(0)) @ slope) ** 2).sum()
        total += ((target - w.mean(0)) ** 2).sum()
    found = Regression.of(*panel).held_out(weights(12, 0), [0.5, ridge])
    assert found[1].item() == pytest.approx(1 - error / total, rel=1e-9)
    assert found[0].item() < found[1].item()


def test_padding_is_not_counted(panel):
    z, w = (a.clone() for a in panel)
    mask = torch.arange(7) < torch.arange(1, 13).clamp(max=7).unsqueeze(1)
    z[~mask], w[~mask] = math.nan, math.inf
    found = Regression.of(z, w, mask).weighted(weights(12, 0)).drift(0.0)[0]
    x, y = (a[mask] - a[mask].mean(0) for a in panel)
    torch.testing.assert_close(found, -torch.linalg.lstsq(x, y).solution.T)


def test_a_direction_without_variance_gets_no_drift():
    z, w = normal(9, 5, 3), normal(9, 5, 3, seed=1)
    z[..., 2] = 4
    drift = Regression.of(z, w).weighted(weights(9, 0)).drift(0.0)[0]
    assert drift[:, :2].abs().min() > 1e-3
    torch.testing.assert_close(drift[:, 2], torch.zeros(3, dtype=torch.float64))


def test_a_rotation_turns_and_keeps():
    cosine, sine = math.cos(0.7), math.sin(0.7)
    turn = torch.tensor([[[cosine, -sine], [sine, cosine]]], dtype=torch.float64)
    found = Spectrum.of(torch.eye(2) - 0.9 * turn)
    np.testing.assert_allclose(found.modulus, 0.9)
    np.testing.assert_allclose(found.angle, 0.7)
    np.testing.assert_allclose(found.decay, 1 - 0.9 * cosine)


@pytest.mark.parametrize(
    ("interval", "null", "left", "moved", "expected"),
    [
        ((0.2, 0.3), (-0.1, 0.1), (0.7, 0.8), None, "reverts"),
        ((0.2, 0.3), (-0.1, 0.1), (0.7, 0.8), (0.6, 0.9), "reverts"),
        ((0.2, 0.3), (-0.1, 0.1), (0.7, 0.8), (0.97, 1.1), "slope"),
        ((0.2, 0.3), (-0.1, 0.1), (0.7, 0.8), (0.8, 1.1), "undecided"),
        ((0.2, 0.3), (-0.1, 0.1), (1.0, 1.0), None, "turns"),
        ((0.2, 0.3), (-0.1, 0.1), (0.7, 1.2), None, "undecided"),
        ((0.08, 0.3), (-0.1, 0.1), (0.7, 0.8), None, "undecided"),  # above 0 and not above the null
        ((0.01, 0.04), (-0.1, 0.1), (0.96, 0.99), None, "persists"),
        ((0.02, 0.04), (-0.01, 0.01), (0.96, 0.98), None, "persists"),  # for certain, and little
        ((0.1, 0.2), (-0.3, -0.1), (0.7, 0.9), None, "reverts"),
        ((-0.2, -0.1), (0.1, 0.3), (1.1, 1.2), None, "grows"),
        ((-0.3, -0.2), (-0.1, 0.1), (1.1, 1.2), None, "grows"),
        ((-0.3, -0.05), (-0.1, 0.1), (1.1, 1.2), None, "undecided"),
        ((-0.3, 0.3), (-0.1, 0.1), (0.9, 1.2), None, "undecided"),
        ((1e-9, 2e-9), (0.0, 0.0), (1.0, 1.0), None, "persists"),
        ((math.nan, math.nan), (math.nan, math.nan), (1.0, 1.0), None, "undecided"),
    ],
)
def test_verdict(interval, null, left, moved, expected):
    row = {"decay_low": interval[0], "decay_high": interval[1]}
    for name, ends in (("remaining", left), ("remaining_moved", moved)):
        if ends:
            row |= {name: sum(ends) / 2, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    assert verdict(row, *null, rounding=1e-7) == expected


# --- on a transformer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer():
    return Stack(known_networks.random_network(n_layers=2, d_model=12, norm="LN", dtype=torch.float64))


def test_over_all_directions_the_diagonal_is_the_scalar_slope(transformer):
    tokens = known_networks.tokens(24, 9)
    frame = summary(layers(transformer, tokens, ridge=0.0, sampling=Sampling(resamples=0)))
    stream = transformer.stream(tokens)[:, :, 1:]
    for layer, kappa in enumerate(frame.kappa):
        drift = Step.of(stream[layer], stream[layer + 1] - stream[layer]).drift(weights(24, 0))
        assert kappa == pytest.approx(drift.kappa.item(), rel=1e-6)


def test_columns_are_described_and_the_seed_decides(transformer):
    first, again, other = (
        layers(transformer, known_networks.tokens(8, 6), components=4, sampling=Sampling(resamples=20, seed=seed))
        for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(first, again)
    assert first.decay.equals(other.decay)
    assert not np.allclose(first.decay_null, other.decay_null)
    assert list(first) == list(COLUMNS)
    assert (first.decay_low <= first.decay_high).all()
    assert not first.drop(columns=["verdict", *described({"remaining_moved": ""})]).isna().any(axis=None)


def test_padding_and_batches_change_nothing(transformer):
    left, right = (
        layers(transformer, ragged(side), components=4, sampling=Sampling(resamples=20)) for side in ("left", "right")
    )
    pd.testing.assert_frame_equal(left, right, rtol=1e-6, atol=1e-8)
    whole, split = (
        layers(
            transformer, known_networks.tokens(20, 9), components=4, sampling=Sampling(resamples=20, batch_size=size)
        )
        for size in (64, 7)
    )
    for name in MEASURES:
        ends = [name, f"{name}_low", f"{name}_high"]
        pd.testing.assert_frame_equal(whole[ends], split[ends], rtol=1e-6, atol=1e-9)


def test_one_prompt_has_an_estimate_and_nothing_more(transformer):
    frame = layers(transformer, known_networks.tokens(1, 20), components=3)
    assert np.isfinite(frame[["decay", "modulus", "pc_kappa", "share"]]).all(axis=None)
    assert frame[["decay_low", "decay_high", "R2"]].isna().all(axis=None)
    assert set(frame.verdict) == {"undecided"}
    assert set(frame.ridge) == {0.0}


def test_two_prompts_and_fewer_tokens_than_components(transformer):
    frame = layers(transformer, known_networks.tokens(2, 4), sampling=Sampling(resamples=30))
    assert (frame.n_components == 5).all()  # six tokens less their mean
    assert np.isfinite(frame[["decay", "decay_low", "decay_high", "modulus"]]).all(axis=None)


def test_a_stream_that_does_not_vary_has_no_direction():
    constant = torch.ones(256, 4, dtype=torch.float64) / 3
    stack = Stack(network([torch.eye(4).double(), torch.eye(4).double()], constant))
    frame = layers(stack, known_networks.tokens(6, 5), sampling=Sampling(resamples=10))
    assert frame.layer.tolist() == [0, 1]
    assert frame[["decay", "R2", "modulus"]].isna().all(axis=None)
    assert set(frame.verdict) == {"undecided"}
    assert summary(frame).undecided.tolist() == [1, 1]


def test_half_precision_reads_the_same_in_sums_of_double():
    made = {dtype: Stack(known_networks.linear_network(2, 8, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)}
    exact, coarse = (
        layers(stack, known_networks.tokens(24, 9), sampling=Sampling(resamples=0)) for stack in made.values()
    )
    np.testing.assert_allclose(coarse.decay, exact.decay, atol=0.03)


def test_a_long_corpus_is_resampled_in_groups(transformer):
    frame = layers(transformer, known_networks.tokens(300, 3), components=2, sampling=Sampling(resamples=10))
    assert set(frame.n_units) == {256}
    assert (frame.decay_low < frame.decay_high).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "got components=0, draws=4, ridge=None"),
        ({"draws": 0}, "draws=0"),
        ({"ridge": -0.1}, "ridge=-0.1"),
        ({"sampling": Sampling(batch_size=0)}, "batch_size=0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(transformer, options, message):
    with pytest.raises(ValueError, match=message):
        layers(transformer, known_networks.tokens(2, 4), **options)
    with pytest.raises(ValueError, match="no token is left to measure"):
        layers(transformer, torch.zeros(3, 1, dtype=torch.long))


def test_tokens_of_massive_activations_are_left_out_unless_asked_for():
    embedding = normal(256, 8)
    embedding[7, 3] = 1e5
    stack = Stack(network([-0.2 * torch.diag(torch.arange(8).double() / 4)] * 2, embedding))
    tokens = torch.randint(8, 256, (24, 8), generator=rng())
    tokens[3, 4] = 7
    without, whole = (
        layers(stack, tokens, sampling=Sampling(resamples=20, skip_massive=skip)) for skip in (True, False)
    )
    assert without.share.max() < 0.5
    assert whole.share.max() > 0.999


@pytest.mark.parametrize("skip_massive", [False, True])
def test_it_costs_one_forward_pass_and_one_for_massive_activations(monkeypatch, skip_massive):
    stack, seen = Stack(known_networks.random_network(n_layers=3)), []
    layer = Engine.layer
    monkeypatch.setattr(
        Engine, "layer", lambda engine, index, x, call: seen.append(index) or layer(engine, index, x, call)
    )
    layers(stack, known_networks.tokens(4, 5), sampling=Sampling(resamples=5, skip_massive=skip_massive))
    assert [seen.count(index) for index in range(3)] == [1 + skip_massive] * 3


def test_the_bundled_model_grows_where_the_untrained_one_is_balanced():
    model = models.load("babel")
    trained, fresh = Stack(model), Stack(models.untrained(model))
    tokens = trained.tokens(bundled.prompts(40))
    for stack, balanced in ((trained, False), (fresh, True)):
        found = summary(layers(stack, tokens, components=8, sampling=Sampling(resamples=20)))
        assert (found.R2_low > found.R2_null_high).sum() >= 10
        assert balanced == (found.kappa[1:].abs().max() < 0.05)
        assert (found.reverts == 0).all()  # the untrained one moves deviations, by less than is spoken of
