r"""Does dropout lower superposition within a component? The toy model in which superposition can be counted.

    x_hat = ReLU(W^T W x + b),      W [hidden, feature],      loss = E sum_i I_i (x_i - x_hat_i)^2,

with features uniform in [0, 1] that are 0 with probability ``sparsity``, and importance ``I_i = decay^i`` (Elhage et
al. 2022, arXiv 2209.10652). Dropout falls on the hidden units: each is 0 with probability ``rate``, the others are
divided by ``1 - rate``; off at evaluation (Pona 2023, "Superposition and Dropout", who finds less superposition under
dropout, except where importance varies and sparsity is low).

A sweep over sparsity, rate and seed trains all its models at once: their weights are one tensor, their products
batched. A cell draws from a generator with its own seed, so its result is the same alone as in a sweep; cells of one
seed share initial weights, examples and noise, so that differences between rates are paired.

**Shrinking is not superposition.** A unit that is kept is divided by ``1 - rate``, and a single feature with that
unit to itself is exact there at ``|W_i|^2 = 1 - rate``, not 1: features per dimension and interference fall though
nothing else changes. Read them beside ``effective_features`` and ``dimensionality``, which do not depend on the
scale of W, and beside the model without dropout at the same loss (``..._matched``). ``differences`` compares every rate
with none.

>>> pair = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])  # two features back to back, one alone
>>> dimensionality(pair).tolist(), geometry(pair)
([0.5, 0.5, 1.0], ['antipodal pair', 'antipodal pair', 'alone'])
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.meanings import with_meanings
from surgery.stats.bootstrap import t_interval, verdict

SPARSITIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
RATES = (0.0, 0.1, 0.2, 0.35, 0.5)
SEEDS = (0, 1, 2, 3, 4)
CHECKPOINTS = 40
EVALUATED = 8192  # examples
_EVALUATION = 2**31 - 1  # seed of the examples at evaluation, the same for every cell
_KNOWN = {
    1: "alone",
    3 / 4: "tetrahedron",
    2 / 3: "triangle",
    1 / 2: "antipodal pair",
    2 / 5: "pentagon",
    3 / 8: "square antiprism",
}
_CLOSE = 0.012  # half the distance between the closest two of them
_SUPERPOSED = 0.9  # a feature with less of a dimension than this shares it

_MEASURES = {
    "features_per_dimension": "|W|_F^2 / hidden units; shrinks with the weights",
    "effective_features": "exp of the entropy of the features' shares of |W|_F^2, over hidden units; free of scale",
    "dimensionality": "mean share of a dimension, D_i, of the represented features; free of scale",
    "interference": "mean of sum_(j != i) (What_i . W_j)^2 over the represented features; shrinks with the weights",
    "superposed": "share of the represented features with D_i below 0.9",
    "represented": "represented features, |W_i| > 1/2, over hidden units",
    "capacity": "sum of D_i over hidden units, at most 1",
}
MATCHED = ("features_per_dimension", "effective_features", "dimensionality", "interference")
COLUMNS: dict[str, str] = {
    "decay": "importance of a feature over that of the one before it; 1: all features count the same",
    "sparsity": "probability that a feature is 0",
    "rate": "probability that dropout sets a hidden unit to 0 in training",
    "seed": "seed of initial weights, examples and dropout, shared by all sparsities and rates",
    "n_features": "features",
    "n_hidden": "hidden units",
    "steps": "training steps",
    "loss": "importance-weighted squared error per example, dropout off, on examples not trained on",
    **_MEASURES,
    "geometry": "the most common arrangement among the represented features, by their D_i",
    **{
        f"{name}_matched": f"{name} of the model without dropout, same sparsity and seed, when its loss in training had"
        " come down to this row's (interpolated)"
        for name in MATCHED
    },
}

DIFFERENCES: dict[str, str] = {
    "decay": "importance of a feature over that of the one before it",
    "rate": "probability that dropout sets a hidden unit to 0 in training",
    "sparsity": "probability that a feature is 0; empty: the mean over all sparsities of the sweep",
    "measure": "which measure of the sweep",
    "control": "the model without dropout, same sparsity and seed: 'steps' trained as long, 'loss' when its loss was as"
    " high",
    "difference": "measure with dropout minus measure of the control, mean over seeds",
    "difference_low": "lower end of its 95 % interval by Student's t over seeds, paired",
    "difference_high": "upper end of it",
    "verdict": "higher, lower or undecided",
    "n_seeds": "pairs",
}


def features_per_dimension(w: Float[Tensor, "*cell hidden feature"]) -> Float[Tensor, "*cell"]:
    """Features that W represents per hidden unit, ``|W|_F^2 / m`` (Elhage et al. 2022).

    >>> features_per_dimension(torch.tensor([[1.0, -1.0]])).item()
    2.0
    """
    return w.square().sum((-2, -1)) / w.shape[-2]


def effective_features(w: Float[Tensor, "*cell hidden feature"]) -> Float[Tensor, "*cell"]:
    """Effective number of features per dimension, ``exp(H(p)) / m`` with ``p_i = |W_i|^2 / |W|_F^2``.

    Bereska et al. (2025, arXiv 2512.13568) compute it from an autoencoder's activations, here it is computed from the
    squared lengths, which are known. Above 1 there are more features than dimensions; it does not change when W
    shrinks. NaN where W is 0.

    >>> effective_features(0.1 * torch.tensor([[1.0, -1.0]])).item()
    2.0
    """
    share = w.square().sum(-2) / w.square().sum((-2, -1)).unsqueeze(-1)
    return torch.special.entr(share).sum(-1).exp() / w.shape[-2]


def interference(w: Float[Tensor, "*cell hidden feature"]) -> Float[Tensor, "*cell feature"]:
    """Projection of the other features on feature i, ``sum_(j != i) (What_i . W_j)^2``; 0 where W_i is 0.

    >>> interference(torch.tensor([[1.0, -0.5]])).tolist()
    [0.25, 1.0]
    """
    gram = (w.mT @ w).square()
    own = gram.diagonal(dim1=-2, dim2=-1)
    return _over(gram.sum(-1) - own, own.sqrt())


def dimensionality(w: Float[Tensor, "*cell hidden feature"]) -> Float[Tensor, "*cell feature"]:
    """Share of a dimension that feature i has, ``D_i = |W_i|^2 / sum_j (What_i . W_j)^2`` (Elhage et al. 2022).

    1 alone, 3/4 in a tetrahedron, 2/3 in a triangle, 1/2 in an antipodal pair, 2/5 in a pentagon; 0 where W_i is 0.
    ``D_i`` is at most the leverage of W_i, so the sum is at most the rank of W.
    """
    own = w.square().sum(-2)
    return _over(own, own + interference(w))


def capacity(w: Float[Tensor, "*cell hidden feature"]) -> Float[Tensor, "*cell feature"]:
    """Capacity of feature i, ``C_i = (W_i . W_i)^2 / sum_j (W_i . W_j)^2``, which equals D_i.

    (Scherlis et al. 2022, arXiv 2210.01892.)

    >>> w = torch.randn(2, 5)
    >>> torch.allclose(capacity(w), dimensionality(w), atol=1e-5)
    True
    """
    gram = (w.mT @ w).square()
    return _over(gram.diagonal(dim1=-2, dim2=-1), gram.sum(-1))


def represented(w: Float[Tensor, "*cell hidden feature"]) -> Bool[Tensor, "*cell feature"]:
    """Whether feature i is represented, ``|W_i| > 1/2``: closer to full length than to nothing."""
    return w.norm(dim=-2) > 0.5


def geometry(w: Float[Tensor, "hidden feature"]) -> list[str]:
    """Name the arrangement of every feature by its D_i; ``other`` if none fits, ``absent`` if not represented.

    A name is no proof: a pentagon's features have D = 2/5, but so may others.
    """
    known = torch.tensor(list(_KNOWN))
    distance, which = (dimensionality(w).float().unsqueeze(-1) - known).abs().min(-1)
    names = [list(_KNOWN.values())[i] if near else "other" for i, near in zip(which.tolist(), distance < _CLOSE)]
    return [name if present else "absent" for name, present in zip(names, represented(w))]


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0, a / b)  # what is NaN stays NaN


# --- the models ------------------------------------------------------------------------------------------------------


def reconstruct(
    x: Float[Tensor, "*cell example feature"],
    w: Float[Tensor, "*cell hidden feature"],
    b: Float[Tensor, "*cell feature"],
) -> Float[Tensor, "*cell example feature"]:
    """The output of the model, ``ReLU(W^T W x + b)``, with dropout off."""
    return (x @ w.mT @ w + b.unsqueeze(-2)).relu()


def examples(
    uniform: Float[Tensor, "cell example feature"], sparsity: Float[Tensor, " cell"]
) -> Float[Tensor, "cell example feature"]:
    """Features that are 0 with probability ``sparsity``, else uniform in [0, 1], from one uniform number each.

    >>> examples(torch.tensor([[[0.25, 0.75, 1.0]]]), torch.tensor([0.5])).tolist()
    [[[0.0, 0.5, 1.0]]]
    """
    sparsity = sparsity[:, None, None]
    return uniform.sub(sparsity).mul_(1 / (1 - sparsity)).relu_()


def importance(n_features: int, decay: float) -> Float[Tensor, " feature"]:
    """Weights of the features in the loss, ``decay^i``."""
    return decay ** torch.arange(n_features, dtype=torch.float32)


def training(
    sparsity: Float[Tensor, " cell"],
    rate: Float[Tensor, " cell"],
    seed: Int[Tensor, " cell"],
    n_features: int = 20,
    n_hidden: int = 5,
    steps: int = 5000,
    batch: int = 64,
    decay: float = 0.7,
    lr: float = 0.01,
    checkpoints: Sequence[int] = (),
) -> Iterator[tuple[Float[Tensor, "cell hidden feature"], Float[Tensor, "cell feature"]]]:
    """Train one model per cell, all at once, and yield W and b after each of ``checkpoints`` and at the end.

    ``checkpoints`` are steps, 0 is before training; W and b are views that are overwritten later. Adam, with a learning
    rate that falls linearly to 0. Cost: 3 ms a step for 250 cells of 20 features in 5 units and 64 examples, on one
    core.

    Raises ValueError for sparsities and rates outside [0, 1), and where training diverges.
    """
    _check("sparsities", sparsity)
    _check("rates", rate)
    seeds, which = seed.unique(return_inverse=True)
    generators = [torch.Generator().manual_seed(int(value)) for value in seeds]
    spread = (2 / (n_features + n_hidden)) ** 0.5
    starts = [spread * torch.randn(n_hidden + 1, n_features, generator=generator) for generator in generators]
    weights = torch.stack(starts).index_select(0, which)
    w, b = weights[:, :-1], weights[:, -1:]  # b is the last row: a single tensor to optimise
    b.zero_()
    weights.grad = torch.empty_like(weights)
    optimiser = torch.optim.Adam([weights], lr=lr)
    rate = rate[:, None, None]
    slope = 2 / batch * importance(n_features, decay)
    for step in range(steps):
        if step in checkpoints:
            yield w, b[:, 0]
        numbers = [torch.rand(batch, n_features + n_hidden, generator=generator) for generator in generators]
        uniform = torch.stack(numbers).index_select(0, which)
        x = examples(uniform[..., :n_features], sparsity)
        kept = (uniform[..., n_features:] >= rate) / (1 - rate)
        hidden = torch.bmm(x, w.mT).mul_(kept)
        x_hat = torch.baddbmm(b, hidden, w).relu_()
        error = (x_hat - x).mul_(slope).mul_(x_hat.sign_())  # the gradient of the loss, by hand from here on
        back = torch.bmm(error, w.mT).mul_(kept)
        weights.grad[:, :-1] = torch.baddbmm(torch.bmm(hidden.mT, error), back.mT, x)
        weights.grad[:, -1] = error.sum(1)
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimiser.step()
    if diverged := int((~weights.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(f"training diverged in {diverged} of {len(weights)} cells: lower lr={lr:g}")
    yield w, b[:, 0]


def loss(
    w: Float[Tensor, "cell hidden feature"],
    b: Float[Tensor, "cell feature"],
    sparsity: Float[Tensor, " cell"],
    decay: float = 0.7,
) -> Float[Tensor, " cell"]:
    """Importance-weighted squared error per example with dropout off.

    It is measured on ``EVALUATED`` examples, from the same draws for every cell.
    """
    n_features = w.shape[-1]
    uniform = torch.rand(EVALUATED, n_features, generator=torch.Generator().manual_seed(_EVALUATION))
    data = {s: examples(uniform[None], torch.tensor([s]))[0] for s in sparsity.unique().tolist()}
    errors = [
        (reconstruct(data[s], weight, bias) - data[s]).square().mean(0)
        for s, weight, bias in zip(sparsity.tolist(), w, b)
    ]
    return torch.stack(errors) @ importance(n_features, decay)


def measures(w: Float[Tensor, "cell hidden feature"]) -> dict[str, Float[Tensor, " cell"]]:
    """All measures of the sweep, a number per cell; means over represented features are NaN where there are none."""
    present, share = represented(w), dimensionality(w)
    n = present.sum(-1)
    values = (
        features_per_dimension(w),
        effective_features(w),
        (share * present).sum(-1) / n,
        (interference(w) * present).sum(-1) / n,
        ((share < _SUPERPOSED) & present).sum(-1) / n,
        n / w.shape[-2],
        capacity(w).sum(-1) / w.shape[-2],
    )
    return dict(zip(_MEASURES, values, strict=True))


@with_meanings(COLUMNS)
def sweep(
    sparsities: Sequence[float] = SPARSITIES,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    n_features: int = 20,
    n_hidden: int = 5,
    steps: int = 5000,
    batch: int = 64,
    decay: float = 0.7,
    lr: float = 0.01,
) -> pd.DataFrame:
    """Train one model per sparsity, rate and seed, all together; return a row each, ``COLUMNS``.

    Sweeps of several ``decay`` may be concatenated: sentences and figures keep them apart. Cost: about 20 s on one core
    with the defaults. Raises ValueError without rate 0, the control of all.

    >>> frame = sweep((0.0, 0.9), (0.0, 0.5), (0, 1), n_features=6, n_hidden=2, steps=20)
    >>> len(frame), bool((frame["capacity"] <= 1.0001).all())
    (8, True)
    """
    if 0 not in rates:
        raise ValueError(f"rates {', '.join(map(str, rates))} have nothing to be compared with: put 0 among them")
    cells = torch.cartesian_prod(*(torch.tensor(values, dtype=torch.float64) for values in (sparsities, rates, seeds)))
    cells = cells.reshape(-1, 3)
    sparsity, rate, seed = cells[:, 0].float(), cells[:, 1].float(), cells[:, 2].long()
    control = rate == 0
    history = []
    checkpoints = [0, *np.geomspace(1, steps, CHECKPOINTS, dtype=int).tolist()]
    for w, b in training(sparsity, rate, seed, n_features, n_hidden, steps, batch, decay, lr, checkpoints=checkpoints):
        history.append({"loss": loss(w[control], b[control], sparsity[control], decay), **measures(w[control])})
    final = {"loss": loss(w, b, sparsity, decay), **measures(w)}
    frame = pd.DataFrame({"decay": decay, "sparsity": cells[:, 0], "rate": cells[:, 1], "seed": seed})
    values = {name: value.double().numpy() for name, value in final.items()}
    frame = frame.assign(n_features=n_features, n_hidden=n_hidden, steps=steps, **values)
    frame["geometry"] = [_most_common(geometry(cell)) for cell in w]
    return frame.join(_matched(frame, history))


def _matched(frame: pd.DataFrame, history: list[dict[str, Tensor]]) -> pd.DataFrame:
    """``MATCHED`` of the model without dropout beside every row, where its loss last came down to the row's."""
    past = {
        name: torch.stack([checkpoint[name] for checkpoint in history]).double().numpy() for name in ("loss", *MATCHED)
    }
    twins = frame[frame["rate"] == 0]
    place = {key: i for i, key in enumerate(zip(twins["sparsity"], twins["seed"]))}
    rows = []
    for sparsity, seed, target in zip(frame["sparsity"], frame["seed"], frame["loss"]):
        twin = place[sparsity, seed]
        path = past["loss"][:, twin]
        above = np.flatnonzero(path > target)
        when = np.nan  # a model worse than an untrained one has no match
        if len(above):
            last = int(above[-1])
            when = last + (path[last] - target) / (path[last] - path[last + 1]) if last + 1 < len(path) else last
        values = {name: np.interp(when, np.arange(len(path)), past[name][:, twin]) for name in MATCHED}
        rows.append({f"{name}_matched": value for name, value in values.items()})
    return pd.DataFrame(rows, index=frame.index)


