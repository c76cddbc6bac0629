"""Tape layers together: make a wiring permanent, as a model like any other.

    taped = tape.together(surgery.load("babel"), ":4 4:8 4:8 8:")
    taped.generate("p3 pf1 pf4 >other", max_new_tokens=8)
    tape.save(taped, "babel-twice")                       # opens with AutoModelForCausalLM.from_pretrained

Every pass of the wiring becomes a layer with its own index, hooks (``blocks.0`` to ``blocks.n-1`` for n passes) and
slot in the key-value cache; lists in the configuration with an entry for every layer are rewritten to match. Weights
are not copied: a layer that runs twice becomes two layers on the same parameters, those of the original model, so
training one trains the other. The original model is not touched.

A parallel or scaled group is taped as its passes one after another, with the streams between them saved and joined
(``surgery.rebuild.passes``), and a sublayer as its layer with the other sublayer silenced. All of this runs, caches and
generates; but the layers of a group only run together, and a plain checkpoint cannot express them, so ``save`` refuses.

Control: ``together(model, ":")``.
"""

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from surgery.models import building
from surgery.models.configs import rewrite
from surgery.models.errors import ModelError
from surgery.models.exactness import probe_ids, relative_difference, require_same, rerun_tolerance
from surgery.models.loading import load, plain
from surgery.models.opening import bridge_engine, plain_engine
from surgery.models.stack import Stack
from surgery.models.twin import tokenizer
from surgery.models.weights_hash import weights_sha256
from surgery.rebuild import checkpoint
from surgery.rebuild.passes import Slot, compose, install, slots
from surgery.wiring.value import Wiring


@dataclass(frozen=True)
class _Origin:
    base: TransformerBridge
    wiring: Wiring


_origins: "weakref.WeakKeyDictionary[TransformerBridge, _Origin]" = weakref.WeakKeyDictionary()


def together(model: TransformerBridge, wiring: "Wiring | str") -> TransformerBridge:
    """Build the model that runs its layers as the wiring says, on the weights of ``model``.

    Taping a taped model composes: the wiring then counts the layers of the taped model. Cost: about 15 F on two short
    random prompts, which prove that the taped model gives the logits of ``Stack(model).run(tokens, wiring)``, with and
    without a key-value cache.

    Raises:
        WiringError, ValueError: the wiring is for another number of layers, runs sublayers that this model does not
            have, or splits a group of a taped model.
        ModelError: the taped model does not run exactly as the wiring; the message says where it differs.

    >>> model = load("babel")
    >>> taped = together(model, ":4 4:8 4:8 8:")
    >>> taped.cfg.n_layers, taped.blocks[8].mlp.out.weight is model.blocks[4].mlp.out.weight
    (16, True)
    """
    if getattr(model, "_weights_processed", False):
        raise ModelError(
            f"the weights of {model.cfg.model_name} were processed (enable_compatibility_mode) and are no longer those "
            "of its architecture: tape the model as it was loaded, then process the taped model"
        )
    stack = Stack(model)
    wiring = Wiring.parse(wiring, stack.n_layers) if isinstance(wiring, str) else wiring
    origin = _origins.get(model)
    if origin is None:
        base, whole = model, stack.wiring(wiring)
    else:
        if wiring.n_layers != stack.n_layers:
            raise ValueError(f"{wiring!r} is for {wiring.n_layers} layers, {stack.name} has {stack.n_layers}")
        base, whole, taped_stack = origin.base, compose(origin.wiring, wiring), stack
        stack = Stack(base)
        probe = probe_ids(stack)
        expected = stack.run(probe, origin.wiring)
        require_same(taped_stack.run(probe), expected, stack, "it has been changed since it was taped")
        whole = stack.wiring(whole)
    passes = slots(whole)
    try:
        taped = _with_layers(base, [slot.layer for slot in passes])
        if not whole.is_serial:
            _install(taped, passes, stack)
        _prove(taped, whole, stack)
    except ModelError:
        raise
    except Exception as error:  # a model whose layers depend on their place in ways that no configuration shows
        raise ModelError(f"{stack.name} cannot be taped together as {whole}: {error}") from error
    taped.cfg.model_name = f"{stack.name} ({whole})"
    _origins[taped] = _Origin(base, whole)
    return taped


def wiring_of(taped: TransformerBridge) -> Wiring:
    """The wiring that ``together`` taped, over the layers of the model that ``base_of`` gives."""
    return _origin(taped).wiring


def base_of(taped: TransformerBridge) -> TransformerBridge:
    """The original model, on whose weights a taped model runs."""
    return _origin(taped).base


