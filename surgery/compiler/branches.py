"""Wirings of branches: layers and sublayers side by side, in step or each on a stream of its own.

A division is a wiring whose steps are sublayers, or groups of them, and its depth is the number of sublayers in a row.
Two spans of equal depth that follow each other are put side by side in one of two ways, which save as many sublayers:

``beside``    each span reads the stream as it was before both, and what it wrote itself
``in step``   the first steps of both read one stream, then the second steps what both left, and so on

===========================  =================================  ===============================================
spans                        beside                             in step
===========================  =================================  ===============================================
``7.mlp``, ``8.attn``        ``7.attn {7.mlp | 8.attn} 8.mlp``  the same
``7``, ``8``                 ``{7 | 8}``                        ``{7.attn | 8.attn} {7.mlp | 8.mlp}``
``7 8``, ``9 10``            ``{7 8 | 9 10}``                   ``{7.attn | 9.attn} {7.mlp | 9.mlp}`` and 8, 10
===========================  =================================  ===============================================

What is in step can be fused into one layer a group (``surgery.rebuild.fuse``) if it is made of whole layers. What is
beside cannot, as no two branches read one stream: it pays only where branches run at the same time, on machines or
streams of their own. It says what more freedom of wiring is worth. Averages of whole layers: Sun et al. 2024 (arXiv
2407.09298); attention beside the MLP of its own layer: GPT-J (Wang and Komatsuzaki 2021).
"""

from collections.abc import Iterator

from surgery.wiring.steps import Chain, Layer, Parallel, Scaled, Step, executions
from surgery.wiring.value import Wiring

SPANS = (1, 2, 4)  # sublayers in a row that are put side by side: one, a layer, a chain of two layers
MOST = 4  # branches side by side


def in_a_row(chain: Chain) -> int:
    """Sublayers one after another on the longest way through a chain: what no number of branches at once can shorten.

    >>> [in_a_row(Wiring.parse(text, 12).steps) for text in ("7 8", "{7 | 8}", "{7 8 | 9}", "7.attn {7.mlp|8.attn}")]
    [4, 2, 4, 2]
    """
    return sum(map(_depth, chain))


def _depth(step: Step) -> int:
    match step:
        case Parallel(branches):
            return max(map(in_a_row, branches))
        case Scaled(_, body):
            return in_a_row(body)
        case Layer(_, part):
            return 2 if part is None else 1


def sublayers(wiring: Wiring) -> Wiring:
    """A wiring with every whole layer written as its attention and its MLP, outside groups.

    >>> sublayers(Wiring.of(2))
    Wiring.parse("0.attn 0.mlp 1.attn 1.mlp", 2)
    """
    steps: list[Step] = []
    for step in wiring.steps:
        match step:
            case Layer(index, None):
                steps += Layer(index, "attn"), Layer(index, "mlp")
            case _:
                steps.append(step)
    return Wiring(wiring.n_layers, tuple(steps))


def notation(wiring: Wiring) -> str:
    """The wiring with every attention that its own MLP follows written as a whole layer, in groups too.

    >>> notation(sublayers(Wiring.of(12))), notation(Wiring.parse(":7 {7.attn 7.mlp | 8.attn 8.mlp} 9:", 12))
    (':', ':7 {*7:9} 9:')
    """
    return str(Wiring(wiring.n_layers, _joined(wiring.steps)))


def _joined(chain: Chain) -> Chain:
    steps: list[Step] = []
    for step in chain:
        if isinstance(step, Parallel):
            step = Parallel(tuple(map(_joined, step.branches)), step.mean)
        if isinstance(step, Layer) and step.part == "mlp" and steps and steps[-1] == Layer(step.index, "attn"):
            steps[-1] = Layer(step.index)
        else:
            steps.append(step)
    return tuple(steps)


def moves(wiring: Wiring) -> "dict[tuple[str, int], Wiring]":
    """Every wiring in which two spans that follow each other run side by side, by how and the layer where they met.

    Spans of more than one sublayer meet where a layer begins.

    >>> for (how, layer), wiring in moves(sublayers(Wiring.of(3))).items():
    ...     if layer == 1:
    ...         print(f"{how:14} {notation(wiring)}")
    beside 1 attn  0.attn {1.attn | 0.mlp} 1.mlp 2
    beside 2 attn  {*:2} 2
    in step 2 attn {*:2.attn} {*:2.mlp} 2
    beside 1 mlp   0 {1.attn | 1.mlp} 2
    """
    steps, result = wiring.steps, dict[tuple[str, int], Wiring]()
    for place in range(1, len(steps)):
        meeting = min(executions(steps[place : place + 1]), key=lambda layer: (layer.index, layer.part or ""))
        for length in SPANS if meeting.part != "mlp" else SPANS[:1]:
            back, ahead = _reach(steps[:place][::-1], length), _reach(steps[place:], length)
            if back is None or ahead is None:
                continue
            start, stop = place - back, place + ahead
            for how, side_by_side in _ways(steps[start:place], steps[place:stop]):
                if max(map(_width, side_by_side)) <= MOST:
                    divided = Wiring(wiring.n_layers, (*steps[:start], *side_by_side, *steps[stop:]))
                    result[f"{how} {length} {meeting.part}", meeting.index] = divided
    return result


def _ways(first: Chain, second: Chain) -> Iterator[tuple[str, Chain]]:
    yield "beside", (Parallel((first, second)),)
    if len(first) > 1 and list(map(_depth, first)) == list(map(_depth, second)):
        yield "in step", tuple(Parallel(((one,), (other,))) for one, other in zip(first, second, strict=True))


def _reach(chain: Chain, length: int) -> int | None:
    """How many steps of a chain have so many sublayers in a row; None if no number has."""
    depth = 0
    for count, step in enumerate(chain, 1):
        depth += _depth(step)
        if depth >= length:
            return count if depth == length else None
    return None


def _width(step: Step) -> int:
    """Branches at once."""
    if isinstance(step, Parallel):
        return sum(max(map(_width, branch)) for branch in step.branches)
    return 1
