"""Formats of other tools: read which layers run into a list of layer indices, and write such a list back.

RYS (D. Ng): blocks ``(i, j)`` with the path ``0..j-1, i..n-1``. Several blocks are one walk: run on to ``j``, jump to
``i``, run on to the next ``j``; so ``3,6;4,6`` is ``:6 3:6 4:``. ``(0, 0)`` is the model as it is; ``j < i`` skips.

Paths (exllamav3, llm-circuit-finder): comma-separated layers and spans ``first..last``, **both ends included**; a span
may count down, and an open end is the model's first or last layer: ``..15,11..``.

mergekit: passthrough slices of one model, ``layer_range: [start, stop]``, half-open and upwards only.

These formats can only express whole layers, one after another. All errors are ``WiringError``, but for a TypeError
where something else than a text is to be read as one. Cost: linear in the length of what is read and written.
"""

import operator
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from surgery.outside import LONGEST_YAML, OutsideError, read_yaml, shown
from surgery.wiring.steps import (
    LONGEST,
    WiringError,
    extend,
    no_layer,
    quoted,
    require_layers,
    require_text,
    runs,
    too_long,
)

MOST_SLICES = 800  # of a mergekit configuration: YAML of about as many values as are read
_BLOCK = re.compile(r"\s*(-?[0-9]{1,9})\s*,\s*(-?[0-9]{1,9})\s*")
_PATH = re.compile(r"(?P<first>[0-9]{1,9})?(?P<dots>\.\.(?P<last>[0-9]{1,9})?)?")
_PATH_EXAMPLE = "..{last},{start}.."


def read_rys(spec: str | Sequence[int] | Sequence[Sequence[int]], n_layers: int) -> list[int]:
    """Return the layers that RYS blocks run; ``spec`` is one block, several, or their text.

    >>> read_rys("3,6;4,6", 8)
    [0, 1, 2, 3, 4, 5, 3, 4, 5, 4, 5, 6, 7]
    """
    n_layers = require_layers(n_layers)
    indices: list[int] = []
    at = 0
    for i, j in _blocks(spec):
        block = f"the RYS block ({shown(i)}, {shown(j)})"
        if not (0 <= i <= n_layers and 0 <= j <= n_layers):
            raise WiringError(f"{block} leaves a model of {n_layers} layers: 0 <= i, j <= {n_layers}")
        if j < at:
            raise WiringError(f"{block} is never reached, the walk is already at layer {at}")
        extend(indices, range(at, j))
        at = i
    extend(indices, range(at, n_layers))
    return indices


def _blocks(spec: Any) -> list[tuple[int, int]]:
    """The blocks of a text, of a list of pairs, or of one pair; arrays are read as the lists that they hold."""
    try:
        if isinstance(spec, str):
            return [_block(text) for text in spec.split(";", LONGEST + 1)]
        rows = _listed(spec)
        pairs = [rows] if len(rows) == 2 and not hasattr(rows[0], "__len__") else rows
        if len(pairs) > LONGEST + 1:  # no wiring jumps so often
            raise ValueError
        return [(_index(i), _index(j)) for i, j in map(_listed, pairs)]
    except (TypeError, ValueError):
        raise WiringError(f'RYS blocks are written (4, 6), [(3, 6), (4, 6)] or "3,6;4,6", not {quoted(spec)}') from None


def _block(text: str) -> tuple[int, int]:
    if not (match := _BLOCK.fullmatch(text)):
        raise ValueError
    return int(match[1]), int(match[2])