def save(
    taped: TransformerBridge, folder: str | Path, *, max_shard_size: int | str = "5GB", check: bool = True
) -> Path:
    """Write a taped model as a Hugging Face checkpoint that ``AutoModelForCausalLM.from_pretrained(folder)`` opens.

    A plain checkpoint holds the weights of a layer as many times as it runs. Beside them are the tokenizer, if there is
    one, a model card with the wiring, and the mergekit configuration that builds the same model. The folder appears
    whole or not at all. With ``check`` it is first opened again, which takes the memory of a second model, and must
    give the same logits. Returns the folder.

    Raises:
        ValueError: no plain checkpoint can express the wiring (groups, factors, sublayers), the model is not taped, or
            its bridge was edited where the Hugging Face model does not see it.
        ModelError: the checkpoint does not open with the same logits.
        OSError: the folder is not empty, or cannot be written.
    """
    origin = _origin(taped)
    name, wiring = str(origin.base.cfg.model_name), origin.wiring
    if not wiring.is_serial:
        raise ValueError(
            f"a plain checkpoint cannot express {wiring}: it holds whole layers that run one after another. Save the "
            "base model and this wiring, and tape them together again: "
            f'tape.together(surgery.load({name!r}), "{wiring}")'
        )
    hugging_face = plain(taped)
    if hugging_face is None:
        raise ValueError(f"{name} is TransformerLens' own model, which has no Hugging Face form to save")
    stack = Stack(taped)
    probe = probe_ids(stack)
    logits = hugging_face(probe).logits.detach()
    if not relative_difference(logits, taped(probe)) <= rerun_tolerance(stack):
        raise ValueError(
            f"the bridge of {stack.name} was edited or processed where its Hugging Face model does not see it: edit "
            "plain(model) instead, then tape and save"
        )
    return checkpoint.write(
        hugging_face,
        taped.blocks[0].name.rpartition(".")[0],
        stack.tokenizer,
        {
            "README.md": checkpoint.card(name, wiring, weights_sha256(plain(origin.base) or origin.base), stack.sha256),
            "mergekit.yaml": wiring.to_mergekit(name),
        },
        Path(folder).expanduser().resolve(),
        max_shard_size,
        (lambda opened: require_same(opened(probe).logits, logits, stack, "the checkpoint")) if check else None,
    )


def _origin(taped: TransformerBridge) -> _Origin:
    if taped not in _origins:
        raise ValueError("this model is not taped: give what tape.together(model, wiring) returned")
    return _origins[taped]


# --- building --------------------------------------------------------------------------------------------------------


def _with_layers(base: TransformerBridge, layers: Sequence[int]) -> TransformerBridge:
    """The base model with ``layers`` in a row as its layers, on the same parameters."""
    source = plain(base) or base.original_model
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())}
    hugging_face: Any = unwrapped(copy.deepcopy(source, dict(tensors))).eval()
    path, _, name = base.blocks[0].name.rpartition(".")[0].rpartition(".")
    parent = hugging_face.get_submodule(path)
    old = getattr(parent, name)
    config = getattr(hugging_face, "config", None)
    shared = tensors if config is None else tensors | {id(part): part for part in (config, config.get_text_config())}
    setattr(parent, name, type(old)([_layer(old[layer], slot, shared) for slot, layer in enumerate(layers)]))
    if base.adapter.cfg.architecture == "TransformerLensNative":
        cfg = copy.deepcopy(base.cfg)
        cfg.n_layers = len(layers)
        with building.quickly():
            taped = build_bridge_from_module(hugging_face, "TransformerLensNative", tl_config=cfg).eval()
    else:
        rewrite(hugging_face.config.get_text_config(), layers, len(old))
        taped = load(hugging_face, tokenizer=tokenizer(base))
    for block, layer in zip(taped.blocks, layers, strict=True):
        _share(block, base.blocks[layer])
    return taped


def unwrapped(module: nn.Module) -> nn.Module:
    """Remove a bridge's wrappers from a module, in place: for a model that has no plain twin."""
    for name, child in list(module.named_children()):
        if isinstance(child, GeneralizedComponent) and child.original_component is not None:
            child = module._modules[name] = child.original_component  # noqa: SLF001
        unwrapped(child)
    return module


def _layer(layer: nn.Module, slot: int, shared: dict[int, Any]) -> nn.Module:
    """A copy of a layer's structure with the slot's index, on the parameters and configuration in ``shared``."""
    copied = copy.deepcopy(layer, dict(shared))
    for module in copied.modules():
        for name in ("layer_idx", "layer_id", "layer_index", "layer_number"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, slot)
    return copied


def _share(block: nn.Module, source: nn.Module) -> None:
    """Make a taped block use the parameters of its source: some adapters split joint matrices into new ones."""
    sources = dict(source.named_modules())
    for name, module in block.named_modules():
        for key, parameter in module._parameters.items():  # noqa: SLF001
            other = sources[name]._parameters.get(key) if name in sources else None  # noqa: SLF001
            if parameter is not None and other is not None:
                module._parameters[key] = other  # noqa: SLF001


def _install(taped: TransformerBridge, passes: Sequence[Slot], stack: Stack) -> None:
    """Make both engines of a taped model run its groups and sublayers."""
    ids = probe_ids(stack)[:, :2]
    twin = plain(taped)
    engines = [bridge_engine(taped, stack.name)] + ([] if twin is None else [plain_engine(twin, taped)])
    for engine in engines:
        install(engine.layers, engine.parts, passes, stack.d_model, partial(engine.module, input_ids=ids))


# --- proving ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _prove(taped: TransformerBridge, wiring: Wiring, stack: Stack) -> None:
    """Raise ModelError unless bridge and twin give the wiring's logits, with and without a key-value cache."""
    probe = probe_ids(stack)
    expected = stack.run(probe, wiring)
    require = partial(require_same, stack=stack, depth=math.ceil(wiring.depth))
    require(taped(probe), expected, what=f"{wiring} taped together")
    ways = [("the bridge", taped.original_model), ("the plain twin", plain(taped))]
    twin = plain(stack.model)
    if twin is not None and not relative_difference(twin(probe).logits, stack.run(probe)) <= rerun_tolerance(stack):
        ways.pop()  # the bridge was edited where its twin does not see it: the bridge counts
    for name, model in ways:
        if model is None:
            continue
        output = model(probe, use_cache=False)
        require(getattr(output, "logits", output), expected, what=f"{wiring} taped together, in {name},")
        cache = getattr(model(probe[:, :-2], use_cache=True), "past_key_values", None)
        if cache is not None:
            last = model(probe[:, -2:], past_key_values=cache, use_cache=True).logits
            require(last, expected[:, -2:], what=f"{wiring} taped together, in {name} with a key-value cache,")
