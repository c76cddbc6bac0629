"""Layers [start, stop) of a model made wider or deeper without changing what it computes, or narrower.

    model = surgery.load("babel")
    wide = width.widen(model, 4, 9, d_mlp=1024, n_heads=8)      # the same logits, and room to learn
    deep = width.deepen(model, 4, 9, depth=10)                  # the same logits, five more layers
    thin = width.narrow(model, 4, 9, tokens, d_mlp=256)         # the neurons that write most, other logits

New neurons and heads read with fresh weights, drawn as the model's own class draws them, and write with weights of
zero: the logits are equal up to the rounding of sums, and as no two new units read alike their output weights get
different gradients, so one step makes them differ. (Chen et al. 2016, arXiv 1511.05641, copy units instead, which get
the same gradient for ever unless noise parts them.) Inserted layers are copies whose output weights are zero (Wu et al.
2024, LLaMA-Pro, arXiv 2401.02415). What was built proves itself on random prompts, or it is refused.

All sizes can differ inside a model but one: the width of the stream, which stays. ``layout.save`` writes the results
and ``surgery.load`` opens them.

Controls: for ``widen`` and ``deepen`` the model itself, whose logits they have, trained as long; for ``narrow`` the
same size by ``magnitude`` and at ``random``.
"""

from collections.abc import Callable, Mapping, Sequence

import pandas
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery import layout, pruning, similarity
from surgery.layout import Row
from surgery.models import ModelError
from surgery.stack import Stack
from surgery.tape import _difference, _probe, _tolerance
from surgery.tokens import Tokens

COLUMNS = {
    "architecture": "the model's name as given",
    "part": "what was made larger: mlp, heads or depth",
    "precision": "the weights' data type",
    "difference": "largest difference of a logit, as a fraction of the largest logit; missing where refused",
    "refused": "why this architecture cannot have that part larger, else empty",
}


def widen(
    model: TransformerBridge,
    start: int,
    stop: int,
    *,
    d_mlp: int | None = None,
    n_heads: int | None = None,
    seed: int = 0,
) -> TransformerBridge:
    """Layers [start, stop) with ``d_mlp`` neurons (of an expert, where there are experts) and ``n_heads`` heads.

    New key-value heads come with the new query heads, as many queries to a key as before. Cost: about 20 F on two short
    random prompts; a whole fresh model is drawn for each size.

    Raises:
        ValueError: a span outside the model, nothing asked, or a size below what is there.
        ModelError: an architecture whose layers cannot have such sizes: heads that divide d_model among them (GPT-2,
            GPT-J, GPT-NeoX, OPT), whose queries and keys are normed together (OLMo 2) or lie in one matrix (Phi-3);
            experts whose rows are no multiple of 16 bytes, which torch's grouped product needs.

    >>> import surgery
    >>> wide = widen(surgery.load("babel"), 4, 9, d_mlp=1024)
    >>> layout.sizes(wide)[3:5]
    [(None, None), (1024, None)]
    """
    asked = _asked(model, start, stop, d_mlp, n_heads)
    for (layer, part), (units, wanted) in asked.items():
        if wanted < units:
            raise ValueError(f"{_has(model, layer, part)}, more than asked: use width.narrow to remove some")

    def wider(old: Tensor, layer: int, part: str, writes: bool) -> Callable[[Tensor], Tensor]:
        def made(fresh: Tensor) -> Tensor:
            if (axis := _changed(old, fresh)) is None:
                return old
            units, wanted = asked[layer, part]
            new = torch.zeros_like(fresh) if writes else fresh.clone()
            places = _places(part, fresh.shape[axis], wanted, torch.arange(units)).to(fresh.device)
            return new.index_copy_(axis, places, old)

        return made

    return _same(model, _resized(model, start, stop, d_mlp, n_heads, seed, wider), "wider")


