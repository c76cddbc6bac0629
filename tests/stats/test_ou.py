import math

import numpy as np
import pytest
import torch

from surgery.stats.ou import COLUMNS, andrews, comparison, ou, recovery
from surgery.stats.panels import nickell, simulate, within


@pytest.fixture(scope="module")
def table():
    """Short panels of every kind, and the recovery of every estimator on them."""
    return recovery(T=(12,), phi=(0.5, 0.95, 1.0, 1.05), n_simulations=1000)


def cell(table, estimator, phi, effects=0.0):
    rows = table[(table.estimator == estimator) & (table.phi == phi) & (table.effects == effects)]
    assert len(rows) == 1
    return rows.iloc[0]


# --- the process ------------------------------------------------------------------------------------------------------


def test_ou_is_least_squares_with_its_intervals():
    from statsmodels.regression.linear_model import OLS
    from statsmodels.tools import add_constant

    y = simulate(0.7, 6, 20, seed=5) + 10
    fit = OLS(y[:, 1:].flatten().numpy(), add_constant(y[:, :-1].flatten().numpy())).fit()
    found = ou(y)
    np.testing.assert_allclose(found.phi, [fit.params[1], *fit.conf_int()[1]])
    np.testing.assert_allclose(found.kappa, [-math.log(end) for end in (found.phi.value, *found.phi[:0:-1])])
    assert found.shock == pytest.approx(math.sqrt(fit.mse_resid))
    assert found.mu.value == pytest.approx(fit.params[0] / (1 - fit.params[1]))
    assert found.mu.low < 10 < found.mu.high
    # an end of mu's interval is a mean that t only just rejects
    for m in found.mu[1:]:
        line = np.array([1.0, m])  # what the line is off at m: intercept + phi m - m
        t = (fit.params @ line - m) / math.sqrt(line @ fit.cov_params() @ line)
        assert abs(t) == pytest.approx(1.9803, abs=1e-4)  # of t with 118 degrees of freedom
    assert (found.n, found.note) == (120, "")


def test_time_has_a_unit():
    y = simulate(0.7, 6, 20)
    one, tenth = ou(y), ou(y, dt=0.1)
    np.testing.assert_allclose(tenth.kappa, np.array(one.kappa) * 10)
    np.testing.assert_allclose(tenth.sigma, np.array(one.sigma) * math.sqrt(10))
    assert (tenth.phi, tenth.mu) == (one.phi, one.mu)


@pytest.mark.parametrize("phi", [0.5, 0.999999, 1.0, 1.000001, 1.2])
def test_sigma_is_what_the_process_needs_for_its_shocks(phi):
    generator = np.random.default_rng(0)
    x, shocks = generator.standard_normal((2, 200))
    # a cross-section of steps whose least-squares line is phi to the last digit
    design = np.vstack([np.ones(200), x])
    shocks -= design.T @ np.linalg.solve(design @ design.T, design @ shocks)
    found = ou(torch.from_numpy(np.stack([x, phi * x + shocks], 1)))
    assert found.phi.value == pytest.approx(phi, abs=1e-12)
    kappa = -math.log(phi)
    expected = math.sqrt(2 * kappa / (1 - phi**2)) if phi != 1 else 1.0
    assert found.sigma.value / found.shock == pytest.approx(expected, rel=1e-6)
    assert found.sigma.low < found.sigma.value < found.sigma.high
    assert found.kappa.value == pytest.approx(kappa, abs=1e-12)


def test_what_is_undefined_is_nan_and_said():
    alternating = ou(simulate(-0.5, 20, 12))
    assert np.isnan([*alternating.kappa, *alternating.sigma]).all()
    assert "phi <= 0" in alternating.note
    assert np.isfinite(alternating.mu).all()
    walk = ou(simulate(1.0, 20, 12))
    assert np.isnan(walk.mu).all()
    assert "phi may be 1" in walk.note
    assert walk.kappa.low < 0 < walk.kappa.high
    explosive = ou(simulate(1.1, 50, 24))
    assert explosive.kappa.high < 0
    assert explosive.note == ""
    short = ou(torch.tensor([0.0, 1.0, 0.0, 0.3, -1.0, -0.8]))
    assert short.kappa.high == math.inf
    assert short.phi.low < 0
    still = ou(torch.ones(3, 8))
    assert np.isnan([*still.phi, *still.kappa, *still.sigma, *still.mu, still.shock]).all()
    assert "nothing varies" in still.note


@pytest.mark.parametrize("y", [torch.ones(3), torch.full((3, 5), torch.nan)])
def test_ou_refuses_what_it_cannot_fit(y):
    with pytest.raises(ValueError, match="three transitions or more, all finite"):
        ou(y)


