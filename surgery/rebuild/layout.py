"""Build a model of kept, fresh and mixed layers: of another depth, and with layers of other sizes.

    rows = layout.middle(12, 4, 9, depth=3, d_mlp=1024)       # layers 0..3 and 9..11 kept, three wide new ones between
    grafted = layout.build(surgery.load("babel"), rows)       # a TransformerBridge like any other, the middle untrained
    layout.save(grafted, "babel-grafted")                     # surgery.load("babel-grafted") opens it

Fresh weights are drawn as the model's own class draws them (its ``_init_weights``, for the new depth); no
initialisation is ours. Embedding, final norm and readout are those of the base model. All weights are copies: the base
does not change and shares no memory with the new model. Every new layer is of the same kind (attention type, experts)
as the layer of the base that its row names.

A run of layers can have a stream of its own width, which its first and last layer map from and to the model's
(``surgery.models.stream_width``).

A Hugging Face configuration knows one MLP width and one number of heads. Where layers differ, the model in memory is
still of its class, and ``save`` puts ``surgery.json`` beside the weights, which ``surgery.load`` reads. Nothing else
opens such a folder, as its weights do not have the shapes that ``config.json`` gives.

Control: ``build(model, middle(n, start, stop, old=1.0))``, which is the model again.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.native.init import initialize_native_model
from transformer_lens.model_bridge.sources.native.model import NativeModel
from transformers import PreTrainedConfig, PreTrainedModel

import surgery
from surgery.models import building, layer_sizes, stream_width
from surgery.models.configs import rewrite
from surgery.models.errors import ModelError, first_line
from surgery.models.exactness import probe_ids, relative_difference, rerun_tolerance
from surgery.models.layer_sizes import FORMAT, SIZE_ATTRIBUTE, Size, place_layers, sized_class
from surgery.models.loading import plain, quiet, wrap
from surgery.models.stack import Stack
from surgery.models.twin import tokenizer
from surgery.rebuild import checkpoint
from surgery.rebuild.tape import unwrapped

Weight = Tensor | Callable[[Tensor], Tensor]  # as it is, or a function of the fresh weight in its place


@dataclass(frozen=True)
class Row:
    """One layer of a new model.

    Attributes:
        like: the layer of the base model that gives its kind and, where kept, its weights.
        old: share of the old weights: 1 keeps them, 0 is fresh, between is ``old * w_old + (1 - old) * w_fresh``.
        d_mlp: MLP width (of each expert, where there are experts); None: that of ``like``.
        n_heads: attention heads, as wide and with as many queries per key as in ``like``; None: those of ``like``.
        d_model: width of the stream inside the run of layers that share it; None: that of ``like``.
        branches: layers side by side whose norms stay apart (``surgery.rebuild.fuse``); None: as in ``like``.
        biases: projections that have a bias though those of their class have none; None: as in ``like``.

    Raises:
        ValueError: ``old`` is outside [0, 1], or a size is below 1.
    """

    like: int
    old: float = 1.0
    d_mlp: int | None = None
    n_heads: int | None = None
    d_model: int | None = None
    branches: int | None = None
    biases: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.old <= 1:
            raise ValueError(f"old = {self.old}: it is the share of the old weights, from 0 (fresh) to 1 (kept)")
        for name in ("d_mlp", "n_heads", "d_model", "branches"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} = {size}: give 1 or more, or None for that of layer {self.like}")


def middle(
    n_layers: int,
    start: int,
    stop: int,
    depth: int | None = None,
    *,
    old: float = 0.0,
    d_mlp: int | None = None,
    n_heads: int | None = None,
    d_model: int | None = None,
) -> tuple[Row, ...]:
    """Rows that keep layers [0, start) and [stop, n_layers), with ``depth`` new ones between (None: as many as before).

    Each new layer is like the old layer nearest to its place. A ``depth`` of 0 joins the ends. ``old`` and the sizes
    are those of ``Row``.

    Raises:
        ValueError: the span is empty or the whole model, or ``depth`` is below 0.

    >>> [row.like for row in middle(6, 1, 5, depth=2)], middle(6, 1, 5, depth=2)[1]
    ([0, 2, 4, 5], Row(like=2, old=0.0, d_mlp=None, n_heads=None, d_model=None, branches=None, biases=None))
    """
    if not (0 <= start < stop <= n_layers and stop - start < n_layers):
        raise ValueError(
            f"layers [{start}, {stop}) are no middle of {n_layers} layers: give 0 <= start < stop <= {n_layers}, with "
            "at least one layer kept"
        )
    span = stop - start
    depth = span if depth is None else depth
    if depth < 0:
        raise ValueError(f"depth = {depth}: give the number of new layers, 0 or more")
    new = [Row(start + (2 * i + 1) * span // (2 * depth), old, d_mlp, n_heads, d_model) for i in range(depth)]
    return *map(Row, range(start)), *new, *map(Row, range(stop, n_layers))


def build(model: TransformerBridge, rows: Sequence[Row], seed: int = 0) -> TransformerBridge:
    """Build the model whose layers are ``rows``, on weights of its own.

    Building again from the result composes: rows then count its layers, whose sizes carry over. The result proves
    itself: if nothing is fresh it must give the logits of the base's layers run in that order, and its bridge and its
    plain twin must always agree. Cost: about 20 F on two short random prompts, and a whole fresh model for each size.

    Raises:
        ValueError: there are no rows, the model has no such layer, or old weights are to have another size.
        ModelError: the layers of this architecture cannot have such sizes, or its bridge was edited where the Hugging
            Face model does not see it.

    >>> model = surgery.load("babel")
    >>> deeper = build(model, middle(12, 4, 9, depth=7))
    >>> deeper.cfg.n_layers, bool((deeper.blocks[0].mlp.out.weight == model.blocks[0].mlp.out.weight).all())
    (14, True)
    """
    return build_stack(Stack(model), rows, seed).model


def build_stack(stack: Stack, rows: Sequence[Row], seed: int = 0) -> Stack:
    """Build from a model that is already open; return the Stack that proved the result. Raises as ``build`` does."""
    model, rows = stack.model, tuple(rows)
    source = source_of(model)
    probe = probe_ids(stack)
    output = source(probe)
    if getattr(model, "_weights_processed", False) or not _agree(
        getattr(output, "logits", output), model(probe), stack
    ):
        raise ModelError(
            f"the bridge of {stack.name} was edited or processed where its Hugging Face model does not see it: edit "
            "plain(model) instead, then build"
        )
    layers = layers_path(model)
    base_sizes = own_sizes(model, source)
    for row, size in zip(rows, _sizes_of(model, base_sizes, rows)):
        base_size = base_sizes[row.like]
        if row.old > 0 and size[:3] == base_size[:3] and size != base_size:
            raise ValueError(
                f"{row}: layer {row.like} would be the first or the last of a run with a stream of {size.d_model}, "
                "whose maps other layers carry: keep the ends of the run, or leave all of it out"
            )
        if row.old > 0 and size != base_size:
            raise ValueError(f"{row}: old weights have the old size; with sizes of its own a layer is fresh, old=0.0")
    weights = {
        f"{layers}.{place}.{name}": (row.old, tensor)
        for place, row in enumerate(rows)
        if row.old > 0
        for name, tensor in tensors(source.get_submodule(f"{layers}.{row.like}"))
    }
    built = _assemble(model, source, rows, seed, weights)
    if all(row.old == 1 for row in rows):
        order = " ".join(str(row.like) for row in rows)
        if not _agree(built.model(probe), stack.run(probe, order), stack):
            raise ModelError(f"{stack.name}: layers {order} built anew do not give the logits of these layers")
    return built


def shaped(
    model: TransformerBridge, rows: Sequence[Row], seed: int = 0, weights: Mapping[str, Weight] | None = None
) -> TransformerBridge:
    """Build the structure of ``rows`` (whatever their ``old``) with fresh layers, and put ``weights`` into it.

    ``weights`` are named as in ``plain(shaped(...)).named_parameters()``, each a tensor or a function of the fresh one.
    What they leave out is fresh in a layer, and the base's elsewhere. Raises as ``build`` does, except that old weights
    may have any size.
    """
    whole = {name: (1.0, tensor) for name, tensor in (weights or {}).items()}
    return _assemble(model, source_of(model), rows, seed, whole).model


def sizes(model: TransformerBridge) -> list[Size]:
    """The sizes of every layer: what differs from the configuration, None where it holds."""
    return own_sizes(model, source_of(model))


def save(
    model: TransformerBridge | Stack, folder: str | Path, *, max_shard_size: int | str = "5GB", check: bool = True
) -> Path:
    """Write a model that was built as a folder that ``surgery.load`` opens, and return the folder.

    It is a plain checkpoint if a configuration can express it. If layers have sizes of their own, ``surgery.json`` lies
    beside the weights, and only ``surgery.load`` opens the folder. It appears whole or not at all. With ``check`` it is
    first opened again, which takes the memory of a second model, and must give the same logits.

    Raises:
        ValueError: the model is TransformerLens' own, or its bridge was edited where the Hugging Face model does not
            see it.
        ModelError: the folder does not open with the same logits.
        OSError: the folder is not empty, or cannot be written.
    """
    stack = model if isinstance(model, Stack) else Stack(model)
    model = stack.model
    hugging_face, every_size, probe = plain(model), sizes(model), probe_ids(stack)
    if hugging_face is None:
        raise ValueError(f"{stack.name} is TransformerLens' own model, which has no Hugging Face form to save")
    logits = hugging_face(probe).logits.detach()
    if not _agree(logits, model(probe), stack):
        raise ValueError(
            f"the bridge of {stack.name} was edited or processed where its Hugging Face model does not see it: edit "
            "plain(model) instead, then save"
        )

    def require_same_logits(reopened: PreTrainedModel) -> None:
        if not _agree(reopened(probe).logits, logits, stack):
            raise ModelError(f"{stack.name}: the folder does not open with the same logits")

    texts = {"README.md": checkpoint.layered_card(stack.name, every_size, stack.sha256)}
    if any(size != layer_sizes.CONFIGURED for size in every_size):
        entries = {
            "format": FORMAT,
            "open_with": "surgery.load(folder)",
            "surgery": surgery.__version__,
            "rows": [
                {
                    name: value
                    for name, value in size._asdict().items()
                    if name in Size._fields[:5] or value != getattr(layer_sizes.CONFIGURED, name)
                }
                for size in every_size
            ],  # what an earlier surgery reads, where it can
        }
        texts["surgery.json"] = json.dumps(entries, indent=1)
    folder = Path(folder).expanduser().resolve()
    check_reopened = require_same_logits if check else None
    return checkpoint.write(
        hugging_face, layers_path(model), tokenizer(model), texts, folder, max_shard_size, check_reopened
    )


# --- building --------------------------------------------------------------------------------------------------------


def _assemble(
    model: TransformerBridge,
    source: nn.Module,
    rows: Sequence[Row],
    seed: int,
    weights: Mapping[str, tuple[float, Weight]],
) -> Stack:
    """Fresh layers, and the rest the base's; then ``share * tensor + (1 - share) * fresh`` for each of ``weights``."""
    base_sizes, name = own_sizes(model, source), f"{model.cfg.model_name} ({_summary(rows)})"
    new_sizes = _sizes_of(model, base_sizes, rows)
    weight = next(source.parameters())
    config = copy.deepcopy(config_of(model))
    if model.adapter.cfg.architecture == "TransformerLensNative":
        config.n_layers = len(rows)
    else:
        rewrite(config.get_text_config(), [row.like for row in rows], len(base_sizes))
    if len(set(new_sizes)) == 1 and _expressible(new_sizes[0], config, source, f"{layers_path(model)}.0"):
        config, new_sizes = layer_sizes.resized(config, new_sizes[0]), [layer_sizes.CONFIGURED] * len(rows)
    with torch.random.fork_rng(), quiet(), building.quickly():
        torch.manual_seed(seed)
        try:
            if isinstance(config, PreTrainedConfig):
                shaped_class = sized_class(type(source), new_sizes)
                module = shaped_class._from_config(config, dtype=weight.dtype).eval().to(weight.device)  # noqa: SLF001
            else:
                module = _native(config, new_sizes).eval().to(weight.device, weight.dtype)
            _fill(module, source, f"{layers_path(model)}.", weights)
            if isinstance(config, PreTrainedConfig):
                module.generation_config = copy.deepcopy(getattr(source, "generation_config", None))
                built = wrap(module, tokenizer(model), name)
            else:
                built = build_bridge_from_module(module, "TransformerLensNative", tl_config=config, model_name=name)
                built = stream_width.with_own_epsilons(built).eval()
            stack, twin = Stack(built), plain(built)
            probe = probe_ids(stack)
            if twin is not None and not _agree(twin(probe).logits, built(probe), stack):
                raise ModelError(
                    f"{model.cfg.model_name} built anew: its bridge and its Hugging Face model give other logits"
                )
        except Exception as raised:  # a shape that some line of the model's own code does not expect
            error = raised.__cause__ if isinstance(raised, ModelError) else raised
            if error is None:
                raise
            overrides = dict.fromkeys(filter(None, map(layer_sizes.overrides, new_sizes)))
            raise ModelError(
                f"{model.cfg.model_name} cannot have layers with {', '.join(overrides) or 'places'} of their own: "
                f"{first_line(error)}; leave such sizes out"
            ) from error
    return stack


