r"""Where a stack of layers falls into parts, how certain that is, and whether it falls into parts at all.

Every layer is described by a row of features. Two breaks cut the layers into three parts; the best are those that leave
the least variance inside the parts,

    cost(K) = min over K breaks  sum_parts sum_l |z_l - mean of the part|^2,        gain(K) = 1 - cost(K) / cost(0),

found exactly by dynamic programming (Truong, Oudre and Vayatis 2020, arXiv 1801.00718). Four questions:

* ``posterior``: where? The breaks are searched again in every resample of the prompts, and a boundary's probability at
  a layer is the share of resamples that put it there. It knows what other prompts would change, nothing else: a
  boundary that is stable under resampling need not exist.
* ``heldout``: how many? Breaks and means of one half of the prompts have to predict the other half's features.
* ``drift_test``: is a break needed? Features that drift look like blocks as well: two breaks explain 8/9 of a straight
  line. So paths without breaks are fitted and simulated, of two kinds: a cubic with noise around it, and a random walk
  with drift, both with the covariance between features that the data has. Blocks may show in one family of features
  only, and pooling drowns them, so every family is tested by itself and all together, and p corrected by the largest
  excess among them. Of features that drift in a dozen ways and of untrained networks it calls at most 3 in 100 blocks;
  it finds a third of the layers that writes 40 times as much or as little as the rest (``docs/validity.md``). (A
  stationary Gaussian path with the data's Toeplitz covariance is no null here: it calls every straight line blocks.)
* ``power``: would blocks as distinct as those that breaks see be found, at this number of layers?

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
from jaxtyping import Float, Int

from surgery.meanings import with_meanings

ALL = "all features"
SURE = 0.05
Path = Float[np.ndarray, "layer feature"]
Paths = Float[np.ndarray, "resample layer feature"]

COLUMNS = {
    "boundary": "which boundary: in (input part | middle), out (middle | output part), or its number",
    "layer": "the first layer behind the boundary",
    "probability": "share of resampled prompts that put the boundary there",
    "breaks": "number of breaks K: the parts are one more",
    "boundaries": "where they are, on all prompts",
    "gain": "share of the variance over layers of these features that K breaks explain",
    "heldout_error": "error of one half's parts on the other half's features, relative to that of no break",
    "heldout_error_low": "lower end over random halves (2.5 %)",
    "heldout_error_high": "upper end over random halves (97.5 %)",
    "evidence": "the family of features that places the boundaries: the one that shows parts most clearly, else all",
    "p_drift": "share of smooth paths, simulated like the data, in which K breaks explain some family as well",
    "gain_drift": "mean gain of those smooth paths",
    "power": "how often blocks as strong as these would be found (p_drift < .05) at this number of layers",
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


def breaks(path: Path, count: int = 2, min_size: int = 2) -> tuple[int, ...]:
    """Return the ``count`` best boundaries, found exactly; no part has fewer than ``min_size`` layers.

    Raises ValueError if so many parts do not fit.

    >>> import numpy as np
    >>> breaks(np.array([[0.0], [0.0], [7.0], [7.0], [7.0]]), count=1)
    (2,)
    """
    return tuple(map(int, places(path[None], count, min_size)[0]))


def cost(path: Path, boundaries: Sequence[int], means_of: Path | None = None) -> float:
    """Return the squared distance of the layers from the means of their parts; the means may be ``means_of`` another
    path."""
    model = path if means_of is None else means_of
    parts = np.split(np.arange(len(path)), list(boundaries))
    return float(sum(((path[part] - model[part].mean(0)) ** 2).sum() for part in parts))


def gain(path: Path, count: int = 2, min_size: int = 2) -> float:
    """Return the share of the variance over layers that ``count`` breaks explain; NaN if nothing varies."""
    return float(gains(path[None], count, min_size)[0])


def gains(paths: Paths, count: int = 2, min_size: int = 2) -> Float[np.ndarray, " resample"]:
    """Return ``gain`` of every path."""
    whole = ((paths - paths.mean(1, keepdims=True)) ** 2).sum((1, 2))
    left = _search(paths, count, min_size)[1]
    return np.where(whole > 0, 1 - left / np.where(whole > 0, whole, 1), np.nan)


def places(paths: Paths, count: int = 2, min_size: int = 2) -> Int[np.ndarray, "resample boundary"]:
    """Return the best boundaries (``breaks``) in every resample, those of the estimate in row 0."""
    return _search(paths, count, min_size)[0]


def _search(paths: Paths, count: int, min_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best boundaries of every path and the cost they leave, by dynamic programming over the last part."""
    n_paths, n_layers, _ = paths.shape
    if count < 0 or min_size < 1 or (count + 1) * min_size > n_layers:
        raise ValueError(
            f"{count + 1} parts of at least {min_size} layers do not fit into {n_layers} layers; "
            f"ask for at most {n_layers // max(min_size, 1) - 1} breaks, or a smaller min_size"
        )
    paths = paths - paths.mean(1, keepdims=True)
    sums = np.concatenate([np.zeros_like(paths[:, :1]), paths.cumsum(1)], 1)
    squares = np.concatenate([np.zeros((n_paths, 1)), (paths**2).sum(2).cumsum(1)], 1)
    products = sums @ sums.swapaxes(1, 2)
    size = products.diagonal(axis1=1, axis2=2)
    length = np.subtract.outer(np.arange(n_layers + 1), np.arange(n_layers + 1)).T  # [first, stop]
    total = size[:, :, None] + size[:, None, :] - 2 * products
    inside = squares[:, None, :] - squares[:, :, None] - total / np.maximum(length, 1)
    inside = np.where(length >= min_size, inside, np.inf)
    best, chosen = inside[:, 0], []  # best[path, stop]: the layers before ``stop`` in as many parts as there are yet
    for _ in range(count):
        candidates = best[:, :, None] + inside
        chosen.append(candidates.argmin(1))
        best = candidates.min(1)
    place, boundaries = np.full(n_paths, n_layers), []
    for earlier in reversed(chosen):
        place = earlier[np.arange(n_paths), place]
        boundaries.append(place)
    found = np.array(boundaries[::-1], dtype=int).reshape(count, n_paths).T
    return found, np.maximum(best[:, n_layers], 0)


