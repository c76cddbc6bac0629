"""Families of wirings for scans: every span of a model repeated, skipped, run in parallel, swapped or reversed.

Each yields its wirings one by one, and raises WiringError at once for a number of layers that no model has.
"""

from collections.abc import Callable, Iterator
from itertools import combinations

from surgery.wiring.steps import require_layers
from surgery.wiring.value import Wiring


def every_repeat(n_layers: int, times: int = 2) -> Iterator[Wiring]:
    """Repeat every span ``0 <= i < j <= n``: n (n + 1) / 2 wirings ``:j i:`` (the scan of Ng's RYS).

    >>> [str(wiring) for wiring in every_repeat(2)]
    ['0 :', ': :', ': 1']
    """
    return (Wiring.of(n_layers).repeat(i, j, times) for i, j in _pairs(n_layers, ends=1))


def every_skip(n_layers: int) -> Iterator[Wiring]:
    """Leave out every span but the whole model: n (n + 1) / 2 - 1 wirings ``:i j:``."""
    spans = _pairs(n_layers, ends=1)
    return (Wiring.of(n_layers).skip(i, j) for i, j in spans if j - i < n_layers)


def every_parallel(n_layers: int, mean: bool = False) -> Iterator[Wiring]:
    """Run every span of at least two layers in parallel: n (n - 1) / 2 wirings ``:i {*i:j} j:``."""
    return (Wiring.of(n_layers).parallel(i, j + 1, mean) for i, j in _pairs(n_layers))


def every_swap(n_layers: int) -> Iterator[Wiring]:
    """Swap every two layers: n (n - 1) / 2 wirings."""
    return (Wiring.of(n_layers).swap(i, j) for i, j in _pairs(n_layers))


def every_reverse(n_layers: int) -> Iterator[Wiring]:
    """Run every span of at least two layers backwards: n (n - 1) / 2 wirings ``:i j-1:i-1:-1 j:``."""
    return (Wiring.of(n_layers).reverse(i, j + 1) for i, j in _pairs(n_layers))


def spans(family: str, n_layers: int) -> Iterator[tuple[tuple[int, int], Wiring]]:
    """The wirings of one of ``EVERY``, each with its span: the first layer it changes and the one behind the last.

    >>> [(span, str(wiring)) for span, wiring in spans("swap", 3)]
    [((0, 2), '1 0 2'), ((0, 3), '::-1'), ((1, 3), '0 2 1')]
    """
    ends = int(family in ("repeat", "skip"))
    pairs = ((i, j if ends else j + 1) for i, j in _pairs(n_layers, ends))
    pairs = (pair for pair in pairs if family != "skip" or pair != (0, n_layers))
    return zip(pairs, EVERY[family](n_layers), strict=True)


def _pairs(n_layers: int, ends: int = 0) -> Iterator[tuple[int, int]]:
    return combinations(range(require_layers(n_layers) + ends), 2)


# By the name on the command line. ``painters`` is no family of single spans: ``surgery.scan.controls`` makes it.
EVERY: dict[str, Callable[[int], Iterator[Wiring]]] = {
    "repeat": every_repeat,
    "skip": every_skip,
    "parallel": every_parallel,
    "swap": every_swap,
    "reverse": every_reverse,
}
PAINTERS = "painters"
NAMES = (*EVERY, PAINTERS)
