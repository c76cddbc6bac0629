import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch

from surgery.stats.panels import (
    DECIDES,
    bracket,
    gram,
    half_panel,
    harris_tzavalis,
    increments,
    nickell,
    nickell_corrected,
    pesaran_cd,
    pooled,
    random_walk,
    sandwich,
    simulate,
    variance_ratio,
    within,
)


def exact(phi, T, shocks=None):
    """Second moments of the process itself: stationary, or from 0 with shocks of these variances. No sampling."""
    times = torch.arange(T + 1).double()
    powers = phi ** (times.unsqueeze(1) - times).abs()
    if shocks is None:
        return powers / (1 - phi**2)
    reached = [torch.zeros(()).double()]
    for shock in shocks:
        reached.append(phi**2 * reached[-1] + shock)
    level = torch.stack(reached)
    return powers * level[torch.minimum(times.unsqueeze(1), times).long()]


def regression(y, order):
    """phi by brute force: dummies, and trends, of every unit."""
    y = np.asarray(y)
    n, T = len(y), y.shape[1] - 1
    columns = [y[:, :-1].ravel()]
    columns += [np.kron(unit, np.arange(T) ** power) for unit in np.eye(n) for power in range(order)]
    return np.linalg.lstsq(np.array(columns).T, y[:, 1:].ravel(), rcond=None)[0][0]


# --- second moments ---------------------------------------------------------------------------------------------------


def test_gram_is_about_each_times_mean_and_groups_add_up():
    y = torch.randn(10, 5, 3, generator=torch.Generator().manual_seed(0)) + 7
    G = gram(y)
    c = y.double() - y.double().mean(0)
    torch.testing.assert_close(G, torch.einsum("uts,uvs->tv", c, c))
    torch.testing.assert_close(gram(y + torch.arange(15).reshape(5, 3)), G, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(gram(y[..., i]) for i in range(3)), G)
    by = torch.arange(10) // 4
    groups = gram(y, by)
    assert groups.shape == (3, 5, 5)
    torch.testing.assert_close(groups.sum(0), G)
    torch.testing.assert_close(groups[1], torch.einsum("uts,uvs->tv", c[4:8], c[4:8]))


@pytest.mark.parametrize("y", [torch.ones(4, 1), torch.full((4, 3), torch.nan), torch.tensor([[0.0, torch.inf]])])
def test_gram_refuses_what_is_no_panel(y):
    with pytest.raises(ValueError, match="two times or more, all finite"):
        gram(y)


# --- estimators -------------------------------------------------------------------------------------------------------


def test_estimators_are_the_regressions_that_they_stand_for():
    y = simulate(0.7, 12, 7, effects=1.5, seed=3)
    y = y - y.mean(0)
    G = gram(y)
    assert pooled(G).item() == pytest.approx(regression(y, 0))
    assert within(G).item() == pytest.approx(regression(y, 1))
    assert harris_tzavalis(y, "trend").phi == pytest.approx(regression(y, 2))
    assert bracket(G) == (within(G), pooled(G))
    assert pooled(G, torch.eye(7)[4]).item() == pytest.approx(float((y[:, 4] @ y[:, 5]) / (y[:, 4] @ y[:, 4])))
    weights = torch.arange(1, 8).double()
    expected = (weights * (y[:, :-1] * y[:, 1:])).sum() / (weights * y[:, :-1] ** 2).sum()
    assert pooled(G, weights).item() == pytest.approx(expected.item())


def test_everything_takes_resamples_as_leading_dimensions():
    many = torch.stack([gram(simulate(0.6, 30, 8, seed=seed)) for seed in range(6)]).unflatten(0, (2, 3))
    for estimator in (
        pooled,
        within,
        half_panel,
        random_walk,
        increments,
        lambda G: nickell_corrected(within(G), 8),
        lambda G: variance_ratio(G, 2, 5),
    ):
        torch.testing.assert_close(estimator(many)[1, 2], estimator(many[1, 2]))


def test_what_does_not_vary_is_undefined():
    constant = simulate(0.5, 20, 1)[:, :1].expand(20, 9)
    for estimator in (within, half_panel, lambda G: variance_ratio(G, 0, 8)):
        assert estimator(gram(constant)).isnan()
    assert pooled(gram(constant)).item() == pytest.approx(1)
    for estimator in (pooled, within, half_panel, lambda G: variance_ratio(G, 0, 8)):
        assert estimator(gram(simulate(0.5, 1, 8))).isnan()  # one unit is its own mean
    assert nickell_corrected(torch.tensor(torch.nan).double(), 8).isnan()
    value, error = sandwich(pooled, simulate(0.5, 1, 8))
    assert value.isnan()
    assert error.isnan()


