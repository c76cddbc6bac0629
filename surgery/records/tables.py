r"""Write and read the two files of a measurement: a CSV file with documented columns, and its manifest.

    series_windows.csv            one row per window; floats with enough digits to read back exactly
    series_windows.manifest.json  where the numbers come from (``surgery.records.manifest``), columns, sha256 of the CSV

A file appears under its final name whole or not at all (``surgery.disk``). The manifest is renamed first, so a CSV file
never exists without one, and ``read`` compares the hash, so it notices a CSV file that was edited or replaced
afterwards.

>>> import pandas as pd, tempfile
>>> folder = tempfile.mkdtemp()
>>> columns = {"start": "first layer", "stop": "layer after the last", "S": "0 parallel, 1 serial"}
>>> frame = pd.DataFrame({"start": [1], "stop": [3], "S": [0.1]})
>>> path = write(frame, f"{folder}/series_windows.csv", {"seed": 0}, columns)
>>> read(path)["S"].tolist()
[0.1]
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from surgery import disk


def write(
    frame: pd.DataFrame,
    path: str | Path,
    manifest: Mapping[str, Any],
    columns: Mapping[str, str],
) -> Path:
    """Write ``frame`` as CSV and, beside it, ``manifest`` with the columns' meaning and the CSV's hash.

    Returns the path of the CSV file. ``columns`` gives the meaning of each column: the ``COLUMNS`` of the module that
    measured, or your own. Floats are written with enough digits to read back exactly. Raises ``ValueError`` for a
    column that ``columns`` does not explain, ``OSError`` if the files cannot be written.
    """
    path = Path(path)
    unknown = [str(column) for column in frame.columns if column not in columns]
    if unknown:
        raise ValueError(
            f"{path.name} has columns without a meaning: {', '.join(unknown)}; say what they mean in columns={{...}}"
        )
    single = frame.select_dtypes("float32").columns
    text = frame.astype(dict.fromkeys(single, "float64")).to_csv(index=False).encode()
    entries = {
        "file": path.name,
        "sha256": hashlib.sha256(text).hexdigest(),
        "rows": len(frame),
        **manifest,
        "types": {column: _type(frame[column]) for column in frame.columns},
        "columns": {column: columns[column] for column in frame.columns},
    }
    disk.save({manifest_path(path): (json.dumps(entries, indent=2) + "\n").encode(), path: text})
    return path


def read(path: str | Path) -> pd.DataFrame:
    """Read back the frame that ``write`` wrote, exact in every float.

    Raises ``ValueError`` if the file is missing, has no manifest, or is not the one that its manifest describes.
    """
    path = Path(path)
    manifest, text = read_manifest(path), _bytes(path)
    if hashlib.sha256(text).hexdigest() != manifest["sha256"]:
        raise ValueError(
            f"{path} is not the file its manifest describes: it was changed, or a run was interrupted; measure it again"
        )
    strings = pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False, na_values=[""])
    types = manifest["types"]
    flags = {name: strings[name] == "True" for name, kind in types.items() if kind == "flag"}
    return strings.assign(**flags).astype({name: kind for name, kind in types.items() if kind in ("int", "float")})


def _type(values: pd.Series) -> str:
    if pd.api.types.is_bool_dtype(values):
        return "flag"
    if pd.api.types.is_integer_dtype(values):
        return "int"
    return "float" if pd.api.types.is_numeric_dtype(values) else "text"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of the CSV file at ``path``. Raises ``ValueError`` if it is missing or damaged."""
    path = Path(path)
    try:
        manifest = json.loads(_bytes(manifest_path(path)))
    except ValueError as error:
        raise ValueError(f"{path} cannot be trusted without its manifest: {error}") from error
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise ValueError(f"{manifest_path(path)} is not a manifest: it names no sha256; measure {path.name} again")
    return manifest


def manifest_path(path: Path) -> Path:
    """The path of a CSV file's manifest: ``series_windows.csv`` -> ``series_windows.manifest.json``."""
    return path.with_name(f"{path.stem}.manifest.json")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {disk.reason(error)}") from error
