"""What a training cost: tokens, floating-point operations and seconds by phase, the teacher's share apart.

Operations are counted, not estimated: torch's own formulas watch the first call of every shape (matrix products and
attention, forward and backward, the optimiser's too; a multiplication and an addition are two), and later calls of that
shape cost as many. For a transformer of P weights in matrices that is 2 P a token forward and 4 P
backward, beside attention (Kaplan et al. 2020, arXiv 2001.08361).

>>> counter, x = Counter(), torch.ones(8, 8)
>>> counter("product", lambda: x @ x)[1]
1024
"""

from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from surgery import notebook
from surgery.meanings import with_meanings

Result = TypeVar("Result")
COLUMNS = {
    "phase": "what the operations were spent on",
    "teacher": "whether the model that is learned from spent them",
    "tokens": "real tokens that passed through, padding not counted",
    "operations": "floating-point operations, counted (a multiplication and an addition are two)",
    "seconds": "wall time",
}


def _attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch 2.13 counts the attention kernels of CUDA, not the CPU's
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),  # noqa: SLF001
}


class _Counting(TorchDispatchMode):
    """Apply torch's formulas to operations as they run.

    Its own ``FlopCounterMode`` decomposes some of them first, which rounds differently: resumed training would count,
    and so round, other steps than training that was not interrupted.
    """

    total = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if (formula := _FORMULAS.get(operation._overloadpacket)) is not None:  # noqa: SLF001
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass
class Counter:
    """Counts the operations of calls, at the first call of each key (the shapes that they depend on)."""

    known: dict[Hashable, int] = field(default_factory=dict)

    def __call__(self, key: Hashable, call: Callable[[], Result]) -> tuple[Result, int]:
        """Call ``call``; return its result and its floating-point operations."""
        if key in self.known:
            return call(), self.known[key]
        with _Counting() as counting:
            result = call()
        self.known[key] = int(counting.total)
        return result, self.known[key]


@dataclass
class Entry:
    """What one phase spent."""

    tokens: int = 0
    operations: int = 0
    seconds: float = 0.0


@dataclass
class Ledger:
    """What was spent, an entry for each (phase, whether it is the teacher's)."""

    entries: dict[tuple[str, bool], Entry] = field(default_factory=dict)

    def __repr__(self) -> str:
        phases = ", ".join(dict.fromkeys(phase for phase, _ in self.entries)) or "nothing spent"
        tokens, seconds = (sum(getattr(e, key) for e in self.entries.values()) for key in ("tokens", "seconds"))
        return f"Ledger({phases}: {tokens:,} tokens, {self.operations(teacher=True):.2e} operations, {seconds:.1f} s)"

    def _repr_html_(self) -> str:
        return notebook.table(repr(self), self.frame().to_dict("records"))

    def add(self, phase: str, tokens: int, operations: int, seconds: float, *, teacher: bool = False) -> None:
        """Add to the entry of a phase."""
        entry = self.entries.setdefault((phase, teacher), Entry())
        entry.tokens += tokens
        entry.operations += operations
        entry.seconds += seconds

    def operations(self, *, teacher: bool) -> int:
        """Floating-point operations of all phases, those of the teacher included or not."""
        return sum(entry.operations for (_, of_teacher), entry in self.entries.items() if teacher or not of_teacher)

    @with_meanings(COLUMNS)
    def frame(self) -> pd.DataFrame:
        """One row per entry: ``COLUMNS``."""
        rows = [{"phase": phase, "teacher": teacher} | asdict(e) for (phase, teacher), e in self.entries.items()]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def __add__(self, other: "Ledger") -> "Ledger":
        total = Ledger()
        for ledger in (self, other):
            for (phase, teacher), entry in ledger.entries.items():
                total.add(phase, **asdict(entry), teacher=teacher)
        return total

    @classmethod
    def of(cls, frame: pd.DataFrame) -> "Ledger":
        """The ledger whose ``frame()`` this is."""
        ledger = cls()
        for row in frame.to_dict("records"):
            ledger.add(
                str(row["phase"]),
                int(row["tokens"]),
                int(row["operations"]),
                float(row["seconds"]),
                teacher=bool(row["teacher"]),
            )
        return ledger
