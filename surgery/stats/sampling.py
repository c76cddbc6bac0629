"""How a measure is taken: which tokens count, how prompts are resampled, how many run at once."""

from dataclasses import dataclass, replace
from typing import Any

from surgery.stats.bootstrap import RESAMPLES


@dataclass(frozen=True)
class Sampling:
    """The settings that nearly every measure takes; a value that is passed on from one to the next.

    Attributes:
        skip_first: leave out every prompt's first token, whose activations are often massive.
        skip_massive: leave out tokens of massive activations, which would decide every second moment by themselves
            (``surgery.instruments.massive``). Finding them costs 1 F, and up to 1 F more where there are several
            batches, which the costs of measures leave out.
        resamples: bootstrap resamples over prompts; 0 gives no intervals.
        seed: where every random draw starts from.
        batch_size: prompts run at once. Results do not depend on it, but where a docstring says so.
        progress: draw a progress bar on standard error.

    >>> Sampling(resamples=100).but(seed=1)
    Sampling(skip_first=True, skip_massive=True, resamples=100, seed=1, batch_size=64, progress=False)
    """

    skip_first: bool = True
    skip_massive: bool = True
    resamples: int = RESAMPLES
    seed: int = 0
    batch_size: int = 64
    progress: bool = False

    def but(self, **changes: Any) -> "Sampling":
        """Return the same with some settings changed."""
        return replace(self, **changes)
