"""Prompts from a file, each with its line number, so that an error can name the line.

A file is read as a stream: its first prompts cost the same whatever comes after them.
"""

import codecs
import functools
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery import disk, outside

LINES, WHOLE = (".jsonl", ".ndjson"), ".json"  # a JSON object a line; one JSON list
OTHERS = (".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".html", ".ipynb")  # text, but not one prompt a line
LONGEST = 2**21  # bytes of a line, or of an entry of a list: more than any model reads at once
_PIECE = 2**16  # bytes of a list read at a time
_BLANK = " \t\r\n"
_MARK = re.compile(rf"[{_BLANK}]*([\[,\]])[{_BLANK}]*")  # what stands before an entry of a list, or at its end
_LIST = '[{"text": "..."}, ...], or one object a line in .jsonl'


def read_lines(path: Path, kinds: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file in UTF-8, with or without a byte order mark, each with its number, counted from 1.

    A line ends at a newline, after which a carriage return is dropped, and nowhere else: U+2028, form feeds and the
    like are part of the text. Blank lines count and are left out. Memory: one line.

    Raises ValueError if the file is missing, or at a line that is not text or too long; ``kinds`` says what to give
    instead.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(functools.partial(file.readline, LONGEST + 1), b""), start=1):
                if not line.isspace() and (text := _line(f"{path}, line {number}", line, number == 1, kinds)).strip():
                    yield number, text
    except OSError as error:
        raise ValueError(f"cannot read {path}: {disk.reason(error)}") from error


def read_prompts(path: str | Path, most: int | None = None) -> list[tuple[int, str]]:
    """Read the first ``most`` prompts of a file (all if not given), each with its line number, counted from 1.

    ``.jsonl`` and ``.ndjson``: a JSON object with a ``"text"`` on each line. ``.json``: a list of such objects or of
    strings, numbered from 1. Other formats (``.csv``, ``.yaml``, ...) are refused, and anything else is text, one
    prompt per line. Suffixes may be in capitals; empty lines are skipped. What follows the last of them is not read.

    Raises:
        ValueError: the file is missing, empty or not text; or a line is longer than ``LONGEST`` bytes, is not JSON, has
            no text, or has half of a surrogate pair, which no model can read; that line is named.
    """
    path = Path(path)
    if path.suffix.lower() in OTHERS:
        raise ValueError(f"{path}: prompts are not read from {path.suffix} files; give .jsonl, or text with one a line")
    prompts = [prompt for prompt, _ in zip(_texts(path), range(most))] if most is not None else list(_texts(path))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: it is empty; give one prompt per line")
    return prompts


def same(text: str) -> str:
    """What two texts have in common that differ in spacing, case or the form of a letter only (Unicode's NFKC).

    >>> same(" The  cat\tsat. ") == same("the cat sat.")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    kind = path.suffix.lower()
    if kind == WHOLE:
        for number, entry in enumerate(_entries(path), start=1):
            yield number, _text(f"{path}, entry {number}", {"text": entry} if isinstance(entry, str) else entry)
        return
    for number, line in read_lines(path, "a text or .jsonl file"):
        where = f"{path}, line {number}"
        yield number, _text(where, _json(where, line)) if kind in LINES else line


def _line(where: str, line: bytes, first: bool, kinds: str) -> str:
    if len(line) > LONGEST:
        raise ValueError(f"{where} is longer than {LONGEST / 2**20:.0f} MiB; cut it into several")
    if b"\0" in line:
        raise ValueError(f"{where} is not text: it contains null bytes; give {kinds} in UTF-8")
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text: byte {error.start + 1} is not UTF-8; give {kinds} in UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")


def _entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, one at a time. Memory: the longest entry, which ``LONGEST`` bounds."""
    scan, decode = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8-sig")().decode
    text, place, number, expected, more = "", 0, 1, "[", True
    try:
        with open(path, "rb") as file:
            while True:
                mark, problem = _MARK.match(text, place), "it ends too soon"
                if mark and mark[1] in expected:
                    if mark[1] == "]" or (mark[1] == "[" and text.startswith("]", mark.end())):
                        return
                    try:
                        entry, end = scan(text, mark.end())
                        if end < len(text):  # or else a number may go on
                            yield entry
                            place, number, expected = end, number + 1, ",]"
                            continue
                    except RecursionError:
                        problem, more = "it is nested too deeply", False
                    except ValueError as error:  # perhaps because the rest of it is not read yet
                        problem = outside.shown(getattr(error, "msg", str(error)))
                elif text[place:].strip(_BLANK):
                    if expected == "[":
                        raise ValueError(f"{path} is not a JSON list; expected {_LIST}")
                    problem, more = "there is no comma before it", False
                elif not more and expected == "[":
                    return  # nothing but blanks
                if not more or len(text) - place >= LONGEST:
                    problem += f", or it is longer than {LONGEST / 2**20:.0f} MiB" * more
                    raise ValueError(f"{path}, entry {number} is not JSON: {problem}")
                piece = file.read(max(_PIECE, len(text) - place))
                more = len(piece) > 0
                text, place = text[place:] + decode(piece, not more), 0
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, entry {number} is not text: {error.reason}; give it in UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {disk.reason(error)}") from error


def _json(where: str, content: str) -> Any:
    try:
        return outside.read_json(content)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _text(where: str, entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f'{where} has no text; expected {{"text": "..."}}')
    try:
        return outside.require_text(entry["text"])
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