@pytest.mark.parametrize("T", [2, 3, 12, 24, 48])
def test_nickell_is_what_within_reads_of_the_process_itself(T):
    for phi in (-0.5, 0.0, 0.3, 0.95, 0.999):
        assert (within(exact(phi, T)) - phi).item() == pytest.approx(nickell(phi, T).item(), abs=1e-9)
    for phi in (0.3, 0.95, 1.0, 1.05, 1.2):
        moments = exact(phi, T, torch.ones(T))
        assert (within(moments) - phi).item() == pytest.approx(nickell(phi, T, "zero").item(), abs=1e-9)
    assert nickell(1.0, T).item() == pytest.approx(-3 / (T + 1))
    assert nickell(1.0, T, "zero").item() == pytest.approx(-3 / (T + 1))


def test_nickells_own_formula_and_published_numbers():
    for T in (12, 24, 48):
        phi = torch.tensor([0.3, 0.5, 0.9, 0.95]).double()
        a = 1 - (1 - phi**T) / (T * (1 - phi))
        formula = -(1 + phi) / (T - 1) * a / (1 - 2 * phi * a / ((1 - phi) * (T - 1)))
        torch.testing.assert_close(nickell(phi, T), formula)
    assert nickell(0.95, 12).item() == pytest.approx(-0.216, abs=5e-4)


@pytest.mark.parametrize("start", ["stationary", "zero"])
@pytest.mark.parametrize("T", [2, 5, 12, 96])
def test_the_correction_inverts_the_bias_and_is_undefined_where_nothing_reads_so(T, start):
    phi = torch.linspace(-0.9, 1.3, 45).double()
    reading = phi + nickell(phi, T, start)
    assert (reading.diff() > 0).all()
    torch.testing.assert_close(nickell_corrected(reading, T, start), phi, rtol=0, atol=1e-9)
    assert nickell_corrected(torch.tensor([-2.5, 1.6, torch.nan]).double(), T, start).isnan().all()


def test_the_half_panel_takes_back_most_of_the_bias():
    # the bounds are those of the literature's simulations
    for T, bound in ((12, 0.036), (24, 0.01), (48, 0.01)):
        for phi in (0.3, 0.5, 0.9, 0.95):
            left = (half_panel(exact(phi, T)) - phi).abs().item()
            assert left < bound
            assert left < 0.15 * abs(nickell(phi, T).item())
    # an odd panel is cut both ways
    G = exact(0.5, 7)
    cuts = [within(part).item() for part in (G[:4, :4], G[3:, 3:], G[:5, :5], G[4:, 4:])]
    assert half_panel(G).item() == pytest.approx(2 * within(G).item() - sum(cuts) / 4)


# --- the random walk --------------------------------------------------------------------------------------------------


def test_a_random_walk_is_its_own_null_however_its_shocks_grow():
    walk = exact(1.0, 12, 1.3 ** torch.arange(12).double()) + 2.5
    torch.testing.assert_close(random_walk(walk), walk)
    for start in range(12):
        for q in range(1, 13 - start):
            assert variance_ratio(walk, start, q).item() == pytest.approx(1)
    # Nickell's formula takes shocks to be even and misses; the null does not
    assert abs(within(walk).item() - (1 - 3 / 13)) > 0.05
    # a panel that reverts has a null that does not
    reverting = exact(0.5, 12)
    assert pooled(random_walk(reverting)).item() == pytest.approx(1)
    torch.testing.assert_close(increments(random_walk(reverting)), increments(reverting))


def test_variance_ratio_runs_from_0_to_q():
    for phi in (0.3, 0.9):
        for q in (1, 4, 12):
            expected = (1 - phi**q) / (q * (1 - phi))
            assert variance_ratio(exact(phi, 12), 0, q).item() == pytest.approx(expected)
    slopes = torch.tensor([-1.0, 0.5, 3.0]).unsqueeze(1)
    onward, back = slopes * torch.arange(9), slopes * (torch.arange(9) % 2)
    assert variance_ratio(gram(onward), 1, 6).item() == pytest.approx(6)
    assert variance_ratio(gram(back), 1, 6).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("start", "q"), [(0, 0), (-1, 2), (5, 8)])
def test_variance_ratio_refuses_steps_that_are_not_there(start, q):
    with pytest.raises(ValueError, match=f"{q} steps from {start}, of 12 transitions"):
        variance_ratio(exact(0.5, 12), start, q)


# --- standard errors and tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [pooled, within, half_panel, lambda G: nickell_corrected(within(G), 12)])
def test_sandwich_is_the_spread_over_panels_and_the_jackknifes(estimator):
    y = simulate(0.8, 400 * 100, 12, effects=0.5, seed=2).unflatten(0, (400, 100))
    with torch.no_grad():
        value, error = sandwich(estimator, y)
    assert error.mean().item() == pytest.approx(value.std().item(), rel=0.1)
    keep = ~torch.eye(100, dtype=torch.bool)
    deleted = torch.stack([estimator(gram(y[0][row])) for row in keep])
    assert error[0].item() == pytest.approx((deleted.var(correction=0) * 99).sqrt().item(), rel=0.05)
    one, its_error = sandwich(estimator, y[7])
    torch.testing.assert_close((value[7], error[7]), (one, its_error))


