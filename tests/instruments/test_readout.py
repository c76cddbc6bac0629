"""Logits in portions are the model's own logits, and a frozen head is linear, the clean stream's, and given back."""

import pytest
import torch

from support.exact_networks import rng
from surgery import Stack
from surgery.instruments import known_networks, readout
from surgery.instruments.readout import frozen_head, log_probabilities, logits, portions


@pytest.mark.parametrize(("at_once", "sizes"), [(2.5, [2, 2, 1]), (5, [5]), (0.5, [1] * 5)])
def test_portions_take_every_row_once_and_never_more_than_fit(monkeypatch, at_once, sizes):
    monkeypatch.setattr(readout, "LOGITS_AT_ONCE", int(at_once * known_networks.D_VOCAB))
    monkeypatch.setattr(readout, "LEAST_AT_ONCE", 1)
    stack, x = Stack(known_networks.random_network(n_layers=1)), torch.zeros(5, 64)
    found = list(portions(stack, x))
    assert [len(rows) for rows in found] == sizes
    assert torch.cat(found).tolist() == list(range(5))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_logits_are_the_models_own_in_single_precision_or_better(dtype, wide):
    stack = Stack(known_networks.random_network(n_layers=1, dtype=dtype))
    x = torch.randn(3, stack.d_model, generator=rng()).to(dtype)
    assert logits(stack, x).dtype == log_probabilities(stack, x).dtype == wide
    assert torch.equal(logits(stack, x), stack.readout(x).to(wide))
    assert torch.equal(log_probabilities(stack, x), stack.readout(x).to(wide).log_softmax(-1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "native-ln"])
def test_a_frozen_head_is_linear_and_the_same_on_the_clean_stream(opened, name):
    stack = opened(name)
    x = torch.randn(5, stack.d_model)
    plain, doubled = stack.readout(x), stack.readout(2 * x)
    with frozen_head(stack, x):
        torch.testing.assert_close(stack.readout(x), plain, rtol=1e-4, atol=1e-4)
        zero, twice = stack.readout(0 * x), stack.readout(2 * x)
    torch.testing.assert_close(twice - zero, 2 * (plain - zero), rtol=1e-4, atol=1e-4)
    assert (twice - doubled).abs().max() > 0.1
    torch.testing.assert_close(stack.readout(x), plain)  # and gives the norm back


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_the_frozen_readout_is_linear_and_the_same_on_the_clean_stream(opened, name):
    stack = opened(name, torch.float64)
    x = stack.stream(torch.randint(4, 90, (3, 6), generator=rng()))[-1].flatten(0, 1)
    live = stack.readout(x)
    with frozen_head(stack, x):
        torch.testing.assert_close(stack.readout(x), live)
        one, two, three = (stack.readout(factor * x) for factor in (1, 2, 3))
        torch.testing.assert_close(three - two, two - one, rtol=0, atol=1e-5)  # RMS norms go through float32
        assert (two - one).abs().max() > 1e-3
    torch.testing.assert_close(stack.readout(x), live)


def test_a_head_without_a_norm_reads_out_as_ever():
    stack = Stack(known_networks.serial_network(n_layers=2))
    x = torch.randn(3, stack.d_model, generator=rng())
    plain = stack.readout(2 * x)
    with frozen_head(stack, x):
        assert torch.equal(stack.readout(2 * x), plain)


def test_what_is_no_norm_cannot_be_frozen(monkeypatch):
    stack = Stack(known_networks.random_network(n_layers=1))
    module = stack.engines[0].module.get_submodule(stack.model.ln_final.name)
    refused = pytest.raises(ValueError, match=r"is not a linear map over a root mean square; it cannot be frozen$")
    monkeypatch.setitem(vars(module), "forward", torch.tanh)
    with refused, frozen_head(stack, torch.ones(2, stack.d_model)):
        pass


def test_few_vectors_of_a_large_vocabulary_are_read_out_together(monkeypatch):
    monkeypatch.setattr(readout, "LOGITS_AT_ONCE", known_networks.D_VOCAB)
    monkeypatch.setattr(readout, "LEAST_AT_ONCE", 3)
    stack, x = Stack(known_networks.random_network(n_layers=1)), torch.zeros(5, 64)
    assert [len(rows) for rows in portions(stack, x)] == [3, 2]


@pytest.mark.parametrize("rows_in_cache", [1, 3, 100])
def test_the_normaliser_is_that_of_log_softmax(monkeypatch, rows_in_cache):
    monkeypatch.setattr(readout, "_IN_CACHE", rows_in_cache * 50)
    logits = 30 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[1, 3] = -torch.inf
    largest, total = readout.normaliser(logits)
    assert torch.allclose(logits - largest[:, None] - total.log()[:, None], logits.log_softmax(-1), atol=1e-12)
    assert torch.equal(largest, logits.amax(-1))
    for broken in (torch.nan, torch.inf):
        logits[2, 5] = broken
        assert readout.normaliser(logits)[1].isnan().tolist() == [False, False, True, *[False] * 4]
    logits[4] = -torch.inf
    assert readout.normaliser(logits)[1].isnan()[4]
