"""Boundaries that damage shows: found where they are, not found where layers only drift, and refused in words."""

import numpy as np
import pytest
import torch

from surgery import Stack
from surgery.anatomy import crossing
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.wiring import families

L = 15
PAIRS = crossing.pairs(L)


def damages(seed: int, kind: str, ratio: float = 1.0) -> np.ndarray:
    """Damage of every swap on twelve texts: layers and distances cost, times ``ratio`` across 5 and 10."""
    generator = np.random.default_rng((seed, 11))
    size = np.exp(0.5 * generator.standard_normal(L))
    if kind == "drift":  # layers on a line that speeds up and slows down smoothly
        speed = np.exp(0.5 * np.convolve(generator.standard_normal(L + 6), np.ones(7) / 7**0.5, "valid"))
        place = speed.cumsum()
        mean = np.array([np.log1p(abs(place[i] - place[j])) * size[i] * size[j] for i, j in PAIRS])
    else:
        mean = np.array([size[i] * size[j] * (j - i) ** 0.5 for i, j in PAIRS]) * generator.lognormal(
            0, 0.4, len(PAIRS)
        )
    across = crossing.crosses(PAIRS, (5, 10), "swap")
    return mean * np.where(across, ratio, 1) * generator.lognormal(0, 0.3, (12, len(PAIRS)))


@pytest.mark.parametrize("kind", ["independent", "drift"])
def test_without_boundaries_few_are_found(kind):
    found = [crossing.parts(damages(seed, kind), PAIRS, "swap", L, draws=99)["p"] < 0.05 for seed in range(40)]
    assert sum(found) <= 5  # of 40 at 5 %: more in 1.4 % of runs


def test_boundaries_that_matter_are_found_where_they_are():
    rows = [crossing.parts(damages(seed, "independent", 4.0), PAIRS, "swap", L, draws=99) for seed in range(12)]
    assert sum(row["p"] < 0.05 for row in rows) >= 9
    assert sum(row["parts"] == ":5 5:10 10:" for row in rows) >= 9
    assert np.median([row["ratio"] for row in rows]) == pytest.approx(4, rel=0.3)
    assert np.mean([row["power"] for row in rows]) > 0.5


def test_given_boundaries_are_found_more_easily_and_wrong_ones_are_not():
    right, wrong = (
        [crossing.parts(damages(s, "independent", 2.0), PAIRS, "swap", L, at, draws=99)["p"] < 0.05 for s in range(12)]
        for at in ((5, 10), (3, 12))
    )
    assert sum(right) >= 8 > sum(wrong)


def test_any_number_of_parts_is_looked_for_at_once():
    four = crossing.crosses(PAIRS, (3, 7, 11), "swap")
    for seed in range(4):
        damage = damages(seed, "independent") * np.where(four, 5, 1)
        found = crossing.parts(damage, PAIRS, "swap", L, counts=(1, 2, 3, 4), draws=99)
        assert (found["parts"], found["looked_for"]) == (":3 3:7 7:11 11:", "2 or 3 or 4 or 5")
        assert found["p"] < 0.05


def test_a_search_for_more_parts_claims_no_more_where_there_are_none():
    rows = [crossing.parts(damages(s, "drift"), PAIRS, "swap", L, counts=(1, 2, 3, 4), draws=99) for s in range(40)]
    assert sum(row["p"] < 0.05 for row in rows) <= 5


def test_boundaries_leave_enough_layers_in_each_part():
    assert crossing._placements(7, 2, 2) == [(2, 4), (2, 5), (3, 5)]
    assert crossing._placements(5, 2, 2) == []


def test_the_scale_of_damages_changes_nothing():
    damage = damages(0, "independent", 3.0)
    one, other = (crossing.parts(factor * damage, PAIRS, "swap", L, draws=19) for factor in (1.0, 1000.0))
    assert one == pytest.approx(other)


def test_spans_cross_what_they_reach_over():
    assert crossing.crosses([(0, 2), (0, 3), (3, 5)], [2], "skip").tolist() == [False, True, False]
    assert crossing.crosses([(0, 1), (1, 2), (0, 4)], [2], "swap").tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("damage", "n_layers", "message"),
    [
        (np.full((3, len(PAIRS)), np.nan), L, "not a finite number"),
        (np.ones((3, 6)), 4, "do not divide into 3 parts of 2 layers or more"),
    ],
)
def test_what_cannot_be_tested_is_refused(damage, n_layers, message):
    with pytest.raises(ValueError, match=message):
        crossing.parts(damage, crossing.pairs(n_layers), "swap", n_layers)


def damage_of(network, family):
    """What every span of a network costs on random tokens: the divergence, [prompt, span], and the spans."""
    stack, prompts = Stack(network), Tokens.of(known_networks.tokens(12, 8))
    spans, wirings = zip(*families.spans(family, stack.n_layers))
    whole = stack.run(prompts).log_softmax(-1)
    context = stack.context(prompts)
    changed = [stack.run(context, wiring).log_softmax(-1) for wiring in wirings]
    kl = [(whole.exp() * (whole - one)).sum(-1).mean(1) for one in changed]
    return torch.stack(kl, 1).numpy().astype(float), [(a, b - (family == "swap")) for a, b in spans]


def test_a_network_wired_in_parts_is_found():
    damage, spans = damage_of(known_networks.parted_network((5, 5, 5)), "parallel")
    for counts in ((2,), (1, 2, 3, 4)):
        row = crossing.parts(damage, spans, "parallel", 15, counts=counts, draws=59)
        assert (row["parts"], row["shown"]) == (":5 5:10 10:", True)
        assert row["ratio"] > 5


@pytest.mark.parametrize("family", ["swap", "parallel"])
@pytest.mark.parametrize("seed", [0, 3])
def test_a_chain_of_layers_has_no_parts(family, seed):
    damage, spans = damage_of(known_networks.serial_network(n_layers=15, seed=seed), family)
    row = crossing.parts(damage, spans, family, 15, counts=(1, 2, 3, 4), min_size=3, draws=59)
    assert not row["shown"]
    assert row["p"] > 0.05


def test_layers_of_a_part_can_be_swapped_for_nothing():
    stack, prompts = Stack(known_networks.parted_network((3, 3))), known_networks.tokens(6, 8)
    whole = stack.run(prompts)
    assert torch.allclose(stack.run(prompts, "2 1 0 3:"), whole, atol=1e-6)
    assert not torch.allclose(stack.run(prompts, ":2 3 2 4:"), whole, atol=1e-3)
    with pytest.raises(ValueError, match="numbers of layers, 1 or more"):
        known_networks.parted_network((3, 0))
