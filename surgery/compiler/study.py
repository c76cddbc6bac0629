"""A model compiled from end to end: search, confirm on fresh texts, heal, fuse, save, time. ``surgery compile``.

compile_frontier.csv   every division that was found, and its rivals: what they cost on fresh texts
compile_heal.csv       what healing the compiled model recovers, where it was asked for
compile_speed.csv      tokens a second, original, compiled, taped, and with as many layers left out
compiled/              the fused model: surgery.load opens it
scans/, healing/       scans, activations and trainings, so that the same command goes on after a kill
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformer_lens import TransformerBridge

from surgery import disk
from surgery.compiler import draft_speed, files, floor, frontier, heal, say, search, speed
from surgery.compiler.frontier import Halves
from surgery.corpus import everyday, probes
from surgery.models import names
from surgery.models.errors import ModelError
from surgery.models.loading import load, plain
from surgery.models.stack import Stack
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
    healed: pd.DataFrame
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
    families: Sequence[str] = search.FUSED,
    ways: Sequence[str] = (),
    rounds: int = 9,
    torch_compile: bool = False,
    speak: Callable[[str], None] = print,
) -> Compiled:
    """Search, confirm, heal, fuse, save and time.

    Args:
        halves: what to choose by and what to measure on (``texts``).
        allow: loss that may be added (nats per token, or what the metric counts), with the whole of its interval.
        families, shallowest, limit, beam, screen, precision: of the search (``frontier.measure``).
        ways: how to heal what is compiled (``heal.WAYS``); it learns from ``halves.fitted_to``.
        rounds: how often every model is timed; 0 times none.
        torch_compile: time every model through ``torch.compile`` too; minutes more.

    Where no division keeps within ``allow``, the cheapest that saves a sixth of the layers is healed and timed instead,
    so that what there is to gain can be seen; it is saved only if healing brings it within ``allow``. Raises OSError
    for a folder that cannot be written, and as ``heal.measure`` does.
    """
    folder = disk.folder(out)
    speak("searching")
    frame = frontier.measure(
        stack,
        halves,
        folder,
        families=families,
        shallowest=shallowest,
        limit=limit,
        beam=beam,
        screen=screen,
        precision=precision,
    )
    best = frontier.best(frame, allow)
    shown = best if best["saved"] else _cheap(frame, max(1, stack.n_layers // 6))
    healed, way, model = pd.DataFrame(columns=list(heal.COLUMNS)), "", stack.model
    if ways:
        speak("healing")
        healed, way, model = _healed(stack, halves, str(shown["wiring"]), folder / "healing", ways, allow)
    kept = str(best["wiring"] if best["saved"] else shown["wiring"] if way else "")
    fused, refused = None, ""
    try:
        fused = fuse.together(model, str(shown["wiring"]))
    except ModelError as error:
        refused = str(error)
    saved = None
    if _kept(folder) != [kept, way]:  # of an earlier run, with another allowance or healing
        shutil.rmtree(folder / COMPILED, ignore_errors=True)
    if fused is not None and kept and plain(fused) is not None:
        saved = folder / COMPILED
        if not saved.exists():
            speak("saving the compiled model")
            layout.save(fused, saved)
    times, drafts = pd.DataFrame(columns=list(speed.COLUMNS)), pd.DataFrame(columns=list(draft_speed.COLUMNS))
    if rounds and plain(stack.model) is not None:
        speak("timing")
        models = _timed(stack, frame, shown, fused)
        times = speed.measure(models, rounds=rounds, d_vocab=stack.d_vocab, compiled=torch_compile)
        drafts = _drafted(stack, frame, shown, halves, models)
    parts = {files.FRONTIER: frame, files.HEAL: healed, files.SPEED: times, files.DRAFT: drafts}
    sentences = say.sentences(parts, allow, halves.metric, stack.n_layers, refused)
    source = manifest(
        stack,
        halves.measured_on.tokens,
        seed=0,
        allow=allow,
        metric=halves.metric,
        refused=refused,
        timed=str(shown["wiring"]),
        compiled=[kept, way],
        machine=asdict(floor.machine(stack.device, stack.dtype)) if rounds else None,
        chosen_by=len(halves.chosen_by.groups),
        search_precision=precision,
    )
    for name, rows in parts.items():
        if len(rows):
            tables.write(rows, folder / name, source, files.COLUMNS[name])
        else:
            for stale in (folder / name, manifest_path(folder / name)):
                stale.unlink(missing_ok=True)
    return Compiled(frame, healed, times, sentences, saved, refused)


def _healed(
    stack: Stack,
    halves: Halves,
    wiring: str,
    folder: Path,
    ways: Sequence[str],
    allow: float,
) -> tuple[pd.DataFrame, str, TransformerBridge]:
    """What healing recovers; the way that is taken, empty for none, and its model.

    A way is taken if its whole interval is within the allowance, and below the cost without healing.
    """
    learnt = heal.learnt_from(halves)
    folder = folder / hashlib.sha256(wiring.encode()).hexdigest()[:12]  # activations are those of one wiring
    schedule = replace(heal.SCHEDULE, batch=min(heal.SCHEDULE.batch, max(1, len(learnt) * 3 // 4)))
    frame = heal.measure(stack, halves, wiring, folder, ways=ways, schedule=schedule)
    before = float(frame["cost"].iloc[0])
    good = frame[(frame["way"] != "none") & (frame["cost_high"] <= allow) & (frame["cost"] < before)]
    if good.empty:
        return frame, "", stack.model
    way = str(good.sort_values("cost")["way"].iloc[0])
    return frame, way, heal.together(stack, wiring, learnt, way, schedule=schedule, folder=folder).model


def _kept(folder: Path) -> list[str]:
    """The wiring that was compiled into the folder before, and how it was healed; empty if none was."""
    file = folder / files.FRONTIER
    return list(tables.read_manifest(file)["settings"]["compiled"]) if file.exists() else []


def _cheap(frame: pd.DataFrame, saved: int) -> pd.Series:
    """The division that saves so many layers, or the most that any does."""
    rows = frame[(frame["family"] == frontier.FUSABLE[0]) & (frame["saved"] <= saved)]
    return rows.sort_values("saved").iloc[-1]


def _drafted(
    stack: Stack, frame: pd.DataFrame, shown: pd.Series, halves: Halves, models: dict[str, Any]
) -> pd.DataFrame:
    """The compiled model as a draft, and early exit and layers left out of equal depth, on a few of the texts."""
    tokens, wiring, left_out = halves.measured_on.tokens, str(shown["wiring"]), _left_out(frame, shown)
    exit_ = f":{int(shown['depth'])}"
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
