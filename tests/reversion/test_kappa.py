import math

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import attending_network, network, ou_network, ragged, rng
from surgery import Stack, reversion
from surgery.instruments import coordinates, known_networks
from surgery.instruments.displacement import KINDS
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.massive import DECIDES
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.reversion import kappa
from surgery.reversion.kappa import layers
from surgery.stats.bootstrap import interval, rotation, weights
from surgery.stats.drift import Step
from surgery.stats.sampling import Sampling

MEASURES = ("kappa", "psi", "growth", "variance_ratio_next")
CAUSAL = [f"kappa_causal_{kind}{norm}" for kind in KINDS for norm in ("", "_frozen")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def turn(d_model, seed):
    return rotation(torch.from_numpy(np.random.default_rng(seed).standard_normal((d_model, d_model))))


# --- the Ornstein-Uhlenbeck stream, built exactly ---------------------------------------------------------------------


def test_kappa_and_causal_kappa_are_recovered_exactly():
    kappas = [0.2, 0.3, 0.5, -0.1, 0.01]
    frame = layers(Stack(ou_network(kappas)), known_networks.tokens(24, 8), draws=3, sampling=Sampling(resamples=100))
    for name in ["kappa", *CAUSAL]:
        for end in ("", "_low", "_high"):
            np.testing.assert_allclose(frame[name + end], kappas, atol=1e-5, err_msg=name + end)
    np.testing.assert_allclose(frame.growth, np.abs(kappas), atol=1e-5)
    np.testing.assert_allclose(frame.psi, 2 / np.array(kappas), rtol=1e-5)
    np.testing.assert_allclose(frame.variance_ratio_next, (1 - np.array(kappas)) ** 2, rtol=1e-5)
    np.testing.assert_allclose(frame.half_life[[0, 1, 2, 4]], np.log(2) / -np.log(1 - np.array([0.2, 0.3, 0.5, 0.01])))
    assert math.isnan(frame.half_life[3])
    assert frame.regime.tolist() == ["opposing"] * 3 + ["carrying", "opposing"]
    assert frame.restoring.tolist() == ["yes"] * 3 + ["no", "no"]  # the last takes back less than is spoken of
    assert frame.layer.tolist() == list(range(5))
    assert (frame.n_prompts == 24).all()


def test_overshooting_then_nothing_left():
    frame = layers(
        Stack(ou_network([1.5, 1.0, 0.3])), known_networks.tokens(12, 6), draws=1, sampling=Sampling(resamples=50)
    )
    assert frame.regime.tolist()[0] == "overshooting"
    np.testing.assert_allclose(frame.kappa[:2], [1.5, 1.0], atol=1e-9)
    assert math.isnan(frame.half_life[0])
    assert not frame.half_life[1] > 0.1  # kappa is 1 but for rounding: no layer, or, above 1, undefined
    # the second layer took every token to the mean: there is no stream to revert, and no rounding is taken for one
    assert frame.regime[2] == "undefined"
    assert frame.restoring[2] == "undecided"
    assert frame.loc[2, ["kappa", "psi", "growth", "half_life", *CAUSAL]].isna().all()


def test_a_layer_that_writes_the_same_for_all_tokens_is_still():
    model = network([torch.zeros(8, 8)], torch.randn(256, 8, generator=rng()), [torch.ones(8)])
    row = layers(Stack(model), known_networks.tokens(12, 6), draws=1, sampling=Sampling(resamples=50)).iloc[0]
    assert row.regime == "still"
    assert row.restoring == "no"
    assert row.kappa == row.growth == 0
    assert math.isnan(row.psi)
    assert math.isnan(row.half_life)
    assert row.variance_ratio_next == pytest.approx(1, abs=1e-12)


def test_the_common_mean_does_not_matter():
    near, far = (
        layers(
            Stack(ou_network([0.2, 0.4], mean=mean)),
            known_networks.tokens(16, 6),
            draws=2,
            sampling=Sampling(resamples=50),
        )
        for mean in (0.0, 1000.0)
    )
    for name in ["kappa", "growth", "psi", "kappa_token_shuffled", "kappa_rotated", "kappa_excess", *CAUSAL]:
        np.testing.assert_allclose(far[name], near[name], atol=1e-6, err_msg=name)


# --- what must read nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_layers_that_write_into_fresh_subspaces_do_not_revert(share):
    frame = layers(
        Stack(known_networks.mixed_network(share, biases=True)),
        known_networks.tokens(24, 8),
        draws=2,
        sampling=Sampling(resamples=100),
    )
    for name in ("kappa", "psi", "kappa_causal_difference", "kappa_causal_principal", "kappa_order_shuffled"):
        assert frame[name].abs().max() < 1e-6, name
    assert (frame.variance_ratio_next > 1).all()
    assert (frame.regime == "undecided").all()
    assert set(frame.restoring) <= {"no", "undecided"}
    assert (frame.restoring == "no")[frame.token_share <= DECIDES].all()
    assert (frame.kappa_causal_random_low < 0).any()
    assert (frame.kappa_causal_random.abs() < 0.1).all()


def test_a_random_walk_covers_zero_and_psi_zero():
    covered = 0
    for seed in range(20):
        x, u = torch.randn(2, 30, 6, 8, generator=rng(seed))
        drift = Step.of(x, 0.4 * u).drift(weights(30, 200, seed))
        (_, low, high), (_, psi_low, psi_high) = interval(drift.kappa), interval(drift.psi)
        covered += low < 0 < high
        assert (low < 0 < high) == (psi_low < 0 < psi_high)
    assert covered >= 17


def test_nulls_of_an_ou_stream_read_nothing_and_the_excess_is_kappa():
    frame = layers(
        Stack(ou_network([0.3, 0.2], d_model=32)),
        known_networks.tokens(48, 8),
        causal=False,
        sampling=Sampling(resamples=100),
    )
    for null in ("rotated", "token_shuffled"):
        assert (frame[f"kappa_{null}"].abs() < 0.02).all()
        assert ((frame[f"kappa_{null}_low"] < 0) & (frame[f"kappa_{null}_high"] > 0)).all()
    np.testing.assert_allclose(
        frame.kappa_excess, frame.kappa - frame[["kappa_rotated", "kappa_token_shuffled"]].max(1)
    )
    assert (frame.kappa_excess_low > 0.15).all()
    assert (frame.kappa_excess_low < frame.kappa).all()
    # an OU layer does the same wherever it runs
    np.testing.assert_allclose(frame.kappa_order_shuffled, [0.3, 0.2], atol=1e-9)
    np.testing.assert_allclose(frame.kappa_excess_order_shuffled, 0, atol=1e-9)
    assert "restoring" not in frame
    assert "kappa_untrained" not in frame


def test_rotations_spread_the_null_when_prompts_do_not():
    # all prompts alike: only the rotation is left to vary
    frame = layers(
        Stack(ou_network([0.3], d_model=4)),
        known_networks.tokens(1, 16).repeat(10, 1),
        causal=False,
        sampling=Sampling(resamples=20),
    )
    assert frame.kappa_high[0] - frame.kappa_low[0] < 1e-9
    assert frame.kappa_rotated_high[0] - frame.kappa_rotated_low[0] > 0.05


def test_order_shuffled_is_recomputed_at_the_place_where_the_layer_ran():
    # the first layer halves four coordinates, the second adds the other four to them: each changes what the other meets
    first, second = torch.zeros(2, 8, 8, dtype=torch.float64)
    first[:4, :4], second[:4, 4:] = -torch.eye(4) / 2, torch.eye(4)
    stack = Stack(network([first, second], torch.randn(256, 8, generator=rng())))
    tokens = known_networks.tokens(32, 8)
    x = stack.stream(tokens)[:, :, 1:].flatten(1, 2)
    entered = {0: [x[0], x[0] + x[0] @ second.T], 1: [x[1], x[0]]}  # in order, and the other way round
    ensemble = Ensemble(Tokens.of(tokens))
    raw = coordinates.coordinate_map("raw", stack, ensemble)
    drifts = kappa._order_null(ensemble, stack, raw, 12, weights(32, 5))
    for layer, linear in ((0, first), (1, second)):
        expected = [Step.of(x[None], x[None] @ linear.T).drift(weights(1, 0)) for x in entered[layer]]
        kappas = [drift.kappa[0].item() for drift in drifts[layer]]
        kinds = [kappa == pytest.approx(expected[0].kappa.item()) for kappa in kappas]
        others = [kappa == pytest.approx(expected[1].kappa.item()) for kappa in kappas]
        assert any(kinds)
        assert any(others)
        assert all(kind != other for kind, other in zip(kinds, others))
    frame = layers(stack, tokens, draws=12, causal=False, sampling=Sampling(resamples=20))
    assert (frame.kappa_order_shuffled_high - frame.kappa_order_shuffled_low > 0.05).all()


def test_the_untrained_null_is_brought_to_the_size_of_the_update():
    trained, untrained = Stack(ou_network([0.3, 0.2])), Stack(ou_network([0.06, 0.01]))
    frame = layers(
        trained,
        known_networks.tokens(12, 6),
        draws=1,
        causal=False,
        untrained=untrained,
        sampling=Sampling(resamples=50),
    )
    np.testing.assert_allclose(frame.growth_untrained, [0.06, 0.01], atol=1e-9)
    np.testing.assert_allclose(frame.kappa_untrained, [0.3, 0.2], atol=1e-9)
    np.testing.assert_allclose(frame.kappa_excess_untrained, 0, atol=1e-9)


def test_a_rotation_a_resample_is_that_rotation_of_the_updates():
    x, u = torch.randn(2, 6, 5, 4, generator=rng()).double()
    rotations = [turn(4, seed) for seed in (0, 1)]
    signs = torch.randn(9, 4, generator=rng()).sign().double()
    paired = torch.stack([((u @ turned.T) * x).sum(1) for turned in rotations])
    resampled = weights(6, 8)
    by_resample = kappa._rotated_kappa(Step.of(x, u), rotations, paired, resampled, signs)
    every = [
        [Step.of(x, u @ (sign.unsqueeze(1) * turned).T).drift(resampled).kappa for turned in rotations]
        for sign in signs
    ]
    assert by_resample[0].item() == pytest.approx(float(torch.stack([row[0] for pair in every for row in pair]).mean()))
    for i in range(1, 9):
        assert by_resample[i].item() == pytest.approx(every[i][i % 2][i].item())


def test_the_rotated_null_is_exceeded_as_often_as_it_says():
    # the truth is a rotation itself, so 5 in 100 lie outside, whatever the spectrum of the stream
    outside, spectrum = 0, torch.arange(1, 17).double()
    for seed in range(200):
        x = torch.randn(30, 4, 16, generator=rng(seed)).double() * spectrum
        u = x @ turn(16, seed).T
        rotations = [turn(16, (seed, draw)) for draw in range(reversion.ROTATIONS)]
        paired = torch.stack([((u @ turned.T) * x).sum(1) for turned in rotations])
        signs = torch.randn(201, 16, generator=rng(seed)).sign().double()
        step, resampled = Step.of(x, u), weights(30, 200, seed)
        excess = step.drift(resampled).kappa - kappa._rotated_kappa(step, rotations, paired, resampled, signs)
        _, low, high = interval(excess)
        outside += low > 0 or high < 0
    assert 2 <= outside <= 20


# --- a slope is not a force -------------------------------------------------------------------------------------------


def test_writing_against_a_copy_kept_elsewhere_is_not_restoring():
    kappa, half = 0.4, 8
    value = torch.randn(256, half, generator=rng())
    linear = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    linear[:half, half:] = -kappa * torch.eye(half, dtype=torch.float64)
    row = layers(
        Stack(network([linear], torch.cat([value, value], 1))),
        known_networks.tokens(),
        sampling=Sampling(resamples=200),
    ).iloc[0]
    assert row.kappa == pytest.approx(kappa / 2, abs=1e-9)
    assert row.regime == "opposing"
    assert row.kappa_excess_low > 0.1
    assert abs(row.kappa_causal_random) < 0.03
    assert row.kappa_causal_random_low < 0 < row.kappa_causal_random_high
    assert row.kappa_causal_difference == pytest.approx(kappa / 2, abs=1e-9)  # both copies move: no difference can tell
    assert row.restoring == "no"


def test_writing_against_another_token_that_happens_to_be_alike_is_not_restoring():
    stack, tokens = attending_network(0.4, sharpness=1e4)
    row = layers(stack, tokens, sampling=Sampling(resamples=100)).iloc[0]
    assert row.kappa == pytest.approx(0.4, abs=1e-6)
    assert row.kappa_excess_low > 0.1
    for name in CAUSAL:
        assert abs(row[name]) < 1e-9
        assert abs(row[f"{name}_high"]) < 1e-9
    assert row.restoring == "no"


# --- identities on a real transformer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer():
    return Stack(known_networks.random_network(n_layers=3, norm="LN", dtype=torch.float64))


def test_numbers_are_those_of_the_definitions(transformer):
    tokens = known_networks.tokens(20, 9)
    frame = layers(transformer, tokens, nulls=False, causal=False)
    stream = transformer.stream(tokens)[:, :, 1:].flatten(1, 2).numpy()
    for layer, row in frame.iterrows():
        x, after = (entry - entry.mean(0) for entry in stream[layer : layer + 2])
        u = after - x
        assert row.kappa == pytest.approx(-(u * x).sum() / (x * x).sum(), rel=1e-9)
        assert row.growth == pytest.approx(np.linalg.norm(u) / np.linalg.norm(x), rel=1e-9)
        assert row.psi == pytest.approx(-2 * (u * x).sum() / (u * u).sum(), rel=1e-9)
        assert row.variance_ratio_next == pytest.approx((after * after).sum() / (x * x).sum(), rel=1e-9)
        assert row.variance_ratio_next == pytest.approx(1 - 2 * row.kappa + row.growth**2, rel=1e-12)


def test_first_tokens_count_when_asked(transformer):
    tokens = known_networks.tokens(20, 9)
    stream = transformer.stream(tokens).flatten(1, 2).numpy()
    x, u = stream[1] - stream[1].mean(0), stream[2] - stream[1]
    frame = layers(transformer, tokens, nulls=False, causal=False, sampling=Sampling(skip_first=False))
    assert frame.kappa[1] == pytest.approx(-(u * x).sum() / (x * x).sum(), rel=1e-9)


def test_padding_changes_nothing(transformer):
    left, right = (
        layers(transformer, ragged(side), draws=2, sampling=Sampling(resamples=30)) for side in ("left", "right")
    )
    pd.testing.assert_frame_equal(left, right, rtol=1e-7, atol=1e-9)
    alone = [layers(transformer, ragged("right").ids[i : i + 1, : i + 2], nulls=False, causal=False) for i in (4, 9)]
    chosen = Tokens(ragged("left").ids[[4, 9]], ragged("left").mask[[4, 9]])
    ensemble = Ensemble(chosen)
    steps = kappa._steps(ensemble, transformer, coordinates.coordinate_map("raw", transformer, ensemble), "")
    for i, frame in enumerate(alone):
        only = torch.eye(2, dtype=torch.float64)[i : i + 1]
        np.testing.assert_allclose([step.drift(only).kappa[0] for step in steps], frame.kappa, rtol=1e-7)


def test_batches_change_nothing_but_the_partners(transformer):
    tokens = known_networks.tokens(20, 9)
    whole, split = (
        layers(transformer, tokens, draws=2, sampling=Sampling(resamples=30, batch_size=size)) for size in (64, 7)
    )
    same = [
        f"{name}{end}" for name in (*MEASURES, "kappa_rotated", "kappa_order_shuffled") for end in ("", "_low", "_high")
    ]
    pd.testing.assert_frame_equal(whole[same], split[same], rtol=1e-9)


def test_seed_decides_and_the_model_is_left_alone(transformer):
    tokens = known_networks.tokens(8, 6)
    before = {name: weight.clone() for name, weight in transformer.model.named_parameters()}
    logits = transformer.run(tokens)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (
        layers(transformer, tokens, draws=1, sampling=Sampling(resamples=20, seed=seed)) for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first.kappa_rotated, other.kappa_rotated)
    assert first.kappa.equals(other.kappa)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in transformer.model.named_parameters())
    assert torch.equal(transformer.run(tokens), logits)


