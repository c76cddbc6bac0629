"""Checksums of what is written now and read back later, so that damage on the disk is told and gives no other result.

JSON objects carry theirs under ``CHECKSUM``; files of tensors (safetensors) in their metadata, over names, types,
shapes, values and what is said about them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from surgery import disk
from surgery.models.weights_hash import tensors_sha256

CHECKSUM, _ABOUT = "checksum", "state"


def sealed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries as JSON gives them back, and their checksum.

    >>> intact(sealed({"seed": 0})), intact(sealed({"seed": 0}) | {"seed": 1}), intact({"seed": 0})
    (True, False, True)
    """
    plain = json.loads(json.dumps(entries))
    return plain | {CHECKSUM: _of_json(plain)}


def intact(entries: Mapping[str, Any]) -> bool:
    """Whether entries are those that ``sealed`` gave; what carries no checksum, as in earlier versions, passes."""
    rest = {name: value for name, value in entries.items() if name != CHECKSUM}
    return entries.get(CHECKSUM, _of_json(rest)) == _of_json(rest)


def _of_json(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def pack(tensors: Mapping[str, Tensor], about: Any) -> bytes:
    """A safetensors file of tensors and of ``about``, which is anything that JSON holds."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about)
    return save(whole, {_ABOUT: text, CHECKSUM: _checksum(whole, text)})


def unpack(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors, and what was said about them, of a file that ``pack`` made.

    Raises ValueError, with what to do, for a file that cannot be read, is damaged, or is of an earlier version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}): remove it to begin again") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {disk.reason(error)}") from error
    if CHECKSUM not in metadata:
        raise ValueError(
            f"{path} has no checksum, as in earlier versions, and cannot be trusted: remove it to begin again"
        )
    if metadata[CHECKSUM] != _checksum(tensors, metadata.get(_ABOUT, "")):
        raise ValueError(
            f"{path} is not a whole checkpoint (it was changed since it was written): remove it to begin again"
        )
    return tensors, json.loads(metadata[_ABOUT])


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256(f"{tensors_sha256(tensors)}{text}".encode()).hexdigest()
