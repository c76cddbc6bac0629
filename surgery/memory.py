"""How much memory this process has used, and what it does when there is no more."""

import sys
from pathlib import Path

GIB, MIB = 2**30, 2**20
_STATUS = Path("/proc/self/status")


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
