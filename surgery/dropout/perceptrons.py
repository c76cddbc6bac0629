"""Many small multilayer perceptrons with and without dropout, trained at once while their layers are recorded.

    frame = perceptrons(widths=(32, 64, 128), depths=(1, 2, 4), rates=(0.0, 0.5))

``surgery.dropout.stability`` explains and judges the recorded quantities. Networks that differ only in the rate share
data, first weights, batches and the random numbers behind their masks. Control: rate 0.

Sources: inverted dropout, Srivastava et al. (2014, JMLR 15); initialisation, He et al. (2015, arXiv 1502.01852);
optimiser, Adam (Kingma and Ba 2014, arXiv 1412.6980).

>>> frame = perceptrons((4,), (1,), (0.0, 0.5), (0,), steps=2, every=1, examples=16)
>>> frame["step"].tolist(), list(frame.columns) == list(COLUMNS)
([0, 1, 2, 0, 1, 2], True)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from surgery.meanings import with_meanings

COLUMNS: dict[str, str] = {
    "width": "units of a hidden layer; of a transformer d_model",
    "depth": "number of hidden layers; of a transformer its layers",
    "rate": "probability p that a unit is dropped in training",
    "seed": "of data, first weights, batches and masks",
    "step": "training steps made",
    "layer": "hidden layer, counted from 0; of a transformer the stream that enters it, in the last row the output",
    "variance": "mean over units of the variance over examples (of the stream: tokens), in evaluation mode",
    "variance_training": "the same in training mode, a mask for every example",
    "gradient": "norm of the gradient of the training loss in the layer's weights",
    "loss": "training loss in evaluation mode (nats; of a transformer as the training loop passed it)",
    "heldout": "held-out loss in evaluation mode (nats)",
}
NETWORK = ["width", "depth", "rate", "seed"]  # together they identify a training run
N_INPUTS, N_CLASSES, N_TEACHER = 16, 8, 32

Layers = list[tuple[Float[Tensor, "cell _in _out"], Float[Tensor, "cell 1 _out"]]]


@dataclass(frozen=True)
class Task:
    """Gaussian points and their classes according to a random network of one tanh layer."""

    x: Float[Tensor, "... example n_in"]
    y: Int[Tensor, "... example"]

    @classmethod
    def of(cls, examples: int, seed: int) -> "Task":
        """Draw points and the network that classifies them from ``seed``.

        >>> task = Task.of(64, seed=0)
        >>> list(task.x.shape), int(task.y.max()) < N_CLASSES
        ([64, 16], True)
        """
        generator = torch.Generator().manual_seed(seed)
        read, write = (
            torch.randn(size, generator=generator, dtype=torch.float64) * 2 / size[0] ** 0.5
            for size in ((N_INPUTS, N_TEACHER), (N_TEACHER, N_CLASSES))
        )
        x = torch.randn(examples, N_INPUTS, generator=generator, dtype=torch.float64)
        return cls(x, ((x @ read).tanh() @ write).argmax(-1))


def initial_layers(width: int, depth: int, seed: int) -> Layers:
    """Weights (as He et al.) and zero biases of one network, ``N_INPUTS -> width (depth times) -> N_CLASSES``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [N_INPUTS, *[width] * depth, N_CLASSES]
    return [
        (
            torch.randn(1, n_in, n_out, generator=generator, dtype=torch.float64) * (2 / n_in) ** 0.5,
            torch.zeros(1, 1, n_out, dtype=torch.float64),
        )
        for n_in, n_out in pairwise(sizes)
    ]


def forward(
    layers: Layers,
    x: Float[Tensor, "cell example n_in"],
    masks: Float[Tensor, "layer cell example unit"] | None = None,
) -> tuple[list[Float[Tensor, "cell example unit"]], Float[Tensor, "cell example n_class"]]:
    """Compute hidden activations, after ReLU and mask, and logits; without ``masks`` in evaluation mode."""
    hidden = []
    for i, (weight, bias) in enumerate(layers[:-1]):
        x = torch.baddbmm(bias, x, weight).relu()
        x = x if masks is None else x * masks[i]
        hidden.append(x)
    weight, bias = layers[-1]
    return hidden, torch.baddbmm(bias, x, weight)


