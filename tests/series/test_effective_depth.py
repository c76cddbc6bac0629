"""Effective depth is where a curve crosses a threshold, and moves with the threshold."""

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import network, ou_network, ragged, rng
from surgery import Stack, series
from surgery.instruments import known_networks, lens, similarity
from surgery.models.engine import Engine
from surgery.records import tables
from surgery.series import effective_depth
from surgery.stats.sampling import Sampling

TOKENS = known_networks.tokens(40, 8)


def test_the_cosine_crossing_is_found_where_erasing_turns_into_strengthening():
    stack = Stack(ou_network([0.3, 0.2, -0.1, 0.4, -0.3, -0.3], mean=0.0))  # cosine: - - + - + +
    frame = effective_depth.grid(stack, TOKENS, cosine=[0.0, 0.5, -0.5], sampling=Sampling(resamples=20)).query(
        "criterion == 'cosine'"
    )
    assert frame["depth"].tolist() == [5, 5, 5]  # the last crossing, in layers counted from 1
    assert frame["ratio"].tolist() == [5 / 6] * 3
    assert (frame["depth_low"] == frame["depth_high"]).all()
    never = effective_depth.effective(
        Stack(ou_network([0.3, 0.2], mean=0.0)), TOKENS, sampling=Sampling(resamples=5)
    ).set_index("criterion")
    assert np.isnan(never.loc["cosine", "depth"])


def test_the_layer_that_writes_the_answer_is_the_depth():
    """Layers 0 and 3 do nothing, layer 2 replaces the stream: before it nothing of the answer can be read."""
    embedding = torch.zeros(known_networks.D_VOCAB, 16, dtype=torch.float64)
    embedding[:, :8] = torch.randn(known_networks.D_VOCAB, 8, generator=rng(), dtype=torch.float64)
    move = -torch.eye(16, dtype=torch.float64)
    move[8:, :8] = 4 * torch.eye(8)
    nothing = torch.zeros(16, 16, dtype=torch.float64)
    frame = effective_depth.grid(
        Stack(network([nothing, nothing, move, nothing], embedding)), TOKENS, sampling=Sampling(resamples=20)
    )
    assert (frame[frame["criterion"] != "cosine"]["depth"] == 3).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_depths_follow_from_the_curves_of_lens_and_similarity(side):
    stack, tokens = Stack(known_networks.random_network(dtype=torch.float64)), ragged(side)
    curve = lens.layers(stack, tokens, tuned=False, sampling=Sampling(resamples=0)).iloc[1:]
    cosine = similarity.layers(stack, tokens, sampling=Sampling(resamples=0))["cosine"].tolist()
    frame = effective_depth.grid(stack, tokens, sampling=Sampling(resamples=0, batch_size=5))
    for _, row in frame.iterrows():
        if row["criterion"] == "kl":
            met = curve["kl_final_lens"] < row["threshold"] * curve["kl_final_lens"].max()
            expected = [*curve["layer"][met]][:1]
        elif row["criterion"] == "overlap":
            expected = [*curve["layer"][curve["top5_overlap"] > row["threshold"]]][:1]
        else:
            at = row["threshold"]
            expected = [layer + 1 for layer in range(1, 6) if cosine[layer - 1] < at <= cosine[layer]][-1:]
        assert [row["depth"]] == expected or (not expected and np.isnan(row["depth"]))


def test_depth_moves_with_the_threshold_and_does_not_tell_serial_from_parallel():
    tokens = known_networks.tokens(100, 8)
    grids = [
        effective_depth.grid(Stack(known_networks.mixed_network(share)), tokens, sampling=Sampling(resamples=0))
        for share in (0.0, 1.0)
    ]
    depths = []
    for share, grid in zip((0.0, 1.0), grids, strict=True):
        kl, overlap = (grid[grid["criterion"] == name]["depth"].to_numpy() for name in ("kl", "overlap"))
        assert (np.diff(kl) <= 0).all(), share
        assert (np.diff(overlap) >= 0).all(), share
        assert kl.max() - kl.min() >= 3, share
        assert overlap.max() - overlap.min() >= 3, share
        depths.append(np.concatenate([kl, overlap]))
    assert np.abs(depths[0] - depths[1]).mean() < 0.5  # layers; another threshold moves either by more
    s = [
        series.windows(Stack(known_networks.mixed_network(share)), TOKENS, 2, sampling=Sampling(resamples=0))["S"]
        for share in (0.0, 1.0)
    ]
    assert np.allclose(s[0], 0, atol=1e-6)
    assert np.allclose(s[1], 1)


def test_effective_is_one_threshold_of_each():
    stack = Stack(known_networks.random_network())
    found = effective_depth.effective(stack, TOKENS, kl=0.4, overlap=0.2, sampling=Sampling(resamples=20))
    grid = effective_depth.grid(stack, TOKENS, sampling=Sampling(resamples=20)).set_index(["criterion", "threshold"])
    rows = grid.loc[[("cosine", 0.0), ("kl", 0.4), ("overlap", 0.2)]].reset_index()
    pd.testing.assert_frame_equal(found, rows)
    assert list(found.columns) == list(effective_depth.COLUMNS)


def test_it_costs_what_it_says(monkeypatch):
    stack, calls, heads, run = Stack(known_networks.random_network(n_layers=3)), [], [], Engine.layer
    read = Stack.readout
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(1) or run(*arguments))
    monkeypatch.setattr(Stack, "readout", lambda self, x, **options: heads.append(1) or read(self, x, **options))
    effective_depth.grid(stack, TOKENS, sampling=Sampling(resamples=0, skip_massive=False))
    assert (len(calls), len(heads)) == (2 * 3, 3 + 2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_it_opens_what_the_stack_opens_and_its_columns_are_explained(name, load, tmp_path):
    stack, tokens = Stack(load(name)), torch.randint(4, 96, (12, 8), generator=rng())
    frame = effective_depth.effective(stack, tokens, sampling=Sampling(resamples=20))
    assert frame.query("criterion != 'cosine'")["depth"].between(1, 4).all()
    tables.write(frame, tmp_path / "depth.csv", {}, effective_depth.COLUMNS)
    pd.testing.assert_frame_equal(tables.read(tmp_path / "depth.csv"), frame)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cosine": 2.0}, "a threshold of cosine lies between -1 and 1, got 2.0"),
        ({"kl": -0.1}, "a threshold of kl lies between 0 and 1, got -0.1"),
        ({"overlap": 1.5}, "a threshold of overlap lies between 0 and 1, got 1.5"),
        ({"tokens": known_networks.tokens(5, 1)}, "no token is left to measure"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        effective_depth.effective(Stack(known_networks.random_network()), **{"tokens": TOKENS, **arguments})
