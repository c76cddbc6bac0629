import numpy as np
import pytest
import torch

from surgery import Stack, models
from surgery.corpus import bundled
from surgery.corpus.babel import Babel
from surgery.graft import reinitialise
from surgery.graft.reinitialise import COLUMNS, layers
from surgery.instruments import known_networks
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling

TOKENS = known_networks.tokens(10, 8)
ANSWERED = torch.zeros(10, 8, dtype=torch.bool)
ANSWERED[:, 6:] = True
FRESH = known_networks.random_network(n_layers=4, seed=3)


@torch.no_grad()
def transplanted(layer, seed):
    """A model one layer of which is that of the untrained model of ``seed``."""
    model, donor = (known_networks.random_network(n_layers=4, seed=number) for number in (9, seed))
    donor = dict(donor.named_parameters())
    for name, weight in model.named_parameters():
        if name.startswith(f"layers.{layer}."):
            weight.copy_(donor[name])
    return model


def test_a_layer_that_was_never_trained_costs_nothing_with_its_own_seed():
    frame = layers(Stack(transplanted(2, seed=5)), TOKENS, seeds=1, sampling=Sampling(seed=5))
    assert frame.loc[2, ["damage", "damage_low", "damage_high", "damage_least", "damage_most"]].eq(0).all()
    assert frame.robust[2] == "yes"
    assert frame.damage.drop(2).abs().min() > 1e-3
    several = layers(Stack(transplanted(2, seed=5)), TOKENS, seeds=3, sampling=Sampling(seed=3))
    assert several.damage_least[2] * several.damage_most[2] == 0  # one seed of three is the layer's own
    assert several.damage[2] != 0


def test_a_layer_is_worked_out_by_hand():
    stack = Stack(known_networks.random_network(n_layers=3, seed=9, dtype=torch.float64))
    found = layers(stack, TOKENS, seeds=2, answers=ANSWERED, sampling=Sampling(seed=20, resamples=0, batch_size=4))
    context, damages, exacts = stack.context(TOKENS), [], []

    def scores(x):
        log = stack.readout(x)[:, :-1].log_softmax(-1)
        right = (log.argmax(-1) == TOKENS[:, 1:]) | ~ANSWERED[:, 1:]
        return -log.gather(-1, TOKENS[:, 1:, None]).mean().item(), right.all(1).double().mean().item()

    clean = stack.stream(context)
    for seed in (20, 21):
        fresh = Stack(models.untrained(stack.model, seed))
        x = fresh.execute("1", clean[1].to(fresh.dtype), fresh.context(TOKENS)).double()
        loss, exact = scores(stack.execute("2:", x, context))
        damages.append(loss - scores(clean[-1])[0])
        exacts.append(exact)
    row = found.loc[1]
    assert row.damage == pytest.approx(np.mean(damages), abs=1e-9)
    assert (row.damage_least, row.damage_most) == pytest.approx((min(damages), max(damages)), abs=1e-9)
    assert row.exact == pytest.approx(np.mean(exacts))
    assert row.exact_original == scores(clean[-1])[1]
    skipped = scores(stack.execute("2:", clean[1], context))[0] - scores(clean[-1])[0]
    assert row.damage_skip == pytest.approx(skipped, abs=1e-9)


@torch.no_grad()
def certain(model, last):
    """The constructed network with a head that reads what ``last`` wrote and is sure of it: its own first choice."""
    weights = {name.replace("._original_component", ""): weight for name, weight in model.named_parameters()}
    width = 8
    written = slice((last + 1) * width, (last + 2) * width)
    stream = Stack(model).stream(torch.arange(256)[:, None])[-1, :, 0]
    weights["head.weight"].zero_()
    weights["head.weight"][:, written] = 30 * torch.nn.functional.normalize(stream[:, written], dim=-1)
    return Stack(model)


def test_every_layer_of_a_series_is_critical_and_of_a_parallel_network_only_the_one_that_is_read():
    ids = torch.arange(256)[torch.randperm(256, generator=torch.Generator().manual_seed(0))][:40, None].expand(-1, 6)
    serial = certain(known_networks.serial_network(n_layers=4), last=3)
    parallel = certain(known_networks.parallel_network(n_layers=4), last=3)
    chain, beside = (layers(stack, ids, seeds=2) for stack in (serial, parallel))
    assert (chain.damage > 1).all()
    assert set(chain.robust) == {"no"}
    assert beside.damage[3] > 1
    assert beside.damage_skip[:3].abs().max() < 1e-5