def covered(error_of, n, T, phi, massive=0.0, count=1000):
    """How often intervals of t times the error hold phi."""
    y = simulate(phi, count * n, T, seed=1).unflatten(0, (count, n))
    if massive:
        drawn = torch.from_numpy(np.random.default_rng(0).random((count, n, 1)))
        y = y * torch.where(drawn < massive, 500.0, 1.0)
    value, error = error_of(pooled, y)
    return float(((value - phi).abs() <= scipy.stats.t.ppf(0.975, n - 1) * error).double().mean())


@pytest.mark.parametrize(("n", "T", "phi"), [(8, 12, 0.95), (16, 24, 1.0), (32, 12, 0.5)])
def test_intervals_of_few_units_are_wide_enough(n, T, phi):
    assert covered(sandwich, n, T, phi) == pytest.approx(0.95, abs=0.02)


def test_few_units_are_left_out_in_turn():
    y, by = simulate(0.8, 30, 12, seed=3), torch.arange(30) // 5
    for groups in (None, by):
        of = torch.arange(30) if groups is None else groups
        n = int(of.max()) + 1
        deleted = torch.stack([within(gram(y[of != group])) for group in range(n)])
        value, error = sandwich(within, y, groups)
        assert value.item() == pytest.approx(within(gram(y)).item())
        assert error.item() == pytest.approx(((n - 1) * deleted.var(correction=0)).sqrt().item())


@pytest.mark.parametrize("effects", ["none", "unit"])
def test_where_one_unit_decides_there_is_no_p(effects):
    """2 % of units at 500 times: of such random walks 4 in 10 were said to revert."""
    found = []
    for seed in range(60):
        y = simulate(1.0, 100, 12, seed=seed)
        y[torch.from_numpy(np.random.default_rng(seed).random(100) < 0.02)] *= 500
        found.append(harris_tzavalis(y, effects, draws=200, seed=seed))
    assert np.mean([test.p < 0.05 for test in found]) <= 0.05
    assert all(math.isnan(test.p) == (test.unit_share > DECIDES) for test in found)
    assert np.mean([math.isnan(test.p) for test in found]) > 0.5
    even = harris_tzavalis(simulate(1.0, 8, 12), effects)
    assert even.unit_share < 0.5
    assert not math.isnan(even.p)


