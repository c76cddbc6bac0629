"""Prompts from a file, each with its line number, so that an error can name the line."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from surgery.records import tables


def read_prompts(path: str | Path, most: int | None = None) -> list[tuple[int, str]]:
    """Read the first ``most`` prompts of a file (all if not given), each with its line number, counted from 1.

    ``.jsonl``: a JSON object with a ``"text"`` on each line. Anything else: text, one prompt per line; empty lines are
    skipped.

    Raises:
        ValueError: the file is missing, empty or not text, or a line is not JSON or has no text; that line is named.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {tables.reason(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: byte {error.start} is not UTF-8; give a text or .jsonl file") from error
    if any("\0" in line for line in lines):
        raise ValueError(f"{path} is not text: it contains null bytes; give a text or .jsonl file")
    prompts = list(_texts(path, lines, most))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: it is empty; give one prompt per line")
    return prompts


def _texts(path: Path, lines: Sequence[str], most: int | None) -> Iterator[tuple[int, str]]:
    count = 0
    for number, line in enumerate(lines, start=1):
        if count == most:
            return
        if line.strip():
            count += 1
            yield number, _text(path, number, line) if path.suffix == ".jsonl" else line


def _text(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f'{path}, line {number} has no text; expected {{"text": "..."}}')
    return entry["text"]
