"""Models of the matrix, opened once for all tests that leave them as they are."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

import surgery
from surgery import Stack


@pytest.fixture(scope="session")
def stack_of(model_folder: Callable[[str], Path]) -> Callable[[str], Stack]:
    """A Stack of a model of the matrix, the same one every time: a test that changes it uses ``load`` instead."""
    return functools.cache(lambda name: Stack(surgery.load(model_folder(name))))