def test_sandwich_by_groups_is_not_fooled_by_copies():
    y = simulate(0.8, 60, 12)
    copies = y.repeat_interleave(5, 0)
    expected = sandwich(within, y)
    torch.testing.assert_close(sandwich(within, copies, torch.arange(300) // 5), expected)
    assert sandwich(within, copies)[1] < 0.5 * expected[1]


@pytest.mark.parametrize(("effects", "mean"), [("none", 1.0), ("unit", 10 / 13), ("trend", 1 - 15 / 28)])
def test_the_table_and_the_simulated_walks_agree_where_shocks_are_even(effects, mean):
    middle = harris_tzavalis((mean, 2000, 12), effects)
    assert middle.statistic == pytest.approx(0, abs=1e-9)
    assert middle.phi_null == pytest.approx(mean, abs=0.001)
    one = harris_tzavalis((mean - 0.01, 2000, 12), effects).statistic
    for z in (-1.6449, 1.6449):
        found = harris_tzavalis((mean + 0.01 * z / abs(one), 2000, 12), effects)
        assert found.statistic == pytest.approx(z)
        assert found.p == pytest.approx(found.p_table, abs=0.02)  # the table's variances are asymptotic


def test_walks_by_their_second_moments_are_walks():
    # few units, where the matrix is singular, against walks drawn one by one
    y = simulate(1.0, 3 * 4000, 12, seed=8).unflatten(0, (4000, 3))
    y = y - y.mean(1, keepdim=True)
    direct = within(y.mT @ y)
    for quantile in (0.05, 0.5, 0.95):
        phi = direct.quantile(quantile).item()
        assert harris_tzavalis((phi, 3, 12), "unit").p == pytest.approx(quantile, abs=0.02)


@pytest.mark.parametrize("effects", ["none", "unit", "trend"])
def test_growing_shocks_fool_the_table_not_the_simulation(effects):
    table, simulated = [], []
    for seed in range(100):
        shocks = simulate(0.0, 100, 23, seed=seed) * 1.1 ** torch.arange(24)
        y = torch.cat([torch.zeros(100, 1), shocks.cumsum(1)], 1)
        found = harris_tzavalis(y, effects, draws=200, seed=seed)
        table.append(min(found.p_table, 1 - found.p_table))
        simulated.append(min(found.p, 1 - found.p))
    assert np.mean(np.array(simulated) < 0.05) < 0.2  # two-sided at 10 %
    assert np.mean(np.array(table) < 0.05) > 0.25
    # the variances alone will do
    known = harris_tzavalis((found.phi, 100, 24), effects, shocks=increments(gram(y)))
    assert known.p == pytest.approx(found.p, abs=0.12)


def test_the_test_finds_reversion_and_explosion():
    for effects in ("none", "unit"):
        assert harris_tzavalis(simulate(0.95, 300, 24, effects=2.0), effects).p < 0.001
        assert harris_tzavalis(simulate(1.05, 300, 24), effects).p > 0.999
    # a start far from the mean is in the null as well
    assert 0.05 < harris_tzavalis(simulate(1.0, 300, 12, effects=50.0)).p < 0.95
    assert 0.05 < harris_tzavalis(simulate(1.0, 300, 12, effects=50.0)).p_table < 0.95
    row = dataclasses.asdict(harris_tzavalis(simulate(1.0, 30, 12), "unit"))
    assert list(row) == ["effects", "phi", "phi_null", "statistic", "p_table", "p", "n_units", "T", "unit_share"]


def test_harris_tzavalis_says_what_it_needs():
    with pytest.raises(ValueError, match="effects are none, unit or trend"):
        harris_tzavalis((0.9, 10, 12), "time")
    with pytest.raises(ValueError, match="2 units, 4 transitions"):
        harris_tzavalis((0.9, 10, 3), "trend")
    with pytest.raises(ValueError, match="got 1 units"):
        harris_tzavalis(simulate(1.0, 1, 12))
    with pytest.raises(ValueError, match="and 3 variances"):
        harris_tzavalis((0.9, 10, 12), shocks=torch.ones(3))
    still = torch.arange(5.0).unsqueeze(1).expand(5, 9)
    for shocks in (None, torch.ones(8)):
        with pytest.raises(ValueError, match="nothing moves"):
            harris_tzavalis(still, shocks=shocks)


def test_pesaran_cd_is_the_sum_of_all_pairs():
    noise = simulate(0.0, 30, 11, seed=4)
    correlations = np.corrcoef(noise)[np.triu_indices(30, 1)]
    statistic, p = pesaran_cd(noise)
    assert statistic == pytest.approx(np.sqrt(2 * 12 / (30 * 29)) * correlations.sum())
    assert p > 0.05
    assert pesaran_cd(noise + noise[0])[1] < 1e-6
    with_constant = torch.cat([noise, torch.full((1, 12), 1e3).double() / 3])
    assert pesaran_cd(with_constant)[0] == pytest.approx(statistic)
    # without each time's mean units correlate by construction
    assert pesaran_cd(noise - noise.mean(0))[0] == pytest.approx(-np.sqrt(12 / 2), rel=0.05)
    assert np.isnan(pesaran_cd(noise[:1])).all()


def test_pesaran_cd_is_standard_normal_under_independence():
    found = np.array([pesaran_cd(simulate(0.0, 40, 23, seed=seed))[0] for seed in range(400)])
    assert abs(found.mean()) < 0.2
    assert found.std() == pytest.approx(1, abs=0.12)


# --- made-up panels ---------------------------------------------------------------------------------------------------


def test_simulated_panels_are_what_they_say():
    y = simulate(0.6, 40000, 5, effects=2.0, sigma=3.0, seed=1)
    torch.testing.assert_close(gram(y) / 40000, 9 * exact(0.6, 5) + 4, rtol=0.03, atol=0)
    assert torch.equal(y, simulate(0.6, 40000, 5, effects=2.0, sigma=3.0, seed=1))
    assert not torch.equal(y, simulate(0.6, 40000, 5, effects=2.0, sigma=3.0, seed=2))
    for phi, start in ((1.0, "stationary"), (1.1, "stationary"), (0.6, "zero")):
        assert (simulate(phi, 10, 4, start=start)[:, 0] == 0).all()
        y = simulate(phi, 40000, 4, start=start)
        torch.testing.assert_close(gram(y) / 40000, exact(phi, 4, torch.ones(4)), rtol=0.04, atol=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda: nickell(0.5, 1),
        lambda: nickell_corrected(0.5, 12, "anywhere"),
        lambda: within(torch.eye(2)),
        lambda: half_panel(torch.eye(4)),
        lambda: simulate(0.5, 2, 2, start="anywhere"),
    ],
)
def test_too_short_or_unknown_is_said_in_a_sentence(call):
    with pytest.raises(ValueError, match=r"transitions or more|start is stationary or zero"):
        call()
