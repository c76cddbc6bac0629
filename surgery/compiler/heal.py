"""Heal a compiled model: train a few numbers of it until the stream behind its groups is the original's again.

    healed = heal.together(model, ":7 {7.attn | 8.attn} {7.mlp | 8.mlp} 9:", tokens)     # norms and scalars
    fused = fuse.together(healed.model, healed.wiring)                                   # as of any other model

Layers side by side no longer read what the others write, so the stream behind them is not quite the original's. What is
trained is in the layers of the groups alone, each as a layer of its own:

* ``norms``: gains and shifts of their norms, and a scalar on what each branch writes;
* ``low rank``: a change of low rank of each of their matrices (LoRA, Hu et al. 2021, arXiv 2106.09685), by PEFT.

The original's activations are stored once (``training.harvest``): what enters the first group, and what leaves the
last. From the one, the wiring learns to give the other, with all that is in between; so each group learns on the stream
that the groups before leave to it. The loss is the squared error of the stream as a share of its size, as later layers
read a stream divided by its size; the divergence of the logits can be added. What was learnt then goes into the weights
of a copy: scalars into what writes, adapters into their matrices. So the healed model is a model of the same class and
size, whose wiring is proven to give what was trained.

LP (Calvo González et al. 2025, arXiv 2502.02790) trains all weights of its pairs. Control: a wiring that changes
nothing (``known_networks.parallel_network``), of which nothing is to be healed.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery.compiler.frontier import Halves, on_fresh
from surgery.compiler.heal_task import Task
from surgery.compiler.ways import WAYS as WAYS
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.rebuild import fuse
from surgery.records.manifest import manifest
from surgery.scan import scanning
from surgery.stats import comparisons, studentised
from surgery.training import loop
from surgery.training.harvest import harvest
from surgery.training.ledger import Counter, Ledger
from surgery.training.loop import Schedule
from surgery.wiring.value import Layer, Wiring

SCHEDULE = Schedule(steps=200, batch=16, learning_rate=3e-3, warmup=20, every=25, patience=8)
COLUMNS: dict[str, str] = {
    "way": "what was trained: none, norms (and a scalar for each branch), or changes of low rank",
    "cost": "loss that the wiring adds to the original's on texts that nothing was trained on (nats per token, or what "
    "the metric counts)",
    "cost_low": "lower end of its 95 % interval over texts, which holds for all ways at once",
    "cost_high": "upper end of its 95 % interval",
    "recovered": "share of the cost without healing that is gone; empty where that cost is not clearly above 0",
    "recovered_low": "lower end of its 95 % interval, bootstrap over texts",
    "recovered_high": "upper end of its 95 % interval",
    "parameters": "numbers that were trained",
    "tokens": "real tokens that were trained on, repetitions counted",
    "operations": "floating-point operations, those of the original's harvest included",
    "passes": "the same, in forward passes of the original over one token",
    "seconds": "wall time of the harvest and of the training",
    "n_prompts": "of how many texts the cost is",
}
CURVE = {
    "healing": "the loss of the training, on the texts that choose the weights that are kept",
    "stream": "its part: squared error of the stream behind the last group, as a share of the stream's size",
    "kl": "its part: KL(original || healed), nats per token; 0 where nothing is read out",
}


@dataclass(frozen=True)
class Healed:
    """A model that was healed for one wiring, and the record of its training (``curve``: ``loop.CURVE`` and ``CURVE``).

    ``parameters`` is how many numbers were trained; the model itself is as large as the original.
    """

    model: TransformerBridge
    wiring: Wiring
    parameters: int
    curve: pd.DataFrame
    ledger: Ledger

    @property
    def operations(self) -> int:
        """Floating-point operations, those of the original's harvest included."""
        return self.ledger.operations(teacher=True)


