"""Prompts and problems of the kind that the bundled models were trained on, but held out."""

from surgery.corpus.babel import Babel, Problem


def prompts(count: int = 256, seed: int = 0, longest: int = 4) -> list[str]:
    """Held-out Babel problems with their answers, k = 0..``longest`` and all language pairs in equal parts.

    >>> prompts(1)[0].split()[1]
    '>plain'
    """
    corpus = Babel()
    words = [corpus.words(problem)[1:] for problem in problems(count, seed, longest)]  # the tokenizer prepends <bos>
    return [" ".join(prompt) for prompt in words]


def problems(count: int = 256, seed: int = 0, longest: int = 4) -> list[Problem]:
    """The problems behind ``prompts``, shortest first."""
    corpus, lengths = Babel(), range(longest + 1)
    shares = [count // len(lengths) + (k < count % len(lengths)) for k in lengths]
    return [problem for k, share in zip(lengths, shares, strict=True) for problem in corpus.sample(k, share, seed)]
