"""Predictability: does one layer's update tell what another would compute from the same input?

A layer that does what another does is predictable from it, and so is one that reads what the other wrote; three numbers
keep these apart. With ``surgery.dropout.redundancy``, which asks what damage says of the same.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery.instruments.ensemble import Ensemble, partners
from surgery.instruments.regression import LeastSquares, halves
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import columns, described, ratio, weights
from surgery.stats.sampling import Sampling

RIDGE = 0.01  # in units of the predictors' variances
_ROUNDING = 1e-10  # share of a stream's squares: an update that varies less does so by rounding alone
_LEAST = 1e-4  # share of an update's variance: a smaller residual comes from rounding and ridge alone

Resampled = Float[Tensor, " resample"]
Squares = Float[Tensor, "kind 2 prompt"]  # of targets and of residuals, by kind of predictability

MEASURES = {
    "predictability": "held-out R^2 of the later layer's output on the earlier one's input, its linear part removed",
    "predictability_actual": "the same of the later layer's update in the model: a chain is predictable too",
    "predictability_shuffled": "predictability from another token's update: the null",
}
COLUMNS = {
    "layer": "the earlier layer, counted from 0",
    "later": "the later layer of the pair",
    "n_prompts": "number of prompts, the unit of resampling",
} | described(MEASURES)


@with_meanings(COLUMNS)
@in_smaller_batches
def predictability(
    stack: Stack, tokens: Tokens | Tensor, *, ridge: float = RIDGE, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Does one layer's update predict what another computes from the same input? Held-out R^2, a row per pair.

    For layers i < j, ``u_i = f_i(x_i)`` is the update of i and ``p_j = f_j(x_i)`` the output of j on the stream that
    enters i. The linear part in x_i is removed from both, then p_j is regressed on u_i by ridge, on one half of the
    prompts, and evaluated on the other: 1 if j computes what i does, 0 if it computes something else, below 0 if the
    fit does not generalise, NaN if p_j is linear in x_i or constant. Different functions of a few numbers are somewhat
    alike: independent layers with the same 8 inputs (``known_networks.parallel_network``) have .25, an untrained
    transformer about .05. ``predictability_actual`` takes ``u_j = f_j(x_j)`` instead: it is high where j does the same
    as i, but also where j reads i, and it misses a backup that is silent as long as i works. With fewer than ten tokens
    per dimension to fit on, all are biased downwards, as ``predictability_shuffled`` shows: compare at equal numbers.

    Cost in a model of L layers: ``(L - 1)/2 + 1`` F. Memory: the streams of all prompts, and d_model numbers per token
    and pair of the same i.

    Raises ValueError for a single prompt, where the tokens to fit on are no more than twice d_model, and for outputs
    that are not finite.

    >>> from surgery.instruments import known_networks
    >>> tokens = known_networks.tokens(60, 8)
    >>> frame = predictability(Stack(known_networks.serial_network(n_layers=2)), tokens, sampling=Sampling(resamples=0))
    >>> frame[["predictability"]].isna().values.tolist()  # the later layer reads nothing that enters the first
    [[True]]
    """
    rows = []
    for (layer, later), sums in _squares_of_pairs(stack, Tokens.of(tokens), ridge, sampling).items():
        row: dict[str, float] = {"layer": layer, "later": later, "n_prompts": sums.shape[-1]}
        for name, values in _r_squared(sums, weights(sums.shape[-1], sampling.resamples, sampling.seed)).items():
            row |= columns(name, values)
        rows.append(row)
    return pd.DataFrame(rows)


@in_smaller_batches
def mean(stack: Stack, tokens: Tokens, *, sampling: Sampling = Sampling()) -> dict[str, float]:
    """The mean of all pairs: a value and the ends of its interval for each of ``MEASURES``. Cost: as by pair."""
    pairs = _squares_of_pairs(stack, tokens, RIDGE, sampling)
    draws = weights(next(iter(pairs.values())).shape[-1], sampling.resamples, sampling.seed)
    each = [_r_squared(sums, draws) for sums in pairs.values()]
    row: dict[str, float] = {}
    for name in MEASURES:
        row |= columns(name, torch.stack([values[name] for values in each]).nanmean(0))
    return row


