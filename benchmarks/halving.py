"""How well a search in rounds finds the best repeated spans, at which part of the cost of a full scan.

    python benchmarks/halving.py                                       the bundled model
    python benchmarks/halving.py --table arithmetic.csv --layers 30    any full scan, from its table alone

A full scan is made once, or read from the file that ``scan.run`` wrote; searches are then replayed from it, each with
the probes in another order. Of a table random halves are searched, and the other half is the fresh one. Columns:

    cost, %    layer executions, of those of the full scan of the same probes
    of 10, 20  how many of the full scan's ten best are among the first ten, and twenty, of the search (mean; least)
    regret     1 - gain on fresh probes of the best of the search / that of the best of the full scan

``few probes`` is a full scan of as many probes as cost the same.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

import surgery
from surgery import Wiring, scan
from surgery.corpus import probes
from surgery.records import tables
from surgery.scan import halving
from surgery.scan.search import span_of
from surgery.stats import comparisons
from surgery.wiring.families import every_repeat

SHARES = (0.05, 0.1, 0.15, 0.25)
FRESH = 1024


def read(frame: pd.DataFrame, n_layers: int, metric: str = "loglik") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains [probe, span], spans and groups of a full scan."""
    wide = comparisons.differences(frame, metric)
    spans = np.array([span_of(Wiring.parse(text, n_layers)) for text in wide.columns])
    return wide.to_numpy(), spans, np.array(wide.index.get_level_values("group"))


def judged(estimate: np.ndarray, gains: np.ndarray, fresh: np.ndarray) -> dict[str, float]:
    """Recall of the ten best of ``gains``, and regret in ``fresh`` mean gains."""
    full, ranked = gains.mean(0), np.argsort(-estimate, kind="stable")
    best = set(np.argsort(-full)[:10])
    return {
        "of 10": len(best & set(ranked[:10])),
        "of 20": len(best & set(ranked[:20])),
        "regret": 1 - fresh[ranked[0]] / fresh[full.argmax()],
    }


def replay(
    gains: np.ndarray, spans: np.ndarray, groups: np.ndarray, fresh: np.ndarray, n_layers: int, share: float, seed: int
) -> Iterator[dict]:
    """One search at ``share``, and a full scan of few probes at the same cost."""
    found, effort = halving.rounds(
        lambda number, asked, chosen: gains[np.ix_(asked, chosen)], spans, list(groups), n_layers, share, seed=seed
    )
    names = list(map(str, range(len(spans))))
    ranked = halving.estimates(found, spans, n_layers, names)[0].set_index("wiring")["gain"]
    estimate = ranked.loc[names].to_numpy()
    yield {"search": "in rounds", "share": share, "cost, %": 100 * effort.share, **judged(estimate, gains, fresh)}
    few = np.random.default_rng(seed).permutation(len(gains))[: max(1, round(share * len(gains)))]
    cost = 100 * len(few) / len(gains)
    yield {"search": "few probes", "share": share, "cost, %": cost, **judged(gains[few].mean(0), gains, fresh)}


def halves(table: Path, n_layers: int, draws: int) -> Iterator[tuple]:
    """Random halves of the probes of a table, and the mean gains of the other half."""
    gains, spans, groups = read(tables.read(table), n_layers)
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(len(gains))
        mine, other = np.sort(order[::2]), order[1::2]
        yield gains[mine], spans, groups[mine], gains[other].mean(0)


def babel(count: int, draws: int) -> Iterator[tuple]:
    """Search halves of ``count`` probes of the bundled model, and the mean gains on ``FRESH`` others."""
    stack, every = surgery.Stack(surgery.load("babel")), list(every_repeat(12))

    def full(asked: probes.ProbeSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return read(scan.run(stack, every, asked, metrics=("loglik",)), 12)

    fresh = full(probes.named("babel", FRESH, 100))[0].mean(0)
    for seed in range(draws):
        yield *full(probes.named("babel", 2 * count, seed).split(seed)[0]), fresh


def table(sets: Callable[[], Iterator[tuple]], n_layers: int, orders: int = 1) -> pd.DataFrame:
    """A row per search and share: means, the least recall and the standard error of the regret."""
    rows = [
        row
        for gains, spans, groups, fresh in sets()
        for share in SHARES
        for seed in range(orders)
        for row in replay(gains, spans, groups, fresh, n_layers, share, seed)
    ]
    grouped = pd.DataFrame(rows).groupby(["search", "share"], sort=False)
    result = grouped[["cost, %", "of 10", "of 20", "regret"]].mean().round(2)
    result.insert(3, "least of 20", grouped["of 20"].min())
    return result.assign(**{"regret, s.e.": grouped["regret"].sem().round(2), "searches": grouped.size()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="CSV file of a full scan of repeated spans, with loglik")
    parser.add_argument("--layers", type=int, help="of the model of that table")
    parser.add_argument("--draws", type=int, default=5, help="sets of probes, or halves of the table")
    parser.add_argument("--orders", type=int, default=2, help="searches of each")
    args = parser.parse_args()
    if args.table:
        print(table(lambda: halves(args.table, args.layers, args.draws), args.layers, args.orders).to_string())
        return
    for count in (128, 512):
        print(f"\nbabel, {count} probes")
        print(table(lambda count=count: babel(count, args.draws), 12, args.orders).to_string(), flush=True)


if __name__ == "__main__":
    main()
