"""The part of a study that asks whether the stream reverts to a mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.instruments.coordinates import COORDINATES
from surgery.instruments.memory import LIMIT
from surgery.planning.machine import Work
from surgery.planning.parts import Level, Part, Shape, Subject
from surgery.reversion import study

WITHOUT_LOGITS = tuple(name for name in COORDINATES if name != "logits")
LEAN: dict[str, Any] = {"coordinates": ["raw", "normalised"], "followed": 2, "draws": 1, "untrained": False}
FAIR: dict[str, Any] = {"coordinates": list(WITHOUT_LOGITS), "followed": 4, "draws": 2, "untrained": True}
FULL: dict[str, Any] = {
    "coordinates": list(COORDINATES),
    "followed": study.FOLLOWED,
    "draws": study.DRAWS,
    "untrained": True,
}


def _measure(subject: Subject, folder: Path, settings: Mapping[str, Any]) -> None:
    study.measure(
        subject.stack,
        subject.tokens,
        folder,
        subject.fresh if settings["untrained"] else None,
        coordinates=settings["coordinates"],
        followed=settings["followed"],
        draws=settings["draws"],
        seed=subject.seed,
        batch_size=subject.batch_size,
        progress=subject.progress,
        settings={**subject.settings, **settings},
        figures=False,
    )


def _levels(shape: Shape) -> tuple[Level, ...]:
    return (
        Level(LEAN, _work(shape, **LEAN), "the untrained control, most coordinates and most displacements", fair=False),
        Level(FAIR, _work(shape, **FAIR), "coordinates of logits, half of the draws and of the displacements"),
        Level(FULL, _work(shape, **FULL)),
    )


def _work(shape: Shape, coordinates: Sequence[str], followed: int, draws: int, untrained: bool) -> Work:
    """The passes that ``study.cost`` counts, readouts in coordinates of logits, and d_model x d_model statistics."""
    L, d, logits = shape.n_layers, shape.d_model, "logits" in coordinates
    passes = study.cost(L, shape.longest, untrained=untrained, coordinates=coordinates, followed=followed, draws=draws)
    networks = 1 + draws + untrained
    statistics = 40.0 * L * networks * (d**3 + shape.tokens * d**2)
    kept = min(float(LIMIT), 4.0 * shape.padded * d * L * networks)
    held = kept + 24 * (L + 1) * d**2 + 16 * draws * L * d**2 + 4 * shape.streams
    return passes * shape.forward + Work(
        readouts=(1 + untrained) * d * logits,
        products=statistics,
        memory=held + 3 * 4.0 * logits * d * shape.d_vocab,  # the map to logits, centred and turned
    )


REVERSION_PART = Part(
    "reversion",
    "reversion",
    "reversion: layers, several layers, directions, coordinates, and the stream displaced",
    _levels,
    _measure,
)
