"""The part of a study that asks where a model's parts begin and end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from surgery.anatomy import boundaries, convergence, study
from surgery.corpus import bundled
from surgery.planning.machine import Work
from surgery.planning.parts import Level, NotMeasurableError, Part, Shape, Subject
from surgery.records import tables

FEWEST, FEWEST_LAYERS = 16, 6  # prompts: half of them to place the boundaries, half to test them
SENTENCES = 2500  # tokens of the parallel sentences, about
SCAN = "scan_search.csv"  # rows of a full scan


def _kinds(count: int, seed: int) -> list[str]:
    """The kinds of the bundled model's problems: those that only translate, that compose a little, or a lot."""
    steps = [problem.k for problem in bundled.problems(count, seed)]
    return ["k=0" if k == 0 else "k=1, 2" if k < 3 else "k=3, 4" for k in steps]


def _measure(subject: Subject, folder: Path, settings: Mapping[str, Any]) -> None:
    repeats = folder / SCAN
    try:
        _locate(subject, folder, tables.read(repeats) if subject.whole_scan and repeats.exists() else None)
    except boundaries.UndefinedError as error:
        raise NotMeasurableError(str(error)) from error


def _locate(subject: Subject, folder: Path, scan: pd.DataFrame | None) -> None:
    study.measure(
        subject.stack,
        subject.tokens,
        folder,
        _kinds(len(subject.tokens), subject.seed) if subject.own else None,
        utterances=convergence.babel() if subject.own else convergence.parallel(),
        scan=scan,
        metric="loglik" if subject.own else "loss",
        sampling=boundaries.SAMPLING.but(seed=subject.seed, batch_size=subject.batch_size),
        figures=False,
    )


def _refusal(subject: Subject) -> str | None:
    if subject.stack.n_layers < FEWEST_LAYERS or len(subject.tokens) < FEWEST:
        return (
            f"it needs at least {FEWEST_LAYERS} layers and {FEWEST} prompts; there are {subject.stack.n_layers} and "
            f"{len(subject.tokens)}"
        )
    return None


def _levels(shape: Shape) -> tuple[Level, ...]:
    return (Level({}, _work(shape)),)


def _work(shape: Shape) -> Work:
    """The passes that ``study.cost`` counts, a readout of half the tokens at every layer, and parallel sentences."""
    return (
        study.cost(shape.n_layers, kinds=shape.own) * shape.forward
        + shape.n_layers / 2 * shape.readout
        + Work(forward=2 * shape.n_layers * SENTENCES, products=3e10 * shape.n_layers, memory=6 * shape.streams)
    )


ANATOMY_PART = Part(
    "anatomy",
    "anatomy",
    "anatomy: where the parts begin and end, and the ends against the middle",
    _levels,
    _measure,
    _refusal,
)
