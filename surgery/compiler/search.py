"""Search the wirings with the fewest layers in a row, and least loss.

A division cuts the layers into groups that run side by side, each as one layer (``surgery.rebuild.fuse``): its depth is
the number of groups. From the model as it is, every step makes one move: two groups that follow each other become one,
or a layer is left out. The costs of all single moves are measured first; after that a state tries only the moves whose
single costs are least (``screen``), and the ``beam`` best divisions of each depth go on. Damage of several moves is no
sum of theirs, but that is what decides which are worth a try, not what is believed of them: every division that is kept
was measured as a whole. All wirings of a depth run in one scan, which shares what they have in common.

LP (Bhaskar et al. 2025, arXiv 2502.02790) pairs a contiguous block by hand. A search that adds a pair at a time misses
some of these, so the most promising blocks of each depth are tried too.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from surgery.corpus.probes import Encoded
from surgery.models.stack import Stack
from surgery.rebuild import fuse
from surgery.scan import scanning
from surgery.stats import comparisons

Groups = tuple[tuple[int, ...], ...]
COLUMNS = {
    "family": "how layers were saved",
    "depth": "layers in a row that are left",
    "wiring": "the order in which they run",
    "cost_search": "what the search chose by, on its texts: divergence from the unmodified model (nats per token)",
}
MOST = 4  # layers in a group


def notation(groups: Groups) -> str:
    """The wiring of a division.

    >>> notation(((0,), (1, 2), (3,)))
    '0 {1.attn | 2.attn} {1.mlp | 2.mlp} 3'
    """
    return " ".join(map(fuse.group, groups))


def merges(groups: Groups) -> "dict[tuple[str, int], Groups]":
    """Every division in which two groups that follow each other have become one, by the layer where they met.

    >>> list(merges(((0,), (1, 2), (3,))).values())
    [((0, 1, 2), (3,)), ((0,), (1, 2, 3))]
    """
    return {
        ("merge", groups[place + 1][0]): (
            *groups[:place],
            (*groups[place], *groups[place + 1]),
            *groups[place + 2 :],
        )
        for place in range(len(groups) - 1)
        if len(groups[place]) + len(groups[place + 1]) <= MOST
    }


def skips(groups: Groups) -> "dict[tuple[str, int], Groups]":
    """Every division with one layer, that runs by itself, left out."""
    return {
        ("skip", group[0]): (*groups[:place], *groups[place + 1 :])
        for place, group in enumerate(groups)
        if len(group) == 1 and len(groups) > 1
    }


def both(groups: Groups) -> "dict[tuple[str, int], Groups]":
    """The moves of ``merges`` and of ``skips``."""
    return merges(groups) | skips(groups)


def block(n_layers: int, start: int, pairs: int) -> Groups:
    """LP's recipe (arXiv 2502.02790): a contiguous block of pairs, from layer ``start`` on.

    >>> block(6, 1, 2)
    ((0,), (1, 2), (3, 4), (5,))
    """
    stop = start + 2 * pairs
    middle = tuple((layer, layer + 1) for layer in range(start, stop, 2))
    return (*((layer,) for layer in range(start)), *middle, *((layer,) for layer in range(stop, n_layers)))


def blocks(n_layers: int, pairs: int) -> list[Groups]:
    """Every ``block`` of so many pairs, layer 0 left alone."""
    return [block(n_layers, start, pairs) for start in range(1, n_layers - 2 * pairs + 1)]


def promising_blocks(n_layers: int, pairs: int, alone: Mapping[int, float], most: int) -> list[Groups]:
    """The ``most`` blocks whose pairs cost least, each by itself; ``alone`` is by the layer where a pair meets."""

    def expected(groups: Groups) -> float:
        return sum(alone[group[1]] for group in groups if len(group) == 2)

    return sorted(blocks(n_layers, pairs), key=expected)[:most]


FAMILIES: dict[str, Callable[[Groups], dict[tuple[str, int], Groups]]] = {
    "side by side": merges,
    "left out": skips,
    "both": both,
}


def divisions(
    stack: Stack,
    texts: Encoded,
    family: str = "side by side",
    *,
    metric: str = "loss",
    shallowest: int | None = None,
    limit: float = float("inf"),
    beam: int = 2,
    screen: int = 6,
    out: "str | Path | None" = None,
    precision: str = "float32",
) -> pd.DataFrame:
    """The best division of every depth that was found: ``COLUMNS``, deepest first.

    Args:
        texts: what to choose by; the costs that they show are too low, as they were chosen: measure on others.
        shallowest: stop at this depth; half of the layers by default.
        limit: stop where the best costs more.
        beam: divisions that go on from each depth.
        screen: moves that each of them tries.
        out: a folder for the scans, so that the same search goes on after a kill.
        precision: as of ``scan.run``.

    Cost: the single moves, about L/2 F, and at most ``beam * screen`` wirings for every layer saved.

    Raises ValueError for an unknown family, and as ``scan.run`` does.

    >>> import surgery
    >>> stack = surgery.Stack(surgery.load("babel"))
    >>> asked = surgery.corpus.probes.named("babel", 8).encode(stack)
    >>> divisions(stack, asked, metric="loglik", shallowest=10)["depth"].tolist()
    [12, 11, 10]
    """
    if family not in FAMILIES:
        raise ValueError(f"layers are saved {', '.join(FAMILIES)}; not {family!r}")
    moves = FAMILIES[family]
    shallowest = stack.n_layers // 2 if shallowest is None else shallowest
    whole: Groups = tuple((layer,) for layer in range(stack.n_layers))

    def measured(candidates: Iterable[Groups]) -> dict[Groups, float]:
        return costs(stack, candidates, texts, metric, out=out, precision=precision)

    states: dict[Groups, float] = {whole: 0.0}
    rows = [{"depth": stack.n_layers, "wiring": str(stack.wiring(":")), "cost_search": 0.0}]
    first = moves(whole)
    of_division = measured(first.values())
    alone = {move: of_division[groups] for move, groups in first.items()}
    found = of_division
    while found:
        best = sorted(found, key=lambda groups: (found[groups], groups))[:beam]
        states = {groups: found[groups] for groups in best}
        cost = states[best[0]]
        rows.append({"depth": len(best[0]), "wiring": str(stack.wiring(notation(best[0]))), "cost_search": float(cost)})
        if not cost <= limit or len(best[0]) <= shallowest:
            break
        promising: dict[Groups, float] = {}
        for groups, so_far in states.items():
            expected = {after: so_far + alone.get(move, np.inf) for move, after in moves(groups).items()}
            chosen = sorted(expected, key=lambda after: (expected[after], after))[:screen]
            promising |= {after: expected[after] for after in chosen}
        merged = {layer: cost for (move, layer), cost in alone.items() if move == "merge"}
        pairs = stack.n_layers - len(best[0]) + 1
        found = measured([*promising, *(promising_blocks(stack.n_layers, pairs, merged, screen) if merged else [])])
    return pd.DataFrame(rows).assign(family=family)[list(COLUMNS)]


def single_costs(stack: Stack, texts: Encoded, move: str, metric: str, **options: Any) -> dict[int, float]:
    """What every single ``merge`` or ``skip`` costs, by its layer; ``options`` of ``costs``."""
    whole: Groups = tuple((layer,) for layer in range(stack.n_layers))
    divided = (merges if move == "merge" else skips)(whole)
    measured = costs(stack, divided.values(), texts, metric, **options)
    return {layer: measured[groups] for (_, layer), groups in divided.items()}


def costs(
    stack: Stack, candidates: Iterable[Groups], texts: Encoded, metric: str, **options: Any
) -> dict[Groups, float]:
    """The mean loss that every division adds (what the metric loses); infinite where it is not finite. ``options`` are
    those of ``mean_gains``."""
    named = {groups: str(stack.wiring(notation(groups))) for groups in candidates}
    if not named:
        return {}
    gains = mean_gains(stack, list(named.values()), texts, metric, **options)
    return {groups: -float(gains[name]) for groups, name in named.items()}


def mean_gains(
    stack: Stack,
    wirings: Sequence[str],
    texts: Encoded,
    metric: str,
    out: "str | Path | None" = None,
    precision: str = "float32",
) -> pd.Series:
    """The mean gain of every wiring over the texts, by its notation; ``out`` is a folder, with a file for each scan."""
    name = hashlib.sha256("\n".join(sorted(wirings)).encode()).hexdigest()[:12]
    file = None if out is None else Path(out) / f"{name}.csv"
    rows = scanning.run(stack, wirings, texts, file, metrics=(metric,), precision=precision)
    return comparisons.differences(rows, metric).mean()
