"""Search the wirings with the fewest layers in a row, and least loss.

A division cuts the layers into groups that run side by side, each as one layer (``surgery.rebuild.fuse``): its depth is
the number of groups. From the model as it is, every step makes one move: two groups that follow each other become one,
or a layer is left out. In the family ``branches`` the moves are freer and save half a layer, one or two
(``surgery.compiler.branches``). The costs of all single moves are measured first; after that a state tries only the
moves whose single costs are least (``screen``, for each number of layers saved), and the ``beam`` best divisions of
each depth go on. Damage of several moves is no sum of theirs, but that is what decides which are worth a try, not what
is believed of them: every division that is kept was measured as a whole. All wirings of a depth run in one scan, which
shares what they have in common.

LP (Calvo González et al. 2025, arXiv 2502.02790) pairs a block by hand. A search that adds a pair at a time misses
some of these, so the most promising blocks of each depth are tried too.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd

from surgery.compiler import branches
from surgery.corpus.probes import Encoded
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.rebuild import fuse
from surgery.scan import scanning
from surgery.stats import comparisons
from surgery.wiring.value import Wiring

Groups = tuple[tuple[int, ...], ...]
Division = TypeVar("Division")
Move = tuple[str, int]  # how, and the layer where two groups meet or that is left out
COLUMNS = {
    "family": "how layers were saved",
    "depth": "layers in a row that are left; a sublayer alone counts one half",
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


def merges(groups: Groups) -> "dict[Move, Groups]":
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


def skips(groups: Groups) -> "dict[Move, Groups]":
    """Every division with one layer, that runs by itself, left out."""
    return {
        ("skip", group[0]): (*groups[:place], *groups[place + 1 :])
        for place, group in enumerate(groups)
        if len(group) == 1 and len(groups) > 1
    }


def both(groups: Groups) -> "dict[Move, Groups]":
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


@dataclass(frozen=True)
class Family(Generic[Division]):
    """How divisions of one kind are made: from groups of layers, and then by moves from one to the next.

    Attributes: ``in_a_row``, the sublayers of a division in a row; ``pairing``, the move that makes a pair of two
    layers, if there is one; ``order`` decides between divisions of equal cost.
    """

    moves: Callable[[Division], dict[Move, Division]]
    of_groups: Callable[[Groups, int], Division]
    notation: Callable[[Division], str]
    in_a_row: Callable[[Division], int]
    pairing: str = ""
    order: Callable[[Division], Any] = lambda division: division

    def least(self, costs: Mapping[Division, float], count: int) -> dict[Division, float]:
        """The divisions of least cost."""
        return {
            division: costs[division] for division in sorted(costs, key=lambda x: (costs[x], self.order(x)))[:count]
        }

    def promising(self, division: Division, alone: Mapping[Move, float], screen: int) -> list[Division]:
        """The divisions one move further whose moves cost least by themselves, as many of every depth."""
        by_depth: dict[int, dict[Division, float]] = {}
        for move, after in self.moves(division).items():
            by_depth.setdefault(self.in_a_row(after), {})[after] = alone.get(move, np.inf)
        return [after for costs in by_depth.values() for after in self.least(costs, screen)]


def _of_layers(moves: Callable[[Groups], dict[Move, Groups]], pairing: str = "") -> Family[Groups]:
    return Family(moves, lambda groups, _: groups, notation, lambda groups: 2 * len(groups), pairing)


def _branched(groups: Groups, n_layers: int) -> Wiring:
    return branches.sublayers(Wiring.parse(notation(groups), n_layers))


FAMILIES: dict[str, Family[Any]] = {
    "side by side": _of_layers(merges, "merge"),
    "left out": _of_layers(skips),
    "both": _of_layers(both, "merge"),
    "branches": Family(
        branches.moves,
        _branched,
        branches.notation,
        lambda wiring: branches.in_a_row(wiring.steps),
        "in step 2 attn",
        order=str,
    ),
}
FUSED = ("side by side", "left out", "both")  # families whose divisions a model can be built from, a layer a group


@with_meanings(COLUMNS)
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
    ranking: Mapping[int, float] | None = None,
    out: "str | Path | None" = None,
    precision: str = "float32",
    known: dict[str, float] | None = None,
) -> pd.DataFrame:
    """The best division of every depth that was found: ``COLUMNS``, deepest first.

    Args:
        texts: what to choose by; the costs that they show are too low, as they were chosen: measure on others.
        shallowest: stop at this depth; half of the layers by default.
        limit: stop where the best costs more.
        beam: divisions that go on from each depth.
        screen: moves that each of them tries.
        ranking: a number for every layer but the first, least where it is most promising to put it beside the layer
            before (``surgery.compiler.ranking``); then no single move is measured, and moves are screened by it.
        out: a folder for the scans, so that the same search goes on after a kill.
        precision: as of ``scan.run``.
        known: as of ``mean_gains``: what other families have measured on these texts.

    Cost: the single moves, about L/2 F (of ``branches``, 3 L F), unless there is a ``ranking``, and at most
    ``beam * screen`` wirings for every layer saved (of ``branches``, three times as many for every half).

    Raises ValueError for an unknown family, a ranking of a family that only leaves layers out or may, and as
    ``scan.run`` does.

    >>> import surgery
    >>> stack = surgery.Stack(surgery.load("babel"))
    >>> asked = surgery.corpus.probes.named("babel", 8).encode(stack)
    >>> divisions(stack, asked, metric="loglik", shallowest=10)["depth"].tolist()
    [12, 11, 10]
    """
    if family not in FAMILIES:
        raise ValueError(f"layers are saved {', '.join(FAMILIES)}; not {family!r}")
    if ranking is not None and family in ("left out", "both"):
        raise ValueError(
            f"a ranking is of layers put side by side, it cannot lead a search of {family!r}: measure costs"
        )
    kind, n_layers = FAMILIES[family], stack.n_layers
    least = 2 * (n_layers // 2 if shallowest is None else shallowest)

    def measured(candidates: Iterable[Any]) -> dict[Any, float]:
        named = {division: kind.notation(division) for division in candidates}
        return _costs(stack, named, texts, metric, out=out, precision=precision, known=known)

    whole = kind.of_groups(tuple((layer,) for layer in range(n_layers)), n_layers)
    first = kind.moves(whole)
    single = measured(first.values()) if ranking is None else {}
    alone = {move: single[after] if ranking is None else ranking.get(move[1], np.inf) for move, after in first.items()}
    pairs = {layer: cost for (how, layer), cost in alone.items() if how == kind.pairing}
    waiting, rows = {kind.in_a_row(whole): {whole: 0.0}}, []
    while waiting:
        depth = max(waiting)
        states = kind.least(waiting.pop(depth), beam)
        best, cost = next(iter(states.items()))
        layers = depth // 2 if depth % 2 == 0 else depth / 2
        rows.append({"depth": layers, "wiring": str(stack.wiring(kind.notation(best))), "cost_search": float(cost)})
        if not cost <= limit or depth <= least:
            continue
        if whole in states and single:
            found = single
        else:
            tried = list(itertools.chain.from_iterable(kind.promising(state, alone, screen) for state in states))
            if pairs and whole not in states and depth % 2 == 0:
                blocks = promising_blocks(n_layers, n_layers - depth // 2 + 1, pairs, screen)
                tried += [kind.of_groups(groups, n_layers) for groups in blocks]
            found = measured(division for division in dict.fromkeys(tried) if kind.in_a_row(division) >= least)
        for division, cost in found.items():
            waiting.setdefault(kind.in_a_row(division), {})[division] = cost
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
    return _costs(stack, {groups: notation(groups) for groups in candidates}, texts, metric, **options)


def _costs(stack: Stack, notations: Mapping[Any, str], texts: Encoded, metric: str, **options: Any) -> dict[Any, float]:
    """The costs of divisions, by what they are called."""
    if not notations:
        return {}
    named = {division: str(stack.wiring(text)) for division, text in notations.items()}
    gains = mean_gains(stack, list(named.values()), texts, metric, **options)
    return {division: -float(gains[name]) for division, name in named.items()}


def mean_gains(
    stack: Stack,
    wirings: Sequence[str],
    texts: Encoded,
    metric: str,
    out: "str | Path | None" = None,
    precision: str = "float32",
    known: dict[str, float] | None = None,
) -> pd.Series:
    """The mean gain of every wiring over the texts, by its notation; ``out`` is a folder, with a file for each scan.

    What is in ``known`` is not measured again, and what is measured is put there: one for each model, texts and metric.
    """
    known, names = {} if known is None else known, [str(stack.wiring(wiring)) for wiring in wirings]
    if new := [name for name in dict.fromkeys(names) if name not in known]:
        short = hashlib.sha256("\n".join(sorted(new)).encode()).hexdigest()[:12]
        file = None if out is None else Path(out) / f"{short}.csv"
        rows = scanning.run(stack, new, texts, file, metrics=(metric,), precision=precision)
        means = comparisons.differences(rows, metric).mean()
        known |= {name: float(means[name]) for name in new}
    return pd.Series({name: known[name] for name in names})
