"""What the best of many wirings gains by luck: published results explained, written out, told apart from effects."""

import numpy as np
import pytest

from support.scanned import correlated, scan
from surgery.stats import comparisons


@pytest.mark.parametrize(("wirings", "spread", "published"), [(528, 0.2, 0.15), (528, 0.35, 0.27), (2080, 0.35, 0.30)])
def test_the_best_of_a_scan_on_16_items_gains_by_luck_what_was_published_as_success(wirings, spread, published):
    """Best of 528 or 2080 independent wirings on 16 items: +0.15 to +0.30, without any effect."""
    rng = np.random.default_rng(wirings)
    best = np.mean([rng.normal(0, spread, (wirings, 16)).mean(1).max() for _ in range(200)])
    assert best == pytest.approx(published, abs=0.01)
    luck = comparisons.expected_best(scan(rng.normal(0, spread, (wirings, 16)), metric="exact"), "exact")
    assert luck.mean == pytest.approx(best, abs=0.02)
    assert luck.high > luck.mean
    assert (luck.wirings, luck.prompts) == (wirings, 16)


def test_luck_equals_the_largest_mean_of_every_resample_written_out():
    d = np.random.default_rng(16).normal(0.5, 1, (4, 8))
    d[2] = -1 - 0.1 * np.arange(8)  # clearly worse, left out
    kept = np.delete(d, 2, axis=0)
    draws = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=2000)
    best = (draws @ kept.T / 8 - kept.mean(1)).max(1) * np.sqrt(8 / 7)
    luck = comparisons.expected_best(scan(d), "loglik")
    assert (luck.wirings, luck.prompts, luck.worse) == (4, 8, 1)
    assert luck.mean == pytest.approx(best.mean())
    assert luck.high == pytest.approx(np.quantile(best, 0.95))


def test_luck_is_told_apart_from_effects():
    """The means are taken out: a scan full of real gains does not make luck look larger."""
    noise = correlated(np.random.default_rng(5), 50, 60)
    without = comparisons.expected_best(scan(noise), "loglik")
    shifted = comparisons.expected_best(scan(noise + 3), "loglik")
    assert shifted.worse == 0
    assert shifted.mean == pytest.approx(without.mean, rel=0.1)
    assert comparisons.expected_best(scan(noise - 9), "loglik").worse == 50
    assert np.isnan(comparisons.expected_best(scan(noise - 9), "loglik").mean)


def test_luck_averages_what_the_best_does_over_scans():
    rng = np.random.default_rng(6)
    scans = [correlated(rng, 30, 40) for _ in range(300)]
    told = np.mean([comparisons.expected_best(scan(d), "loglik", resamples=100).mean for d in scans[:60]])
    assert told == pytest.approx(np.mean([d.mean(1).max() for d in scans]), rel=0.15)
