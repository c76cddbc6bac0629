"""Pairs of units of known reliability, undefined damages, and planted features: what rho, A and F read of them.

Units of strength a and b (1 as they are, 0 taken out, 1/2 in part) are joined by a worth; damages are what the worth
loses, times a size that differs from prompt to prompt, plus noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from surgery.dropout.features import effective, matched, sae
from surgery.instruments import known_networks
from surgery.instruments.ablation import Damages, damage
from surgery.instruments.interactions import sets, summary, table
from surgery.models.stack import Stack

PAIR = ((0,), (1,), (0, 1))


@dataclass(frozen=True)
class System:
    """Two units joined by ``worth``, and what must be read of them."""

    worth: Callable[[float, float], float]
    rho: float
    additivity: float
    word: str


SYSTEMS = {
    "chain": System(lambda a, b: a * b, 1, 0, "needed together"),
    "AND of two that never read each other": System(min, 1, 0, "needed together"),
    "independent": System(lambda a, b: (a + b) / 2, 0, 1, "independent"),
    "saturating readout": System(lambda a, b: max(1, a + b), 1, 0, "saturating"),
    "half a backup": System(lambda a, b: a + b - a * b / 2, -1 / 3, 2, "backup"),
    "hard OR": System(max, -1, np.nan, "backup"),
    "hard OR with a threshold": System(lambda a, b: (max(a, b) >= 0.5) + 0.05 * min(a, b), -0.905, 20, "backup"),
}


def damages_of(worth: Callable[[float, float], float], amount: float = 1.0, n_prompts: int = 60) -> Damages:
    """Damages without each unit and both, ``amount`` of them taken out."""
    left, draw = 1 - amount, torch.Generator().manual_seed(0)
    lost = [worth(1, 1) - worth(*kept) for kept in ((left, 1), (1, left), (left, left))]
    size = 0.5 + torch.rand(n_prompts, generator=draw).double()
    value = torch.tensor(lost).double().unsqueeze(1) * size
    value = value + 0.001 * torch.randn(3, n_prompts, generator=draw).double()
    return Damages(PAIR, value, value)


def planted(
    n_features: int, n_neurons: int, tokens: int = 1800, active: float = 2.0, seed: int = 1
) -> tuple[Float[Tensor, "token neuron"], Float[Tensor, "token feature"]]:
    """Sparse features, ``active`` a token on average, each along a direction of its own; orthogonal if they fit."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(max(n_features, n_neurons), n_neurons, generator=draw)
    directions = torch.linalg.qr(noise.T)[0].T if n_features <= n_neurons else normalize(noise, dim=1)
    chosen = torch.rand(tokens, n_features, generator=draw) < active / n_features
    size = torch.rand(tokens, n_features, generator=draw) * chosen
    return size @ directions[:n_features], size


def psi(active: float, *, steps: int = 250) -> tuple[float, float]:
    """Effective features per neuron of 24 planted ones in 32 neurons: at k = 8, and at matched explained variance."""
    x, _ = planted(24, 32, active=active)
    trained_on, held_out = x[:1200], x[1200:]
    fixed = effective(sae(trained_on, 64, 8, steps=steps).encode(held_out))
    found = matched(trained_on, held_out, 64, ks=(2, 4, 8, 16, 24), steps=steps)
    return float(fixed) / 32, float(found.F) / 32


def one_undefined(n_layers: int = 6, n_prompts: int = 40) -> pd.DataFrame:
    """Damages of chains, one of them NaN in one prompt: the table of pairs."""
    value = 1 + torch.rand(len(sets(n_layers)), n_prompts, generator=torch.Generator().manual_seed(0)).double()
    made = Damages(tuple(sets(n_layers)), value, value)
    spoilt = value.clone()
    spoilt[made.row[2,], 6] = torch.nan
    return table(Damages(made.sets, spoilt, spoilt), made, resamples=100, tolerance=1e-5)


def of_nothing(shape: str, seed: int, n_layers: int = 6, n_prompts: int = 40) -> Damages:
    """Damages whose true mean is 0: of a random network on random tokens, or made up, shared in part between sets."""
    if shape == "random network":
        stack = Stack(known_networks.random_network(n_layers=n_layers, seed=seed))
        return damage(stack, known_networks.tokens(n_prompts, 10, seed), sets(n_layers), frozen=True)
    draw = torch.Generator().manual_seed(seed)
    value = sum(torch.randn(count, n_prompts, generator=draw).double() for count in (len(sets(n_layers)), 1))
    if shape != "normal":
        value = torch.exp(value / 2**0.5) - np.exp(0.5)
    value = -value if shape == "skewed, rare gains" else value
    return Damages(tuple(sets(n_layers)), value, value)