def inverted_masks(
    uniform: Float[Tensor, "layer seed example unit"], rates: Float[Tensor, " rate"]
) -> Float[Tensor, "layer cell example unit"]:
    """Masks of expectation 1: ``1 / (1 - p)`` where the uniform number is p or more, else 0; cells are seeds x rates.

    >>> inverted_masks(torch.tensor([[[[0.2, 0.7]]]]), torch.tensor([0.0, 0.5])).tolist()
    [[[[1.0, 1.0]], [[0.0, 2.0]]]]
    """
    p = rates[:, None, None]
    masks = (uniform.unsqueeze(2) >= p) / (1 - p)
    return rearrange(masks, "layer seed rate example unit -> layer (seed rate) example unit")


def require_rate(rate: float) -> None:
    """Raise ValueError unless ``rate`` is a rate of dropout."""
    if not 0 <= rate < 1:
        raise ValueError(f"rate = {rate}: it is the probability of dropping a unit, from 0 (none) to below 1")


@with_meanings(COLUMNS)
def perceptrons(
    widths: Sequence[int] = (32, 64, 128),
    depths: Sequence[int] = (1, 2, 4),
    rates: Sequence[float] = (0.0, 0.5),
    seeds: Sequence[int] = range(5),
    *,
    steps: int = 1000,
    every: int = 25,
    batch: int = 64,
    learning_rate: float = 1e-3,
    examples: int = 512,
    dtype: torch.dtype = torch.float32,
) -> pd.DataFrame:
    """Train a multilayer perceptron for every width, depth, rate and seed, on the ``Task`` of its seed.

    Returns a row per evaluation and layer (``COLUMNS``). Networks are evaluated at step 0 and ``every`` so many steps,
    on ``examples`` training and as many held-out examples. Those of one width and depth are trained at once, as batched
    matrices; each ends as it would alone, up to rounding. Evaluations draw their own masks, so ``every`` does not
    affect training. Cost: about two minutes on one core with the defaults.

    Raises ValueError for a rate outside [0, 1), a number below 1, nothing to sweep over, or a loss that is not finite.
    """
    for rate in rates:
        require_rate(rate)
    if not (len(widths) and len(depths) and len(rates) and len(seeds)):
        raise ValueError("give at least one width, depth, rate and seed, such as (64,), (2,), (0.0, 0.5), (0, 1, 2)")
    sizes = {"widths": min(widths), "depths": min(depths), "steps": steps, "every": every, "batch": batch}
    for name, least in (sizes | {"examples": examples}).items():
        if least < 1:
            raise ValueError(f"{name} must be 1 or more, got {least}")
    rows: list[dict[str, Any]] = []
    for width in widths:
        for depth in depths:
            cells = _Cells(width, depth, rates, seeds, examples, learning_rate, dtype)
            for step in range(steps + 1):
                cells.backward(step, batch)
                if step % every == 0:
                    rows += cells.evaluate(step)
                cells.optimizer.step()
    order = [*NETWORK, "step", "layer"]
    return pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(order, ignore_index=True)