@with_meanings(COLUMNS)
def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Compare every rate with none, paired by sparsity and seed, in a sweep of one or several ``decay``.

    Returns a row per rate, sparsity (and their mean), measure and control: ``DIFFERENCES``. Equal loss is reached by
    stopping the control early, so what it has not yet learned counts as well: its random initial weights still show.
    """
    rows = []
    for decay, part in frame.groupby("decay"):
        cells = part.set_index(["sparsity", "seed"])
        none = cells[cells["rate"] == 0]
        for rate, dropped in cells[cells["rate"] > 0].groupby("rate"):
            for name in MATCHED:
                controls = {"steps": none[name], "loss": dropped[f"{name}_matched"]}
                for control, values in controls.items():
                    change = (dropped[name] - values).unstack("seed")
                    means = {np.nan: change.dropna().mean()} | {at: row.dropna() for at, row in change.iterrows()}
                    row = {"decay": decay, "rate": rate, "measure": name, "control": control}
                    rows += [
                        row | {"sparsity": at} | _interval_and_verdict(seeds)
                        for at, seeds in means.items()
                        if len(seeds)
                    ]
    return pd.DataFrame(rows, columns=list(DIFFERENCES))


def _interval_and_verdict(seeds: pd.Series) -> dict[str, Any]:
    mean, low, high = t_interval(seeds.to_numpy())
    ends = {"difference": mean, "difference_low": low, "difference_high": high}
    return ends | {"verdict": verdict(low, high, "higher", "lower"), "n_seeds": len(seeds)}


def _most_common(names: Sequence[str]) -> str:
    return (Counter(name for name in names if name != "absent").most_common(1) or [("absent", 0)])[0][0]


def _check(name: str, values: Tensor) -> None:
    outside = values[(values < 0) | (values >= 1)].tolist()
    if outside:
        raise ValueError(f"{name} are probabilities from 0 to below 1, and {outside[0]:g} is not one: leave it out")