def together(
    model: "TransformerBridge | Stack",
    wiring: "Wiring | str",
    tokens: "Tokens | Tensor",
    how: str = "norms",
    *,
    rank: int = 8,
    stream: float = 1.0,
    kl: float = 0.0,
    schedule: Schedule = SCHEDULE,
    folder: "str | Path | None" = None,
    progress: bool = False,
) -> Healed:
    """Train ``how`` (of ``WAYS``) so that ``wiring`` gives the stream that the model gives; return a healed copy.

    Args:
        model: the original, which does not change.
        wiring: one that ``fuse.together`` can fuse, or that is taped; layers of its groups are healed.
        tokens: texts to learn from. Measure on others (``measure``); an eighth chooses the weights that are kept.
        rank: of the change of each matrix.
        stream, kl: factors of the two parts of the loss; the second needs the layers behind the groups, and the head.
        schedule: of the training. With ``patience`` the best weights until then are kept, the original's among them.
        folder: where activations and checkpoints stay, so that the same call goes on after a kill.

    Cost: ``stop / L`` F for the harvest; then for each token trained on some 2 F of the layers between the first group
    and the last for norms, and little more for low rank; two copies of the model.

    Raises:
        ValueError: an unknown ``how``; a wiring without groups, or with groups that are no layers side by side; fewer
            texts than a batch; PEFT is not installed; and as ``harvest`` does, for groups from the first layer to the
            last too.
        ModelError: a layer whose branches cannot be scaled.

    >>> import surgery
    >>> model = surgery.load("babel")
    >>> tokens = surgery.Stack(model).tokens(surgery.corpus.bundled.prompts(24))
    >>> few = Schedule(steps=4, batch=8, every=4, warmup=1, patience=1)
    >>> healed = together(model, ":2 {2.attn | 3.attn} {2.mlp | 3.mlp} 4:", tokens, schedule=few)
    >>> healed.parameters, bool(healed.curve["stream"].iloc[-1] < healed.curve["stream"].iloc[0])
    (516, True)
    """
    if how not in WAYS:
        raise ValueError(f"a model is healed by training {' or '.join(WAYS)}, not {how!r}")
    teacher = model if isinstance(model, Stack) else Stack(model)
    whole = teacher.wiring(wiring)
    groups = [group for group in fuse.branches(whole) if len(group) > 1]
    if not groups:
        raise ValueError(f"{whole} has no layers side by side to heal: write groups as {fuse.group([7, 8])}")
    if teacher.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{teacher.name} is in {teacher.dtype}, which training would round away: open it in float32")
    with ExitStack() as opened:
        place = Path(opened.enter_context(TemporaryDirectory()) if folder is None else folder)
        start, stop, middle = changed(whole)
        texts = Tokens.of(tokens)
        pairs = harvest(teacher, texts, start, stop, place / "latents", dtype=torch.float32, progress=progress)
        task = Task(teacher, middle, pairs, (stream, kl), schedule)
        task.open(sorted({layer for group in groups for layer in group}), how, rank)
        settings: dict[str, Any] = {"wiring": str(whole), "how": how, "rank": rank, "factors": [stream, kl]}
        fit = loop.fit(
            task,
            schedule,
            place / how.replace(" ", "_"),
            phase="healing",
            identity=settings | {"latents": dict(pairs.source)},
            spent=pairs.ledger(teacher),
            columns=CURVE,
            manifest=manifest(teacher, texts, seed=schedule.seed, **settings),
            progress=progress,
        )
        healed = task.merged(f"{teacher.name} ({whole}, healed)")
    return Healed(healed, whole, sum(parameter.numel() for parameter in task.others), fit.curve, fit.ledger)


