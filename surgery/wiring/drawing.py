"""Wirings as drawings: ``Wiring.draw()`` is an SVG image, which a notebook shows by itself.

The line is the residual stream, from left to right. What stands on it, in the order in which it runs:

======================  ===============================================================================
drawn                   what it is
======================  ===============================================================================
a box                   a layer; a low box is one of its sublayers; the darker, the more often it has run before
a dashed box            layers of the model that never run
boxes above each other  branches of a group: they read one stream; ``+`` adds their updates up, ``mean`` averages
a dashed frame          a chain whose effect is multiplied by the factor on the frame
``0–44``                a run of layers; only where a wiring has more than ``FEW`` boxes
``… 17 more``           what is not drawn, where even that would be too much
======================  ===============================================================================

Lines and letters have the colour of the text around them, so a drawing can be read on light and on dark pages.

>>> from surgery.wiring import Wiring
>>> drawing = Wiring.parse(":6 4:6 8:", 12).draw()
>>> str(drawing)[:4], drawing.n_boxes
('<svg', 12)
"""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

from surgery.outside import shown
from surgery.wiring.steps import Chain, Layer, Parallel, Part, Scaled, executions, size_of

FEW = 60  # boxes that are drawn one by one
MOST = 240  # nodes that are drawn at all
BRANCHES = 12  # of a group
WIDTH, LETTER, BEND = 720, 7, 16  # of a line of boxes, before the next begins; of a letter; of a group's entry
GAP, HIGH, LOW, SPACE = 10, 26, 18, 8  # between boxes; of a layer's box; of a sublayer's; between branches


@dataclass(frozen=True)
class Drawing:
    """An SVG image: ``str`` is its text, and notebooks show it. ``n_boxes`` counts the boxes of layers that run."""

    svg: str
    n_boxes: int

    def __str__(self) -> str:
        return self.svg

    def _repr_svg_(self) -> str:
        return self.svg


@dataclass(frozen=True)
class Box:
    """Layers ``first`` to ``last`` (mostly one), or a sublayer, on its ``time``-th run; 0: they never run."""

    first: int
    last: int
    part: Part | None
    time: int

    @property
    def label(self) -> str:
        span = f"{self.first}" if self.first == self.last else f"{self.first}–{self.last}"
        return f"{span}.{self.part}" if self.part else span

    @property
    def title(self) -> str:
        what = f"layer{'s' if self.last > self.first else ''} {self.label}"
        return f"{what}, run {self.time}" if self.time else f"{what}, left out"


@dataclass(frozen=True)
class More:
    """What is not drawn."""

    count: int

    @property
    def words(self) -> str:
        return f"… {self.count:,} more"


@dataclass(frozen=True)
class Group:
    """Branches one above the other; a node without ``mean`` is a sum."""

    branches: "tuple[Row, ...]"
    mean: bool


@dataclass(frozen=True)
class Frame:
    """A chain whose effect is scaled."""

    factor: float
    body: "Row"

    @property
    def words(self) -> str:
        return f"× {self.factor:g}"


Node = Box | More | Group | Frame
Row = tuple[Node, ...]


def draw(steps: Chain, n_layers: int, name: str) -> Drawing:
    """Draw a chain in normal form; ``name`` is what a screen reader says. Nothing is run."""
    plan = _Plan(short=sum(1 for _ in executions(steps)) > FEW)
    row = _with_left_out(plan.row(steps), steps, n_layers)
    return _Canvas().image(row, name)


