r"""What every measurement leaves behind: a CSV file with documented columns, and a manifest: where it came from.

    series_windows.csv            one row per window; floats written so that they read back exactly
    series_windows.manifest.json  where the numbers come from (``surgery.records.manifest``), columns, sha256 of the CSV

A file appears under its final name whole or not at all: it is written under a temporary name in the same folder,
flushed to the disk, and renamed. The manifest is renamed first, so a CSV file never stands without one, and ``read``
compares the hash, so a CSV file that was edited or replaced afterwards is noticed.

>>> import pandas, tempfile
>>> folder = tempfile.mkdtemp()
>>> path = write(pandas.DataFrame({"start": [1], "stop": [3], "S": [0.1]}), f"{folder}/series_windows.csv", {"seed": 0})
>>> read(path)["S"].tolist()
[0.1]
"""

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas

_INTERVALS = {
    "R": "entry-read dependence of the window, 0 parallel to 1 serial, normalisation frozen at the clean run",
    "O": "error of the window's output when its layers run in parallel, 0 to 1, normalisation frozen",
    "S": "seriesness (R + O) / 2: 0 if no layer of the window reads another, 1 if each lives on the one before",
    "R_live": "R with the normalisation live: it counts rescaling by the norm as reading",
    "O_live": "O with the normalisation live",
    "S_live": "(R_live + O_live) / 2",
    "layernorm_share": "S_live - S: how much of the live value is the normalisation's doing",
    "N": "displacement null of R: how far the stream moved inside the window, relative to its size",
    "R_over_N": "R / N: above 1 the layers respond to what the window wrote more than to any displacement of that size",
    "R_shuffled": "content null of R: R with the written content exchanged between tokens of equal position",
    "loss_parallel_sum": "loss added by running the layers in parallel, updates summed (nats per token)",
    "loss_parallel_mean": "the same with the layers' outputs averaged (Sun et al. 2024)",
    "kl_parallel_sum": "KL(clean || parallel, updates summed) of the next-token distributions (nats per token)",
    "kl_parallel_mean": "the same with the layers' outputs averaged",
    "kappa": "the part of a deviation from the mean that the layer takes back: minus the slope of update on stream",
    "psi": "2 kappa / growth^2: 0 random walk, 1 stationary variance, above 1 contracting, below 0 explosive",
    "growth": "size of the layer's update relative to the stream, both centred",
    "variance_ratio_next": "variance of the stream leaving the layer over that entering it: 1 - 2 kappa + growth^2",
    "half_life": "layers like this one until half of a deviation is gone; empty unless kappa lies between 0 and 1",
    "kappa_excess": "kappa minus the larger of its rotated and token-shuffled nulls",
    "kappa_mechanical": "what an update of this size in any direction reads in normalised coordinates",
    "kappa_corrected": "in normalised coordinates: 1 - phi / phi_mechanical, what goes beyond that",
    "growth_order_shuffled": "growth with the layers in random order",
    "growth_untrained": "growth of the same layer with fresh weights",
}
_NULLS = {
    "rotated": "updates turned by a random rotation",
    "token_shuffled": "updates of other tokens",
    "order_shuffled": "layers in random order, updates brought to the layer's own size",
    "untrained": "the same architecture with fresh weights, updates brought to the layer's own size",
}
_DISPLACEMENTS = {
    "difference": "towards another prompt's token",
    "random": "in a random direction",
    "principal": "along a top principal component",
}
for _name, _meaning in _NULLS.items():
    _INTERVALS[f"kappa_{_name}"] = f"null of kappa: {_meaning}"
    _INTERVALS[f"kappa_excess_{_name}"] = f"kappa minus kappa_{_name}, from the same resamples"
for _name, _meaning in _DISPLACEMENTS.items():
    _INTERVALS[f"kappa_causal_{_name}"] = f"kappa by intervention: the stream at one token displaced {_meaning}"
    _INTERVALS[f"kappa_causal_{_name}_frozen"] = f"kappa_causal_{_name} with the normalisation frozen at the clean run"
COLUMNS: dict[str, str] = {
    "network": "which network the row is about",
    "start": "first layer of the window",
    "stop": "one past the last layer of the window",
    "layer": "layer, counted from 0",
    "regime": "the interval of kappa in a word: reverting, overshooting (above 1), growing (below 0), undecided ...",
    "restoring": "whether kappa's excess and every kind of displacement agree on a restoring force: yes, no, undecided",
    "n_prompts": "number of prompts, the unit of resampling",
    "n_massive": "tokens left out for massive activations (and each prompt's first, always)",
}
for _name, _meaning in _INTERVALS.items():
    COLUMNS[_name] = _meaning
    COLUMNS[f"{_name}_low"] = f"lower end of the 95 % interval of {_name} (bootstrap over prompts)"
    COLUMNS[f"{_name}_high"] = f"upper end of the 95 % interval of {_name}"

