r"""Where a stack of layers falls into parts, how certain that is, and whether it falls into parts at all.

Every layer is described by a row of features. Two breaks cut the layers into three parts; the best are those that leave
the least variance inside the parts,

    cost(K) = min over K breaks  sum_parts sum_l |z_l - mean of the part|^2,        gain(K) = 1 - cost(K) / cost(0),

found exactly by dynamic programming (``ruptures.KernelCPD`` with the linear kernel; Truong, Oudre and Vayatis 2020,
arXiv 1801.00718). Three questions, three answers:

* ``posterior``: where? The breaks are searched again in every resample of the prompts, and a boundary's probability at
  a layer is the share of resamples that put it there. It knows what other prompts would change, nothing else.
* ``heldout``: how many? Breaks and means of one half of the prompts have to predict the other half's features.
* ``drift_null``: is a break needed? Features that drift look like blocks as well: two breaks explain 8/9 of a straight
  line. So paths without breaks are fitted and simulated, of two kinds: a cubic with noise around it, and a random walk
  with drift, both with the covariance between features that the data has. p is the share of them that breaks explain
  as well, the larger of the two kinds'. In 60 simulations each, at 12 layers and 6 features, p < .05 in no straight
  line, parabola or AR(1) path, in 2 % of random walks, and in 47 % (with less noise 97 %) of three blocks. (A
  stationary Gaussian path with the data's Toeplitz covariance is no null here: it calls every straight line blocks.)

A boundary at layer ``b`` means that a part ends with layer ``b - 1`` and the next begins with ``b``. No model code
lives here. The combination is ours.

>>> import numpy as np
>>> path = np.array([0.0, 0.1, 0.0, 5.0, 5.1, 5.0, 9.0, 9.1, 9.0])[:, None]
>>> breaks(path)
(3, 6)
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import ruptures
from jaxtyping import Float

Path = Float[np.ndarray, "layer feature"]
Paths = Float[np.ndarray, "resample layer feature"]

COLUMNS = {
    "boundary": "which boundary: in (input part | middle), out (middle | output part), or its number",
    "layer": "the first layer behind the boundary",
    "probability": "share of resampled prompts that put the boundary there",
    "breaks": "number of breaks K: the parts are one more",
    "boundaries": "where they are, on all prompts",
    "gain": "share of the features' variance over layers that K breaks explain",
    "heldout_error": "error of one half's parts on the other half's features, relative to that of no break",
    "heldout_error_low": "lower end over random halves (2.5 %)",
    "heldout_error_high": "upper end over random halves (97.5 %)",
    "p_drift": "share of smooth paths, simulated like the data, that K breaks explain as well",
    "gain_drift": "mean gain of those smooth paths",
}


def standardise(values: Float[np.ndarray, "... layer feature"], families: Sequence[str]) -> np.ndarray:
    """Shift every feature to mean 0 over layers, and scale every family of features to a total variance of 1.

    A feature that does not vary over layers becomes 0. Raises ValueError unless there is one family name per feature.
    """
    if len(families) != values.shape[-1]:
        raise ValueError(f"name the family of each of {values.shape[-1]} features, got {len(families)} names")
    centred = values - values.mean(-2, keepdims=True)
    spread = centred.std(-2, keepdims=True)
    varies = spread > 1e-9 * np.abs(values).max(-2, keepdims=True)
    sizes = np.array([list(families).count(family) for family in families])
    return np.where(varies, centred / np.where(varies, spread, 1), 0) / np.sqrt(sizes)


def breaks(path: Path, count: int = 2, min_size: int = 2, kernel: str = "linear") -> tuple[int, ...]:
    """Return the ``count`` best boundaries, found exactly; no part has fewer than ``min_size`` layers.

    ``kernel`` is ``linear`` (means of parts, the cost above), ``rbf`` or ``cosine``. Raises ValueError if so many parts
    do not fit.

    >>> import numpy as np
    >>> breaks(np.array([[0.0], [0.0], [7.0], [7.0], [7.0]]), count=1)
    (2,)
    """
    n_layers = len(path)
    if count < 0 or min_size < 1 or (count + 1) * min_size > n_layers:
        raise ValueError(
            f"{count + 1} parts of at least {min_size} layers do not fit into {n_layers} layers; "
            f"ask for at most {n_layers // max(min_size, 1) - 1} breaks, or a smaller min_size"
        )
    if count == 0:
        return ()
    search = ruptures.KernelCPD(kernel=kernel, min_size=min_size).fit(np.ascontiguousarray(path, dtype=float))
    return tuple(int(place) for place in search.predict(n_bkps=count)[:-1])


def cost(path: Path, boundaries: Sequence[int], means_of: Path | None = None) -> float:
    """Return the squared distance of the layers from the means of their parts; the means may be ``means_of`` another
    path."""
    model = path if means_of is None else means_of
    parts = np.split(np.arange(len(path)), list(boundaries))
    return float(sum(((path[part] - model[part].mean(0)) ** 2).sum() for part in parts))


def gain(path: Path, count: int = 2, min_size: int = 2) -> float:
    """Return the share of the variance over layers that ``count`` breaks explain; NaN if nothing varies."""
    whole = cost(path, ())
    return 1 - cost(path, breaks(path, count, min_size)) / whole if whole > 0 else float("nan")


def places(paths: Paths, count: int = 2, min_size: int = 2) -> np.ndarray:
    """Return the boundaries in every resample: [resample, boundary], those of the estimate in row 0."""
    return np.array([breaks(path, count, min_size) for path in paths], dtype=int).reshape(len(paths), count)


def posterior(placements: np.ndarray, names: Sequence[str] = ("in", "out")) -> pd.DataFrame:
    """Return ``boundary, layer, probability`` from the boundaries of every resample (``places``), without the estimate.

    >>> import numpy as np
    >>> posterior(np.array([[3, 6], [3, 6], [4, 6]]))["probability"].tolist()
    [0.5, 0.5, 1.0]
    """
    rows = [
        {"boundary": name, "layer": int(layer), "probability": float(share)}
        for name, column in zip(names, placements[1:].T, strict=True)
        for layer, share in zip(*_shares(column), strict=True)
    ]
    return pd.DataFrame(rows, columns=["boundary", "layer", "probability"])


def drift_null(
    path: Path, families: Sequence[str], count: int = 2, min_size: int = 2, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Return p of the gain among smooth paths like this one, and their mean gain. ``path`` is standardised.

    p is the larger of the two kinds' and at least 1 / (draws + 1); the mean is that of its kind. NaN where nothing
    varies.
    """
    own = gain(path, count, min_size)
    if np.isnan(own):
        return float("nan"), float("nan")
    n_layers, generator = len(path), np.random.default_rng((seed, 5))
    curves = np.polynomial.polynomial.polyvander(np.linspace(-1, 1, n_layers), min(3, n_layers - 3))
    curve = curves @ np.linalg.lstsq(curves, path, rcond=None)[0]
    drift, steps = np.diff(path, axis=0).mean(0), np.diff(path, axis=0)
    around, between = _root(path - curve, n_layers - curves.shape[1]), _root(steps - drift, n_layers - 2)
    results = []
    for simulate in (lambda noise: curve + noise @ around, lambda noise: (drift + noise @ between).cumsum(0)):
        noises = generator.standard_normal((draws, *path.shape))
        gains = [gain(standardise(simulate(noise), families), count, min_size) for noise in noises]
        p = (1 + sum(simulated >= own for simulated in gains)) / (draws + 1)
        results.append((p, float(np.mean(gains))))
    return max(results)


