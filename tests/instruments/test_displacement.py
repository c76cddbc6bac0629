import numpy as np
import pytest
import torch

from support.exact_networks import attending_network, network, ou_network, rng
from surgery import Stack, reversion
from surgery.instruments import branches, displacement, known_networks
from surgery.instruments.displacement import KINDS, principal_components, responses
from surgery.instruments.ensemble import Ensemble, Visit
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import interval, weights
from surgery.stats.sampling import Sampling


def pulls(stack, tokens, draws, length=0.5):
    """Minus the slope of every kind, at layer 0, under prompt weights."""
    resampled = weights(len(tokens))
    found = responses(stack, Ensemble(Tokens.of(tokens)), [length] * stack.n_layers, draws)
    return {kind: -response.slope(0, resampled) for kind, response in found.items()}


def slope_of_the_cross_section(stack, tokens):
    return reversion.layers(stack, tokens, nulls=False, causal=False).kappa[0]


def test_a_linear_pull_is_recovered_exactly_at_every_layer_and_length():
    stack, tokens = Stack(ou_network([0.1, 0.4, -0.2])), Tokens.of(known_networks.tokens(24, 8))
    for lengths in ([0.01, 0.1, 1.0], [1.0] * 3):
        found = responses(stack, Ensemble(tokens, Sampling(batch_size=10)), lengths, draws=2)
        assert list(found) == [*KINDS, *(f"{kind}_frozen" for kind in KINDS)]
        for kind, response in found.items():
            for layer, kappa in enumerate((0.1, 0.4, -0.2)):
                assert response.slope(layer, weights(24, 20)).tolist() == pytest.approx([-kappa] * 21, abs=1e-5)
            if not kind.startswith("difference"):  # some tokens are the same and have none
                squares = 2 * torch.tensor(lengths, dtype=torch.float64).unsqueeze(1) ** 2
                torch.testing.assert_close(response.square, squares.expand(3, 24))


def test_each_kind_of_displacement_reads_its_own_directions():
    d_model, n_vocab = 8, 64
    pull = torch.linspace(0.8, 0.1, d_model, dtype=torch.float64)
    spread = torch.tensor([8.0, 6, 4, 3, 2, 1, 0.5, 0.25], dtype=torch.float64)
    noise = torch.randn(n_vocab, d_model, generator=rng(), dtype=torch.float64)
    embedding = torch.linalg.qr(noise - noise.mean(0))[0] * spread + 5
    every_token_once = torch.cat(
        [torch.zeros(8, 1, dtype=torch.long), torch.randperm(64, generator=rng()).view(8, 8)], 1
    )
    stack = Stack(network([-pull.diag()], embedding))
    kappa = slope_of_the_cross_section(stack, every_token_once)
    assert kappa == pytest.approx(float((pull * spread**2).sum() / (spread**2).sum()), abs=1e-9)
    assert pulls(stack, every_token_once, draws=1)["principal"][0].item() == pytest.approx(0.8, abs=1e-9)
    many = pulls(stack, every_token_once, draws=40)
    assert many["principal"][0].item() == pytest.approx(float(pull.mean()), abs=1e-9)  # all eight, in turn
    _, low, high = interval(many["random"])
    assert low < pull.mean() < high
    assert high - low < 0.06
    assert abs(many["difference"][0] - kappa) < 0.05 < abs(many["difference"][0] - pull.mean())


def test_one_token_is_displaced_at_a_time():
    # every token reads the mean of all so far: of its own displacement it sees 1 part in its position
    stack, tokens = attending_network(0.4, sharpness=0)
    assert slope_of_the_cross_section(stack, tokens[:, :3]) == pytest.approx(0.4, abs=1e-6)
    found = pulls(stack, tokens[:, :3], draws=20)
    for kind in ("difference", "difference_frozen"):
        assert 0.4 / 3 < found[kind][0] < 0.4 / 2
        assert found[kind][0].item() == pytest.approx(0.4 * (1 / 2 + 1 / 3) / 2, abs=0.01)