def _expressible(size: Size, config: Any, source: nn.Module, layer: str) -> bool:
    """Whether the configuration can give this size to all layers."""
    if size != Size(size.d_mlp, size.n_heads):
        return False
    if size.n_heads is None or not isinstance(config, PreTrainedConfig):
        return True
    return not layer_sizes.divides_stream(type(source), config, source.get_submodule(layer))


def _native(config: Any, new_sizes: Sequence[Size]) -> nn.Module:
    """TransformerLens' own model with layers of these sizes, all fresh."""

    def fresh(size: Size) -> NativeModel:
        model = NativeModel(layer_sizes.resized(config, size))
        initialize_native_model(model, model.cfg, seed=int(torch.randint(2**31, ())))
        return model

    whole = fresh(layer_sizes.CONFIGURED)
    resized = {size: fresh(size).layers for size in dict.fromkeys(new_sizes) if size != layer_sizes.CONFIGURED}
    place_layers(whole.layers, resized, new_sizes, config)
    return whole


@torch.no_grad()
def _fill(module: nn.Module, source: nn.Module, layers: str, weights: Mapping[str, tuple[float, Weight]]) -> None:
    """Set every tensor of ``module`` from ``weights`` where they name it, outside the layers from ``source``."""
    outside = dict(tensors(source))
    unknown = weights.keys() - {name for name, _ in tensors(module)}
    if unknown:
        raise ModelError(f"there is no weight {sorted(unknown)[0]} in the new model")
    for name, tensor in tensors(module):
        if name in weights:
            share, weight = weights[name]
            old = weight(tensor) if callable(weight) else weight
        elif name.startswith(layers):
            continue
        else:
            share, old = 1.0, outside[name]
        if old.shape != tensor.shape:
            raise ModelError(f"{name} is {tuple(old.shape)}, in the new model {tuple(tensor.shape)}")
        tensor.copy_(old if share == 1 or not old.is_floating_point() else share * old + (1 - share) * tensor)


def tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers of a module with their names; shared ones under every name."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


# --- sizes -----------------------------------------------------------------------------------------------------------


def own_sizes(model: TransformerBridge, source: nn.Module) -> list[Size]:
    """The sizes of every layer of ``source``, the model without its bridge."""
    layers = source.get_submodule(layers_path(model)).children()
    return [getattr(layer, SIZE_ATTRIBUTE, layer_sizes.CONFIGURED) for layer in layers]


def _sizes_of(model: TransformerBridge, base_sizes: Sequence[Size], rows: Sequence[Row]) -> list[Size]:
    """The size of the layer that each row makes, as overrides of the configuration of ``model``."""
    configured = layer_sizes.configured(config_of(model))
    if not rows:
        raise ValueError("no rows: give one Row for each layer of the new model, such as layout.middle(n_layers, 4, 9)")
    for row in rows:
        if not 0 <= row.like < len(base_sizes):
            raise ValueError(f"{row}: {model.cfg.model_name} has layers 0 to {len(base_sizes) - 1}")

    def override(row: Row, name: str) -> int | None:
        requested, carried = getattr(row, name), getattr(base_sizes[row.like], name)
        size = carried if requested is None else requested
        if name == "d_model":  # a stream of the configured width still has maps around it
            return size
        return None if size == getattr(configured, name) else size

    new_sizes = [
        Size(
            override(row, "d_mlp"),
            override(row, "n_heads"),
            override(row, "d_model"),
            branches=base_sizes[row.like].branches if row.branches is None else row.branches,
            biases=base_sizes[row.like].biases if row.biases is None else row.biases,
        )
        for row in rows
    ]
    entered, left = (
        [row.d_model is None and getattr(base_sizes[row.like], border) for row in rows]
        for border in ("enters", "leaves")
    )  # the maps that a layer already carries stay with it
    for place, size in enumerate(new_sizes):
        before, after = (
            new_sizes[neighbour].d_model if 0 <= neighbour < len(new_sizes) else None
            for neighbour in (place - 1, place + 1)
        )
        if size.d_model is not None:
            enters = entered[place] or before != size.d_model or left[place - 1]
            leaves = left[place] or after != size.d_model or entered[place + 1]
            new_sizes[place] = size._replace(enters=enters, leaves=leaves)
    return new_sizes


