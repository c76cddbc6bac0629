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

LP (Bhaskar et al. 2025, arXiv 2502.02790) trains all weights of its pairs instead. Control: a wiring that changes
nothing (``known_networks.parallel_network``), of which nothing is to be healed.
"""

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformer_lens import TransformerBridge
from transformers.pytorch_utils import Conv1D

from surgery.compiler.frontier import Halves, on_fresh
from surgery.graft.grafting import decode
from surgery.models.engine import Stream
from surgery.models.exactness import probe_ids, require_same
from surgery.models.loading import plain
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.rebuild import fuse, layout
from surgery.rebuild.weights import Weight, by_layer
from surgery.records.manifest import manifest
from surgery.scan import scanning
from surgery.stats import comparisons, studentised
from surgery.training import loop
from surgery.training.activations import Latents, Pairs
from surgery.training.harvest import harvest
from surgery.training.ledger import Counter, Ledger
from surgery.training.loop import Schedule
from surgery.wiring.value import Layer, Parallel, Wiring

WAYS = ("norms", "low rank")
INSTALL = "pip install 'surgery[heal]', or heal norms"
STOP_SHARE = 8  # one text in so many is not trained on: the weights that are kept do best on these
COLUMNS = {
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
    schedule: Schedule = Schedule(steps=200, batch=16, learning_rate=3e-3, warmup=20, every=25, patience=8),
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
        task = _Task(teacher, middle, pairs, (stream, kl), schedule)
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

    It learns from ``halves.fitted_to`` and measures on ``halves.measured_on``; ``options`` are those of ``together``.
    Cost: that of ``together`` for every way, and of measuring the wiring as often.

    Raises ValueError as ``together`` does, for halves without texts to learn from, and for texts that are both learnt
    from and measured on.
    """
    learnt, whole = halves.fitted_to, stack.wiring(wiring)
    if learnt is None:
        raise ValueError("there is nothing to learn from: give Halves texts as fitted_to")
    if shared := set(_prompts(learnt)) & set(_prompts(halves.measured_on.tokens)):
        raise ValueError(f"{len(shared)} texts are learnt from and measured on: give Halves different ones")
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


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Pairs, and the original's logits where they are needed."""

    pairs: Pairs
    logits: Float[Tensor, "prompt pos d_vocab"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pairs.tokens.ids.shape)

    @property
    def n_tokens(self) -> int:
        return int(self.pairs.tokens.mask.sum())


class _Student(nn.Module):
    """A copy of the model, with a scalar on what some branches write: from a batch to the parts of the loss."""

    def __init__(self, stack: Stack, middle: Wiring, stop: int, scaled: Sequence[Layer]) -> None:
        super().__init__()
        self.model = plain(stack.model) or stack.model.original_model
        self.scales = nn.Parameter(torch.ones(len(scaled), dtype=stack.dtype, device=stack.device))
        self.place = {layer: place for place, layer in enumerate(scaled)}
        self._stack, self._middle, self._stop = [stack], middle, stop  # a list hides the bridge from named_parameters

    def stream(self, x: Stream, context: Context) -> Stream:
        """What the wiring makes of the stream that enters it."""

        def scale(layer: Layer, before: Stream, after: Stream) -> Tensor | None:
            place = self.place.get(layer)
            return None if place is None else before + self.scales[place] * (after - before)

        tap = scale if self.place else None
        return self._stack[0].execute(self._middle, x, context, tap, grad=torch.is_grad_enabled())

    def forward(self, batch: _Batch) -> tuple[Float[Tensor, " term"], Float[Tensor, " term"]]:
        stack, pairs = self._stack[0], batch.pairs
        context, counted = stack.context(pairs.tokens), pairs.tokens.mask.to(stack.dtype)
        x = self.stream(pairs.x_start, context)
        error = (x - pairs.x_stop).square().sum(-1) / pairs.x_stop.square().sum(-1).clamp(min=1e-12)
        divergence = torch.zeros_like(error)
        if batch.logits is not None:
            logits = decode(stack, self._stop, x, context, grad=torch.is_grad_enabled())
            log_p, log_q = (log_softmax(scores.float(), -1) for scores in (batch.logits, logits))
            divergence = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).to(error)
        return torch.stack([(error * counted).sum(), (divergence * counted).sum()]), counted.sum().repeat(2)


