"""Texts that are on every machine: Python's own manual, and the parallel sentences. For whoever has no text at hand.

The manual is read from the installed Python when it is asked for (``pydoc_data.topics``), so its wording differs a
little between Python versions; manifests hold the hash of the tokens. It is English prose about syntax, with code in
it: not what a model meets most, but nobody has to fetch it.
"""

import random
from itertools import chain
from typing import Any

from surgery.corpus import bundled
from surgery.corpus.parallel_sentences import LANGUAGES, TOPICS
from surgery.models.names import BUNDLED

LEAST = 300  # characters of a paragraph: shorter ones are headings and lines of grammar


def manual(count: int, seed: int = 0) -> list[str]:
    """Draw ``count`` different paragraphs of Python's manual, each on one line.

    Raises ValueError if there are not so many.

    >>> len(set(manual(8))), manual(8) == manual(8), manual(8) == manual(8, seed=1)
    (8, True, False)
    """
    from pydoc_data.topics import topics

    paragraphs = chain.from_iterable(topics[name].split("\n\n") for name in sorted(topics))
    usable = list(dict.fromkeys(" ".join(text.split()) for text in paragraphs if len(text) > LEAST))
    if not 0 < count <= len(usable):
        raise ValueError(f"Python's manual has {len(usable)} paragraphs of more than {LEAST} characters, not {count}")
    return random.Random(f"manual {seed}").sample(usable, count)


def pieces(tokenizer: Any, longest: int, seed: int = 0) -> list[str]:
    """The whole manual in pieces of some ``longest`` tokens, all different, in random order: to train on.

    >>> import surgery
    >>> isinstance(pieces(surgery.load("babel").tokenizer, 400)[0], str)
    True
    """
    from pydoc_data.topics import topics

    words = [word for name in sorted(topics) for word in topics[name].split()]
    lengths = [len(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]]
    made, taken, total = [], list[str](), 0
    for word, length in zip(words, lengths, strict=True):
        if taken and total + length > longest:
            made.append(" ".join(taken))
            taken, total = [], 0
        taken.append(word)
        total += length
    distinct = list(dict.fromkeys([*made, " ".join(taken)]))
    random.Random(f"pieces {seed}").shuffle(distinct)
    return distinct


def sentences(count: int) -> list[str]:
    """The first ``count`` of the parallel sentences, in turn in every language: 96 in all.

    Raises ValueError if there are not so many.

    >>> sentences(2)
    ['The area of a circle is pi times the square of its radius.', 'Drei Äpfel und fünf Äpfel ergeben acht Äpfel.']
    """
    topics, n = list(TOPICS.values()), len(LANGUAGES)
    turns = [topic[LANGUAGES[(place + turn) % n]] for turn in range(n) for place, topic in enumerate(topics)]
    if not 0 < count <= len(turns):
        raise ValueError(f"there are {len(turns)} parallel sentences, not {count}")
    return turns[:count]


KINDS = {"manual": manual, "sentences": sentences}


def of_each_kind(model: str, count: int) -> dict[str, list[str]]:
    """``count`` texts of every kind that a model can read, by kind: a Babel model reads Babel problems alone.

    >>> list(of_each_kind("babel", 2)), list(of_each_kind("smollm2", 2))
    (['babel'], ['manual', 'sentences'])
    """
    if model in BUNDLED:
        return {"babel": bundled.prompts(count)}
    return {kind: draw(count) for kind, draw in KINDS.items()}


def texts(model: str, count: int, seed: int = 0) -> list[str]:
    """``count`` texts that a model can read: the manual's, or Babel problems for a Babel model.

    >>> len(texts("babel", 3)), texts("smollm2", 1) == manual(1)
    (3, True)
    """
    return bundled.prompts(count, seed) if model in BUNDLED else manual(count, seed)
