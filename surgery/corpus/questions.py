"""Questions made from a seed, as many as wanted, all different, each with its answer and its group.

==============  =========================================================================  =================
questions       what they take                                                             groups
==============  =========================================================================  =================
``babel``       translation (k = 0) and composition of k functions; for the bundled model  k or language pair
``arithmetic``  adding, subtracting, multiplying; digits right count in part               sign and digits
``tracking``    following things through swaps                                             number of swaps
``recall``      finding a key's value                                                      number of pairs
``copying``     saying the same words again                                                number of words
``induction``   going on as it went on before                                              number of words
==============  =========================================================================  =================

All are words with white space between them, so that a word-level model can be asked those whose words it knows
(``words`` lets you give its own). The harder a group's number, the longer the chain, table or list.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from surgery.corpus.babel import LANGUAGES, Babel, Problem

T = TypeVar("T")
# fmt: off
WORDS = (
    "apple", "arm", "ball", "bell", "bird", "boat", "book", "bread", "car", "cat", "chair", "clock", "cloud",
    "coin", "cup", "dog", "door", "egg", "fish", "flower", "gold", "hand", "hat", "horse", "house", "key",
    "knife", "lamp", "leaf", "moon", "paper", "ring", "river", "road", "ship", "snow", "star", "stone", "sun",
    "tree",
)
# fmt: on


@dataclass(frozen=True)
class Probe:
    """One question. ``choices`` hold the answer among others; an empty prompt means running text.

    Raises:
        ValueError: the answer is empty or not among the choices, or a choice is empty or stands there twice.
    """

    prompt: str
    answer: str
    group: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.answer.strip():
            raise ValueError("the answer is empty" if self.prompt else "the text is empty")
        if not self.choices:
            return
        if self.answer not in self.choices:
            raise ValueError(f"the answer {self.answer!r} is not among the choices {list(self.choices)}")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"a choice stands twice in {list(self.choices)}")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError(f"a choice is empty in {list(self.choices)}")

    @property
    def answers(self) -> tuple[str, ...]:
        """What is to be scored: the right answer first, then the other choices."""
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
    """All problems of the Babel corpus with ``k`` steps in random order, language pairs in turn.

    Args:
        sources, targets: languages of question and answer.
        group: ``"k"`` ("k=3"), ``"pair"`` ("plain>other") or ``"both"`` ("k=3 plain>other").
        heldout: problems kept out of the bundled model's training, or else those it may have seen.

    >>> next(babel(0, sources=["plain"], targets=["other"], group="pair")).group
    'plain>other'
    """
    made = corpus or Babel()
    for language in (*sources, *targets):
        if language not in LANGUAGES:
            raise ValueError(f"there is no language {language!r}; there are {', '.join(LANGUAGES)}")
    if group not in ("k", "pair", "both"):
        raise ValueError(f"group must be 'k', 'pair' or 'both', got {group!r}")

    def pair(source: str, target: str) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Problem:
            chain = tuple(generator.randrange(made.n_functions) for _ in range(k))
            return Problem(generator.randrange(made.n_symbols), chain, source, target)

        label = {"k": f"k={k}", "pair": f"{source}>{target}", "both": f"k={k} {source}>{target}"}[group]
        for problem in _distinct(draw, made.n_symbols * made.n_functions**k, f"babel {k} {source} {target} {seed}"):
            if made.heldout(problem) == heldout:
                question = " ".join(made.question(problem)[1:])  # the tokenizer puts <bos> in front
                yield Probe(question, " ".join(made.answer(problem)), label)

    return _turns([pair(*languages) for languages in itertools.product(sources, targets)])


def arithmetic(
    count: int, seed: int = 0, digits: Sequence[int] = (1, 2, 3), signs: str = "+-*", spaced: bool = False
) -> tuple[Probe, ...]:
    """Sums, differences (none negative) and products of numbers with so many digits: ``"12 + 7 ="``, ``"19"``.

    ``spaced`` writes the digits apart, for models whose words they are. ``Encoded.credit`` is the partial credit.

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
    """Three boxes whose contents are swapped: which thing is in a box in the end. Chance is 1/3 (by choices).

    >>> tracking(1)[0].prompt.split()[:4]
    ['box', 'A', ':', 'car']
    """
    names = ("A", "B", "C")
    _enough(words, len(names))

    def kind(length: int) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Probe:
            things = generator.sample(list(dict.fromkeys(words)), len(names))
            content = dict(zip(names, things))
            story = " , ".join(f"box {name} : {thing}" for name, thing in content.items())
            for _ in range(length):
                one, other = sorted(generator.sample(names, 2))
                content[one], content[other] = content[other], content[one]
                story += f" . swap {one} and {other}"
            asked = generator.choice(names)
            return Probe(f"{story} . box {asked} :", content[asked], f"swaps={length}", tuple(things))

        space = math.perm(len(set(words)), len(names)) * 3**length * len(names)
        return _distinct(draw, space, f"tracking {length} {seed}")

    return in_turn([kind(length) for length in swaps], count)