# --- the base model --------------------------------------------------------------------------------------------------


def source_of(model: TransformerBridge) -> Any:
    """The model without its bridge, on the same parameters: the plain twin, where there is one."""
    if (twin := plain(model)) is not None:
        return twin
    whole = model.original_model
    return unwrapped(copy.deepcopy(whole, {id(tensor): tensor for _, tensor in tensors(whole)}))


def config_of(model: TransformerBridge) -> Any:
    """The configuration of the Hugging Face model, or of TransformerLens' own."""
    native = model.adapter.cfg.architecture == "TransformerLensNative"
    return model.cfg if native else (plain(model) or model.original_model).config


def layers_path(model: TransformerBridge) -> str:
    """The name of the list of layers in the model without its bridge."""
    return str(model.blocks[0].name).rpartition(".")[0]


def _agree(actual: Tensor, expected: Tensor, stack: Stack) -> bool:
    return relative_difference(actual, expected) <= rerun_tolerance(stack)


# --- words -----------------------------------------------------------------------------------------------------------


def _summary(rows: Sequence[Row]) -> str:
    """Rows in short: kept spans as Python slices, and how many are new or mixed.

    >>> _summary(middle(12, 4, 9, depth=3)), _summary(middle(12, 4, 9, old=0.5))
    ('0:4, 3 new, 9:12', '0:4, 5 of 0.5 old, 9:12')
    """
    parts: list[str] = []
    for (old, _), run in groupby(
        enumerate(rows), lambda item: (item[1].old, item[1].old == 1 and item[1].like - item[0])
    ):
        span = [row.like for _, row in run]
        parts.append(f"{span[0]}:{span[-1] + 1}" if old == 1 else f"{len(span)} {f'of {old:g} old' if old else 'new'}")
    return ", ".join(parts)
