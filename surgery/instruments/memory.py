"""What the layers wrote on the way through a model, kept so that a second walk over the same prompts costs no pass.

Most measures of a stream walk the same layers over the same prompts. The stream is the embedding and the sum of all
updates so far, so the updates are all that has to be kept, and the stream of a second walk equals the first's bit by
bit. What does not fit any more is computed again.

It is for a model that stays as it is, such as that of one study: nothing here notices an edited weight or a new hook.

>>> import torch
>>> memory = Memory(limit=100)
>>> [memory.recall("u", lambda: torch.ones(8)).sum().item(), memory.recall("u", lambda: torch.zeros(8)).sum().item()]
[8.0, 8.0]
>>> [memory.recall("large", lambda: torch.ones(40) * turn)[0].item() for turn in (1, 2)]
[1.0, 2.0]
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

LIMIT = 2**30  # bytes


@dataclass
class Memory:
    """Tensors by key, the first that come, up to ``limit`` bytes."""

    limit: int = LIMIT
    held: int = 0
    _kept: dict[Hashable, Tensor] = field(default_factory=dict)

    def recall(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return what was computed under ``key`` before, else what ``compute`` gives, which is kept if it fits."""
        if key in self._kept:
            return self._kept[key]
        computed = compute()
        if self.held + computed.nbytes <= self.limit:
            self.held += computed.nbytes
            self._kept[key] = computed
        return computed
