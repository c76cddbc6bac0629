"""The parts of a study that ask how serial layers are: windows, all measures side by side, and the calibration."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from surgery.instruments import known_networks
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.planning.machine import Work
from surgery.planning.parts import Level, Part, Shape, Subject
from surgery.progress import task
from surgery.records import tables
from surgery.records.kept import Kept
from surgery.series import chapter, side_by_side, window
from surgery.series.recording import Recording
from surgery.stats.bootstrap import RESAMPLES
from surgery.stats.sampling import Sampling

MODEL_PROMPTS = 64  # of the model, for the table of all measures and, untrained, beside the networks of known answer
LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FAIR_LENGTH = 4
PIECES = "series_windows.parts"  # a folder, while windows are measured
NETWORKS = Work(products=5e10)  # the constructed networks, which are small and always the same


def calibrate(
    fresh: Stack,
    tokens: Tokens,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = False,
    batch_size: int = Sampling().batch_size,
) -> pd.DataFrame:
    """``series.windows`` of networks with a known answer and of ``fresh``, the model untrained; ``network`` names them.

    The constructed networks normalise (RMS), so that their S_live shows what normalisation alone adds.
    """
    exact: dict[str, Any] = {"norm": "RMS", "dtype": torch.float64, "seed": seed}
    networks = {
        "parallel": known_networks.parallel_network(**exact),
        **{f"mixed {share}": known_networks.mixed_network(share, **exact) for share in (0.25, 0.5, 0.75)},
        "serial": known_networks.serial_network(**exact),
        "linear": known_networks.linear_network(seed=seed),
        **{f"random {i}": known_networks.random_network(seed=seed + i) for i in range(3)},
    }
    inputs = Tokens.of(known_networks.tokens(seed=seed))
    parts = {
        name: window.windows(Stack(network), inputs, damage=False, sampling=Sampling(seed=seed))
        for name, network in networks.items()
    }
    sampling = Sampling(seed=seed, batch_size=batch_size, progress=progress)
    parts[chapter.UNTRAINED] = window.windows(fresh, tokens, max_length, damage=False, sampling=sampling)
    return pd.concat([part.assign(network=name) for name, part in parts.items()], ignore_index=True)


def compare(
    stack: Stack, fresh: Stack, tokens: Tokens, seed: int = 0, prompts: int = MODEL_PROMPTS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every measure of ``surgery.series.side_by_side``, and what each function costs.

    The measures are taken on the networks whose answer is known, and on the model and ``fresh``, the same model
    untrained: these from layer 1 on, and on at most ``prompts`` prompts.
    """
    few = Tokens(tokens.ids[:prompts], tokens.mask[:prompts])
    first = int(stack.n_layers > 2)
    costs: list[dict[str, Any]] = []
    constructed = side_by_side.networks(seed=seed)
    table = pd.concat(
        [
            side_by_side.calibrate(constructed, known_networks.tokens(24, 12, seed), seed=seed),
            side_by_side.calibrate({stack.name: stack, chapter.UNTRAINED: fresh}, few, first, seed=seed, costs=costs),
        ],
        ignore_index=True,
    )
    return table, pd.DataFrame(costs, columns=list(side_by_side.COST_COLUMNS))


# --- windows ---------------------------------------------------------------------------------------------------------


def windows(subject: Subject, folder: Path, settings: Mapping[str, Any]) -> pd.DataFrame:
    """``window.windows`` of a subject; the sums of every batch are kept in a folder until the table is written."""
    kept = Kept(folder / PIECES, {**settings, **subject.identity})

    @in_smaller_batches
    def measured(sampling: Sampling) -> pd.DataFrame:
        recording = Recording.of(
            subject.stack,
            subject.tokens,
            settings["max_length"],
            damage_length=settings["damage_length"],
            untrained=subject.fresh,
            sampling=sampling,
        )
        with task("windows", recording.steps * len(recording.batches), sampling.progress) as advance:
            pieces = [
                kept.get(f"{prompts.start}-{prompts.stop}", partial(recording.sums, prompts, advance))
                for prompts in recording.batches
            ]
            return window.table(recording, pieces)

    return measured(sampling=Sampling(seed=subject.seed, batch_size=subject.batch_size, progress=subject.progress))