# --- uncertainty ------------------------------------------------------------------------------------------------------


def test_intervals_cover_the_truth_of_a_noisy_ou_stream_with_tokens_that_hang_together():
    kappa, noise, covered, covered_psi, n = 0.3, 0.5, 0, 0, 200
    psi = 2 * kappa / (kappa**2 + noise**2)
    for seed in range(n):
        shared, own, shock, common = torch.randn(4, 40, 6, 5, generator=rng(seed))
        x = 3 + (shared[:, :1] + own) / math.sqrt(2)
        u = -kappa * (x - 3) + noise * (common[:, :1] + shock) / math.sqrt(2)
        drift = Step.of(x, u).drift(weights(40, 200, seed))
        _, low, high = interval(drift.kappa)
        covered += low < kappa < high
        _, low, high = interval(drift.psi)
        covered_psi += low < psi < high
    assert 0.88 <= covered / n <= 0.99
    assert 0.88 <= covered_psi / n <= 0.99


def test_one_prompt_has_an_estimate_and_no_interval(transformer):
    row = layers(transformer, known_networks.tokens(1, 12), draws=2).iloc[1]
    for name in [*MEASURES, "kappa_excess", *CAUSAL]:
        assert math.isfinite(row[name]), name
        assert math.isnan(row[f"{name}_low"]), name
        assert math.isnan(row[f"{name}_high"]), name
    assert row.regime == "undecided"
    assert row.restoring == "undecided"
    assert row.n_prompts == 1


