"""Train a part of a model: exactly resumable, on one process or several (accelerate), with a ledger of its cost.

A batch is a function of (seed, step) alone and dropout stays off, so a checkpoint has no random state to remember:
training that was interrupted and resumed ends with the same weights. With several processes each takes its share of the
same batch and every sum is divided by the weight of the whole batch, so their number changes rounding only.

Matrices are trained with Muon (Jordan 2024; ``surgery.training.muon``), everything else with AdamW.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from surgery import disk, memory
from surgery.models.identity import differences, of_module
from surgery.models.scopes import scope
from surgery.models.weights_hash import tensors_sha256
from surgery.progress import task as progress_task
from surgery.records import checked, tables
from surgery.training.ledger import Counter, Ledger
from surgery.training.muon import Muon, of_precision
from surgery.training.precisions import MIXED

if TYPE_CHECKING:
    from accelerate import Accelerator

CURVE = {
    "step": "training steps made",
    "tokens": "real tokens that the student was trained on until then, in all phases, repetitions counted",
    "operations": "floating-point operations of the student's training until then: forward, backward, optimiser",
    "operations_with_teacher": "the same and all that the teacher spent, harvest of activations included",
    "seconds": "wall time of training until then, evaluations on held-out data not counted",
    "loss": "training loss, mean of the steps since the row before",
    "learning_rate": "of the last step",
}


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on what batches to train; all of it belongs to a run's identity."""

    steps: int = 1000
    batch: int = 64  # prompts a step, of all processes together
    learning_rate: float = 2e-3
    warmup: int = 50  # steps
    final_share: float = 0.02  # the cosine ends at this share of the learning rate
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient
    every: int = 100  # steps between evaluations on prompts that nothing is reported on, each with a checkpoint
    patience: int | None = None  # stop after so many evaluations without a better one, and go back to the best
    precision: str = "no"  # no, bf16 or fp16: what accelerate calls mixed precision
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every", "learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is a number of evaluations, 1 or more, got {self.patience}")
        if self.precision not in MIXED:
            raise ValueError(f"precision is no, bf16 or fp16, got {self.precision!r}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine."""
        return rate(step, self.steps, self.learning_rate, self.warmup, self.final_share)

    def prompts(self, step: int, count: int) -> Int[np.ndarray, " batch"]:
        """Which of ``count`` prompts a step takes: in every epoch each of them once, in an order of its own."""
        places = range(step * self.batch, (step + 1) * self.batch)
        epochs = {i // count for i in places}
        orders = {epoch: np.random.default_rng((self.seed, epoch)).permutation(count) for epoch in epochs}
        return np.array([orders[i // count][i % count] for i in places])


@runtime_checkable
class Task(Protocol):
    """What to train, and on what. ``student(batch)`` gives sums and weights, one each for every term of the loss."""

    matrices: list[nn.Parameter]  # trained with Muon
    others: list[nn.Parameter]  # trained with AdamW
    watched: str  # the number of ``evaluate`` that early stopping wants smaller

    @property
    def student(self) -> nn.Module: ...

    @property
    def factors(self) -> tuple[float, ...]:
        """Factors of the terms: the loss is the sum of factor * sum / weight."""

    @property
    def n_prompts(self) -> int: ...

    @property
    def divisible(self) -> bool:
        """Whether a batch may be run in parts, as nothing is drawn for the whole of it."""

    def batch(self, prompts: list[int]) -> Any:
        """A batch; has ``shape`` (what its cost depends on) and ``n_tokens``."""

    def with_teacher(self, batch: Any) -> Any:
        """The batch with whatever a teacher adds to it."""

    def evaluate(self) -> dict[str, float]:
        """Numbers by name, on prompts to stop by: not those to train on, nor those that results are reported on."""


@dataclass(frozen=True)
class Fit:
    """A finished training: its curve (``CURVE`` and the numbers of ``Task.evaluate``) and its ledger."""

    curve: pd.DataFrame
    ledger: Ledger
    stopped_early: bool


def accelerator_for(device: torch.device, precision: str = "no") -> "Accelerator":
    """The running processes as accelerate sees them: one, or those of ``accelerate launch`` or torchrun."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # another precision than in an earlier training of this process is no mistake  # noqa: SLF001
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=7))  # for the main process, which harvests alone
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[waiting])


def fit(
    task: Task,
    schedule: Schedule,
    folder: Path,
    *,
    phase: str = "training",
    identity: Mapping[str, Any] | None = None,
    spent: Ledger | None = None,
    accelerator: "Accelerator | None" = None,
    columns: Mapping[str, str] | None = None,
    manifest: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Fit:
    """Train, with an evaluation, a checkpoint and a row in ``curve.csv`` every ``schedule.every`` steps.

    Called again with the same arguments it goes on from ``checkpoint.safetensors`` and ends with the same weights; once
    it is finished, it only returns its result again. ``identity`` is what tells this run from others beside its
    schedule; ``spent`` is what was spent before it began (the teacher's harvest).

    Where the memory is too small for a batch, its gradients are added up over halves of it, or quarters, and so on, and
    a warning says so; the weights are then the same up to rounding, and a step takes one more forward pass. Of several
    processes none does so, nor does a task that is not ``divisible``.

    Raises:
        ValueError: fewer prompts than a batch, a batch that does not divide among the processes, a checkpoint of
            another run in the folder, a loss that is not finite (the last good checkpoint stays, and the message says
            of which step), or frozen parameters that changed.
        OSError: the folder cannot be written, or the disk is full; what was written before is whole.
    """
    accelerator = accelerator or accelerator_for(next(task.student.parameters()).device, schedule.precision)
    world, rank = accelerator.num_processes, accelerator.process_index
    if task.n_prompts < schedule.batch:
        raise ValueError(
            f"a batch of {schedule.batch} prompts needs as many, there are {task.n_prompts}: "
            "give more prompts or a smaller batch"
        )
    if schedule.batch % world:
        raise ValueError(f"a batch of {schedule.batch} prompts does not divide among {world} processes")
    run = {"schedule": asdict(schedule), "phase": phase, "student": of_module(task.student), **(identity or {})}
    state = _State(task, run, folder / "checkpoint.safetensors", (spent or Ledger()) + Ledger())
    main = accelerator.is_main_process
    with disk.held(folder, main=main), ExitStack() as restoring, state.proved_frozen():
        restoring.enter_context(only_trained(task))
        plain = optimizers(task.matrices, task.others, schedule.weight_decay, of_precision(schedule.precision))
        state.load(plain, accelerator.scaler)
        student, *prepared = accelerator.prepare(task.student, *plain)
        counter, since_last = Counter(), Ledger()
        losses: list[float] = []

        def evaluate() -> None:
            """Add a row, write a checkpoint, and let all processes know what the main process found."""
            state.collect(since_last, accelerator)
            since_last.entries.clear()
            if accelerator.is_main_process:
                try:
                    numbers = task.evaluate()
                except ValueError as error:
                    if not state.rows:  # nothing was trained yet, so it is not the training's fault
                        raise
                    raise ValueError(
                        f"the evaluation at step {state.step} failed, {error}. {state.advice(schedule)}"
                    ) from error
                state.add_row(schedule, losses, numbers, task.watched)
                state.save(plain, accelerator.scaler)
                tables.write(
                    pd.DataFrame(state.rows),
                    folder / "curve.csv",
                    {**(manifest or {}), "run": run},
                    CURVE | dict(columns or {}),
                )
            losses.clear()
            state.share(accelerator)

        def gradients(mine: list[int], at_once: int) -> _Step:
            """Add up the gradients of a step, so many prompts at once."""
            for optimizer in prepared:
                optimizer.zero_grad(set_to_none=True)
            parts = [mine[first : first + at_once] for first in range(0, len(mine), at_once)]
            step = _Step(at_once)

            def run(part: list[int]) -> tuple[Any, Tensor, Tensor]:
                batch = task.batch(part)
                batch, by_teacher = counter(("teacher", batch.shape), partial(task.with_teacher, batch))
                (sums, weights), forward = counter(("forward", batch.shape), partial(student, batch))
                step.by_teacher += by_teacher
                step.operations += forward
                return batch, sums, weights

            def totals(sums: Tensor, weights: Tensor) -> Tensor:
                return torch.stack([sums.detach(), weights]).double()

            if len(parts) > 1:  # the weights of the whole are needed before the first part goes backward
                with torch.no_grad():
                    whole = torch.stack([totals(*run(part)[1:]) for part in parts]).sum(0)
            else:
                only = run(parts[0])
                whole = accelerator.reduce(totals(*only[1:]), "sum")
            factors = torch.tensor(task.factors, device=whole.device)
            step.loss = float((factors * whole[0] / whole[1]).sum())
            if not np.isfinite(step.loss):
                raise ValueError(
                    f"the loss is {step.loss} at step {state.step}: nothing of that step was kept. "
                    f"{state.advice(schedule)}"
                )
            for part in parts:
                batch, sums, _ = run(part) if len(parts) > 1 else only
                local = (factors * sums * world / whole[1].to(sums.dtype)).sum()
                _, backward = counter(("backward", batch.shape), partial(accelerator.backward, local))
                step.operations += backward
                step.n_tokens += batch.n_tokens
            return step

        at_once = schedule.batch
        with progress_task(phase, schedule.steps, progress and accelerator.is_main_process) as advance:
            advance(state.step, free=True)
            if not state.rows:
                evaluate()
            while state.step < schedule.steps and not state.patience_lost(schedule):
                began = time.perf_counter()
                mine = schedule.prompts(state.step, task.n_prompts)[rank::world].tolist()
                if world == 1 and task.divisible:
                    step = memory.halving(at_once, partial(gradients, mine))
                    at_once = step.at_once
                else:  # the other processes would wait for one that begins a step again
                    step = gradients(mine, len(mine))
                accelerator.clip_grad_norm_(task.matrices + task.others, schedule.clip)
                for group in (group for optimizer in prepared for group in optimizer.param_groups):
                    group["lr"] = schedule.rate(state.step)
                _, updated = counter("optimiser", lambda: [optimizer.step() for optimizer in prepared])
                for optimizer in prepared:
                    optimizer.zero_grad(set_to_none=True)
                operations = step.operations + (updated if accelerator.is_main_process else 0)
                seconds = (time.perf_counter() - began) if accelerator.is_main_process else 0.0
                since_last.add(phase, step.n_tokens, operations, seconds)
                if step.by_teacher:
                    since_last.add(f"{phase}: teacher", step.n_tokens, step.by_teacher, 0.0, teacher=True)
                losses.append(step.loss)
                state.step += 1
                advance(note=f"loss {step.loss:.4f}")
                if state.step % schedule.every == 0 or state.step == schedule.steps:
                    evaluate()
        early = state.patience_lost(schedule)
        if schedule.patience is not None:
            state.restore_best()
        accelerator.wait_for_everyone()
    return Fit(pd.DataFrame(state.rows), state.ledger, early)


@dataclass
class _Step:
    """What a step took: how many prompts at once, and the loss, tokens and operations of all."""

    at_once: int
    loss: float = 0.0
    n_tokens: int = 0
    operations: int = 0
    by_teacher: int = 0


class _State:
    """Everything that the rest of a run depends on, in one safetensors file that replaces the last one in one move."""

    def __init__(self, task: Task, run: dict[str, Any], path: Path, ledger: Ledger) -> None:
        self.run, self.path, self.ledger = json.loads(json.dumps(run)), path, ledger
        self.trained = {n: p for n, p in task.student.named_parameters() if _among(p, task.matrices + task.others)}
        self.frozen = {n: p for n, p in task.student.named_parameters() if n not in self.trained}
        self.step, self.waited, self.rows = 0, 0, list[dict[str, Any]]()
        self.best_value, self.best_weights = float("inf"), dict[str, Tensor]()

    def load(self, optimizers: list[torch.optim.Optimizer], scaler: Any) -> None:
        """Go on from the checkpoint, if there is one. Raises ValueError for one that is damaged or of another run."""
        if not self.path.exists():
            return
        tensors, metadata = checked.unpack(self.path)
        if others := differences(metadata["run"], self.run):
            raise ValueError(
                f"{self.path} belongs to another run, with {', '.join(others)}: choose another folder, or remove it to "
                "begin again"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"model/{name}"])
        restore(optimizers, tensors)
        self.best_weights = {name: tensors[f"best/{name}"] for name in self.trained if f"best/{name}" in tensors}
        self.step, self.waited, self.rows = (metadata[key] for key in ("step", "waited", "rows"))
        self.best_value = float("inf") if metadata["best"] is None else metadata["best"]
        self.ledger = Ledger.of(pd.DataFrame(metadata["ledger"]))
        if scaler is not None:
            scaler.load_state_dict(metadata["scaler"])

    def save(self, optimizers: list[torch.optim.Optimizer], scaler: Any) -> None:
        """Write the checkpoint."""
        tensors = {f"model/{name}": parameter.detach() for name, parameter in self.trained.items()} | states(optimizers)
        tensors |= {f"best/{name}": tensor for name, tensor in self.best_weights.items()}
        metadata = {
            "run": self.run,
            "step": self.step,
            "waited": self.waited,
            "rows": self.rows,
            "best": self.best_value if np.isfinite(self.best_value) else None,
            "ledger": self.ledger.frame().to_dict("records"),
            "scaler": None if scaler is None else scaler.state_dict(),  # of gradients, with precision fp16
        }
        disk.save({self.path: checked.pack(tensors, metadata)})

    def collect(self, since_last: Ledger, accelerator: "Accelerator") -> None:
        """Add what all processes spent since the last time."""
        for (phase, teacher), entry in since_last.entries.items():
            spent = torch.tensor([entry.tokens, entry.operations, entry.seconds], dtype=torch.float64)
            tokens, operations, seconds = accelerator.reduce(spent.to(accelerator.device), "sum").tolist()
            self.ledger.add(phase, int(tokens), int(operations), seconds, teacher=teacher)

    def add_row(self, schedule: Schedule, losses: list[float], numbers: dict[str, float], watched: str) -> None:
        """Add a row to the curve, and remember the weights if they are the best until now."""
        own = [entry for (_, teacher), entry in self.ledger.entries.items() if not teacher]
        spent = {name: sum(getattr(entry, name) for entry in own) for name in ("tokens", "operations", "seconds")}
        self.rows.append(
            {
                "step": self.step,
                "tokens": int(spent["tokens"]),
                "operations": float(spent["operations"]),
                "operations_with_teacher": float(self.ledger.operations(teacher=True)),
                "seconds": float(spent["seconds"]),
                "loss": float(np.mean(losses)) if losses else float("nan"),
                "learning_rate": schedule.rate(max(0, self.step - 1)),
                **numbers,
            }
        )
        if numbers[watched] < self.best_value:
            self.best_value, self.waited = numbers[watched], 0
            if schedule.patience is not None:
                self.best_weights = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        else:
            self.waited += 1

    def advice(self, schedule: Schedule) -> str:
        """What is left of a training that diverged, and what to try instead."""
        return (
            f"The checkpoint of step {self.rows[-1]['step']} is whole ({self.path}); try a smaller learning rate than "
            f"{schedule.learning_rate:g}, a longer warm-up, or precision no"
        )

    def share(self, accelerator: "Accelerator") -> None:
        """Give all processes what the main process decided."""
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            mine = [self.rows, self.waited, self.best_value, self.best_weights, self.ledger]
            self.rows, self.waited, self.best_value, self.best_weights, self.ledger = broadcast_object_list(mine)

    def patience_lost(self, schedule: Schedule) -> bool:
        """Whether to stop early."""
        return schedule.patience is not None and self.waited >= schedule.patience

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the weights of the best evaluation."""
        for name, tensor in self.best_weights.items():
            self.trained[name].copy_(tensor)

    @contextmanager
    def proved_frozen(self) -> Iterator[None]:
        """Context manager: prove that the frozen weights are the same bit for bit afterwards."""
        before = tensors_sha256(self.frozen)
        yield
        if tensors_sha256(self.frozen) != before:
            raise ValueError("weights that were to stay frozen have changed: do not use what was trained")


@contextmanager
def only_trained(task: Task) -> Iterator[None]:
    """Context manager: gradients for what is trained and for nothing else; the flags are put back afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in task.student.parameters()}

    def put_back() -> None:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None

    with scope() as opened:
        opened.undoing(put_back)
        for parameter in flags:
            parameter.requires_grad_(_among(parameter, task.matrices + task.others))
        yield


def rate(step: int, steps: int, learning_rate: float, warmup: int, final_share: float) -> float:
    """Learning rate of a step: linear warm-up, then a cosine that ends at ``final_share`` of the largest."""
    cosine = 0.5 * (1 + np.cos(np.pi * step / steps))
    decayed = final_share + (1 - final_share) * cosine
    return float(learning_rate * min(1, (step + 1) / max(1, warmup)) * decayed)


def optimizers(
    matrices: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
    weight_decay: float,
    muon: type[torch.optim.Muon] = Muon,
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and AdamW without decay for the others, each only if there are any."""
    chosen: list[torch.optim.Optimizer] = []
    if matrices:
        chosen.append(muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        chosen.append(torch.optim.AdamW(others, weight_decay=0.0))
    return chosen


def states(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of optimisers for a checkpoint, as tensors by name."""
    return {
        f"optimizer/{i}/{j}/{name}": torch.as_tensor(value)
        for i, optimizer in enumerate(optimizers)
        for j, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put the state of optimisers back, as ``states`` gave it; other tensors are ignored."""
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, *place = name.split("/")
            if kind == "optimizer" and place[0] == str(i):
                state.setdefault(int(place[1]), {})[place[2]] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _among(parameter: nn.Parameter, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether it is one of them: ``in`` would compare values."""
    return any(parameter is other for other in parameters)
