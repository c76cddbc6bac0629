"""A model's folder as a stranger may have made it, reduced to what a model consists of: numbers, sizes and words.

Libraries that open a folder do what its files say: they run code beside the weights, look for the base model of an
adapter, fetch attention kernels or open paths that a setting names. So they never see the folder itself. ``reduced``
gives them another one, which holds links to the weights and tokenizer files that it checked, and the settings without
those that say how to run, load or fetch something instead of what the model is.

Sizes come next: ``require_sizes`` compares the configuration with what the files hold before anything is built.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from surgery.models.errors import ModelError, as_model_error
from surgery.outside import OutsideError, read_json, shown

CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES, ADAPTER = "surgery.json", "adapter_config.json"
SETTINGS = (CONFIG, GENERATION, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", SIZES)
TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "bpe.codes", "tekken.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
    "tiktoken.model",
)
MOST_WORDS = 10**7  # of a tokenizer
TEMPLATES = "additional_chat_templates"
LONGEST_SETTINGS = 2**24  # bytes of a file of settings; that of a model of 100,000 labels has a third
ALLOWANCE = 2**27  # bytes that a model may take besides its weights: the masks of GPT-Neo's layers take 50 MB

_CLASSES = {
    CONFIG: PreTrainedConfig,
    GENERATION: GenerationConfig,
    TOKENIZER_CONFIG: PreTrainedTokenizerBase,
    "special_tokens_map.json": PreTrainedTokenizerBase,
}
# Settings that say how to run, load or fetch something: ours to choose, and not part of what the model is.
_HOW = re.compile(
    r"auto_map|custom_\w+|_?(attn|experts)_implementation\w*|(torch_)?dtype|transformers_weights|fusion_config|"
    r"kernel_config|use_kernels|distributed_config|device_(map|mesh)|(\w+_)?(tp|pp|ep)_plan|tp_size|trust_remote_code|"
    r"_?name_or_path|_commit_hash|is_local|local_files_only|init_inputs|\w+_(files?|paths?|dir|object)|__(?!type$)\w+"
)
_QUANTISED = ("quantization_config", "compression_config")
# How large a whole number in a configuration may be. Loops run over the first two kinds, and lists are made of the
# last; the third are lengths and places, which cost nothing until a tensor of that size is made.
_LAYERS = re.compile(r"layers?$|depth$|blocks?$|stages?$|block_count$|_types$")
_EXPERTS = re.compile(r"expert")
MOST_LAYERS, MOST_EXPERTS = 256, 1024  # or as many as there are tensors
_FREE = re.compile(r"position|token|vocab|theta|base|window|length|context|seq|scal|factor|max|seed|chunk|freq|version")
LARGEST = 100_000


@dataclass(frozen=True)
class Folder:
    """A folder that libraries may see, and the stranger's folder that it was made from."""

    path: Path
    origin: Path

    def settings(self, file: str = CONFIG) -> Any:
        """What is in a file of settings; None if there is none."""
        path = self.path / file
        return read_json(path.read_bytes()) if path.is_file() else None


def is_folder(place: str) -> bool:
    """Whether there is such a folder; False too for what cannot be a path."""
    try:
        return Path(place).is_dir()
    except (OSError, ValueError):  # too long, or a null character
        return False


@contextmanager
def reduced(place: str, name: str) -> Iterator[Folder]:
    """Context manager: a temporary folder with what the model in ``place`` (a folder, or a name on the hub) is made of.

    Raises ModelError for a file that is not what it should be: a link to somewhere else, a device, no JSON, or a list
    of weights that names files elsewhere; for a quantised model; and for a name that the hub does not have.
    """
    origin = Path(place) if is_folder(place) else _downloaded(place)
    if (origin / ADAPTER).exists():
        raise ModelError(
            f"{name} holds an adapter ({ADAPTER}), whose base may be anything; merge the two (with PEFT's "
            "merge_and_unload) and save the model that this gives"
        )
    with tempfile.TemporaryDirectory(prefix="surgery-") as work:
        for file in SETTINGS:
            if (path := inside(origin, file, name)) is not None:
                Path(work, file).write_text(json.dumps(_settings(path, file, name)), encoding="utf-8")
        for file in TOKENIZER:
            if (path := inside(origin, file, name)) is not None:
                link(path, Path(work, file))
        for path in sorted(origin.glob(f"{TEMPLATES}/*.jinja")):
            if (target := inside(origin, f"{TEMPLATES}/{path.name}", name)) is not None:
                Path(work, TEMPLATES).mkdir(exist_ok=True)
                link(target, Path(work, TEMPLATES, path.name))
        for file in _weights(origin, name):
            if (path := inside(origin, file, name)) is None:
                raise ModelError(f"{name} has no {file}, which its list of weights names ({INDEX})")
            link(path, Path(work, file))
        if (path := inside(origin, INDEX, name)) is not None and not Path(work, WEIGHTS).exists():
            shutil.copyfile(path, Path(work, INDEX))
        yield Folder(Path(work), origin)


def _downloaded(name: str) -> Path:
    """The folder of a repository on the hub: settings and tokenizer first, then the weights that they name."""
    small = [*SETTINGS, *TOKENIZER, f"{TEMPLATES}/*.jinja", INDEX, ADAPTER]
    folder = Path(snapshot_download(name, allow_patterns=small))
    weights = [WEIGHTS] if not (folder / INDEX).is_file() else [WEIGHTS, *_weights(folder, name)]
    return Path(snapshot_download(name, revision=folder.name, allow_patterns=weights))


