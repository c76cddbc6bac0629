"""What claims, parts of the data, panels and walks say where the truth is known: how often it is right.

Claims: families of effects of which none, or none beyond the least that matters, is there. Parts: training that is
stopped by noise. Panels: random walks and reverting panels of few units, and with massive units. Walks: activations of
which 2 % are massive in one dimension.
"""

import math

import numpy as np
import scipy.stats
import torch

from surgery.graft import walk
from surgery.stats.claims import ABOVE, BELOW, UNDECIDED, WITHIN, Effect, sides
from surgery.stats.panels import harris_tzavalis, nickell_corrected, pooled, sandwich, simulate, within

OLD = {  # coverage by the infinitesimal jackknife, which was taken for few units as well
    ("pooled", 8, 12, 0.95): 0.885,
    ("pooled", 8, 24, 1.0): 0.884,
    ("pooled", 16, 12, 1.0): 0.901,
    ("pooled", 32, 12, 0.95): 0.920,
    ("nickell_corrected", 8, 12, 1.0): 0.887,
    ("nickell_corrected", 16, 12, 0.95): 0.918,
    ("nickell_corrected", 32, 24, 1.0): 0.921,
}
MASSIVE = {"none": 0.40, "unit": 0.43}  # size of the test of a random walk when p was given in any case


def wrong_claims(truth: float, least: float, n_seeds: int, families: int) -> tuple[float, float]:
    """Shares of families of eight effects with any wrong claim: each effect by itself, and corrected."""
    generator, wrong = np.random.default_rng(1), np.zeros(2)
    right = ABOVE if truth > least else BELOW if truth < -least else WITHIN
    for _ in range(families):
        effects = [Effect.of_seeds(values) for values in truth + generator.standard_normal((8, n_seeds))]
        for place, said in enumerate(([effect.side(least) for effect in effects], sides(effects, least))):
            wrong[place] += any(side not in (UNDECIDED, right) for side in said)
    return float(wrong[0] / families), float(wrong[1] / families)


def harm(least: float, families: int) -> float:
    """How often an effect of -7e-5 that all seeds share, within 1e-5, is said to harm."""
    values = -7e-5 + 1e-5 * np.random.default_rng(2).standard_normal((families, 3))
    return float(np.mean([Effect.of_seeds(row).side(least) == BELOW for row in values]))


def stopped(families: int, evaluations: int = 10, prompts: int = 64) -> tuple[float, float]:
    """By how many standard errors the best of some equally good evaluations seems better than it is: on the prompts
    that chose it, and on others."""
    generator = np.random.default_rng(3)
    own, others = (generator.standard_normal((families, evaluations, prompts)).mean(2) for _ in range(2))
    best = own.argmin(1)
    scale = math.sqrt(prompts)
    return tuple(float(scale * np.take_along_axis(loss, best[:, None], 1).mean()) for loss in (own, others))


def coverage(estimator: str, n: int, T: int, phi: float, panels: int) -> float:
    """Share of 95 % intervals of phi that hold it."""
    of = {"pooled": pooled, "nickell_corrected": lambda G: nickell_corrected(within(G), T)}[estimator]
    value, error = sandwich(of, simulate(phi, panels * n, T, seed=1).unflatten(0, (panels, n)))
    return float(((value - phi).abs() <= scipy.stats.t.ppf(0.975, n - 1) * error).double().mean())


def size(effects: str, n: int, T: int, massive: float, panels: int) -> float:
    """Share of random walks that are said to revert at 5 %."""
    found = []
    for seed in range(panels):
        y = simulate(1.0, n, T, seed=seed)
        y[torch.from_numpy(np.random.default_rng(seed).random(n) < massive)] *= 500
        found.append(harris_tzavalis(y, effects, draws=300, seed=seed).p < 0.05)
    return float(np.mean(found))


def widest(skip_massive: bool) -> float:
    """Standard deviation along the first component of the walk's covariance, over that of the usual activations."""
    x = torch.randn(200, 20, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    usual = walk.fit(x, mask, positions=1).regions[0].scale[0]
    massive = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.02
    x[massive] += 500 * torch.eye(16)[5]
    return float(walk.fit(x, mask, positions=1, skip_massive=skip_massive).regions[0].scale[0] / usual)


def rows(quick: bool = False) -> list[dict]:
    """One row a simulation: what it should read, what it read, and what it reads."""
    families, panels = (200, 200) if quick else (4000, 2000)
    table = []

    def add(case: str, nominal: object, before: object, after: object) -> None:
        table.append(
            {"point": "claims, panels and walks", "case": case, "nominal": nominal, "before": before, "after": after}
        )

    for truth, n in ((0.0, 8), (0.0, 3), (0.3, 8)):
        alone, corrected = wrong_claims(truth, truth, n, families)
        add(
            f"a wrong claim among 8, {n} seeds, effect {truth:g} = the least",
            "<= .05",
            round(alone, 3),
            round(corrected, 3),
        )
    add(
        "an effect of -7e-05 is said to harm, 3 seeds", 0, round(harm(0.0, families), 3), round(harm(0.01, families), 3)
    )
    own, others = stopped(families)
    add("bias of the loss at the best of 10 equal evaluations, in standard errors", 0, round(own, 2), round(others, 2))
    for (estimator, n, T, phi), before in OLD.items():
        case = f"coverage of {estimator}, {n} units, T = {T}, phi = {phi:g}"
        add(case, 0.95, before, round(coverage(estimator, n, T, phi, panels), 3))
    for effects, before in MASSIVE.items():
        after = size(effects, 100, 12, 0.02, panels // 10)
        add(f"random walks said to revert, effects {effects}, 2 % of 100 units at 500 times", "<= .05", before, after)
    add("widest step of a walk, 2 % of tokens at 500 times", 1, round(widest(False), 1), round(widest(True), 2))
    return table
