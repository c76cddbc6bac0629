"""Prompts with words that may come next, told apart by their first tokens: what a logit difference is between.

    Prompt("The capital of France is", targets=("Paris", "Rome"))      the right word first

Prompt and target are joined by one space unless there is white space at the seam, and tokenised together, as a probe's
answer is (``surgery.corpus.probes``): a target's first token is the first after the tokens of the prompt alone. A probe
with choices makes one too: ``Prompt(probe.prompt, probe.answers)``.

>>> import surgery
>>> targets = Targets.of(surgery.Stack(surgery.load("babel")), [Prompt("p3 pf1 >other", ("o4", "o5"))])
>>> targets.tokens.last.tolist(), targets.ids.shape, targets.weights.tolist()
([3], torch.Size([1, 2]), [[1.0, -1.0]])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.models.stack import Stack
from surgery.models.tokens import (
    Tokens,
    common_prefix,
    has_unknown_words,
    joined,
    padded,
    require_known,
    unended_rows,
)
from surgery.outside import shown


@dataclass(frozen=True)
class Prompt:
    """A text and at least two words (or texts) that may follow it, the right one first.

    Raises ValueError for an empty text or target, fewer than two targets, or one that is given twice.
    """

    text: str
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ValueError(f"targets are several texts, such as ({self.targets!r}, 'other'), not one")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.text.strip():
            raise ValueError("the text of a prompt is empty")
        if len(self.targets) < 2:
            raise ValueError(f"a prompt needs two targets or more, the right one first, not {len(self.targets)}")
        if not all(target.strip() for target in self.targets):
            raise ValueError(f"a target is empty in {shown(list(self.targets), 200)}")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"a target is given twice in {shown(list(self.targets), 200)}")


@dataclass(frozen=True)
class Targets:
    """Prompts as token ids, and for each which logits of its last token are compared.

    Attributes:
        tokens: the prompts.
        ids: of every prompt, the first token of each target; the first one again where others have more targets.
        weights: of their logits at the prompt's last token: 1 for the first target, -1 shared by the others, else 0.
    """

    tokens: Tokens
    ids: Int[Tensor, "prompt target"]
    weights: Float[Tensor, "prompt target"]

    @classmethod
    def of(cls, stack: Stack, prompts: Sequence[Prompt], joiner: str = " ") -> "Targets":
        """Tokenise prompts and targets for a model.

        Raises ValueError, naming the prompt: the targets begin with the same token, or at different places; the prompt
        is too long; a word is unknown to the tokenizer. Also without a prompt or a tokenizer.
        """
        if not prompts:
            raise ValueError("there is no prompt")
        if stack.tokenizer is None:
            raise ValueError(f"{stack.name} has no tokenizer, so targets cannot be given as texts")
        alone = unended_rows(stack.tokenizer, [prompt.text for prompt in prompts])
        read = [_read(stack, n, prompt, ids, joiner) for n, (prompt, ids) in enumerate(zip(prompts, alone), start=1)]
        most = max(len(first) for _, first in read)
        ids = torch.tensor([[*first, *[first[0]] * (most - len(first))] for _, first in read])
        shares = [[1.0, *[-1 / (len(first) - 1)] * (len(first) - 1), *[0.0] * (most - len(first))] for _, first in read]
        tokens = padded([row for row, _ in read], stack.tokenizer.pad_token_id, stack.d_vocab)
        return cls(tokens.to(stack.device), ids.to(stack.device), torch.tensor(shares, device=stack.device))

    def __len__(self) -> int:
        return len(self.tokens)

    def compare(
        self, logits: Float[Tensor, "row target"], prompts: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
        """Of the logits of prompts' targets: the first minus the mean of the others, and whether it is the largest."""
        weights = self.weights[prompts].to(logits)
        others = logits.masked_fill(weights >= 0, -torch.inf)
        return (logits * weights).sum(1), logits[:, 0] > others.max(1).values


def _read(
    stack: Stack, number: int, prompt: Prompt, alone: list[int], joiner: str
) -> tuple[list[int], tuple[int, ...]]:
    """The tokens of one prompt that its targets follow, and the first token of each."""
    where = f"prompt {number} ({shown(prompt.text, 40)!r})"
    assert stack.tokenizer is not None
    texts = [joined(prompt.text, target, joiner) for target in prompt.targets]
    rows = unended_rows(stack.tokenizer, texts)
    begins = [common_prefix(alone, row) for row in rows]
    for target, text, row, begin in zip(prompt.targets, texts, rows, begins):
        if has_unknown_words(stack.tokenizer, text, row):
            raise ValueError(f"{where}, target {target!r}: it contains words that this model's tokenizer does not know")
        require_known(row, stack.d_vocab, f"{where}, target {target!r}")
        if begin >= len(row) or begin != begins[0] or begin < 1:
            raise ValueError(
                f"{where}: the target {target!r} has no token of its own there, as the tokenizer cuts prompt and "
                "target together differently; end the prompt before a space"
            )
    first = tuple(row[begin] for row, begin in zip(rows, begins))
    if again := next((n for n, token in enumerate(first) if token in first[:n]), 0):
        both = f"{prompt.targets[first.index(first[again])]!r} and {prompt.targets[again]!r}"
        raise ValueError(
            f"{where}: the targets {both} begin with the same token {stack.tokenizer.decode([first[again]])!r}, so its "
            "logit cannot tell them apart; choose others, or ask for their whole likelihood with a Probe"
        )
    if begins[0] > stack.n_ctx:
        raise ValueError(f"{where} has {begins[0]} tokens, the model reads {stack.n_ctx}; ask something shorter")
    return rows[0][: begins[0]], first
