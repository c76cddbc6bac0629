"""Many small multilayer perceptrons with and without dropout, trained at once, and what their layers do meanwhile.

    frame = perceptrons(widths=(32, 64, 128), depths=(1, 2, 4), rates=(0.0, 0.5))

``surgery.dropout.stability`` says what is recorded and judges it. Networks that differ in nothing but the rate share data,
first weights, batches and the numbers behind their masks. Control: rate 0.

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
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

COLUMNS = {
    "width": "units of a hidden layer; of a transformer d_model",
    "depth": "number of hidden layers; of a transformer its layers",
    "rate": "probability p that a unit is dropped in training",
    "seed": "of data, first weights, batches and masks",
    "step": "training steps made",
    "layer": "hidden layer, counted from 0; of a transformer the stream that enters it, the last row what leaves",
    "variance": "mean over units of the variance over examples (of the stream: tokens), in evaluation mode",
    "variance_training": "the same in training mode, a mask for every example",
    "gradient": "norm of the gradient of the training loss in the layer's weights",
    "loss": "training loss in evaluation mode (nats; of a transformer what the training loop gave)",
    "heldout": "held-out loss in evaluation mode (nats)",
}
NETWORK = ["width", "depth", "rate", "seed"]  # what a training run is known by
N_INPUTS, N_CLASSES, N_TEACHER = 16, 8, 32


Layers = list[tuple[Float[Tensor, "cell _in _out"], Float[Tensor, "cell 1 _out"]]]


@dataclass(frozen=True)
class Task:
    """Points in Gaussian position and the class that a random network of one tanh layer gives each."""

    x: Float[Tensor, "... example n_in"]
    y: Int[Tensor, "... example"]

    @classmethod
    def of(cls, examples: int, seed: int) -> "Task":
        """Points and classes of a network drawn from ``seed``.

        >>> task = Task.of(64, seed=0)
        >>> list(task.x.shape), int(task.y.max()) < N_CLASSES
        ([64, 16], True)
        """
        generator = torch.Generator().manual_seed(seed)
        read, said = (
            torch.randn(size, generator=generator, dtype=torch.float64) * 2 / size[0] ** 0.5
            for size in ((N_INPUTS, N_TEACHER), (N_TEACHER, N_CLASSES))
        )
        x = torch.randn(examples, N_INPUTS, generator=generator, dtype=torch.float64)
        return cls(x, ((x @ read).tanh() @ said).argmax(-1))


def initial(width: int, depth: int, seed: int) -> Layers:
    """Weights and zero biases of one network, ``N_INPUTS -> width (depth times) -> N_CLASSES``, drawn as He et al."""
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
    """Hidden activations after ReLU and mask, and logits; without ``masks`` in evaluation mode."""
    hidden = []
    for i, (weight, bias) in enumerate(layers[:-1]):
        x = torch.baddbmm(bias, x, weight).relu()
        x = x if masks is None else x * masks[i]
        hidden.append(x)
    weight, bias = layers[-1]
    return hidden, torch.baddbmm(bias, x, weight)


def inverted(
    uniform: Float[Tensor, "layer seed example unit"], rates: Float[Tensor, " rate"]
) -> Float[Tensor, "layer cell example unit"]:
    """Masks of expectation 1: ``1 / (1 - p)`` where the number is p or more, else 0; cells are seeds times rates.

    >>> inverted(torch.tensor([[[[0.2, 0.7]]]]), torch.tensor([0.0, 0.5])).tolist()
    [[[[1.0, 1.0]], [[0.0, 2.0]]]]
    """
    p = rates[:, None, None]
    return ((uniform.unsqueeze(2) >= p) / (1 - p)).flatten(1, 2)


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
    """Train a multilayer perceptron for every width, depth, rate and seed on its seed's ``Task``; a row per look and
    layer (``COLUMNS``), looks at step 0 and ``every`` so many. As many held-out examples as ``examples``.

    Networks of one width and depth are trained at once, as batched matrices; each ends as it would alone, to rounding.
    Looks draw their own masks, so that ``every`` changes nothing. Cost: about two minutes on one core as it is called
    by default.

    Raises ValueError for a rate outside [0, 1), a number below 1, nothing to sweep over, or a loss that is not finite.
    """
    for rate in rates:
        if not 0 <= rate < 1:
            raise ValueError(f"rate = {rate}: it is the probability of dropping a unit, from 0 (none) to below 1")
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
                    rows += cells.look(step)
                cells.optimizer.step()
    order = [*NETWORK, "step", "layer"]
    return pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(order, ignore_index=True)


class _Cells:
    """Networks of one width and depth, seed by seed and in it rate by rate."""

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
        self.each, self.rates = list(rates), torch.tensor(rates, dtype=dtype)
        tasks = [Task.of(2 * examples, seed) for seed in seeds]
        x = torch.stack([task.x for task in tasks]).to(dtype)
        y = torch.stack([task.y for task in tasks])
        self.train, self.heldout = (Task(x[:, some], y[:, some]) for some in (slice(examples), slice(examples, None)))
        self.layers: Layers = [
            tuple(  # type: ignore[misc]
                self._per_rate(torch.cat(parts).to(dtype)).requires_grad_() for parts in zip(*of_layer, strict=True)
            )
            for of_layer in zip(*(initial(width, depth, seed) for seed in seeds), strict=True)
        ]
        parameters = [parameter for layer in self.layers for parameter in layer]
        self.optimizer = torch.optim.Adam(parameters, learning_rate)  # by element: no cell knows of another
        self.generators = [torch.Generator().manual_seed(2**32 + seed) for seed in seeds]

    def backward(self, step: int, batch: int) -> None:
        """Gradients of every network's loss on a minibatch of its own, units dropped."""
        count = self.train.x.shape[1]
        chosen = torch.stack([torch.randint(count, (batch,), generator=one) for one in self.generators])
        row = torch.arange(len(self.seeds)).unsqueeze(1)
        some = Task(self.train.x[row, chosen], self.train.y[row, chosen])
        _, logits = forward(self.layers, self._per_rate(some.x), self._masks(self.generators, batch))
        losses = self._losses(logits, some)
        self.optimizer.zero_grad()
        losses.sum().backward()
        if not losses.isfinite().all():
            raise ValueError(
                f"width {self.width}, depth {self.depth}: the loss is not finite at step {step}: give a smaller "
                "learning_rate"
            )

    @torch.no_grad()
    def look(self, step: int) -> list[dict[str, Any]]:
        """A row per network and layer."""
        x = self._per_rate(self.heldout.x)
        hidden, logits = forward(self.layers, x)
        own = [torch.Generator().manual_seed((step + 1) * 2**40 + seed) for seed in self.seeds]
        dropped, _ = forward(self.layers, x, self._masks(own, x.shape[1]))
        _, trained = forward(self.layers, self._per_rate(self.train.x))
        loss, heldout = self._losses(trained, self.train), self._losses(logits, self.heldout)
        names = [(rate, seed) for seed in self.seeds for rate in self.each]
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
        squared = [parameter.grad.square().sum((1, 2)) for parameter in self.layers[layer]]  # type: ignore[union-attr]
        return (squared[0] + squared[1]).sqrt()

    def _masks(self, generators: list[torch.Generator], count: int) -> Float[Tensor, "layer cell example unit"]:
        size = self.depth, count, self.width
        uniform = torch.stack([torch.rand(size, generator=one, dtype=self.dtype) for one in generators], 1)
        return inverted(uniform, self.rates)

    def _losses(self, logits: Float[Tensor, "cell example n_class"], task: Task) -> Float[Tensor, " cell"]:
        each = cross_entropy(logits.flatten(0, 1), self._per_rate(task.y).flatten(), reduction="none")
        return each.view(logits.shape[:2]).mean(1)

    def _per_rate(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(len(self.each), 0)


def _spread(x: Float[Tensor, "cell example unit"]) -> Float[Tensor, " cell"]:
    return x.double().var(1, correction=0).mean(-1)
