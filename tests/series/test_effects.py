import functools

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import network, ragged, rng
from surgery import Stack
from surgery.instruments import known_networks
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.series import effects
from surgery.stats.bootstrap import weights
from surgery.stats.sampling import Sampling

TOKENS = known_networks.tokens(16, 8)


@functools.cache
def stack(kind, *args, **sizes):
    return Stack(getattr(known_networks, f"{kind}_network")(*args, **{"n_layers": 4, **sizes}))


@functools.cache
def measured(kind, *args, ablation="mean", frozen=True, **sizes):
    return effects.matrix(stack(kind, *args, **sizes), TOKENS, ablation, frozen=frozen, sampling=Sampling(resamples=20))


# --- the constructed networks ---


@pytest.mark.parametrize("ablation", ["skip", "mean", "resample"])
@pytest.mark.parametrize("norm", [None, "RMS"])
def test_no_layer_of_the_parallel_network_has_an_effect(ablation, norm):
    frame = measured("parallel", ablation=ablation, norm=norm)
    assert frame[["T", "local", "chain", "relative_mean", "relative_max"]].abs().max().max() < 1e-5


@pytest.mark.parametrize("ablation", ["skip", "mean"])
@pytest.mark.parametrize("biases", [False, True])
def test_every_layer_of_the_serial_network_needs_all_before_but_reads_only_the_last(ablation, biases):
    frame = measured("serial", ablation=ablation, biases=biases)
    assert (frame["T"] - 1).abs().max() < 1e-5
    adjacent = frame["later"] == frame["layer"] + 1
    assert (frame["local"] - adjacent).abs().max() < 1e-5
    assert (frame["chain"] - ~adjacent).abs().max() < 1e-5


def test_a_norm_leaks_live_and_dilutes_frozen():
    live = measured("parallel", norm="RMS", frozen=False)
    assert live["T"].between(0.005, 0.3).all()
    serial = measured("serial", norm="RMS", biases=True)
    assert serial["T"].between(0.3, 0.99).all()  # a constant over a token's denominator is not constant


