import math
import time

import numpy as np
import pytest
import torch

from support.exact_networks import ou_network, parameters, ragged, rng
from surgery import Stack, progress
from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble, exchange, partners
from surgery.instruments.memory import Memory
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling


@pytest.fixture(scope="module")
def transformer():
    return Stack(known_networks.random_network(n_layers=3, dtype=torch.float64))


# --- going through it -------------------------------------------------------------------------------------------------


def test_a_walk_meets_every_layer_of_every_batch_with_the_models_own_stream(transformer):
    tokens = ragged("left")
    stream = transformer.stream(tokens)
    visits = list(Ensemble(tokens, Sampling(batch_size=5)).visits(transformer))
    assert [(visit.first, len(visit.mask)) for visit in visits] == [(0, 4)] * 3 + [(4, 4)] * 3 + [(8, 4)] * 3
    assert [visit.layer for visit in visits] == [0, 1, 2] * 3
    for visit in visits:
        prompts = slice(visit.first, visit.first + 4)
        assert torch.equal(visit.mask, tokens.ensemble()[prompts])
        torch.testing.assert_close(visit.x[visit.mask], stream[visit.layer, prompts][visit.mask])
        torch.testing.assert_close((visit.x + visit.u)[visit.mask], stream[visit.layer + 1, prompts][visit.mask])


def test_layers_run_in_the_order_asked_for(transformer):
    tokens = known_networks.tokens(4, 6)
    order = [2, 0, 1]
    visits = list(Ensemble(Tokens.of(tokens)).visits(transformer, "any order", order))
    assert [visit.layer for visit in visits] == order
    context = transformer.context(tokens)
    torch.testing.assert_close(visits[-1].x, transformer.execute("2 0", context.x0, context))


def test_first_tokens_belong_to_it_when_asked():
    tokens = ragged("left")
    assert torch.equal(Ensemble(tokens).mask, tokens.ensemble())
    assert torch.equal(Ensemble(tokens, Sampling(skip_first=False)).mask, tokens.mask)


@pytest.mark.parametrize("purpose", [(), (1,)])
def test_random_numbers_return_for_the_same_visit_purpose_and_seed_only(transformer, purpose):
    tokens = Tokens.of(known_networks.tokens(4, 6))
    visits = list(Ensemble(tokens, Sampling(batch_size=2)).visits(transformer))

    def drawn(seed, *purpose):
        return [Ensemble(tokens, Sampling(seed=seed)).generator(visit, *purpose).random() for visit in visits]

    assert drawn(0, *purpose) == drawn(0, *purpose)
    assert len({*drawn(0, *purpose), *drawn(1, *purpose)}) == 2 * len(visits)
    assert all(one != other for one, other in zip(drawn(0, *purpose), drawn(0, 2)))


def test_a_stream_that_is_not_finite_is_refused():
    stack = Stack(ou_network([0.1, 0.2, 0.3]))
    with torch.no_grad():
        parameters(stack.model)["layers.1.mlp.fc_out.weight"][0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite at layer 1"):
        list(Ensemble(Tokens.of(known_networks.tokens(4, 4))).visits(stack))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.long), {}, "in 3 prompts: give prompts of two tokens or more, or skip_first"),
        (torch.zeros(0, 5, dtype=torch.long), {"skip_first": False}, "in 0 prompts: give prompts with tokens"),
        (known_networks.tokens(2, 4), {"batch_size": 0}, "batch_size must be positive, got batch_size=0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(Tokens.of(tokens), Sampling(**options))


def test_progress_draws_on_the_terminal_only_when_asked(transformer, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    tokens = Tokens.of(known_networks.tokens(2, 4))
    list(Ensemble(tokens).visits(transformer))
    assert capsys.readouterr() == ("", "")
    for _ in Ensemble(tokens, Sampling(progress=True)).visits(transformer):
        time.sleep(0.02)
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.endswith("layers: done after 0 s\n")


# --- partners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 7, 3, 7], [4, 9], [6], [0, 3, 0, 2], [2, 2]])
def test_partners_are_a_permutation_within_places(lengths):
    mask = torch.arange(10) < torch.tensor(lengths).unsqueeze(1)
    prompt, place = mask.nonzero(as_tuple=True)
    found = partners(mask, np.random.default_rng(0))
    assert sorted(found.tolist()) == list(range(sum(lengths)))
    assert (found != torch.arange(sum(lengths))).all()
    last_shared = sorted(lengths)[-2] - 1 if len(lengths) > 1 else -1
    before = place < last_shared
    assert torch.equal(place[found][before], place[before])
    assert (prompt[found][before] != prompt[before]).all()
    assert len(found) < 5 or not torch.equal(found, partners(mask, np.random.default_rng(1)))


def test_a_lone_token_is_its_own_partner():
    assert partners(torch.tensor([[True]]), np.random.default_rng(0)).tolist() == [0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("skip_first", [True, False])
def test_every_real_token_takes_from_another_prompt_at_the_same_position(side, skip_first):
    tokens = ragged(side)
    mask = tokens.ensemble(skip_first)
    prompt, position = mask.nonzero()[:, 0], tokens.positions[mask]
    found = partners(mask, np.random.default_rng(0))
    shared = (
        position < 11
    )  # only one prompt has a twelfth and a thirteenth token: there, with two others at most, a ring
    assert torch.equal(position[found][shared], position[shared])
    assert (prompt[found][shared] != prompt[shared]).all()
    assert (position[found][~shared] >= 11).all()
    given = exchange(tokens.ids.unsqueeze(-1).double(), mask, found).squeeze(-1)
    assert torch.equal(given[mask], tokens.ids[mask][found].double())
    assert torch.equal(given[~mask], tokens.ids[~mask].double())


def test_what_is_exchanged_keeps_its_mean_and_its_size():
    mask = ragged("right").mask
    values = torch.randn(*mask.shape, 3, generator=rng(), dtype=torch.float64)
    found = exchange(values, mask, partners(mask, np.random.default_rng(0)))
    assert not torch.isclose(found[mask], values[mask]).any()
    torch.testing.assert_close(found[mask].sort(0).values, values[mask].sort(0).values, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [2**30, 20_000, 0])
def test_a_walk_that_is_remembered_is_the_walk_and_costs_nothing(monkeypatch, limit):
    stack, tokens = Stack(known_networks.random_network(n_layers=4)), Tokens.of(known_networks.tokens(12, 6))
    plain, seen = Ensemble(tokens, Sampling(batch_size=5)), []
    update = Stack.update
    monkeypatch.setattr(Stack, "update", lambda *args, **options: seen.append(args[1]) or update(*args, **options))
    remembering = plain.remembering(memory := Memory(limit=limit))
    for order in (None, [2, 0, 3, 1], None, [2, 0, 1, 3]):
        seen.clear()
        streams = [stream for *_, stream in plain.streams(stack, order=order)]
        cost = len(seen)
        again = [stream for *_, stream in remembering.streams(stack, order=order)]
        assert all(torch.equal(one, other) for one, other in zip(streams, again, strict=True))
    again_cost = len(seen) - cost  # the last order begins as the second did, and there are three batches
    assert cost == 4 * 3
    assert again_cost == {2**30: 2 * 3, 0: cost}.get(limit, again_cost)
    assert 2 * 3 <= again_cost <= cost
    assert 0 <= memory.held <= limit
    assert torch.allclose(streams[0][-1], stack.execute("2 0 1 3", streams[0][0], stack.context(tokens[:4])), atol=1e-5)
