"""What a changed final stream costs: the rise of the loss, and the divergence of the next-token distribution.

Logits are read out only where a token is predicted, and only those of one portion are ever held: for every portion the
clean distribution once, then each changed one beside it, a few rows at a time, so that what is computed of the logits
stays in the cache.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.instruments.readout import log_probabilities, logits, portions, predicting_positions
from surgery.models.engine import Stream
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

_IN_CACHE = 2**18  # logits


def changes(
    stack: Stack,
    clean: Float[Tensor, "row d_model"],
    finals: Sequence[Float[Tensor, "row d_model"]],
    targets: Int[Tensor, " row"],
) -> Float[Tensor, "measure final row"]:
    """Return the rise of the loss (nats) and KL(clean || final) of every prediction, for each of the final streams.

    Cost: one readout a final stream, and one. Memory: three times ``readout.LOGITS_AT_ONCE`` numbers.

    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.random_network())
    >>> x = torch.randn(3, stack.d_model)
    >>> changes(stack, x, [x], torch.tensor([1, 2, 3])).shape
    torch.Size([2, 1, 3])
    """
    parts = []
    for rows in portions(stack, targets):
        before = log_probabilities(stack, clean[rows])
        shares, right = before.exp(), targets[rows].unsqueeze(1)
        few = max(1, _IN_CACHE // stack.d_vocab)
        of_finals = []
        for final in finals:
            pieces = zip(logits(stack, final[rows]).split(few), before.split(few), strict=True)
            measured = []
            for p, q, wanted in zip(pieces, shares.split(few), right.split(few), strict=True):
                lost = p[1] - p[0].log_softmax(-1)
                measured.append(torch.stack([lost.gather(1, wanted).squeeze(1), torch.linalg.vecdot(q, lost)]))
            of_finals.append(torch.cat(measured, 1))
        parts.append(torch.stack(of_finals, 1))
    return torch.cat(parts, 2)


def by_prompt(
    stack: Stack, tokens: Tokens, clean: Stream, finals: Sequence[Float[Tensor, "prediction d_model"]]
) -> Float[Tensor, "measure final batch"]:
    """Return ``changes`` summed over every prompt's predictions, in float64.

    ``finals`` are of the predicting tokens alone (``predicted``). Cost and memory: as ``changes``.
    """
    predicting = predicting_positions(tokens)
    values = changes(stack, predicted(clean, predicting), finals, tokens.ids[:, 1:][predicting]).double()
    total = torch.zeros(2, len(finals), len(tokens), dtype=torch.float64, device=values.device)
    return total.index_add_(2, predicting.nonzero()[:, 0], values)


def predicted(x: Stream, predicting: Bool[Tensor, "batch pos_minus_1"]) -> Float[Tensor, "prediction d_model"]:
    """Return the vectors of the tokens that predict one."""
    return x[:, :-1][predicting]
