"""Shared set-up: two threads (one where tests run in several processes), no network, and the architecture matrix saved
once per run as Hugging Face folders."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled")
# A thread each where tests run side by side, for numpy, which is imported below, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import TransformerBridge

from support import shapes

shapes.only_where_arrays_are_named()  # before anything imports the package

import surgery  # noqa: E402
from support import fixtures  # noqa: E402
from support.places import SHARED, TESTS  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

LONGEST = (
    "test_notebooks.py",
    "compiler/test_study.py",
    "compiler/test_search.py",
    "rebuild/test_tape.py",
    "test_cli.py",
    "test_cli_refusals.py",
    "rebuild/test_width.py",
    "series/test_window.py",
    "studies/test_mean_reversion.py",
    "test_docs.py",
    "rebuild/test_checkpoint.py",
    "rebuild/test_layout.py",
    "graft/test_study.py",
    "studies/test_latent_walk.py",
    "graft/test_grafting.py",
    "studies/test_dropout.py",
    "scan/test_study.py",
    "studies/test_anatomy.py",
    "scan/test_cluster.py",
    "studies/test_width_of_thought.py",
    "scan/test_execution.py",
    "scan/test_rows.py",
    "test_stories.py",
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a model of the matrix lies, written on first use."""
    folder = tmp_path_factory.mktemp("architectures")

    def of(name: str) -> Path:
        place = folder / name
        return place if place.exists() else fixtures.save(name, place)

    return of


@pytest.fixture(scope="session")
def load(model_folder: Callable[[str], Path]) -> Callable[..., TransformerBridge]:
    """A fresh model of the matrix, through the real loading path (native ones are built in memory)."""

    def of(name: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
        if name in fixtures.NATIVE:
            return fixtures.native(name, dtype=dtype)
        return surgery.load(model_folder(name), dtype=dtype)

    return of


@pytest.fixture(scope="session")
def opened(load: Callable[..., TransformerBridge]) -> Callable[..., surgery.Stack]:
    """A model of the matrix, opened once per process: tests that use it must leave it as it is."""

    @functools.cache
    def stack(name: str, dtype: torch.dtype) -> surgery.Stack:
        return surgery.Stack(load(name, dtype=dtype))

    def of(name: str, dtype: torch.dtype = torch.float32) -> surgery.Stack:
        return stack(name, dtype)  # one key, however the precision is given

    return of


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real model and real text from outside the repository, where they are at hand."""
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the stories260K model lies beside the repository only in some checkouts; it is not here")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, help="begin no test after this time, in seconds since the epoch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first: run in several processes, none is left with one of them at the end.

    What needs a GPU is skipped where there is none.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU here"))
    if config.getoption("--until") is None:  # else the nearest to a change go first, as they were asked for
        places = {TESTS / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what the libraries made when they were imported is not searched again for what nobody needs


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    limit = item.config.getoption("--until")
    if limit is None or time.time() < limit:
        return None
    return True  # neither run nor reported


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--until") is not None:
        terminalreporter.write_line("the tests nearest to the change, as many as fit; make test runs them all")
