"""Bundled prompts and problems, of the kind that the bundled models were trained on."""

from surgery.corpus.babel import Babel, Problem


def prompts(count: int = 256, seed: int = 0, longest: int = 4) -> list[str]:
    """Held-out Babel problems with their answers, k = 0..``longest`` and all language pairs in equal parts.

    >>> prompts(1)[0].split()[1]
    '>plain'
    """
    corpus = Babel()
    chosen = problems(count, seed, longest)
    return [" ".join(corpus.words(problem)[1:]) for problem in chosen]  # the tokenizer puts <bos> in front


def problems(count: int = 256, seed: int = 0, longest: int = 4) -> list[Problem]:
    """The problems of ``prompts``, the shortest first."""
    corpus, lengths = Babel(), range(longest + 1)
    shares = [count // len(lengths) + (k < count % len(lengths)) for k in lengths]
    return [problem for k, share in zip(lengths, shares, strict=True) for problem in corpus.sample(k, share, seed)]
