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

import bisect
import hashlib
import io
import json
import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from surgery import disk, meanings
from surgery.outside import OutsideError, content, lacks, read_json, shown
from surgery.records import checked

_TEXT, _QUOTED = "text", "text, apostrophes before = + - @"  # types of columns; the second if a cell has one
_CELL = r"(?:\A|(?<=[;|\t\r\n]))"  # where a cell begins, whatever a spreadsheet takes for the end of one
_FORMULA = r"['\"]*[=+\-@\t\r\n＝＋－＠]"  # what a formula begins with, quotes or not
SHAPE: dict[str, Any] = {"sha256": str, "file": str, "rows": int, "types": {}, "columns": {}}  # of a manifest
_KINDS = ("flag", "int", "float", _TEXT, _QUOTED)
_UNREADABLE = (ValueError, TypeError, OverflowError)
_LONGEST_MANIFEST = 2**22  # bytes


def write(
    frame: pd.DataFrame,
    path: str | Path,
    manifest: Mapping[str, Any],
    columns: Mapping[str, str],
) -> Path:
    """Write ``frame`` as CSV and, beside it, ``manifest`` with the columns' meaning and the CSV's hash.

    Returns the path of the CSV file. ``columns`` gives the meaning of each column: the ``COLUMNS`` of the module that
    measured, or your own. Floats are written with enough digits to read back exactly. Text that a spreadsheet would run
    as a formula gets an apostrophe, which ``read`` takes away. Raises ``ValueError`` for a column that ``columns`` does
    not explain, ``OSError`` if the files cannot be written.
    """
    path = Path(path)
    unknown = [str(column) for column in frame.columns if column not in columns]
    if unknown:
        raise ValueError(
            f"{path.name} has columns without a meaning: {', '.join(unknown)}; say what they mean in columns={{...}}"
        )
    types = {column: _type(frame[column]) for column in frame.columns}
    single = frame.select_dtypes("float32").columns
    cells = frame.astype(dict.fromkeys(single, "float64"))
    for column in (column for column, kind in types.items() if kind == _TEXT):
        plain = list(frame[column])
        quoted = [_quoted(cell) for cell in plain]
        if any(ours is not cell for ours, cell in zip(quoted, plain)):
            cells[column], types[column] = pd.Series(quoted, frame.index, dtype=object), _QUOTED
    text = cells.rename(columns=_quoted).to_csv(index=False).encode()
    entries = {
        "file": path.name,
        "sha256": hashlib.sha256(text).hexdigest(),
        "rows": len(frame),
        **manifest,
        "types": types,
        "columns": {column: columns[column] for column in frame.columns},
    }
    manifest_text = json.dumps(checked.sealed(entries), indent=2) + "\n"
    disk.save({manifest_path(path): manifest_text.encode(), path: text})
    return path


def read(path: str | Path) -> pd.DataFrame:
    """Read back the frame that ``write`` wrote, exact in every float; ``attrs["columns"]`` says what its columns mean.

    Raises ``ValueError`` if the file is missing, has no manifest, or is not the one that its manifest describes.
    """
    path = Path(path)
    manifest, text = read_manifest(path), _bytes(path)
    if hashlib.sha256(text).hexdigest() != manifest["sha256"]:
        raise ValueError(
            f"{path} is not the file its manifest describes: it was changed, or a run was interrupted; measure it again"
        )
    try:
        return meanings.put(_typed(_cells(text, manifest), manifest["types"]), manifest["columns"])
    except ValueError as error:
        raise ValueError(f"{path} is not a table that surgery wrote: {shown(str(error), 300)}") from error


def _cells(text: bytes, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """The cells of a CSV file as text, NaN for an empty one. Raises ValueError for what ``write`` does not write."""
    cells = pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False, na_values=[""], lineterminator="\n")
    if not isinstance(cells.index, pd.RangeIndex):
        raise ValueError("its rows have more cells than its header")
    if (names := [_unquoted(str(name)) for name in cells]) != [*manifest["types"]]:
        raise ValueError(f"its columns are {names}, those of its manifest {[*manifest['types']]}")
    if len(cells) != manifest["rows"]:
        raise ValueError(f"it has {len(cells)} rows, its manifest says {manifest['rows']}")
    if cells.iloc[:, -1].isna().any():  # perhaps because a row is short
        lines = zip(text.split(b"\n"), cells.to_csv(index=False, lineterminator="\n").encode().split(b"\n"))
        for number, (line, whole) in enumerate(lines, start=1):
            if line != whole:
                raise ValueError(f"line {number} has too few cells")
    return cells.set_axis(names, axis="columns")