class _Cells:
    """Networks of one width and depth; cells run over the seeds and, within a seed, over the rates."""

    def __init__(
        self,
        width: int,
        depth: int,
        rates: Sequence[float],
        seeds: Sequence[int],
        examples: int,
        learning_rate: float,
        dtype: torch.dtype,
    ) -> None:
        self.width, self.depth, self.seeds, self.dtype = width, depth, seeds, dtype
        self.rate_values, self.rates = list(rates), torch.tensor(rates, dtype=dtype)
        tasks = [Task.of(2 * examples, seed) for seed in seeds]
        x = torch.stack([task.x for task in tasks]).to(dtype)
        y = torch.stack([task.y for task in tasks])
        self.train, self.heldout = (Task(x[:, part], y[:, part]) for part in (slice(examples), slice(examples, None)))
        self.layers: Layers = [
            tuple(  # type: ignore[misc]
                self._per_rate(torch.cat(parts).to(dtype)).requires_grad_() for parts in zip(*of_layer, strict=True)
            )
            for of_layer in zip(*(initial_layers(width, depth, seed) for seed in seeds), strict=True)
        ]
        parameters = [parameter for layer in self.layers for parameter in layer]
        self.optimizer = torch.optim.Adam(parameters, learning_rate)  # elementwise: cells do not affect each other
        self.generators = [torch.Generator().manual_seed(2**32 + seed) for seed in seeds]

    def backward(self, step: int, batch: int) -> None:
        """Compute gradients of every network's loss on a minibatch of its seed, with units dropped."""
        count = self.train.x.shape[1]
        chosen = torch.stack([torch.randint(count, (batch,), generator=generator) for generator in self.generators])
        row = torch.arange(len(self.seeds)).unsqueeze(1)
        minibatch = Task(self.train.x[row, chosen], self.train.y[row, chosen])
        _, logits = forward(self.layers, self._per_rate(minibatch.x), self._masks(self.generators, batch))
        losses = self._losses(logits, minibatch)
        self.optimizer.zero_grad()
        losses.sum().backward()
        if not losses.isfinite().all():
            raise ValueError(
                f"width {self.width}, depth {self.depth}: the loss is not finite at step {step}: give a smaller "
                "learning_rate"
            )

    @torch.no_grad()
    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Return a row per network and layer."""
        x = self._per_rate(self.heldout.x)
        hidden, logits = forward(self.layers, x)
        generators = [torch.Generator().manual_seed((step + 1) * 2**40 + seed) for seed in self.seeds]
        dropped, _ = forward(self.layers, x, self._masks(generators, x.shape[1]))
        _, trained = forward(self.layers, self._per_rate(self.train.x))
        loss, heldout = self._losses(trained, self.train), self._losses(logits, self.heldout)
        names = [(rate, seed) for seed in self.seeds for rate in self.rate_values]
        return [
            dict(zip(COLUMNS, (self.width, self.depth, rate, seed, step, layer, *values), strict=True))
            for layer, (active, noisy) in enumerate(zip(hidden, dropped, strict=True))
            for (rate, seed), *values in zip(
                names,
                *(
                    column.double().tolist()
                    for column in (_spread(active), _spread(noisy), self._gradient(layer), loss, heldout)
                ),
                strict=True,
            )
        ]

    def _gradient(self, layer: int) -> Float[Tensor, " cell"]:
        weight, bias = (
            reduce(parameter.grad.square(), "cell n_in n_out -> cell", "sum")  # type: ignore[union-attr]
            for parameter in self.layers[layer]
        )
        return (weight + bias).sqrt()

    def _masks(self, generators: list[torch.Generator], count: int) -> Float[Tensor, "layer cell example unit"]:
        size = self.depth, count, self.width
        uniform = torch.stack([torch.rand(size, generator=generator, dtype=self.dtype) for generator in generators], 1)
        return inverted_masks(uniform, self.rates)

    def _losses(self, logits: Float[Tensor, "cell example n_class"], task: Task) -> Float[Tensor, " cell"]:
        rows = rearrange(logits, "cell example n_class -> (cell example) n_class")
        losses = cross_entropy(rows, self._per_rate(task.y).flatten(), reduction="none")
        return losses.view(logits.shape[:2]).mean(1)

    def _per_rate(self, values: Tensor) -> Tensor:
        """Copy the values of every seed for each of its rates."""
        return values.repeat_interleave(len(self.rates), 0)  # a copy, never a view: it becomes parameters


def _spread(x: Float[Tensor, "cell example unit"]) -> Float[Tensor, " cell"]:
    return x.double().var(1, correction=0).mean(-1)