def narrow(
    model: TransformerBridge,
    start: int,
    stop: int,
    tokens: Tokens | Tensor | None = None,
    *,
    d_mlp: int | None = None,
    n_heads: int | None = None,
    by: str = "activation",
    seed: int = 0,
) -> TransformerBridge:
    """Layers [start, stop) with the ``d_mlp`` neurons and ``n_heads`` heads that ``pruning.importance`` ranks first.

    The units kept keep their order; heads that share a key and value go together. Train the result (``graft.heal``):
    what was removed is not made up for. Cost: 1 F over ``tokens`` for each size asked, by ``activation``.

    Raises:
        ValueError: a span outside the model, nothing asked, a size above what is there, or what ``importance`` refuses.
        ModelError: an architecture whose layers cannot have such sizes.

    >>> import surgery
    >>> thin = narrow(surgery.load("babel"), 4, 9, d_mlp=64, by="magnitude")
    >>> layout.sizes(thin)[4]
    (64, None)
    """
    asked = _asked(model, start, stop, d_mlp, n_heads)
    for (layer, part), (units, wanted) in asked.items():
        if wanted > units:
            raise ValueError(f"{_has(model, layer, part)}, fewer than asked: use width.widen to add some")
    ranked = {part: pruning.importance(model, part, tokens, by=by, seed=seed) for part in {part for _, part in asked}}
    kept = {
        (layer, part): ranked[part][layer].topk(wanted).indices.sort(-1).values
        for (layer, part), (_, wanted) in asked.items()
    }

    def narrower(old: Tensor, layer: int, part: str, writes: bool) -> Callable[[Tensor], Tensor]:
        def made(fresh: Tensor) -> Tensor:
            if (axis := _changed(old, fresh)) is None:
                return old
            (units, _), keep = asked[layer, part], kept[layer, part]

            def taken(tensor: Tensor, keep: Tensor, axis: int) -> Tensor:
                return tensor.index_select(axis, _places(part, tensor.shape[axis], units, keep).to(tensor.device))

            if keep.ndim == 1:
                return taken(old, keep, axis)
            return torch.stack([taken(expert, its, axis - 1) for expert, its in zip(old, keep, strict=True)])

        return made

    return _resized(model, start, stop, d_mlp, n_heads, seed, narrower)