def _measure_windows(subject: Subject, folder: Path, settings: Mapping[str, Any]) -> None:
    frame = windows(subject, folder, settings)
    tables.write(frame, folder / chapter.WINDOWS, subject.manifest(**settings), window.COLUMNS)
    shutil.rmtree(folder / PIECES, ignore_errors=True)


def _window_levels(shape: Shape) -> tuple[Level, ...]:
    return tuple(
        Level(
            {"max_length": length, "damage_length": None},
            _window_work(shape, length),
            cut,
            length >= min(FAIR_LENGTH, shape.max_length),
        )
        for length, cut in _lengths(shape)
    )


def _lengths(shape: Shape) -> list[tuple[int, str]]:
    """Longest windows, the shortest first, and what each leaves out."""
    full = max(2, min(shape.max_length, shape.n_layers))
    shorter = [length for length in LENGTHS if length < full]
    return [(length, f"windows of {length + 1} to {full} layers") for length in shorter] + [(full, "")]


def _window_work(shape: Shape, length: int, damage: bool = True, matched: bool = True) -> Work:
    """What ``window.windows`` documents, and its statistics: some norms of d_model numbers a window and resample."""
    L, d = shape.n_layers, shape.d_model
    lengths = range(2, length + 1)
    windows = sum(L - size + 1 for size in lengths)
    layer = (1 / L) * shape.forward
    statistics = Work(products=RESAMPLES * 5.0 * windows * shape.prompts * d)
    work = (5 * L + 4 * windows) * layer + statistics
    if matched:
        work += (2 * L + windows) * layer + 0.25 * statistics
    if damage:
        after = sum(L - stop for size in lengths for stop in range(size, L + 1))
        work += after * layer + (windows + 2) * shape.readout
    held = 4.0 * 4 * windows * shape.prompts * d
    return work + Work(memory=held + 6 * shape.streams + damage * 2**29)


# --- all measures ----------------------------------------------------------------------------------------------------


def _measure_measures(subject: Subject, folder: Path, settings: Mapping[str, Any]) -> None:
    measures, costs = compare(subject.stack, subject.fresh, subject.tokens, subject.seed, settings["measured_prompts"])
    about = subject.manifest(**settings)
    tables.write(measures, folder / chapter.MEASURES_FILE, about, side_by_side.COLUMNS)
    tables.write(costs, folder / chapter.COSTS_FILE, about, side_by_side.COST_COLUMNS)


def _measures_levels(shape: Shape) -> tuple[Level, ...]:
    full = min(MODEL_PROMPTS, shape.prompts)
    counts = [count for count in (4, 8, 16, 32) if count < full]
    passes = sum(function.formula(shape.n_layers) for function in side_by_side.FUNCTIONS.values())
    graph = shape.graph / min(shape.batch_size, shape.prompts)  # of one prompt
    levels = []
    for count in (*counts, full):
        work = 2 * count / shape.prompts * passes * shape.forward  # the model, and the same untrained
        cut = "" if count == full else f"{full - count} of {full} prompts"
        levels.append(Level({"measured_prompts": count}, work + NETWORKS + Work(memory=count * graph), cut))
    return tuple(levels)


# --- calibration -----------------------------------------------------------------------------------------------------


def _measure_calibration(subject: Subject, folder: Path, settings: Mapping[str, Any]) -> None:
    few = Tokens(subject.tokens.ids[:MODEL_PROMPTS], subject.tokens.mask[:MODEL_PROMPTS])
    networks = calibrate(subject.fresh, few, settings["max_length"], subject.seed, subject.progress, subject.batch_size)
    tables.write(networks, folder / chapter.NETWORKS, subject.manifest(**settings), chapter.NETWORKS_COLUMNS)


def _calibration_levels(shape: Shape) -> tuple[Level, ...]:
    share = min(1.0, MODEL_PROMPTS / shape.prompts)
    return tuple(
        Level({"max_length": length}, share * _window_work(shape, length, damage=False, matched=False) + NETWORKS, cut)
        for length, cut in _lengths(shape)
    )


WINDOWS_PART = Part("windows", "series", "series: windows of layers", _window_levels, _measure_windows)
MEASURES_PART = Part(
    "measures",
    "series",
    "measures: every other measure of series and parallel, on the same networks",
    _measures_levels,
    _measure_measures,
)
CALIBRATION_PART = Part(
    "calibration",
    "series",
    "calibration: the same measure on networks whose answer is known",
    _calibration_levels,
    _measure_calibration,
)
