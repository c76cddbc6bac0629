"""What of a study fits into a budget of time and memory: how many prompts, how long, and which level of every part.

``choose`` takes the parts in the order of their importance. It looks for the most prompts and tokens at which every
part can be had at a level that is fair, then spends what is left on the levels, part by part. If not even the fewest
prompts allow that, parts are taken at their leanest level, and left out from the end until the rest fits.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from surgery import notebook
from surgery.planning.machine import Machine
from surgery.planning.parts import Level, Part, Shape
from surgery.progress import duration

PROMPTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TOKENS = (32, 48, 64, 96, 128, 192, 256)
SHARE = 0.9  # of the budget is planned for: a shared machine slows down
Levels = Mapping[str, Sequence[Level]]
Fits = Callable[[Levels, Mapping[str, int]], bool]


@dataclass(frozen=True)
class Planned:
    """One part as it will run: its settings, what that is expected to take, and what was cut."""

    name: str
    question: str
    settings: Mapping[str, Any]
    seconds: float
    memory: float
    cut: str = ""


@dataclass(frozen=True)
class Plan:
    """What a study will do.

    Attributes:
        prompts, max_tokens: how many prompts run, cut to how many tokens; ``tokens``: real tokens of all of them.
        asked: prompts and tokens that were asked for.
        batch_size: prompts run at once.
        parts: in the order in which they run.
        left_out: the parts that will not run, and why.
        budget: seconds, infinite for none; ``memory``: bytes to stay within.
        machine: its speed, measured on the model.
        spent: seconds that were gone when the plan was made, of the budget; ``after``: seconds for the page.
    """

    prompts: int
    max_tokens: int
    tokens: int
    asked: tuple[int, int]
    batch_size: int
    parts: tuple[Planned, ...]
    left_out: Mapping[str, str]
    budget: float
    memory: float
    machine: Machine
    spent: float = 0.0
    after: float = 0.0

    @property
    def seconds(self) -> float:
        """How long the study is expected to take, from its beginning to the page."""
        return self.spent + sum(part.seconds for part in self.parts) + self.after

    @property
    def peak(self) -> float:
        """The most bytes that a part needs at once, beside the model."""
        return max((part.memory for part in self.parts), default=0.0)

    @property
    def cuts(self) -> list[str]:
        """What is measured on less, or not at all, in words."""
        cuts = []
        if (self.prompts, self.max_tokens) != self.asked:
            cuts.append(
                f"prompts: {self.prompts} of {self.asked[0]}, cut to {self.max_tokens} of {self.asked[1]} tokens"
            )
        cuts += [f"{part.name}: {part.cut}" for part in self.parts if part.cut]
        return cuts + [f"{name}: left out, {why}" for name, why in self.left_out.items()]

    def __repr__(self) -> str:
        of = "no limit" if math.isinf(self.budget) else f"a budget of {duration(self.budget)}"
        out = f", {len(self.left_out)} left out" if self.left_out else ""
        size = f"{self.prompts} prompts of up to {self.max_tokens} tokens"
        return f"Plan({len(self.parts)} parts{out}, about {duration(self.seconds)} of {of}, {size})"

    def _repr_html_(self) -> str:
        rows = [{"part": part.name, "about": duration(part.seconds), "without": part.cut} for part in self.parts]
        out = [{"part": name, "about": "-", "without": f"left out: {why}"} for name, why in self.left_out.items()]
        return notebook.table(repr(self), [*rows, *out])

    def __str__(self) -> str:
        limit = "no limit of time" if math.isinf(self.budget) else f"a budget of {duration(self.budget)}"
        head = (
            f"Plan for {limit}: {self.prompts} prompts of up to {self.max_tokens} tokens ({self.tokens:,} in all), "
            f"about {duration(self.seconds)} and {self.peak / 2**20:,.0f} MiB beside the model"
        )
        rows = [
            f"  {part.name:<14}{duration(part.seconds):>9}  {part.cut and 'without ' + part.cut}" for part in self.parts
        ]
        rows += [f"  {name:<14}{'-':>9}  left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(row.rstrip() for row in (head, *rows))

    def json(self) -> dict[str, Any]:
        """The plan as JSON values; an infinite budget or memory is None."""
        limits = {"budget": self.budget, "memory": self.memory}
        return asdict(self) | {name: None if math.isinf(limit) else limit for name, limit in limits.items()}

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> "Plan":
        """The plan that ``json`` described."""
        parts = tuple(Planned(**part) for part in value["parts"])
        limits = {name: math.inf if value[name] is None else value[name] for name in ("budget", "memory")}
        machine = Machine(**value["machine"])
        return cls(**{**value, **limits, "parts": parts, "asked": tuple(value["asked"]), "machine": machine})

    def slowed(self, parts: Sequence[Part], shape: Shape, done: Mapping[str, float]) -> "Plan":
        """The same plan with lower levels for the parts that remain, if those ``done`` (seconds) took too long.

        What remains is expected to be as much slower than planned as what is done. Nothing changes while that keeps
        within ``SLACK`` times the budget.
        """
        planned = sum(part.seconds for part in self.parts if part.name in done)
        slower = max(1.0, sum(done.values()) / planned) if planned else 1.0
        remaining = [part for part in self.parts if part.name not in done]
        left = SLACK * self.budget - self.spent - self.after - sum(done.values())
        if slower * sum(part.seconds for part in remaining) <= left:
            return self
        by_name = {part.name: part for part in parts}
        levels = {part.name: _up_to(by_name[part.name].levels(shape), part.settings) for part in remaining}
        fits = partial(_fits, machine=self.machine, time=left / slower, memory=self.memory)
        leanest, left_out = _leanest(levels, fits)
        chosen = _raised(levels, leanest, fits)
        kept = [_planned(by_name[name], levels[name][place], self.machine) for name, place in chosen.items()]
        said = dict.fromkeys(left_out, "the parts before it took longer than planned")
        return replace(
            self,
            parts=(*(part for part in self.parts if part.name in done), *kept),
            left_out={**self.left_out, **said},
        )


SLACK = 1.15  # times the budget, before a part is cut that was planned


def choose(
    parts: Sequence[Part],
    shape_of: Callable[[int, int], Shape],
    machine: Machine,
    asked: tuple[int, int],
    *,
    budget: float = math.inf,
    memory: float = math.inf,
    spent: float = 0.0,
    after: float = 0.0,
    left_out: Mapping[str, str] | None = None,
    ladders: tuple[Sequence[int], Sequence[int]] = (PROMPTS, TOKENS),
) -> Plan:
    """The plan for ``parts``, the most important first.

    Args:
        shape_of: the shape of so many prompts, cut to so many tokens.
        asked: the most prompts and tokens.
        budget, memory: seconds and bytes to stay within; ``spent`` and ``after`` are the seconds before and after.
        left_out: parts that were asked for and cannot be measured, and why.
        ladders: numbers of prompts and of tokens to take instead of those asked for; empty where they cannot be fewer.
    """
    time = math.inf if math.isinf(budget) else max(0.0, SHARE * (budget - spent - after))
    fits = partial(_fits, machine=machine, time=time, memory=memory)
    out, kept = dict(left_out or {}), list(parts)
    while True:
        for prompts, tokens in _sizes(asked, ladders):
            shape = shape_of(prompts, tokens)
            levels = {part.name: part.levels(shape) for part in kept}
            fair = {name: _first_fair(of_part) for name, of_part in levels.items()}
            if fits(levels, fair):
                break
        else:
            fair, dropped = _leanest(levels, fits)
            if dropped:  # try again without them: the others may have more prompts then
                too_large = {name for name in dropped if levels[name][0].work.memory > memory}
                out |= {name: f"there is no {'memory' if name in too_large else 'time'} for it" for name in dropped}
                kept = [part for part in kept if part.name not in dropped]
                continue
        break
    chosen = _raised(levels, fair, fits)
    by_name = {part.name: part for part in parts}
    return Plan(
        prompts=shape.prompts,
        max_tokens=tokens,
        tokens=shape.tokens,
        asked=asked,
        batch_size=shape.batch_size,
        parts=tuple(_planned(by_name[name], levels[name][level], machine) for name, level in chosen.items()),
        left_out=out,
        budget=budget,
        memory=memory,
        machine=machine,
        spent=spent,
        after=after,
    )


def _sizes(asked: tuple[int, int], ladders: tuple[Sequence[int], Sequence[int]]) -> list[tuple[int, int]]:
    """Numbers of prompts and of tokens to try, the most tokens first; of as many tokens the most prompts."""
    prompts, tokens = ([limit, *(step for step in ladder if step < limit)] for limit, ladder in zip(asked, ladders))
    return sorted(itertools.product(prompts, tokens), key=lambda size: (-size[0] * size[1], -size[0]))


def _first_fair(levels: Sequence[Level]) -> int:
    return next((place for place, level in enumerate(levels) if level.fair), len(levels) - 1)


def _fits(levels: Levels, chosen: Mapping[str, int], machine: Machine, time: float, memory: float) -> bool:
    works = [levels[name][place].work for name, place in chosen.items()]
    return sum(map(machine.seconds, works)) <= time and all(work.memory <= memory for work in works)


def _leanest(levels: Levels, fits: Fits) -> tuple[dict[str, int], list[str]]:
    """The leanest level of as many parts as fit, the first ones first, and the names of the others."""
    chosen: dict[str, int] = {}
    for name in levels:
        if fits(levels, chosen | {name: 0}):
            chosen[name] = 0
    return chosen, [name for name in levels if name not in chosen]


def _raised(levels: Levels, chosen: Mapping[str, int], fits: Fits) -> dict[str, int]:
    """Raise one part after the other by a level, in turns, as long as everything fits."""
    chosen, waiting = dict(chosen), list(chosen)
    while waiting:
        for name in list(waiting):
            higher = chosen | {name: chosen[name] + 1}
            if higher[name] < len(levels[name]) and fits(levels, higher):
                chosen = higher
            else:
                waiting.remove(name)
    return chosen


def _up_to(levels: Iterable[Level], settings: Mapping[str, Any]) -> list[Level]:
    """The levels up to the one with these settings."""
    listed = list(levels)
    last = next((place for place, level in enumerate(listed) if dict(level.settings) == dict(settings)), 0)
    return listed[: last + 1]


def _planned(part: Part, level: Level, machine: Machine) -> Planned:
    return Planned(
        part.name, part.question, dict(level.settings), machine.seconds(level.work), level.work.memory, level.cut
    )