def found_in(made: Damages) -> tuple[bool, bool]:
    """Whether any pair is not called inside noise, and whether any delta is discovered."""
    frame = table(made, made, resamples=20)
    return bool((frame["status"] != "inside noise").any()), bool((frame["q"] < 0.05).any())


# Share of networks in which the code found a pair outside noise by two standard errors a damage, and a delta by flips.
NOTHING_BEFORE = {
    "normal": (0.415, 0.055),
    "skewed": (0.480, 0.175),
    "skewed, rare gains": (0.615, 0.175),
    "random network": (0.295, 0.055),
}
# What the code read before: rho, its word, and the answer of partial ablation.
BEFORE = {
    "chain": "+1.00, series",
    "AND of two that never read each other": "+1.00, series",
    "independent": "0.00, independent",
    "saturating readout": "+1.00, saturating",
    "half a backup": "-0.33, backup",
    "hard OR": "-1.00, backup",
    "hard OR with a threshold": "-0.90, saturating",
}
MASS_BEFORE = {"chain": 0.0, "independent": 0.5, "half a backup": 1.0}  # redundancy mass, of independence that of noise
PSI_BEFORE = {2: 1.39, 4: 1.02, 8: 0.84, 16: 1.59}  # at k = 8


def _word(row: pd.Series) -> str:
    if row["saturating"] == "yes":
        return "saturating"
    return "needed together" if row["rho_low"] > 0.02 else "backup" if row["rho_high"] < -0.02 else "independent"


def rows(quick: bool = False) -> list[dict]:
    """The table of simulations: point, case, what is nominal, what was read before and after."""
    found: list[dict] = []
    for name, system in SYSTEMS.items():
        full, partial = damages_of(system.worth), damages_of(system.worth, 0.5)
        row = table(full, partial, resamples=100).iloc[0]
        after = f"{round(row['rho'], 2) + 0:+.2f}, {_word(row)}"
        case = {"point": "pairs of layers", "case": f"rho of {name}", "nominal": f"{system.rho:+.2f}, {system.word}"}
        found.append(case | {"before": BEFORE[name], "after": after})
    for name, mass in MASS_BEFORE.items():
        A = summary(damages_of(SYSTEMS[name].worth), resamples=100)["additivity"][0]
        case = {"point": "redundancy", "case": f"redundancy of {name}", "nominal": f"A {SYSTEMS[name].additivity:g}"}
        found.append(case | {"before": f"mass {mass:g}", "after": f"A {round(A, 2) + 0:.2f}"})
    frame = one_undefined()
    wrong = int((frame["status"].str.startswith("undefined") != frame[["layer", "later"]].eq(2).any(axis=1)).sum())
    zeros = int((frame["rho"] == 0).sum())
    case = {
        "point": "pairs of layers",
        "case": "one NaN in one of 6 layers, 15 pairs",
        "nominal": "5 undefined, none reads 0",
    }
    undefined = int(frame["status"].str.startswith("undefined").sum())
    found.append(
        case | {"before": "15 read 0, measured", "after": f"{undefined} undefined, {zeros} read 0, {wrong} wrong"}
    )
    for shape, before in NOTHING_BEFORE.items():
        count = 10 if quick else 200
        rates = np.mean([found_in(of_nothing(shape, seed)) for seed in range(count)], axis=0)
        case = {
            "point": "pairs of layers",
            "case": f"damages of nothing ({shape}), 15 pairs: any outside noise, any delta",
        }
        after = ", ".join(f"{rate:.3f}" for rate in rates)
        found.append(case | {"nominal": ".05 each", "before": ", ".join(map("{:.3f}".format, before)), "after": after})
    for active, before in ({2: 1.39} if quick else PSI_BEFORE).items():
        case = {
            "point": "features in superposition",
            "case": f"psi of 24 features in 32 neurons, {active} active",
            "nominal": 0.75,
        }
        found.append(case | {"before": before, "after": round(psi(active)[1], 2)})
    return found