def test_the_model_itself_as_initial_costs_nothing_and_is_asked_alone():
    model = known_networks.random_network(n_layers=3, seed=9)
    frame = layers(Stack(model), TOKENS, seeds=3, initial=model)
    assert (frame.damage == 0).all()
    assert set(frame.n_seeds) == {1}
    other = known_networks.random_network(n_layers=3, seed=1)
    assert layers(Stack(model), TOKENS, initial=other).damage.tolist() == (
        layers(Stack(model), TOKENS, seeds=1, sampling=Sampling(seed=1)).damage.tolist()
    )


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_published_architectures_and_their_weights_stay_as_they_are(load, name):
    model = load(name)
    before = [weight.clone() for weight in model.parameters()]
    tokens = torch.randint(4, 90, (6, 7), generator=torch.Generator().manual_seed(0))
    frame = layers(Stack(model), tokens, seeds=2)
    assert np.isfinite(frame.select_dtypes("number")).all().all()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters()))


def test_the_bundled_model_needs_its_layers():
    ids, answers = Babel().encode(bundled.problems(20))
    tokens = Tokens(torch.from_numpy(ids), torch.from_numpy(ids) != 0)
    frame = layers(Stack(models.load("babel")), tokens, seeds=1, answers=answers, sampling=Sampling(resamples=50))
    assert frame.exact_original.min() > 0.9
    assert frame.damage[0] > 1
    assert frame.exact[0] < 0.5
    assert set(frame) == set(COLUMNS)


def test_padding_and_batches_do_not_matter_and_a_seed_decides():
    stack = Stack(known_networks.random_network(n_layers=3, seed=9, dtype=torch.float64))
    tokens = Tokens(TOKENS, torch.arange(8) < torch.tensor([[8]] * 6 + [[5]] * 4))
    one, same, small, other = (
        layers(stack, tokens, seeds=1, sampling=Sampling(resamples=20, **options))
        for options in ({}, {}, {"batch_size": 3}, {"seed": 1})
    )
    assert one.equals(same)
    assert not np.allclose(one.damage, other.damage)
    np.testing.assert_allclose(small.damage, one.damage, atol=1e-6)  # the fresh layers are in single precision
    state = torch.random.get_rng_state()
    layers(stack, tokens, seeds=1, sampling=Sampling(resamples=0))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_robust_is_said_only_when_the_interval_allows(monkeypatch):
    stack = Stack(known_networks.random_network(n_layers=4, seed=9))
    frame = layers(stack, TOKENS, initial=FRESH)
    for threshold, said in ((100.0, "yes"), (-100.0, "no"), (float(frame.damage[1]), "undecided")):
        monkeypatch.setattr(reinitialise, "ROBUST", threshold)
        assert layers(stack, TOKENS, initial=FRESH).robust[1] == said
    one = layers(stack, TOKENS[:1], initial=FRESH)
    assert one.damage_low.isna().all()
    assert set(one.robust) == {"undecided"}


def test_it_costs_what_it_says(monkeypatch):
    stack, run, calls = Stack(known_networks.random_network(n_layers=4)), Engine.layer, []
    opened = Stack(FRESH)
    monkeypatch.setattr(reinitialise, "Stack", lambda model: opened)
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(arguments[1]) or run(*arguments))
    layers(stack, TOKENS, initial=FRESH, sampling=Sampling(skip_massive=False))
    assert len(calls) == 4 * (5 / 2 + 1) + 4 * (3 / 2 + 1)


def test_what_cannot_be_measured_is_refused():
    stack = Stack(known_networks.random_network(n_layers=3))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        layers(stack, TOKENS, seeds=0)
    with pytest.raises(ValueError, match=r"has 4 layers of 48 dimensions, .* has 3 of 48"):
        layers(stack, TOKENS, initial=FRESH)
    with pytest.raises(ValueError, match="no token is left to measure"):
        layers(stack, TOKENS[:, :1])
    with pytest.raises(ValueError, match="the answer of prompt 1"):
        layers(stack, TOKENS, answers=torch.zeros_like(ANSWERED))
