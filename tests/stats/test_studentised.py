"""Intervals that hold for all columns at once: against the formula written out, and over many simulated scans."""

import numpy as np
import pandas as pd

from benchmarks.simulations import luck as simulation
from surgery.stats import comparisons, studentised


def test_intervals_that_hold_together_equal_their_formula_written_out():
    d = np.random.default_rng(1).normal(size=(3, 15))
    draws = np.random.default_rng(7).multinomial(15, np.full(15, 1 / 15), size=500)
    samples = np.array([np.repeat(d, draw, axis=1) for draw in draws])
    spread = np.sqrt((15 * samples.var(2) + d.var(1)) / 16)  # a prompt of average spread in every resample
    t = (samples.mean(2) - d.mean(1)) / spread
    expected = d.mean(1) - np.quantile(t.max(1), 0.975) * d.std(1), d.mean(1) - np.quantile(t.min(1), 0.025) * d.std(1)
    ends = studentised.together(studentised.Units.of(d.T), studentised.draws(15, 500, 7))
    np.testing.assert_allclose(ends, expected)
    alone = studentised.interval(studentised.Units.of(d.T), studentised.draws(15, 500, 7))
    assert (ends[0] < alone[0]).all()
    assert (ends[1] > alone[1]).all()


def test_portions_of_columns_change_nothing(monkeypatch):
    units = studentised.Units.of(np.random.default_rng(0).normal(size=(12, 9)))
    whole = studentised.together(units, studentised.draws(12, 200))
    monkeypatch.setattr(studentised, "_AT_ONCE", 500)
    np.testing.assert_allclose(studentised.together(units, studentised.draws(12, 200)), whole)


def test_one_in_twenty_scans_has_an_interval_that_misses(monkeypatch):
    monkeypatch.setattr(simulation, "WIRINGS", 40)
    monkeypatch.setattr(simulation, "RESAMPLES", 200)
    rate = simulation.misses_together(simulation.NOISE["skewed (exponential)"], 64, 100)
    assert 0 < rate <= 0.12  # of 100 at 5 %: more in 0.4 % of runs


def test_the_table_that_holds_together_has_the_gains_of_the_other_and_wider_intervals():
    d = np.random.default_rng(3).normal(size=(20, 30))
    frame = simulation.scan(d)
    alone, whole = comparisons.table(frame, "loglik", 300), comparisons.together(frame, "loglik", 300)
    np.testing.assert_allclose(whole["gain"], alone["gain"])
    assert (whole["gain_low"] < alone["gain_low"]).all()
    assert (whole["gain_high"] > alone["gain_high"]).all()


def test_a_wiring_that_breaks_has_no_interval_and_does_not_widen_those_of_the_others():
    d = np.random.default_rng(3).normal(size=(5, 30))
    broken = d.copy()
    broken[2, 7] = -np.inf
    whole, rest = (comparisons.together(simulation.scan(part), "loglik", 300) for part in (broken, d[[0, 1, 3, 4]]))
    assert whole["gain"][2] == -np.inf
    assert whole.loc[2, ["gain_low", "gain_high"]].isna().all()
    kept = whole.drop(index=2)[["gain", "gain_low", "gain_high"]].astype(float).reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, rest[["gain", "gain_low", "gain_high"]])
