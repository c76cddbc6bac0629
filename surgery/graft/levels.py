"""What a fresh middle costs from harvest to judgement, and how much of it fits into a budget of time.

Prompts to harvest, steps, steps of healing and prompts to be judged on are cut together, each to the same share of its
way on a logarithmic scale, so that a middle sees each prompt about as often as it would have.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.graft.grafting import Objective, Schedule
from surgery.models import identity
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.planning import sizes
from surgery.planning.machine import Machine, Work
from surgery.planning.parts import Shape
from surgery.planning.remembered import planned
from surgery.planning.sizes import Choice

FILE = "graft_plan.json"
LEAST = {"prompts": 200, "judged": 32, "steps": 20, "heal": 4}
TRAINED = 1.5  # times a gradient through a layer: that of its weights comes on top of that of its input
MATRICES = 15  # products of a matrix with itself in every step of Muon; in float32 each takes half as long
MOMENTS = 24  # products of d_model^2 a token, in all readings of the activations
OPENED = 15_000.0  # tokens, as many as run through the model in the time that a student takes to be opened and proven
PAGE_SECONDS = 10.0  # to draw the figure and write the page
HEALING = Objective(latent=0.0, kl=1.0)


def plan(
    stack: Stack,
    alike: Tokens,
    judged: int,
    asked: Mapping[str, int],
    folder: Path,
    *,
    budget: float,
    spent: float,
    depth: int,
    span: tuple[int, int],
    d_mlp: int | None,
    d_model: int | None,
    objective: Objective,
    schedule: Schedule,
    parts: str,
    processes: int,
    settings: Mapping[str, Any],
) -> tuple[Choice, bool]:
    """What fits of the numbers ``asked`` (of ``LEAST``), and whether it was chosen when the folder was begun.

    Args:
        alike: prompts like those that it runs on.
        judged: how many there are to be judged on, whatever is asked for.
        budget, spent: seconds for everything, and what of them is gone.
        depth, d_mlp, d_model: of the new middle, in place of the layers of ``span``.
        processes: how many share a step.
        settings: what else the training depends on.

    Cost: that of ``Machine.of``. Raises ValueError if nothing fits.
    """

    def cost(size: dict[str, int]) -> Work:
        options: dict[str, Any] = {
            "depth": depth,
            "d_mlp": d_mlp,
            "d_model": d_model,
            "objective": objective,
            "schedule": schedule,
        }
        size = size | {"judged": min(size["judged"], judged)}
        return work(sizes.shape(stack, alike, 1), size, span, parts=parts, processes=processes, **options)

    def chosen() -> dict[str, Any]:
        rungs = sizes.levels([LEAST, asked], cost, asked)
        return sizes.choose(rungs, Machine.of(stack, alike), budget, spent=spent, after=PAGE_SECONDS).json()

    key = {
        "model": identity.digest(stack),
        "budget": None if math.isinf(budget) else budget,
        "asked": dict(asked),
        **settings,
    }
    value, again = planned(folder / FILE, key, chosen)
    return Choice.of_json(value), again


def work(
    prompt: Shape,
    size: Mapping[str, int],
    span: tuple[int, int],
    *,
    depth: int | None = None,
    d_mlp: int | None = None,
    d_model: int | None = None,
    objective: Objective = Objective(),
    schedule: Schedule = Schedule(),
    parts: str = "junction",
    processes: int = 1,
) -> Work:
    """Harvest, training, healing and what is compared, for ``size`` (names as of ``LEAST``).

    ``prompt`` is the shape of a single prompt; the other arguments are those of ``plan``.
    """
    judged, steps, heal = (size[name] for name in ("judged", "steps", "heal"))
    middle: dict[str, Any] = {"depth": depth, "d_mlp": d_mlp, "d_model": d_model, "processes": processes}
    trained = training(prompt, steps, judged, span, objective=objective, schedule=schedule, **middle)
    healed = training(prompt, heal, judged, span, objective=HEALING, schedule=schedule, parts=parts, **middle)
    return (
        harvest(prompt, size["prompts"], span)
        + trained
        + (1 if heal else 0) * healed
        + 3 * evaluation(prompt, judged)  # what needs no training
    )


def harvest(prompt: Shape, count: int, span: tuple[int, int]) -> Work:
    """The activations of ``count`` prompts, and their moments."""
    return count * (
        span[1] / prompt.n_layers * prompt.forward + Work(products=MOMENTS * prompt.tokens * prompt.d_model**2)
    )


def training(
    prompt: Shape,
    steps: int,
    judged: int,
    span: tuple[int, int],
    *,
    depth: int | None = None,
    d_mlp: int | None = None,
    d_model: int | None = None,
    objective: Objective = Objective(),
    schedule: Schedule = Schedule(),
    parts: str = "middle",
    processes: int = 1,
) -> Work:
    """So many steps of ``grafting.fit`` with their evaluations, a student opened and proven, and one judgement."""
    L, depth = prompt.n_layers, depth or span[1] - span[0]
    width, hidden = d_model or prompt.d_model, d_mlp or prompt.d_mlp
    of_layer = width * (4 * width + 3 * hidden) / (prompt.d_model * (4 * prompt.d_model + 3 * prompt.d_mlp))
    layers = {"middle": depth * of_layer, "junction": depth * of_layer + 1, "all": L}[parts]
    behind = Work(backward=(L - span[1]) * prompt.longest) if parts != "all" else Work()
    read = 4 * prompt.readout + behind
    of_prompt = Work(backward=TRAINED * layers * prompt.longest) + (1 if objective.reads_out else 0) * read
    matrices = Work(products=0.5 * MATRICES * (L if parts == "all" else depth) * (4 * width**3 + 3 * width**2 * hidden))
    seen = 2 + math.ceil(steps / schedule.every)
    return (
        steps * (schedule.batch / processes * of_prompt + matrices)
        + seen * evaluation(prompt, judged)
        + Work(forward=OPENED * L)
    )


def evaluation(prompt: Shape, judged: int) -> Work:
    """Original and student compared on so many prompts."""
    return judged * (2 * prompt.forward + 2 * prompt.readout)
