"""What a search must beat: blocks of pairs chosen by hand, pairs at random, spans left out or replaced by one matrix.

Each saves as many layers in a row as the division it stands beside.
"""

import random
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from surgery.compiler.search import COLUMNS, Groups, mean_gains, notation, promising_blocks, single_costs
from surgery.corpus.probes import Encoded
from surgery.graft import linear_maps
from surgery.graft.linear_maps import Affine
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.training.activations import Moments

BLOCK = "block of pairs"


def at_random(n_layers: int, pairs: int, seed: int) -> Groups:
    """As many pairs of neighbours, drawn at random.

    >>> at_random(6, 2, seed=0)
    ((0,), (1,), (2, 3), (4, 5))
    """
    generator = random.Random(f"pairs {n_layers} {pairs} {seed}")
    units = [2] * pairs + [1] * (n_layers - 2 * pairs)
    generator.shuffle(units)
    first = [sum(units[:place]) for place in range(len(units))]
    return tuple(tuple(range(start, start + size)) for start, size in zip(first, units, strict=True))


def pairs(
    stack: Stack,
    texts: Encoded,
    saved: Sequence[int],
    *,
    metric: str = "loss",
    draws: int = 3,
    screen: int = 6,
    **options: Any,
) -> pd.DataFrame:
    """The best contiguous block of pairs for every number of layers saved, and ``draws`` random sets of pairs.

    The block is the best on ``texts`` of the ``screen`` whose pairs cost least by themselves, layer 0 left alone. Rows
    of ``search.COLUMNS``.
    """
    n_layers, alone = stack.n_layers, single_costs(stack, texts, "merge", metric, **options)
    placed = {
        (count, place): str(stack.wiring(notation(groups)))
        for count in saved
        for place, groups in enumerate(promising_blocks(n_layers, count, alone, screen))
    }
    drawn = {
        (count, seed): str(stack.wiring(notation(at_random(n_layers, count, seed))))
        for count in saved
        if 2 * count <= n_layers
        for seed in range(draws)
    }
    gains = mean_gains(stack, [*placed.values(), *drawn.values()], texts, metric, **options)
    rows = [
        {"family": "random pairs", "depth": n_layers - count, "wiring": name, "cost_search": -gains[name]}
        for (count, _), name in drawn.items()
    ]
    for count in dict.fromkeys(count for count, _ in placed):
        name = max((name for (of, _), name in placed.items() if of == count), key=lambda name: gains[name])
        rows.append({"family": BLOCK, "depth": n_layers - count, "wiring": name, "cost_search": -gains[name]})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def best_spans(
    stack: Stack, texts: Encoded, saved: Sequence[int], *, metric: str = "loss", screen: int = 6, **options: Any
) -> dict[int, tuple[int, int]]:
    """For every number of layers, the span of as many that can be left out for least, of the ``screen`` whose layers
    cost least by themselves; layer 0 stays."""
    n, alone = stack.n_layers, single_costs(stack, texts, "skip", metric, **options)
    spans = {}
    for count in saved:
        every = [(start, start + count) for start in range(1, n - count + 1)]
        for start, stop in sorted(every, key=lambda span: sum(alone[layer] for layer in range(*span)))[:screen]:
            spans[start, stop] = str(stack.wiring(f":{start} {stop}:" if stop < n else f":{start}"))
    gains = mean_gains(stack, list(spans.values()), texts, metric, **options)
    return {
        count: max((span for span in spans if span[1] - span[0] == count), key=lambda span: gains[spans[span]])
        for count in saved
        if any(stop - start == count for start, stop in spans)
    }


@torch.no_grad()
def linear_map(stack: Stack, tokens: Tokens, start: int, stop: int, batch_size: int = 16) -> Affine:
    """The best linear map in the place of layers [start, stop), fitted to the tokens of three prompts in four.

    The strength of its ridge is chosen on the others. Cost: ``stop / L`` F.
    """
    fitted = len(tokens) * 3 // 4
    return linear_maps.linear(
        _moments(stack, tokens[:fitted], start, stop, batch_size, skip_first=False),
        _moments(stack, tokens[fitted:], start, stop, batch_size, skip_first=True),
    )


def _moments(stack: Stack, tokens: Tokens, start: int, stop: int, batch_size: int, *, skip_first: bool) -> Moments:
    """The moments of a span, on real tokens."""
    before, update = [], []
    for batch in tokens.batches(batch_size):
        context = stack.context(batch)
        x = stack.execute(f":{start}", context.x0, context)
        counted = batch.ensemble(skip_first=skip_first)
        before.append(x[counted].double())
        update.append((stack.execute(f"{start}:{stop}", x, context)[counted] - x[counted]).double())
    x, u = torch.cat(before), torch.cat(update)
    mean_x, mean_u = x.mean(0), u.mean(0)
    x, u = x - mean_x, u - mean_u
    return Moments(len(x), mean_x, mean_u, x.T @ x / len(x), x.T @ u / len(x), u.T @ u / len(x))
