"""How much memory this process has used, and how it goes on with smaller batches when there is no more.

Three forms of one idea, for work of which the size of the batch changes nothing but the memory: ``pieces`` for work
that falls into parts, ``halving`` for work that is done as a whole or again, ``in_smaller_batches`` for a measure.
Each says so in a warning. What cannot be caught is a system that kills a process instead of refusing it memory (Linux
on a CPU, by default): set a limit (``ulimit -v``) to be refused.
"""

import functools
import gc
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
GIB, MIB = 2**30, 2**20
_STATUS = Path("/proc/self/status")
_REFUSED = ("not enough memory", "out of memory", "ALLOC_FAILED", "can't allocate memory")  # in torch's messages


class LowMemoryWarning(UserWarning):
    """There was too little memory for a batch: the same goes on in smaller ones."""


def peak() -> int:
    """The most memory that this process has had at once, in bytes; that of a GPU and of other processes not counted.

    >>> peak() > 2**20
    True
    """
    try:
        lines = _STATUS.read_text().splitlines()  # getrusage would count what the parent of this process had
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size(n_bytes: float) -> str:
    """A number of bytes in words.

    >>> size(3 * 2**29), size(2**20)
    ('1.5 GiB', '1 MiB')
    """
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:.0f} MiB"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: Python's, or torch's on a CPU or a GPU.

    >>> ran_out(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."))
    True
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSED)
    )


def halving(most: int, run: Callable[[int], R], words: Callable[[int], str] = "{} prompts at once".format) -> R:
    """``run(most)``; where the memory does not do, ``run(most // 2)``, and so on to ``run(1)``, whose error is raised.

    ``words`` says what so many are.

    >>> def run(size):
    ...     if size > 4:
    ...         raise MemoryError
    ...     return f"{size} at once"
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     halving(16, run)
    '4 at once'
    """
    while True:
        try:
            return run(most)
        except (MemoryError, RuntimeError) as error:
            if most <= 1 or not ran_out(error):
                raise
        most = _half(most, words)  # outside, where the error holds no tensors any more


def pieces(count: int, most: int, run: Callable[[int, int], None]) -> None:
    """``run(first, stop)`` over ``range(count)``, at most ``most`` at once; fewer from where the memory did not do.

    >>> pieces(5, 2, lambda first, stop: print(first, stop))
    0 2
    2 4
    4 5
    """
    first = 0
    while first < count:
        stop = min(first + most, count)
        try:
            run(first, stop)
            first = stop
            continue
        except (MemoryError, RuntimeError) as error:
            if stop - first <= 1 or not ran_out(error):
                raise
        most = _half(stop - first, "{} prompts at once".format)


def in_smaller_batches(measure: Callable[P, R]) -> Callable[P, R]:
    """A measure that is taken again with half of ``sampling.batch_size`` where the memory does not do."""
    signature = inspect.signature(measure)

    @functools.wraps(measure)
    def wrapped(*args: P.args, **options: P.kwargs) -> R:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        sampling = bound.arguments["sampling"]

        def run(batch_size: int) -> R:
            bound.arguments["sampling"] = sampling.but(batch_size=batch_size)
            return measure(*bound.args, **bound.kwargs)

        return halving(sampling.batch_size, run)

    return wrapped


def _half(count: int, words: Callable[[int], str]) -> int:
    """Half of what was too much, when the memory that it took is free again."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    half = count // 2
    warnings.warn(f"not enough memory for {words(count)}: going on with {words(half)}", LowMemoryWarning, stacklevel=3)
    return half