class _Task:
    """The task that ``loop.fit`` is given: to train what ``open`` opens."""

    watched, divisible = "healing", True

    def __init__(
        self, teacher: Stack, middle: Wiring, pairs: Latents, factors: tuple[float, float], schedule: Schedule
    ) -> None:
        self.teacher, self.middle, self.pairs, self.factors, self.schedule = teacher, middle, pairs, factors, schedule
        self.n_prompts = pairs.n_prompts - max(1, pairs.n_prompts // STOP_SHARE)
        self.stack = layout.build_stack(teacher, self._rows())
        self.layers = by_layer(self.stack.model)
        self.adapters: dict[int, Any] = {}  # of a matrix, by its id
        self.matrices, self.others = list[nn.Parameter](), list[nn.Parameter]()

    def _rows(self) -> list[layout.Row]:
        return [layout.Row(layer) for layer in range(self.teacher.n_layers)]

    def open(self, layers: Sequence[int], how: str, rank: int) -> None:
        """Choose what is trained of ``layers``. Raises ValueError for low rank without PEFT."""
        scaled: list[Layer] = []
        if how == "norms":
            groups = [step for step in self.middle.steps if isinstance(step, Parallel)]
            within = [branch[0] for group in groups for branch in group.branches if isinstance(branch[0], Layer)]
            scaled = [branch for branch in dict.fromkeys(within) if not _normed_behind(self.layers[branch.index])]
        self.student = _Student(self.stack, self.middle, self.pairs.stop, scaled)
        if how == "norms":
            of_layers = [item for layer in layers for item in self.layers[layer].items()]
            self.others = [_parameter(name, weight) for name, weight in of_layers if _of_norm(weight)]
            self.others += [self.student.scales] if scaled else []
        else:
            self.adapters = _adapted(self.stack, layers, rank, self.schedule.seed)
            factors = [(adapter.lora_A, adapter.lora_B) for adapter in self.adapters.values()]
            self.others = [factor["default"].weight for both in factors for factor in both]

    def batch(self, prompts: list[int]) -> _Batch:
        pairs, like = self.pairs.batch(prompts), self.student.scales
        return _Batch(Pairs(pairs.tokens.to(like.device), pairs.x_start.to(like), pairs.x_stop.to(like)))

    def with_teacher(self, batch: _Batch) -> _Batch:
        if not self.factors[1]:
            return batch
        context = self.teacher.context(batch.pairs.tokens)
        return replace(batch, logits=decode(self.teacher, self.pairs.stop, batch.pairs.x_stop, context))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        kept, size = range(self.n_prompts, self.pairs.n_prompts), self.schedule.batch
        batches = [self.batch(list(kept[first : first + size])) for first in range(0, len(kept), size)]
        sums, weights = zip(*(self.student(self.with_teacher(batch)) for batch in batches), strict=True)
        error, divergence = (sum(sums) / sum(weights)).tolist()
        return {
            "healing": self.factors[0] * error + self.factors[1] * divergence,
            "stream": error,
            "kl": divergence,
        }

    @torch.no_grad()
    def merged(self, name: str) -> TransformerBridge:
        """A model with all that was trained in its weights; raises ModelError unless its wiring gives the same."""
        path = layout.layers_path(self.stack.model)
        placed = {
            f"{path}.{number}.{key}": self._trained(number, key, weight)
            for number, layer in enumerate(self.layers)
            for key, weight in layer.items()
        }
        healed = layout.shaped(self.teacher.model, self._rows(), weights=placed)
        healed.cfg.model_name = name
        stack, context = Stack(healed), self.stack.context(probe_ids(self.stack))
        x = self.teacher.execute(f":{self.pairs.start}", context.x0, context) if self.pairs.start else context.x0
        require_same(stack.execute(self.middle, x, context), self.student.stream(x, context), stack, "the healed model")
        return healed

    def _trained(self, number: int, name: str, weight: Weight) -> Tensor:
        tensor = weight.tensor
        if weight.role == "buffer":
            return tensor
        if (adapter := self.adapters.get(id(_parameter(name, weight)))) is not None:
            tensor = tensor + adapter.get_delta_weight("default")
        if weight.role == "writes":
            for layer, place in self.student.place.items():
                if layer.index == number and layer.part in (None, weight.part):
                    tensor = tensor * self.student.scales[place]
        return tensor


def _parameter(name: str, weight: Weight) -> nn.Parameter:
    return weight.owner.get_parameter(name.rpartition(".")[2])


def _of_norm(weight: Weight) -> bool:
    return weight.role != "buffer" and all(own.ndim == 1 for own in weight.owner.parameters())


def _normed_behind(layer: dict[str, Weight]) -> bool:
    """Whether what a layer writes is normed: then the gain of that norm is its scalar, and no other has an effect."""
    read = {id(weight.before) for weight in layer.values()}
    return any(weight.role == "scale" and id(weight.owner) not in read for weight in layer.values())


def _adapted(stack: Stack, layers: Sequence[int], rank: int, seed: int) -> dict[int, Any]:
    """Put an adapter on every matrix of some layers; each by the id of the matrix."""
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(f"healing by low rank needs PEFT, which is not installed ({error}): {INSTALL}") from error
    twin, adapters = plain(stack.model), dict[int, Any]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in layers:
            block = stack.model.blocks[layer]
            module = block if twin is None else twin.get_submodule(block.name)
            targets = {name: part for name, part in module.named_modules() if type(part) in (nn.Linear, Conv1D)}
            transposed = any(isinstance(part, Conv1D) for part in targets.values())
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), fan_in_fan_out=transposed)
            peft.inject_adapter_in_model(config, module)
            adapters |= {id(target.weight): module.get_submodule(name) for name, target in targets.items()}
    return adapters
