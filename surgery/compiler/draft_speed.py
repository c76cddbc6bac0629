r"""How much faster a drafted text is written: expected from agreement and time, then measured.

If draft and original agree on a share ``a`` of tokens, each by itself, a step of the original keeps on average ``(1 -
a^(n + 1)) / (1 - a)`` tokens in blocks of ``n`` (Leviathan et al. 2023, arXiv 2211.17192). ``a`` is measured on running
text. What a model writes itself is often easier to agree on; not where it writes on beyond what it has learnt.

Times are shares of the original's step on one token: ``c``, the draft's step with the shared layers; ``s``, the shared
layers alone; ``g``, what each further token adds to a step of the original. A block takes

    n c                  the draft writes n tokens
    s                    the last of them goes through the shared layers as well
    (1 - s)(1 + n g)     the original's other layers read them, and the token before

so writing is ``per_step / (n c + s + (1 - s)(1 + n g))`` times as fast. Where a step waits for weights or kernels,
``g`` is near 0 and ``s`` cancels: sharing then saves memory and the draft's reading of the prompt, but no time a token,
for which ``c`` must be small. A draft that reads as many weights as the original has a ``c`` near 1 on a CPU, and loses
whatever it agrees on. Controls: the early exit of the same depth, and as many layers left out.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from surgery.compiler import acceptance
from surgery.compiler import draft as drafting
from surgery.compiler.floor import now
from surgery.compiler.shared_cache import Ids, Pair, SharedCache
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

Result = TypeVar("Result")
COLUMNS: dict[str, str] = {
    "draft": "which model drafts",
    "layers": "layers that it has",
    "shared": "first layers that run once for draft and original",
    "agreement_predicted": "share of tokens on which it agrees with the original, as S of its pairs predicts "
    "(NaN where layers are not saved by pairs of neighbours)",
    "agreement_low": "lower end of the 95 % interval of that prediction",
    "agreement_high": "upper end",
    "agreement": "the same share, measured on running text",
    "acceptance": "share of drafted tokens that were looked at and kept, in texts that the original writes",
    "block": "tokens drafted for a step of the original, chosen for this agreement and time",
    "per_step_expected": "tokens that a step of the original keeps, as the agreement predicts",
    "per_step": "tokens that it keeps in texts that it writes",
    "cost": "time of the draft for a token, as a share of the original's",
    "ratio_expected": "tokens a second beside the original alone, as agreement and time predict",
    "ratio": "the same, measured (median over prompts)",
    "ratio_low": "smallest of all prompts",
    "ratio_high": "largest of all prompts",
    "same": "share of prompts whose text is the original's to the last token",
    "n_prompts": "prompts",
}


def expected(
    agreement: float, block: int, cost: float, shared: float = 0.0, further: float = 0.0
) -> tuple[float, float]:
    """Tokens for every step of the original, and how many times as fast writing is; the formulas are those above.

    Args:
        agreement: share of tokens on which draft and original agree.
        cost: time of the draft for a token, with the shared layers, as a share of the original's.
        shared: that of the shared layers alone.
        further: what each further token adds to a step of the original, as a share of a step on one.

    >>> [round(value, 2) for value in expected(0.8, 4, 0.5)]
    [3.36, 1.12]
    >>> round(expected(0.8, 4, 0.5, further=0.1)[1], 2), round(expected(0.8, 4, 0.5, shared=0.4, further=0.1)[1], 2)
    (0.99, 1.04)
    """
    per_step = block + 1.0 if agreement >= 1 else (1 - agreement ** (block + 1)) / (1 - agreement)
    return per_step, per_step / (block * cost + shared + (1 - shared) * (1 + block * further))


def best_block(agreement: float, cost: float, shared: float = 0.0, further: float = 0.0, most: int = 16) -> int:
    """The block for which ``expected`` is fastest.

    >>> best_block(0.9, 0.3), best_block(0.5, 0.9)
    (5, 1)
    """
    return max(range(1, most + 1), key=lambda block: expected(agreement, block, cost, shared, further)[1])


@dataclass(frozen=True)
class Costs:
    """Times as shares of the original's step on one token: as ``expected`` takes them."""

    cost: float
    shared: float
    further: float


@torch.no_grad()
def costs(original: Any, models: Pair, ids: Ids, rounds: int = 7, several: int = 4) -> Costs:
    """Measure what the parts of a pair take after the text ``ids``, in turn with the original itself.

    Each is the median of the ratios of a round.

    Cost: ``rounds`` steps of each, on one token and on ``several`` more.
    """
    cache, own = SharedCache(models), DynamicCache(config=original.config)
    own.activate_past_recording()
    ids = ids.to(original.device)
    longer = torch.cat([ids, ids[:, :1].expand(1, several + 1)], 1)
    original(ids, past_key_values=own, use_cache=True)
    for part in (models.draft, models.original):
        cache.logits(part, ids, 1)

    def alone(count: int) -> None:
        original(longer[:, ids.shape[1] : ids.shape[1] + count], past_key_values=own, use_cache=True)
        own.crop(-count)

    def draft() -> None:
        cache.logits(models.draft, longer[:, : ids.shape[1] + 1], 1)

    def shared() -> None:
        if models.shared is not None:
            models.shared(longer[:, ids.shape[1] : ids.shape[1] + 1], cache.of[models.shared])

    ways = (lambda: alone(1), lambda: alone(several + 1), draft, shared)
    spent = np.empty((rounds + 1, len(ways)))
    for turn in range(rounds + 1):
        for place, way in enumerate(ways):
            _, spent[turn, place] = _timed(way, ids.device)
            cache.forget(ids.shape[1])
    shares = spent[1:] / spent[1:, :1]  # the first round warms up
    _, more, cost, once = np.median(shares, axis=0).tolist()
    return Costs(cost, once if models.shared else 0.0, max(0.0, (more - 1) / several))


