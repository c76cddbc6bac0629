"""Similarity is exact where it can be worked out, and blind to what series reads."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import network, ou_network, parameters, ragged, rng
from surgery import Stack, series
from surgery.instruments import known_networks, similarity
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.records import tables
from surgery.stats.bootstrap import rotation
from surgery.stats.sampling import Sampling

TOKENS = known_networks.tokens(48, 8)
WIDTH, N_LAYERS = 6, 4


def rotations(serial: bool) -> Stack:
    """Each layer writes a rotation of the embedding, or of what the layer before it wrote, into a fresh subspace."""
    d_model, draw = (N_LAYERS + 1) * WIDTH, rng(3)
    maps = []
    for layer in range(N_LAYERS):
        read = layer * WIDTH if serial else 0
        linear = torch.zeros(d_model, d_model, dtype=torch.float64)
        turn = rotation(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64))
        linear[(layer + 1) * WIDTH : (layer + 2) * WIDTH, read : read + WIDTH] = turn
        maps.append(linear)
    embedding = torch.zeros(known_networks.D_VOCAB, d_model, dtype=torch.float64)
    embedding[:, :WIDTH] = torch.randn(known_networks.D_VOCAB, WIDTH, generator=draw, dtype=torch.float64)
    return Stack(network(maps, embedding))


def everything(stack: Stack, tokens=TOKENS) -> list[pd.DataFrame]:
    return [
        similarity.layers(stack, tokens, sampling=Sampling(resamples=20)),
        similarity.angles(stack, tokens, sampling=Sampling(resamples=20)),
        similarity.linearity(stack, tokens, sampling=Sampling(resamples=20)),
        similarity.cka(stack, tokens, sampling=Sampling(resamples=20)),
    ]


def test_a_chain_and_layers_side_by_side_read_the_same_in_everything_but_series():
    chain, beside = rotations(serial=True), rotations(serial=False)
    for one, other in zip(everything(chain), everything(beside), strict=True):
        one, other = (frame.drop(columns="dimension_share", errors="ignore") for frame in (one, other))
        pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-9)  # the ridge is no rotation's friend
    assert np.allclose(series.windows(chain, TOKENS, damage=False, sampling=Sampling(resamples=0))["S"], 1)
    assert np.allclose(series.windows(beside, TOKENS, damage=False, sampling=Sampling(resamples=0))["S"], 0, atol=1e-6)


def test_block_influence_size_and_angle_do_not_order_the_calibration_networks():
    means = {}
    for share in (0.0, 0.5, 1.0):
        stacks = [Stack(known_networks.mixed_network(share, seed=seed)) for seed in range(3)]
        rows = [
            similarity.layers(stack, TOKENS, sampling=Sampling(resamples=0)).query("layer > 0").mean()
            for stack in stacks
        ]
        spans = [
            similarity.angles(stack, TOKENS, sampling=Sampling(resamples=0)).query("start > 0")["angle"].mean()
            for stack in stacks
        ]
        means[share] = pd.DataFrame(rows).assign(angle=spans)
    for name in ("block_influence", "update_ratio", "angle"):
        parallel, mixed, serial = (means[share][name] for share in (0.0, 0.5, 1.0))
        assert serial.min() < parallel.max(), name  # seeds overlap
        assert mixed.mean() < min(parallel.mean(), serial.mean()), name  # and what is between lies outside
    assert means[1.0]["cosine"].abs().max() < 1e-6
    assert means[0.0]["cosine"].abs().max() < 1e-6


def test_a_bent_chain_reads_less_alike_at_a_distance_and_a_neighbour_does_not():
    @functools.cache
    def frames(share: float) -> list[pd.DataFrame]:
        stacks = [Stack(known_networks.mixed_network(share, seed=seed)) for seed in range(3)]
        tokens, sampling = known_networks.tokens(150, 8), Sampling(resamples=0)
        return [similarity.cka(stack, tokens, sampling=sampling).set_index(["layer_a", "layer_b"]) for stack in stacks]

    def alike(share: float, a: int, b: int) -> list[float]:
        return [frame.loc[(a, b), "cka"] for frame in frames(share)]

    assert max(alike(1.0, 0, 6)) < 0.6 < 0.8 < min(alike(0.0, 0, 6))
    assert min(alike(1.0, 1, 2)) < max(alike(0.0, 1, 2))


@pytest.mark.parametrize(("side", "skip_first"), [("left", True), ("right", True), ("right", False)])
def test_layers_are_what_the_formulas_say_under_padding_and_batches(side, skip_first):
    stack, tokens = Stack(known_networks.random_network(dtype=torch.float64)), ragged(side)
    frame = similarity.layers(
        stack, tokens, sublayers=True, sampling=Sampling(skip_first=skip_first, resamples=0, batch_size=5)
    )
    x = stack.stream(tokens)[:, tokens.ensemble(skip_first)]
    cosine = torch.nn.functional.cosine_similarity
    u = x[1:] - x[:-1]
    assert np.allclose(frame["block_influence"], 1 - cosine(x[:-1], x[1:], dim=-1).mean(1))
    assert np.allclose(frame["cosine"], cosine(u, x[:-1], dim=-1).mean(1))
    assert np.allclose(frame["update_ratio"], (u.norm(dim=-1) / x[:-1].norm(dim=-1)).mean(1))
    context = stack.context(tokens)
    middle = stack.execute("2.attn", stack.stream(tokens)[2], context)[tokens.ensemble(skip_first)]
    assert frame["attn_ratio"][2] == pytest.approx(float(((middle - x[2]).norm(dim=-1) / x[2].norm(dim=-1)).mean()))
    assert frame["mlp_cosine"][2] == pytest.approx(float(cosine(x[3] - middle, middle, dim=-1).mean()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_angles_are_those_of_the_last_token(side):
    stack, tokens = Stack(known_networks.random_network(dtype=torch.float64)), ragged(side)
    frame = similarity.angles(stack, tokens, max_length=2, sampling=Sampling(resamples=0, batch_size=5)).set_index(
        ["start", "stop"]
    )
    last = 14 if side == "left" else tokens.mask.sum(1) - 1
    x = stack.stream(tokens)[:, torch.arange(12), last]
    angle = torch.nn.functional.cosine_similarity(x[1], x[3], dim=-1).arccos().mean() / torch.pi
    assert frame.loc[(1, 3), "angle"] == pytest.approx(float(angle))
    assert len(frame) == 6 + 5


def test_a_linear_pull_is_linear_and_a_rectifier_is_so_in_part():
    tokens = known_networks.tokens(150, 10)
    pull = similarity.linearity(Stack(ou_network([0.3, -0.2])), tokens, ridge=0.0, sampling=Sampling(resamples=0))
    assert np.allclose(pull[["linearity", "linearity_stream"]], 1)
    bent = Stack(known_networks.random_network(n_layers=1, norm=None))
    with torch.no_grad():
        for name, weight in parameters(bent.model).items():
            if "attn.o" in name:
                weight.zero_()
            if "fc_in.weight" in name:
                weight.mul_(0)
                weight[0, 0] = 300  # one rectifier of one normal number
    found = similarity.linearity(bent, tokens, sampling=Sampling(resamples=20))
    assert found["linearity"][0] == pytest.approx(0.25 / ((1 - 1 / np.pi) / 2), abs=0.1)
    mostly_identity = similarity.linearity(
        Stack(known_networks.parallel_network()), tokens, sampling=Sampling(resamples=0)
    )
    assert (mostly_identity["linearity_stream"] > mostly_identity["linearity"] + 0.03).all()


def test_linearity_is_measured_on_prompts_that_were_not_fitted():
    """With fewer tokens than dimensions the fitted half would read 1."""
    frame = similarity.linearity(
        Stack(known_networks.random_network()), known_networks.tokens(8, 6), ridge=1e-6, sampling=Sampling(resamples=0)
    )
    assert frame["linearity"].max() < 0.9
    assert (frame["n_prompts"] == 4).all()


def test_cka_is_the_unbiased_estimator_of_the_definition():
    draw = rng(1)
    a = torch.randn(9, 3, generator=draw, dtype=torch.float64)
    b = torch.randn(9, 5, generator=draw, dtype=torch.float64) + a[:, :1]
    kernels = [x @ x.T for x in (a, b)]
    expected = 0.0  # the U-statistic over quadruples: Hilbert-Schmidt independence without bias
    for i, j, q, r in torch.cartesian_prod(*[torch.arange(9)] * 4).tolist():
        if len({i, j, q, r}) == 4:
            k, m = kernels
            expected += float(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]))
    expected /= 9 * 8 * 7 * 6
    for kernel in kernels:
        kernel.fill_diagonal_(0)
    ones = torch.ones(1, 9, dtype=torch.float64)
    assert float(similarity._hsic(*kernels, ones)) / (9 * 6) == pytest.approx(expected)


def test_cka_of_unrelated_streams_is_nought_and_of_the_same_is_one():
    embedding = torch.randn(known_networks.D_VOCAB, 24, generator=rng(), dtype=torch.float64)
    found = similarity.cka(
        Stack(network([torch.zeros(24, 24).double()], embedding)), TOKENS, sampling=Sampling(resamples=50)
    )
    assert np.allclose(found["cka"], 1)
    noise = torch.randn(2, 60, 400, generator=rng(), dtype=torch.float64)
    kernels = noise @ noise.mT
    kernels.diagonal(dim1=1, dim2=2).zero_()
    ones = torch.ones(1, 60, dtype=torch.float64)
    cross, one, other = (similarity._hsic(kernels[i], kernels[j], ones) for i, j in ((0, 1), (0, 0), (1, 1)))
    assert abs(float(cross / (one * other).sqrt())) < 0.1  # the biased one reads about .9 here


def test_cost_is_what_it_says(monkeypatch):
    stack, calls, run = Stack(known_networks.random_network(n_layers=3)), [], Engine.layer
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(arguments[1]) or run(*arguments))
    tokens, sampling = known_networks.tokens(6, 6), Sampling(resamples=0, skip_massive=False)
    for measure in (similarity.layers, similarity.angles, similarity.cka):
        calls.clear()
        measure(stack, tokens, sampling=sampling)
        assert len(calls) == 3
    calls.clear()
    similarity.linearity(stack, tokens, sampling=sampling)
    assert len(calls) == 2 * 3  # half of the prompts each


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_it_opens_what_the_stack_opens_and_its_columns_are_explained(name, opened, tmp_path):
    tokens = torch.randint(4, 96, (12, 8), generator=rng())
    stack = opened(name)
    for frame in (
        *everything(stack, tokens),
        similarity.layers(stack, tokens, sublayers=True, sampling=Sampling(resamples=5)),
    ):
        assert frame.notna().all().all()
        tables.write(frame, tmp_path / "similarity.csv", {}, similarity.COLUMNS)
        pd.testing.assert_frame_equal(tables.read(tmp_path / "similarity.csv"), frame)


def test_intervals_hold_the_estimate_and_the_seed_decides():
    stack = Stack(known_networks.random_network())
    frame = similarity.layers(stack, TOKENS)
    assert ((frame["cosine_low"] < frame["cosine"]) & (frame["cosine"] < frame["cosine_high"])).all()
    pd.testing.assert_frame_equal(similarity.cka(stack, TOKENS), similarity.cka(stack, TOKENS))
    assert not np.allclose(
        similarity.cka(stack, TOKENS, sampling=Sampling(seed=1))["cka"], similarity.cka(stack, TOKENS)["cka"]
    )


def test_bad_input_is_refused_in_a_sentence(load):
    stack = Stack(known_networks.random_network())
    with pytest.raises(ValueError, match="there is one prompt: give at least two"):
        similarity.linearity(stack, known_networks.tokens(1, 9))
    with pytest.raises(ValueError, match="cka takes four prompts with a token to measure, there are 3"):
        similarity.cka(stack, known_networks.tokens(3, 9))
    with pytest.raises(ValueError, match="no token is left to measure"):
        similarity.layers(stack, Tokens.of(known_networks.tokens(5, 1)))
    with pytest.raises(ValueError, match="ridge is a penalty, 0 or more, got -1"):
        similarity.linearity(stack, TOKENS, ridge=-1.0)
    with pytest.raises(ValueError, match="runs sublayers"):
        similarity.layers(Stack(load("native-attention-only")), torch.ones(4, 5, dtype=torch.long), sublayers=True)
