"""Training prompts and held-out prompts, with weights for their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery.corpus import bundled, text_files
from surgery.corpus.babel import TRAINING_MIX, Babel
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

Weigh = Callable[[Tokens], Float[Tensor, "prompt pos"]]

QUESTIONS = 0.1  # weight of a token of a Babel question, which cannot be predicted


@dataclass(frozen=True)
class Split:
    """Training prompts and held-out prompts.

    Attributes:
        corpus: prompts to train on.
        heldout: prompts to evaluate on.
        answers: marks the held-out tokens that are answers, if the prompts have any.
        weigh: weights of tokens in the loss; all alike if not given.
    """

    corpus: Tokens
    heldout: Tokens
    answers: Bool[Tensor, "prompt pos"] | None = None
    weigh: Weigh | None = None


def babel(count: int, heldout: int = 512, seed: int = 0, shares: Sequence[float] = TRAINING_MIX) -> Split:
    """``count`` training problems of Babel, k = 0, 1, ... in these shares, and ``heldout`` ones, equally many per k."""
    problems = Babel()
    trained, _ = problems.encode(problems.mixture(count, seed, shares))
    unseen, answers = problems.encode(bundled.problems(heldout, longest=len(shares) - 1))
    padding = problems.token_ids["<pad>"]
    corpus, evaluated = (Tokens(ids, ids != padding) for ids in map(torch.from_numpy, (trained, unseen)))
    return Split(corpus, evaluated, torch.from_numpy(answers), weigh_answers)


def by_k(data: Split) -> dict[int, Split]:
    """Split the held-out problems of ``babel`` by their number of steps k."""
    lengths = np.array([problem.k for problem in bundled.problems(len(data.heldout))])
    parts = {k: torch.from_numpy(np.flatnonzero(lengths == k)) for k in sorted(set(lengths.tolist()))}
    return {
        k: Split(
            data.corpus,
            Tokens(data.heldout.ids[indices], data.heldout.mask[indices]),
            None if data.answers is None else data.answers[indices],
        )
        for k, indices in parts.items()
    }


def weigh_answers(tokens: Tokens) -> Float[Tensor, "prompt pos"]:
    """Weigh the tokens of Babel's answers 1, those of its questions ``QUESTIONS``, padding 0."""
    answers = torch.from_numpy(Babel().answer_mask(tokens.ids.cpu().numpy())).to(tokens.ids.device)
    return torch.where(answers, 1.0, QUESTIONS) * tokens.mask


def texts(stack: Stack, text: Path, heldout: Path | None, count: int, most: int, longest: int) -> Split:
    """Prompts of files, cut to ``longest`` tokens: ``count`` to train on, ``most`` to evaluate on.

    Without ``heldout`` the last tenth of ``text`` is held out. Raises ValueError where that is less than one prompt.
    """
    corpus = [prompt for _, prompt in text_files.read_prompts(text, count)]
    if heldout is not None:
        unseen = [prompt for _, prompt in text_files.read_prompts(heldout, most)]
    else:
        last = min(most, len(corpus) // 10)
        if not last:
            raise ValueError(
                f"{text} has {len(corpus)} prompts: give 10 or more, or prompts to judge by with --heldout"
            )
        corpus, unseen = corpus[:-last], corpus[-last:]
    return Split(stack.tokens(corpus, longest), stack.tokens(unseen, longest))