def test_total_and_local_effects_rise_with_the_share():
    frames = [measured("mixed", share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for name in ("T", "local"):
        adjacent = [frame.loc[frame["later"] == frame["layer"] + 1, name].mean() for frame in frames]
        assert (np.diff(adjacent) > 0.05).all()
    assert (np.diff([frame["T"].mean() for frame in frames]) > 0.05).all()


def test_the_untrained_transformer_prefers_no_pair():
    frame = measured("random")
    later = frame[frame["layer"] > 0]  # from layer 0 all reads as effect: the embeddings are small
    assert later["T"].between(0.2, 0.5).all()
    assert later["chain"].abs().max() < 0.2


# --- the published effect ---


def test_relative_effect_is_that_of_every_token():
    opened = stack("random", dtype=torch.float64)
    tokens = known_networks.tokens(6, 7)
    frame = effects.matrix(opened, tokens, "skip", frozen=False, sampling=Sampling(resamples=1, seed=4)).set_index(
        ["layer", "later"]
    )
    context = opened.context(tokens)
    stream = opened.stream(context)
    x = stream[2].clone()
    x[:, 0] = stream[2, :, 0]
    entry = x.clone()
    entry[:, 0] = stream[2, :, 0]
    entry[:, 1:] = stream[1, :, 1:]  # layer 1 skipped, but at the first token
    changed, clean = opened.update(2, entry, context)[:, 1:], (stream[3] - stream[2])[:, 1:]
    relative = ((changed - clean).norm(dim=-1) / clean.norm(dim=-1)).numpy()
    row = frame.loc[1, 2]
    assert row["relative_mean"] == pytest.approx(relative.mean(), rel=1e-5)
    assert row["relative_max"] == pytest.approx(relative.max(), rel=1e-5)
    for level in (50, 90):
        expected = np.quantile(relative, level / 100, method="inverted_cdf")
        assert row[f"relative_q{level}"] == pytest.approx(expected, rel=1e-5)
    drawn = np.repeat(relative, weights(6, 1, 4)[1].int().numpy(), axis=0)
    assert row["relative_mean_low"] == pytest.approx(drawn.mean(), rel=1e-5)
    assert row["relative_q90_high"] == pytest.approx(np.quantile(drawn, 0.9, method="inverted_cdf"), rel=1e-5)


def test_a_linear_layer_shows_its_own_coefficient():
    """Layer 1 adds half of what it finds; layer 0, skipped, had doubled it: T = |x/2| / (|x| + |x/2|) = 1/3."""
    embedding = torch.randn(known_networks.D_VOCAB, 6, generator=rng(), dtype=torch.float64)
    frame = effects.matrix(
        Stack(network([torch.eye(6), torch.eye(6) / 2], embedding)), TOKENS, "skip", sampling=Sampling(resamples=0)
    )
    assert frame["T"].tolist() == pytest.approx([1 / 3])
    assert frame["relative_mean"].tolist() == pytest.approx([1 / 2], rel=1e-5)
    half = effects.matrix(
        Stack(network([torch.eye(6), torch.eye(6) / 2], embedding)), TOKENS, "skip", 0.5, sampling=Sampling(resamples=0)
    )
    assert half["T"].tolist() == pytest.approx([0.25 / 1.75])


# --- later tokens ---


@torch.no_grad()
def carrying_network():
    """Layer 0 writes, and layer 2 alone has attention: nothing but what it fetches goes from token to token."""
    model = known_networks.random_network(3, norm=None)
    for name, weight in model.named_parameters():
        if "attn" in name and "layers.2" not in name:
            weight.zero_()
    return Stack(model)


def test_only_attention_carries_to_later_tokens():
    for kind in ("parallel", "serial"):
        frame = effects.future(stack(kind), TOKENS, sampling=Sampling(resamples=0))
        assert frame[["T", "relative_max"]].max().max() == 0
        assert np.isnan(effects.depth_score(stack(kind), TOKENS, sampling=Sampling(resamples=0))["depth_score"][0])
    opened = carrying_network()
    frame = effects.future(opened, TOKENS, sampling=Sampling(resamples=20)).set_index(["layer", "later"])
    assert frame.loc[(0, 1), "T"] == 0
    assert frame.loc[[(0, 2), (1, 2)], "T"].min() > 0.001
    output = effects.future_output(opened, TOKENS, sampling=Sampling(resamples=20))
    assert (output["l2"][:2] > 0).all()
    assert (output["kl"][:2] > 0).all()
    assert output["l2"][2] == output["l2_max"][2] == 0  # the last layer's writes are read by nobody
    assert (output["l2_max"] >= output["l2_high"]).all()
    score = effects.depth_score(opened, TOKENS, sampling=Sampling(resamples=20))
    l2 = output["l2"]
    assert score["depth_score"][0] == pytest.approx(l2[1] / (l2[0] + l2[1]))
    assert score["depth_score_low"][0] < score["depth_score"][0] < score["depth_score_high"][0]


def test_the_tokens_before_a_cut_are_taken_out_and_those_after_it_are_read():
    opened, tokens = stack("random", dtype=torch.float64), known_networks.tokens(5, 8)
    frame = effects.future(opened, tokens, [3], frozen=False, sampling=Sampling(resamples=0)).set_index(
        ["layer", "later"]
    )
    context = opened.context(tokens)
    stream = opened.stream(context)
    entry = stream[1].clone()
    entry[:, 1:3] = stream[0, :, 1:3]
    changed, clean = opened.update(1, entry, context)[:, 3:], (stream[2] - stream[1])[:, 3:]

    def size(a):
        return (a - a.mean((0, 1))).square().sum().sqrt()

    expected = size(changed - clean) / (size(changed) + size(clean))
    assert frame.loc[(0, 1), "T"] == pytest.approx(float(expected))
    pooled = effects.future(opened, tokens, [3, 5], frozen=False, sampling=Sampling(resamples=1)).set_index(
        ["layer", "later"]
    )
    single = effects.future(opened, tokens, [5], frozen=False, sampling=Sampling(resamples=1)).set_index(
        ["layer", "later"]
    )
    tokens_after = np.array([5, 3])  # of eight, behind each cut
    expected = np.array([frame.loc[(0, 1), "relative_mean"], single.loc[(0, 1), "relative_mean"]])
    assert pooled.loc[(0, 1), "relative_mean"] == pytest.approx((tokens_after * expected).sum() / 8)


# --- form ---


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_architectures(load, name):
    opened, tokens = Stack(load(name)), torch.randint(4, 90, (4, 7), generator=rng())
    frame = effects.matrix(opened, tokens, sampling=Sampling(resamples=5))
    assert len(frame) == 6
    assert frame["T"].between(0, 1).all()
    assert frame["local"].between(0, 1).all()
    assert (frame.loc[frame["later"] == frame["layer"] + 1, "chain"].abs() < 1e-5).all()  # nothing lies between
    assert (effects.future(opened, tokens, sampling=Sampling(resamples=5))["T"] > 0).all()
    assert effects.depth_score(opened, tokens, sampling=Sampling(resamples=5))["depth_score"].between(0, 2).all()


def test_padding_and_batches_do_not_matter():
    opened = stack("random", dtype=torch.float64)
    for measure in (effects.matrix, effects.future, effects.future_output):
        arguments = {"cuts": [3, 6]} if measure is not effects.matrix else {}
        sampling = Sampling(resamples=5)
        plain = measure(opened, ragged("right"), sampling=sampling, **arguments)
        left = measure(opened, ragged("left"), sampling=sampling, **arguments)
        pd.testing.assert_frame_equal(left, plain, rtol=1e-5)
        parts = measure(opened, ragged("right"), sampling=sampling.but(batch_size=5), **arguments)
        pd.testing.assert_frame_equal(parts, plain, rtol=1e-5)


def test_a_resample_is_the_measurement_of_the_resampled_prompts():
    opened, tokens = stack("random", dtype=torch.float64), ragged("right")
    frame = effects.matrix(opened, tokens, "skip", sampling=Sampling(resamples=1, seed=3))
    drawn = torch.repeat_interleave(torch.arange(12), weights(12, 1, seed=3)[1].long())
    again = effects.matrix(
        opened, Tokens(tokens.ids[drawn], tokens.mask[drawn]), "skip", sampling=Sampling(resamples=0)
    )
    for name in ("T", "local", "chain", "relative_mean", "relative_q50", "relative_q90"):
        assert np.allclose(frame[f"{name}_low"], again[name], rtol=1e-5, atol=1e-9), name


def test_a_dead_layer_is_undefined():
    model = known_networks.mixed_network(1.0, 4, biases=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("layers.3") and "fc_out" in name and name.endswith("weight"):
                weight.zero_()
    frame = effects.matrix(Stack(model), TOKENS, sampling=Sampling(resamples=5))
    assert (frame["T"].isna() == (frame["later"] == 3)).all()


def test_columns_are_explained_and_the_ends_of_intervals_in_order():
    frames = [measured("random"), effects.future_output(stack("random"), TOKENS, sampling=Sampling(resamples=20))]
    frames.append(effects.depth_score(stack("random"), TOKENS, sampling=Sampling(resamples=20)))
    for frame in frames:
        assert set(frame) <= set(effects.COLUMNS)
        assert frame.notna().all().all()
        for name in (column.removesuffix("_low") for column in frame if column.endswith("_low")):
            assert (frame[f"{name}_low"] <= frame[f"{name}_high"]).all()


def test_it_costs_what_it_says(monkeypatch):
    opened, run, calls = stack("random"), Engine.layer, []
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(arguments[1]) or run(*arguments))
    effects.matrix(opened, TOKENS, sampling=(sampling := Sampling(resamples=0, skip_massive=False)))
    assert len(calls) == 4 * ((4 - 1) + 3)
    calls.clear()
    effects.future(opened, TOKENS, [3, 5], sampling=sampling)
    assert len(calls) == 4 * (2 * (4 - 1) / 2 + 2)


@pytest.mark.parametrize(
    ("measure", "arguments", "message"),
    [
        (effects.matrix, {"kind": "zero"}, "taken out by skip, mean, resample, not by 'zero'"),
        (effects.matrix, {"amount": 0.0}, "above 0 and up to 1, got 0.0"),
        (effects.future, {"cuts": [1]}, r"2 to 7 in these prompts, got \[1\]"),
        (effects.future_output, {"cuts": [8]}, r"2 to 7 in these prompts, got \[8\]"),
        (effects.depth_score, {"cuts": []}, r"got \[\]"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(measure, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(stack("parallel"), TOKENS, **arguments)


def test_one_layer_has_nothing_after_it():
    with pytest.raises(ValueError, match="has one layer"):
        effects.matrix(stack("parallel", n_layers=1), TOKENS)


def test_what_is_undefined_is_no_quantile_and_no_maximum(monkeypatch):
    opened, distances = stack("random"), effects._distances
    monkeypatch.setattr(effects, "_distances", lambda *args: distances(*args) * torch.nan)
    frame = effects.future_output(opened, TOKENS, [3], sampling=Sampling(resamples=0))
    assert frame["l2_max"].iloc[:-1].isna().all()
