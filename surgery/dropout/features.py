r"""Superposition within one layer: how many features do its neurons represent, how many directions do they use?

We record the activation that enters the output weights of a layer's MLP, ``a_t`` of n neurons
(``surgery.rebuild.units``), at every token of the ensemble. Four measures of it, a row per layer:

* ``F = exp(-sum_i p_i ln p_i)``, ``p_i`` the share of feature i in the sum of all ``|activation|``: the effective
  number of features, those of a sparse autoencoder (``sae``); ``psi = F / n`` above 1 is superposition (Bereska et al.
  2025, arXiv 2512.13568);
* ``participation = (tr C)^2 / tr C^2``, C the covariance over neurons: how many directions share the variance;
* ``kurtosis``: excess of the neurons, mean: 0 Gaussian, high where a neuron is mostly silent;
* ``sparsity``: the share of activations below 5 % of the largest of their neuron.

F depends on the autoencoder's width and on the number of features active at once. The encoder's ReLU outputs are cut
to the largest, ``k`` per token on average over a batch (batch top-k, Bussmann et al. 2024, arXiv 2412.06410); the
decoder's rows have unit length. At one k for all, F follows density: more than the true number active splits features,
fewer blurs them (24 planted features in 32 neurons, 2 to 16 active, k = 8: psi from .84 to 1.59, where .75 is true). So
k is swept upwards until held-out activations are explained to ``LEVEL``, and F is read there, between the two k that
enclose it (``matched``): psi .77 to .85. Where no k explains as much, F is NaN. Compare models only at equal
``n_features`` and level.

Controls: ``F_shuffled`` and ``participation_shuffled``, where each neuron's activations are permuted over tokens
independently, which keeps their distribution and removes what neurons share; and the model untrained
(``surgery.models.untrained``).

>>> features = torch.zeros(400, 4).index_put((torch.arange(400), torch.arange(400) % 4), torch.ones(400))
>>> effective(features).item(), round(participation(features).item(), 6)  # four alternate: three directions
(4.0, 3.0)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import embedding, linear, normalize

from surgery.instruments.regression import halves
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.rebuild.units import Writer, listen, writers
from surgery.stats.bootstrap import columns, described, weights
from surgery.stats.sampling import Sampling

SILENT = 0.05  # of the largest activation of a neuron
KS, LEVEL = (1, 2, 4, 8, 16, 32), 0.95  # features a token that are tried; variance that they must explain
Draws = Float[Tensor, "resample token"]
Resampled = Float[Tensor, " resample"]

_MEASURES = {
    "F": "effective number of features on held-out prompts, at matched explained variance, mean over the seeds",
    "psi": "F over the number of neurons: above 1 superposition",
    "participation": "number of directions that share the neurons' variance, (tr C)^2 / tr C^2",
    "kurtosis": "excess kurtosis of a neuron, mean over those that vary: 0 Gaussian",
    "sparsity": f"share of activations below {SILENT:.0%} of the largest of their neuron",
}
COLUMNS: dict[str, str] = {
    "layer": "layer, counted from 0",
    "n_neurons": "number of neurons of its MLP, those of all experts",
    "n_prompts": "number of prompts, the unit of resampling; half of them for F and psi",
    "n_features": "width of the autoencoder",
    "steps": "steps that the autoencoder was trained for",
    "seeds": "number of autoencoders",
    "explained": "share of held-out variance explained where F is read: the level; more where the least k explains "
    "more, less where no k reaches it (F is NaN), mean over the seeds",
    "L0": "features active at a held-out token where F is read, mean over the seeds",
    "dead": "share of features active at no held-out token, at the largest k tried, mean over the seeds",
    "F_spread": "standard deviation of F over the seeds",
    "F_shuffled": "F of neurons shuffled one by one, at the largest k tried, first seed",
    "participation_shuffled": "participation of neurons shuffled one by one",
} | described(_MEASURES)


@dataclass(frozen=True)
class SparseAutoencoder:
    """``a = centre + scale (base + features decoder)``, with batch top-k features of a ReLU."""

    encoder: Float[Tensor, "feature neuron"]
    bias: Float[Tensor, " feature"]
    decoder: Float[Tensor, "feature neuron"]  # rows of unit length
    base: Float[Tensor, " neuron"]
    centre: Float[Tensor, " neuron"]
    scale: float
    k: int
    steps: int

    def encode(self, activations: Float[Tensor, "token neuron"]) -> Float[Tensor, "token feature"]:
        """Encode activations as features: batch top-k, so k per token on average over these tokens."""
        features = linear((activations - self.centre) / self.scale - self.base, self.encoder, self.bias).relu()
        return torch.where(_batch_top_k(features, self.k), features, 0)

    def decode(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, "token neuron"]:
        """Reconstruct activations from features."""
        return self.centre + self.scale * (features @ self.decoder + self.base)

    def report(self, activations: Float[Tensor, "token neuron"]) -> dict[str, float]:
        """Measure ``explained``, ``L0`` and ``dead`` on these activations; see ``COLUMNS``."""
        features = self.encode(activations)
        missed = (activations - self.decode(features)).square().sum()
        active = features > 0
        return {
            "explained": 1 - float(missed / (activations - activations.mean(0)).square().sum()),
            "L0": float(active.sum(1).double().mean()),
            "dead": float((~active.any(0)).double().mean()),
        }


def sae(
    activations: Float[Tensor, "token neuron"],
    n_features: int,
    k: int = 8,
    *,
    steps: int = 400,
    batch_size: int = 256,
    rate: float = 1e-2,
    seed: int = 0,
) -> SparseAutoencoder:
    """Train a small sparse autoencoder of one layer's activations with Adam, from random directions.

    The learning rate falls linearly over the last four fifths of the steps. Dead features are not revived: they count
    nothing in F. Activations are first centred and scaled to a mean square length of 1. Cost: ``steps`` products of a
    batch with the encoder; only the k largest features per token are decoded and differentiated.

    Raises ValueError for a k outside 1 to n_features, and for activations that are constant or not finite.

    >>> axes = torch.eye(4)[torch.arange(400) % 4]
    >>> coder = sae(axes, 16, 1, steps=100)
    >>> coder.report(axes)["explained"] > 0.95, coder.report(axes)["L0"]
    (True, 1.0)
    """
    if not 1 <= k <= n_features:
        raise ValueError(f"k features of {n_features} are kept a token: give a k from 1 to {n_features}, got {k}")
    centre = activations.mean(0)
    scale = float((activations - centre).square().sum(1).mean().sqrt())
    if not 0 < scale < float("inf"):
        raise ValueError("these activations are constant or not finite: an autoencoder has nothing to learn from them")
    z, draw = (activations - centre) / scale, torch.Generator().manual_seed(seed)
    decoder = normalize(torch.randn(n_features, z.shape[1], generator=draw).to(z), dim=1).requires_grad_()
    encoder = decoder.detach().clone().requires_grad_()
    bias, base = (torch.zeros(size).to(z).requires_grad_() for size in (n_features, z.shape[1]))
    optimizer = torch.optim.Adam([encoder, bias, decoder, base], lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 1.25 * (1 - step / steps))
        batch = z[torch.randint(len(z), (batch_size,), generator=draw)]
        with torch.no_grad():
            features = linear(batch - base, encoder, bias).relu()
            token, feature = _batch_top_k(features, k).nonzero(as_tuple=True)
        active = ((batch - base)[token] * embedding(feature, encoder)).sum(1) + bias[feature]
        decoded = base.expand_as(batch).index_add(0, token, active.unsqueeze(1) * embedding(feature, decoder))
        optimizer.zero_grad()
        (decoded - batch).square().sum(1).mean().backward()
        optimizer.step()
        with torch.no_grad():
            decoder.copy_(normalize(decoder, dim=1))
    return SparseAutoencoder(encoder.detach(), bias.detach(), decoder.detach(), base.detach(), centre, scale, k, steps)


def effective(activations: Float[Tensor, "token feature"], draws: Draws | None = None) -> Resampled:
    """F, the exponential of the entropy of the features' shares of all activation: from 1 to the number of features.

    Each row of ``draws`` weighs the tokens (equally if not given) and gives one number. NaN where nothing is active.

    >>> effective(torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])).tolist()
    [2.0]
    """
    sums = _draws(activations, draws) @ activations.abs().double()
    return torch.special.entr(sums / sums.sum(1, keepdim=True)).sum(1).exp()


@dataclass(frozen=True)
class Matched:
    """F where autoencoders explain a given share of the variance, between two of them."""

    F: Resampled
    explained: float
    L0: float
    dead: float
    k: int  # the largest that was tried


def matched(
    trained_on: Float[Tensor, "token neuron"],
    held_out: Float[Tensor, "tested neuron"],
    n_features: int,
    draws: Float[Tensor, "resample tested"] | None = None,
    *,
    ks: Sequence[int] = KS,
    level: float = LEVEL,
    steps: int = 400,
    seed: int = 0,
) -> Matched:
    """Train autoencoders with more and more active features until ``level`` of ``held_out`` is explained; read F there.

    F and L0 are interpolated along the explained variance between the last k below the level and the first above it.
    Where the least k is above it, F is of that k; where none is, F is NaN. Cost: an autoencoder for each k up to there.

    Raises ValueError for ``ks`` that do not rise or a level outside (0, 1), and as ``sae`` does.

    >>> axes = torch.eye(4)[torch.arange(400) % 4]
    >>> found = matched(axes[:200], axes[200:], 16, ks=(1, 2), steps=100)
    >>> found.k, found.L0, bool(abs(found.F - 4) < 0.1)
    (1, 1.0, True)
    """
    if not ks or list(ks) != sorted(set(ks)) or not 0 < level < 1:
        raise ValueError(f"give rising ks and a level between 0 and 1, got ks={list(ks)} and level={level}")
    below: Matched | None = None
    for k in ks:
        coder = sae(trained_on, n_features, k, steps=steps, seed=seed)
        here = Matched(F=effective(coder.encode(held_out), draws), k=k, **coder.report(held_out))
        if not here.explained >= level:
            below = here
            continue
        if below is None:
            return here
        share = (level - below.explained) / (here.explained - below.explained)
        F, L0 = below.F + share * (here.F - below.F), below.L0 + share * (here.L0 - below.L0)
        return Matched(F, level, L0, here.dead, k)
    return replace(here, F=torch.full_like(here.F, torch.nan), L0=float("nan"))


def participation(activations: Float[Tensor, "token neuron"], draws: Draws | None = None) -> Resampled:
    """Participation ratio ``(tr C)^2 / tr C^2`` of the covariance over neurons: 1 along a line, n in all directions.

    ``draws`` weigh the tokens, and the mean is recomputed for each row. For T tokens it is at most T - 1, for a
    Gaussian about ``n / (1 + n / T)``. NaN where nothing varies. Cost: T^2 (n + rows) products.
    """
    drawn, x = _draws(activations, draws), activations.double()
    x = x - x.mean(0)
    count = drawn.sum(1)
    mean = drawn @ x / count.unsqueeze(1)
    square = sum(
        (drawn[:, rows] * (drawn @ (x @ x[rows].T).square())).sum(1) for rows in torch.arange(len(x)).split(1024)
    )
    across = (drawn * (mean @ x.T).square()).sum(1) / count
    length = mean.square().sum(1)
    trace = drawn @ x.square().sum(1) / count - length
    return trace.square() / (square / count**2 - 2 * across + length**2)


def kurtosis(activations: Float[Tensor, "token neuron"], draws: Draws | None = None) -> Resampled:
    """Excess kurtosis of a neuron over the tokens, mean over the neurons that vary: 0 Gaussian, -1.2 uniform."""
    drawn, x = _draws(activations, draws), activations.double()
    spread = x.std(0, correction=0)
    varies = spread > 1e-6 * spread.max()
    z = ((x - x.mean(0)) / spread)[:, varies]
    count = drawn.sum(1, keepdim=True)
    m1, m2, m3, m4 = (drawn @ z**power / count for power in (1, 2, 3, 4))
    variance = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return torch.where(variance > 1e-9, fourth / variance**2 - 3, torch.nan).nanmean(1)


def sparsity(activations: Float[Tensor, "token neuron"], draws: Draws | None = None) -> Resampled:
    """Share of activations that are at most ``SILENT`` of their neuron's largest over these tokens.

    >>> sparsity(torch.tensor([[1.0, 2.0], [0.0, 2.0]])).tolist()
    [0.25]
    """
    drawn, size = _draws(activations, draws), activations.abs()
    silent = (size <= SILENT * size.amax(0)).double().masked_fill(~size.isfinite(), torch.nan).mean(1)
    return drawn @ silent / drawn.sum(1)


def activations(
    stack: Stack, tokens: Tokens | Tensor, layers: Sequence[int] | None = None, batch_size: int = 64
) -> list[Float[Tensor, "token neuron"]]:
    """Record what enters the output weights of these layers' MLPs (all if not given), at the tokens of the ensemble.

    An expert's neurons are multiplied by the router's weight, and 0 at tokens routed elsewhere. Cost: 1 F.

    Raises ValueError for a layer that the model does not have or whose activations are not finite, ModelError for one
    without an MLP.

    >>> from surgery.instruments import known_networks
    >>> [x.shape for x in activations(Stack(known_networks.random_network(2)), known_networks.tokens(3, 5))]
    [torch.Size([12, 192]), torch.Size([12, 192])]
    """
    places = range(stack.n_layers) if layers is None else layers
    if absent := [layer for layer in places if not 0 <= layer < stack.n_layers]:
        raise ValueError(f"there is no layer {absent[0]} to record: {stack.name} has 0 to {stack.n_layers - 1}")
    every = writers(stack.model, "mlp")
    mlps = [every[layer] for layer in places]
    batches: list[list[Tensor]] = [[] for _ in mlps]

    def record(place: int, keep: Tensor, *inputs: Tensor) -> None:
        neurons = _dense(mlps[place], *inputs).reshape(keep.numel(), -1)
        batches[place].append(neurons[keep.flatten()].float().cpu())

    if mlps:
        listen(stack, mlps, Tokens.of(tokens), record, batch_size)
    recorded = [torch.cat(parts) for parts in batches]
    if bad := [layer for layer, x in zip(places, recorded) if not x.isfinite().all()]:
        raise ValueError(f"activations of layer {bad[0]} of {stack.name} are not finite: load it in float32")
    return recorded


@with_meanings(COLUMNS)
@in_smaller_batches
def within(
    stack: Stack,
    tokens: Tokens | Tensor,
    layers: Sequence[int] | None = None,
    *,
    n_features: int | None = None,
    ks: Sequence[int] = KS,
    level: float = LEVEL,
    steps: int = 400,
    seeds: int = 2,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure features, directions and sparsity of the MLP's neurons: a row per layer (all if not given), ``COLUMNS``.

    The autoencoders have ``n_features`` (twice the neurons if not given); they are trained on a random half of the
    prompts and evaluated, as is F, on the other, where they explain ``level`` of the variance (``matched``). Intervals
    resample prompts, not autoencoders: ``F_spread`` says how much these differ. Cost: 2 F and, a layer, at most
    ``seeds * len(ks) + 1`` autoencoders, of 256 neurons about 5 s each on one core.

    Raises ValueError for a single prompt, for no seed, and as ``matched`` and ``activations`` do.

    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.random_network(1, 8))
    >>> options = dict(ks=(2, 16), level=0.5, steps=50, seeds=1, sampling=Sampling(resamples=0))
    >>> frame = within(stack, known_networks.tokens(8, 6), **options)
    >>> frame[["n_neurons", "n_features"]].values.tolist(), bool(frame["L0"].between(2, 16).all())
    ([[32, 64]], True)
    """
    if seeds < 1:
        raise ValueError(f"give at least one seed of autoencoders, got seeds={seeds}")
    measured, fitted = halves(Tokens.of(tokens).to(stack.device), sampling.seed)
    places = list(range(stack.n_layers) if layers is None else layers)
    recorded = [activations(stack, half, places, sampling.batch_size) for half in (measured, fitted)]
    owners = [half.ensemble().nonzero()[:, 0].cpu() for half in (measured, fitted)]
    draws, all_draws = (_token_draws(half, sampling.resamples, sampling.seed) for half in (owners[:1], owners))
    generator, rows = torch.Generator().manual_seed(sampling.seed), []
    for layer, held_out, trained_on in zip(places, *recorded):
        both, size = torch.cat([held_out, trained_on]), held_out.shape[1]
        width = 2 * size if n_features is None else n_features
        fit = partial(matched, trained_on, held_out, width, draws, ks=ks, level=level, steps=steps)
        found = [fit(seed=sampling.seed + i) for i in range(seeds)]
        F = torch.stack([each.F for each in found])
        names = ("explained", "L0", "dead")
        reports = pd.DataFrame([{name: getattr(each, name) for name in names} for each in found]).mean(skipna=False)
        shuffled = _shuffle(both, generator)
        test, train = shuffled[: len(held_out)], shuffled[len(held_out) :]
        null = sae(train, width, found[0].k, steps=steps, seed=sampling.seed).encode(test)
        row: dict[str, float] = {
            "layer": layer,
            "n_neurons": size,
            "n_prompts": len(measured) + len(fitted),
            "n_features": width,
            "steps": steps,
            "seeds": seeds,
            **reports,
            "F_spread": float(F[:, 0].std()) if seeds > 1 else torch.nan,
            "F_shuffled": float(effective(null)),
            "participation_shuffled": float(participation(shuffled)),
        }
        row |= columns("F", F.mean(0)) | columns("psi", F.mean(0) / size)
        for name, measure in (("participation", participation), ("kurtosis", kurtosis), ("sparsity", sparsity)):
            row |= columns(name, measure(both, all_draws))
        rows.append(row)
    return pd.DataFrame(rows)


