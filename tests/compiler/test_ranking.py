"""S and R/R_rot beside what layers cost side by side: they agree where networks are planted, and say how surely."""

import numpy as np
import pytest

from surgery import Sampling, Stack
from surgery.compiler import ranking, search
from surgery.corpus.probes import Encoded
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens


def texts(count=12, length=8, seed=0, choices=1):
    """Random tokens as running text."""
    tokens = Tokens.of(known_networks.tokens(count * choices, length, seed))
    scored = tokens.mask.clone()
    scored[:, 0] = False
    rows = tuple(range(count))
    choice = tuple(place for place in range(choices) for _ in rows)
    return Encoded(tokens, scored, rows * choices, choice, ("",) * count, f"random {seed}", name="text")


@pytest.fixture(scope="module")
def planted():
    """A network whose layers read the one before in shares that rise and fall, and its ranking."""
    stack = Stack(known_networks.mixed_network([1, 0, 0.9, 0.3, 0.6, 0, 1, 0.5], n_layers=8))
    return stack, ranking.measure(stack, texts(), longest=3, sampling=Sampling(resamples=50))


def test_s_ranks_pairs_where_every_layer_writes_and_counts_as_much(planted):
    _, ranked = planted
    frame = ranked.correlations.set_index(["length", "measure", "price"])
    own = frame.loc[(2, "S", "kl")]
    assert own["n_windows"] == 6
    assert own["spearman"] > 0.85
    assert own["spearman_low"] > 0
    assert frame.loc[(2, "S", "kl"), "spearman"] == frame.loc[(2, "R", "kl"), "spearman"], "a pair has one number"
    assert (ranked.correlations["spearman_low"] <= ranked.correlations["spearman"] + 1e-9).all()
    assert (ranked.correlations["spearman"] <= ranked.correlations["spearman_high"] + 1e-9).all()


def test_windows_have_their_measures_and_prices(planted):
    stack, ranked = planted
    frame = ranked.windows
    assert list(frame) == list(ranking.COLUMNS)
    assert list(ranked.correlations) == list(ranking.CORRELATIONS)
    assert sorted(zip(frame["start"], frame["stop"])) == sorted((a, a + n) for n in (2, 3) for a in range(9 - n))
    free = frame[(frame["stop"] - frame["start"] == 2) & frame["start"].isin([0, 4])]
    assert free[["S", "kl"]].abs().max().max() < 1e-6
    groups = ((0,), (1, 2), *((layer,) for layer in range(3, 8)))
    cost = search.costs(stack, [groups], texts(), "kl")[groups]
    assert frame.set_index(["start", "stop"]).loc[(1, 3), "kl"] == pytest.approx(cost, rel=1e-6)


def test_a_ranking_leads_the_search_to_layers_that_do_not_read_each_other(planted):
    stack, ranked = planted
    led = search.divisions(stack, texts(), metric="kl", shallowest=6, screen=2, beam=1, ranking=ranked.by_layer())
    assert sorted(ranked.by_layer()) == list(range(1, 8))
    assert led["cost_search"].max() < 1e-6


def test_unrelated_ranks_are_seldom_called_related():
    generator = np.random.default_rng(0)
    called = []
    for _ in range(200):
        a, b = generator.normal(size=(2, 1, 11))
        noise = 0.3 * generator.normal(size=(2, 50, 11))
        noise[:, 0] = 0
        _, low, high = ranking.spearman(a + noise[0], b + noise[1])
        called.append(low > 0 or high < 0)
    assert np.mean(called) <= 0.05


def test_noise_of_texts_widens_the_interval():
    a = np.repeat(np.arange(10.0)[None], 50, 0)
    noisy = a + np.random.default_rng(0).normal(size=a.shape) * (np.arange(50) > 0)[:, None] * 3
    sure, unsure = ranking.spearman(a, a + a**2), ranking.spearman(a, noisy)
    assert sure[0] == unsure[0] == 1
    assert unsure[1] < sure[1]
    assert np.isnan(ranking.spearman(a[:, :3], a[:, :3])).all()
    assert np.isnan(ranking.spearman(a, np.ones_like(a))[0])


def test_what_cannot_be_ranked_is_refused(planted):
    stack, _ = planted
    with pytest.raises(ValueError, match="windows have 2 to 4 layers, as many as run as one; not 5"):
        ranking.measure(stack, texts(), longest=5)
    with pytest.raises(ValueError, match="questions with choices are several texts each"):
        ranking.measure(stack, texts(choices=2))
