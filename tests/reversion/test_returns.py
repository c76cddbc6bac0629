import math

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import attending_network, network, ou_network, parameters, ragged, rng
from surgery import Stack, models
from surgery.corpus import bundled
from surgery.instruments import known_networks
from surgery.instruments.displacement import KINDS, responses
from surgery.instruments.ensemble import Ensemble
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.reversion.returns import COLUMNS, HALF_WAY_COLUMNS, curves, half_way
from surgery.stats.bootstrap import interval, weights
from surgery.stats.drift import Step
from surgery.stats.sampling import Sampling

LEFT = ["along", "remaining", "spread"]


def of(frame, **chosen):
    """The rows of some layer, kind, size or q."""
    for name, value in chosen.items():
        frame = frame[frame[name] == value]
    return frame


# --- what is known beforehand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_an_ornstein_uhlenbeck_stream_takes_back_all_kinds_and_sizes_alike(frozen):
    kappas = np.array([0.1, 0.4, -0.2, 0.45])
    frame = curves(
        Stack(ou_network(kappas.tolist())), known_networks.tokens(24, 8), frozen=frozen, sampling=Sampling(resamples=20)
    )
    assert len(frame) == 10 * len(KINDS) * 2
    for layer in range(4):
        for kind in KINDS:
            for size in (0.1, 1.0):
                curve = of(frame, layer=layer, kind=kind, size=size)
                assert curve.q.tolist() == list(range(1, 5 - layer))
                for name in LEFT:
                    for end in ("", "_low", "_high"):
                        np.testing.assert_allclose(curve[name + end], np.cumprod(1 - kappas[layer:]), atol=1e-5)
    found = half_way(frame)
    assert list(found) == list(HALF_WAY_COLUMNS)
    # what is left: .9 .54 .648 .356, then .6 .72 .396, 1.2 .66 and .55
    for layer, q in enumerate((4, 3, math.nan, math.nan)):
        np.testing.assert_allclose(of(found, layer=layer).kappa, kappas[layer], atol=1e-5)
        np.testing.assert_array_equal(of(found, layer=layer).half_way, q)


def test_a_later_layer_can_undo_what_one_has_taken_back():
    frame = curves(Stack(ou_network([0.5, -1.0])), known_networks.tokens(12, 6), [0], sampling=Sampling(resamples=0))
    np.testing.assert_allclose(of(frame, q=1)[LEFT], 0.5, atol=1e-5)
    np.testing.assert_allclose(of(frame, q=2)[LEFT], 1.0, atol=1e-5)


def test_in_parallel_displacements_stay_and_are_answered_elsewhere():
    frame = curves(
        Stack(known_networks.parallel_network(n_layers=4)), known_networks.tokens(24, 8), sampling=Sampling(resamples=0)
    )
    inside = frame[frame.kind != "random"]
    np.testing.assert_allclose(inside.along, 1, atol=1e-4)
    assert (inside.remaining > 1.001).all()  # every layer reads the embedding, and answers into a subspace of its own
    np.testing.assert_allclose(inside.spread, inside.remaining, rtol=1e-6)
    assert half_way(inside).half_way.isna().all()


def test_a_direction_that_nobody_reads_keeps_its_displacement():
    spread = torch.tensor([9.0, 1, 1, 1, 1], dtype=torch.float64)
    embedding = torch.randn(256, 5, generator=rng(), dtype=torch.float64) * spread
    reads = torch.diag(torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64))  # not the first, nearly the top component
    found = curves(
        Stack(network([-0.4 * reads] * 3, embedding)),
        known_networks.tokens(48, 9),
        draws=1,
        sampling=Sampling(resamples=0),
    )
    np.testing.assert_allclose(of(found, kind="principal")[LEFT], 1, atol=0.01)
    assert of(found, kind="random", layer=0, q=3).along.between(0.2, 0.8).all()


def test_along_one_layer_it_is_the_response_to_the_same_displacement():
    stack = Stack(known_networks.random_network(n_layers=3, norm="LN", dtype=torch.float64))
    tokens, size, resampled = Tokens.of(known_networks.tokens(20, 7)), 0.5, weights(20, 50)
    stream = stack.stream(tokens)[:, :, 1:]
    spreads = [Step.of(x, x).variance(resampled[:1]).sqrt().item() for x in stream[:-1]]
    ensemble = Ensemble(tokens, Sampling(batch_size=8))
    found = responses(stack, ensemble, [size * spread for spread in spreads], draws=2)
    for suffix in ("", "_frozen"):
        frame = curves(stack, tokens, sizes=[size], frozen=bool(suffix), sampling=Sampling(resamples=50, batch_size=8))
        for row in half_way(frame).itertuples():
            kappa, low, high = interval(0 - found[row.kind + suffix].slope(row.layer, resampled))
            assert (row.kappa, row.kappa_low, row.kappa_high) == pytest.approx((kappa, low, high), abs=1e-11)
            assert abs(kappa) > 1e-5


