"""Probes from a JSONL file: ``{"prompt": "2 + 2 =", "answer": "4", "group": "sums", "choices": ["4", "5"]}`` a line."""

import json
from pathlib import Path
from typing import Any

from surgery import outside
from surgery.corpus.questions import Probe
from surgery.corpus.text_files import read_lines

FIELDS = ("prompt", "answer", "group", "choices", "cluster")
EXPECTED = '{"prompt": "...", "answer": "..."}, with optional "group", "choices" and "cluster"'
LONGEST_NAME = 200  # characters of a group or cluster in a file


def read_probes(path: "str | Path") -> tuple[Probe, ...]:
    """The probes of a file, in its order; empty lines are skipped. Raises ValueError as ``probes.load`` does."""
    path = Path(path)
    probes = []
    for number, line in read_lines(path, "a .jsonl file"):
        try:
            probes.append(_probe(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not probes:
        raise ValueError(f"{path} holds no probe: it is empty; give one {EXPECTED} per line")
    return tuple(probes)


def _probe(line: str) -> Probe:
    try:
        entry = outside.read_json(line)
    except ValueError as error:
        raise ValueError(f"this {error}; expected {EXPECTED}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"this is not a JSON object; expected {EXPECTED}")
    for name in entry:
        if name not in FIELDS:
            raise ValueError(f'there is no field "{outside.shown(name)}"; there are {", ".join(FIELDS)}')
    for name in ("prompt", "answer"):
        if name not in entry:
            raise ValueError(f'"{name}" is missing; expected {EXPECTED}')
    for name in ("prompt", "answer", "group", "cluster"):
        if not isinstance(entry.get(name, ""), str):
            raise ValueError(f'"{name}" is not a string but {_json(entry[name])}')
    choices = entry.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f'"choices" is not a list of strings but {_json(choices)}')
    for name, words in {**entry, "choices": "".join(choices)}.items():
        try:
            outside.require_text(words)
        except ValueError as error:
            raise ValueError(f'"{name}" {error}') from error
    for name in ("group", "cluster"):
        if len(entry.get(name, "")) > LONGEST_NAME or "\0" in entry.get(name, ""):
            raise ValueError(f'"{name}" is no name: it has at most {LONGEST_NAME} characters, and none of them is null')
    return Probe(entry["prompt"], entry["answer"], entry.get("group", ""), tuple(choices), entry.get("cluster", ""))


def _json(value: Any) -> str:
    return outside.shown(json.dumps(value, ensure_ascii=False))
