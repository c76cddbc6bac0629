"""How often a wiring agrees with the model on the next token: measured, and predicted from S of its pairs beforehand.

Layers side by side go wrong where one reads the other, which is what ``S`` of a window measures
(``surgery.series.window``). ``singles`` measures ``S`` of every pair of neighbours, and the share ``d`` of tokens on
which the model with that pair alone side by side names another next token. ``predict`` fits ``log d = b + k log S`` to
the pairs that are *not* in a wiring, reads off ``d_p`` for those that are, and adds them in quadrature, ``a = 1 -
sqrt(sum_p d_p^2)``: pairs move the logits in unrelated directions, so the sizes of what they do add like that, and the
share of tokens whose two best change places grows in proportion to that size while it is small. The interval is that
of the regression, with the scatter of single pairs around it.

``S`` says what a pair gets wrong of its own updates, not what the rest of the model makes of it, so the scatter is
wide: read ``rank`` first. Controls: ``combined``, the same from the measured ``d_p``, and ``independent``, ``a = prod_p
(1 - d_p)``, which holds if every pair fails on tokens of its own. It does not: tokens that are nearly undecided fail
with any pair.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.rebuild import fuse
from surgery.series import window
from surgery.stats.sampling import Sampling
from surgery.wiring.value import Wiring

SINGLES = {
    "layer": "first layer of the pair",
    "S": "what each layer's update loses if it does not read the other's (surgery.series.window)",
    "disagreement": "share of tokens whose likeliest next token differs with this pair alone side by side",
    "n_tokens": "tokens",
}


@torch.no_grad()
def agreement(stack: Stack, wiring: "Wiring | str", tokens: Tokens, batch_size: int = 8) -> float:
    """The share of tokens after which both have the same likeliest next one; the last of a prompt counts too.

    Cost: 2 F and as many readouts.
    """
    same = total = 0
    for batch in tokens.batches(batch_size):
        mask = batch.mask
        first = stack.run(batch).argmax(-1)[mask]
        second = stack.run(batch, wiring).argmax(-1)[mask]
        same, total = same + int((first == second).sum()), total + int(mask.sum())
    return same / total


def singles(stack: Stack, tokens: Tokens, batch_size: int = 8) -> pd.DataFrame:
    """Measure every pair of neighbours by itself: a row each (``SINGLES``).

    Cost: about L + 9 F for L layers.

    >>> from surgery.instruments import known_networks
    >>> tokens = Tokens.of(known_networks.tokens(4, 8))
    >>> frame = singles(Stack(known_networks.parallel_network(n_layers=4)), tokens)
    >>> bool((frame["S"] < 1e-6).all()), frame["disagreement"].tolist()
    (True, [0.0, 0.0, 0.0])
    """
    pairs = {layer: f":{layer} {fuse.group([layer, layer + 1])} {layer + 2}:" for layer in range(stack.n_layers - 1)}
    sampling = Sampling(resamples=0, batch_size=batch_size)
    S = window.windows(stack, tokens, 2, damage=False, sampling=sampling).set_index("start")["S"]
    differ, n_tokens = dict.fromkeys(pairs, 0), int(tokens.mask.sum())
    for batch in tokens.batches(batch_size):
        context, mask = stack.context(batch), batch.mask
        own = stack.run(context).argmax(-1)[mask]
        for layer, wiring in pairs.items():
            differ[layer] += int((stack.run(context, wiring).argmax(-1)[mask] != own).sum())
    rows = [
        {"layer": layer, "S": float(S[layer]), "disagreement": count / n_tokens, "n_tokens": n_tokens}
        for layer, count in differ.items()
    ]
    return pd.DataFrame(rows, columns=list(SINGLES))


def rank(frame: pd.DataFrame) -> float:
    """The rank correlation of S and disagreement over the pairs of ``singles``: how far the first tells the second."""
    return float(frame["S"].corr(frame["disagreement"], method="spearman"))


@dataclass(frozen=True)
class Predicted:
    """A share of tokens, and the ends of its 95 % interval; all NaN where nothing can be predicted."""

    low: float = float("nan")
    middle: float = float("nan")
    high: float = float("nan")


def predict(frame: pd.DataFrame, wiring: Wiring, draws: int = 4000) -> Predicted:
    """Predict the agreement of a wiring of pairs from S of its pairs, and ``singles`` of all others.

    NaN for a wiring that saves layers by anything but pairs of neighbours, and where fewer than four pairs are left to
    fit to. The middle is the median of the draws that give the interval. Cost: no forward pass.

    >>> known = pd.DataFrame({"layer": range(8), "S": [.1, .2, .3, .4, .5, .6, .7, .8], "n_tokens": 10**6})
    >>> known["disagreement"] = known["S"] / 10
    >>> round(predict(known, Wiring.parse(":2 {2.attn | 3.attn} {2.mlp | 3.mlp} 4:", 9)).middle, 3)
    0.97
    """
    inside = pairs_of(wiring)
    others = frame[~frame["layer"].isin(inside or ())]
    if not inside or len(others) < 4:
        return Predicted()
    share = (others["disagreement"] * others["n_tokens"] + 0.5) / (others["n_tokens"] + 1)  # none was seen: not 0
    x, y = _design(others["S"]), np.log(share.to_numpy())
    inverse = np.linalg.inv(x.T @ x)
    coefficients = inverse @ x.T @ y
    freedom = len(y) - 2
    rng, left = np.random.default_rng(0), float(((y - x @ coefficients) ** 2).sum())
    scatter = np.sqrt(left / rng.chisquare(freedom, draws))  # of a regression with a flat prior
    noise = rng.multivariate_normal(np.zeros(2), inverse, draws)
    at = _design(frame.set_index("layer").loc[inside, "S"])
    logs = (coefficients + scatter[:, None] * noise) @ at.T + scatter[:, None] * rng.normal(size=(draws, len(inside)))
    low, middle, high = np.quantile(_together(np.exp(np.minimum(logs, 0))), [0.025, 0.5, 0.975])
    return Predicted(float(low), float(middle), float(high))


def combined(frame: pd.DataFrame, wiring: Wiring) -> float:
    """The agreement of a wiring of pairs from what each of them does alone, added in quadrature; NaN for others.

    >>> known = pd.DataFrame({"layer": [0, 1, 2], "disagreement": [0.3, 0.2, 0.4]})
    >>> pairs = Wiring.parse(f"{fuse.group((0, 1))} {fuse.group((2, 3))}", 4)
    >>> round(combined(known, pairs), 3), round(independent(known, pairs), 3)
    (0.5, 0.42)
    """
    inside = pairs_of(wiring)
    return float(_together(frame.set_index("layer").loc[inside, "disagreement"])) if inside else float("nan")


def independent(frame: pd.DataFrame, wiring: Wiring) -> float:
    """The same if each pair failed on tokens of its own: the control of ``combined``."""
    inside = pairs_of(wiring)
    return float(np.prod(1 - frame.set_index("layer").loc[inside, "disagreement"])) if inside else float("nan")


def _together(disagreement: "np.ndarray | pd.Series") -> np.ndarray:
    """The agreement of pairs that disagree by themselves so often [..., pair]."""
    return 1 - np.minimum(np.sqrt((np.asarray(disagreement) ** 2).sum(-1)), 1)


def pairs_of(wiring: Wiring) -> list[int] | None:
    """The first layer of every pair, of a wiring that is the model but for pairs of neighbours; None for others.

    >>> pairs_of(Wiring.parse("0 {1.attn|2.attn} {1.mlp|2.mlp} 3", 4)), pairs_of(Wiring.parse(":2", 4))
    ([1], None)
    """
    try:
        groups = [tuple(sorted(group)) for group in fuse.branches(wiring)]
    except ValueError:
        return None
    if [layer for group in groups for layer in group] != list(range(wiring.n_layers)) or max(map(len, groups)) > 2:
        return None
    return [group[0] for group in groups if len(group) == 2]


def _design(S: pd.Series) -> np.ndarray:
    return np.column_stack([np.ones(len(S)), np.log(np.maximum(S.to_numpy(dtype=float), 1e-6))])