@with_meanings(COLUMNS)
def measure(
    stack: Stack,
    halves: Halves,
    wiring: "Wiring | str",
    folder: "str | Path | None" = None,
    *,
    ways: Sequence[str] = WAYS,
    resamples: int = 2000,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """What healing recovers, and what it takes: ``COLUMNS``, a row without and one for each of ``ways``.

    It learns from those of ``halves.fitted_to`` that are not in ``halves.measured_on``, where it is measured;
    ``options`` are those of ``together``. Cost: that of ``together`` for every way, and of the wiring on all texts once
    more than there are ways.

    Raises ValueError as ``together`` does, for halves without texts to learn from.
    """
    learnt, whole = learnt_from(halves), stack.wiring(wiring)
    _, once = Counter()("forward", partial(stack.run, learnt[:1]))
    per_token = once / int(learnt[:1].mask.sum())
    scores = partial(scanning.run, wirings=[whole], probes=halves.measured_on, metrics=(halves.metric,))
    rows = [scores(stack).assign(wiring="none")]
    baseline = rows[0].set_index("prompt")["baseline"]
    made: list[dict[str, Any]] = [{"wiring": "none", "parameters": 0, "tokens": 0, "operations": 0, "seconds": 0.0}]
    for way in ways:
        healed = together(stack, whole, learnt, way, folder=folder, **options)
        own = scores(Stack(healed.model)).assign(wiring=way)
        rows.append(own.assign(baseline=own["prompt"].map(baseline)))
        spent = healed.ledger.frame()
        trained = int(spent.loc[~spent["teacher"], "tokens"].sum())
        taken = {"tokens": trained, "operations": healed.operations, "seconds": float(spent["seconds"].sum())}
        made.append({"wiring": way, "parameters": healed.parameters} | taken)
    scored = pd.concat(rows, ignore_index=True)
    frame = on_fresh(pd.DataFrame(made), scored, halves.metric).rename(columns={"wiring": "way"})
    costs = -comparisons.differences(scored, halves.metric)[frame["way"]].to_numpy()
    frame[["recovered", "recovered_low", "recovered_high"]] = np.nan
    if frame["cost_low"].iloc[0] > 0:
        shares = frame.index[1:], ["recovered", "recovered_low", "recovered_high"]
        frame.loc[shares] = _recovered(costs, studentised.draws(len(costs), resamples, seed))[1:]
    return frame.assign(passes=frame["operations"] / per_token, n_prompts=len(costs))[list(COLUMNS)]


def learnt_from(halves: Halves) -> Tokens:
    """Those of ``halves.fitted_to`` that nothing is measured on. Raises ValueError if there is none."""
    if halves.fitted_to is None:
        raise ValueError("there is nothing to learn from: give Halves texts as fitted_to")
    measured = set(_prompts(halves.measured_on.tokens))
    fresh = [place for place, prompt in enumerate(_prompts(halves.fitted_to)) if prompt not in measured]
    if not fresh:
        raise ValueError("all texts to learn from are measured on: give Halves others as fitted_to")
    return halves.fitted_to[torch.tensor(fresh)]


def changed(wiring: Wiring) -> tuple[int, int, Wiring]:
    """The layers [start, stop) of the model that a wiring changes, and what it has in their place.

    >>> changed(Wiring.parse(":2 {2.attn | 3.attn} {2.mlp | 3.mlp} 4:", 6))
    (2, 4, Wiring.parse("{*2:4.attn} {*2:4.mlp}", 6))
    """
    steps, n = wiring.steps, wiring.n_layers
    start = next((i for i, step in enumerate(steps) if step != Layer(i)), len(steps))
    rest = steps[start:]
    same = next((i for i, step in enumerate(reversed(rest)) if step != Layer(n - 1 - i)), len(rest))
    return start, n - same, Wiring(n, rest[: len(rest) - same])


def _recovered(
    costs: Float[np.ndarray, "prompt way"], drawn: Float[np.ndarray, "resample prompt"]
) -> Float[np.ndarray, "way end"]:
    """The share of the first way's cost that each way takes away, and the ends of its percentile interval."""
    mean, means = costs.mean(0), drawn @ costs
    ends = np.quantile(1 - means / means[:, :1], [0.025, 0.975], axis=0)
    return np.stack([1 - mean / mean[0], *ends], 1)


def _prompts(tokens: Tokens) -> list[tuple[int, ...]]:
    return [tuple(ids[mask].tolist()) for ids, mask in zip(tokens.ids.cpu(), tokens.mask.cpu(), strict=True)]
