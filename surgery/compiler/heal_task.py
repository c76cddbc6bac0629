"""What healing trains (``surgery.compiler.heal``): a copy of the model, with scalars on branches or with adapters.

``Task`` is what ``training.loop`` is given: batches of stored activations, the loss, and in the end a model with all
that was learnt in its weights.
"""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformer_lens import TransformerBridge
from transformers.pytorch_utils import Conv1D

from surgery.graft.grafting import decode
from surgery.models.engine import Stream
from surgery.models.exactness import probe_ids, require_same
from surgery.models.loading import plain
from surgery.models.stack import Context, Stack
from surgery.rebuild import layout
from surgery.rebuild.weights import Weight, by_layer
from surgery.training.activations import Batch, Latents, Pairs
from surgery.training.loop import Schedule
from surgery.wiring.value import Layer, Parallel, Wiring

INSTALL = "pip install 'surgery[heal]', or heal norms"
STOP_SHARE = 8  # one text in so many is not trained on: the weights that are kept do best on these


class Student(nn.Module):
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

    def forward(self, batch: Batch) -> tuple[Float[Tensor, " term"], Float[Tensor, " term"]]:
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


class Task:
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
        self.student = Student(self.stack, self.middle, self.pairs.stop, scaled)
        if how == "norms":
            of_layers = [item for layer in layers for item in self.layers[layer].items()]
            self.others = [_parameter(name, weight) for name, weight in of_layers if _of_norm(weight)]
            self.others += [self.student.scales] if scaled else []
        else:
            self.adapters = _adapted(self.stack, layers, rank, self.schedule.seed)
            factors = [(adapter.lora_A, adapter.lora_B) for adapter in self.adapters.values()]
            self.others = [factor["default"].weight for both in factors for factor in both]

    def batch(self, prompts: list[int]) -> Batch:
        pairs, like = self.pairs.batch(prompts), self.student.scales
        return Batch(Pairs(pairs.tokens.to(like.device), pairs.x_start.to(like), pairs.x_stop.to(like)))

    def with_teacher(self, batch: Batch) -> Batch:
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