@with_meanings(COLUMNS)
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


def drift_paths(path: Path, draws: int = 200, seed: int = 0) -> Float[np.ndarray, "kind draw layer feature"]:
    """Return smooth paths like this one: a cubic with noise around it, and a random walk with drift.

    Both have the covariance between features that the data has, so that what features share stays shared.
    """
    n_layers, generator = len(path), np.random.default_rng((seed, 5))
    curves = np.polynomial.polynomial.polyvander(np.linspace(-1, 1, n_layers), min(3, n_layers - 3))
    curve = curves @ np.linalg.lstsq(curves, path, rcond=None)[0]
    steps = np.diff(path, axis=0)
    drift = steps.mean(0)
    around, between = _root(path - curve, n_layers - curves.shape[1]), _root(steps - drift, n_layers - 2)
    noise = generator.standard_normal((2, draws, *path.shape))
    return np.stack([curve + noise[0] @ around, (drift + noise[1] @ between).cumsum(1)])


@with_meanings(COLUMNS)
def drift_test(
    path: Path, families: Sequence[str], count: int = 2, min_size: int = 2, draws: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Compare what breaks explain of every family of features, and of all together, with what they explain of drift.

    Return a row per family, and ``ALL`` where there are several: ``gain``; ``gain_drift``, its mean over smooth paths
    of the kind that breaks explain better; ``p_drift``, the larger of the two kinds', at least 1 / (draws + 1);
    ``excess``, how many SD logit gain lies above its mean over smooth paths of the kind in which that is less; and
    ``p_adjusted``, corrected for all rows: how often the largest excess of any row of a smooth path is as large
    (Westfall and Young 1993, single-step maxT). The smallest ``p_adjusted`` is the p of the whole. NaN where nothing
    varies.
    """
    paths, rows, excess, largest = drift_paths(path, draws, seed), [], [], -np.inf
    names = list(dict.fromkeys(families))
    for name in [*names, ALL] if len(names) > 1 else names:
        chosen = np.array([name in (family, ALL) for family in families])
        group = [family for family in families if name in (family, ALL)]
        own = gain(standardise(path[:, chosen], group), count, min_size)
        if np.isnan(own):
            rows.append({"family": name, "gain": own, "gain_drift": np.nan, "p_drift": np.nan})
            excess.append(np.nan)
            continue
        drift = np.stack([gains(standardise(kind[..., chosen], group), count, min_size) for kind in paths])
        p = (1 + np.sum(drift >= own, axis=1)) / (draws + 1)
        rows.append({"family": name, "gain": own, "gain_drift": drift[p.argmax()].mean(), "p_drift": p.max()})
        mean, spread = _logit(drift).mean(1), _logit(drift).std(1)
        excess.append(((_logit(own) - mean) / spread).min())
        largest = np.maximum(largest, ((_logit(drift)[..., None] - mean) / spread).min(-1))
    frame = pd.DataFrame(rows).set_index("family").assign(excess=np.array(excess, dtype=float))
    reached = [np.sum(largest >= z, axis=1).max() if np.isfinite(z) else np.nan for z in excess]
    frame["p_adjusted"] = (1 + np.array(reached)) / (draws + 1)
    return frame


def power(
    path: Path,
    families: Sequence[str],
    count: int = 2,
    min_size: int = 2,
    draws: int = 49,
    seed: int = 0,
    paths: int = 40,
) -> float:
    """Return how often ``drift_test`` would find (p < .05) blocks as strong as those that breaks see here.

    Every family is given blocks where and as high as breaks put them, and noise with the covariance that the features
    have inside them: were these truly blocks, at this number of layers, how often would that be known? A p above .05
    beside a high power speaks against blocks; beside a low one it says little.
    """
    blocks = np.zeros_like(path)
    for name in dict.fromkeys(families):
        chosen = np.array(families) == name
        for part in np.split(np.arange(len(path)), breaks(path[:, chosen], count, min_size)):
            blocks[np.ix_(part, chosen)] = path[np.ix_(part, chosen)].mean(0)
    noise = np.random.default_rng((seed, 10)).standard_normal((paths, *path.shape))
    simulated = blocks + noise @ _root(path - blocks, max(1, len(path) - count - 1))
    tests = [
        drift_test(standardise(one, families), families, count, min_size, draws, seed)["p_adjusted"].min()
        for one in simulated
    ]
    return float(np.mean(np.array(tests) < SURE))


@with_meanings(COLUMNS)
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


def _logit(gain: np.ndarray | float) -> np.ndarray:
    return np.log(np.clip(gain, 1e-9, 1 - 1e-9) / (1 - np.clip(gain, 1e-9, 1 - 1e-9)))


def _root(residuals: Path, degrees: int) -> Float[np.ndarray, "feature feature"]:
    """Return the matrix that turns independent normal numbers into rows with the covariance of these."""
    values, vectors = np.linalg.eigh(residuals.T @ residuals / degrees)
    return (vectors * np.sqrt(np.clip(values, 0, None))).T
