"""The prediction of a full scan equals the plain conditional of one large Gaussian over all cells."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from surgery.scan import kriging

SPANS = np.array([(i, j) for i in range(4) for j in range(i + 1, 5)])


def drawn(rng, probes, sizes=1.0):
    """Gains of ``SPANS`` from the prior of the model, and its covariances."""
    prior = kriging.fit(SPANS, np.full((1, len(SPANS)), np.nan), 4)
    scale = np.broadcast_to(sizes, len(SPANS))
    prior = kriging.Covariance(prior.probe * np.outer(scale, scale), prior.mean * np.outer(scale, scale))
    m = rng.multivariate_normal(np.zeros(len(SPANS)), prior.mean)
    return m + rng.multivariate_normal(np.zeros(len(SPANS)), prior.probe, size=probes), prior


def dense(prior, probes):
    """The covariance of all cells, probe after probe."""
    return np.kron(np.eye(probes), prior.probe) + np.kron(np.ones((probes, probes)), prior.mean)


def test_the_prediction_is_the_conditional_of_the_dense_gaussian():
    rng, probes = np.random.default_rng(0), 6
    d, prior = drawn(rng, probes)
    measured = rng.random(d.shape) < 0.3
    measured[3] = False
    predicted = kriging.predict(prior, np.where(measured, d, np.nan))
    full, known = dense(prior, probes), measured.ravel()
    regression = full[:, known] @ np.linalg.inv(full[np.ix_(known, known)])
    average = np.kron(np.ones((1, probes)) / probes, np.eye(len(SPANS)))
    mean = average @ regression @ d.ravel()[known]
    covariance = average @ (full - regression @ full[known]) @ average.T
    np.testing.assert_allclose(predicted.mean, mean, atol=1e-9)
    np.testing.assert_allclose(predicted.covariance, covariance, atol=1e-9)


def test_the_likelihood_is_that_of_the_dense_gaussian():
    rng, probes = np.random.default_rng(1), 5
    d, prior = drawn(rng, probes)
    measured = rng.random(d.shape) < 0.4
    known = measured.ravel()
    patterns = [(span, d[np.ix_(probe, span)]) for span, probe in kriging._patterns(measured)]
    other = kriging.Covariance(2 * prior.probe, 0.5 * prior.mean)
    expected = [
        -2 * multivariate_normal(cov=dense(c, probes)[np.ix_(known, known)]).logpdf(d.ravel()[known])
        for c in (prior, other)
    ]
    values = [kriging._deviance(c, patterns) for c in (prior, other)]
    assert values[1] - values[0] == pytest.approx(expected[1] - expected[0], abs=1e-8)


def test_what_was_measured_whole_is_known_without_error():
    d, _ = drawn(np.random.default_rng(2), 20)
    predicted = kriging.predict(kriging.fit(SPANS, d, 4), d)
    np.testing.assert_allclose(predicted.mean, d.mean(0), atol=1e-9)
    assert np.abs(predicted.covariance).max() < 1e-9


def test_of_a_population_a_whole_scan_has_the_usual_error():
    d, prior = drawn(np.random.default_rng(3), 20)
    predicted = kriging.predict(prior, d).of_population(prior, 20)
    np.testing.assert_allclose(predicted.covariance, prior.probe / 20, atol=1e-9)


def test_the_fit_finds_sizes_and_makes_intervals_that_hold():
    """Spans that break a model lose ten times as much as the others vary: neither is told about the other in nats."""
    rng, z = np.random.default_rng(4), []
    sizes = np.where(SPANS[:, 1] == 4, 10.0, 0.5)
    for _ in range(8):
        d, _ = drawn(rng, 64, sizes)
        few = np.where(rng.random(d.shape) < 0.3, d, np.nan)
        fitted = kriging.fit(SPANS, few, 4)
        predicted = kriging.predict(fitted, few)
        z.append((predicted.mean - d.mean(0)) / np.sqrt(np.diag(predicted.covariance)))
    outside = (np.abs(z) > 1.96).mean()
    assert outside < 0.12, "nominal .05; sizes are smoothed over neighbours"


def test_neighbours_lower_the_error_of_the_mean_of_few_cells():
    rng, ratio = np.random.default_rng(5), []
    for _ in range(5):
        d, _ = drawn(rng, 64)
        few = np.where(rng.random(d.shape) < 0.2, d, np.nan)
        error = kriging.predict(kriging.fit(SPANS, few, 4), few).mean - d.mean(0)
        ratio.append((error**2).mean() / ((np.nanmean(few, axis=0) - d.mean(0)) ** 2).mean())
    assert np.median(ratio) < 0.7


def test_without_cells_the_prior_speaks_and_gains_of_nothing_are_nothing():
    nothing = np.zeros((8, len(SPANS)))
    predicted = kriging.predict(kriging.fit(SPANS, nothing, 4), nothing)
    assert np.abs(predicted.mean).max() == 0
    prior = kriging.fit(SPANS, np.full((3, len(SPANS)), np.nan), 4)
    assert (np.linalg.eigvalsh(prior.probe) > 0).all()
    assert (kriging.predict(prior, np.full((3, len(SPANS)), np.nan)).mean == 0).all()