_REASONS = {
    errno.ENOSPC: "there is no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "there is no permission",
    errno.EPERM: "there is no permission",
    errno.EROFS: "the disk is read-only",
    errno.ENOENT: "it does not exist",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "it is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
}


def reason(error: OSError) -> str:
    """Why the operating system refused, in words."""
    return _REASONS.get(error.errno or 0) or (error.strerror or str(error) or type(error).__name__).lower()


def save(files: Mapping[Path, bytes]) -> None:
    """Write all the files whole or, when anything fails or interrupts, leave what stood there before.

    Raises ``OSError`` with one sentence naming the file and the reason: a full disk, no permission, a file in the way.
    """
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files}
    try:
        for path, content in files.items():
            try:
                with open(partial[path], "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(f"cannot write {path}: {reason(error)}") from error
        for path in files:
            try:
                os.replace(partial[path], path)
            except OSError as error:
                raise OSError(f"cannot write {path}: {reason(error)}") from error
    finally:
        for rest in partial.values():
            with contextlib.suppress(OSError):
                rest.unlink()


def folder(path: str | Path) -> Path:
    """Make the folder if need be and prove that it can be written to, before anything long is started.

    Raises ``OSError`` with one sentence if it cannot.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        trial = path / f".trial.{os.getpid()}.partial"
        trial.write_bytes(b"surgery")
        trial.unlink()
    except OSError as error:
        raise OSError(f"cannot write to the folder {path}: {reason(error)}; choose another one") from error
    return path


def write(
    frame: pandas.DataFrame,
    path: str | Path,
    manifest: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
) -> Path:
    """Write ``frame`` as CSV and, beside it, ``manifest`` with the meaning of the columns and the CSV's hash added.

    ``columns`` explains columns of your own. Floats are written with as many digits as reading them back exactly takes.
    Raises ``ValueError`` for a column that neither it nor ``COLUMNS`` explains, ``OSError`` where the files cannot be
    written.
    """
    path = Path(path)
    meanings = COLUMNS | dict(columns or {})
    unknown = [str(column) for column in frame.columns if column not in meanings]
    if unknown:
        raise ValueError(
            f"{path.name} has columns nobody explained: {', '.join(unknown)}; say what they mean in columns={{...}}"
        )
    single = frame.select_dtypes("float32").columns
    text = frame.astype(dict.fromkeys(single, "float64")).to_csv(index=False).encode()
    entries = {
        "file": path.name,
        "sha256": hashlib.sha256(text).hexdigest(),
        "rows": len(frame),
        **manifest,
        "types": {column: _type(frame[column]) for column in frame.columns},
        "columns": {column: meanings[column] for column in frame.columns},
    }
    save({manifest_path(path): (json.dumps(entries, indent=2) + "\n").encode(), path: text})
    return path


def read(path: str | Path) -> pandas.DataFrame:
    """The frame that ``write`` wrote, float for float.

    Raises ``ValueError`` if the file is missing, has no manifest, or is not the one its manifest describes.
    """
    path = Path(path)
    manifest, text = read_manifest(path), _bytes(path)
    if hashlib.sha256(text).hexdigest() != manifest["sha256"]:
        raise ValueError(
            f"{path} is not the file its manifest describes: it was changed, or a run was interrupted; measure it again"
        )
    words = pandas.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False, na_values=[""])
    kinds = manifest["types"]
    flags = {name: words[name] == "True" for name, kind in kinds.items() if kind == "flag"}
    return words.assign(**flags).astype({name: kind for name, kind in kinds.items() if kind in ("int", "float")})


def _type(values: pandas.Series) -> str:
    if pandas.api.types.is_bool_dtype(values):
        return "flag"
    if pandas.api.types.is_integer_dtype(values):
        return "int"
    return "float" if pandas.api.types.is_numeric_dtype(values) else "text"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of the CSV file at ``path``."""
    path = Path(path)
    try:
        manifest = json.loads(_bytes(manifest_path(path)))
    except ValueError as error:
        raise ValueError(f"{path} cannot be trusted without its manifest: {error}") from error
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise ValueError(f"{manifest_path(path)} is not a manifest: it names no sha256; measure {path.name} again")
    return manifest


def manifest_path(path: Path) -> Path:
    """``series_windows.csv`` -> ``series_windows.manifest.json``."""
    return path.with_name(f"{path.stem}.manifest.json")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {reason(error)}") from error
