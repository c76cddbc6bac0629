import functools

import numpy as np
import pytest
import torch

from support.exact_networks import last_reader
from surgery import Stack
from surgery.instruments import known_networks, linear_head
from surgery.instruments.readout import frozen_head
from surgery.models.stack import Stack as Opened
from surgery.records import tables
from surgery.series import side_by_side
from surgery.series.attribution import COLUMNS, effects
from surgery.stats.sampling import Sampling


@functools.cache
def measured(share, norm=None, own_head=True, frozen=True):
    made = known_networks.mixed_network(share, n_layers=4, norm=norm, dtype=torch.float64)
    model = made if own_head else last_reader(share, norm)
    return effects(Stack(model), known_networks.tokens(16, 6), frozen=frozen, sampling=Sampling(resamples=20))


@pytest.mark.parametrize("norm", [None, "RMS"])
def test_parallel_network_acts_directly(norm):
    frame = measured(0.0, norm)
    assert frame["M"].max() < 1e-6
    assert frame["DE"].min() > 0.1


@pytest.mark.parametrize("norm", [None, "RMS"])
def test_serial_network_acts_through_later_layers_where_the_head_reads_the_last(norm):
    frame = measured(1.0, norm, own_head=False)
    assert np.allclose(frame["M"], [1, 1, 1, 0], atol=1e-6)
    assert (frame["IE"][:3] > 0.01).all()


def test_a_head_that_reads_every_layer_lowers_the_indirect_share_of_the_serial_network():
    shares = measured(1.0)["M"]
    assert (np.diff(shares) < 0).all()
    assert shares[0] < 0.8
    assert shares[3] == 0


def test_between_parallel_and_serial_it_rises():
    readings = [measured(share)["M"][:3].mean() for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (np.diff(readings) > 0.02).all()


def test_live_norms_pass_for_an_indirect_effect():
    assert measured(0.0, "RMS", frozen=False)["M"][:3].min() > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2"])
def test_every_effect_is_what_the_formulas_say(load, name):
    stack, tokens = Stack(load(name)), known_networks.tokens(6, 5) % 96
    found = effects(stack, tokens, frozen=False, sampling=Sampling(resamples=0)).set_index("layer").loc[1]
    context = stack.context(tokens)
    x, mask = stack.stream(context), torch.ones(6, 5, dtype=torch.bool)
    mask[:, 0] = False
    update = x[2] - x[1]
    lost = (update - update[mask].mean(0)) * mask.unsqueeze(-1)
    ablated = stack.execute("2:", x[2] - lost, context)
    with frozen_head(stack, x[-1][mask]):
        y, total, direct = (stack.readout(final[mask]) for final in (x[-1], ablated, x[-1] - lost))

    def size(effect):
        return float((effect - effect.mean(-1, keepdim=True)).square().sum(-1).mean().sqrt())

    expected = {"TE": size(y - total), "DE": size(y - direct), "IE": size(direct - total)}
    expected["M"] = expected["IE"] / (expected["IE"] + expected["DE"])
    for column, value in expected.items():
        assert found[column] == pytest.approx(value, rel=1e-4)


def test_intervals_batches_and_tables(tmp_path):
    stack, tokens = Stack(known_networks.random_network(n_layers=3)), known_networks.tokens(12, 6)
    whole, parts = (effects(stack, tokens, sampling=Sampling(resamples=20, batch_size=size)) for size in (64, 5))
    assert np.allclose(whole, parts, rtol=1e-4, atol=1e-6)
    assert (whole["M_low"][:2] < whole["M"][:2]).all()
    assert (whole["M"][:2] < whole["M_high"][:2]).all()
    tables.write(whole, tmp_path / "effects.csv", {}, COLUMNS)
    assert set(whole) == set(COLUMNS)


def test_a_layer_that_writes_the_same_for_all_has_no_share():
    model = known_networks.serial_network(n_layers=3, biases=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("layers.1") and "fc_out" in name and name.endswith("weight"):
                value.zero_()
    frame = effects(Stack(model), known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
    assert frame["TE"][1] < 1e-5 * frame["TE"][0]


@pytest.mark.parametrize(("linear", "expected"), [(True, 2), (False, 2 * 4 + 1)])  # two to try the form
def test_it_costs_what_the_docstring_says(linear, expected, monkeypatch):
    stack, readouts, readout = Stack(known_networks.random_network(n_layers=4)), [], Opened.readout
    tokens = known_networks.tokens(4, 5)
    monkeypatch.setattr(Opened, "readout", lambda *args, **more: readouts.append(1) or readout(*args, **more))
    if not linear:
        monkeypatch.setattr(linear_head, "head_gram", lambda stack: None)
    with side_by_side.counted_layers() as count:
        effects(stack, tokens, sampling=Sampling(skip_massive=False))
    assert count[0] / tokens.numel() / 4 == (4 - 1) / 2 + 3
    assert len(readouts) == expected


def test_no_token_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="no token is left to measure"):
        effects(Stack(known_networks.random_network(n_layers=2)), known_networks.tokens(4, 1))
