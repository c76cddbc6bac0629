"""Make layers [start, stop) of a model wider or deeper without changing what it computes, or narrower.

    model = surgery.load("babel")
    wide = width.widen(model, 4, 9, d_mlp=1024, n_heads=8)      # the same logits, and room to learn
    deep = width.deepen(model, 4, 9, depth=10)                  # the same logits, five more layers
    broad = width.widen(model, 4, 9, d_model=256)               # the same logits, a wider stream inside these layers
    thin = width.narrow(model, 4, 9, tokens, d_mlp=256)         # the neurons that write most, other logits
    slim = width.narrow(model, 4, 9, tokens, d_model=96, by="pca")

New neurons and heads read with fresh weights, drawn as the model's own class draws them, and write with zero weights:
the logits are equal up to the rounding of sums, and as no two new units read alike, their output weights get different
gradients, so that they differ after one step. (Chen et al. 2016, arXiv 1511.05641, copy units instead, which get the
same gradient for ever unless noise tells them apart.) A wider stream is padded at its borders
(``surgery.models.stream_width``), what writes into it keeps up the padding, and its new numbers are read with fresh
weights (``surgery.rebuild.weights``). Inserted layers are copies whose output weights are zero (Wu et al. 2024,
LLaMA-Pro, arXiv 2401.02415). The result proves itself on random prompts, or is refused.

``layout.save`` writes the results and ``surgery.load`` opens them.

Controls: for ``widen`` and ``deepen`` the model itself, which has the same logits, trained as long; for ``narrow`` the
same size by ``magnitude`` and at ``random``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery.instruments import similarity
from surgery.meanings import with_meanings
from surgery.models.errors import ModelError
from surgery.models.exactness import probe_ids, relative_difference, rerun_tolerance
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.rebuild import layout, weights
from surgery.rebuild.layout import Row
from surgery.rebuild.units import channels, components, importance, writers
from surgery.rebuild.weights import Weight

COLUMNS = {
    "architecture": "the model's name as given",
    "part": "what was made larger: mlp, heads, stream or depth",
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
    d_model: int | None = None,
    seed: int = 0,
) -> TransformerBridge:
    """Widen layers [start, stop) to ``d_mlp`` neurons, ``n_heads`` heads and a stream of ``d_model`` numbers.

    Sizes that are None stay. Where there are experts, ``d_mlp`` is the width of each. New query heads bring new
    key-value heads, with as many queries per key as before. Cost: about 20 F on two short random prompts, and a whole
    fresh model for each size.

    Raises:
        ValueError: the span is outside the model, no size is given, or one is below the present size.
        ModelError: the layers of this architecture cannot have such sizes: heads that divide d_model among them (GPT-2,
            GPT-J, GPT-NeoX, OPT), whose queries and keys are normed together (OLMo 2) or lie in one matrix (Phi-3);
            norms without weights, which cannot be rescaled; experts whose rows are not a multiple of 16 bytes, which
            torch's grouped product needs.

    >>> import surgery
    >>> wide = widen(surgery.load("babel"), 4, 9, d_mlp=1024)
    >>> [size.d_mlp for size in layout.sizes(wide)[3:5]]
    [None, 1024]
    """
    size = Row(start, 0.0, d_mlp, n_heads, d_model)
    changes = _changes(model, start, stop, size)
    for (layer, part), (before, after) in changes.items():
        if after < before:
            raise ValueError(f"{_unit_count(model, layer, part)}, more than asked for: use width.narrow to remove some")

    if d_model is not None and d_model < (old := _stream(model, start, stop)):
        raise ValueError(f"the stream is {old} wide, more than asked for: use width.narrow to make it narrower")

    def wider(weight: Weight, layer: int) -> Callable[[Tensor], Tensor]:
        before, after = changes.get((layer, weight.part), (1, 1))
        return partial(weights.larger, weight, units=before, more_units=after)

    return _proved(model, _resized(model, start, stop, size, wider, seed), "wider")


def narrow(
    model: TransformerBridge,
    start: int,
    stop: int,
    tokens: Tokens | Tensor | None = None,
    *,
    d_mlp: int | None = None,
    n_heads: int | None = None,
    d_model: int | None = None,
    by: str = "activation",
    seed: int = 0,
) -> TransformerBridge:
    """Narrow layers [start, stop) to their most important neurons, heads and numbers of the stream.

    ``units.importance`` ranks neurons and heads, ``units.channels`` the numbers of the stream. Units keep their order;
    heads that share a key and value stay together. The stream alone can also be narrowed ``by="pca"``, to principal
    components, where the norms let a rotation pass (SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024). What a narrower
    stream does not hold is lost after the span too. Train the result (``graft.heal``): nothing makes up for what was
    removed. Cost: by ``activation`` and ``pca``, 1 F over ``tokens`` for each size.

    Raises:
        ValueError: the span is outside the model, no size is given, one is above the present size, or ``importance``
            refuses.
        ModelError: the layers of this architecture cannot have such sizes or, by ``pca``, its norms do not let a
            rotation pass: LayerNorm, and norms after the output weights (Gemma 2 and 3, OLMo 2).

    >>> import surgery
    >>> thin = narrow(surgery.load("babel"), 4, 9, d_mlp=64, by="magnitude")
    >>> layout.sizes(thin)[4].d_mlp
    64
    """
    size = Row(start, 0.0, d_mlp, n_heads, d_model)
    changes = _changes(model, start, stop, size)
    for (layer, part), (before, after) in changes.items():
        if after > before:
            raise ValueError(f"{_unit_count(model, layer, part)}, fewer than asked for: use width.widen to add some")
    if by == "pca" and changes:
        raise ValueError("principal components are of the stream: by='pca' goes with d_model alone")
    ranks = {part: importance(model, part, tokens, by=by, seed=seed) for part in {part for _, part in changes}}
    chosen = {
        (layer, part): ranks[part][layer].topk(after).indices.sort(-1).values
        for (layer, part), (_, after) in changes.items()
    }
    basis = None if d_model is None else _basis(model, start, stop, tokens, d_model, by, seed)

    def narrower(weight: Weight, layer: int) -> Callable[[Tensor], Tensor]:
        def of_fresh(fresh: Tensor) -> Tensor:
            tensor = weight.tensor
            if (layer, weight.part) in chosen:
                before, _ = changes[layer, weight.part]
                tensor = weights.fewer(weight, fresh, before, chosen[layer, weight.part])
            return tensor if basis is None else weights.in_basis(weight, tensor, basis, rotated=by == "pca")

        return of_fresh

    return _resized(model, start, stop, size, narrower, seed, basis)


def deepen(
    model: TransformerBridge, start: int, stop: int, depth: int, *, tokens: Tokens | Tensor | None = None
) -> TransformerBridge:
    """Make layers [start, stop) ``depth`` layers: insert silent copies evenly, or drop those of least influence.

    A silent copy follows the layer that it copies, and writes nothing until it is trained. Where a norm follows the
    output weights (Gemma, OLMo 2) its gradient is large at first, as the norm of zero is steep: begin with small steps.
    Dropping needs ``tokens`` and goes by block influence (Men et al. 2024, arXiv 2403.03853), measured once. Cost:
    about 20 F on two short random prompts; to drop layers, also 1 F over ``tokens``.

    Raises:
        ValueError: the span is outside the model, ``depth`` is below 1, or below the span without tokens.
        ModelError: the copies are not silent, for instance because of biases after the output weights.

    >>> import surgery
    >>> deepen(surgery.load("babel"), 4, 9, depth=7).cfg.n_layers
    14
    """
    _require_span(model, start, stop)
    span = stop - start
    if depth < 1:
        raise ValueError(f"depth = {depth}: give 1 or more; to leave out a whole span use width.drop")
    if depth < span:
        if tokens is None:
            raise ValueError(
                f"{depth} of {span} layers: give tokens to find those of least influence, or name them in width.drop"
            )
        influence = similarity.layers(Stack(model), tokens).set_index("layer")["block_influence"]
        return drop(model, influence.loc[start : stop - 1].nsmallest(span - depth).index.tolist())
    likes = [*range(start), *(start + i * span // depth for i in range(depth)), *range(stop, len(model.blocks))]
    sizes, by_layer, placed = layout.sizes(model), weights.by_layer(model), {}
    for place, like in enumerate(likes):
        silent, followed = place > 0 and likes[place - 1] == like, likes[place + 1 : place + 2] == [like]
        for name, weight in by_layer[like].items():
            if {"enter": silent, "leave": followed}.get(weight.role):
                continue  # the first layer of a run enters it, the last one leaves it
            zero = silent and weight.role == "writes"
            placed[f"{place}.{name}"] = torch.zeros_like(weight.tensor) if zero else weight.tensor
    rows = [Row(like, d_model=sizes[like].d_model) for like in likes]
    return _proved(model, layout.shaped(model, rows, weights=_with_path(model, placed)), "deeper")


def drop(model: TransformerBridge, layers: Sequence[int]) -> TransformerBridge:
    """Drop these layers.

    Raises ValueError if there are none, the model does not have them, or they are all that it has.

    >>> import surgery
    >>> drop(surgery.load("babel"), [5, 6]).cfg.n_layers
    10
    """
    n_layers = len(model.blocks)
    rest = [layer for layer in range(n_layers) if layer not in layers]
    if not layers or not rest or not set(layers) <= set(range(n_layers)):
        raise ValueError(f"drop {list(layers)}: give some of the layers 0 to {n_layers - 1}, and not all")
    return layout.build(model, [Row(layer) for layer in rest])


@with_meanings(COLUMNS)
def exactness(models: Mapping[str, TransformerBridge], start: int = 1, stop: int = 3) -> pd.DataFrame:
    """How far the logits move when a part of layers [start, stop) is doubled: a row (``COLUMNS``) per model and part.

    ``models`` are by name. Cost: about 80 F on two short random prompts for each model.
    """
    rows = []
    for name, model in models.items():
        probe = probe_ids(stack := Stack(model))
        doubled = {
            "mlp": lambda model: widen(model, start, stop, d_mlp=2 * _count(model, start, "mlp")),
            "heads": lambda model: widen(model, start, stop, n_heads=2 * _count(model, start, "attn")),
            "stream": lambda model: widen(model, start, stop, d_model=2 * model.cfg.d_model),
            "depth": lambda model: deepen(model, start, stop, depth=2 * (stop - start)),
        }
        for part, double in doubled.items():
            difference, refused = float("nan"), ""
            try:
                difference = relative_difference(double(model)(probe), model(probe))
            except ModelError as error:
                refused = str(error)
            rows.append((name, part, str(stack.dtype).removeprefix("torch."), difference, refused))
    return pd.DataFrame(rows, columns=list(COLUMNS))


# --- inside ----------------------------------------------------------------------------------------------------------

_Resize = Callable[[Weight, int], Callable[[Tensor], Tensor]]  # of a weight and its layer, then of the fresh weight


def _require_span(model: TransformerBridge, start: int, stop: int) -> None:
    n_layers = len(model.blocks)
    if not 0 <= start < stop <= n_layers:
        raise ValueError(f"layers [{start}, {stop}) of {n_layers}: give 0 <= start < stop <= {n_layers}")


def _count(model: TransformerBridge, layer: int, part: str) -> int:
    """How many neurons or heads a layer has."""
    return writers(model, part, layer, layer + 1)[0].count


def _unit_count(model: TransformerBridge, layer: int, part: str) -> str:
    """How many units a layer has, in words."""
    return f"layer {layer} has {_count(model, layer, part)} {'heads' if part == 'attn' else 'neurons'}"


def _changes(model: TransformerBridge, start: int, stop: int, size: Row) -> dict[tuple[int, str], tuple[int, int]]:
    """How many units every layer and part that is resized has, and is to have."""
    _require_span(model, start, stop)
    if size.d_mlp is None and size.n_heads is None and size.d_model is None:
        raise ValueError("no size is given: give d_mlp, n_heads, d_model or several")
    changes = {}
    for part, count in (("mlp", size.d_mlp), ("attn", size.n_heads)):
        if count is None:
            continue
        for layer, writer in enumerate(writers(model, part, start, stop), start):
            if count % writer.group:
                raise ValueError(
                    f"in layer {layer} {writer.group} heads share a key, so {count} cannot: make n_heads a "
                    f"multiple of {writer.group}"
                )
            changes[layer, part] = (writer.shape[-1], count // writer.group)
    return changes


def _stream(model: TransformerBridge, start: int, stop: int) -> int:
    """The width of the stream inside a span; raises ValueError if it is not the same throughout."""
    widths = [size.d_model for size in layout.sizes(model)]
    own = [layer for layer, width in enumerate(widths) if width is not None]
    if len(set(widths[start:stop])) > 1 or (own and widths[start] and (own[0], own[-1] + 1) != (start, stop)):
        raise ValueError(
            f"layers {own[0]} to {own[-1]} have a stream of their own: resize it from the first to the last of them, "
            f"[{own[0]}, {own[-1] + 1})"
        )
    return widths[start] or model.cfg.d_model


def _basis(
    model: TransformerBridge, start: int, stop: int, tokens: Tokens | Tensor | None, d_model: int, by: str, seed: int
) -> Float[Tensor, "wide d_model"]:
    """The directions of the stream that a narrower one holds; raises ModelError if ``pca`` is not possible."""
    wide = _stream(model, start, stop)
    if d_model > wide:
        raise ValueError(f"the stream is {wide} wide, less than asked for: use width.widen to make it wider")
    if by != "pca":
        scores = channels(model, start, stop, tokens, by=by, seed=seed)
        return torch.eye(wide)[:, scores.topk(d_model).indices.sort().values]
    directions = components(model, start, stop, tokens)[:, :d_model]
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(wide, wide, generator=generator))[0]

    def rotate(weight: Weight, layer: int) -> Callable[[Tensor], Tensor]:
        return lambda fresh: weights.in_basis(weight, weight.tensor, rotation, rotated=True)

    try:  # a rotation that leaves nothing out must not change the logits
        _proved(model, _resized(model, start, stop, Row(start, 0.0, d_model=wide), rotate, seed, rotation), "rotated")
    except ModelError as error:
        raise ModelError(
            f"a rotation of the stream does not pass the norms of {model.cfg.model_name}, so principal components "
            "cannot be used: use by='activation'"
        ) from error
    return directions


def _resized(
    model: TransformerBridge,
    start: int,
    stop: int,
    size: Row,
    resize: _Resize,
    seed: int,
    basis: Float[Tensor, "wide narrow"] | None = None,
) -> TransformerBridge:
    """The model with every weight of layers [start, stop) resized, and with maps into and out of ``basis``, if any."""
    rows = [Row(layer) for layer in range(len(model.blocks))]
    rows[start:stop] = [replace(size, like=layer) for layer in range(start, stop)]
    placed: dict[str, layout.Weight] = {}
    for layer, of_layer in enumerate(weights.by_layer(model)):
        for name, weight in of_layer.items():
            inside = start <= layer < stop
            placed[f"{layer}.{name}"] = resize(weight, layer) if inside else weight.tensor
    if basis is not None:
        placed = {f"{start}.enter.weight": basis.T, f"{stop - 1}.leave.weight": basis, **placed}
    return layout.shaped(model, rows, seed, _with_path(model, placed))


def _with_path(model: TransformerBridge, placed: Mapping[str, layout.Weight]) -> dict[str, layout.Weight]:
    """Weights of layers by their names in the whole model."""
    return {f"{layout.layers_path(model)}.{name}": weight for name, weight in placed.items()}


@torch.no_grad()
def _proved(model: TransformerBridge, built: TransformerBridge, change: str) -> TransformerBridge:
    """``built``, if it has the logits of ``model``; otherwise raises ModelError."""
    probe = probe_ids(stack := Stack(model))
    difference = relative_difference(built(probe), model(probe))
    if not difference <= rerun_tolerance(stack):
        raise ModelError(
            f"{stack.name} made {change} gives logits that differ by {difference:.1e} of their size: it has weights or "
            "norms that do not follow the rules of surgery.rebuild.weights, so this size cannot be changed"
        )
    return built