def test_prompts_that_are_all_the_same_give_no_differences_to_move_along(transformer):
    tokens = known_networks.tokens(1, 6).repeat(8, 1)
    tokens[:, 0] = torch.arange(8)  # what differs is not in the ensemble, and reaches it through attention later
    frame = layers(transformer, tokens, draws=2, nulls=False, sampling=Sampling(resamples=20))
    assert math.isnan(frame.kappa_causal_difference[0])
    assert frame.kappa_causal_difference[1:].notna().all()
    assert frame.kappa_causal_random.notna().all()
    assert frame.restoring[0] != "yes"


def test_prompts_without_a_token_in_the_ensemble_add_nothing(transformer):
    tokens = known_networks.tokens(6, 5)
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[6:, 1:] = False
    more = Tokens(torch.cat([tokens, tokens[:2]]), mask)
    with_empty, without = (
        layers(transformer, prompts, draws=1, sampling=Sampling(resamples=20)) for prompts in (more, tokens)
    )
    np.testing.assert_allclose(with_empty.kappa, without.kappa, rtol=1e-12)
    assert np.isfinite(with_empty[CAUSAL]).all(axis=None)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.long), {}, "no token is left to measure in 3 prompts"),
        (torch.zeros(0, 5, dtype=torch.long), {}, "no token is left to measure in 0 prompts"),
        (known_networks.tokens(2, 4), {"draws": 0}, "must be positive, got draws=0"),
        (known_networks.tokens(2, 4), {"size": 0.0}, "size=0.0"),
        (known_networks.tokens(2, 4), {"sampling": Sampling(batch_size=0)}, "batch_size=0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(transformer, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        layers(transformer, tokens, **options)


def test_an_untrained_model_of_another_shape_is_refused(transformer):
    other = Stack(known_networks.random_network(n_layers=2))
    with pytest.raises(ValueError, match="untrained has 2 layers and 256 tokens, the model 3 and 256"):
        layers(transformer, known_networks.tokens(2, 4), untrained=other)


def test_it_costs_what_the_docstring_says(monkeypatch):
    stack, seen = Stack(known_networks.random_network(n_layers=3)), []
    layer = Engine.layer
    monkeypatch.setattr(
        Engine, "layer", lambda engine, index, x, call: seen.append(index) or layer(engine, index, x, call)
    )
    tokens = known_networks.tokens(4, 5)
    for options, cost in (
        ({"nulls": False, "causal": False, "sampling": Sampling(resamples=5, skip_massive=False)}, 1),
        ({"nulls": False, "causal": False}, 2),
        ({"causal": False}, 7),
        ({"causal": False, "untrained": stack}, 8),
        ({}, 12),
        ({"draws": 2}, 10),
    ):
        seen.clear()
        layers(stack, tokens, **{"sampling": Sampling(resamples=5)} | options)
        assert [seen.count(index) for index in range(3)] == [cost] * 3
