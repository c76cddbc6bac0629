"""Fuse layers that read one stream: one wide attention and one wide MLP in the place of several.

    fused = fuse.together(surgery.load("smollm2"), ":7 {7.attn | 8.attn} {7.mlp | 8.mlp} 9:")   # 29 layers, one wide
    layout.save(fused, "smollm2-fused")                                        # surgery.load("smollm2-fused") opens it

In a group of sublayers that read one stream (``{7.attn | 8.attn}``) the updates are summed, and so is what the heads of
one attention write, and the neurons of one MLP. So the group *is* one layer with all heads and neurons side by side:
the gain of every norm goes into the weights that read it, biases that write are added. It computes what the wiring
computes, in fewer and larger products of matrices; nothing is copied when it runs. The result proves itself on random
prompts, with and without a key-value cache, or is refused.

What can be fused: groups of attentions followed by the group of the same layers' MLPs; of whole layers only where
attention and MLP read the same stream (GPT-NeoX) or there is no MLP. Other layers stay, may be left out, repeated or in
another order. Norms of each head's queries and keys, and of what is written (Qwen 3, Gemma 2 and 3), stay apart in the
fused layer (``surgery.models.branch_norms``). What cannot be fused: norms over all heads at once (OLMo 2), experts,
and layers that get other masks or rotary tables (Gemma's local and global ones). The shift of a LayerNorm goes into the
biases of what reads it, which are added where the class has none (GPT-J, StableLM, Nemotron).

Layers in parallel by hand, without fusing: LP (Calvo González et al. 2025, arXiv 2502.02790). Control: the same wiring
taped (``tape.together``), which runs the layers of a group one after another.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import TransformerBridge
from transformers.pytorch_utils import Conv1D

from surgery.models import branch_norms, layer_sizes
from surgery.models.errors import ModelError
from surgery.models.exactness import probe_ids, require_same
from surgery.models.loading import plain
from surgery.models.stack import Stack
from surgery.rebuild import layout
from surgery.rebuild.layout import Row
from surgery.rebuild.units import PARTS, writers
from surgery.rebuild.weights import Weight, by_layer, offset
from surgery.wiring.value import Layer, Parallel, Step, Wiring

Branches = tuple[int, ...]


def together(model: TransformerBridge, wiring: "Wiring | str") -> TransformerBridge:
    """Build the model that computes ``wiring`` with each of its groups as one layer.

    All weights are copies. Cost: about 25 F on two short random prompts, and a whole fresh model for each size.

    Raises:
        WiringError: there is no such wiring of this model.
        ValueError: the wiring has groups that do not read one stream, chains or factors.
        ModelError: layers of this architecture cannot lie side by side; the message says why.

    >>> import surgery
    >>> fused = together(surgery.load("babel"), ":4 {4.attn|5.attn} {4.mlp|5.mlp} 6:")
    >>> fused.cfg.n_layers, layout.sizes(fused)[4][:2]
    (11, (768, 8))
    """
    stack = Stack(model)
    whole = stack.wiring(wiring)
    of_layer, sizes, rows = by_layer(model), layout.sizes(model), list[Row]()
    placed: dict[str, layout.Weight] = {}
    present = [part for part in PARTS if part in model.blocks[0].submodules]
    writing = [dict(zip(present, layer, strict=True)) for layer in zip(*(writers(model, part) for part in present))]
    for place, group in enumerate(branches(whole)):
        size = {part: sum(writing[layer][part].count for layer in group) for part in present}
        _require_one_kind(model, group)
        apart = _apart(model, group)
        units = [{part: of.shape[-1] for part, of in writing[layer].items()} for layer in group]
        beside = _Beside(stack.name, group, [of_layer[layer] for layer in group], units)
        for name in beside.layers[0]:
            if name in apart:
                placed[f"{place}.{apart[name]}"] = partial(beside.gains, name)
            else:
                placed[f"{place}.{name}"] = beside.weight(name)
        if len(group) > 1:
            biases = tuple(sorted(beside.biases.union(*(sizes[layer].biases for layer in group))))
            branching = len(group) if apart else None
            rows.append(Row(group[0], 0.0, size.get("mlp"), size["attn"], branches=branching, biases=biases))
        else:
            rows.append(Row(group[0], 0.0))
    path = layout.layers_path(model)
    try:
        fused = layout.shaped(model, rows, weights={f"{path}.{name}": weight for name, weight in placed.items()})
    except ModelError as error:
        raise ModelError(f"{whole} of {stack.name} cannot be fused, tape it (tape.together): {error}") from error
    try:
        _prove(fused, whole, stack)
    except ModelError as error:
        raise ModelError(f"{error}{_other_form(stack, whole)}") from error
    fused.cfg.model_name = f"{stack.name} ({whole}, fused)"
    return fused


def branches(wiring: Wiring) -> list[Branches]:
    """The layers of ``wiring``, those of a group together.

    Raises ValueError for what is no wiring of whole layers and of groups that can be one layer.

    >>> branches(Wiring.parse("0 {1.attn|2.attn} {1.mlp|2.mlp} 3", 4))
    [(0,), (1, 2), (3,)]
    """
    result: list[Branches] = []
    steps = list(wiring.steps)
    while steps:
        step = steps.pop(0)
        layers = _read(step, None)
        if layers is None:
            layers = _read(step, "attn")
            if layers is None or not steps or sorted(layers) != sorted(_read(steps.pop(0), "mlp") or ()):
                shown = Wiring(wiring.n_layers, (step,))
                raise ValueError(
                    f"{shown} of {wiring} cannot be one layer: write groups as "
                    "{7.attn | 8.attn} {7.mlp | 8.mlp}, other layers whole"
                )
        result.append(layers)
    return result


def group(layers: Sequence[int]) -> str:
    """The notation of ``layers`` side by side, as one layer that can be fused.

    >>> group([7, 8]), group([3])
    ('{7.attn | 8.attn} {7.mlp | 8.mlp}', '3')
    """
    if len(layers) == 1:
        return str(layers[0])
    return " ".join("{" + " | ".join(f"{layer}.{part}" for layer in layers) + "}" for part in PARTS[::-1])


def _read(step: Step, part: str | None) -> Branches | None:
    """The layers of a step that is a layer, or a sum of layers, each whole or only its ``part``; None for others."""
    match step:
        case Layer(index, own) if own == part:
            return (index,)
        case Parallel(inside, False):
            layers = [
                _read(chain[0], part) if len(chain) == 1 and isinstance(chain[0], Layer) else None for chain in inside
            ]
            return None if None in layers else tuple(layer[0] for layer in layers if layer)
    return None


def _require_one_kind(model: TransformerBridge, group: Branches) -> None:
    """Raise ModelError for layers with other masks or rotary tables: a layer is called with one of each."""
    config = layer_sizes.text_config(layout.config_of(model))
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # as GPT-Neo calls it
    if kinds and len({kinds[layer] for layer in group}) > 1:
        shown = ", ".join(f"{layer} is {kinds[layer].replace('_', ' ')}" for layer in group)
        raise ModelError(
            f"layers of {model.cfg.model_name} of different kinds cannot be one layer: {shown}; fuse layers of one kind"
        )


def _apart(model: TransformerBridge, group: Branches) -> dict[str, str]:
    """The norms of a group that stay apart, and where their gains go; none if it is one layer."""
    source, path = layout.source_of(model), layout.layers_path(model)
    return {} if len(group) == 1 else branch_norms.renamed(source.get_submodule(f"{path}.{group[0]}"))


class _Beside:
    """Layers side by side as one: what each of its weights is made of."""

    def __init__(
        self, model: str, group: Branches, layers: Sequence[dict[str, Weight]], units: Sequence[dict[str, int]]
    ) -> None:
        self.names, self.units = f"layers {' and '.join(map(str, group))} of {model}", units
        missing = [_missing_biases(layer) if len(layers) > 1 else {} for layer in layers]
        self.layers = [layer | biases for layer, biases in zip(layers, missing, strict=True)]
        self.biases = {name.removesuffix(".bias") for biases in missing for name in biases}
        self.norms = [{id(weight.before) for weight in layer.values()} for layer in layers]

    def weight(self, name: str) -> layout.Weight:
        """The weight called ``name``, or how it follows from a fresh one of its shape; raises ModelError if neither."""
        first = self.layers[0][name]
        if len(self.layers) == 1 or first.role == "buffer":
            return first.tensor
        beside = [layer[name] for layer in self.layers if name in layer]
        if len(beside) < len(self.layers) or any(weight.role != first.role for weight in beside):
            raise ModelError(f"{self.names} are not of one kind: {name} differs")
        if first.tensor.ndim > 2 or "expert" in name:
            raise ModelError(f"{self.names} have experts, and two routers, each with a choice of its own, are not one")
        if first.role in ("scale", "shift"):
            return self._norm(name, beside)
        if first.role == "writes":
            biases = [weight.tensor for weight in beside]
            return partial(self._side_by_side, beside) if first.tensor.ndim == 2 else sum(biases[1:], biases[0])
        if first.tensor.ndim == 2:
            return partial(self._side_by_side, beside)
        return self._between(name, beside)

    def gains(self, name: str, fresh: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """The gains of norms that stay apart, as many rows of each layer's as its share of ``fresh``."""
        rows = [layer[name].tensor + offset(layer[name].owner) for layer in self.layers]
        return torch.stack(rows).repeat_interleave(len(fresh) // len(rows), 0)

    def _norm(self, name: str, beside: Sequence[Weight]) -> Tensor:
        """A norm that only divides: its gain and shift are in the weights that read it."""
        first = beside[0]
        if any(id(weight.owner) not in norms for weight, norms in zip(beside, self.norms, strict=True)):
            raise ModelError(
                f"{self.names} have a norm behind what they write ({name.rpartition('.')[0]}), and the norm of a sum "
                "is no sum of norms"
            )
        if first.role == "shift":
            return torch.zeros_like(first.tensor)
        return torch.ones_like(first.tensor) - offset(first.owner)

    def _between(self, name: str, beside: Sequence[Weight]) -> layout.Weight:
        """A bias of what reads the stream; or a gain between it and the scores, which must be the same in all."""
        if any(own.ndim == 2 for own in beside[0].owner.parameters()):
            return partial(self._side_by_side, beside)
        if all(bool(torch.equal(weight.tensor, beside[0].tensor)) for weight in beside):
            return beside[0].tensor
        raise ModelError(f"{self.names} norm their queries and keys with gains of their own ({name})")

    def _side_by_side(self, beside: Sequence[Weight], fresh: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Weights of the same name in the shape of ``fresh``: the heads or neurons of one after those of the other."""
        axis, part = beside[0].unit, beside[0].part
        assert axis is not None, "only weights with units are put side by side"
        new, units, done = torch.zeros_like(fresh), [of[part] for of in self.units], 0
        for weight, own in zip(beside, units, strict=True):
            places = weight.places(fresh.shape[axis], sum(units), torch.arange(done, done + own))
            if len(places) != weight.tensor.shape[axis]:  # multi-query attention in one matrix (GPTBigCode)
                raise ModelError(f"{self.names} share a key among all heads, and the class has no room for another one")
            new.index_copy_(axis, places.to(fresh.device), _on_bare_norm(weight))
            done += own
        return new


def _missing_biases(layer: dict[str, Weight]) -> dict[str, Weight]:
    """Biases of zeros for the projections without bias that read a norm with a shift, to take it over."""
    return {
        bias: replace(weight, tensor=weight.tensor.new_zeros(len(weight.tensor)))
        for name, weight in layer.items()
        if weight.role == "reads" and weight.tensor.ndim == 2 and getattr(weight.before, "bias", None) is not None
        if (bias := f"{name.removesuffix('weight')}bias") not in layer
    }


def _on_bare_norm(weight: Weight) -> Tensor:
    """A weight that reads, made to read a norm without gain and shift; others as they are."""
    tensor, norm = weight.tensor, weight.before
    if weight.role != "reads" or norm is None:
        return tensor
    if (axis := weight.stream) is not None:
        gain = norm.get_parameter("weight").detach() + offset(norm)
        return (tensor.movedim(axis, -1) * gain).movedim(-1, axis)
    shift = getattr(norm, "bias", None)
    if shift is None:
        return tensor
    matrix = weight.owner.get_parameter("weight").detach()
    return tensor + shift.detach() @ (matrix if isinstance(weight.owner, Conv1D) else matrix.T)


def _other_form(stack: Stack, wiring: Wiring) -> str:
    """What to write instead, where layers are put side by side in the form that is not theirs; else nothing."""
    sublayers = ".attn" in str(wiring)
    if "mlp" not in stack.model.blocks[0].submodules or stack.parallel_sublayers != sublayers:
        return ""
    if sublayers:
        return ". Its attention and MLP read one stream: write groups as {7 | 8}"
    return ". Its MLPs read what its attentions have written: write groups as {7.attn | 8.attn} {7.mlp | 8.mlp}"


@torch.no_grad()
def _prove(fused: TransformerBridge, wiring: Wiring, stack: Stack) -> None:
    """Raise ModelError unless the fused model gives the wiring's logits, with and without a key-value cache."""
    probe = probe_ids(stack)
    expected = stack.run(probe, wiring)
    require = partial(require_same, expected=expected, stack=stack, depth=math.ceil(wiring.depth))
    require(fused(probe), what=f"{wiring} fused")
    twin = plain(fused)
    if twin is None:
        return
    require(twin(probe, use_cache=False).logits, what=f"{wiring} fused, in the plain twin,")
    cache = getattr(twin(probe[:, :-2], use_cache=True), "past_key_values", None)
    if cache is not None:
        last = twin(probe[:, -2:], past_key_values=cache, use_cache=True).logits
        require_same(last, expected[:, -2:], stack, f"{wiring} fused, with a key-value cache,")