def _listed(value: Any) -> Sequence[Any]:
    """``value`` as a list or tuple; TypeError for what has no order (dictionaries, sets) and for text and bytes."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise TypeError
    return value


def _index(value: Any) -> int:
    if isinstance(value, bool):  # an int to Python, but nobody's layer
        raise TypeError
    return operator.index(value)


def write_rys(indices: Sequence[int], n_layers: int) -> list[tuple[int, int]]:
    """Return the RYS blocks whose walk is this list of layers, one block for every jump.

    >>> write_rys([0, 1, 2, 3, 4, 5, 3, 4, 5, 4, 5, 6, 7], 8)
    [(3, 6), (4, 6)]
    """
    walk = [-1, *indices, n_layers]
    return [(after, before + 1) for before, after in pairwise(walk) if after != before + 1] or [(0, 0)]


def read_paths(text: str, n_layers: int) -> list[int]:
    """Return the layers of inclusive paths.

    >>> read_paths("..3,2..,1..0", 6)
    [0, 1, 2, 3, 2, 3, 4, 5, 1, 0]
    """
    n_layers = require_layers(n_layers)
    if require_text(text, "a list of paths").count(",") >= LONGEST:  # each has a layer
        raise WiringError(too_long())
    indices: list[int] = []
    place = 0
    for path in text.split(","):
        start = place + len(path) - len(path.lstrip())
        match = _PATH.fullmatch(path.strip())
        if not match or not (match["first"] or match["dots"]):
            sentence = f"'{shown(path.strip())}' is no layer or inclusive span such as 7, 0..3 or 5.."
            raise WiringError(sentence, n_layers, text, place, _PATH_EXAMPLE)
        for name in ("first", "last"):
            if match[name] and int(match[name]) >= n_layers:
                sentence = no_layer(int(match[name]), n_layers)
                raise WiringError(sentence, n_layers, text, start + match.start(name), _PATH_EXAMPLE)
        first = int(match["first"] or 0)
        last = int(match["last"] or n_layers - 1) if match["dots"] else first
        extend(indices, range(first, last + 1) if first <= last else range(first, last - 1, -1))
        place += len(path) + 1
    return indices


def write_paths(indices: Sequence[int]) -> str:
    """Write a list of layers as inclusive paths.

    >>> write_paths([0, 1, 2, 3, 2, 3, 4, 5])
    '0..3,2..5'
    """
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs(indices))


def read_mergekit(text: str, n_layers: int) -> list[int]:
    """Return the layers of a mergekit passthrough configuration of one model; refuse anything that alters weights."""
    n_layers = require_layers(n_layers)
    try:
        config = read_yaml(require_text(text, "a mergekit configuration"))
    except OutsideError as error:
        raise WiringError(f"this {error}") from None
    match config:
        case {"merge_method": "passthrough", "slices": [*slices]} if slices and "parameters" not in config:
            pass
        case _:
            raise WiringError(
                "only a mergekit configuration with merge_method: passthrough and plain slices is a wiring"
            )
    indices: list[int] = []
    models: list[str] = []
    for number, piece in enumerate(slices, 1):
        match piece:
            case {"sources": [{"model": model, "layer_range": span, **rest}], **options} if not (rest or options):
                pass
            case _:
                raise WiringError(f"slice {number} should have one source, with model and layer_range and nothing else")
        if not isinstance(model, str):
            raise WiringError(f"slice {number} should name its model, not {shown(model)}: put a name into quotes")
        models.append(model)
        if model != models[0]:
            names = f"{shown(model)}; a wiring is of one, {shown(models[0])}"
            raise WiringError(f"slice {number} is from another model, {names}")
        start, stop = _span(span, number)
        if not 0 <= start < stop <= n_layers:
            layers = f"[{shown(start)}, {shown(stop)}] in a model of {n_layers}"
            raise WiringError(f"slice {number} has no layers {layers}: half-open, upwards")
        extend(indices, range(start, stop))
    return indices


def _span(span: Any, number: int) -> tuple[int, int]:
    try:
        start, stop = _listed(span)
        return _index(start), _index(stop)
    except (TypeError, ValueError):
        sentence = f"slice {number} should have one source with a layer_range such as [0, 6], not {quoted(span)}"
        raise WiringError(sentence) from None


def write_mergekit(indices: Sequence[int], model_name: str) -> str:
    """Write the mergekit passthrough configuration that builds this list of layers.

    A span that counts down is written layer by layer. Raises WiringError for a model's name that is no text or too
    long, and for more than ``MOST_SLICES`` slices.

    >>> print(write_mergekit([0, 1, 2, 1, 2, 3], "gpt2"))
    slices:
    - sources:
      - model: gpt2
        layer_range: [0, 3]
    - sources:
      - model: gpt2
        layer_range: [1, 4]
    merge_method: passthrough
    <BLANKLINE>
    """
    import yaml

    spans: list[list[int]] = []
    for first, last in runs(indices):
        upwards = first <= last
        spans += [[first, last + 1]] if upwards else [[index, index + 1] for index in range(first, last - 1, -1)]
    if len(spans) > MOST_SLICES:
        raise WiringError(f"this wiring takes {len(spans)} slices, a mergekit configuration has at most {MOST_SLICES}")
    if not isinstance(model_name, str) or len(model_name) * len(spans) > LONGEST_YAML:
        raise WiringError(f"a model is named by a text of reasonable length, not by {quoted(model_name)}")
    slices = [{"sources": [{"model": model_name, "layer_range": span}]} for span in spans]
    config = {"slices": slices, "merge_method": "passthrough"}
    text = str(yaml.safe_dump(config, sort_keys=False, default_flow_style=None))
    if len(text) > LONGEST_YAML:
        raise WiringError(f"{len(spans)} slices of {quoted(model_name)} are longer than a mergekit configuration is")
    return text