def _batch_top_k(features: Float[Tensor, "token feature"], k: int) -> Bool[Tensor, "token feature"]:
    """Batch top-k: mark the positive features among the ``k * tokens`` largest of all."""
    least = features.flatten().topk(k * len(features), sorted=False).values.min()
    return (features > 0) & (features >= least)


def _draws(values: Float[Tensor, "token column"], draws: Draws | None) -> Draws:
    return torch.ones(1, len(values), dtype=torch.float64) if draws is None else draws


def _token_draws(owners: Sequence[Tensor], resamples: int, seed: int) -> Draws:
    """How often each token is drawn when whole prompts are resampled; the halves' tokens follow one another."""
    first = [0, *(int(owner.max()) + 1 for owner in owners)]
    prompts = torch.cat([owner + before for owner, before in zip(owners, first)])
    n_prompts = int(prompts.max()) + 1
    return weights(n_prompts, resamples, seed)[:, prompts]


def _shuffle(x: Float[Tensor, "token neuron"], generator: torch.Generator) -> Float[Tensor, "token neuron"]:
    """Permute each neuron's activations over the tokens independently."""
    return x.gather(0, torch.rand(x.shape, generator=generator).argsort(0))


def _dense(writer: Writer, x: Tensor, *routes: Tensor) -> Tensor:
    """Activations of the neurons at every token, those of all experts side by side."""
    if not routes:
        return x
    chosen, weight = routes
    dense = x.new_zeros(len(x), *writer.shape)
    for expert, reads in enumerate(writer.reads):
        token, place = torch.where(chosen == expert)
        act = writer.module._apply_gate(linear(x[token], reads))  # noqa: SLF001
        dense[token, expert] = weight[token, place].unsqueeze(1).to(x) * act
    return dense
