"""The questions that surgery asks, in the order of the page: page, study and command line take their names from here.

A new question is a room with a ``Chapter``, and one line here. Nothing is imported before it is used, so that the
command line can list the questions at once.
"""

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.page.chapters import Chapter

CHAPTERS = {
    "series": "surgery.series.chapter:CHAPTER",
    "reversion": "surgery.reversion.chapter:CHAPTER",
    "scan": "surgery.scan.chapter:CHAPTER",
    "anatomy": "surgery.anatomy.chapter:CHAPTER",
    "compile": "surgery.compiler.chapter:CHAPTER",
    "graft": "surgery.graft.chapter:CHAPTER",
    "middle": "surgery.graft.middle_chapter:CHAPTER",
    "dropout": "surgery.dropout.chapter:CHAPTER",
    "calibration": "surgery.series.chapter:CALIBRATION",
    "measures": "surgery.series.chapter:MEASURES",
}
MEASURED: tuple[str, ...] = (
    "series",
    "reversion",
    "scan",
    "anatomy",
)  # by ``surgery study``, which runs the scan first


def chapter(name: str) -> "Chapter":
    """The chapter of that name. Raises KeyError if there is none."""
    return pkgutil.resolve_name(CHAPTERS[name])


def every_chapter() -> list["Chapter"]:
    """All chapters, in the order of the page, those of packages of the user's own last."""
    from surgery.planning import own  # which imports torch

    return [*(chapter(name) for name in CHAPTERS), *own.chapters(MEASURED)]
