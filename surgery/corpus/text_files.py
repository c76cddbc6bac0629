"""Prompts from a file, each with its line number, so that an error can name the line."""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery import disk

LINES, WHOLE = (".jsonl", ".ndjson"), ".json"  # a JSON object a line; one JSON list
OTHERS = (".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".html", ".ipynb")  # text, but not one prompt a line


def read_lines(path: Path, kinds: str) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark.

    A line ends at a newline, after which a carriage return is dropped, and nowhere else: U+2028, form feeds and the
    like are part of the text.

    Raises ValueError if the file is missing or not text; ``kinds`` says what to give instead.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {disk.reason(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: byte {error.start} is not UTF-8; give {kinds}") from error
    if "\0" in text:
        raise ValueError(f"{path} is not text: it contains null bytes; give {kinds}")
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_prompts(path: str | Path, most: int | None = None) -> list[tuple[int, str]]:
    """Read the first ``most`` prompts of a file (all if not given), each with its line number, counted from 1.

    ``.jsonl`` and ``.ndjson``: a JSON object with a ``"text"`` on each line. ``.json``: a list of such objects or of
    strings, numbered from 1. Other formats (``.csv``, ``.yaml``, ...) are refused, and anything else is text, one
    prompt per line. Suffixes may be in capitals; empty lines are skipped.

    Raises:
        ValueError: the file is missing, empty or not text, or a line is not JSON or has no text; that line is named.
    """
    path = Path(path)
    if path.suffix.lower() in OTHERS:
        raise ValueError(f"{path}: prompts are not read from {path.suffix} files; give .jsonl, or text with one a line")
    lines = read_lines(path, "a text or .jsonl file")
    prompts = list(_texts(path, lines, most))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: it is empty; give one prompt per line")
    return prompts


def same(text: str) -> str:
    """What two texts have in common that differ in spacing, case or the form of a letter only (Unicode's NFKC).

    >>> same(" The  cat\tsat. ") == same("the cat sat.")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _texts(path: Path, lines: list[str], most: int | None) -> Iterator[tuple[int, str]]:
    kind, count = path.suffix.lower(), 0
    entries: list[Any] = lines
    if kind == WHOLE:
        entries = _list(path, "\n".join(lines))
    for number, entry in enumerate(entries, start=1):
        if count == most:
            return
        if kind == WHOLE:
            text = entry if isinstance(entry, str) else _text(f"{path}, entry {number}", entry)
        elif not entry.strip():
            continue
        elif kind in LINES:
            text = _text(f"{path}, line {number}", _json(f"{path}, line {number}", entry))
        else:
            text = entry
        count += 1
        yield number, text


def _list(path: Path, content: str) -> list[Any]:
    entries = _json(str(path), content) if content.strip() else []
    if not isinstance(entries, list):
        raise ValueError(
            f'{path} is not a JSON list; expected [{{"text": "..."}}, ...], or one object a line in .jsonl'
        )
    return entries


def _json(where: str, content: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _text(where: str, entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f'{where} has no text; expected {{"text": "..."}}')
    return str(entry["text"])