def _timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What ``run`` returns, and its seconds."""
    start = now(device)
    result = run()
    return result, now(device) - start


@with_meanings(COLUMNS)
def measure(
    stack: Stack,
    drafts: "Mapping[str, tuple[drafting.Model | str, str]]",
    tokens: Tokens,
    prompts: Sequence[Ids],
    max_new_tokens: int = 24,
    known: "pd.DataFrame | None" = None,
) -> pd.DataFrame:
    """Predict and measure every draft for the model of ``stack``: a row (``COLUMNS``) each.

    Args:
        drafts: by name, the model that drafts (or a wiring to make one of), and the wiring that S is read for.
        tokens: what agreement is measured on.
        prompts: what is written on. Original and draft take turns at every prompt.
        known: ``singles`` of the same model; None measures them on ``tokens`` if a wiring has pairs.

    Cost: ``singles``, 2 F a draft, and twice ``max_new_tokens`` steps for every prompt and draft.
    """
    original, rows = drafting.hugging_face(stack.model), []
    wirings = {name: stack.wiring(wiring) for name, (_, wiring) in drafts.items()}
    if known is None and any(acceptance.pairs_of(wiring) for wiring in wirings.values()):
        known = acceptance.singles(stack, tokens)
    for name, (model, _) in drafts.items():
        wiring, models = wirings[name], drafting.pair(stack.model, model)
        predicted = acceptance.Predicted() if known is None else acceptance.predict(known, wiring)
        agreed, times = agreement(models, tokens), costs(original, models, prompts[0])
        block = best_block(agreed, times.cost, times.shared, times.further)
        per_step, speed = expected(agreed, block, times.cost, times.shared, times.further)
        turns = [_turn(original, models, ids, max_new_tokens, block) for ids in prompts]
        ratios = [ratio for _, _, ratio in turns]
        kept = drafting.Drafted(prompts[0], tuple(count for text, _, _ in turns for count in text.kept), block)
        rows.append(
            {
                "draft": name,
                "layers": models.depths[1],
                "shared": models.n_shared,
                "agreement_predicted": predicted.middle,
                "agreement_low": predicted.low,
                "agreement_high": predicted.high,
                "agreement": agreed,
                "acceptance": kept.acceptance,
                "block": block,
                "per_step_expected": per_step,
                "per_step": kept.per_step,
                "cost": times.cost,
                "ratio_expected": speed,
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "same": float(np.mean([same for _, same, _ in turns])),
                "n_prompts": len(prompts),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _turn(
    original: Any, models: Pair, ids: Ids, max_new_tokens: int, block: int
) -> tuple[drafting.Drafted, bool, float]:
    """A drafted text, whether it is the original's own, and how many times as fast it was written."""
    own, alone = _timed(lambda: greedy(original, ids, max_new_tokens), ids.device)
    text, spent = _timed(lambda: drafting.write(models, ids, max_new_tokens, block=block), ids.device)
    return text, torch.equal(text.ids, own), alone / spent


@torch.no_grad()
def agreement(models: Pair, tokens: Tokens) -> float:
    """The share of tokens after which draft and original have the same likeliest next one. Cost: 2 F, less the shared.

    It is that of the models themselves, ``acceptance.agreement`` that of a wiring.
    """
    same = total = 0
    for ids, mask in zip(tokens.ids, tokens.mask):
        cache, row = SharedCache(models), ids[None, mask.bool()]
        ways = [cache.logits(part, row, row.shape[1]).argmax(-1) for part in (models.draft, models.original)]
        same, total = same + int((ways[0] == ways[1]).sum()), total + row.shape[1]
    return same / total


@torch.no_grad()
def greedy(original: Any, ids: Ids, count: int) -> Int[Tensor, "1 pos_and_count"]:
    """The greedy text of a Hugging Face model by itself, one token a step, with its own cache.

    >>> import surgery
    >>> greedy(surgery.models.plain(surgery.load("babel")), torch.tensor([[1, 5]]), 3).shape
    torch.Size([1, 5])
    """
    whole, cache = ids.to(original.device), None
    new = whole
    for _ in range(count):
        output = original(new, past_key_values=cache, use_cache=True)
        new, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        whole = torch.cat([whole, new], 1)
    return whole.to(ids.device)
