"""What a scan costs, how much of it fits into a budget, and the plan that a scan in a folder goes on with.

A level is a share of a full scan and the precision of the search: the best of all spans are first looked for in rounds
(``surgery.scan.halving``), in bfloat16 where the machine is faster in it, and the last level is the full scan in
float32. Where even a fair share of it does not fit, fewer probes are asked.
"""

import math
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from surgery.corpus.probes import Encoded, ProbeSet
from surgery.models import identity
from surgery.models.stack import Stack
from surgery.planning import plans
from surgery.planning.machine import Machine, Work
from surgery.planning.parts import Level, Part, Shape
from surgery.planning.plans import Plan
from surgery.planning.remembered import planned
from surgery.progress import duration
from surgery.scan import schedule
from surgery.scan.packing import Inputs
from surgery.wiring import families
from surgery.wiring.value import Wiring

FILE = "scan_plan.json"
SHARES = (0.1, 0.15, 0.25, 0.5)  # of a full scan; below that nothing is found
FAIR_SHARE = 0.15
SEARCHED = ("repeat", "skip")  # families whose wirings are spans, with neighbours
TOP = 10
WORTH_HALF = 0.8  # of the time in float32: then the search runs in bfloat16
COUNTS = (8, 12, *plans.PROMPTS)  # probes
PAGE_SECONDS = 10.0  # to draw the figures and write the page


def levels(
    shape: Shape,
    wirings: tuple[Wiring, ...],
    *,
    shares: tuple[float, ...] = (*SHARES, 1),
    precision: str | None = None,
    scored: float | None = None,
    top: int = TOP,
    more: Mapping[str, Any] | None = None,
) -> tuple[Level, ...]:
    """The levels of a scan, the leanest first.

    Args:
        shape: of the model and the probes, both halves together.
        wirings: what would be scanned.
        shares: of the full scan, the smallest first; the last is what was asked for.
        precision: of the search, if it was asked for.
        scored: tokens that are read out, of all probes; all of them if not given.
        top: winners that are measured again.
        more: settings that no level changes.
    """
    faster = "bf16" if shape.half < WORTH_HALF else "float32"
    chosen = [(share, precision or faster) for share in shares]
    if precision is None and chosen[-1] == (1, "bf16"):
        chosen.append((1, "float32"))
    return tuple(
        Level(
            {**(more or {}), "share": share, "precision": numbers},
            work(shape, wirings, share, numbers, scored, top),
            cut(share, shares[-1]) or ("float32 in the search" if precision is None and numbers == "bf16" else ""),
            share >= min(FAIR_SHARE, shares[-1]),
        )
        for share, numbers in chosen
    )


def cut(share: float, asked: float = 1) -> str:
    """What a share of a scan leaves out, in words."""
    whole = "a full scan" if asked == 1 else "the scan that was asked for"
    return "" if share == asked else f"{100 * (1 - share / asked):.0f} % of {whole} (spans are searched in rounds)"


def work(
    shape: Shape,
    wirings: tuple[Wiring, ...],
    share: float,
    precision: str,
    scored: float | None = None,
    top: int = TOP,
) -> Work:
    """The search on one half of the probes, the winners on the other, and what stands beside them."""
    read = shape.readout if scored is None else Work(readouts=scored)
    searched = share / 2 * scanned(shape, wirings, precision, scored)
    confirmed = (top + 12) * (shape.forward + read)  # winners, and the controls of some of them
    beside = 3 * shape.forward + 11 * read  # the unmodified model, and 21 temperatures of its logits
    statistics = Work(products=7e6 * len(wirings) ** 2 if share < 1 else 8000.0 * len(wirings) * shape.prompts)
    return searched + confirmed + beside + statistics + Work(memory=4 * shape.streams + 2**29)


def scanned(shape: Shape, wirings: tuple[Wiring, ...], precision: str = "float32", scored: float | None = None) -> Work:
    """Every wiring on every prompt, layers that they have in common once, and what it reads out."""
    layers = _executions(wirings) * shape.tokens * (shape.half if precision == "bf16" else 1)
    return Work(forward=layers) + len(wirings) * (shape.readout if scored is None else Work(readouts=scored))


@cache
def _executions(wirings: tuple[Wiring, ...]) -> float:
    return schedule.simulate(wirings).executions


@cache
def repeats(n_layers: int, longest: int) -> tuple[Wiring, ...]:
    """Every repeated span of at most ``longest`` layers."""
    return tuple(wiring for wiring in families.every_repeat(n_layers) if wiring.depth <= n_layers + longest)


def plan(
    stack: Stack,
    probe_set: ProbeSet,
    wirings: tuple[Wiring, ...],
    folder: Path,
    *,
    family: str,
    budget: float,
    began: float,
    share: float | None = None,
    precision: str | None = None,
    top: int = TOP,
    asked: Mapping[str, Any],
) -> tuple[Plan, bool]:
    """The plan of a scan within ``budget`` seconds since ``began``, and whether it is one that was begun in the folder.

    ``share`` and ``precision`` are what was asked for, if anything was; ``asked`` is what the scan depends on beside
    these and the model. Cost: that of ``Machine.of``. Raises ValueError if nothing fits.
    """

    def chosen() -> dict[str, Any]:
        encoded = probe_set.encode(stack)
        machine = Machine.of(stack, encoded.tokens)
        full = 1 if share is None else share
        shares = (*(less for less in SHARES if less < full), full) if family in SEARCHED else (full,)
        each = int(encoded.scored.sum()) / len(probe_set)

        def levels_of(shape: Shape) -> tuple[Level, ...]:
            options: dict[str, Any] = {"shares": shares, "precision": precision, "top": top}
            return levels(shape, wirings, scored=each * shape.prompts, **options)

        made = plans.choose(
            [Part("scan", "scan", "", levels_of, lambda *_: None)],
            lambda count, _: _shape(stack, encoded, count, machine.half),
            machine,
            (len(probe_set), int(encoded.tokens.ids.shape[1])),
            budget=budget,
            spent=time.monotonic() - began,
            after=PAGE_SECONDS,
            ladders=(COUNTS, ()),
        )
        if not made.parts:
            raise ValueError(
                f"no scan fits into {duration(budget)}, of which opening the model and drawing the page take "
                f"{duration(made.seconds)}; give more with --budget"
            )
        return made.json()

    key = {
        "model": identity.digest(stack),
        "probes": probe_set.sha256,
        "family": family,
        "budget": None if math.isinf(budget) else budget,
        "share": share,
        "precision": precision,
        "top": top,
        **asked,
    }
    value, again = planned(folder / FILE, key, chosen)
    return Plan.of_json(value), again


def _shape(stack: Stack, encoded: Encoded, count: int, half: float) -> Shape:
    """The shape of ``count`` probes that are like these: what answers to one question share runs once."""
    tokens = Inputs.of(encoded).tokens
    return Shape.of(
        stack,
        prompts=count,
        longest=int(tokens.ids.shape[1]),
        tokens=round(int(tokens.mask.sum()) * count / len(encoded.groups)),
        batch_size=64,
        half=half,
    )
