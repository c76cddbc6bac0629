"""The weights of a layer: what each does with the stream and with units (neurons, heads), and how to resize it.

A weight *reads* the stream or *writes* into it (biases too), is the *scale* or *shift* of a norm of the stream, or is
one of the maps of a border (*enter*, *leave*), or a *buffer*, which stays as it is. So one rule makes any layer larger,
without naming an architecture:

* a weight that reads keeps its values; its entries for new numbers of the stream and for new units are fresh;
* a weight that writes has zeros for new units; into new numbers of the stream it writes what keeps up the padding:
  zeros or, where norms subtract the mean, the mean of what it writes into the others;
* scales are multiplied by ``sqrt(d / d')``, see ``surgery.models.stream_width``.

And one rule expresses a layer in another basis of the stream, ``x = B z``: weights that write do so through ``B^T``,
weights that read through ``B``. Under a rotation, a weight that reads also takes over the scale of the norm before it,
whose own scale becomes uniform.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformers.pytorch_utils import Conv1D

from surgery.models import stream_width
from surgery.rebuild import layout
from surgery.rebuild.units import PARTS, Writer


@dataclass(frozen=True)
class Weight:
    """A tensor of a layer.

    Attributes: ``owner``, its module; ``part``, attn or mlp; ``role``, see above; ``before``, the norm whose output it
    reads; ``centred``, whether the layer's norms subtract the mean; ``blocks``, the shares of queries, keys and values
    where they follow each other in one matrix.
    """

    tensor: Tensor
    owner: nn.Module
    part: str
    role: str
    before: nn.Module | None
    centred: bool
    blocks: tuple[int, ...] = (1,)

    @property
    def stream(self) -> int | None:
        """The axis of the stream, counted from the last (-1); None if it has none."""
        if self.tensor.ndim < 2 or self.role == "buffer":
            return None if self.role in ("reads", "buffer") else -1
        if self.role in ("enter", "leave"):
            return -2 if self.role == "enter" else -1
        return -2 if (self.role == "writes") != isinstance(self.owner, Conv1D) else -1

    @property
    def unit(self) -> int | None:
        """The axis of the units, counted from the last (-1); None if it has none."""
        if self.role not in ("reads", "writes"):
            return None
        if self.tensor.ndim < 2:
            return -1 if self.role == "reads" else None
        return -1 if self.stream == -2 else -2

    def places(self, size: int, units: int, chosen: Int[Tensor, " chosen"]) -> Int[Tensor, " place"]:
        """The indices of the ``chosen`` units on an axis of ``size`` entries that holds ``units`` of them."""
        if self.part == "mlp":
            return places([1] * (size // units), units, chosen)  # a gate and its neuron lie a block apart
        return places([size // units * share // sum(self.blocks) for share in self.blocks], units, chosen)


def places(blocks: Sequence[int], units: int, chosen: Int[Tensor, " chosen"]) -> Int[Tensor, " place"]:
    """The indices of the ``chosen`` units on an axis of ``blocks``: how many entries of every unit each of them holds.

    >>> places([2], 3, torch.tensor([0, 2])).tolist(), places([1, 1], 3, torch.tensor([0, 2])).tolist()
    ([0, 1, 4, 5], [0, 2, 3, 5])
    """
    starts = [units * sum(blocks[:place]) for place in range(len(blocks))]
    inside = [(chosen[:, None] * each + torch.arange(each)).flatten() for each in blocks]
    return torch.cat([start + indices for start, indices in zip(starts, inside, strict=True)])


def by_layer(model: TransformerBridge) -> list[dict[str, Weight]]:
    """The weights of every layer, by their names in the layer."""
    source = layout.source_of(model)
    sizes = layout.own_sizes(model, source)
    return [_of_layer(model, source, layer, size.d_model or model.cfg.d_model) for layer, size in enumerate(sizes)]


def _of_layer(model: TransformerBridge, source: nn.Module, layer: int, width: int) -> dict[str, Weight]:
    """The weights of one layer, whose stream is ``width`` wide."""
    block = model.blocks[layer]
    module = source.get_submodule(f"{layout.layers_path(model)}.{layer}")
    attention = f"{block.attn.name}."
    writing = tuple(Writer(model, source, layer, part).path for part in PARTS if part in block.submodules)
    norms = {
        name: module.get_submodule(block.submodules[name].name) for name in ("ln1", "ln2") if name in block.submodules
    }
    norms = {name: norm for name, norm in norms.items() if next(norm.parameters(), None) is not None}
    centred = any(stream_width.centres(norm, width) for norm in norms.values())
    joint, blocks = _in_blocks(block.attn)

    def weight(name: str, tensor: Tensor) -> Weight:
        owner = module.get_submodule(name.rpartition(".")[0])
        part = "attn" if name.startswith(attention) else "mlp"
        if not isinstance(tensor, nn.Parameter):
            role = "buffer"
        elif name in ("enter.weight", "leave.weight"):
            role = name.partition(".")[0]
        elif name.startswith(writing):
            role = "writes"
        elif part == "mlp" and tensor.ndim == 1 and not any(own.ndim > 1 for own in owner.parameters()):
            role = "scale" if name.endswith("weight") else "shift"
        else:
            role = "reads"
        before = norms.get("ln1" if part == "attn" else "ln2", norms.get("ln1"))
        return Weight(tensor.detach(), owner, part, role, before, centred, blocks if name.startswith(joint) else (1,))

    return {name: weight(name, tensor) for name, tensor in layout.tensors(module)}


def _in_blocks(attention: Any) -> tuple[str, tuple[int, ...]]:
    """The name of a layer's joint matrix of queries, keys and values, and their shares if they are in that order.

    In other joint matrices (GPT-NeoX) each head's query, key and value are side by side.
    """
    matrix = attention.submodules.get("qkv")
    if not isinstance(matrix, nn.Module):
        return "no joint matrix", (1,)
    weights: list[Tensor] = [part.weight for part in (attention.q, attention.k, attention.v)]
    whole: Any = matrix.weight
    joint = whole.T if isinstance(matrix.original_component, Conv1D) else whole
    sizes = [len(weight) for weight in weights]
    in_order = torch.equal(joint[: sizes[0]], weights[0]) and joint.shape[0] == sum(sizes)
    shares = tuple(size // math.gcd(*sizes) for size in sizes) if in_order else (1,)
    return f"{attention.name}.{matrix.name}.", shares


def larger(weight: Weight, fresh: Tensor, units: int, more_units: int) -> Tensor:
    """``weight``, which has ``units``, enlarged to the shape of ``fresh``, which has ``more_units``."""
    old = weight.tensor
    if old.shape == fresh.shape:
        return old
    if weight.role == "scale":
        old = (len(old) / len(fresh)) ** 0.5 * (old + offset(weight.owner)) - offset(weight.owner)
    new = fresh.clone() if weight.role in ("reads", "scale") else torch.zeros_like(fresh)
    stream, unit = weight.stream, weight.unit
    old_stream = new if stream is None else new.narrow(stream, 0, old.shape[stream])
    if unit is None:
        old_stream.copy_(old)
    else:
        indices = weight.places(fresh.shape[unit], more_units, torch.arange(units)).to(fresh.device)
        old_stream.index_copy_(unit, indices, old)
    if stream is not None and weight.role in ("writes", "enter") and weight.centred:
        rest = fresh.shape[stream] - old.shape[stream]
        new.narrow(stream, old.shape[stream], rest).copy_(old_stream.mean(stream, keepdim=True))
    return new


def fewer(weight: Weight, fresh: Tensor, units: int, chosen: Int[Tensor, "*expert chosen"]) -> Tensor:
    """``weight``, which has ``units``, with only the ``chosen`` ones; fused experts each have their own choice."""
    old, unit = weight.tensor, weight.unit
    if unit is None or old.shape[unit] == fresh.shape[unit]:
        return old
    axis, size = unit, old.shape[unit]

    def select(tensor: Tensor, indices: Tensor) -> Tensor:
        return tensor.index_select(axis, weight.places(size, units, indices).to(old.device))

    return select(old, chosen) if chosen.ndim == 1 else torch.stack(list(map(select, old, chosen)))


def in_basis(weight: Weight, tensor: Tensor, basis: Float[Tensor, "wide narrow"], *, rotated: bool) -> Tensor:
    """``tensor`` (``weight``, perhaps with fewer units) expressed for the stream ``z``, where ``x = basis z``."""
    if (axis := weight.stream) is None:
        return tensor
    basis = basis.to(tensor)
    if weight.role == "scale":
        scale, uniform = tensor + offset(weight.owner), (len(basis) / basis.shape[1]) ** 0.5
        return uniform * (torch.ones_like(basis[0]) if rotated else scale @ basis) - offset(weight.owner)
    tensor = tensor.movedim(axis, -1)
    if rotated and weight.role == "reads" and weight.before is not None:
        tensor = tensor * (weight.before.get_parameter("weight").detach() + offset(weight.before))
    return (tensor @ basis).movedim(-1, axis)


def offset(norm: nn.Module) -> float:
    """What a norm adds to its weight to get its scale: 1 in Gemma, 0 elsewhere."""
    bare, weight = copy.deepcopy(norm), norm.get_parameter("weight")
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.zero_()
        return float(bool(bare(torch.arange(1, 1 + len(weight)).to(weight)).any()))