def _typed(cells: pd.DataFrame, types: Mapping[str, str]) -> pd.DataFrame:
    """The cells as what the manifest says they are. Raises ValueError, naming column and row, for one that is not."""
    try:
        flags = {name: _flags(cells[name]) for name, kind in types.items() if kind == "flag"}
        quoted = {name: cells[name].map(_unquoted, na_action="ignore") for name in types if types[name] == _QUOTED}
        exact = {name: kind for name, kind in types.items() if kind in ("int", "float")}
        return cells.assign(**flags, **quoted).astype(exact)
    except _UNREADABLE:
        name, kind = next((name, kind) for name, kind in types.items() if not _readable(cells[name], kind))
        column = cells[name]
        row = bisect.bisect_left(range(len(column)), True, key=lambda row: not _readable(column[: row + 1], kind))
        raise ValueError(f"row {row + 1} has {shown(column[row])!r} under {name}, which is no {kind}") from None


def _flags(column: pd.Series) -> pd.Series:
    return column.map({"True": True, "False": False}).astype("boolean").astype("bool")


def _readable(column: pd.Series, kind: str) -> bool:
    try:
        if kind == "flag":
            _flags(column)
        elif kind not in (_TEXT, _QUOTED):
            column.astype(float if kind == "float" else int)
    except _UNREADABLE:
        return False
    return True


def _type(values: pd.Series) -> str:
    if pd.api.types.is_bool_dtype(values):
        return "flag"
    if pd.api.types.is_integer_dtype(values):
        return "int"
    return "float" if pd.api.types.is_numeric_dtype(values) else _TEXT


def _quoted(cell: Any) -> Any:
    """A cell with an apostrophe wherever a spreadsheet would begin to read a formula; numbers as they are.

    >>> [_quoted(cell) for cell in ("=1+1", "'=1+1", "'tis", "a;-b", "repeat", -0.5)]
    ["'=1+1", "''=1+1", "'tis", "a;'-b", 'repeat', -0.5]
    """
    if isinstance(cell, numbers.Number) or (pd.api.types.is_scalar(cell) and pd.isna(cell)):
        return cell
    text = str(cell)
    quoted = re.sub(f"{_CELL}(?={_FORMULA})", "'", text)
    return cell if quoted == text else quoted


def _unquoted(cell: str) -> str:
    """Undo ``_quoted``.

    >>> [_unquoted(cell) for cell in ("'=1+1", "''=1+1", "'tis", "a;'-b")]
    ['=1+1', "'=1+1", "'tis", 'a;-b']
    """
    return re.sub(f"{_CELL}'(?={_FORMULA})", "", cell)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of the CSV file at ``path``. Raises ``ValueError`` if it is missing or damaged."""
    path = Path(path)
    place = manifest_path(path)
    try:
        manifest = read_json(_bytes(place, _LONGEST_MANIFEST))
    except OutsideError as error:
        raise ValueError(f"{path} cannot be trusted without its manifest: {place} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be trusted without its manifest: {error}") from error
    if lacking := next(lacks(manifest, SHAPE), None):
        raise ValueError(f"{place} is not a manifest: {lacking}; measure {path.name} again")
    if not checked.intact(manifest):
        raise ValueError(f"{place} was changed since it was written; measure {path.name} again")
    types, columns = manifest["types"], manifest["columns"]
    if [*types] != [*columns] or not all(isinstance(text, str) for text in (*types.values(), *columns.values())):
        raise ValueError(
            f"{place} is not a manifest: its types are not those of its columns; measure {path.name} again"
        )
    if unknown := [kind for kind in types.values() if kind not in _KINDS]:
        raise ValueError(f"{place} is not a manifest: {shown(unknown[0])!r} is no type; measure {path.name} again")
    return dict(manifest)


def manifest_path(path: Path) -> Path:
    """The path of a CSV file's manifest: ``series_windows.csv`` -> ``series_windows.manifest.json``."""
    return path.with_name(f"{path.stem}.manifest.json")


def _bytes(path: Path, most: int | None = None) -> bytes:
    try:
        return content(path, most)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {disk.reason(error)}") from error
    except OutsideError as error:
        raise ValueError(f"{path} {error}") from error
