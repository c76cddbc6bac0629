"""Generators of questions: seeded, all different, each with its answer and its group.

==============  =========================================================================  =================
questions       what they require                                                          groups
==============  =========================================================================  =================
``babel``       translation (k = 0) and composition of k functions; for the bundled model  k or language pair
``arithmetic``  adding, subtracting, multiplying; right digits earn partial credit          sign and digits
``tracking``    following things through swaps                                             number of swaps
``recall``      finding a key's value                                                      number of pairs
``copying``     repeating the same words                                                   number of words
``induction``   continuing as the repeated part did before                                 number of words
==============  =========================================================================  =================

All consist of words separated by white space, so that a word-level model can be asked those whose words it knows
(pass its own as ``words``). A larger number in a group's name means a longer chain, table or list.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from surgery.corpus.babel import LANGUAGES, Babel, Problem
from surgery.corpus.probe_sets import NAMES as NAMES
from surgery.outside import shown

T = TypeVar("T")
_THINGS = (
    "apple arm ball bell bird boat book bread car cat chair clock cloud coin cup dog door egg fish flower gold hand "
    "hat horse house key knife lamp leaf moon paper ring river road ship snow star stone sun tree"
)
WORDS = tuple(_THINGS.split())


@dataclass(frozen=True)
class Probe:
    """One question. ``choices`` include the answer; an empty prompt means running text.

    Questions of one ``cluster`` are not independent (one template, one passage): statistics draw them together.

    Raises:
        ValueError: the answer is empty or not among the choices, or a choice is empty or occurs twice.
    """

    prompt: str
    answer: str
    group: str = ""
    choices: tuple[str, ...] = ()
    cluster: str = ""

    def __post_init__(self) -> None:
        if not self.answer.strip():
            raise ValueError("the answer is empty" if self.prompt else "the text is empty")
        if not self.choices:
            return
        if self.answer not in self.choices:
            choices = shown(list(self.choices), 200)
            raise ValueError(f"the answer {shown(self.answer)!r} is not among the choices {choices}")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"a choice occurs twice in {list(self.choices)}")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError(f"a choice is empty in {list(self.choices)}")

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers to score: the right one first, then the other choices."""
        return (self.answer, *(choice for choice in self.choices if choice != self.answer))


def babel(
    k: int,
    seed: int = 0,
    *,
    sources: Sequence[str] = LANGUAGES,
    targets: Sequence[str] = LANGUAGES,
    group: str = "k",
    heldout: bool = True,
    corpus: Babel | None = None,
) -> Iterator[Probe]:
    """Yield all problems of the Babel corpus with ``k`` steps in random order, language pairs in turn.

    Args:
        sources, targets: languages of question and answer.
        group: ``"k"`` ("k=3"), ``"pair"`` ("plain>other") or ``"both"`` ("k=3 plain>other").
        heldout: problems held out from the bundled model's training, or else those it may have seen.

    Raises ValueError for an unknown language or group.

    >>> next(babel(0, sources=["plain"], targets=["other"], group="pair")).group
    'plain>other'
    """
    problems = corpus or Babel()
    for language in (*sources, *targets):
        if language not in LANGUAGES:
            raise ValueError(f"there is no language {language!r}; there are {', '.join(LANGUAGES)}")
    if group not in ("k", "pair", "both"):
        raise ValueError(f"group must be 'k', 'pair' or 'both', got {group!r}")

    def pair(source: str, target: str) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Problem:
            chain = tuple(generator.randrange(problems.n_functions) for _ in range(k))
            return Problem(generator.randrange(problems.n_symbols), chain, source, target)

        both = f"k={k} {source}>{target}"
        label = {"k": f"k={k}", "pair": f"{source}>{target}", "both": both}[group]
        space = problems.n_symbols * problems.n_functions**k
        for problem in _distinct(draw, space, f"babel {k} {source} {target} {seed}"):
            if problems.heldout(problem) == heldout:
                question = " ".join(problems.question(problem)[1:])  # the tokenizer prepends <bos>
                yield Probe(question, " ".join(problems.answer(problem)), label, cluster=both)

    return _turns([pair(*languages) for languages in itertools.product(sources, targets)])


def arithmetic(
    count: int, seed: int = 0, digits: Sequence[int] = (1, 2, 3), signs: str = "+-*", spaced: bool = False
) -> tuple[Probe, ...]:
    """Sums, differences (none negative) and products of numbers of ``digits`` digits: ``"12 + 7 ="``, ``"19"``.

    ``spaced`` separates the digits, for models whose words are digits. ``Encoded.credit`` is the partial credit.
    Raises ValueError for other signs, and where there are fewer than ``count`` such questions.

    >>> arithmetic(9, digits=[2])[0].group
    '+ digits=2'
    """
    if not set(signs) <= set("+-*") or not signs:
        raise ValueError(f"signs must be some of '+-*', got {signs!r}")

    def kind(sign: str, length: int) -> Iterator[Probe]:
        numbers = range(10 ** (length - 1) if length > 1 else 0, 10**length)

        def draw(generator: random.Random) -> tuple[int, int]:
            first, second = generator.choice(numbers), generator.choice(numbers)
            return (max(first, second), min(first, second)) if sign == "-" else (first, second)

        space = math.comb(len(numbers) + 1, 2) if sign == "-" else len(numbers) ** 2
        for a, b in _distinct(draw, space, f"arithmetic {sign} {length} {seed}"):
            result = {"+": a + b, "-": a - b, "*": a * b}[sign]
            first, second, answer = (" ".join(str(n)) if spaced else str(n) for n in (a, b, result))
            yield Probe(f"{first} {sign} {second} =", answer, f"{sign} digits={length}")

    return in_turn([kind(sign, length) for sign in signs for length in digits], count)


