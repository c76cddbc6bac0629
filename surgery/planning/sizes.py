"""How large the sizes of a study script, or of a training, may be for all of it to fit into a budget of time.

Sizes are whole numbers with names: prompts, steps, seeds. ``STAGES`` names what they are at a few points, from the
leanest to the full ones; ``levels`` goes from one to the next in small steps, in which no size ever falls; ``choose``
takes the largest that fits. So a larger budget never buys less of anything.

>>> stages = [{"prompts": 16, "seeds": 1}, {"prompts": 128, "seeds": 1}, {"prompts": 128, "seeds": 3}]
>>> rungs = levels(stages, lambda size: Work(forward=size["prompts"] * size["seeds"]))
>>> machine = Machine(forward=0.1, backward=0.3, readouts=0.0, products=0.0)
>>> choose(rungs, machine, budget=20).sizes, choose(rungs, machine, budget=30).sizes
({'prompts': 128, 'seeds': 1}, {'prompts': 128, 'seeds': 2})
>>> choose(rungs, machine, budget=5).cuts
['prompts: 42 of 128', 'seeds: 1 of 3']

A script gets ``--budget`` by ``add_option``, and its sizes by ``settle``, which keeps them in ``FILE``.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.corpus import bundled
from surgery.models import identity
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.planning.budget import EXPECTED, seconds_of, told
from surgery.planning.machine import Machine, Work
from surgery.planning.parts import Level, Shape
from surgery.planning.plans import SHARE
from surgery.planning.remembered import planned
from surgery.progress import duration

FILE = "sizes.json"
RUNG = 1.15  # a size grows by this factor from one level to the next, at most
TIMED_ON = 64  # prompts
Sizes = Mapping[str, int]
ShapeOf = Callable[[int], Shape]


@dataclass(frozen=True)
class Choice:
    """The sizes that were chosen.

    Attributes:
        sizes, asked: what they are, and what they would be without a limit of time.
        budget, seconds: how long all may take and is expected to take, from the beginning; infinite for no limit.
        memory: the most bytes at once, beside the model.
    """

    sizes: Sizes
    asked: Sizes
    budget: float
    seconds: float
    memory: float = 0.0

    @property
    def cuts(self) -> list[str]:
        """What is smaller than asked, in words."""
        return [f"{name}: {size} of {self.asked[name]}" for name, size in self.sizes.items() if size < self.asked[name]]

    @property
    def told(self) -> str:
        """A sentence about what was cut; empty if nothing was."""
        return told(self.budget, self.cuts)

    def __str__(self) -> str:
        limit = "no limit of time" if math.isinf(self.budget) else f"a budget of {duration(self.budget)}"
        sizes = ", ".join(
            f"{name} {size}" + f" of {self.asked[name]}" * (size < self.asked[name])
            for name, size in self.sizes.items()
            if self.asked[name]
        )
        held = f" and {self.memory / 2**20:,.0f} MiB beside the model" if self.memory else ""
        return f"Plan for {limit}: {sizes}; about {duration(self.seconds)}{held}"

    def json(self) -> dict[str, Any]:
        """The choice as JSON values; an infinite budget is None."""
        return asdict(self) | {"budget": None if math.isinf(self.budget) else self.budget}

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> "Choice":
        """The choice that ``json`` described."""
        return cls(**{**value, "budget": math.inf if value["budget"] is None else value["budget"]})


def levels(
    stages: Sequence[Sizes], work: Callable[[dict[str, int]], Work], limits: Mapping[str, int] | None = None
) -> tuple[Level, ...]:
    """The levels from the first stage to the last, none of them above ``limits``, which an explicit option sets.

    A size that a stage does not name is as in the stage before. Between two stages all sizes grow together, each by the
    same share of its way on a logarithmic scale.
    """
    limits, whole = limits or {}, [dict(stages[0])]
    for stage in stages[1:]:
        whole.append({**whole[-1], **stage})
    rungs = [_limited(whole[0], limits)]
    for before, after in itertools.pairwise(whole):
        low, high = _limited(before, limits), _limited(after, limits)
        growth = max(math.log(max(high[name], 1) / max(low[name], 1)) for name in high)
        count = max(1, math.ceil(growth / math.log(RUNG)))
        shares = [step / count for step in range(1, count + 1)]
        rungs += [{name: _between(low[name], high[name], share) for name in high} for share in shares]
    distinct = [rung for rung, _ in itertools.groupby(rungs)]
    return tuple(Level(rung, work(dict(rung))) for rung in distinct)


def choose(
    rungs: Sequence[Level],
    machine: Machine,
    budget: float,
    *,
    memory: float = math.inf,
    spent: float = 0.0,
    after: float = 0.0,
) -> Choice:
    """The last of the levels that fits, and all before it, into ``budget`` seconds and ``memory`` bytes.

    ``spent`` and ``after`` are seconds before the work and after it. Raises ValueError if not even the first one fits.
    """
    time_left = math.inf if math.isinf(budget) else SHARE * (budget - spent - after)
    needed = [spent + after + machine.seconds(level.work) for level in rungs]
    fits = [
        seconds - spent - after <= time_left and level.work.memory <= memory
        for seconds, level in zip(needed, rungs, strict=True)
    ]
    if not fits[0]:
        least = ", ".join(f"{name} {size}" for name, size in rungs[0].settings.items())
        what = f"the least ({least}) takes about {duration(needed[0])}"
        if rungs[0].work.memory > memory:
            what += f" and {rungs[0].work.memory / 2**20:,.0f} MiB beside the model, of {memory / 2**20:,.0f}"
        raise ValueError(f"nothing fits into {duration(budget)}: {what}; give more with --budget")
    place = len(list(itertools.takewhile(bool, fits))) - 1
    chosen = rungs[place]
    return Choice(dict(chosen.settings), dict(rungs[-1].settings), budget, needed[place], chosen.work.memory)


# --- scripts ---------------------------------------------------------------------------------------------------------


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--budget`` to the options of a script; the time that it has begins now."""
    parser.add_argument("--budget", type=_budget, help="time to stay within: 90s, 10m, 2h, or none for everything")
    parser.set_defaults(began=time.monotonic())


