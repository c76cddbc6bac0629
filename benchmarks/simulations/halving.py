"""What a search in rounds claims where nothing gains, whether it stops where all harms, and what its winners are worth.

Gains of all repeated spans of 12 layers on 128 prompts: a skewed part that a prompt shares between all spans, a part
that neighbours share; without any effect, all harmful, or with a hill of gains around one span. The best of each search
is measured again on as many fresh prompts, as ``surgery.scan.study`` does.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from surgery.scan import halving
from surgery.stats import comparisons

LAYERS, PROMPTS, SHARE = 12, 128, 0.15
SPANS = np.array([(i, j) for i in range(LAYERS) for j in range(i + 1, LAYERS + 1)])
NAMES = list(map(str, range(len(SPANS))))
LEAST = 0.01  # nats: the least gain that matters


def gains(rng: np.random.Generator, truth: np.ndarray) -> np.ndarray:
    """Gains ``[prompt, span]`` around their true means."""
    apart = np.abs(SPANS[:, None] - SPANS[None])
    alike = 0.2 + 0.75 * np.exp(-apart[..., 0] / 8 - apart[..., 1] / 1.5) + 0.05 * np.eye(len(SPANS))
    shared = 1 - rng.exponential(size=(PROMPTS, 1))
    return truth + shared + rng.multivariate_normal(np.zeros(len(SPANS)), alike, size=PROMPTS)


def hill(top: int, height: float) -> np.ndarray:
    """True gains that fall off around the span ``top``."""
    return height * np.exp(-np.abs(SPANS - SPANS[top]).sum(1) / 3)


@cache
def searches(kind: str, scans: int) -> pd.DataFrame:
    """What became of every search: its claims, its effort, the rank of the true best, its winner's two intervals."""
    rows = []
    for seed in range(scans):
        rng = np.random.default_rng(seed)
        top = int(rng.integers(len(SPANS)))
        truth = {"nothing": hill(top, 0), "harm": hill(top, 0) - 1, "hill": hill(top, 1.2)}[kind]
        d, fresh = gains(rng, truth), gains(rng, truth)
        found, effort = halving.rounds(
            lambda number, asked, chosen, d=d: d[np.ix_(asked, chosen)],
            SPANS,
            ["all"] * PROMPTS,
            LAYERS,
            SHARE,
            least=LEAST,
            seed=seed,
        )
        table, _ = halving.estimates(found, SPANS, LAYERS, NAMES)
        best = table.iloc[0]
        chosen = table["wiring"].head(10).astype(int).to_numpy()
        again = comparisons.table(scan(fresh[:, chosen], table["wiring"].head(10)), "loglik", 500).iloc[0]
        true = truth[int(best["wiring"])]
        rows.append(
            {
                "claimed": bool(((table["p_max"] < 0.05) & (table["gain"] > 0)).any()),
                "stopped": effort.stopped,
                "share": effort.share,
                "rank": table["wiring"].tolist().index(str(truth.argmax())),
                "missed by the search": not best["gain_low"] <= true <= best["gain_high"],
                "missed on fresh prompts": not again["gain_low"] <= true <= again["gain_high"],
                "optimism": best["gain"] - true,
            }
        )
    return pd.DataFrame(rows)


def scan(d: np.ndarray, names: pd.Series) -> pd.DataFrame:
    """The table of a scan with the gains ``d`` ``[prompt, wiring]``."""
    prompts, wirings = d.shape
    return pd.DataFrame(
        {
            "wiring": np.repeat(names.to_numpy(), prompts),
            "prompt": np.tile(np.arange(prompts), wirings),
            "group": "",
            "metric": "loglik",
            "value": d.T.ravel(),
            "baseline": 0.0,
        }
    )


def cases(scans: int) -> Iterator[tuple[str, float | str, float]]:
    """Every case: its name, what it should read, what it reads."""
    nothing, harm, found = (searches(kind, scans) for kind in ("nothing", "harm", "hill"))
    yield "claims of a gain where nothing has an effect", 0.025, nothing["claimed"].mean()
    yield "winner's interval misses on fresh prompts, no effect", 0.05, nothing["missed on fresh prompts"].mean()
    yield "claims of a gain where all harms", 0.025, harm["claimed"].mean()
    yield "stops early where all harms", "high", harm["stopped"].mean()
    yield "share of a full scan run until then", "low", harm["share"].mean()
    yield "stops early although a hill gains", 0.0, found["stopped"].mean()
    yield "the top of the hill is among the first ten", "high", (found["rank"] < 10).mean()
    yield "the top of the hill is among the first twenty", "high", (found["rank"] < 20).mean()
    yield "winner's interval misses on fresh prompts, hill", 0.05, found["missed on fresh prompts"].mean()
    yield "winner's interval misses in the search, hill", "not told", found["missed by the search"].mean()
    yield "what the search claims too much for its winner, hill, nats", "not told", found["optimism"].mean()
    yield "what the search claims too much for its winner, no effect, nats", "not told", nothing["optimism"].mean()


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """A row per case: point, case, nominal, before, after."""
    return [
        {
            "point": "the search in rounds",
            "case": name,
            "nominal": nominal,
            "before": "not there",
            "after": round(float(read), 3),
        }
        for name, nominal, read in cases(4 if quick else 40)
    ]
