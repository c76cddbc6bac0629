"""Formats of other tools: read which layers run into a list of layer indices, and write such a list back.

RYS (D. Ng): blocks ``(i, j)`` with the path ``0..j-1, i..n-1``. Several blocks are one walk: run on to ``j``, jump to
``i``, run on to the next ``j``; so ``3,6;4,6`` is ``:6 3:6 4:``. ``(0, 0)`` is the model as it is; ``j < i`` skips.

Paths (exllamav3, llm-circuit-finder): comma-separated layers and spans ``first..last``, **both ends included**; a span
may count down, and an open end is the model's first or last layer: ``..15,11..``.

mergekit: passthrough slices of one model, ``layer_range: [start, stop]``, half-open and upwards only.

These formats can only express whole layers, one after another. All errors are ``WiringError``.
"""

import operator
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, SupportsIndex

from surgery.wiring.steps import WiringError, no_layer, runs

_PATH = re.compile(r"\s*(?P<first>[0-9]{1,9})?(?P<dots>\.\.(?P<last>[0-9]{1,9})?)?\s*")
_PATH_EXAMPLE = "..{last},{start}.."


def read_rys(spec: str | Sequence[int] | Sequence[Sequence[int]], n_layers: int) -> list[int]:
    """Return the layers that RYS blocks run; ``spec`` is one block, several, or their text.

    >>> read_rys("3,6;4,6", 8)
    [0, 1, 2, 3, 4, 5, 3, 4, 5, 4, 5, 6, 7]
    """
    indices: list[int] = []
    at = 0
    for i, j in _blocks(spec):
        if not (0 <= i <= n_layers and 0 <= j <= n_layers):
            raise WiringError(f"the RYS block ({i}, {j}) leaves a model of {n_layers} layers: 0 <= i, j <= {n_layers}")
        if j < at:
            raise WiringError(f"the RYS block ({i}, {j}) is never reached, the walk is already at layer {at}")
        indices += range(at, j)
        at = i
    return [*indices, *range(at, n_layers)]


def _blocks(spec: Any) -> list[tuple[int, int]]:
    try:
        if isinstance(spec, str):
            blocks = [[int(number) for number in block.split(",")] for block in spec.split(";")]
        else:
            blocks = [spec] if len(spec) == 2 and isinstance(spec[0], SupportsIndex) else spec
        return [(operator.index(i), operator.index(j)) for i, j in blocks]
    except (TypeError, ValueError):
        raise WiringError(f'RYS blocks are written (4, 6), [(3, 6), (4, 6)] or "3,6;4,6", not {spec!r}') from None


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
    indices: list[int] = []
    place = 0
    for path in text.split(","):
        match = _PATH.fullmatch(path)
        if not match or not (match["first"] or match["dots"]):
            sentence = f"'{path.strip()}' is no layer or inclusive span such as 7, 0..3 or 5.."
            raise WiringError(sentence, n_layers, text, place, _PATH_EXAMPLE)
        for name in ("first", "last"):
            if match[name] and int(match[name]) >= n_layers:
                sentence = no_layer(int(match[name]), n_layers)
                raise WiringError(sentence, n_layers, text, place + match.start(name), _PATH_EXAMPLE)
        first = int(match["first"] or 0)
        last = int(match["last"] or n_layers - 1) if match["dots"] else first
        indices += range(first, last + 1) if first <= last else range(first, last - 1, -1)
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
    import yaml

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WiringError(f"this is not YAML: {' '.join(str(error).split())}") from None
    match config:
        case {"merge_method": "passthrough", "slices": [*slices]} if slices and "parameters" not in config:
            pass
        case _:
            raise WiringError(
                "only a mergekit configuration with merge_method: passthrough and plain slices is a wiring"
            )
    indices: list[int] = []
    models: list[Any] = []
    for number, piece in enumerate(slices, 1):
        match piece:
            case {"sources": [{"model": model, "layer_range": [int(start), int(stop)], **rest}], **options} if not (
                rest or options
            ):
                models.append(model)
            case _:
                raise WiringError(f"slice {number} should have one source, with model and layer_range and nothing else")
        if model != models[0]:
            raise WiringError(f"slice {number} is from another model, {model}; a wiring is of one, {models[0]}")
        if not 0 <= start < stop <= n_layers:
            sentence = f"slice {number} has no layers [{start}, {stop}] in a model of {n_layers}: half-open, upwards"
            raise WiringError(sentence)
        indices += range(start, stop)
    return indices


def write_mergekit(indices: Sequence[int], model_name: str) -> str:
    """Write the mergekit passthrough configuration that builds this list of layers.

    A span that counts down is written layer by layer.

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
    slices = [{"sources": [{"model": model_name, "layer_range": span}]} for span in spans]
    config = {"slices": slices, "merge_method": "passthrough"}
    return str(yaml.safe_dump(config, sort_keys=False, default_flow_style=None))