# --- one series -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phi", "bias"), [(0.5, -0.199), (0.9, -0.316)])
def test_one_series_is_biased_by_kendalls_formula_and_andrews_is_not(phi, bias):
    y = simulate(phi, 40000, 12, seed=7)
    slope = within(y.unsqueeze(-1) * y.unsqueeze(-2))
    assert (slope.mean() - phi).item() == pytest.approx(bias, abs=0.005)  # simulated elsewhere
    assert bias == pytest.approx(-(1 + 3 * phi) / 12, rel=0.05)
    found, low, high = andrews(y)
    assert (slope.median() - phi).item() < -0.1
    assert (found <= phi).double().mean().item() == pytest.approx(0.5, abs=0.015)
    for missed in (low > phi, high < phi):
        assert missed.double().mean().item() == pytest.approx(0.025, abs=0.005)


def test_andrews_is_bounded_by_a_random_walk_and_has_nothing_to_say_of_a_constant():
    explosive, low, high = andrews(simulate(1.2, 50, 60))
    assert (explosive == 1).all()
    assert (high == 1).all()
    walk, low, high = andrews(simulate(1.0, 5000, 12))
    assert (walk == 1).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (high == 1).double().mean().item() == pytest.approx(0.975, abs=0.01)
    assert ((low <= walk) & (walk <= high)).all()
    assert all(value.isnan() for value in andrews(torch.ones(13)))
    one = andrews(simulate(0.5, 5, 12)[2])
    torch.testing.assert_close(one, tuple(value[2] for value in andrews(simulate(0.5, 5, 12))))


# --- what others' tests say -------------------------------------------------------------------------------------------


def test_series_by_series_the_usual_tests_have_no_power_at_12_steps():
    frame = comparison(simulate(0.5, 60, 12, seed=3)).set_index("test")
    assert (frame.n_series == 60).all()
    assert (frame["T"] == 12).all()
    for column in ("share", "share_slow", "share_reverting"):
        assert (frame.loc[["adfuller", "variance_ratio"], column] < 0.35).all()
    assert frame.loc["kpss", "share_random_walk"] < 0.65  # calls half of the random walks stationary
    long = comparison(simulate(0.5, 10, 200, seed=3), 30).set_index("test")
    assert (long.loc[["adfuller", "variance_ratio"], ["share", "share_reverting"]] > 0.9).all(axis=None)
    assert (long.loc[["adfuller", "variance_ratio"], "share_random_walk"] < 0.2).all()


def test_comparison_leaves_out_what_does_not_vary_and_refuses_what_is_short():
    y = simulate(0.5, 6, 12)
    y[2:] = 1.0
    frame = comparison(y, 4)
    assert (frame.n_series == 2).all()
    assert frame.share.between(0, 1).all()
    assert comparison(torch.ones(2, 13), 2).share.isna().all()
    with pytest.raises(ValueError, match="8 transitions or more"):
        comparison(y[:, :6])


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_where_theory_says_so(table):
    assert list(table) == list(COLUMNS)
    valid = table[table.valid]
    assert set(table.estimator) - set(valid.estimator) == {"within", "half_panel"}  # T = 12 is short for both
    assert valid.coverage.between(0.92, 0.98).all(), valid[~valid.coverage.between(0.92, 0.98)].to_string()
    # and are about the right thing
    panels = valid[valid.estimator != "andrews"]
    assert (panels.bias.abs() < 0.2 * panels.rmse).all()


def test_biased_estimators_are_as_biased_as_theory_says(table):
    for phi in (0.5, 0.95, 1.0):
        for effects in (0.0, 2.0):
            row = cell(table, "within", phi, effects)
            assert row.bias == pytest.approx(nickell(phi, 12).item(), abs=0.005)
            assert row.coverage < 0.01
            assert not row.valid
    row = cell(table, "within", 0.95)
    assert row.bias == pytest.approx(-0.216, abs=0.005)
    assert cell(table, "within", 1.05).bias == pytest.approx(nickell(1.05, 12, "zero").item(), abs=0.005)
    # unit effects push pooled towards 1, by their share of what varies
    for phi in (0.5, 0.95):
        spread = 1 / (1 - phi**2)
        for estimator in ("pooled", "ou.phi"):
            row = cell(table, estimator, phi, 2.0)
            assert row.bias == pytest.approx((1 - phi) * 4 / (spread + 4), abs=0.005)
            assert row.coverage < 0.7
            assert not row.valid
    # what does not hold is told from what does
    assert cell(table, "half_panel", 1.0).coverage < 0.9
    assert cell(table, "nickell_corrected", 1.05).coverage < 0.6
    assert cell(table, "nickell_corrected.zero", 0.95).coverage < 0.85
    assert cell(table, "cross_section", 0.5, 2.0).coverage < 0.1
    assert cell(table, "andrews", 1.05).coverage == 0
    for phi in (0.5, 0.95):
        assert cell(table, "andrews", phi).median_bias == pytest.approx(0, abs=0.02)


def test_the_half_panel_holds_in_long_panels():
    long = recovery(T=(48,), phi=(0.5,), effects=(2.0,), n_simulations=300)
    row = cell(long, "half_panel", 0.5, 2.0)
    assert row.valid
    assert 0.92 <= row.coverage <= 0.98
    assert "andrews" not in set(long.estimator)  # without effects only