def test_later_tokens_that_attend_to_the_one_that_was_moved_are_counted_in_spread():
    # every token takes 0.4 of the mean of all so far: token 1 loses 0.4/2 and token 2 0.4/3 of its own displacement,
    # and of that of token 1, token 2 sees 0.4/3
    stack, tokens = attending_network(0.4, sharpness=0)
    frame = of(curves(stack, tokens[:, :3], draws=8, sampling=Sampling(resamples=0)), kind="difference")
    at_one = (frame.along - (1 - 0.4 / 3)) / (0.4 / 3 - 0.4 / 2)
    assert at_one.between(0.2, 0.8).all()
    squares = at_one * (1 - 0.4 / 2) ** 2 + (1 - at_one) * (1 - 0.4 / 3) ** 2
    np.testing.assert_allclose(frame.remaining**2, squares, rtol=1e-5)
    np.testing.assert_allclose(frame.spread**2, squares + at_one * (0.4 / 3) ** 2, rtol=1e-5)


def test_frozen_norms_leave_the_pull_that_live_norms_divide_away():
    # f(x) = -kappa x / rms(x) with rms(x) = 1, so that live norms answer only across x, in three directions of four
    embedding = 2 * torch.nn.functional.normalize(torch.randn(256, 4, generator=rng(), dtype=torch.float64), dim=-1)
    stack = Stack(network([-0.4 * torch.eye(4)], embedding, norm="RMS"))
    live, frozen = (
        of(
            curves(
                stack,
                known_networks.tokens(48, 8),
                sizes=[0.02],
                draws=12,
                frozen=frozen,
                sampling=Sampling(resamples=0),
            ),
            kind="random",
        )
        for frozen in (False, True)
    )
    assert frozen.along.item() == pytest.approx(0.6, abs=1e-3)
    assert live.along.item() == pytest.approx(1 - 0.4 * 3 / 4, abs=0.03)


def test_layers_that_bend_answer_by_size():
    # relu pulls back what is positive, and no token is: only displacements larger than the distance to 0 are seen
    embedding = -1 - torch.rand(256, 4, generator=rng(), dtype=torch.float64)
    model = network([torch.zeros(4, 4)], embedding)
    with torch.no_grad():
        parameters(model)["layers.0.mlp.fc_in.weight"][:] = torch.cat([torch.eye(4), torch.zeros(4, 4)])
        parameters(model)["layers.0.mlp.fc_out.weight"][:] = torch.cat([-torch.eye(4), torch.zeros(4, 4)], 1)
    stack = Stack(model)
    frame = of(
        curves(stack, known_networks.tokens(24, 8), sizes=(0.1, 20.0), sampling=Sampling(resamples=0)), kind="random"
    )
    assert of(frame, size=0.1).along.item() == pytest.approx(1, abs=1e-9)
    assert of(frame, size=20.0).along.item() < 0.8


def test_half_way_is_the_first_layer_that_leaves_less_than_half():
    curve = pd.DataFrame({"q": [1, 2, 3], "remaining": 2.0, "spread": 3.0, "along_low": 0.1, "along_high": 0.9})
    named = curve.assign(layer=4, kind="random", size=1.0)
    for along, expected in (([0.8, 0.5, 0.6], math.nan), ([0.4, 0.9, 0.3], 1), ([0.9, -0.2, 0.8], 2)):
        (row,) = half_way(named.assign(along=along)).to_dict("records")
        assert row["half_way"] == pytest.approx(expected, nan_ok=True)
        assert (row["kappa"], row["kappa_low"], row["kappa_high"]) == pytest.approx((1 - along[0], 0.1, 0.9))
        assert (row["along"], row["remaining"], row["spread"]) == (along[-1], 2.0, 3.0)


# --- on a transformer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer():
    return Stack(known_networks.random_network(n_layers=2, d_model=16, norm="LN", dtype=torch.float64))


def test_chosen_layers_are_the_same_as_among_all_and_the_seed_decides(transformer):
    tokens = known_networks.tokens(8, 6)
    whole = curves(transformer, tokens, sampling=Sampling(resamples=20))
    assert list(whole) == list(COLUMNS)
    pd.testing.assert_frame_equal(
        of(whole, layer=1).reset_index(drop=True), curves(transformer, tokens, [1], sampling=Sampling(resamples=20))
    )
    pd.testing.assert_frame_equal(whole, curves(transformer, tokens, sampling=Sampling(resamples=20)))
    assert not np.allclose(whole.along, curves(transformer, tokens, sampling=Sampling(resamples=20, seed=1)).along)
    assert not whole.isna().any(axis=None)
    assert (whole.spread >= whole.remaining - 1e-12).all()
    assert (whole.along.abs() <= whole.remaining + 1e-12).all()


def test_padding_changes_nothing(transformer):
    left, right = (curves(transformer, ragged(side), sampling=Sampling(resamples=20)) for side in ("left", "right"))
    pd.testing.assert_frame_equal(left, right, rtol=1e-6, atol=1e-8)


