"""What does one training step of a fresh middle cost beside one of the whole model? Measured, and as counted.

    python benchmarks/graft.py

Layers 4 to 8 of the bundled model, the same batch, optimisers and clipping for all; rounds interleaved, time of the
processor, medians with quartiles of the ratio to the whole model's step on cross entropy. The middle reads its
activations from the disk within its step. ``counted`` is that ratio in floating-point operations
(``surgery.training.ledger.Counter``), ``without`` the same without the optimisers, whose operations (GFLOP) do not
depend on the batch. What the teacher spends in a step is in both; what it spends beforehand is the last row, once for
every prompt.
"""

import tempfile
from contextlib import ExitStack

import numpy as np
import pandas as pd
import timing
import torch

import surgery
from surgery import graft, models, training
from surgery.corpus import splits
from surgery.graft.grafting import Objective, Schedule
from surgery.models.stack import Stack
from surgery.rebuild import layout
from surgery.training.activations import Latents
from surgery.training.ledger import Counter

SPAN = (4, 9)
SCRATCH = "whole, cross entropy"
STEPS = {  # name: what is trained, on what
    SCRATCH: ("all", Objective(latent=0, cross_entropy=1)),
    "whole, distilled": ("all", Objective(latent=0, kl=1)),
    "middle": ("middle", Objective()),
    "middle + kl": ("middle", Objective(kl=0.3)),
}


class Step:
    """One step of training, and what it is counted to cost."""

    def __init__(self, teacher: Stack, pairs: Latents, data: splits.Split, name: str) -> None:
        parts, objective = STEPS[name]
        fresh = (
            models.untrained(teacher.model)
            if parts == "all"
            else layout.build(teacher.model, layout.middle(teacher.n_layers, *SPAN))
        )
        self.task = graft.Task(
            teacher, Stack(fresh), SPAN, parts, pairs, data.heldout, objective, data.weigh, None, "cross_entropy"
        )
        self.optimizers = training.optimizers(self.task.matrices, self.task.others, Schedule().weight_decay)
        self.read = parts == "middle"  # the whole model needs tokens alone: its batch is not timed

    def __call__(self, batch: object, counter: Counter | None = None) -> dict[str, int]:
        """Operations of its parts, if a counter is given."""
        count = counter or (lambda key, call: (call(), 0))
        batch, taught = count("teacher", lambda: self.task.with_teacher(batch))
        (sums, weights), forward = count("forward", lambda: self.task.student(batch))
        loss = (torch.tensor(self.task.factors) * sums / weights).sum()
        _, backward = count("backward", loss.backward)
        trained = self.task.matrices + self.task.others
        torch.nn.utils.clip_grad_norm_(trained, Schedule().clip)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = 1e-4
        _, updated = count("optimisers", lambda: [optimizer.step() for optimizer in self.optimizers])
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return {"model": taught + forward + backward, "optimisers": updated}

    def timed(self, prompts: list[int]) -> float:
        batch = None if self.read else self.task.batch(prompts)
        return timing.seconds(lambda: self(self.task.batch(prompts) if batch is None else batch))


def compare(teacher: Stack, pairs: Latents, data: splits.Split, size: int, rounds: int) -> list[dict[str, object]]:
    prompts = Schedule(batch=size).prompts(0, pairs.n_prompts).tolist()
    steps = {name: Step(teacher, pairs, data, name) for name in STEPS}
    with ExitStack() as restoring:
        for step in steps.values():
            restoring.enter_context(training.only_trained(step.task))
        counted = {name: step(step.task.batch(prompts), Counter()) for name, step in steps.items()}
        times = {
            name: np.array(found)
            for name, found in zip(
                steps, zip(*([step.timed(prompts) for step in steps.values()] for _ in range(rounds)))
            )
        }
    context = teacher.context(steps[SCRATCH].task.batch(prompts).pairs.tokens)

    def harvest() -> object:
        return teacher.execute(f":{SPAN[1]}", context.x0, context)

    counted["harvest, once"] = {"model": Counter()("harvest", harvest)[1], "optimisers": 0}
    times["harvest, once"] = np.array([timing.seconds(harvest) for _ in range(rounds)])
    whole, rows = sum(counted[SCRATCH].values()), list[dict[str, object]]()
    for name, found in times.items():
        low, middle, high = np.quantile(found / times[SCRATCH], [0.25, 0.5, 0.75])
        rows.append(
            {
                "prompts": size,
                "tokens": int(context.tokens.mask.sum()),
                "step": name,
                "ms": 1000 * np.median(found),
                "of the whole": f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                "counted": sum(counted[name].values()) / whole,
                "without": counted[name]["model"] / counted[SCRATCH]["model"],
                "GFLOP": sum(counted[name].values()) / 1e9,
                "optimisers": counted[name]["optimisers"] / 1e9,
            }
        )
    return rows


def main() -> None:
    rounds = timing.rounds(__doc__)
    teacher, data = Stack(surgery.load("babel")), splits.babel(1024, heldout=16)
    with tempfile.TemporaryDirectory() as folder:
        pairs = graft.latents(teacher, data.corpus, *SPAN, folder)
        rows = [row for size in (64, 512) for row in compare(teacher, pairs, data, size, rounds)]
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
