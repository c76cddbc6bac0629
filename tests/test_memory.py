"""Smaller batches where the memory does not do: for pieces, for a whole, for every measure with a batch size."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

from support.places import REPOSITORY
from surgery import Stack, memory, series
from surgery.instruments import known_networks
from surgery.stats.sampling import Sampling

CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."), True),
        (RuntimeError(CPU), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_says_that_the_memory_ran_out(error, expected):
    assert memory.ran_out(error) == expected


def test_torch_itself_says_so():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.uint8)
    assert memory.ran_out(raised.value)


def limited(most: int, ran: list):
    """What runs at most so many at once."""

    def run(first: int, stop: int) -> None:
        if stop - first > most:
            raise MemoryError
        ran.extend(range(first, stop))

    return run


@pytest.mark.parametrize(("count", "most", "limit"), [(10, 8, 3), (7, 100, 1), (5, 5, 5), (0, 4, 1)])
def test_pieces_run_everything_once_and_in_order(count, most, limit):
    ran: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", memory.LowMemoryWarning)
        memory.pieces(count, most, limited(limit, ran))
    assert ran == list(range(count))


def test_what_does_not_run_alone_ends_it():
    with (
        pytest.warns(memory.LowMemoryWarning, match="for 2 prompts at once: going on with 1"),
        pytest.raises(MemoryError),
    ):
        memory.pieces(4, 2, limited(0, []))
    with (
        pytest.warns(memory.LowMemoryWarning, match="for 3 of them: going on with 1 "),
        pytest.raises(MemoryError),
    ):
        memory.halving(3, lambda size: limited(0, [])(0, size), "{} of them".format)


def test_other_errors_are_not_tried_again():
    tried = []

    def fail(size: int) -> None:
        tried.append(size)
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.halving(8, fail)
    assert tried == [8]


def test_a_measure_is_the_same_in_smaller_batches(monkeypatch):
    stack, tokens = Stack(known_networks.random_network(n_layers=3)), known_networks.tokens(12, 6)
    options = {"damage": False, "sampling": Sampling(resamples=10, batch_size=8)}
    whole = series.windows(stack, tokens, **options)
    context, sizes = Stack.context, []

    def small(self, batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return context(self, batch)

    monkeypatch.setattr(Stack, "context", small)
    with pytest.warns(memory.LowMemoryWarning):
        again = series.windows(stack, tokens, **options)
    assert (max(sizes), sizes[-1]) == (6, 2), "batches are even"
    pd.testing.assert_frame_equal(again, whole, rtol=1e-4, atol=1e-6)


def public_measures() -> list[tuple[Path, ast.FunctionDef]]:
    """Every public function of a module that takes a ``sampling`` with a default."""
    found = []
    for path in sorted((REPOSITORY / "surgery").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
                if "sampling" in names and path.name != "study.py":
                    found.append((path, node))
    return found


def test_every_measure_with_a_batch_size_goes_on_in_smaller_batches():
    measures = public_measures()
    assert len(measures) > 30
    without = [
        f"{path.relative_to(REPOSITORY)}: {node.name}"
        for path, node in measures
        if "in_smaller_batches" not in map(ast.unparse, node.decorator_list)
    ]
    assert without == []


GROWS = """
import sys
from surgery import memory
before = memory.peak()
block = bytearray(b"1") * (before + 2**27)
print(before, memory.peak(), len(block))
"""


def test_the_peak_is_that_of_this_process():
    # A process of its own: this one may once have had more than any block that a test can ask for.
    ran = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    before, after, size = map(int, ran.stdout.split())
    assert size < after < before + size + 2**25