def tracking(
    count: int, seed: int = 0, swaps: Sequence[int] = (1, 2, 3, 4), words: Sequence[str] = WORDS
) -> tuple[Probe, ...]:
    """Three boxes whose contents are swapped: which thing is in a box in the end? Chance is 1/3 (by choices).

    >>> tracking(1)[0].prompt.split()[:4]
    ['box', 'A', ':', 'car']
    """
    names = ("A", "B", "C")
    _require_words(words, len(names))

    def kind(length: int) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Probe:
            things = generator.sample(list(dict.fromkeys(words)), len(names))
            content = dict(zip(names, things))
            story = " , ".join(f"box {name} : {thing}" for name, thing in content.items())
            for _ in range(length):
                a, b = sorted(generator.sample(names, 2))
                content[a], content[b] = content[b], content[a]
                story += f" . swap {a} and {b}"
            box = generator.choice(names)
            return Probe(f"{story} . box {box} :", content[box], f"swaps={length}", tuple(things))

        space = math.perm(len(set(words)), len(names)) * 3**length * len(names)
        return _distinct(draw, space, f"tracking {length} {seed}")

    return in_turn([kind(length) for length in swaps], count)


def recall(
    count: int, seed: int = 0, pairs: Sequence[int] = (2, 4, 8), words: Sequence[str] = WORDS
) -> tuple[Probe, ...]:
    """Keys with values, then one of the keys: ``"lamp : river , coin : stone . lamp :"``, ``"river"``.

    Chance by choices is one in ``pairs``.

    >>> recall(1)[0].group
    'pairs=2'
    """
    _require_words(words, 2 * max(pairs))

    def kind(length: int) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Probe:
            sample = generator.sample(list(dict.fromkeys(words)), 2 * length)
            keys, values = sample[:length], sample[length:]
            row = generator.randrange(length)
            table = " , ".join(f"{key} : {value}" for key, value in zip(keys, values))
            return Probe(f"{table} . {keys[row]} :", values[row], f"pairs={length}", tuple(values))

        return _distinct(draw, math.perm(len(set(words)), 2 * length) * length, f"recall {length} {seed}")

    return in_turn([kind(length) for length in pairs], count)


def copying(
    count: int, seed: int = 0, lengths: Sequence[int] = (2, 4, 8), words: Sequence[str] = WORDS
) -> tuple[Probe, ...]:
    """Random words and an equals sign, to be followed by the same words: ``"lamp coin ="``, ``"lamp coin"``.

    >>> copying(3)[2].group
    'words=8'
    """
    _require_words(words, max(lengths))

    def kind(length: int) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Probe:
            text = " ".join(generator.sample(list(dict.fromkeys(words)), length))
            return Probe(f"{text} =", text, f"words={length}")

        return _distinct(draw, math.perm(len(set(words)), length), f"copying {length} {seed}")

    return in_turn([kind(length) for length in lengths], count)


def induction(
    count: int, seed: int = 0, lengths: Sequence[int] = (4, 8, 16), words: Sequence[str] = WORDS
) -> tuple[Probe, ...]:
    """Random words that begin to repeat; the answer is the next word of the repetition: ``"a b c d a b"``, ``"c"``.

    With ``words`` from its vocabulary any word-level model can be asked (Olsson et al. 2022, arXiv 2209.11895, on
    repeated random tokens).

    >>> induction(1, words=["a", "b"], lengths=[2])[0].prompt in ("a b a", "b a b")
    True
    """
    _require_words(words, max(lengths))

    def kind(length: int) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Probe:
            sample = generator.sample(list(dict.fromkeys(words)), length)
            place = generator.randrange(1, length)
            return Probe(" ".join(sample + sample[:place]), sample[place], f"words={length}")

        return _distinct(draw, math.perm(len(set(words)), length) * (length - 1), f"induction {length} {seed}")

    return in_turn([kind(length) for length in lengths], count)


def _distinct(draw: Callable[[random.Random], T], space: int, seed: str) -> Iterator[T]:
    """Yield what ``draw`` returns, each value once, until all ``space`` of them have come."""
    generator, seen = random.Random(seed), set[T]()
    while len(seen) < space:
        value = draw(generator)
        if value not in seen:
            seen.add(value)
            yield value


def _turns(kinds: Sequence[Iterator[T]]) -> Iterator[T]:
    """Yield from each kind in turn until all are exhausted."""
    waiting = list(kinds)
    while waiting:
        for kind in list(waiting):
            try:
                yield next(kind)
            except StopIteration:
                waiting.remove(kind)


def in_turn(kinds: Sequence[Iterator[Probe]], count: int) -> tuple[Probe, ...]:
    """Take ``count`` questions from each kind in turn. Raises ValueError if there are fewer."""
    if count < 1:
        raise ValueError(f"ask for at least 1 probe, not {count}")
    probes = tuple(itertools.islice(_turns(kinds), count))
    if len(probes) < count:
        raise ValueError(f"there are only {len(probes)} different questions of this kind, not {count}")
    return probes


def _require_words(words: Sequence[str], least: int) -> None:
    if len(set(words)) < least:
        raise ValueError(f"this takes at least {least} different words, and there are {len(set(words))}")