def test_one_prompt_has_curves_and_no_interval(transformer):
    frame = curves(transformer, known_networks.tokens(1, 12))
    assert np.isfinite(frame[LEFT]).all(axis=None)
    assert frame[[f"{name}_low" for name in LEFT]].isna().all(axis=None)


def test_prompts_that_are_all_the_same_have_no_difference_to_move_along(transformer):
    frame = curves(transformer, known_networks.tokens(1, 6).repeat(6, 1), sampling=Sampling(resamples=5))
    assert of(frame, kind="difference")[LEFT].isna().all(axis=None)
    assert frame[frame.kind != "difference"][LEFT].notna().all(axis=None)


def test_a_stream_that_does_not_vary_cannot_be_moved_by_a_part_of_its_spread():
    constant = torch.ones(256, 4, dtype=torch.float64) / 3
    frame = curves(
        Stack(network([torch.eye(4).double()], constant)), known_networks.tokens(6, 5), sampling=Sampling(resamples=5)
    )
    assert frame[LEFT].isna().all(axis=None)


def test_half_precision_reads_the_same_curves():
    made = {dtype: Stack(known_networks.linear_network(2, 8, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)}
    exact, coarse = (
        curves(stack, known_networks.tokens(24, 9), sizes=[1.0], sampling=Sampling(resamples=0))
        for stack in made.values()
    )
    np.testing.assert_allclose(coarse[LEFT], exact[LEFT], atol=0.1)


def test_a_long_corpus_is_resampled_in_groups(transformer):
    frame = curves(transformer, known_networks.tokens(300, 3), sizes=[1.0], draws=1, sampling=Sampling(resamples=10))
    assert set(frame.n_units) == {256}
    assert (frame.along_low < frame.along_high).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, r"layers can be any of 0 to 1 of .*, got \[2\]"),
        ({"layers": []}, r"got \[\]"),
        ({"draws": 0}, "got draws=0"),
        ({"sizes": (0.1, 0.0)}, r"sizes=\(0.1, 0.0\)"),
        ({"sizes": ()}, r"sizes=\(\)"),
        ({"sampling": Sampling(batch_size=0)}, "batch_size=0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(transformer, options, message):
    with pytest.raises(ValueError, match=message):
        curves(transformer, known_networks.tokens(2, 4), **options)
    with pytest.raises(ValueError, match="no token is left to measure"):
        curves(transformer, torch.zeros(3, 1, dtype=torch.long))


def test_tokens_of_massive_activations_are_neither_moved_nor_a_measure_of_spread():
    # a displacement as long as a part of the massive token drowns what a layer behind a norm can take back
    embedding = torch.randn(256, 8, generator=rng(), dtype=torch.float64)
    embedding[7, 3] = 1e6
    tokens = torch.randint(8, 256, (24, 8), generator=rng())
    tokens[3, 4] = 7
    stack = Stack(network([-0.4 * torch.eye(8)], embedding, norm="RMS"))
    without, whole = (
        of(curves(stack, tokens, sizes=[0.1], sampling=Sampling(resamples=0, skip_massive=skip)), kind="random")
        for skip in (True, False)
    )
    assert without.along.item() < 0.8
    assert whole.along.item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("draws", "sizes", "frozen", "skip_massive"), [(1, [1.0], False, True), (2, [0.1, 1.0], True, False)]
)
def test_it_costs_what_the_docstring_says(monkeypatch, draws, sizes, frozen, skip_massive):
    n_layers = 3
    stack, seen = Stack(known_networks.random_network(n_layers=n_layers)), []
    layer = Engine.layer
    monkeypatch.setattr(
        Engine, "layer", lambda engine, index, x, call: seen.append(index) or layer(engine, index, x, call)
    )
    options = {"draws": draws, "sizes": sizes, "frozen": frozen}
    options["sampling"] = Sampling(resamples=5, skip_massive=skip_massive)
    fixed = 3 + frozen + skip_massive
    curves(stack, known_networks.tokens(4, 5), **options)
    assert len(seen) / n_layers == fixed + 3 * draws * len(sizes) * (n_layers + 1) / 2
    seen.clear()
    curves(stack, known_networks.tokens(4, 5), [1], **options)
    assert len(seen) / n_layers == fixed + 3 * draws * len(sizes) * (n_layers - 1) / n_layers


def test_the_bundled_model_carries_displacements_further_and_returns_none():
    stack = Stack(models.load("babel"))
    frame = curves(
        stack, stack.tokens(bundled.prompts(20)), [6, 9], sizes=[0.1], draws=1, sampling=Sampling(resamples=0)
    )
    found = half_way(frame)
    assert found.half_way.isna().all()
    assert (of(found, kind="difference")[["along", "remaining"]] > 1).all(axis=None)
    assert of(found, kind="random").along.between(0.8, 1.1).all()
