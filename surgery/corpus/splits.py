"""Prompts to learn from and prompts to be judged on, with weights for their tokens."""

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

QUESTIONS = 0.1  # weight of a Babel token that asks: it cannot be known beforehand


@dataclass(frozen=True)
class Split:
    """A corpus to learn from and prompts to be judged on."""

    corpus: Tokens
    heldout: Tokens
    answers: Bool[Tensor, "prompt pos"] | None = None
    weigh: Weigh | None = None


def babel(count: int, heldout: int = 512, seed: int = 0, shares: Sequence[float] = TRAINING_MIX) -> Split:
    """Babel's training problems, k = 0, 1, ... in these shares, and held-out ones of each k in equal parts."""
    problems = Babel()
    asked, _ = problems.encode(problems.mixture(count, seed, shares))
    judged, answers = problems.encode(bundled.problems(heldout, longest=len(shares) - 1))
    padding = problems.token_ids["<pad>"]
    corpus, unseen = (Tokens(ids, ids != padding) for ids in map(torch.from_numpy, (asked, judged)))
    return Split(corpus, unseen, torch.from_numpy(answers), weigh_answers)


def by_k(data: Split) -> dict[int, Split]:
    """``babel``'s held-out problems by the number of steps that they ask for."""
    lengths = np.array([problem.k for problem in bundled.problems(len(data.heldout))])
    parts = {k: torch.from_numpy(np.flatnonzero(lengths == k)) for k in sorted(set(lengths.tolist()))}
    return {
        k: Split(
            data.corpus,
            Tokens(data.heldout.ids[some], data.heldout.mask[some]),
            None if data.answers is None else data.answers[some],
        )
        for k, some in parts.items()
    }


def weigh_answers(tokens: Tokens) -> Float[Tensor, "prompt pos"]:
    """1 for Babel's answers, ``QUESTIONS`` for all else."""
    answers = torch.from_numpy(Babel().answered(tokens.ids.cpu().numpy())).to(tokens.ids.device)
    return torch.where(answers, 1.0, QUESTIONS) * tokens.mask


def texts(stack: Stack, text: Path, heldout: Path | None, count: int, most: int, longest: int) -> Split:
    """Prompts of files; without ``heldout`` the last tenth of ``text`` (``most`` at most) is kept for judging."""
    found = [one for _, one in text_files.read_prompts(text, count)]
    if heldout is not None:
        kept = [one for _, one in text_files.read_prompts(heldout, most)]
    else:
        last = min(most, len(found) // 10)
        if not last:
            raise ValueError(f"{text} has {len(found)} prompts: give 10 or more, or prompts to judge by with --heldout")
        found, kept = found[:-last], found[-last:]
    return Split(stack.tokens(found, longest), stack.tokens(kept, longest))
