"""Does a walk through the activations that enter a span help to train a fresh one when real data are scarce?

    harvested = walk_study.harvester(stack, data.corpus, (4, 9), folder)
    report = manifold.report(stack, walk.fit(harvested(20_000)), walk_study.SHOWN, data.heldout, 4)
    frame = walk_study.run(stack, harvested, data, folder, amounts=(1000, 10_000), most=120_000)
    walk_study.write(folder, {walk_study.MANIFOLD: report, walk_study.METHODS: frame}, source)

For every amount of real tokens a fresh middle is trained (``surgery.graft``) by each of ``methods``:

    real                  the real pairs alone
    KIND, relabelled      a share of each batch walked (``surgery.graft.walk``), with the original's x_stop for it
    KIND, unrelabelled    the same with x_stop left as it was: noise injection
    longer                the real pairs alone, for as many more steps as the relabelling cost
    more real             as many more real pairs as could have been harvested for what the relabelling cost

The last two are the controls: a walk has to beat what its operations buy otherwise. Methods are compared seed by seed.
Every run has a folder of its own (``place``): after a kill the same call goes on where it was.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from surgery import disk
from surgery.corpus.splits import Split
from surgery.graft import draw, grafting, manifold, study, walk
from surgery.graft.grafting import Objective, Schedule
from surgery.graft.walk import LONGER, MORE, REAL
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.rebuild import layout
from surgery.records import tables
from surgery.training.activations import Latents

METHODS: str = "walk_methods.csv"
MANIFOLD: str = "walk_manifold.csv"
KINDS: dict[str, walk.Kind] = {"stationary": walk.Stationary(0.9), "tangent": walk.Tangent(0.5)}
SHOWN: dict[str, walk.Kind] = {
    "stationary .99": walk.Stationary(0.99),
    "stationary .9": KINDS["stationary"],
    "stationary .5": walk.Stationary(0.5),
    "free .3": walk.Free(0.3),
    "tangent .5": KINDS["tangent"],
    "interpolated": walk.Interpolated(1.0),
}
COLUMNS: dict[str, dict[str, str]] = {
    MANIFOLD: manifold.COLUMNS,
    METHODS: study.COLUMNS[study.METHODS]
    | {
        "real_tokens": "real tokens that the activations were taken from",
        "harvested": "the same, and of more real with what was harvested for the price of the relabelling",
    },
}
Harvested = Callable[[int], Latents]  # the activations of so many real tokens


def harvester(teacher: Stack, corpus: Tokens, span: tuple[int, int], folder: str | Path) -> Harvested:
    """Return a function that harvests activations of at most so many real tokens.

    It takes the first whole prompts of ``corpus``, and raises ValueError for fewer tokens than the first prompt has and
    for more than the corpus has.
    """
    lengths = corpus.mask.sum(1).cumsum(0)

    def harvested(tokens: int) -> Latents:
        count = int((lengths <= tokens).sum())
        if not count or tokens > lengths[-1]:
            raise ValueError(
                f"{tokens} real tokens cannot be harvested: the corpus has {int(lengths[-1])} and its first prompt "
                f"{int(lengths[0])}, give an amount between these"
            )
        return grafting.latents(teacher, corpus[:count], *span, Path(folder) / f"latents_{count}", dtype=torch.float32)

    return harvested


def methods(
    teacher: Stack,
    harvested: Harvested,
    amount: int,
    schedule: Schedule,
    *,
    most: int,
    kinds: Mapping[str, walk.Kind] = KINDS,
    noise: Collection[str] = ("stationary",),
    share: float = 0.5,
    objective: Objective = Objective(),
) -> Iterator[tuple[str, Latents, Schedule]]:
    """Yield name, pairs and schedule of every method for ``amount`` real tokens.

    A ``share`` of the prompts is walked: relabelled by every kind, unrelabelled by those named in ``noise`` too.
    "More real" has at most ``most`` tokens: where that is too few for the price, ``harvested`` in the table says so.
    Cost: a reading of the activations, two training steps, and the span on 64 prompts.

    Raises ValueError for no kind, and as ``walk.fit`` and ``walk.relabelled`` do.
    """
    if not kinds:
        raise ValueError('give at least one kind of walk, such as {"stationary": walk.Stationary(0.9)}')
    real = harvested(amount)
    fitted, copies = walk.fit(real), max(1, -(-schedule.steps * schedule.batch // real.n_prompts))
    options: dict[str, Any] = {"share": share, "copies": copies, "seed": schedule.seed}
    relabelled = {name: walk.relabelled(real, teacher, fitted, kind, **options) for name, kind in kinds.items()}
    harvest = real.ledger(teacher).operations(teacher=True)
    *_, walked = relabelled.values()  # the price is the same for every kind
    price = walked.ledger(teacher, schedule).operations(teacher=True) - harvest
    more = min(most, real.n_tokens + round(price * real.n_tokens / harvest))
    trial = layout.build_stack(teacher, layout.middle(teacher.n_layers, real.start, real.stop), schedule.seed)
    step = study.step_operations(teacher, trial, (real.start, real.stop), real, objective=objective, schedule=schedule)
    yield REAL, real, schedule
    for name, kind in kinds.items():
        yield f"{name}, relabelled", relabelled[name], schedule
        if name in noise:
            yield f"{name}, unrelabelled", walk.unrelabelled(real, fitted, kind, **options), schedule
    yield LONGER, real, replace(schedule, steps=schedule.steps + round(price / step))
    yield MORE, harvested(more), schedule


def place(method: str, amount: int, seed: int) -> str:
    """The name of a run's folder.

    >>> place("tangent, relabelled", 1000, 0)
    'tangent_relabelled_1000_0'
    """
    return f"{method.replace(',', '').replace(' ', '_')}_{amount}_{seed}"


@with_meanings(COLUMNS[METHODS])
def run(
    teacher: Stack,
    harvested: Harvested,
    data: Split,
    folder: str | Path,
    *,
    amounts: Sequence[int],
    most: int,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: Schedule = Schedule(),
    kinds: Mapping[str, walk.Kind] = KINDS,
    share: float = 0.5,
    objective: Objective = Objective(),
    say: Callable[[str], Any] = lambda _: None,
) -> pd.DataFrame:
    """Train by every method: a row per amount of real tokens, method and seed, ``COLUMNS[METHODS]``.

    Training is watched on ``data.stop`` and reported on ``data.heldout``; ``say`` gets a line after each. Cost:
    training ``2 len(kinds) + 3`` middles for each amount and seed, and the original's span for what is relabelled.

    Raises as ``methods`` and ``graft.fit`` do, and ValueError for no amount or no seed.
    """
    if not (len(amounts) and len(seeds)):
        raise ValueError("give at least one amount of real tokens and one seed, such as amounts=(1000,), seeds=(0,)")
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"most": most, "kinds": kinds, "share": share, "objective": objective}
    for seed in seeds:
        for amount in amounts:
            for name, pairs, planned in methods(teacher, harvested, amount, replace(schedule, seed=seed), **options):
                span = pairs.start, pairs.stop
                student = layout.build_stack(teacher, layout.middle(teacher.n_layers, *span), seed)
                trained = grafting.fit(
                    teacher,
                    student,
                    span,
                    pairs,
                    data.stop,
                    Path(folder) / place(name, amount, seed),
                    schedule=planned,
                    objective=objective,
                    answers=data.stop_answers,
                    weigh=data.weigh,
                )
                row = study.row(name, seed, trained, study.judge(teacher, trained, pairs, data))
                rows.append(row | {"real_tokens": float(amount), "harvested": float(pairs.n_tokens)})
                say(
                    f"{amount} tokens, seed {seed}, {name}: {row['damage']:+.3f} nats a token, unexplained "
                    f"{row['unexplained']:.3f}"
                )
    return pd.DataFrame(rows)


def write(folder: Path, frames: Mapping[str, pd.DataFrame], manifest: Mapping[str, Any]) -> None:
    """Write ``METHODS``, ``MANIFOLD`` or both, each with its figure. Raises OSError where they cannot be written."""
    figures = {METHODS: draw.walks, MANIFOLD: draw.walked_activations}
    for name, frame in frames.items():
        tables.write(frame, folder / name, manifest, COLUMNS[name])
        disk.save({(folder / name).with_suffix(".png"): drawing.png(figures[name](frame))})
