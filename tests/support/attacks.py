"""Attacks: the same hostile thing tried many times, quickly as a test and at full size by ``make harden``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attack:
    """One row of the table in docs/hardening.md.

    Attributes:
        name: what is tried, in words: "Two threads run one model".
        trials: ``trials(count, folder)`` tries it about ``count`` times, in an empty folder of its own. It yields after
            every trial: None where the code held, otherwise what went wrong.
        quick: ``count`` as a test.
        full: ``count`` by ``make harden``.
        before: what failed before it was mended, for example "102 of 300"; empty where it always held.
    """

    name: str
    trials: Callable[[int, Path], Iterator[str | None]]
    quick: int
    full: int
    before: str = ""

    def run(self, count: int, folder: Path) -> "Outcome":
        """Try it; an exception that stops the attack itself counts as a failure."""
        outcomes: list[str | None] = []
        try:
            outcomes.extend(self.trials(count, folder))
        except Exception as error:
            outcomes.append(f"the attack stopped: {type(error).__name__}: {error}")
        return Outcome(len(outcomes), [outcome for outcome in outcomes if outcome is not None])

    def hold(self, folder: Path) -> None:
        """Fail, naming the first failures, unless it was tried and all trials held."""
        outcome = self.run(self.quick, folder)
        assert outcome.tried, "nothing was tried"
        assert not outcome.failures, f"{len(outcome.failures)} of {outcome.tried} failed: {outcome.failures[:3]}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    """How often an attack was tried, and what went wrong."""

    tried: int
    failures: list[str]
