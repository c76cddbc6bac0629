r"""Notation: read the text of a wiring into steps, and write steps as text. ``surgery.wiring`` says what it means.

    chain    = element+
    element  = number "*" operand | group ["*" count] | slice
    operand  = group | slice
    group    = "(" chain ")" | ["mean"] "{" branch ("|" branch)* "}"
    branch   = chain | "*" slice
    slice    = (index | [index] ":" [index] [":" [index]]) [".attn" | ".mlp"]

``read`` accepts every spelling, ``write`` produces one: runs of layers are slices, left open where they touch an end of
the model. A slice that is open on one side and empty, ``:0``, is allowed and means nothing, so that ``f":{j} {i}:"``
works for all i and j. A text with two readings is refused rather than guessed: ``7*3``, ``0.5*(3:6)*2``.

Steps are counted before they are made, so that a short text cannot stand for more than a wiring may have; reading and
writing take time in proportion to the length of the text and to the number of steps.
"""

import math
import re
from collections.abc import Iterator
from itertools import chain, groupby, repeat
from typing import cast

from surgery.outside import shown
from surgery.wiring.steps import (
    DEEPEST,
    HALF_OPEN,
    LONGEST,
    Chain,
    Layer,
    Parallel,
    Part,
    Scaled,
    Step,
    WiringError,
    executions,
    layer,
    no_layer,
    quoted,
    require_layers,
    require_text,
    require_times,
    runs,
    too_deep,
    too_long,
)

