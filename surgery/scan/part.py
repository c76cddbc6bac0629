"""The part of a study that scans: which repeated spans help, and does it last?"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from surgery.corpus import probes
from surgery.planning.machine import Work
from surgery.planning.parts import Level, Part, Shape, Subject
from surgery.scan import rows, schedule
from surgery.scan import study as scan_study
from surgery.wiring.families import every_repeat

SHARES = (0.1, 0.15, 0.25, 0.5)  # of a full scan; below that nothing is found
FAIR_SHARE = 0.15
TOP = 10
WORTH_HALF = 0.8  # of the time in float32: then the search runs in bfloat16


def questions(subject: Subject) -> tuple[probes.ProbeSet, str]:
    """The questions and the metric of the scan: the bundled model's own problems, or the prompts as text."""
    if subject.own:
        return probes.named("babel", len(subject.prompts), subject.seed), "loglik"
    return probes.text([prompt for _, prompt in subject.prompts], max_tokens=subject.max_tokens), "loss"


def _measure(subject: Subject, folder: Path, settings: Mapping[str, Any]) -> None:
    probe_set, metric = questions(subject)
    scan_study.measure(
        subject.stack,
        probe_set,
        folder,
        metric=metric,
        longest=settings["max_length"],
        share=settings["share"],
        precision=settings["precision"],
        top=TOP,
        seed=subject.seed,
        batch_size=subject.batch_size,
        cluster=subject.cluster,
        say=subject.say,
        progress=subject.progress,
    )


def _ready(subject: Subject, folder: Path) -> None:
    """Raise ValueError if the folder holds a scan of something else."""
    path = folder / scan_study.SEARCH
    if path.exists() or path.with_name(f"{path.name}.part").exists():
        probe_set, metric = questions(subject)
        search = probe_set.split(subject.seed)[0].encode(subject.stack)
        with rows.ResumableTable(path, rows.identity(subject.stack, search, (metric,))):
            pass


def _refusal(subject: Subject) -> str | None:
    if len(set(questions(subject)[0].probes)) < scan_study.FEWEST:
        return f"it needs at least {scan_study.FEWEST} different prompts"
    return None


def _levels(shape: Shape) -> tuple[Level, ...]:
    longest = None if shape.max_length >= shape.n_layers else shape.max_length
    precision = "bf16" if shape.half < WORTH_HALF else "float32"

    def level(share: float, precision: str) -> Level:
        settings = {"share": share, "max_length": longest, "precision": precision}
        return Level(settings, _work(shape, longest, share, precision), _cut(share), share >= FAIR_SHARE)

    return (*(level(share, precision) for share in SHARES), level(1, "float32"))


def _cut(share: float) -> str:
    return "" if share == 1 else f"{100 * (1 - share):.0f} % of a full scan (spans are searched in rounds)"


def _work(shape: Shape, max_length: int | None, share: float, precision: str) -> Work:
    """The search on one half of the probes, the winners on the other, and what stands beside them."""
    L = shape.n_layers
    executions, wirings = _executions(L, max_length or L)
    layers = share * executions * shape.tokens / 2 * (shape.half if precision == "bf16" else 1)
    searched = Work(forward=layers) + share * wirings / 2 * shape.readout
    confirmed = (TOP + 12) * (shape.forward + shape.readout)  # winners, and the controls of some of them
    beside = 3 * shape.forward + 11 * shape.readout  # the unmodified model, and 21 temperatures of its logits
    statistics = Work(products=7e6 * wirings**2 if share < 1 else 8000.0 * wirings * shape.prompts)
    return searched + confirmed + beside + statistics + Work(memory=4 * shape.streams + 2**29)


@cache
def _executions(n_layers: int, longest: int) -> tuple[float, int]:
    """Layers that a full scan of repeated spans runs, and how many wirings it has."""
    wirings = [wiring for wiring in every_repeat(n_layers) if wiring.depth <= n_layers + longest]
    return schedule.simulate(wirings).executions, len(wirings)


SCAN_PART = Part("scan", "scan", "scan: repeated spans", _levels, _measure, _refusal, _ready)
