"""The part of a study that scans: which repeated spans help, and does it last?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.corpus import probes
from surgery.planning.parts import Level, Part, Shape, Subject
from surgery.scan import levels, rows
from surgery.scan import study as scan_study
from surgery.scan.levels import TOP


def questions(subject: Subject) -> tuple[probes.ProbeSet, str]:
    """What the scan asks, and its metric: what was named, the bundled model's own problems, or the prompts as text."""
    if subject.probes is not None:
        asked = scan_study.asked(
            subject.stack.name, subject.probes, len(subject.prompts), subject.seed, subject.max_tokens
        )
        return asked, scan_study.metric_of(asked)
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
    wirings = levels.repeats(shape.n_layers, longest or shape.n_layers)
    *searched, full = levels.levels(shape, wirings, more={"max_length": longest})
    return (*(level for level in searched if level.settings["share"] < 1), full)


SCAN_PART = Part("scan", "scan", "scan: repeated spans", _levels, _measure, _refusal, _ready)