def _weights(folder: Path, name: str) -> list[str]:
    """The files with the weights of a model, by their names in its folder; none where there is no model.safetensors."""
    if inside(folder, WEIGHTS, name) is not None:
        return [WEIGHTS]
    if (path := inside(folder, INDEX, name)) is None:
        return []
    index = _json(path, name)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ModelError(f"{name}: {INDEX} does not say which file holds which weight (weight_map)")
    for file in files.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ModelError(f"{name}: {INDEX} names {shown(file)!r}; weights must be *.safetensors in the same folder")
    return sorted(set(files.values()))


def inside(folder: Path, file: str, name: str) -> Path | None:
    """The file itself, links followed; None if there is none. It must be an ordinary file of this folder.

    A folder of the hub's cache consists of links into the ``blobs`` beside it.
    """
    path = folder / file
    if not path.is_symlink() and not path.exists():
        return None
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    target = path.resolve()
    if not target.is_relative_to(root):
        raise ModelError(
            f"{name}: {file} is a link to {shown(str(target), 200)}, outside the folder; put the file itself there"
        )
    if not target.is_file():
        raise ModelError(f"{name}: {file} is not an ordinary file")
    return target


def link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path)
    except OSError:  # a system without links
        shutil.copyfile(path, link)


def _json(path: Path, name: str) -> Any:
    if path.stat().st_size > LONGEST_SETTINGS:
        raise ModelError(f"{name}: {path.name} has {path.stat().st_size:,} bytes, {LONGEST_SETTINGS:,} are read")
    try:
        return read_json(path.read_bytes())
    except OutsideError as error:
        raise ModelError(f"{name}: {path.name} {error}") from None


def _settings(path: Path, file: str, name: str) -> Any:
    """What a file of settings says about the model, without what it says about how to run, load or fetch something."""
    settings = _json(path, name)
    if not isinstance(settings, dict):
        raise ModelError(f"{name}: {file} is a {type(settings).__name__}, not a JSON object")
    if file == TOKENIZER_CONFIG and any(map(_too_many, settings.get("added_tokens_decoder") or ())):
        raise ModelError(f"{name}: {file} numbers words beyond {MOST_WORDS:,}; a list of all words is made of that")
    if file == CONFIG and (scheme := next((key for key in _QUANTISED if _holds(settings, key)), None)):
        raise ModelError(f"{name} has quantised weights ({scheme} in {CONFIG}); give it unquantised, as plain floats")
    kind = _CLASSES.get(file)
    return settings if kind is None else _what(settings, kind, deep=file == CONFIG)


def _too_many(number: Any) -> bool:
    return str(number).isdecimal() and int(number) > MOST_WORDS


def _what(value: Any, kind: type, *, deep: bool) -> Any:
    """``value`` without settings that say how, and without names that would replace a method of ``kind``.

    ``deep`` also looks inside: configurations hold configurations, but a tokenizer holds words, which may be any.
    """
    if isinstance(value, list):
        return [_what(entry, kind, deep=deep) for entry in value] if deep else value
    if not isinstance(value, dict):
        return value
    return {
        key: _what(entry, kind, deep=deep) if deep else entry
        for key, entry in value.items()
        if not _HOW.fullmatch(key) and not callable(getattr(kind, key, None))
    }


def _holds(settings: Any, key: str) -> bool:
    """Whether a setting has a value, at any depth."""
    if isinstance(settings, list):
        return any(_holds(entry, key) for entry in settings)
    if not isinstance(settings, dict):
        return False
    return settings.get(key) is not None or any(_holds(entry, key) for entry in settings.values())


# --- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What the files of a model hold, read from their headers: how many tensors and weights."""

    tensors: int
    weights: int


def held(folder: Folder, name: str) -> Held:
    """The tensors in a folder's ``*.safetensors``. Cost: their headers. Raises ModelError for a damaged file."""
    shapes: list[list[int]] = []
    for path in sorted(folder.path.glob("*.safetensors")):
        with as_model_error(f"cannot open the model in {name}: {path.name}"), safe_open(path, "pt") as file:
            shapes += [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 (no mapping)
    return Held(len(shapes), sum(map(math.prod, shapes)))


def require_counts(settings: Any, tensors: int, name: str, key: str = "", where: str = CONFIG) -> None:
    """Raise ModelError for a whole number in a configuration that is too large for a model of so many tensors.

    Classes make lists of such lengths as soon as they are given the configuration.
    """
    if isinstance(settings, dict):
        for inner, value in settings.items():
            require_counts(value, tensors, name, inner, where)
    elif isinstance(settings, list):
        for value in settings:
            require_counts(value, tensors, name, key, where)
    elif isinstance(settings, int):
        if _LAYERS.search(key):
            most = max(tensors, MOST_LAYERS)
        elif _EXPERTS.search(key):
            most = max(tensors, MOST_EXPERTS)
        else:
            most = 2**63 - 1 if _FREE.search(key) else LARGEST
        if abs(settings) > most:
            raise ModelError(
                f"{name}: {where} has {shown(key)} {shown(f'{settings:,}')}, but {most:,} is the most that a model of "
                f"{tensors:,} tensors can have"
            )


def require_sizes(
    build: Callable[[], nn.Module], weights: int, dtype: torch.dtype, name: str, where: str = CONFIG
) -> None:
    """Raise ModelError if the model that ``build`` makes is much larger than the ``weights`` that its files hold.

    It is built without memory, on torch's device "meta".
    """
    with torch.device("meta"), no_init_weights():
        skeleton = build()
    described = sum(parameter.numel() for parameter in skeleton.parameters())
    needed = described * dtype.itemsize + sum(buffer.numel() * buffer.itemsize for buffer in skeleton.buffers())
    if needed > 2 * weights * dtype.itemsize + ALLOWANCE:
        raise ModelError(
            f"{name}: {where} describes a model of {described:,} weights that takes {needed / 2**20:,.0f} MiB, but "
            f"there are only {weights:,} weights: they do not belong together"
        )
