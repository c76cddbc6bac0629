"""Where things lie: the repository, its tests, and what may lie beside it."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
SHARED = REPOSITORY.parent / "shared"
