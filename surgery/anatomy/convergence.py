r"""From which layer to which does the content of a sentence count for more than its language?

The same contents are said in several languages. At every layer a sentence is the mean of the stream over its tokens
(its first left out), less the mean of all sentences; pairs of sentences are compared by cosine:

    same_content   SC   same content, other language
    same_language  SL   other content, same language
    neither             other content, other language

Where SC > SL, what is said has won over how. ``reach`` gives the first layer and the last of which that is so. The
measure is D. Ng's (RYS, parts II and III, 2025), who sees the middle of Qwen3.5-27B in it; intervals are ours, from a
bootstrap over contents (the mean is subtracted again in every resample, a content drawn twice is no pair with itself).

Sentences are those of ``surgery.corpus.parallel_sentences`` for a model that reads text, and for the bundled model problems of its own
corpus, asked and answered in each of its languages. Languages may miss contents; notations (Python, LaTeX, arithmetic)
are languages.

Compare with the same model untrained: SC there is what tokens shared between languages, digits and names, give for
nothing. Cost: 1 F of all sentences. Memory: one vector a sentence and layer.

>>> from surgery import Stack, load
>>> found = curve(Stack(load("babel")), babel(6), sampling=Sampling(resamples=20))
>>> found.frame[["layer", "same_content"]].shape
(13, 2)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.corpus import parallel_sentences
from surgery.corpus.babel import LANGUAGES, Babel, Problem
from surgery.models.stack import Stack
from surgery.stats.bootstrap import columns, described, weights
from surgery.stats.sampling import Sampling

COLUMNS = {
    "layer": "the layer that the stream enters; the number of layers for the stream that leaves the last",
    "n_contents": "number of contents, the unit of resampling",
}
_MEASURES = {
    "same_content": "mean cosine of sentences of the same content in two languages (SC), layer mean subtracted",
    "same_language": "mean cosine of sentences of two contents in the same language (SL), layer mean subtracted",
    "neither": "mean cosine of sentences of two contents in two languages, layer mean subtracted",
    "difference": "SC - SL: above 0 content counts for more than language",
}
COLUMNS |= described(_MEASURES, over="contents")


@dataclass(frozen=True)
class Sentence:
    """What is said, in which language, and how."""

    content: str
    language: str
    text: str


@dataclass(frozen=True)
class Convergence:
    """The curve, a row per layer, and SC - SL under every resample of the contents (row 0 the estimate)."""

    frame: pd.DataFrame
    difference: Float[Tensor, "resample layer_plus_1"]

    def reach(self) -> Float[np.ndarray, "resample 2"]:
        """The first layer that SC > SL leaves, and the first behind the last such; NaN in resamples without any.

        The bare embedding is left out: no layer has brought its sentences together.
        """
        above = (self.difference[:, 1:] > 0).numpy()
        ends = np.stack([above.argmax(1), above.shape[1] - above[:, ::-1].argmax(1)], 1).astype(float)
        ends[~above.any(1)] = np.nan
        return ends


def parallel(
    languages: Iterable[str] = (*parallel_sentences.LANGUAGES, *parallel_sentences.NOTATIONS),
) -> list[Sentence]:
    """The bundled sentences in these languages and notations.

    Raises ValueError for a language that there is none in.

    >>> len(parallel()), len(parallel(["English", "Python"]))
    (114, 18)
    """
    wanted, known = tuple(languages), (*parallel_sentences.LANGUAGES, *parallel_sentences.NOTATIONS)
    if unknown := [language for language in wanted if language not in known]:
        raise ValueError(f"there are no sentences in {unknown[0]}; there are {', '.join(known)}")
    return [
        Sentence(content, language, said[language])
        for content, said in parallel_sentences.TOPICS.items()
        for language in wanted
        if language in said
    ]


def babel(n_contents: int = 24, k: int = 2, seed: int = 0) -> list[Sentence]:
    """Held-out problems of the bundled model, each asked and answered in every one of its languages.

    >>> babel(1)[0].language
    'plain'
    """
    corpus = Babel()
    problems = {(one.symbol, one.chain): one for one in corpus.sample(k, 8 * n_contents, seed)}
    asked = [
        Problem(symbol, chain, language, language)
        for symbol, chain in list(problems)[:n_contents]
        for language in LANGUAGES
    ]
    return [
        Sentence(f"{one.symbol} {one.chain}", one.source, " ".join(corpus.words(one)[1:-1]))  # no <bos>, no <eos>
        for one in asked
    ]


def curve(stack: Stack, said: Sequence[Sentence], *, sampling: Sampling = Sampling()) -> Convergence:
    """SC, SL, neither and SC - SL at every layer, with intervals over contents: ``COLUMNS``. Cost: 1 F.

    Raises ValueError where there are no two contents or no two languages, or a content is said twice in a language.
    """
    contents, content = np.unique([one.content for one in said], return_inverse=True)
    languages, language = np.unique([one.language for one in said], return_inverse=True)
    if len(contents) < 2 or len(languages) < 2:
        raise ValueError(
            f"there are {len(contents)} contents in {len(languages)} languages; to compare give two of each or more"
        )
    if len({(one.content, one.language) for one in said}) < len(said):
        raise ValueError("a content is said twice in one language; keep one sentence of each")
    draws = weights(len(contents), sampling.resamples, sampling.seed)
    weight = draws[:, torch.from_numpy(content)]
    same_content = torch.from_numpy(content[:, None] == content)
    same_language = torch.from_numpy(language[:, None] == language)
    kinds = {
        "same_content": same_content & ~same_language,
        "same_language": same_language & ~same_content,
        "neither": ~same_content & ~same_language,
    }
    rows, differences = [], []
    for layer, pooled in enumerate(_pooled(stack, said, sampling.batch_size)):
        found = _means(pooled @ pooled.T, weight, kinds)
        found["difference"] = found["same_content"] - found["same_language"]
        row: dict[str, float] = {"layer": layer, "n_contents": len(contents)}
        for name, values in found.items():
            row |= columns(name, values)
        rows.append(row)
        differences.append(found["difference"])
    return Convergence(pd.DataFrame(rows), torch.stack(differences, 1))


def _pooled(stack: Stack, said: Sequence[Sentence], batch_size: int) -> Float[Tensor, "layer_plus_1 sentence d_model"]:
    """Every sentence's mean over its tokens but the first, in float64."""
    tokens, parts = stack.tokens([one.text for one in said]), []
    for batch in tokens.batches(batch_size):
        keep = batch.ensemble().unsqueeze(-1)
        stream = stack.stream(batch).masked_fill(~keep, 0)
        parts.append((stream.sum(2, dtype=torch.float64) / keep.sum(1)).cpu())
    return torch.cat(parts, 1)


def _means(
    products: Float[Tensor, "sentence sentence"],
    weight: Float[Tensor, "resample sentence"],
    kinds: dict[str, Tensor],
) -> dict[str, Float[Tensor, " resample"]]:
    """Mean cosine of the pairs of each kind under every resample, the mean of the resample subtracted."""
    found: dict[str, list[Tensor]] = {name: [] for name in kinds}
    for times in weight:
        one = times / times.sum()
        towards = products @ one
        centred = products - towards[:, None] - towards[None, :] + one @ towards
        sizes = centred.diagonal().clamp(min=0).sqrt()
        cosine = (centred / (sizes[:, None] * sizes[None, :])).nan_to_num(posinf=0, neginf=0)
        for name, pairs in kinds.items():
            # a pair of one content counts as often as that was drawn, one of two as often as both were
            often = pairs * (times[:, None] if name == "same_content" else times[:, None] * times[None, :])
            found[name].append((often * cosine).sum() / often.sum())
    return {name: torch.stack(values) for name, values in found.items()}