def recall(
    count: int, seed: int = 0, pairs: Sequence[int] = (2, 4, 8), words: Sequence[str] = WORDS
) -> tuple[Probe, ...]:
    """Keys with values, then one of the keys: ``"lamp : river , coin : stone . lamp :"``, ``"river"``; chance by
    choices is one in ``pairs``.

    >>> recall(1)[0].group
    'pairs=2'
    """
    _enough(words, 2 * max(pairs))

    def kind(length: int) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Probe:
            drawn = generator.sample(list(dict.fromkeys(words)), 2 * length)
            keys, values = drawn[:length], drawn[length:]
            asked = generator.randrange(length)
            table = " , ".join(f"{key} : {value}" for key, value in zip(keys, values))
            return Probe(f"{table} . {keys[asked]} :", values[asked], f"pairs={length}", tuple(values))

        return _distinct(draw, math.perm(len(set(words)), 2 * length) * length, f"recall {length} {seed}")

    return in_turn([kind(length) for length in pairs], count)


def copying(
    count: int, seed: int = 0, lengths: Sequence[int] = (2, 4, 8), words: Sequence[str] = WORDS
) -> tuple[Probe, ...]:
    """Random words and a mark, then the same words again, all of them: ``"lamp coin river ="``, ``"lamp coin river"``.

    >>> copying(3)[2].group
    'words=8'
    """
    _enough(words, max(lengths))

    def kind(length: int) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Probe:
            drawn = " ".join(generator.sample(list(dict.fromkeys(words)), length))
            return Probe(f"{drawn} =", drawn, f"words={length}")

        return _distinct(draw, math.perm(len(set(words)), length), f"copying {length} {seed}")

    return in_turn([kind(length) for length in lengths], count)


def induction(
    count: int, seed: int = 0, lengths: Sequence[int] = (4, 8, 16), words: Sequence[str] = WORDS
) -> tuple[Probe, ...]:
    """Random words repeated up to somewhere, then the word that came next before: ``"a b c d a b"``, ``"c"``.

    Nothing but words, so with ``words`` from its vocabulary any word-level model can be asked (Olsson et al. 2022,
    arXiv 2209.11895, of random tokens repeated).

    >>> induction(1, words=["a", "b"], lengths=[2])[0].prompt in ("a b a", "b a b")
    True
    """
    _enough(words, max(lengths))

    def kind(length: int) -> Iterator[Probe]:
        def draw(generator: random.Random) -> Probe:
            drawn = generator.sample(list(dict.fromkeys(words)), length)
            asked = generator.randrange(1, length)
            return Probe(" ".join(drawn + drawn[:asked]), drawn[asked], f"words={length}")

        return _distinct(draw, math.perm(len(set(words)), length) * (length - 1), f"induction {length} {seed}")

    return in_turn([kind(length) for length in lengths], count)


def _distinct(draw: Callable[[random.Random], T], space: int, seed: str) -> Iterator[T]:
    """What ``draw`` gives, each once, until all ``space`` of them have come."""
    generator, seen = random.Random(seed), set[T]()
    while len(seen) < space:
        drawn = draw(generator)
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def _turns(kinds: Sequence[Iterator[T]]) -> Iterator[T]:
    """One of each kind in turn, for as long as any has one."""
    waiting = list(kinds)
    while waiting:
        for kind in list(waiting):
            try:
                yield next(kind)
            except StopIteration:
                waiting.remove(kind)


def in_turn(kinds: Sequence[Iterator[Probe]], count: int) -> tuple[Probe, ...]:
    """``count`` questions, one of each kind in turn for as long as it has any."""
    if count < 1:
        raise ValueError(f"ask for at least 1 probe, not {count}")
    found = tuple(itertools.islice(_turns(kinds), count))
    if len(found) < count:
        raise ValueError(f"there are only {len(found)} different questions of this kind, not {count}")
    return found


def _enough(words: Sequence[str], least: int) -> None:
    if len(set(words)) < least:
        raise ValueError(f"this takes at least {least} different words, and there are {len(set(words))}")
