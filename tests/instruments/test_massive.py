"""Which tokens are left out for massive activations, which are not, and what the others hold of the variance."""

import warnings

import pytest
import torch

from support.exact_networks import network, ou_network, rng
from surgery import Stack
from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.massive import DECIDES, TIMES, MassiveUpdateWarning, Usual, decided_by_one, warn_of_updates
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling

N_TOKENS, WIDTH = 1000, 32


@pytest.fixture
def streams():
    return torch.randn(1, N_TOKENS, WIDTH, generator=rng())


def left_out(streams):
    return Usual.of(streams).exceeds(streams).any(0).nonzero().flatten().tolist()


def planted(stack, times, share=0.02, dimension=3):
    """Make some tokens of the vocabulary carry a number ``times`` the median magnitude, and return their ids."""
    ids = list(range(5, known_networks.D_VOCAB, int(1 / share)))
    with torch.no_grad():
        embedding = next(weight for name, weight in stack.model.named_parameters() if "embed" in name)
        embedding[ids, dimension] = times * embedding.abs().median()
    return ids


# --- judging ----------------------------------------------------------------------------------------------------------


def test_a_token_is_judged_against_others_in_the_same_dimension(streams):
    streams[0, [7, 9], 4] = 500
    assert left_out(streams) == [7, 9]
    assert left_out(1e6 * streams + 3) == [7, 9]


@pytest.mark.parametrize("spread", [0, 1, 400])
def test_a_dimension_that_is_large_in_all_tokens_drops_none(streams, spread):
    streams[..., 4] = 700 + spread * streams[..., 4]
    assert left_out(streams) == []


def test_beside_large_dimensions_a_massive_token_is_still_seen(streams):
    streams[..., 4] = 700 + streams[..., 4]
    streams[0, 7, 4] = -700
    assert left_out(streams) == [7]


def test_dimensions_that_are_empty_in_most_tokens_drop_none(streams):
    streams[:, N_TOKENS // 5 :, : WIDTH // 2] = 0
    assert left_out(streams) == []


def test_tokens_that_are_no_small_minority_are_no_outliers(streams):
    streams[:, : N_TOKENS // 3, 0] = 500
    assert left_out(streams) == []
    streams[:, :, 0] = torch.where(torch.arange(N_TOKENS) < N_TOKENS // 5, 500.0, 0)
    assert len(left_out(streams)) == N_TOKENS // 5


def test_where_most_tokens_are_equal_nothing_can_be_judged(streams):
    streams[:, N_TOKENS // 4 :] = 1
    assert left_out(streams) == []


@pytest.mark.parametrize("degrees", [3, 5])
def test_heavy_tails_are_not_mistaken_for_massive_activations(degrees):
    chi = torch.distributions.Chi2(torch.tensor(float(degrees)))
    torch.manual_seed(0)
    streams = torch.randn(1, 4000, WIDTH) / (chi.sample((1, 4000, 1)) / degrees).sqrt()
    assert len(left_out(streams)) <= 0.002 * 4000


# --- in an ensemble ---------------------------------------------------------------------------------------------------


def test_massive_tokens_are_left_out_whatever_the_batches_and_only_where_asked():
    stack, tokens = Stack(known_networks.random_network(2)), known_networks.tokens(200, 16)
    ids = torch.tensor(planted(stack, 500))
    expected = torch.isin(tokens, ids) & Tokens.of(tokens).ensemble()
    for size in (7, 200):
        ensemble = Ensemble.of(stack, tokens, Sampling(batch_size=size))
        assert torch.equal(ensemble.left_out, expected)
        assert ensemble.n_massive == expected.sum() > 0
        assert not (ensemble.mask & expected).any()
    whole = Ensemble.of(stack, tokens, Sampling(skip_massive=False))
    assert whole.n_massive == 0
    assert whole.concentration is None


def test_no_network_of_known_structure_loses_a_token():
    for build in (known_networks.serial_network, known_networks.parallel_network, known_networks.linear_network):
        assert Ensemble.of(Stack(build()), known_networks.tokens()).n_massive == 0
    assert Ensemble.of(Stack(ou_network([0.1, 0.5, 1.5])), known_networks.tokens()).n_massive == 0


def test_an_ensemble_is_passed_on_as_it_is_unless_made_by_other_rules():
    stack = Stack(known_networks.random_network(2))
    made = Ensemble.of(stack, known_networks.tokens(8, 6))
    again = Ensemble.of(stack, made, Sampling(resamples=5, batch_size=3))
    assert again.tokens is made.tokens
    assert again.sampling == Sampling(resamples=5, batch_size=3)
    with pytest.raises(ValueError, match="cannot be measured with"):
        Ensemble.of(stack, made, Sampling(skip_first=False))


# --- what one token and one dimension hold ----------------------------------------------------------------------------


def test_shares_are_those_of_the_variance():
    stack, tokens = Stack(known_networks.random_network(3, dtype=torch.float64)), known_networks.tokens(9, 8)
    shares = Ensemble.of(stack, tokens, Sampling(batch_size=2)).concentration
    stream = stack.stream(tokens)[:, Tokens.of(tokens).ensemble()]
    for values, token, dimension in (
        (stream, shares.stream_token, shares.stream_dimension),
        (stream[1:] - stream[:-1], shares.update_token, shares.update_dimension),
    ):
        squares = (values - values.mean(1, keepdim=True)).square()
        whole = squares.sum((1, 2))
        torch.testing.assert_close(token, squares.sum(2).amax(1) / whole)
        torch.testing.assert_close(dimension, squares.sum(1).amax(1) / whole)
    row = shares.columns(streams=[1, 2], updates=[0])
    assert row["token_share"] == max(float(x) for x in (*shares.stream_token[1:3], shares.update_token[0]))
    assert row["dimension_share"] == max(float(x) for x in (*shares.stream_dimension[1:3], shares.update_dimension[0]))


def test_a_token_just_below_the_bound_is_kept_and_said_to_decide():
    stack, tokens = Stack(known_networks.random_network(2)), known_networks.tokens(64, 16)
    tokens[tokens == 5] = 6
    tokens[3, 9] = 5
    with torch.no_grad():
        embedding = next(weight for name, weight in stack.model.named_parameters() if "embed" in name)
        typical = (embedding - embedding.median(0).values).square().mean(1).median().sqrt()
        embedding[5] = 0.9 * TIMES * typical * torch.randn(embedding.shape[1], generator=rng()).sign()
    ensemble = Ensemble.of(stack, tokens)
    assert ensemble.n_massive == 0
    row = ensemble.concentration.columns(streams=[0])
    assert row["token_share"] > DECIDES
    assert decided_by_one(row["token_share"])
    assert not decided_by_one(float("nan"))


def test_what_does_not_vary_has_no_shares():
    silent = Stack(network([torch.zeros(8, 8)], torch.randn(256, 8, generator=rng(), dtype=torch.float64)))
    row = Ensemble.of(silent, known_networks.tokens(4, 6)).concentration.columns(updates=[0])
    assert str(row) == "{'n_tokens': 20, 'token_share': nan, 'dimension_share': nan}"


def test_a_span_that_writes_the_sink_is_told():
    update = torch.randn(40, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_updates(update, 3, 5)
    update[[0, 20]] *= 200
    with pytest.warns(MassiveUpdateWarning, match=r"layers \[3, 5\) write .* the usual length into 2 of 40 tokens"):
        warn_of_updates(update, 3, 5)
