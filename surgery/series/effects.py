r"""What one layer changes in the layers after it: by way of all that comes between, directly, and for later tokens.

Layer i is taken out (``surgery.instruments.ablation``: skip, mean or resample, at every token of the ensemble) and the layers after
it run again. ``u_j`` is what layer j writes in the clean run, ``u_j^i`` what it writes without layer i; expectations
run over the ensemble, ``c(a) = a - E a`` and ``n(a) = sqrt(E |a|^2)``.

    T_ij  = n(c(u_j - u_j^i)) / (n(c(u_j)) + n(c(u_j^i)))        the total effect, in [0, 1] by the triangle inequality
    local = the same with u_j^i = f_j(x_j - (u_i - v_i))         the direct one: only layer j sees that i is gone
    chain = T - local                                            what passes through the layers between, or is undone

=====================  =================================  ==============================================================
network                T                                  local
=====================  =================================  ==============================================================
``parallel_network``   0 for every pair                   0 for every pair
``serial_network``     1 for every pair (no norm)         1 from a layer to the next, 0 to all others
``random_network``     no structure: the null             no structure: the null
=====================  =================================  ==============================================================

With a norm, frozen or live, T of the serial network is below 1: what stands in for the layer's update is constant, but
divided by a denominator of its token it is not, and the next layer reads that. Live, the parallel network reads above
0: all layers share the denominator. A layer that writes nothing that varies has no T (NaN). Where embeddings
are small, T from layer 0 is large whatever the layers do, as in the untrained transformer (.6): read it from layer 1.

``relative_*`` is the published effect, ``|u_j - u_j^i| / |u_j|`` token by token, not centred (Csordas et al. 2025,
arXiv 2505.13898; theirs is skip with live norms, the largest value of all tokens, |u_j| at least 1e-6). It has no upper
bound, and its maximum is one token's; so it comes with mean, median, ninth decile, and the maximum without an interval,
which a bootstrap cannot give. T, local, chain and the intervals are ours. Say of a large effect what it is
larger than: the same architecture untrained, or the pairs of equal distance.

``future`` takes layer i out at the tokens before a cut and looks at those from the cut on: only what attention carries
is left. ``future_output`` does so at the next-token distribution, ``depth_score`` is the mean depth of that effect.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.instruments.ablation import CleanRun, clean_runs
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import portions
from surgery.models.engine import Stream
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import Moments, columns, described, ratio, weights
from surgery.stats.sampling import Sampling

Resampled = Float[Tensor, " resample"]

COLUMNS = {
    "layer": "the layer taken out, counted from 0",
    "later": "the later layer whose update is looked at",
    "n_prompts": "number of prompts, the unit of resampling",
}
_INTERVALS = {
    "T": "total effect on the later layer's update: 0 none, 1 it depends on nothing else",
    "local": "direct effect: the later layer alone reads a stream without the layer's update",
    "chain": "T - local: what passes through the layers between, below 0 what they undo",
    "relative_mean": "size of the change relative to the update, mean over tokens (Csordas et al. 2025)",
    "relative_q50": "the same, median over tokens",
    "relative_q90": "the same, ninth decile over tokens",
    "l2": "distance of the next-token distributions with and without the layer (L2), mean over later tokens",
    "kl": "KL(clean || without the layer) of the next-token distributions, mean over later tokens (nats)",
    "depth_score": "mean layer (counted from 0) of the effect on later tokens, weighted by l2 (layers)",
    "depth_score_kl": "the same weighted by kl (layers)",
}
COLUMNS |= described(_INTERVALS)
COLUMNS["relative_max"] = "the same, its largest value over tokens; no interval: it is one token's"
COLUMNS["l2_max"] = "the largest distance of the two distributions over tokens; no interval"

_LEAST = 1e-6  # updates smaller than this count as this large in the relative effect, as published


def matrix(
    stack: Stack,
    tokens: Tokens | Tensor,
    kind: str = "mean",
    amount: float = 1.0,
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """T, local, chain and the relative effect of every layer on every later one: a row per pair, ``COLUMNS``.

    ``frozen`` keeps the norms' denominators at the clean run's; run it again with ``frozen=False`` to see what the
    normalisation does by itself. Cost in a model of L layers: ``(L - 1)/2`` F for T and as much for local, 1 F for the
    clean run, 1 F for the denominators, 1 F for the mean. Memory: the stream of one batch, and for each of the
    ``L (L - 1) / 2`` pairs 2 d_model numbers a prompt and one a token.

    Raises ValueError for a model of one layer, what ``ablation.clean_runs`` refuses and, with ``frozen``, a norm whose
    denominator cannot be found (then ``frozen=False``).

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> frame = matrix(Stack(known_networks.serial_network(n_layers=3)), known_networks.tokens(), sampling=Sampling(resamples=0))
    >>> frame[["layer", "later", "T", "local"]].round(6).values.tolist()
    [[0.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 0.0], [1.0, 2.0, 1.0, 1.0]]
    """
    ensemble = _ensemble(stack, tokens, sampling=sampling)
    tally = _Tally(stack, len(ensemble.tokens), sampling.resamples, sampling.seed)
    for run in clean_runs(stack, ensemble, kind, amount):
        with stack.frozen(run.context) if frozen else nullcontext():
            tally.open(run, run.mask)
            for layer in range(stack.n_layers - 1):
                for later, _, u in _without(stack, run, layer, run.mask):
                    tally.add("T", layer, later, u)
                gone = run.update(layer) - run.ablated(layer, run.update(layer))
                for later in range(layer + 1, stack.n_layers):
                    tally.add("local", layer, later, stack.update(later, run.stream[later] - gone, run.context))
    return tally.frame("T", "local")


def future(
    stack: Stack,
    tokens: Tokens | Tensor,
    cuts: Sequence[int] | None = None,
    kind: str = "skip",
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """T and the relative effect on the tokens from a cut on, of a layer taken out before it: a row per pair.

    ``cuts`` are positions in the prompt (quarter, half and three quarters of the longest if not given); the tokens of
    all of them are pooled. It reads 0 where attention carries nothing that layer ``layer`` wrote to ``later``, as in
    all constructed networks of ``surgery.instruments.known_networks``. Cost: ``(L - 1)/2`` F a cut, and 1 F for the clean run, for the
    denominators, and for the mean. Otherwise as ``matrix``.

    Raises ValueError for a cut with no token of the ensemble on either side, and for what ``matrix`` refuses.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> frame = future(Stack(known_networks.serial_network(n_layers=3)), known_networks.tokens(), sampling=Sampling(resamples=0))
    >>> frame["T"].tolist()
    [0.0, 0.0, 0.0]
    """
    ensemble = _ensemble(stack, tokens, sampling=sampling)
    tally, cuts = _Tally(stack, len(ensemble.tokens), sampling.resamples, sampling.seed), _cuts(ensemble, cuts)
    for run in clean_runs(stack, ensemble, kind):
        with stack.frozen(run.context) if frozen else nullcontext():
            for before, after in _sides(run, cuts):
                tally.open(run, after)
                for layer in range(stack.n_layers - 1):
                    for later, _, u in _without(stack, run, layer, before):
                        tally.add("T", layer, later, u)
    return tally.frame("T")


def future_output(
    stack: Stack,
    tokens: Tokens | Tensor,
    cuts: Sequence[int] | None = None,
    kind: str = "skip",
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """What taking a layer out before a cut does to the next-token distributions from the cut on: a row per layer.

    Columns: ``layer``, ``n_prompts``, ``l2``, ``kl`` with intervals, and ``l2_max`` (published: the largest). The last
    layer's is 0, nothing reads it. Cost: as ``future``, and L + 1 readouts a cut; the last norm stays live.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> future_output(Stack(known_networks.random_network(2)), known_networks.tokens(), sampling=Sampling(resamples=0))["l2"].gt(0).tolist()
    [True, False]
    """
    draws, sums, largest = _outputs(**locals())
    count = draws @ sums["count"]
    return pd.DataFrame(
        {"layer": layer, "n_prompts": draws.shape[1]}
        | columns("l2", ratio(draws @ sums["l2"][layer], count))
        | columns("kl", ratio(draws @ sums["kl"][layer], count))
        | {"l2_max": float(largest[layer])}
        for layer in range(stack.n_layers)
    )


def depth_score(
    stack: Stack,
    tokens: Tokens | Tensor,
    cuts: Sequence[int] | None = None,
    kind: str = "skip",
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """``sum_l l m_l / sum_l m_l`` with m the mean ``l2`` (and ``kl``) of ``future_output``, at its cost: one row.

    How deep, in layers, what later tokens use is written. NaN where no layer has an effect on later tokens. Published
    with the maximum over tokens for m (arXiv 2505.13898). Compare with the architecture untrained.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> depth_score(Stack(known_networks.random_network(2)), known_networks.tokens(), sampling=Sampling(resamples=0))["depth_score"].tolist()
    [0.0]
    """
    draws, sums, _ = _outputs(**locals())
    depth = torch.arange(stack.n_layers, dtype=torch.float64)
    row: dict[str, float] = {"n_prompts": draws.shape[1]}
    for name, measure in (("depth_score", "l2"), ("depth_score_kl", "kl")):
        effect = sums[measure] @ draws.T
        row |= columns(name, ratio(depth @ effect, effect.sum(0)))
    return pd.DataFrame([row])


class _Tally:
    """Per-prompt moments of clean and changed updates, and relative effects token by token, by pair of layers."""

    def __init__(self, stack: Stack, n_prompts: int, resamples: int, seed: int) -> None:
        self.stack, self.draws = stack, weights(n_prompts, resamples if n_prompts > 1 else 0, seed)
        self.prompts: list[Int[Tensor, " row"]] = []  # which prompt a row of the moments is; under several cuts again
        self.owners: list[Int[Tensor, " token"]] = []  # which row a token belongs to
        self.sizes: defaultdict[int, list[Moments]] = defaultdict(list)
        self.clean: defaultdict[int, list[Moments]] = defaultdict(list)
        self.other: defaultdict[tuple, list[Moments]] = defaultdict(list)
        self.squares: defaultdict[tuple, list[Float[Tensor, " row"]]] = defaultdict(list)
        self.relative: defaultdict[tuple, list[Float[Tensor, " token"]]] = defaultdict(list)

    def open(self, run: CleanRun, kept: Bool[Tensor, "prompt pos"]) -> None:
        """What follows is about these tokens of this batch."""
        self.run, self.kept = run, kept
        self.prompts.append(run.first + torch.arange(len(kept)))
        self.owners.append(self.prompts[-1][kept.nonzero()[:, 0].cpu()])
        for layer in range(1, self.stack.n_layers):
            self.clean[layer].append(Moments.of(run.update(layer), None, kept))
            self.sizes[layer].append(Moments.of(run.stream[layer + 1], None, kept))

    def add(self, measure: str, layer: int, later: int, u: Stream) -> None:
        """The update of ``later`` without ``layer``."""
        effect = (u - self.run.update(later)).masked_fill(~self.kept.unsqueeze(-1), 0)
        self.other[measure, layer, later].append(Moments.of(u, None, self.kept))
        self.squares[measure, layer, later].append(effect.double().square().sum((1, 2)).cpu())
        if measure == "T":
            size = self.run.update(later)[self.kept].float().norm(dim=-1).clamp(min=_LEAST)
            self.relative[layer, later].append((effect[self.kept].float().norm(dim=-1) / size).cpu())

    def frame(self, *measures: str) -> pd.DataFrame:
        draws, owners, rows = self.draws[:, torch.cat(self.prompts)], self.draws[:, torch.cat(self.owners)], []
        clean = {layer: Moments.concatenate(parts) for layer, parts in self.clean.items()}
        rounding = {layer: _rounding(self.stack, Moments.concatenate(parts)) for layer, parts in self.sizes.items()}
        for layer, later in self.relative:
            row: dict[str, float] = {"layer": layer, "later": later, "n_prompts": self.draws.shape[1]}
            found = {
                name: self.dependence(name, layer, later, clean[later], rounding[later], draws) for name in measures
            }
            if "local" in found:
                found["chain"] = found["T"] - found["local"]
            relative = torch.cat(self.relative[layer, later]).double()
            found["relative_mean"] = ratio(owners @ relative, owners.sum(1))
            found |= dict(zip(("relative_q50", "relative_q90"), _quantiles(relative, owners, (0.5, 0.9)), strict=True))
            for name, values in found.items():
                row |= columns(name, values)
            rows.append(row | {"relative_max": float(relative.max())})
        return pd.DataFrame(rows)

    def dependence(
        self, measure: str, layer: int, later: int, clean: Moments, rounding: float, draws: Tensor
    ) -> Resampled:
        other = Moments.concatenate(self.other[measure, layer, later])
        total = clean.sum_a - other.sum_a
        effect = Moments(clean.count, total, total, torch.cat(self.squares[measure, layer, later])).norm(draws)
        size = clean.norm(draws) + other.norm(draws)
        return ratio(effect, torch.where(size > rounding, size, 0))


def _rounding(stack: Stack, stream: Moments) -> float:
    """Updates that vary less are rounding of the stream they were added to: the layer is dead."""
    size = (stream.product.sum() / stream.count.sum()).sqrt()
    return 8 * float(size) * max(torch.finfo(stack.dtype).eps, 1e-9)  # the moments are rounded as well


def _quantiles(
    values: Float[Tensor, " token"], owners: Float[Tensor, "resample token"], levels: Sequence[float]
) -> list[Resampled]:
    """The smallest value that a share ``level`` of the drawn tokens does not exceed."""
    order = values.argsort()
    mass = owners[:, order].cumsum(1)
    return [values[order][(mass >= level * mass[:, -1:]).float().argmax(1)] for level in levels]


def _without(
    stack: Stack, run: CleanRun, layer: int, where: Bool[Tensor, "prompt pos"]
) -> Iterator[tuple[int, Stream, Stream]]:
    """Every later layer with the stream that enters it and its update, ``layer`` taken out at the tokens ``where``."""
    x = run.stream[layer] + run.ablated(layer, run.update(layer), where)
    for later in range(layer + 1, stack.n_layers):
        u = stack.update(later, x, run.context)
        yield later, x, u
        x = x + u


def _outputs(
    stack: Stack, tokens: Tokens | Tensor, cuts: Sequence[int] | None, kind: str, frozen: bool, sampling: Sampling
) -> tuple[Float[Tensor, "resample prompt"], dict[str, Tensor], Float[Tensor, " layer"]]:
    """Weights of the prompts, per-prompt sums of l2, kl [layer, prompt] and count [prompt], and the largest l2."""
    ensemble = _ensemble(stack, tokens, sampling=sampling)
    n_prompts, cuts = len(ensemble.tokens), _cuts(ensemble, cuts)
    sums = {name: torch.zeros(stack.n_layers, n_prompts, dtype=torch.float64) for name in ("l2", "kl")}
    sums["count"], largest = torch.zeros(n_prompts, dtype=torch.float64), torch.zeros(stack.n_layers)
    for run in clean_runs(stack, ensemble, kind):
        with stack.frozen(run.context) if frozen else nullcontext():
            for before, after in _sides(run, cuts):
                owner = run.first + after.nonzero()[:, 0].cpu()
                if not len(owner):
                    continue
                sums["count"].index_add_(0, owner, torch.ones(len(owner), dtype=torch.float64))
                for layer in range(stack.n_layers - 1):
                    for _, x, u in _without(stack, run, layer, before):
                        final = x + u
                    l2, kl = _distances(stack, run.stream[-1][after], final[after])
                    sums["l2"][layer].index_add_(0, owner, l2)
                    sums["kl"][layer].index_add_(0, owner, kl)
                    largest[layer] = max(float(largest[layer]), float(l2.max()))
    return weights(n_prompts, sampling.resamples if n_prompts > 1 else 0, sampling.seed), sums, largest


def _distances(
    stack: Stack, clean: Float[Tensor, "row d_model"], other: Float[Tensor, "row d_model"]
) -> Float[Tensor, "2 row"]:
    """L2 distance and KL(clean || other) of the next-token distributions that two streams are read out as."""
    parts = []
    for some in portions(stack, clean):
        p, q = (stack.readout(x[some]).double().log_softmax(-1) for x in (clean, other))
        parts.append(torch.stack([(p.exp() - q.exp()).norm(dim=-1), (p.exp() * (p - q)).sum(-1)]))
    return torch.cat(parts, 1).cpu()


def _sides(
    run: CleanRun, cuts: Sequence[int]
) -> Iterator[tuple[Bool[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]]:
    """The tokens of the ensemble before every cut, and those from it on."""
    position = run.context.tokens.positions
    return ((run.mask & (position < cut), run.mask & (position >= cut)) for cut in cuts)


def _cuts(ensemble: Ensemble, cuts: Sequence[int] | None) -> Sequence[int]:
    first, last = (int(end) for end in ensemble.tokens.positions[ensemble.mask].aminmax())
    if cuts is None:
        cuts = sorted({round((last + 1) * quarter / 4) for quarter in (1, 2, 3)} & set(range(first + 1, last + 1)))
    outside = [cut for cut in cuts if not first < cut <= last]
    if outside or not cuts:
        raise ValueError(
            f"cuts are positions with tokens on both sides, {first + 1} to {last} in these prompts, got {list(cuts)}"
        )
    return cuts


def _ensemble(stack: Stack, tokens: Tokens | Tensor, sampling: Sampling) -> Ensemble:
    if stack.n_layers < 2:
        raise ValueError(f"{stack.name} has one layer; an effect on a later one needs two")
    return Ensemble.of(stack, tokens, sampling)
