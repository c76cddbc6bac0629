"""Layers [start, stop) of a model made wider or deeper without changing what it computes, or narrower.

    model = surgery.load("babel")
    wide = width.widen(model, 4, 9, d_mlp=1024, n_heads=8)      # the same logits, and room to learn
    deep = width.deepen(model, 4, 9, depth=10)                  # the same logits, five more layers
    broad = width.widen(model, 4, 9, d_model=256)               # the same logits, a wider stream inside these layers
    thin = width.narrow(model, 4, 9, tokens, d_mlp=256)         # the neurons that write most, other logits
    slim = width.narrow(model, 4, 9, tokens, d_model=96, by="pca")

New neurons and heads read with fresh weights, drawn as the model's own class draws them, and write with weights of
zero: the logits are equal up to the rounding of sums, and as no two new units read alike their output weights get
different gradients, so one step makes them differ. A wider stream is padded at its borders (``surgery.models.stream_width``), kept
so by what writes into it, and its new numbers are read with fresh weights (``surgery.rebuild.weights``).
(Chen et al. 2016, arXiv 1511.05641, copy units instead, which get
the same gradient for ever unless noise parts them.) Inserted layers are copies whose output weights are zero (Wu et al.
2024, LLaMA-Pro, arXiv 2401.02415). What was built proves itself on random prompts, or it is refused.

``layout.save`` writes the results and ``surgery.load`` opens them.

Controls: for ``widen`` and ``deepen`` the model itself, whose logits they have, trained as long; for ``narrow`` the
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
from surgery.models.errors import ModelError
from surgery.models.exactness import probe_ids, rebuilt_tolerance, relative_difference
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.rebuild import layout
from surgery.rebuild import units as pruning
from surgery.rebuild import weights as resize
from surgery.rebuild.layout import Row
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
    """Layers [start, stop) with ``d_mlp`` neurons (of an expert, where there are experts), ``n_heads`` heads and a
    stream of ``d_model`` numbers.

    New key-value heads come with the new query heads, as many queries to a key as before. Cost: about 20 F on two short
    random prompts; a whole fresh model is drawn for each size.

    Raises:
        ValueError: a span outside the model, nothing asked, or a size below what is there.
        ModelError: an architecture whose layers cannot have such sizes: heads that divide d_model among them (GPT-2,
            GPT-J, GPT-NeoX, OPT), whose queries and keys are normed together
            (OLMo 2) or lie in one matrix (Phi-3); norms without weights, which cannot be rescaled; experts
            whose rows are no multiple of 16 bytes, which torch's grouped product needs.

    >>> import surgery
    >>> wide = widen(surgery.load("babel"), 4, 9, d_mlp=1024)
    >>> [size.d_mlp for size in layout.sizes(wide)[3:5]]
    [None, 1024]
    """
    size = Row(start, 0.0, d_mlp, n_heads, d_model)
    asked = _asked(model, start, stop, size)
    for (layer, part), (units, wanted) in asked.items():
        if wanted < units:
            raise ValueError(f"{_has(model, layer, part)}, more than asked: use width.narrow to remove some")

    if d_model is not None and d_model < (old := _stream(model, start, stop)):
        raise ValueError(f"the stream is {old} wide, more than asked: use width.narrow to make it less")

    def wider(weight: Weight, layer: int) -> Callable[[Tensor], Tensor]:
        units, wanted = asked.get((layer, weight.part), (1, 1))
        return partial(resize.larger, weight, units=units, wanted=wanted)

    return _same(model, _resized(model, start, stop, size, wider, seed), "wider")


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
    """Layers [start, stop) with the ``d_mlp`` neurons and ``n_heads`` heads that ``pruning.importance`` ranks first,
    and a stream of the ``d_model`` numbers that ``pruning.channels`` does.

    The units kept keep their order; heads that share a key and value go together. The stream alone can also be narrowed
    ``by="pca"``, to principal components, where the norms let a rotation pass (SliceGPT, Ashkboos et al. 2024, arXiv
    2401.15024). What a narrower stream does not hold is lost behind the span too. Train the result (``graft.heal``):
    what was removed is not made up for. Cost: 1 F over ``tokens`` for each size asked, by ``activation`` and ``pca``.

    Raises:
        ValueError: a span outside the model, nothing asked, a size above what is there, or what ``importance`` refuses.
        ModelError: an architecture whose layers cannot have such sizes or, by ``pca``, whose norms a rotation does not
            pass: LayerNorm, and norms behind the output weights (Gemma 2 and 3, OLMo 2).

    >>> import surgery
    >>> thin = narrow(surgery.load("babel"), 4, 9, d_mlp=64, by="magnitude")
    >>> layout.sizes(thin)[4].d_mlp
    64
    """
    size = Row(start, 0.0, d_mlp, n_heads, d_model)
    asked = _asked(model, start, stop, size)
    for (layer, part), (units, wanted) in asked.items():
        if wanted > units:
            raise ValueError(f"{_has(model, layer, part)}, fewer than asked: use width.widen to add some")
    if by == "pca" and asked:
        raise ValueError("principal components are of the stream: by='pca' goes with d_model alone")
    ranked = {part: pruning.importance(model, part, tokens, by=by, seed=seed) for part in {part for _, part in asked}}
    kept = {
        (layer, part): ranked[part][layer].topk(wanted).indices.sort(-1).values
        for (layer, part), (_, wanted) in asked.items()
    }
    basis = None if d_model is None else _basis(model, start, stop, tokens, d_model, by, seed)

    def narrower(weight: Weight, layer: int) -> Callable[[Tensor], Tensor]:
        def made(fresh: Tensor) -> Tensor:
            tensor = weight.tensor
            if (layer, weight.part) in kept:
                tensor = resize.fewer(weight, fresh, asked[layer, weight.part][0], kept[layer, weight.part])
            return tensor if basis is None else resize.in_basis(weight, tensor, basis, rotated=by == "pca")

        return made

    return _resized(model, start, stop, size, narrower, seed, basis)


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
    own, weights = layout.sizes(model), {}
    for place, like in enumerate(likes):
        silent, followed = place > 0 and likes[place - 1] == like, likes[place + 1 : place + 2] == [like]
        for name, weight in resize.weights(model, like).items():
            if {"enter": silent, "leave": followed}.get(weight.role):
                continue  # a run of layers is entered by its first and left by its last
            written = silent and weight.role == "writes"
            weights[f"{place}.{name}"] = torch.zeros_like(weight.tensor) if written else weight.tensor
    rows = [Row(like, d_model=own[like].d_model) for like in likes]
    return _same(model, layout.shaped(model, rows, weights=_placed(model, weights)), "deeper")


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


def exactness(models: Mapping[str, TransformerBridge], start: int = 1, stop: int = 3) -> pd.DataFrame:
    """How far the logits are from the model's when a part of it is doubled: a row for each model and part, ``COLUMNS``.

    Cost: about 80 F on two short random prompts for each model.
    """
    rows = []
    for name, model in models.items():
        probe = probe_ids(stack := Stack(model))
        larger = {
            "mlp": lambda model: widen(model, start, stop, d_mlp=2 * pruning.writers(model, "mlp")[start].count),
            "heads": lambda model: widen(model, start, stop, n_heads=2 * pruning.writers(model, "attn")[start].count),
            "stream": lambda model: widen(model, start, stop, d_model=2 * model.cfg.d_model),
            "depth": lambda model: deepen(model, start, stop, depth=2 * (stop - start)),
        }
        for part, made in larger.items():
            difference, refused = float("nan"), ""
            try:
                difference = relative_difference(made(model)(probe), model(probe))
            except ModelError as error:
                refused = str(error)
            rows.append((name, part, str(stack.dtype).removeprefix("torch."), difference, refused))
    return pd.DataFrame(rows, columns=list(COLUMNS))


# --- inside ----------------------------------------------------------------------------------------------------------

_Made = Callable[[Weight, int], Callable[[Tensor], Tensor]]  # of a weight and its layer, then of the fresh one


def _span(model: TransformerBridge, start: int, stop: int) -> None:
    n_layers = len(model.blocks)
    if not 0 <= start < stop <= n_layers:
        raise ValueError(f"layers [{start}, {stop}) of {n_layers}: give 0 <= start < stop <= {n_layers}")


def _has(model: TransformerBridge, layer: int, part: str) -> str:
    writer = pruning.writers(model, part)[layer]
    return f"layer {layer} has {writer.count} {'heads' if part == 'attn' else 'neurons'}"


def _asked(model: TransformerBridge, start: int, stop: int, size: Row) -> dict[tuple[int, str], tuple[int, int]]:
    """Units that are there and that are asked for, for every layer and part asked."""
    _span(model, start, stop)
    if size.d_mlp is None and size.n_heads is None and size.d_model is None:
        raise ValueError("nothing is asked: give d_mlp, n_heads, d_model or several")
    asked = {}
    for part, wanted in (("mlp", size.d_mlp), ("attn", size.n_heads)):
        if wanted is None:
            continue
        for layer, writer in enumerate(pruning.writers(model, part, start, stop), start):
            if wanted % writer.group:
                raise ValueError(
                    f"in layer {layer} {writer.group} heads share a key, so {wanted} cannot: make n_heads a "
                    f"multiple of {writer.group}"
                )
            asked[layer, part] = (writer.shape[-1], wanted // writer.group)
    return asked


def _stream(model: TransformerBridge, start: int, stop: int) -> int:
    """How wide the stream of a span is, which has to be the same for all of it."""
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
    """The directions of the stream that a narrower one keeps."""
    wide = _stream(model, start, stop)
    if d_model > wide:
        raise ValueError(f"the stream is {wide} wide, less than asked: use width.widen to make it more")
    if by != "pca":
        ranked = pruning.channels(model, start, stop, tokens, by=by, seed=seed)
        return torch.eye(wide)[:, ranked.topk(d_model).indices.sort().values]
    found = pruning.components(model, start, stop, tokens)[:, :d_model]
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(wide, wide, generator=generator))[0]

    def through(weight: Weight, layer: int) -> Callable[[Tensor], Tensor]:
        return lambda fresh: resize.in_basis(weight, weight.tensor, turned, rotated=True)

    try:  # by a rotation that leaves nothing out
        _same(model, _resized(model, start, stop, Row(start, 0.0, d_model=wide), through, seed, turned), "turned")
    except ModelError as error:
        raise ModelError(
            f"a rotation of the stream does not pass the norms of {model.cfg.model_name}, so principal components "
            "cannot be taken: say by='activation'"
        ) from error
    return found


def _resized(
    model: TransformerBridge,
    start: int,
    stop: int,
    size: Row,
    made: _Made,
    seed: int,
    basis: Float[Tensor, "wide narrow"] | None = None,
) -> TransformerBridge:
    """Every weight of layers [start, stop) as ``made`` of it, and maps in and out of a new ``basis`` of the stream."""
    rows = [Row(layer) for layer in range(len(model.blocks))]
    rows[start:stop] = [replace(size, like=layer) for layer in range(start, stop)]
    weights: dict[str, layout.Weight] = {}
    for layer in range(len(model.blocks)):
        for name, weight in resize.weights(model, layer).items():
            inside = start <= layer < stop
            weights[f"{layer}.{name}"] = made(weight, layer) if inside else weight.tensor
    if basis is not None:
        weights = {f"{start}.enter.weight": basis.T, f"{stop - 1}.leave.weight": basis, **weights}
    return layout.shaped(model, rows, seed, _placed(model, weights))


def _placed(model: TransformerBridge, weights: Mapping[str, layout.Weight]) -> dict[str, layout.Weight]:
    return {f"{layout.layers_path(model)}.{name}": weight for name, weight in weights.items()}


@torch.no_grad()
def _same(model: TransformerBridge, built: TransformerBridge, what: str) -> TransformerBridge:
    probe = probe_ids(stack := Stack(model))
    difference = relative_difference(built(probe), model(probe))
    if not difference <= rebuilt_tolerance(stack):
        raise ModelError(
            f"{stack.name} made {what} gives logits that differ by {difference:.1e} of their size: it has weights or "
            "norms that do not follow the rules of surgery.rebuild.weights, so this size cannot be changed"
        )
    return built