def _squares_of_pairs(stack: Stack, tokens: Tokens, ridge: float, sampling: Sampling) -> dict[tuple[int, int], Squares]:
    """Squares of the targets and of the residuals in every held-out prompt, by pair of layers."""
    measured, fitted = (half.to(stack.device) for half in halves(tokens, sampling.seed))
    chosen = [Ensemble.of(stack, half, sampling.but(progress=False)).mask for half in (fitted, measured)]
    if (count := int(chosen[0].sum())) <= 2 * stack.d_model:
        raise ValueError(
            f"half of the prompts give {count} tokens to fit on, and {stack.name} has a stream of {stack.d_model}: "
            f"give prompts with more than {4 * stack.d_model} tokens beyond the first of each"
        )
    both = Tokens(torch.cat([fitted.ids, measured.ids]), torch.cat([fitted.mask, measured.mask]))
    owner = chosen[1].nonzero()[:, 0].cpu()
    generator = np.random.default_rng((sampling.seed, 3))
    partner = torch.cat([partners(chosen[0], generator), count + partners(chosen[1], generator)])
    pairs = {}
    for layer, x, u, outputs in _updates(stack, both, torch.cat(chosen), sampling.batch_size):
        u = _residual(x, u, count)
        for later, (same_input, actual) in outputs.items():
            target, actual = _nonlinear(x, same_input, count), _nonlinear(x, actual, count)
            kinds = ((u, target), (u, actual), (u[partner], target))
            squares = torch.stack([_squares(predictor, y, count, ridge) for predictor, y in kinds])
            sums = torch.zeros(3, 2, len(measured), dtype=torch.float64)
            pairs[layer, later] = sums.index_add(2, owner, squares)
    return pairs


def _updates(
    stack: Stack, tokens: Tokens, chosen: Bool[Tensor, "prompt pos"], batch_size: int
) -> Iterator[tuple[int, Tensor, Tensor, dict[int, tuple[Tensor, Tensor]]]]:
    """Yield every layer but the last with x, u and the outputs of each later layer on x and on its own input.

    At the ``chosen`` tokens.
    """
    contexts = [stack.context(batch) for batch in tokens.batches(batch_size)]
    masks = chosen.split([len(context.tokens) for context in contexts])
    streams = [stack.stream(context) for context in contexts]

    def stacked(values: Iterable[Tensor]) -> Float[Tensor, "token d_model"]:
        return torch.cat([value[mask].double() for value, mask in zip(values, masks, strict=True)]).cpu()

    def outputs(layer: int, later: int) -> Float[Tensor, "token d_model"]:
        found = stacked(stack.update(later, stream[layer], context) for stream, context in zip(streams, contexts))
        if not found.isfinite().all():
            raise ValueError(f"what layer {later} writes on the stream that enters layer {layer} is not finite")
        return found

    written = [stacked(stream[layer + 1] - stream[layer] for stream in streams) for layer in range(stack.n_layers)]
    for layer in range(stack.n_layers - 1):
        yield (
            layer,
            stacked(stream[layer] for stream in streams),
            written[layer],
            {later: (outputs(layer, later), written[later]) for later in range(layer + 1, stack.n_layers)},
        )


def _residual(
    x: Float[Tensor, "token d_model"], y: Float[Tensor, "token d_model"], count: int, ridge: float = 1e-9
) -> Float[Tensor, "token d_model"]:
    """The residual of y after a linear map of x that is fitted to the first ``count`` tokens."""
    fit = LeastSquares(x.shape[1])
    fit.add(x[:count], y[:count])
    matrix, bias = fit.solve(ridge)
    return y - (x @ matrix + bias)


def _nonlinear(x: Float[Tensor, "token d_model"], y: Float[Tensor, "token d_model"], count: int) -> Tensor:
    """The part of y that is not linear in x, or 0 where rounding and the fit leave as much."""
    residual, size = _residual(x, y, count), (y - y.mean(0)).square().sum()
    real = (size > _ROUNDING * x.square().sum()) & (residual.square().sum() > _LEAST * size)
    return torch.where(real, residual, 0)


def _squares(
    predictor: Float[Tensor, "token d_model"], target: Float[Tensor, "token d_model"], count: int, ridge: float
) -> Float[Tensor, "2 held_out"]:
    """Squares of the target and of its residual, at the tokens after the first ``count``."""
    return torch.stack([y[count:].square().sum(1) for y in (target, _residual(predictor, target, count, ridge))])


def _r_squared(sums: Squares, draws: Float[Tensor, "resample prompt"]) -> dict[str, Resampled]:
    return {name: 1 - ratio(draws @ missed, draws @ size) for name, (size, missed) in zip(MEASURES, sums, strict=True)}