def test_frozen_norms_see_the_pull_that_live_norms_divide_away():
    # f(x) = -kappa x / rms(x) with rms(x) = 1: along x itself, one direction of four, only the frozen norm responds
    embedding = torch.randn(256, 4, generator=rng(), dtype=torch.float64)
    embedding = 2 * torch.nn.functional.normalize(embedding, dim=-1)
    stack = Stack(network([-0.4 * torch.eye(4)], embedding, norm="RMS"))
    found = pulls(stack, known_networks.tokens(48, 8), draws=20, length=0.04)
    for kind in KINDS:
        assert found[f"{kind}_frozen"][0].item() == pytest.approx(0.4, abs=1e-3)
    assert found["random"][0].item() == pytest.approx(0.4 * 3 / 4, abs=0.02)
    assert found["difference"][0].item() == pytest.approx(0.4 * 3 / 4, abs=0.1)


def test_a_norm_that_cannot_be_frozen_leaves_the_live_ones(monkeypatch):
    def refuse(*_):
        raise ValueError("no denominator")

    monkeypatch.setattr(Stack, "norm_state", refuse)
    assert list(pulls(Stack(ou_network([0.1])), known_networks.tokens(4, 4), draws=1)) == list(KINDS)


def test_tokens_that_differ_by_rounding_give_no_direction():
    transformer = Stack(known_networks.random_network(n_layers=3, norm="LN", dtype=torch.float64))
    tokens = known_networks.tokens(6, 4)
    mask = Tokens.of(tokens).ensemble()
    x = (1000 + torch.randn(6, 4, 48, generator=rng())).float()
    same = x[:1] * (1 + 1e-7 * torch.randn(6, 4, 48, generator=rng()))
    for given, length in ((x, 1.0), (same, 0.0)):
        visit = Visit(0, torch.arange(len(mask)), 0, transformer.context(tokens), mask, given, given)
        _, _, directions = displacement.displacements(visit, torch.eye(48).double(), 0, np.random.default_rng(0))
        torch.testing.assert_close(directions["difference"].norm(dim=-1), torch.full((6,), length).double())
        torch.testing.assert_close(directions["random"].norm(dim=-1), torch.ones(6).double())


def test_principal_components_are_those_of_the_centred_stream():
    spread = torch.tensor([5.0, 3, 2, 1, 0, 0, 0, 0], dtype=torch.float64)  # four directions are empty
    embedding = 7 + torch.randn(256, 8, generator=rng(), dtype=torch.float64) * spread
    stack, tokens = Stack(network([torch.zeros(8, 8)], embedding)), known_networks.tokens(12, 9)
    x = stack.stream(tokens)[0, :, 1:].flatten(0, 1)
    expected = torch.linalg.svd(x - x.mean(0))[2]
    for count, found in ((2, 2), (8, 4)):
        (basis,) = principal_components(stack, Ensemble(Tokens.of(tokens), Sampling(batch_size=5)), count)
        torch.testing.assert_close((basis * expected[:found]).sum(1).abs(), torch.ones(found).double())


@pytest.mark.parametrize(("lengths", "draws"), [([1.0], 1), ([1.0, 1.0], 0)])
def test_bad_input_is_refused_in_a_sentence(lengths, draws):
    ensemble = Ensemble(Tokens.of(known_networks.tokens(4, 4)))
    with pytest.raises(ValueError, match=f"each of 2 layers, got draws={draws} and {len(lengths)} lengths"):
        responses(Stack(ou_network([0.1, 0.2])), ensemble, lengths, draws)


def test_it_costs_what_the_docstring_says(monkeypatch):
    stack, seen = Stack(known_networks.random_network(n_layers=3)), []
    layer = Engine.layer
    monkeypatch.setattr(
        Engine, "layer", lambda engine, index, x, call: seen.append(index) or layer(engine, index, x, call)
    )
    inputs = Ensemble(Tokens.of(known_networks.tokens(4, 5))), [0.1] * 3
    for draws in (1, 4):
        seen.clear()
        responses(stack, *inputs, draws)
        assert [seen.count(index) for index in range(3)] == [3 + 2] * 3
    monkeypatch.setattr(branches, "_with_branches", lambda *_: None)
    seen.clear()
    responses(stack, *inputs, 4)
    assert [seen.count(index) for index in range(3)] == [3 + 6 * 4] * 3