def heldout(
    halves: Sequence[tuple[Path, Path]],
    families: Sequence[str],
    most: int = 5,
    min_size: int = 2,
) -> pd.DataFrame:
    """Return the error on the held-out half relative to no break: one row per number of breaks, with mean and range.

    ``halves`` are pairs of raw features, of two random halves of the prompts; the first is cut, the second predicted,
    in units of the first. As layers differ from one another and prompts are many, more breaks go on predicting better:
    this says how many breaks the prompts can tell apart, ``p_drift`` whether they are breaks.
    """
    rows = []
    for count in range(min(most, len(halves[0][0]) // min_size - 1) + 1):
        errors = []
        for first, second in halves:
            both = standardise(np.concatenate([first, second], 1), [*families, *(f"{name} " for name in families)])
            trained, fresh = both[:, : first.shape[1]], both[:, first.shape[1] :]
            cut = breaks(trained, count, min_size)
            errors.append(cost(fresh, cut, means_of=trained) / cost(fresh, (), means_of=trained))
        low, high = np.quantile(errors, [0.025, 0.975])
        rows.append(
            {
                "breaks": count,
                "heldout_error": float(np.mean(errors)),
                "heldout_error_low": float(low),
                "heldout_error_high": float(high),
            }
        )
    return pd.DataFrame(rows)


def _shares(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    layers, counts = np.unique(column, return_counts=True)
    return layers, counts / len(column)


def _root(residuals: Path, degrees: int) -> Float[np.ndarray, "feature feature"]:
    """Return the matrix that turns independent normal numbers into rows with the covariance of these."""
    values, vectors = np.linalg.eigh(residuals.T @ residuals / degrees)
    return (vectors * np.sqrt(np.clip(values, 0, None))).T
