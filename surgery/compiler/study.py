"""A model compiled from end to end: search, confirm on fresh texts, fuse, save, time. ``surgery compile``.

compile_frontier.csv   every division that was found, and its rivals: what they cost on fresh texts
compile_speed.csv      tokens a second, original, compiled, taped, and with as many layers left out
compiled/              the fused model: surgery.load opens it
searched.csv, measured.csv    the scans, so that the same command goes on after a kill
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformer_lens import TransformerBridge

from surgery import disk
from surgery.compiler import draft_speed, draw, files, frontier, say, speed
from surgery.compiler.frontier import Halves
from surgery.corpus import everyday, probes
from surgery.models import names
from surgery.models.errors import ModelError
from surgery.models.loading import load, plain
from surgery.models.stack import Stack
from surgery.page import drawing
from surgery.rebuild import fuse, layout, tape
from surgery.records import tables
from surgery.records.manifest import manifest
from surgery.records.tables import manifest_path
from surgery.scan import study as scan_study

LEFT_OUT = "as many layers left out"
EARLY_EXIT = "early exit of the same depth"
COMPILED = "compiled"  # the folder of the fused model
FEWEST = 12  # texts


@dataclass(frozen=True)
class Compiled:
    """What was found: the tables, the sentences, and the folder of the compiled model, if there is one."""

    frontier: pd.DataFrame
    speed: pd.DataFrame
    sentences: list[str]
    folder: Path | None = None
    refused: str = ""


def run(
    model: str,
    out: "str | Path",
    *,
    asked: str | None = None,
    metric: str | None = None,
    prompts: int = 192,
    max_tokens: int = 48,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Compiled:
    """Open ``model``, read what it is ``asked`` (``texts``), and compile it into the folder ``out``; ``options`` are
    those of ``measure``."""
    stack = Stack(load(model, device=device, dtype=dtype))
    return measure(stack, texts(stack, model, asked, prompts, max_tokens, metric), out, **options)


def texts(
    stack: Stack, model: str, asked: str | None, prompts: int, max_tokens: int, metric: str | None = None
) -> Halves:
    """Texts or questions in parts: half to measure on, a quarter to choose by, a quarter to fit linear maps to.

    Every group of questions is in each part; all copies of a text are in one.

    By default those that every machine has: Python's manual, or the problems that a Babel model can solve.

    Raises ValueError for what is no set of questions or file of texts.
    """
    if asked is None:
        if model in names.BUNDLED:
            whole = probes.babel(prompts // 2, range(1, 5))  # short, and most are solved
        else:
            whole = probes.text(everyday.texts(model, prompts, seed=5), max_tokens=max_tokens)
    else:
        whole = scan_study.asked(model, asked, prompts, 0, max_tokens)
    count = len(set(whole.probes))
    if count < FEWEST:
        raise ValueError(f"{count} texts are too few to search by some and measure on others: give {FEWEST} or more")
    search, measured = whole.split()
    chosen, fitted = search.split()
    kind = "loss" if all(not probe.prompt for probe in whole.probes) else "loglik"
    return Halves(chosen.encode(stack), measured.encode(stack), fitted.encode(stack).tokens, metric or kind)


def measure(
    stack: Stack,
    halves: Halves,
    out: "str | Path",
    *,
    allow: float = 0.01,
    shallowest: int | None = None,
    limit: float = 0.5,
    beam: int = 2,
    screen: int = 6,
    precision: str = "float32",
    rounds: int = 9,
    speak: Callable[[str], None] = print,
) -> Compiled:
    """Search, confirm, fuse, save and time.

    Args:
        halves: what to choose by and what to measure on (``texts``).
        allow: loss that may be added (nats per token, or what the metric counts), with the whole of its interval.
        shallowest, limit, beam, screen, precision: of the search (``frontier.measure``).
        rounds: how often every model is timed; 0 times none.

    Where no division keeps within ``allow``, nothing is saved, and the cheapest that saves a sixth of the layers is
    timed instead, so that what there is to gain can be seen. Raises OSError for a folder that cannot be written.
    """
    folder = disk.folder(out)
    speak("searching")
    frame = frontier.measure(
        stack,
        halves,
        folder,
        shallowest=shallowest,
        limit=limit,
        beam=beam,
        screen=screen,
        precision=precision,
    )
    best = frontier.best(frame, allow)
    shown = best if best["saved"] else _cheap(frame, max(1, stack.n_layers // 6))
    fused, refused = None, ""
    try:
        fused = fuse.together(stack.model, str(shown["wiring"]))
    except ModelError as error:
        refused = str(error)
    saved = None
    if _kept(folder) != best["wiring"]:  # of an earlier run, with another allowance
        shutil.rmtree(folder / COMPILED, ignore_errors=True)
    if fused is not None and best["saved"] and plain(fused) is not None:
        saved = folder / COMPILED
        if not saved.exists():
            speak("saving the compiled model")
            layout.save(fused, saved)
    times, drafts = pd.DataFrame(columns=list(speed.COLUMNS)), pd.DataFrame(columns=list(draft_speed.COLUMNS))
    if rounds and plain(stack.model) is not None:
        speak("timing")
        models = _timed(stack, frame, shown, fused)
        times = speed.measure(models, rounds=rounds, d_vocab=stack.d_vocab)
        drafts = _drafted(stack, frame, shown, halves, models)
    sentences = say.sentences(frame, times, drafts, allow, halves.metric, stack.n_layers, refused)
    source = manifest(
        stack,
        halves.measured_on.tokens,
        seed=0,
        allow=allow,
        metric=halves.metric,
        refused=refused,
        timed=str(shown["wiring"]),
        compiled=str(best["wiring"]),
        chosen_by=len(halves.chosen_by.groups),
        search_precision=precision,
    )
    tables.write(frame, folder / files.FRONTIER, source, frontier.COLUMNS)
    for name, rows in ((files.SPEED, times), (files.DRAFT, drafts)):
        if len(rows):
            tables.write(rows, folder / name, source, files.COLUMNS[name])
        else:
            for stale in (folder / name, manifest_path(folder / name)):
                stale.unlink(missing_ok=True)
    disk.save({folder / "compile.png": drawing.png(draw.frontier(frame, times, allow, halves.metric))})
    return Compiled(frame, times, sentences, saved, refused)


def _kept(folder: Path) -> str:
    """The wiring that was compiled into the folder before; empty if none was."""
    file = folder / files.FRONTIER
    return str(tables.read_manifest(file)["settings"]["compiled"]) if file.exists() else ""


def _cheap(frame: pd.DataFrame, saved: int) -> pd.Series:
    """The division that saves so many layers, or the most that any does."""
    rows = frame[(frame["family"] == frontier.FUSABLE[0]) & (frame["saved"] <= saved)]
    return rows.sort_values("saved").iloc[-1]


def _drafted(
    stack: Stack, frame: pd.DataFrame, shown: pd.Series, halves: Halves, models: dict[str, Any]
) -> pd.DataFrame:
    """The compiled model as a draft, and early exit and layers left out of equal depth, on a few of the texts."""
    tokens, wiring, left_out = halves.measured_on.tokens, str(shown["wiring"]), _left_out(frame, shown)
    exit_ = f":{shown['depth']}"
    drafts = {COMPILED: (models.get(COMPILED, wiring), wiring), EARLY_EXIT: (exit_, exit_)}
    if left_out:
        drafts[LEFT_OUT] = (models.get(LEFT_OUT, left_out), left_out)
    few = [tokens.ids[row : row + 1, tokens.mask[row]][:, :16] for row in range(min(8, len(tokens)))]
    return draft_speed.measure(stack, drafts, tokens[: min(32, len(tokens))], few)


def _left_out(frame: pd.DataFrame, shown: pd.Series) -> str:
    """The wiring that leaves out as many layers as ``shown`` saves; empty if there is none."""
    rows = frame[(frame["family"] == "left out") & (frame["saved"] == shown["saved"])]
    return str(rows["wiring"].iloc[0]) if len(rows) else ""


def _timed(stack: Stack, frame: pd.DataFrame, shown: pd.Series, fused: TransformerBridge | None) -> dict[str, Any]:
    """The models to time: the original, the fused one or its wiring taped, and as many layers left out."""
    models = {"original": plain(stack.model)}
    if fused is not None:
        models["compiled"] = plain(fused)
    models["side by side, not fused"] = plain(tape.together(stack.model, str(shown["wiring"])))
    if left_out := _left_out(frame, shown):
        models[LEFT_OUT] = plain(tape.together(stack.model, left_out))
    return {name: model for name, model in models.items() if model is not None}
