"""Text from outside the program: JSON and YAML read within bounds, and any text shown on one line of a message.

Whatever a user, a file or a model brings comes in here, so that it costs little memory, little time and no traceback:
``read_json`` and ``read_yaml`` return a value or raise ``OutsideError``, whose message follows the name of the file.
"""

import functools
import json
import reprlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml  # imported where it is used: the wirings show text from outside and need no YAML

LONGEST_YAML = 200_000  # characters
DEEPEST_YAML = 100  # lists and mappings within each other
MOST_NODES = 10_000  # values of a YAML text with all its aliases written out: half a second of PyYAML
LONGEST_NUMBER = 100  # characters: YAML's numbers to the base 60 take time with the square of it
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_KINDS = {dict: "object", list: "list", str: "text", int: "number", float: "number"}
SHOWN = 60  # characters of foreign text in a message


class OutsideError(ValueError):
    """Text from outside that cannot be read; the message says what is wrong with it, without its whole content."""


def shown(value: Any, most: int = SHOWN) -> str:
    r"""``value`` for a message: its text, or ``repr`` of anything else, on one printable line and not too long.

    >>> shown("a\n\x1b[31mb\ud800"), shown("x" * 100, 5), shown([1, 2])
    ('a\\n\\x1b[31mb\\ud800', 'xxxxx...', '[1, 2]')
    """
    try:
        text = value if isinstance(value, str) else _short(most).repr(value)
    except Exception:  # a foreign object's repr, or a number of thousands of digits
        text = f"a value of type {type(value).__name__}"
    line = printable(text[: most + 1])
    return line if len(text) <= most else f"{line[:most]}..."


def _short(most: int) -> reprlib.Repr:
    """A ``repr`` that takes no more time or memory than it shows, whatever a list repeats or how deep it goes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most + 10
    return short


def printable(text: str) -> str:
    r"""``text`` with ``\n``, ``\u202e`` and so on in the place of what is no visible character or changes others."""
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return character.encode("unicode_escape").decode() if hidden else character


def require_text(text: str) -> str:
    """``text`` if it can be encoded. Raises OutsideError for half of a surrogate pair, which JSON lets through."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OutsideError(
            f"has half of a surrogate pair ({shown(text[error.start])}) at character {error.start + 1}: this is no text"
        ) from None
    return text


def content(path: Path, most: int | None = None) -> bytes:
    """All bytes of a file. Raises OSError if it cannot be read, OutsideError for a pipe, a device, or more than
    ``most`` bytes."""
    if path.exists() and not path.is_file():
        raise OutsideError("is not a file")
    if most is not None and path.stat().st_size > most:
        raise OutsideError(f"is longer than {most / 2**20:.0f} MiB")
    return path.read_bytes()


def read_json(text: "str | bytes") -> Any:
    """Parse JSON. Raises OutsideError for what is not JSON, is nested too deeply, or holds too long a number."""
    try:
        return json.loads(text)
    except RecursionError:
        raise OutsideError("is nested too deeply to be JSON that anybody wrote") from None
    except ValueError as error:  # malformed, a number of thousands of digits, or bytes in no known encoding
        raise OutsideError(f"is not JSON: {shown(str(error), 200)}") from None


def lacks(value: Any, shape: Any, name: str = "it") -> Iterator[str]:
    """What ``value`` lacks of a shape: a type, or a dictionary of the shapes of what it must hold by these names.

    >>> list(lacks({"a": {"b": "x"}, "c": True}, {"a": {"b": str, "d": str}, "c": int}))
    ['a.d is missing', 'c is true, which is no number']
    """
    kinds: Any = (int, float) if shape is float else (dict if isinstance(shape, dict) else shape,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and shape is not bool):
        yield f"{name} is {shown(json.dumps(value))}, which is no {_KINDS[kinds[-1]]}"
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            path = key if name == "it" else f"{name}.{key}"
            yield from lacks(value[key], inner, path) if key in value else [f"{path} is missing"]


def read_yaml(text: str) -> Any:
    """Parse YAML of plain values. Aliases count as what they stand for, so that a short text stays small.

    Raises OutsideError for what is not YAML, is too long, is nested too deeply, or grows beyond ``MOST_NODES`` values.
    """
    if len(text) > LONGEST_YAML:
        raise OutsideError(f"is too long for YAML: {len(text):,} characters, {LONGEST_YAML:,} are read")
    import yaml

    try:
        loader = _bounded_loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if (count := _size(node, {})) > MOST_NODES:
                raise OutsideError(f"holds more than {MOST_NODES:,} values, aliases written out ({count:.0e})")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise OutsideError("is nested too deeply to be YAML that anybody wrote") from None
    except OutsideError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, KeyError, IndexError) as error:
        # the parser; and dates, numbers and keys that look like some and are none
        raise OutsideError(f"is not YAML: {shown(' '.join(str(error).split()), 200)}") from None


@functools.cache
def _bounded_loader() -> type:
    """PyYAML's safe loader, which stops as soon as a text is too much; aliases are not followed yet."""
    import yaml

    class Loader(yaml.SafeLoader):
        nodes = depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.nodes, self.depth = self.nodes + 1, self.depth + 1
            if self.nodes > MOST_NODES:
                raise OutsideError(f"holds more than {MOST_NODES:,} values")
            if self.depth > DEEPEST_YAML:
                raise RecursionError
            node = super().compose_node(parent, index)
            if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
                raise OutsideError(f"has a number of {len(node.value):,} characters: {shown(node.value, 20)}")
            self.depth -= 1
            return node

    return Loader


def _size(node: "yaml.Node", known: dict[int, float]) -> float:
    """How many values a node stands for, every alias counted again; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # while it is being counted
        inside = node.value if isinstance(node.value, list) else []
        parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1.0 + sum(_size(part, known) for part in parts)
    return known[id(node)]