MOST_WORDS = 3 * LONGEST  # words and signs: ``write`` never needs more
_TOKEN = re.compile(r"[(){}|*]|[^\s(){}|*]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]+)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_INTEGER = re.compile(r"-?[0-9]{1,9}")
_SLICE = re.compile(
    r"(?=.*[0-9:])(?P<start>-?[0-9]{1,9})?"
    r"(?P<colon>:(?P<stop>-?[0-9]{1,9})?(:(?P<step>-?[0-9]{1,9})?)?)?(\.(?P<part>attn|mlp))?"
)


def read(text: str, n_layers: int) -> Chain:
    """Parse a text into steps, not yet in normal form; a ``WiringError`` shows the place where it goes wrong.

    Raises TypeError if ``text`` is none. Cost: linear in the length of the text and the number of steps.

    >>> read("(3)*2 7.attn", 12)
    (Layer(index=3, part=None), Layer(index=3, part=None), Layer(index=7, part='attn'))
    """
    reader = _Reader(require_text(text, "a wiring's notation"), require_layers(n_layers))
    return tuple(reader.everything()) if reader.word else ()


class _Reader:
    """Recursive-descent parser of the grammar above; each method reads what it is named after."""

    def __init__(self, text: str, n_layers: int) -> None:
        self.text, self.n_layers = text, n_layers
        words = ((match[0], match.start()) for match in _TOKEN.finditer(text))
        self.words = chain(words, repeat(("", len(text.rstrip()))))
        (self.word, self.place), self.next = next(self.words), next(self.words)
        self.taken = self.nested = self.size = 0
        self.spans: dict[str, tuple[range, Part | None]] = {}  # that were read, by their words

    def take(self) -> tuple[str, int]:
        """Return the present word and its place, and go on to the next word."""
        self.taken += 1
        if self.taken > MOST_WORDS:
            raise self.error(f"a wiring is written in at most {MOST_WORDS} words and signs")
        taken = self.word, self.place
        (self.word, self.place), self.next = self.next, next(self.words)
        return taken

    def grow(self, count: int, place: int) -> None:
        """Count steps before they are made."""
        self.size += count
        if self.size > LONGEST:
            raise self.error(too_long(), place)

    def error(self, sentence: str, place: int | None = None) -> WiringError:
        return WiringError(sentence, self.n_layers, self.text, self.place if place is None else place)

    def everything(self) -> list[Step]:
        steps = self.chain()
        if self.word:
            raise self.error(f"{quoted(self.word)} has no opening bracket before it")
        return steps

    def chain(self) -> list[Step]:
        self.nested += 1
        if self.nested > DEEPEST + 1:
            raise self.error(too_deep())
        steps = self.element()
        while self.word not in ("", ")", "}", "|"):
            steps += self.element()
        self.nested -= 1
        return steps

    def element(self) -> list[Step]:
        first = self.word
        if self.next[0] == "*" and _NUMBER.fullmatch(first):
            return self.scaled()
        before = self.size
        steps = self.operand()
        if self.word != "*":
            return steps
        if first not in ("(", "{", "mean"):
            raise self.error(f"only a group can be repeated, write ({shown(first)})*3")
        self.take()
        times, place = self.take()
        if not _INTEGER.fullmatch(times):
            raise self.error("a group is followed by how many times it runs, a factor stands before it", place)
        size = self.size - before
        try:
            count = require_times(size, int(times))
        except WiringError as error:
            raise self.error(error.sentence, place) from None
        self.grow(size * (count - 1), place)
        return steps * count

    def operand(self) -> list[Step]:
        word, place = self.take()
        if word == "(":
            steps = self.chain()
            self.close(")", place)
            return steps
        if word == "{":
            return self.branches(place, mean=False)
        if word == "mean":
            if self.word != "{":
                raise self.error("mean stands before branches in braces, mean{3|4}", place)
            return self.branches(self.take()[1], mean=True)
        return self.slice(word, place)

    def scaled(self) -> list[Step]:
        (factor, place), _ = self.take(), self.take()
        if _INTEGER.fullmatch(factor) and _SLICE.fullmatch(self.word):
            repeats, scales = f"({factor})*{self.word}", f"{factor}*({self.word})"
            raise self.error(f"this has two readings, write {repeats} to repeat or {scales} to scale", place)
        if not math.isfinite(float(factor)):
            raise self.error(f"a factor must be a finite number, not {shown(factor)}", place)
        self.grow(1, place)
        body = self.operand()
        if self.word == "*":
            repeats, scales = f"({shown(factor)}*(...))*3", f"{shown(factor)}*((...)*3)"
            raise self.error(f"this has two readings, write {repeats} or {scales}")
        return [Scaled(float(factor), tuple(body))]

    def branches(self, opening: int, mean: bool) -> list[Step]:
        self.grow(1, opening)
        branches = self.branch()
        while self.word == "|":
            self.take()
            branches += self.branch()
        self.close("}", opening)
        return [Parallel(tuple(branches), mean)]

    def branch(self) -> list[Chain]:
        if self.word != "*":
            return [tuple(self.chain())]
        self.take()
        return [(step,) for step in self.slice(*self.take())]

    def close(self, bracket: str, opening: int) -> None:
        if not self.word:
            raise self.error(f"this '{self.text[opening]}' is never closed", opening)
        if self.word != bracket:
            raise self.error(f"'{bracket}' is missing here")
        self.take()

    def slice(self, word: str, place: int) -> list[Step]:
        if word not in self.spans:
            self.spans[word] = self.span(word, place)
        indices, part = self.spans[word]
        self.grow(max(1, len(indices)), place)
        return [layer(index, part) for index in indices]

    def span(self, word: str, place: int) -> tuple[range, Part | None]:
        match = _SLICE.fullmatch(word)
        if not match:
            raise self.error(_no_slice(word), place)
        start, stop, step = (int(match[name]) if match[name] else None for name in ("start", "stop", "step"))
        if step == 0:
            raise self.error("a slice cannot have the step 0", place + match.start("step"))
        upwards = match["colon"] is not None and (step is None or step > 0)
        for name, end in (("start", start), ("stop", stop)):
            if end is not None and not -self.n_layers <= end < self.n_layers + upwards:
                slices = f", and a slice stops at {self.n_layers} at most" if upwards else ""
                raise self.error(no_layer(end, self.n_layers) + slices, place + match.start(name))
        layers = range(self.n_layers)
        indices = layers[start:][:1] if match["colon"] is None else layers[start:stop:step]
        if not indices and start is not None and stop is not None:
            down = ", add :-1 to count down" if step is None else ""
            raise self.error(f"{word} has no layer in it, {HALF_OPEN}{down}", place)
        return indices, cast("Part | None", match["part"])


def _no_slice(word: str) -> str:
    if word in ("", "(", ")", "{", "}", "|", "*"):
        return "a layer or a slice of layers is missing here"
    if "," in word or ".." in word:
        return f"'{shown(word)}' is no layer or slice such as 7, 7.attn or 3:6; Wiring.from_paths reads inclusive paths"
    return f"'{shown(word)}' is no layer or slice such as 7, 7.attn or 3:6"


def write(chain: Chain, n_layers: int) -> str:
    """Return the canonical text of a chain in normal form.

    >>> write(read("0 1 2 0.50*{5|4}", 12), 12)
    ':3 0.5*{5 | 4}'
    """
    return " ".join(_words(chain, n_layers))


def _words(chain: Chain, n_layers: int) -> Iterator[str]:
    for suffix, steps in groupby(chain, _suffix):
        if suffix is None:
            yield from (_group(step, n_layers) for step in steps if not isinstance(step, Layer))
        else:
            indices = [layer.index for layer in executions(steps)]
            yield from (_run(first, last, n_layers) + suffix for first, last in runs(indices))


def _suffix(step: Step) -> str | None:
    """Return what is written after a run of whole layers or of sublayers; None for groups."""
    if not isinstance(step, Layer):
        return None
    return f".{step.part}" if step.part else ""


def _run(first: int, last: int, n_layers: int) -> str:
    if first == last and n_layers > 1:
        return str(first)
    if first <= last:
        return f"{first or ''}:{last + 1 if last + 1 < n_layers else ''}"
    return f"{first if first + 1 < n_layers else ''}:{last - 1 if last else ''}:-1"


def _group(step: Parallel | Scaled, n_layers: int) -> str:
    match step:
        case Parallel(branches, mean):
            words = " | ".join(_branches(branches, n_layers))
            return f"mean{{{words}}}" if mean else f"{{{words}}}"
        case Scaled(factor, body):
            number, text = repr(factor).removesuffix(".0"), write(body, n_layers)
            layer = isinstance(body[0], Layer) and not _INTEGER.fullmatch(number)
            bare = len(body) == 1 and (layer or isinstance(body[0], Parallel))
            return f"{number}*{text}" if bare else f"{number}*({text})"


def _branches(branches: tuple[Chain, ...], n_layers: int) -> Iterator[str]:
    for single, group in groupby(branches, lambda branch: len(branch) == 1 and isinstance(branch[0], Layer)):
        if single:
            words = _words(tuple(branch[0] for branch in group), n_layers)
            yield from (f"*{word}" if ":" in word else word for word in words)
        else:
            yield from (write(branch, n_layers) or ":0" for branch in group)
