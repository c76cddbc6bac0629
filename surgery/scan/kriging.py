r"""Predict a full scan of spans from some of its cells, by a Gaussian process over spans and probes.

A cell is the gain d of one span (start, stop) on one probe. The model is

    d(span, probe) = m(span) + u(span, probe),       m ~ N(0, M),   u ~ N(0, K) for every probe by itself,

so what a probe shares between spans (an easy probe gains little from any) is known from the spans that it was asked,
and what neighbouring spans share is known from either. K and M have one form,

    s(a) s(b) [ c + (1 - c) exp(-|start_a - start_b| / reach_1 - |stop_a - stop_b| / reach_2) ]  + a part of its own,

with s the local root mean square of the gains: spans that break a model lose 10 nats, those that matter a tenth of one,
and must not be told about each other in nats. Reaches, shares and sizes maximise the likelihood, with a weak prior.

``predict`` gives what a scan of all cells would read (the mean over these very probes, not only m), with its
covariance: exactly the mean, without error, where every probe was asked. For what other probes would read, K divided by
the number of probes is added (``Prediction.of_population``).

No kept library's Gaussian process has noise that is shared along one axis at this size; the algebra is that of any.
Kriging is Matheron (1963), prediction of the rest of a finite population Royall (1970). Cost: no forward pass.
Control to compare with: the mean of the same number of cells on the same few probes for every span.

>>> rng = np.random.default_rng(0)
>>> spans = np.array([(i, j) for i in range(8) for j in range(i + 1, 9)])
>>> d = np.where(spans[:, 1] == 6, 1.0, 0.0) + rng.normal(size=(64, 1)) + 0.3 * rng.normal(size=(64, 36))
>>> few = np.where(rng.random(d.shape) < 0.25, d, np.nan)
>>> predicted = predict(fit(spans, few, 8), few)
>>> sorted(spans[np.argsort(-predicted.mean)[:6], 1].tolist())
[6, 6, 6, 6, 6, 6]
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import expit

_REACHES = (2, 6)  # prior of the reaches over starts and stops: the number of layers divided by these
# log reaches over starts and stops, logits of the shares common to all spans and of its own, log sizes of u and of m
_CENTRE = np.array([0.0, 0.0, -2.0, -4.0, 0.0, -1.0])
_SPREAD = np.array([0.7, 0.5, 1.0, 1.0, 0.5, 1.0])
_STEPS = 12  # of the optimiser: the likelihood is flat around its top


@dataclass(frozen=True)
class Covariance:
    """Of the gains of one probe about their mean, ``probe`` (K), and of the mean gains, ``mean`` (M); nats squared."""

    probe: Float[np.ndarray, "span span"]
    mean: Float[np.ndarray, "span span"]


@dataclass(frozen=True)
class Prediction:
    """What a scan of all cells would read: its ``mean`` over probes, per span, and the ``covariance`` of its error."""

    mean: Float[np.ndarray, " span"]
    covariance: Float[np.ndarray, "span span"]

    def of_population(self, fitted: Covariance, n_probes: int) -> "Prediction":
        """The same as an estimate of the gain on other probes of that kind."""
        return Prediction(self.mean, self.covariance + fitted.probe / n_probes)


def fit(spans: Int[np.ndarray, "span 2"], gains: Float[np.ndarray, "probe span"], n_layers: int) -> Covariance:
    """Estimate both covariances from the cells that were measured; ``gains`` is NaN elsewhere.

    Without any cell they are those of the prior, for gains of size 1.
    """
    measured = np.isfinite(gains)
    apart = np.abs(spans[:, None] - spans[None]).astype(float)
    reaches = n_layers / np.array(_REACHES)
    size = _local_size(np.exp(-(apart / reaches).sum(-1)), gains, measured)
    every, seen = np.arange(len(spans)), np.flatnonzero(measured.any(0))

    def covariance(x: np.ndarray, among: np.ndarray) -> Covariance:
        common, own = expit(x[2]), expit(x[3])
        near = np.exp(-(apart[np.ix_(among, among)] / (reaches * np.exp(x[:2]))).sum(-1))
        alike = (1 - own) * (common + (1 - common) * near) + own * np.eye(len(among))
        scale = np.outer(size[among], size[among])
        return Covariance(np.exp(2 * x[4]) * scale * alike, np.exp(2 * (x[4] + x[5])) * scale * (alike + 1))

    if not len(seen):
        return covariance(_CENTRE, every)
    cells = [(span, gains[np.ix_(probe, seen[span])]) for span, probe in _patterns(measured[:, seen])]
    best = minimize(
        lambda x: _deviance(covariance(x, seen), cells) + float((((x - _CENTRE) / _SPREAD) ** 2).sum()),
        _CENTRE,
        method="L-BFGS-B",
        bounds=[(centre - 4, centre + 4) for centre in _CENTRE],
        options={"maxiter": _STEPS},
    )
    return covariance(best.x, every)


def predict(fitted: Covariance, gains: Float[np.ndarray, "probe span"]) -> Prediction:
    """Predict the mean gain of every span over all probes from the cells that are not NaN."""
    n_probes, n_spans = gains.shape
    information, weighted = np.zeros((n_spans, n_spans)), np.zeros(n_spans)
    passed, told, left = n_probes * np.eye(n_spans), np.zeros(n_spans), n_probes * fitted.probe
    for span, probe in _patterns(np.isfinite(gains)):
        inverse = np.linalg.inv(fitted.probe[np.ix_(span, span)])
        total = gains[np.ix_(probe, span)].sum(0)
        regression = fitted.probe[:, span] @ inverse  # of what a probe adds in all spans on those that it was asked
        information[np.ix_(span, span)] += len(probe) * inverse
        weighted[span] += inverse @ total
        passed[:, span] -= len(probe) * regression
        told += regression @ total
        left = left - len(probe) * regression @ fitted.probe[span]
    system = np.eye(n_spans) + fitted.mean @ information
    passed = passed / n_probes
    mean = passed @ np.linalg.solve(system, fitted.mean @ weighted) + told / n_probes
    spread = passed @ np.linalg.solve(system, fitted.mean) @ passed.T + left / n_probes**2
    return Prediction(mean, (spread + spread.T) / 2)


def _deviance(fitted: Covariance, cells: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Minus twice the log-likelihood of the cells, without constants; m is integrated out."""
    n_spans = len(fitted.mean)
    information, weighted, deviance = np.zeros((n_spans, n_spans)), np.zeros(n_spans), 0.0
    for span, block in cells:
        inverse = np.linalg.inv(fitted.probe[np.ix_(span, span)])
        information[np.ix_(span, span)] += len(block) * inverse
        weighted[span] += inverse @ block.sum(0)
        deviance += float(((block @ inverse) * block).sum()) - len(block) * np.linalg.slogdet(inverse)[1]
    system = np.eye(n_spans) + fitted.mean @ information
    explained = weighted @ np.linalg.solve(system, fitted.mean @ weighted)
    return deviance + float(np.linalg.slogdet(system)[1] - explained)


def _local_size(near: np.ndarray, gains: np.ndarray, measured: np.ndarray) -> Float[np.ndarray, " span"]:
    """Root mean square of the gains of a span and its neighbours; 1 where nothing was measured, or nothing changes."""
    if not measured.any():
        return np.ones(len(near))
    size = np.sqrt(near @ np.where(measured, gains, 0.0).__pow__(2).sum(0) / (near @ measured.sum(0)))
    return np.maximum(size, 1e-6 * size.max()) if size.max() > 0 else np.ones(len(near))


def _patterns(measured: np.ndarray) -> Iterator[tuple[Int[np.ndarray, " span"], Int[np.ndarray, " probe"]]]:
    """Yield the spans, and all probes that were asked just these."""
    patterns, of_probe = np.unique(measured, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        if pattern.any():
            yield np.flatnonzero(pattern), np.flatnonzero(of_probe.ravel() == number)
