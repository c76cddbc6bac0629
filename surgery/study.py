"""Run one study: a model and prompts in; CSV files, manifests, figures and ``report.html`` out. ``surgery study``.

    series       ``series_windows.csv``    how serial every window of layers is          (surgery.series.windows)
    reversion    ``reversion_*.csv``       whether the stream reverts to a mean          (surgery.reversion.study)
    scan         ``scan_table.csv`` ...    which repeated spans help, and does it last   (surgery.scan.study)
    anatomy      ``anatomy_ends.csv`` ...  where the parts of the model begin and end    (surgery.anatomy.study)

With ``series`` come ``calibration.csv``, the same on networks whose answer is known and on the model untrained;
``measures.csv``, every other measure of series on all of these; and ``costs.csv``, what each of them costs. The scan
asks the bundled model questions of its own kind; any other model, or the bundled one when a text is given, it asks
every token of the prompts, unless ``probes`` are named. A measure of an installed package (``surgery.planning.own``) is
measured where it is named.

A study is planned first (``surgery.planning``): with a budget of time it takes fewer prompts, or less of some parts.
``study.json`` holds the plan and what is done. So the same command goes on after a kill, with the same plan; an
interruption leaves a page of what there is.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import surgery
from surgery import disk, memory, plugins, report
from surgery.anatomy.part import ANATOMY_PART
from surgery.chapters import MEASURED
from surgery.corpus import bundled
from surgery.corpus.asked import require_prompts
from surgery.corpus.text_files import read_prompts
from surgery.models import identity
from surgery.models.loading import BUNDLED, REFERENCE, load
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.planning import agenda as agendas
from surgery.planning import plans
from surgery.planning.agenda import Agenda, Done
from surgery.planning.budget import seconds_of
from surgery.planning.machine import Machine
from surgery.planning.own import installed
from surgery.planning.parts import NotMeasurableError, Part, Shape, Subject
from surgery.planning.plans import Plan, Planned
from surgery.plugins import PluginError
from surgery.progress import duration, task
from surgery.records.manifest import tokens_hash
from surgery.reversion.part import REVERSION_PART
from surgery.scan.part import SCAN_PART, questions
from surgery.series.part import CALIBRATION_PART, MEASURES_PART, WINDOWS_PART
from surgery.stats.sampling import Sampling

PARTS: tuple[Part, ...] = (  # the most important first: what has no time is left out from the end
    WINDOWS_PART,
    SCAN_PART,
    REVERSION_PART,
    ANATOMY_PART,
    CALIBRATION_PART,
    MEASURES_PART,
)
BUDGET = "10m"  # for models that a user brings
MOST_MEMORY = 5 * 2**29  # bytes beside the model: more makes nothing faster
PAGE_SECONDS = 20.0  # to draw the figures and write the page
Say = Callable[[str], Any]


def run(
    names: Sequence[str] = MEASURED,
    model: str = REFERENCE,
    text: str | Path | None = None,
    out: str | Path = "results",
    *,
    prompts: int = 256,
    max_tokens: int = 128,
    max_length: int | None = None,
    probes: str | None = None,
    batch_size: int = Sampling().batch_size,
    budget: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cluster: Any = None,
    say: Say = lambda _: None,
    progress: bool = False,
) -> Path:
    """Measure ``model`` on ``prompts`` prompts and return the path of the report.

    Args:
        names: which measurements, of ``MEASURED`` or of installed packages.
        model: what ``surgery.load`` takes.
        text: a file of prompts (see ``read_prompts``); None means the bundled model's own problems.
        out: the folder for the results, made if it is missing. A study of the same that was begun there goes on.
        prompts: how many prompts, the first ones of the file; fewer if the budget is small.
        max_tokens: prompts are cut to this many tokens, or fewer.
        max_length: the longest window of layers, and the longest span repeated; None means all.
        probes: what the scan asks, as for ``surgery.scan.study.run``; by default the prompts as running text, or the
            bundled model's own problems.
        batch_size: prompts run at once, at most.
        budget: time to stay within, such as ``10m``, or ``none`` for everything; by default ``BUDGET``, and ``none``
            for the bundled models.
        device, dtype: as for ``surgery.load``.
        seed: of everything drawn.
        cluster: run the scan on Ray workers, as for ``scan.run``.
        say: called with lines of words: the plan, and whenever a part of the study begins.
        progress: draw progress bars on standard error.

    Raises:
        ValueError: a name or the budget is none, there are no prompts, or the text file or the model cannot be used.
        OSError: the folder cannot be written to (noticed before anything is measured), or the disk is full.

    >>> run(["sequel"])
    Traceback (most recent call last):
    ValueError: there is no measurement 'sequel'; there are series, reversion, scan, anatomy
    """
    check(names, model, budget)
    names, parts = _parts(names, say)
    began = time.monotonic()
    with disk.held(out) as folder:
        subject = opened(model, text, prompts, max_tokens, batch_size, device, dtype, seed, say)
        subject = replace(subject, progress=progress, cluster=cluster, probes=probes)
        agenda = _agenda(folder, subject, names, parts, prompts, max_length, _seconds(budget, model), began)
        subject = _cut(subject, agenda.plan)
        say(str(agenda.plan))
        for part in parts:
            if part.name in agenda.missing:
                part.ready(subject, folder)
        agenda.write(folder)
        try:
            _measure(folder, subject, agenda, parts, alone=len(names) == 1)
        except (KeyboardInterrupt, SystemExit):
            _page_of_what_there_is(folder, say)
            raise
        say("report")
        return report.build(folder)


def plan(
    names: Sequence[str] = MEASURED,
    model: str = REFERENCE,
    text: str | Path | None = None,
    *,
    prompts: int = 256,
    max_tokens: int = 128,
    max_length: int | None = None,
    probes: str | None = None,
    batch_size: int = Sampling().batch_size,
    budget: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    say: Say = lambda _: None,
) -> Plan:
    """The plan of the study that ``run`` would make with these arguments. Raises as ``run`` does.

    Cost: opening the model, and about ten forward passes of 1,024 tokens.
    """
    check(names, model, budget)
    names, parts = _parts(names, say)
    began = time.monotonic()
    subject = opened(model, text, prompts, max_tokens, batch_size, device, dtype, seed, say)
    return _plan(replace(subject, probes=probes), names, parts, prompts, max_length, _seconds(budget, model), began)


def check(names: Sequence[str], model: str, budget: str | None) -> None:
    """Raise ValueError for a name that there is no measurement of, and for a budget that is none."""
    if not set(names) <= set(MEASURED):
        every = plugins.names("measures", MEASURED)
        for name in names:
            if name not in every:
                raise ValueError(f"there is no measurement {name!r}; there are {', '.join(every)}")
    _seconds(budget, model)


def _parts(names: Sequence[str], say: Say) -> tuple[list[str], tuple[Part, ...]]:
    """The names that can be measured, and all parts, those of installed packages last.

    A package that cannot be used is named and left out. Raises ValueError if nothing else was asked for.
    """
    usable, own = list(names), list[Part]()
    for name in dict.fromkeys(name for name in names if name not in MEASURED):
        try:
            own += [measure.part for measure in installed([name], MEASURED)]
        except PluginError as error:
            usable.remove(name)
            if not usable:
                raise
            say(f"left out: {error}")
    return usable, (*PARTS, *own)


def opened(
    model: str,
    text: str | Path | None,
    prompts: int,
    max_tokens: int,
    batch_size: int = Sampling().batch_size,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    say: Say = lambda _: None,
) -> Subject:
    """Read the prompts, open the model and tokenize; the prompts are read first, as a model may take long to load."""
    numbered = _prompts(model, text, prompts, seed)
    say(f"opening {model}")
    stack = Stack(load(model, device=device, dtype=dtype))
    tokens = tokenise(stack, numbered, text, max_tokens)
    return Subject(
        stack=stack,
        prompts=numbered,
        text=None if text is None else str(text),
        tokens=tokens,
        max_tokens=min(max_tokens, stack.n_ctx),
        seed=seed,
        batch_size=batch_size,
        settings={"prompts": prompts, "max_tokens": max_tokens, "text": text and str(text)},
        say=say,
    )


def tokenise(stack: Stack, prompts: Sequence[tuple[int, str]], text: str | Path | None, max_tokens: int) -> Tokens:
    """Tokenize numbered prompts. Raises ``ValueError``, naming its line, for one that cannot be used."""
    longest = min(max_tokens, stack.n_ctx)
    for line, prompt in prompts:
        try:
            stack.tokens([prompt], longest)
        except ValueError as error:
            where = f"{text}, line {line}: " if text else ""
            raise ValueError(where + str(error).replace("prompt 1", "the prompt", 1)) from error
    return stack.tokens([prompt for _, prompt in prompts], longest)


def free_memory(stack: Stack) -> float:
    """Bytes that measures may take: half of what is free where the model is, and no more than ``MOST_MEMORY``."""
    if stack.device.type == "cuda":
        return torch.cuda.mem_get_info(stack.device)[0] / 2
    free = float(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    with contextlib.suppress(OSError, ValueError):  # a container may have less than the machine
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return min(max(free, 0.0) / 2, MOST_MEMORY)


# --- planning --------------------------------------------------------------------------------------------------------


def _seconds(budget: str | None, model: str) -> float:
    return seconds_of(budget or ("none" if model in BUNDLED else BUDGET))


def _plan(
    subject: Subject,
    names: Sequence[str],
    parts: Sequence[Part],
    prompts: int,
    max_length: int | None,
    budget: float,
    began: float,
) -> Plan:
    asked = [part for part in parts if part.question in names]
    refused = {part.name: reason for part in asked if (reason := part.refusal(subject))}
    if refused and len(names) == 1 and len(refused) == len(asked):
        raise ValueError(f"{names[0]} cannot be measured: {next(iter(refused.values()))}")
    free = free_memory(subject.stack)
    machine = Machine.of(subject.stack, subject.tokens)
    plan = plans.choose(
        [part for part in asked if part.name not in refused],
        lambda count, longest: _shape(subject, count, longest, max_length, free, machine.half),
        machine,
        (len(subject.prompts), subject.max_tokens),
        budget=budget,
        memory=math.inf if math.isinf(budget) else free,
        spent=time.monotonic() - began,
        after=PAGE_SECONDS,
        left_out=refused,
    )
    if not plan.parts:
        raise ValueError(
            f"nothing fits into {duration(budget)}: opening the model and drawing the page take "
            f"{duration(plan.seconds)} of it; give more with --budget, or fewer questions"
        )
    return plan


def _shape(subject: Subject, prompts: int, longest: int, max_length: int | None, memory: float, half: float) -> Shape:
    """What costs depend on, for the first ``prompts`` prompts, cut to ``longest`` tokens."""
    stack = subject.stack
    lengths = np.minimum(subject.tokens.mask.sum(1).cpu().numpy()[:prompts], longest)
    shape = Shape.of(
        stack,
        prompts=len(lengths),
        longest=int(lengths.max()),
        tokens=int(lengths.sum()),
        max_length=min(max_length or stack.n_layers, stack.n_layers),
        batch_size=subject.batch_size,
        own=subject.own,
        half=half,
    )
    while shape.graph > memory / 2 and shape.batch_size > 1:
        shape = replace(shape, batch_size=shape.batch_size // 2)
    return shape


def _cut(subject: Subject, plan: Plan) -> Subject:
    """The subject with the prompts and tokens of the plan."""
    prompts = subject.prompts[: plan.prompts]
    return replace(
        subject,
        prompts=prompts,
        tokens=tokenise(subject.stack, prompts, subject.text, plan.max_tokens),
        max_tokens=plan.max_tokens,
        batch_size=plan.batch_size,
        whole_scan=any(part.name == SCAN_PART.name and part.settings["share"] == 1 for part in plan.parts),
        settings={**subject.settings, "prompts": plan.prompts, "max_tokens": plan.max_tokens},
    )


def _agenda(
    folder: Path,
    subject: Subject,
    names: Sequence[str],
    parts: Sequence[Part],
    prompts: int,
    max_length: int | None,
    budget: float,
    began: float,
) -> Agenda:
    """The agenda of this study in the folder, if it was begun there; else a new one."""
    settings = {
        "names": sorted(names),
        "prompts": prompts,
        "max_tokens": subject.max_tokens,
        "max_length": max_length,
        "batch_size": subject.batch_size,
        "budget": None if math.isinf(budget) else budget,
        "seed": subject.seed,
        **({} if subject.probes is None else {"probes": _questions_hash(subject)}),
    }
    of_this = {
        "model": identity.digest(subject.stack),
        "prompts": hashlib.sha256(json.dumps(subject.prompts).encode()).hexdigest(),
        "tokens": tokens_hash(subject.tokens),
        "version": surgery.__version__,
        **settings,
    }
    before = Agenda.read(folder)
    if before is not None and dict(before.identity) == of_this:
        subject.say(
            f"going on with the study in {folder}: {len(before.done)} of {len(before.plan.parts)} parts are done"
        )
        return before
    return Agenda(of_this, _plan(subject, names, parts, prompts, max_length, budget, began), {})


def _questions_hash(subject: Subject) -> str:
    return questions(subject)[0].sha256


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(folder: Path, subject: Subject, agenda: Agenda, every: Sequence[Part], alone: bool) -> None:
    """Measure what is planned and not done, and write the agenda after every part."""
    parts = {part.name: part for part in every}
    names = [part.name for part in agenda.plan.parts]
    with task("study", len(names), subject.progress) as advance:
        for name in names:
            planned = next((part for part in agenda.plan.parts if part.name == name), None)
            is_done = agenda.holds(folder, name)
            if planned is not None and not is_done:
                agenda = _measure_part(folder, subject, agenda, parts[name], planned, alone)
                agenda = _kept_within(folder, subject, agenda, parts)
            advance(note=name, free=is_done)


def _measure_part(folder: Path, subject: Subject, agenda: Agenda, part: Part, planned: Planned, alone: bool) -> Agenda:
    """Measure a part; the agenda says afterwards that it is done, or why it cannot be."""
    subject.say(part.says + (f" (without {planned.cut})" if planned.cut else ""))
    before, start = _state(folder), time.monotonic()
    try:
        part.measure(subject, folder, planned.settings)
    except NotMeasurableError as error:
        if alone:
            raise
        subject.say(f"{part.name}: left out, {error}")
        agenda = agenda.without(part.name, str(error))
    else:
        files = sorted(file for file, state in _state(folder).items() if before.get(file) != state)
        done = Done(agendas.hashes(folder, files), time.monotonic() - start, memory.peak())
        agenda = agenda.with_part(part.name, done)
    agenda.write(folder)
    return agenda


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """The tables and manifests in the folder, with their sizes and times."""
    found = (path for path in folder.iterdir() if path.suffix in (".csv", ".json") and path.name != agendas.FILE)
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in found if path.is_file()}


def _kept_within(folder: Path, subject: Subject, agenda: Agenda, parts: dict[str, Part]) -> Agenda:
    """The agenda with lower levels for what remains, if the parts that are done took too long for the budget."""
    seconds = {name: done.seconds for name, done in agenda.done.items()}
    if math.isinf(agenda.plan.budget) or not agenda.missing:
        return agenda
    max_length = agenda.identity["max_length"]
    plan, count = agenda.plan, len(subject.prompts)
    shape = _shape(subject, count, subject.max_tokens, max_length, plan.memory, plan.machine.half)
    slowed = agenda.plan.slowed(list(parts.values()), shape, seconds)
    if slowed is not agenda.plan:
        agenda = replace(agenda, plan=slowed)
        subject.say(f"the parts so far took longer than planned, so the rest is cut. {slowed}")
        agenda.write(folder)
    return agenda


def _page_of_what_there_is(folder: Path, say: Say) -> None:
    """Write the page of the parts that are done, if there are any; whatever goes wrong now, the interruption counts."""
    agenda = Agenda.read(folder)
    if agenda is None or not agenda.done:
        return
    with contextlib.suppress(ValueError, OSError):
        say("interrupted: writing a page of what there is (interrupt again to leave at once)")
        say(f"the page is {report.build(folder)}; the same command goes on with what is missing")


def _prompts(model: str, text: str | Path | None, count: int, seed: int) -> list[tuple[int, str]]:
    if text is not None:
        return read_prompts(text, count)
    require_prompts(model, None)
    return list(enumerate(bundled.prompts(count, seed), start=1))
