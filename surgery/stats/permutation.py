"""Signs to flip paired differences with: if there is no effect, d and -d are as likely (Fisher 1935)."""

import numpy as np
from jaxtyping import Float

FLIPS = 2000


def signs(n_prompts: int, resamples: int = FLIPS, seed: int = 0) -> Float[np.ndarray, "flip prompt"]:
    """Return a sign for every prompt, ``resamples`` times; each way to choose them once if there are no more than that.

    >>> signs(2).tolist()
    [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]
    """
    if 2**n_prompts <= resamples:
        return 1.0 - 2.0 * (np.arange(2**n_prompts)[:, None] >> np.arange(n_prompts) & 1)
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, n_prompts))


def all_of_them(flips: Float[np.ndarray, "flip prompt"]) -> bool:
    """Whether ``flips`` are all the ways to choose signs, the data as they are among them."""
    return len(flips) == 2 ** flips.shape[1]


def standardised(d: Float[np.ndarray, "prompt column"]) -> Float[np.ndarray, "prompt column"]:
    """Return ``d / sqrt(sum(d^2))``, whose sum is z; 0 where not measured and in columns that are 0 throughout."""
    size = np.sqrt(np.nansum(d**2, axis=0))
    return np.nan_to_num(d) / np.where(size > 0, size, 1)
