"""Sign-flip tests of paired differences: what the largest of many columns reaches if there is no effect."""

import numpy as np
from jaxtyping import Float, Int

FLIPS = 2000
_AT_ONCE = 2**24  # numbers held per step: resamples times columns


def signs(n_prompts: int, resamples: int = FLIPS, seed: int = 0) -> Float[np.ndarray, "flip prompt"]:
    """Return a sign for every prompt, ``resamples`` times; each way to choose them once if there are no more than that.

    >>> signs(2).tolist()
    [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]
    """
    if 2**n_prompts <= resamples:
        return 1.0 - 2.0 * (np.arange(2**n_prompts)[:, None] >> np.arange(n_prompts) & 1)
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, n_prompts))


def sign_flips(
    d: Float[np.ndarray, "prompt column"], flips: Float[np.ndarray, "flip prompt"]
) -> tuple[Float[np.ndarray, " column"], Int[np.ndarray, " column"], Float[np.ndarray, " flip"]]:
    """Return |z| of every column (NaN if not measured), how many ``flips`` reach it, and the largest |z| of every flip.

    ``d`` are paired differences, NaN where not measured: if there is no effect, d and -d are as likely. A prompt is
    flipped in all columns at once (``signs``), so that what they share stays shared. ``z = sum(d) / sqrt(sum(d^2))``
    orders as Student's t does, and its denominator does not change under flips. ``p_value`` of the count is each
    column's own; compared with the largest of every flip, |z| is judged family-wise (Westfall and Young 1993).

    >>> flips = signs(3)
    >>> z, reached, largest = sign_flips(np.array([[1.0], [2.0], [3.0]]), flips)
    >>> p_value(reached, flips).tolist()  # two of eight: as it is, and all turned
    [0.25]
    """
    scaled = standardised(d)
    z = np.abs(scaled.sum(0))
    reached, largest = [], np.zeros(len(flips))
    for chunk in chunks(scaled, len(flips)):
        null = np.abs(flips @ chunk)
        reached.append((null >= np.abs(chunk.sum(0)) - 1e-9).sum(0))
        largest = np.maximum(largest, null.max(1))
    return np.where(np.isfinite(d).any(0), z, np.nan), np.concatenate(reached), largest


def p_value(reached: Int[np.ndarray, " row"], flips: Float[np.ndarray, "flip prompt"]) -> Float[np.ndarray, " row"]:
    """Return the two-sided p of what ``reached`` of the ``flips`` reach: exact if these are all the flips there are."""
    extra = 0 if all_of_them(flips) else 1  # the data as they are count as one of the flips
    return (reached + extra) / (len(flips) + extra)


def all_of_them(flips: Float[np.ndarray, "flip prompt"]) -> bool:
    """Whether ``flips`` are all the ways to choose signs, the data as they are among them."""
    return len(flips) == 2 ** flips.shape[1]


def standardised(d: Float[np.ndarray, "prompt column"]) -> Float[np.ndarray, "prompt column"]:
    """Return ``d / sqrt(sum(d^2))``, whose sum is z; 0 where not measured and in columns that are 0 throughout."""
    size = np.sqrt(np.nansum(d**2, axis=0))
    return np.nan_to_num(d) / np.where(size > 0, size, 1)


def chunks(values: np.ndarray, rows: int) -> list[np.ndarray]:
    """Cut the columns into parts so small that ``rows`` results for each column fit into memory."""
    size = max(1, _AT_ONCE // rows)
    return [values[:, first : first + size] for first in range(0, values.shape[1], size)]
