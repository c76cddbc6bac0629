import functools

import numpy as np
import pytest
import torch

from support.exact_networks import network, rng
from surgery import Stack
from surgery.instruments import known_networks
from surgery.records import tables
from surgery.series.jacobians import COLUMNS, NULLS, linearise, pairs
from surgery.stats.bootstrap import rotation
from surgery.stats.sampling import Sampling


@functools.cache
def measured(share, norm=None, frozen=True):
    model = known_networks.mixed_network(share, n_layers=4, norm=norm, dtype=torch.float64)
    frame = pairs(Stack(model), known_networks.tokens(64, 6), frozen=frozen, sampling=Sampling(resamples=20))
    return frame.set_index(["earlier", "later"])


@pytest.mark.parametrize("norm", [None, "RMS"])
def test_parallel_network_composes_nothing(norm):
    assert measured(0.0, norm)[["direct", "total"]].to_numpy().max() < 1e-6


@pytest.mark.parametrize("norm", [None, "RMS"])
def test_serial_network_composes_neighbours_directly_and_all_in_total(norm):
    frame = measured(1.0, norm)
    neighbours = frame.index.get_level_values("later") - frame.index.get_level_values("earlier") == 1
    assert (frame["direct_excess_low"][neighbours] > 0.1).all()
    assert frame["direct"][~neighbours].max() < 1e-6
    assert (frame["total_excess_low"] > 0).all()
    assert np.allclose(frame["direct"][neighbours], frame["total"][neighbours], rtol=0.1)


def test_between_parallel_and_serial_it_rises():
    readings = [measured(share)["total"].mean() for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (np.diff(readings) > 0.03).all()


def test_live_norms_couple_a_parallel_network():
    assert measured(0.0, "RMS", frozen=False)["direct"].min() > 1e-3


def test_of_linear_layers_it_is_the_norm_of_the_product_of_their_matrices():
    maps = [torch.randn(6, 6, generator=rng(i), dtype=torch.float64) / 3 for i in range(3)]
    stack = Stack(network(maps, torch.randn(256, 6, generator=rng(9))))
    found = pairs(stack, known_networks.tokens(64, 16), probes=8, sampling=Sampling(resamples=0)).set_index(
        ["earlier", "later"]
    )
    first, second, third = maps
    for pair, between in (((0, 1), torch.eye(6)), ((0, 2), torch.eye(6) + second)):
        left, right = maps[pair[1]], between.double() @ first
        assert found.loc[pair, "total"] == pytest.approx(
            float((left @ right).norm() / left.norm() / right.norm()), rel=0.03
        )
    assert found.loc[(0, 2), "direct"] == pytest.approx(
        float((third @ first).norm() / third.norm() / first.norm()), rel=0.03
    )


def test_layers_without_preference_read_the_baseline():
    maps = [rotation(torch.randn(16, 16, generator=rng(i), dtype=torch.float64)) for i in range(3)]
    frame = pairs(
        Stack(network(maps, torch.randn(256, 16, generator=rng(9)))),
        known_networks.tokens(8, 6),
        sampling=Sampling(resamples=0),
    )
    assert frame["baseline"].tolist() == [0.25] * 3
    assert np.allclose(frame[["direct", "total"]], 0.25)


def test_a_random_network_is_near_the_baseline():
    stack = Stack(known_networks.random_network(n_layers=3))
    assert (
        pairs(stack, known_networks.tokens(24, 8), sampling=Sampling(resamples=0))["direct_excess"].abs().max() < 0.05
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "mixtral"])
def test_derivatives_are_those_of_the_layer_in_every_architecture(load, name):
    stack = Stack(load(name))
    context = stack.context(known_networks.tokens(2, 6) % 96)
    stream = stack.stream(context)
    change = torch.randn(stream[1].shape, generator=rng())
    with stack.frozen(context):
        found = linearise(stack, 1, stream[1], context)(change)
        after, before = (stack.update(1, stream[1] + step * change, context) for step in (1e-3, -1e-3))
    torch.testing.assert_close(found, (after - before) / 2e-3, rtol=0, atol=5e-3 * float(found.abs().max()))
    assert (
        pairs(stack, known_networks.tokens(4, 6) % 96, sampling=Sampling(resamples=5))[list(COLUMNS)]
        .notna()
        .all()
        .all()
    )


def test_batches_matter_to_the_probes_alone_and_the_seed_decides():
    stack, tokens = Stack(known_networks.random_network(n_layers=3)), known_networks.tokens(12, 6)
    first, again, other = (pairs(stack, tokens, sampling=Sampling(resamples=5, seed=seed)) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not np.allclose(first["total"], other["total"])
    parts = pairs(stack, tokens, sampling=Sampling(resamples=5, batch_size=5))
    assert np.allclose(parts["total"], first["total"], atol=0.05)


def test_a_table_can_be_written(tmp_path):
    frame = measured(0.5).reset_index()
    tables.write(frame, tmp_path / "jacobians.csv", {}, COLUMNS)
    assert set(frame) == set(COLUMNS)


def test_it_costs_what_the_docstring_says(monkeypatch):
    stack, seen, update = Stack(known_networks.random_network(n_layers=3)), [], Stack.update
    products, grad = [], torch.autograd.grad
    monkeypatch.setattr(Stack, "update", lambda *args, **more: seen.append(args[1]) or update(*args, **more))
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **more: products.append(1) or grad(*args, **more))
    pairs(stack, known_networks.tokens(4, 5), probes=2)
    linearisations = [seen.count(layer) for layer in range(3)]
    assert linearisations == [2, 2, 2]  # the walk and the linearisation; the norms' denominators do not go this way
    # a layer, the nulls of all but the first, two probes of all but the last, two products a pair, neighbours one
    assert len(products) == 3 + 2 * NULLS + 2 * 2 + 2 * (2 + 1 + 1)


@pytest.mark.parametrize(
    ("n_layers", "probes", "message"), [(1, 1, "one layer; a pair needs two"), (2, 0, "got probes=0")]
)
def test_bad_input_is_refused_in_a_sentence(n_layers, probes, message):
    with pytest.raises(ValueError, match=message):
        pairs(Stack(known_networks.random_network(n_layers=n_layers)), known_networks.tokens(4, 4), probes=probes)


def test_no_token_is_refused():
    with pytest.raises(ValueError, match="no token is left"):
        pairs(Stack(known_networks.random_network(n_layers=2)), known_networks.tokens(4, 1))