def settle(
    args: argparse.Namespace,
    stages: Sequence[Sizes],
    work: Callable[[dict[str, int], ShapeOf], Work],
    stack: Stack,
    folder: Path,
    tokens: Tokens | None = None,
    *,
    say: Callable[[str], Any],
    after: float = 0.0,
) -> Choice | None:
    """Choose the sizes of a script for its ``--budget``, put them into ``args`` and say the plan.

    Without a budget nothing happens, and None is returned. A number that ``args`` holds already is what is asked for.
    What was chosen is kept in ``folder``, where the same command goes on with it.

    Args:
        stages: see ``levels``.
        work: what sizes cost; it is given them and a function from a number of prompts to their ``Shape``.
        stack, tokens: the model, and prompts like those that it will run on: by default the bundled ones.
        say: gets the plan.
        after: seconds that no size changes, for figures and the page.

    Cost: that of ``Machine.of``. Raises ValueError if nothing fits.
    """
    if args.budget is None:
        return None
    alike = stack.tokens(bundled.prompts(TIMED_ON)) if tokens is None else tokens[:TIMED_ON]
    named = {name for stage in stages for name in stage}
    given = {name: getattr(args, name, None) for name in sorted(named)}
    limits = {name: size for name, size in given.items() if size is not None and not isinstance(size, bool)}

    def chosen() -> dict[str, Any]:
        asked = [*stages[:-1], {**stages[-1], **limits}]
        rungs = levels(asked, lambda size: work(size, lambda count: shape(stack, alike, count)), limits)
        spent = time.monotonic() - args.began
        return choose(rungs, Machine.of(stack, alike), args.budget, spent=spent, after=after).json()

    options = {name: str(value) for name, value in vars(args).items() if name not in ("began", "out")}
    value, again = planned(folder / FILE, {"options": options, "model": identity.digest(stack)}, chosen)
    choice = Choice.of_json(value)
    vars(args).update(choice.sizes)
    say(f"going on with the plan in {folder / FILE}: {choice}" if again else str(choice))
    return choice


def tell(choice: Choice | None, say: Callable[[str], Any]) -> None:
    """Say at the end what was cut, if anything was."""
    if choice is not None and choice.cuts:
        say(f"\n{choice.told}")


def shape(stack: Stack, tokens: Tokens, count: int, batch_size: int = 64) -> Shape:
    """The shape of ``count`` prompts that are like ``tokens``."""
    lengths = tokens.mask.sum(1)
    return Shape.of(
        stack,
        prompts=count,
        longest=int(lengths.max()),
        tokens=round(count * float(lengths.float().mean())),
        batch_size=batch_size,
    )


def _budget(text: str) -> float:
    try:
        return seconds_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget: {EXPECTED}") from None


def _limited(stage: Sizes, limits: Mapping[str, int]) -> dict[str, int]:
    return {name: min(size, limits.get(name, size)) for name, size in stage.items()}


def _between(low: int, high: int, share: float) -> int:
    """The size at a share of the way from ``low`` to ``high``, on a logarithmic scale (linear from 0)."""
    if low < 1:
        return round(low + share * (high - low))
    return round(low * (high / low) ** share)
