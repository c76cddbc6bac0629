r"""From which layer to which does the content of a sentence count for more than its language?

The same contents are put into several languages. At every layer an utterance is represented by the mean of the stream
over its tokens (without the first, and massive ones), less the mean over all utterances; pairs of utterances are
compared by cosine:

    same_content   SC   same content, other language
    same_language  SL   other content, same language
    neither             other content, other language

Where SC > SL, content counts for more than language. ``reach`` gives the first and the last layer for which that is so.
The measure is D. Ng's (RYS, parts II and III, 2025), who sees the middle of Qwen3.5-27B in it; intervals are ours, from
a bootstrap over contents (the mean is subtracted again in every resample; a content drawn twice makes no pair with
itself).

For a model that reads text the utterances are those of ``surgery.corpus.parallel_sentences``; for the bundled model
they are problems of its own corpus, asked and answered in each of its languages. Languages may miss contents;
notations (Python, LaTeX, arithmetic) are languages.

Compare with the same model untrained: SC there is what tokens shared between languages, digits and names, give for
nothing. Cost: 2 F of all utterances. Memory: one vector per utterance and layer.

>>> from surgery import Stack, load
>>> result = curve(Stack(load("babel")), babel(6), sampling=Sampling(resamples=20))
>>> result.frame[["layer", "same_content"]].shape
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
from surgery.instruments.ensemble import Ensemble
from surgery.memory import in_smaller_batches
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
class Utterance:
    """A content put into a language, as text."""

    content: str
    language: str
    text: str


@dataclass(frozen=True)
class Convergence:
    """The curve with a row per layer, and SC - SL under every resample of the contents (row 0 is the estimate)."""

    frame: pd.DataFrame
    difference: Float[Tensor, "resample layer_plus_1"]

    def reach(self) -> Float[np.ndarray, "resample 2"]:
        """Return the first layer that leaves SC > SL, and the first behind the last such; NaN in resamples without any.

        The bare embedding is left out: no layer has brought its utterances together.
        """
        above = (self.difference[:, 1:] > 0).numpy()
        ends = np.stack([above.argmax(1), above.shape[1] - above[:, ::-1].argmax(1)], 1).astype(float)
        ends[~above.any(1)] = np.nan
        return ends


def parallel(
    languages: Iterable[str] = (*parallel_sentences.LANGUAGES, *parallel_sentences.NOTATIONS),
) -> list[Utterance]:
    """Return the bundled sentences in these languages and notations.

    Raises ValueError for a language without sentences.

    >>> len(parallel()), len(parallel(["English", "Python"]))
    (114, 18)
    """
    chosen, known = tuple(languages), (*parallel_sentences.LANGUAGES, *parallel_sentences.NOTATIONS)
    if unknown := [language for language in chosen if language not in known]:
        raise ValueError(f"there are no sentences in {unknown[0]}; there are {', '.join(known)}")
    return [
        Utterance(content, language, texts[language])
        for content, texts in parallel_sentences.TOPICS.items()
        for language in chosen
        if language in texts
    ]


def babel(n_contents: int = 24, k: int = 2, seed: int = 0) -> list[Utterance]:
    """Return held-out problems of the bundled model, each asked and answered in every one of its languages.

    >>> babel(1)[0].language
    'plain'
    """
    corpus = Babel()
    contents = dict.fromkeys((problem.symbol, problem.chain) for problem in corpus.sample(k, 8 * n_contents, seed))
    problems = [
        Problem(symbol, chain, language, language)
        for symbol, chain in list(contents)[:n_contents]
        for language in LANGUAGES
    ]
    return [
        Utterance(f"{problem.symbol} {problem.chain}", problem.source, " ".join(corpus.words(problem)[1:-1]))
        for problem in problems  # their words without <bos> and <eos>
    ]


@in_smaller_batches
def curve(stack: Stack, utterances: Sequence[Utterance], *, sampling: Sampling = Sampling()) -> Convergence:
    """Measure SC, SL, neither and SC - SL at every layer, with intervals over contents: ``COLUMNS``. Cost: 2 F.

    Raises ValueError for fewer than two contents or two languages, for two utterances of one content in one language,
    and for one of which no token is left.
    """
    contents, content = np.unique([utterance.content for utterance in utterances], return_inverse=True)
    languages, language = np.unique([utterance.language for utterance in utterances], return_inverse=True)
    if len(contents) < 2 or len(languages) < 2:
        raise ValueError(
            f"there are {len(contents)} contents in {len(languages)} languages; to compare give two of each or more"
        )
    if len({(utterance.content, utterance.language) for utterance in utterances}) < len(utterances):
        raise ValueError("a content occurs twice in one language; keep one sentence of each")
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
    for layer, pooled in enumerate(_pooled(stack, utterances, sampling)):
        measures = _mean_cosines(pooled @ pooled.T, weight, kinds)
        measures["difference"] = measures["same_content"] - measures["same_language"]
        row: dict[str, float] = {"layer": layer, "n_contents": len(contents)}
        for name, values in measures.items():
            row |= columns(name, values)
        rows.append(row)
        differences.append(measures["difference"])
    return Convergence(pd.DataFrame(rows), torch.stack(differences, 1))


def _pooled(
    stack: Stack, utterances: Sequence[Utterance], sampling: Sampling
) -> Float[Tensor, "layer_plus_1 utterance d_model"]:
    """Return every utterance's mean over its tokens of the ensemble, in float64."""
    ensemble = Ensemble.of(stack, stack.tokens([utterance.text for utterance in utterances]), sampling)
    if not (kept := ensemble.mask.any(1)).all():
        nothing = utterances[int((~kept).nonzero()[0])]
        raise ValueError(f"no token of {nothing.text!r} is left to measure: leave it out, or skip_massive=False")
    parts = []
    for _, context, mask in ensemble.batches(stack, "utterances"):
        keep = mask.unsqueeze(-1)
        stream = stack.stream(context).masked_fill(~keep, 0)
        parts.append((stream.sum(2, dtype=torch.float64) / keep.sum(1)).cpu())
    return torch.cat(parts, 1)


def _mean_cosines(
    products: Float[Tensor, "utterance utterance"],
    weight: Float[Tensor, "resample utterance"],
    kinds: dict[str, Tensor],
) -> dict[str, Float[Tensor, " resample"]]:
    """Return the mean cosine of the pairs of each kind under every resample, the mean of the resample subtracted.

    With ``t`` how often each was drawn and ``s`` the sizes of the vectors, a mean is a sum of ``(t / s)_i c_ij
    (t / s)_j`` over pairs, where ``c_ij = K_ij - a_i - a_j + a``: products of matrices, for all resamples at once.
    """
    products = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()  # or large means cancel
    share = weight / weight.sum(1, keepdim=True)
    towards = share @ products
    whole = (towards * share).sum(1, keepdim=True)
    sizes = (products.diagonal() - 2 * towards + whole).clamp(min=0).sqrt()
    scale = torch.where(sizes > 0, 1 / sizes, 0)
    means: dict[str, Float[Tensor, " resample"]] = {}
    for name, kind in kinds.items():
        pairs = kind.to(weight)
        # a pair of one content counts as often as that was drawn, one of two as often as both were
        other = torch.ones_like(weight) if name == "same_content" else weight
        left, right = weight * scale, other * scale
        cosines = (left @ (pairs * products) - (left * towards) @ pairs - (left @ pairs) * (towards - whole)) * right
        means[name] = cosines.sum(1) / (weight @ pairs * other).sum(1)
    return means