def deepen(
    model: TransformerBridge, start: int, stop: int, depth: int, *, tokens: Tokens | Tensor | None = None
) -> TransformerBridge:
    """Layers [start, stop) as ``depth`` of them: silent copies inserted evenly, or those of least influence dropped.

    A silent copy follows the layer that it copies, and writes nothing until it is trained. Where a norm follows the
    output weights (Gemma, OLMo 2) its gradient is large at first, as the norm of nothing is steep: begin with small
    steps. Dropping needs ``tokens`` and goes by block influence (Men et al. 2024, arXiv 2403.03853), all at once.

    Raises:
        ValueError: a span outside the model, a depth below 1, or fewer layers asked without tokens.
        ModelError: a model whose copies are not silent, such as one with biases behind its output weights.

    >>> import surgery
    >>> deepen(surgery.load("babel"), 4, 9, depth=7).cfg.n_layers
    14
    """
    _span(model, start, stop)
    span = stop - start
    if depth < 1:
        raise ValueError(f"depth = {depth}: give 1 or more; to leave all of a span out say width.drop")
    if depth < span:
        if tokens is None:
            raise ValueError(
                f"{depth} of {span} layers: give tokens to find those of least influence, or say which in width.drop"
            )
        influence = similarity.layers(Stack(model), tokens).set_index("layer")["block_influence"]
        return drop(model, influence.loc[start : stop - 1].nsmallest(span - depth).index.tolist())
    likes = [*range(start), *(start + i * span // depth for i in range(depth)), *range(stop, len(model.blocks))]
    source, layers, writing, weights = layout._source(model), layout._layers(model), _outputs(model), {}
    for place, like in enumerate(likes):
        silent = place > 0 and likes[place - 1] == like
        outputs = writing[like] if silent else ()
        for name, tensor in layout._tensors(source.get_submodule(f"{layers}.{like}")):
            weights[f"{layers}.{place}.{name}"] = torch.zeros_like(tensor) if name.startswith(outputs) else tensor
    return _same(model, layout.shaped(model, [Row(like) for like in likes], weights=weights), "deeper")


def drop(model: TransformerBridge, layers: Sequence[int]) -> TransformerBridge:
    """The model without these layers.

    Raises ValueError for no layers, layers that are not there, and all of them.

    >>> import surgery
    >>> drop(surgery.load("babel"), [5, 6]).cfg.n_layers
    10
    """
    n_layers = len(model.blocks)
    kept = [layer for layer in range(n_layers) if layer not in layers]
    if not layers or not kept or not set(layers) <= set(range(n_layers)):
        raise ValueError(f"drop {list(layers)}: give some of the layers 0 to {n_layers - 1}, and not all")
    return layout.build(model, [Row(layer) for layer in kept])


def exactness(models: Mapping[str, TransformerBridge], start: int = 1, stop: int = 3) -> pandas.DataFrame:
    """How far the logits are from the model's when a part of it is doubled: a row for each model and part, ``COLUMNS``.

    Cost: about 60 F on two short random prompts for each model.
    """
    rows = []
    for name, model in models.items():
        probe = _probe(stack := Stack(model))
        larger = {
            "mlp": lambda model: widen(model, start, stop, d_mlp=2 * pruning.writers(model, "mlp")[start].count),
            "heads": lambda model: widen(model, start, stop, n_heads=2 * pruning.writers(model, "attn")[start].count),
            "depth": lambda model: deepen(model, start, stop, depth=2 * (stop - start)),
        }
        for part, made in larger.items():
            difference, refused = float("nan"), ""
            try:
                difference = _difference(made(model)(probe), model(probe))
            except ModelError as error:
                refused = str(error)
            rows.append((name, part, str(stack.dtype).removeprefix("torch."), difference, refused))
    return pandas.DataFrame(rows, columns=list(COLUMNS))


# --- inside ----------------------------------------------------------------------------------------------------------

_Made = Callable[[Tensor, int, str, bool], Callable[[Tensor], Tensor]]


def _span(model: TransformerBridge, start: int, stop: int) -> None:
    n_layers = len(model.blocks)
    if not 0 <= start < stop <= n_layers:
        raise ValueError(f"layers [{start}, {stop}) of {n_layers}: give 0 <= start < stop <= {n_layers}")


def _has(model: TransformerBridge, layer: int, part: str) -> str:
    writer = pruning.writers(model, part)[layer]
    return f"layer {layer} has {writer.count} {'heads' if part == 'attn' else 'neurons'}"


def _asked(
    model: TransformerBridge, start: int, stop: int, d_mlp: int | None, n_heads: int | None
) -> dict[tuple[int, str], tuple[int, int]]:
    """Units that are there and that are asked for, for every layer and part asked."""
    _span(model, start, stop)
    if d_mlp is None and n_heads is None:
        raise ValueError("nothing is asked: give d_mlp, n_heads or both")
    asked = {}
    for part, size in (("mlp", d_mlp), ("attn", n_heads)):
        if size is None:
            continue
        Row(start, 0.0, d_mlp, n_heads)  # refuses sizes below 1
        for layer, writer in enumerate(pruning.writers(model, part, start, stop), start):
            if size % writer.group:
                raise ValueError(
                    f"in layer {layer} {writer.group} heads share a key, so {size} cannot: make n_heads a multiple of "
                    f"{writer.group}"
                )
            asked[layer, part] = (writer.shape[-1], size // writer.group)
    return asked


def _resized(
    model: TransformerBridge, start: int, stop: int, d_mlp: int | None, n_heads: int | None, seed: int, made: _Made
) -> TransformerBridge:
    source, layers = layout._source(model), layout._layers(model)
    rows = [Row(layer) for layer in range(len(model.blocks))]
    rows[start:stop] = [Row(layer, 0.0, d_mlp, n_heads) for layer in range(start, stop)]
    weights: dict[str, layout.Weight] = {}
    for layer, outputs in enumerate(_outputs(model)):
        attention = f"{model.blocks[layer].attn.name}."
        for name, tensor in layout._tensors(source.get_submodule(f"{layers}.{layer}")):
            part = "attn" if name.startswith(attention) else "mlp"
            inside = start <= layer < stop
            weights[f"{layers}.{layer}.{name}"] = (
                made(tensor.detach(), layer, part, name.startswith(outputs)) if inside else tensor
            )
    return layout.shaped(model, rows, seed, weights)


def _outputs(model: TransformerBridge) -> list[tuple[str, ...]]:
    """For every layer the beginnings of the names of the weights that write into the stream."""
    parts = [part for part in pruning.PARTS if part in model.blocks[0].submodules]
    return list(zip(*([writer.path for writer in pruning.writers(model, part)] for part in parts), strict=True))


def _changed(old: Tensor, fresh: Tensor) -> int | None:
    return next((axis for axis, (a, b) in enumerate(zip(old.shape, fresh.shape, strict=True)) if a != b), None)


def _places(part: str, size: int, units: int, chosen: Int[Tensor, " chosen"]) -> Int[Tensor, " place"]:
    """Where the chosen units lie on an axis: a head's entries side by side, a neuron's gate and up a block apart.

    >>> _places("attn", 6, 3, torch.tensor([0, 2])).tolist(), _places("mlp", 6, 3, torch.tensor([0, 2])).tolist()
    ([0, 1, 4, 5], [0, 2, 3, 5])
    """
    each = torch.arange(size // units)
    return (chosen[:, None] * len(each) + each if part == "attn" else each[:, None] * units + chosen).flatten()


@torch.no_grad()
def _same(model: TransformerBridge, built: TransformerBridge, what: str) -> TransformerBridge:
    probe = _probe(stack := Stack(model))
    difference = _difference(built(probe), model(probe))
    if not difference <= _tolerance(stack):
        raise ModelError(
            f"{stack.name} made {what} gives logits that differ by {difference:.1e} of their size: its layers write "
            "in a way that zero output weights do not silence"
        )
    return built