class _Plan:
    """Turns steps into what is drawn, counting how often each layer has run, and how much there is already."""

    def __init__(self, short: bool) -> None:
        self.short, self.left, self.runs = short, MOST, Counter[tuple[int, Part | None]]()

    def row(self, chain: Chain) -> Row:
        nodes: list[Node] = []
        for at, step in enumerate(chain):
            if self.left <= 0:
                return (*nodes, More(size_of(chain[at:])))
            node = self.node(step)
            joined = _joined(nodes[-1], node) if nodes and self.short else None
            if joined:
                nodes[-1] = joined
            else:
                nodes.append(node)
                self.left -= 1
        return tuple(nodes)

    def node(self, step: Layer | Parallel | Scaled) -> Node:
        match step:
            case Layer(index, part):
                self.runs[index, part] += 1
                return Box(index, index, part, self.runs[index, part])
            case Scaled(factor, body):
                return Frame(factor, self.row(body))
            case Parallel(branches, mean):
                some = branches if len(branches) <= BRANCHES else (*branches[: BRANCHES - 2], branches[-1])
                rows = [self.row(branch) for branch in some]
                if some is not branches:
                    rows.insert(BRANCHES - 2, (More(len(branches) - len(some)),))
                return Group(tuple(rows), mean)


def _joined(before: Node, after: Node) -> Box | None:
    """One box for both, where the second is the layer after the first, on the same run."""
    if isinstance(before, Box) and isinstance(after, Box):
        ends = before.last + 1, before.part, before.time
        if ends == (after.first, None, after.time) and after.part is None:
            return Box(before.first, after.last, None, after.time)
    return None


def _with_left_out(row: Row, steps: Chain, n_layers: int) -> Row:
    """The row with a dashed box for every span of layers that never run, before the first layer behind it."""
    run = {layer.index for layer in executions(steps)}
    absent = enumerate(index for index in range(n_layers) if index not in run)
    spans = [[index for _, index in span] for _, span in groupby(absent, key=lambda pair: pair[1] - pair[0])]
    left_out = [Box(span[0], span[-1], None, 0) for span in spans]
    nodes: list[Node] = []
    for node in row:
        while left_out and isinstance(node, Box) and node.first > left_out[0].last:
            nodes.append(left_out.pop(0))
        nodes.append(node)
    return (*nodes, *(() if any(isinstance(node, More) for node in row) else left_out))


