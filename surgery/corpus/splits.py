"""Three parts of the prompts: to train on, to stop and choose by, and to report on. No prompt is in two of them.

What is chosen by some prompts (when to stop, which checkpoint, which learning rate) looks better on them than it is, so
it is reported on others.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from surgery.corpus import bundled, text_files
from surgery.corpus.babel import TRAINING_MIX, Babel
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

Weigh = Callable[[Tokens], Float[Tensor, "prompt pos"]]

STOP_SEED = 1  # of the problems to stop by; those to report on have 0
QUESTIONS = 0.1  # weight of a token of a Babel question, which cannot be predicted


@dataclass(frozen=True)
class Split:
    """Prompts to train on, to stop by and to report on.

    Attributes:
        corpus: prompts to train on.
        stop: prompts by which training is stopped and anything else is chosen; nothing is reported of them but curves.
        heldout: prompts to report on; nothing is chosen by them.
        answers: marks the tokens of ``heldout`` that are answers, if the prompts have any.
        stop_answers: marks those of ``stop``.
        weigh: weights of tokens in the loss; all alike if not given.

    Raises ValueError where a prompt is in two parts: the same tokens, padding aside.

    >>> parts = [Tokens.of(torch.arange(start, start + 4).reshape(2, 2)) for start in (0, 4, 6)]
    >>> Split(*parts)
    Traceback (most recent call last):
        ...
    ValueError: 1 prompt of those to stop by is among those to report on, such as number 1: none may be in two parts
    """

    corpus: Tokens
    stop: Tokens
    heldout: Tokens
    answers: Bool[Tensor, "prompt pos"] | None = None
    stop_answers: Bool[Tensor, "stop stop_pos"] | None = None
    weigh: Weigh | None = None

    def __post_init__(self) -> None:
        parts = {"to train on": self.corpus, "to stop by": self.stop, "to report on": self.heldout}
        contents = {name: list(contents_of(part)) for name, part in parts.items()}
        for (name, part), (other, others) in itertools.combinations(contents.items(), 2):
            known = set(others)
            if shared := [number for number, content in enumerate(part) if content in known]:
                raise ValueError(
                    f"{len(shared)} prompt{'s' * (len(shared) > 1)} of those {name} {'are' if shared[1:] else 'is'} "
                    f"among those {other}, such as number {shared[0]}: none may be in two parts"
                )


def contents_of(tokens: Tokens) -> Iterator[bytes]:
    """The real tokens of each prompt, as something to compare: equal for equal prompts, however they are padded."""
    for ids, mask in zip(tokens.ids.cpu().numpy(), tokens.mask.cpu().numpy(), strict=True):
        yield ids[mask].astype(np.int64).tobytes()


def babel(count: int, heldout: int = 512, seed: int = 0, shares: Sequence[float] = TRAINING_MIX) -> Split:
    """``count`` training problems of Babel, k = 0, 1, ... in these shares, and ``heldout`` ones, equally many per k.

    At most as many again, held out too, are to stop by: other problems, so that there are few of k = 1 and none of
    k = 0, of which Babel holds out sixteen in all. Where that leaves none, a random half of them is to stop by.
    """
    problems, longest = Babel(), len(shares) - 1
    reported = bundled.problems(heldout, longest=longest)
    chosen = [p for p in dict.fromkeys(bundled.problems(heldout, STOP_SEED, longest)) if p not in set(reported)]
    if not chosen:
        distinct = list(dict.fromkeys(reported))
        chosen = [distinct[i] for i in np.random.default_rng(STOP_SEED).permutation(len(distinct))[::2]]
        reported = [problem for problem in reported if problem not in set(chosen)]
    encoded = [problems.encode(part) for part in (problems.mixture(count, seed, shares), chosen, reported)]
    padding = problems.token_ids["<pad>"]
    corpus, stop, evaluated = (Tokens(ids, ids != padding) for ids in (torch.from_numpy(ids) for ids, _ in encoded))
    _, stop_answers, answers = (torch.from_numpy(answers) for _, answers in encoded)
    return Split(corpus, stop, evaluated, answers, stop_answers, weigh_answers)


def by_k(data: Split) -> dict[int, Split]:
    """Split the problems of ``babel`` to report on by their number of steps k."""
    lengths = np.array([problem.k for problem in bundled.problems(len(data.heldout))])
    parts = {k: torch.from_numpy(np.flatnonzero(lengths == k)) for k in sorted(set(lengths.tolist()))}
    return {
        k: replace(
            data,
            heldout=Tokens(data.heldout.ids[indices], data.heldout.mask[indices]),
            answers=None if data.answers is None else data.answers[indices],
        )
        for k, indices in parts.items()
    }


def weigh_answers(tokens: Tokens) -> Float[Tensor, "prompt pos"]:
    """Weigh the tokens of Babel's answers 1, those of its questions ``QUESTIONS``, padding 0."""
    answers = torch.from_numpy(Babel().answer_mask(tokens.ids.cpu().numpy())).to(tokens.ids.device)
    return torch.where(answers, 1.0, QUESTIONS) * tokens.mask


def texts(stack: Stack, text: Path, heldout: Path | None, count: int, most: int, longest: int) -> Split:
    """Prompts of files, cut to ``longest`` tokens: ``count`` to train on, at most ``most`` to stop by and to report on.

    Without ``heldout`` the last tenth of ``text`` is to report on, and the tenth before it to stop by; with it, the
    last tenth is to stop by. Texts that are the same (``text_files.same``, or equal tokens after the cut) are in one
    part only, the first that has them: ``heldout`` loses what ``text`` has too. Only the corpus keeps repetitions.

    Raises ValueError where that leaves a part without a prompt.
    """
    written = [prompt for _, prompt in text_files.read_prompts(text, count)]
    given = [] if heldout is None else [prompt for _, prompt in text_files.read_prompts(heldout, most)]
    groups = same_texts(stack, written + given, longest)
    first_of = dict(zip(reversed(groups), reversed(written + given), strict=True))
    distinct = max(groups[: len(written)]) + 1
    if not (tenth := min(most, distinct // 10)):
        raise ValueError(f"{text} has {distinct} different prompts: give 10 or more")
    trained = distinct - tenth * (2 if heldout is None else 1)
    corpus = [prompt for prompt, group in zip(written, groups, strict=False) if group < trained]
    stop = [first_of[group] for group in range(trained, trained + tenth)]
    unseen = [first_of[group] for group in range(trained + tenth, len(first_of))]
    if not unseen:
        raise ValueError(f"every prompt of {heldout} is in {text} too: give others to report on")
    trained_on, stop_by, report_on = (stack.tokens(part, longest) for part in (corpus, stop, unseen))
    return Split(trained_on, stop_by, report_on)


def same_texts(stack: Stack, written: Sequence[str], longest: int) -> list[int]:
    """Number the texts so that those that are the same have the same number, in the order in which they come first.

    They are the same if they differ in spacing, case or the form of letters only (``text_files.same``), or in nothing
    that the model sees: their first ``longest`` tokens are equal. And so are two that are the same as a third.
    """
    numbers = np.arange(len(written))
    contents = list(contents_of(stack.tokens(list(written), longest)))
    links = []
    for keys in ([text_files.same(text) for text in written], contents):
        first_with = dict(zip(reversed(keys), reversed(numbers), strict=True))
        links.append(np.array([first_with[key] for key in keys]))
    edges = (np.ones(2 * len(numbers)), (np.tile(numbers, 2), np.concatenate(links)))
    _, groups = connected_components(coo_array(edges, shape=(len(numbers), len(numbers))), directed=False)
    return pd.factorize(groups)[0].tolist()