class _Canvas:
    """Writes SVG: first the size of every node, then its marks, each as one element."""

    def __init__(self) -> None:
        self.marks: list[str] = []
        self.n_boxes = 0

    def image(self, row: Row, name: str) -> Drawing:
        top, right = 0.0, 0.0
        lines = _lines(row)
        for number, line in enumerate(lines):
            width, high = _extent(line)
            middle = top + high / 2 + SPACE
            self.path(f"M0 {middle:g}H{GAP}")
            self.row(line, GAP, middle)
            self.path(f"M{GAP + width:g} {middle:g}h{GAP}")
            if number == len(lines) - 1:
                self.path(f"M{2 * GAP + width - 4:g} {middle - 4:g}l6 4l-6 4")
            top, right = top + high + 2 * SPACE, max(right, width + 2 * GAP + 4)
        spoken = escape(f"wiring {shown(name, 200)}", {'"': "&quot;"})
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{right:g}" height="{top:g}"'
            f' viewBox="0 0 {right:g} {top:g}" role="img" aria-label="{spoken}" fill="none" stroke="currentColor"'
            ' style="max-width: 100%">'
        )
        return Drawing("\n".join([head, *self.marks, "</svg>"]), self.n_boxes)

    def row(self, row: Row, x: float, y: float) -> float:
        """Draw nodes on the line at height ``y``, from ``x`` on; return where they end."""
        for number, node in enumerate(row):
            if number:
                self.path(f"M{x:g} {y:g}h{GAP}")
                x += GAP
            match node:
                case Box():
                    self.box(node, x, y)
                case More():
                    self.text(node.words, x + _size(node)[0] / 2, y, "more")
                case Group():
                    self.group(node, x, y)
                case Frame():
                    self.frame(node, x, y)
            x += _size(node)[0]
        return x

    def box(self, box: Box, x: float, y: float) -> None:
        width, high = _size(box)
        shade = f'fill="currentColor" fill-opacity="{min(0.04 + 0.14 * (box.time - 1), 0.46):.2f}"'
        look = shade if box.time else 'stroke-dasharray="3 3" stroke-opacity="0.6"'
        self.n_boxes += bool(box.time)
        self.marks.append(
            f'<g class="{"layer" if box.time else "absent"}"><title>{box.title}</title><rect x="{x:g}"'
            f' y="{y - high / 2:g}" width="{width:g}" height="{high}" rx="{9 if box.part == "attn" else 3}" {look}/>'
            f"{self.letters(box.label, x + width / 2, y)}</g>"
        )

    def group(self, group: Group, x: float, y: float) -> None:
        width, high = _size(group)
        end, down = x + width, y - high / 2
        for row in group.branches:
            tall = _extent(row)[1]
            at = down + tall / 2
            down += tall + SPACE
            self.path(f"M{x:g} {y:g}h4V{at:g}h{BEND - 4}")
            stop = self.row(row, x + BEND, at)
            self.path(f"M{stop:g} {at:g}H{end - _joint(group):g}V{y:g}")
        if group.mean:
            self.text("mean", end - _joint(group) / 2, y, "joint")
        else:
            middle = end - 9
            self.path(f"M{end - _joint(group):g} {y:g}H{middle - 6:g}")
            self.marks.append(f'<circle class="joint" cx="{middle:g}" cy="{y:g}" r="6"/>')
            self.path(f"M{middle - 3:g} {y:g}h6M{middle:g} {y - 3:g}v6M{middle + 6:g} {y:g}H{end:g}")

    def frame(self, frame: Frame, x: float, y: float) -> None:
        width, high = _size(frame)
        self.path(f"M{x:g} {y:g}h{SPACE}")
        self.row(frame.body, x + SPACE, y)
        self.path(f"M{x + width - SPACE:g} {y:g}h{SPACE}")
        self.marks.append(
            f'<rect class="frame" x="{x:g}" y="{y - high / 2 + 8:g}" width="{width:g}" height="{high - 16:g}" rx="5"'
            ' stroke-dasharray="5 3"/>'
        )
        self.text(frame.words, x + width / 2, y - high / 2 + 2, "factor")

    def path(self, moves: str) -> None:
        self.marks.append(f'<path d="{moves}"/>')

    def text(self, words: str, x: float, y: float, kind: str) -> None:
        self.marks.append(f'<g class="{kind}">{self.letters(words, x, y)}</g>')

    def letters(self, words: str, x: float, y: float) -> str:
        style = 'font-family="sans-serif" font-size="12" text-anchor="middle" fill="currentColor" stroke="none"'
        return f'<text x="{x:g}" y="{y + 4:g}" {style}>{escape(words)}</text>'


def _lines(row: Row) -> list[Row]:
    """Cut a row into lines that are no wider than ``WIDTH``, or of one node."""
    lines: list[list[Node]] = [[]]
    for node in row:
        if lines[-1] and _extent((*lines[-1], node))[0] > WIDTH:
            lines.append([])
        lines[-1].append(node)
    return [tuple(line) for line in lines]


def _size(node: Node) -> tuple[float, float]:
    """Width and height of a node."""
    match node:
        case Box():
            return max(26, LETTER * len(node.label) + 12), LOW if node.part else HIGH
        case More():
            return LETTER * len(node.words) + 6, LOW
        case Group(branches):
            widths, heights = zip(*map(_extent, branches))
            return max(widths) + BEND + SPACE + _joint(node), sum(heights) + SPACE * (len(branches) - 1)
        case Frame(_, body):
            width, high = _extent(body)
            return max(width + 2 * SPACE, LETTER * len(node.words) + 8), high + 2 * SPACE + 16


def _extent(row: Row) -> tuple[float, float]:
    """Width and height of a row; an empty branch is a line of its own."""
    widths, heights = zip((0, LOW), *map(_size, row))
    return sum(widths) + GAP * max(0, len(row) - 1), max(heights)


def _joint(group: Group) -> float:
    return 42 if group.mean else 22
