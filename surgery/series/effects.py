r"""What one layer changes in the layers after it: through all that comes between, directly, and for later tokens.

Layer i is taken out (``surgery.instruments.ablation``: skip, mean or resample, at every token of the ensemble) and the
layers after it run again. ``u_j`` is what layer j writes in the clean run, ``u_j^i`` what it writes without layer i;
expectations run over the ensemble, ``c(a) = a - E a`` and ``n(a) = sqrt(E |a|^2)``.

    T_ij  = n(c(u_j - u_j^i)) / (n(c(u_j)) + n(c(u_j^i)))        the total effect, in [0, 1] by the triangle inequality
    local = the same with u_j^i = f_j(x_j - (u_i - v_i))         the direct effect: only layer j sees that i is gone
    chain = T - local                                            what passes through the layers between, or is undone

=====================  =================================  ==============================================================
network                T                                  local
=====================  =================================  ==============================================================
``parallel_network``   0 for every pair                   0 for every pair
``serial_network``     1 for every pair (no norm)         1 from a layer to the next, 0 to all others
``random_network``     no structure: the null             no structure: the null
=====================  =================================  ==============================================================

With a norm, frozen or live, T of the serial network is below 1: what replaces the layer's update is constant, but not
once it is divided by its token's denominator, and the next layer reads that. With live norms the parallel network reads
above 0, as all layers share the denominator. A layer that writes nothing that varies has no T (NaN). Where embeddings
are small, T from layer 0 is large whatever the layers do, as in the untrained transformer (.6): read it from layer 1.

``relative_*`` is the published effect, ``|u_j - u_j^i| / |u_j|`` token by token, not centred (Csordas et al. 2025,
arXiv 2505.13898; theirs is skip with live norms, the largest value of all tokens, |u_j| at least 1e-6). It has no upper
bound, and its maximum is that of a single token; so there are mean, median and ninth decile, and the maximum without an
interval, which a bootstrap cannot give. T, local, chain and the intervals are ours. When you report a large effect, say
what it is larger than: the same architecture untrained, or the pairs of equal distance.

``future`` takes layer i out at the tokens before a cut and looks at those from the cut on: only what attention carries
is left. ``future_output`` does the same for the next-token distribution; ``depth_score`` is the mean depth of that
effect.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pandas as pd
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.instruments import massive
from surgery.instruments.ablation import CleanRun, clean_runs
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import portions
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.engine import Stream
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import Moments, described, measure_columns, ratio, weights
from surgery.stats.sampling import Sampling

Resampled = Float[Tensor, " resample"]

COLUMNS = {
    "layer": "the layer taken out, counted from 0",
    "later": "the later layer whose update is looked at",
    "n_prompts": "number of prompts, the unit of resampling",
    **massive.COLUMNS,
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


@with_meanings(COLUMNS)
@in_smaller_batches
def matrix(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    kind: str = "mean",
    amount: float = 1.0,
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure T, local, chain and the relative effect of every layer on every later one: a row per pair, ``COLUMNS``.

    ``frozen`` keeps the norms' denominators at the clean run's; run it again with ``frozen=False`` to see what the
    normalisation does by itself. Cost in a model of L layers: ``(L - 1)/2`` F for T and as much for local, 1 F for the
    clean run, 1 F for the denominators, 1 F for the mean. Memory: the stream of one batch, and for each of the
    ``L (L - 1) / 2`` pairs 2 d_model numbers a prompt and one a token.

    Raises ValueError for a model of one layer, what ``ablation.clean_runs`` refuses and, with ``frozen``, a norm whose
    denominator cannot be found (use ``frozen=False``).

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.serial_network(n_layers=3))
    >>> frame = matrix(stack, known_networks.tokens(), sampling=Sampling(resamples=0))
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
                lost = run.update(layer) - run.ablate(layer, run.update(layer))
                for later in range(layer + 1, stack.n_layers):
                    tally.add("local", layer, later, stack.update(later, run.stream[later] - lost, run.context))
    return ensemble.annotate(tally.frame("T", "local"), "layer", "later")


@with_meanings(COLUMNS)
@in_smaller_batches
def future(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    cuts: Sequence[int] | None = None,
    kind: str = "skip",
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure T and the relative effect on the tokens from a cut on, of a layer taken out before it: a row per pair.

    ``cuts`` are positions in the prompt (by default quarter, half and three quarters of the longest); the tokens after
    all of them are pooled. It reads 0 where attention carries nothing that layer ``layer`` wrote to ``later``, as in
    all constructed networks of ``surgery.instruments.known_networks``. Cost: ``(L - 1)/2`` F a cut, and 1 F each for
    the clean run, the denominators, and the mean. Otherwise as ``matrix``.

    Raises ValueError for a cut with no token of the ensemble on either side, and for what ``matrix`` refuses.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.serial_network(n_layers=3))
    >>> frame = future(stack, known_networks.tokens(), sampling=Sampling(resamples=0))
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
    return ensemble.annotate(tally.frame("T"), "layer", "later")


@with_meanings(COLUMNS)
@in_smaller_batches
def future_output(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    cuts: Sequence[int] | None = None,
    kind: str = "skip",
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure what taking a layer out before a cut does to the next-token distributions from the cut on.

    A row per layer: ``layer``, ``n_prompts``, ``l2``, ``kl`` with intervals, and ``l2_max`` (published: the largest).
    The last layer reads 0, as nothing reads it. Cost: as ``future``, and L + 1 readouts a cut; the last norm stays
    live.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.random_network(2))
    >>> frame = future_output(stack, known_networks.tokens(), sampling=Sampling(resamples=0))
    >>> frame["l2"].gt(0).tolist()
    [True, False]
    """
    ensemble, draws, sums, largest = _outputs(**locals())
    count = draws @ sums["count"]
    frame = pd.DataFrame(
        {"layer": layer, "n_prompts": draws.shape[1]}
        | measure_columns({name: ratio(draws @ sums[name][layer], count) for name in ("l2", "kl")})
        | {"l2_max": float(largest[layer])}
        for layer in range(stack.n_layers)
    )
    return ensemble.annotate(frame, "layer")


@with_meanings(COLUMNS)
@in_smaller_batches
def depth_score(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    cuts: Sequence[int] | None = None,
    kind: str = "skip",
    *,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Return ``sum_l l m_l / sum_l m_l``, with m the mean ``l2`` (or ``kl``) of ``future_output``, in one row.

    It says at what depth, in layers, later tokens find what they use; NaN where no layer has an effect on them.
    Published with the maximum over tokens for m (arXiv 2505.13898). Compare with the architecture untrained. Cost: as
    ``future_output``.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.random_network(2))
    >>> depth_score(stack, known_networks.tokens(), sampling=Sampling(resamples=0))["depth_score"].tolist()
    [0.0]
    """
    ensemble, draws, sums, _ = _outputs(**locals())
    depth = torch.arange(stack.n_layers, dtype=torch.float64)
    by_distance = {"depth_score": sums["l2"] @ draws.T, "depth_score_kl": sums["kl"] @ draws.T}
    measures = {name: ratio(depth @ effect, effect.sum(0)) for name, effect in by_distance.items()}
    return ensemble.annotate(pd.DataFrame([{"n_prompts": draws.shape[1]} | measure_columns(measures)]))


class _Tally:
    """Per-prompt moments of clean and changed updates, and relative effects token by token, by pair of layers."""

    def __init__(self, stack: Stack, n_prompts: int, resamples: int, seed: int) -> None:
        self.stack, self.draws = stack, weights(n_prompts, resamples, seed)
        self.prompts: list[Int[Tensor, " row"]] = []  # the prompt of every row of the moments, again for every cut
        self.owners: list[Int[Tensor, " token"]] = []  # the prompt of every token
        self.sizes: defaultdict[int, list[Moments]] = defaultdict(list)
        self.clean: defaultdict[int, list[Moments]] = defaultdict(list)
        self.other: defaultdict[tuple, list[Moments]] = defaultdict(list)
        self.squares: defaultdict[tuple, list[Float[Tensor, " row"]]] = defaultdict(list)
        self.relative: defaultdict[tuple, list[Float[Tensor, " token"]]] = defaultdict(list)

    def open(self, run: CleanRun, mask: Bool[Tensor, "prompt pos"]) -> None:
        """Start on the tokens ``mask`` of a batch."""
        self.run, self.mask = run, mask
        self.prompts.append(run.first + torch.arange(len(mask)))
        self.owners.append(self.prompts[-1][mask.nonzero()[:, 0].cpu()])
        for layer in range(1, self.stack.n_layers):
            self.clean[layer].append(Moments.of(run.update(layer), None, mask))
            self.sizes[layer].append(Moments.of(run.stream[layer + 1], None, mask))

    def add(self, measure: str, layer: int, later: int, u: Stream) -> None:
        """Record ``u``, the update of ``later`` without ``layer``."""
        effect = (u - self.run.update(later)).masked_fill(~self.mask.unsqueeze(-1), 0)
        squares = reduce(effect.double().square(), "prompt pos d_model -> prompt", "sum")
        self.other[measure, layer, later].append(Moments.of(u, None, self.mask))
        self.squares[measure, layer, later].append(squares.cpu())
        if measure == "T":
            size = self.run.update(later)[self.mask].float().norm(dim=-1).clamp(min=_LEAST)
            self.relative[layer, later].append((effect[self.mask].float().norm(dim=-1) / size).cpu())

    def frame(self, *names: str) -> pd.DataFrame:
        """Return a row for every pair of layers, with the measures ``names`` and the relative effect."""
        draws, owners, rows = self.draws[:, torch.cat(self.prompts)], self.draws[:, torch.cat(self.owners)], []
        clean = {layer: Moments.concatenate(parts) for layer, parts in self.clean.items()}
        rounding = {layer: _rounding(self.stack, Moments.concatenate(parts)) for layer, parts in self.sizes.items()}
        for layer, later in self.relative:
            measures = {
                name: self.dependence(name, layer, later, clean[later], rounding[later], draws) for name in names
            }
            if "local" in measures:
                measures["chain"] = measures["T"] - measures["local"]
            relative = torch.cat(self.relative[layer, later]).double()
            measures["relative_mean"] = ratio(owners @ relative, owners.sum(1))
            measures["relative_q50"], measures["relative_q90"] = _quantiles(relative, owners, (0.5, 0.9))
            row: dict[str, float] = {"layer": layer, "later": later, "n_prompts": self.draws.shape[1]}
            rows.append(row | measure_columns(measures) | {"relative_max": float(relative.max())})
        return pd.DataFrame(rows)

    def dependence(
        self, measure: str, layer: int, later: int, clean: Moments, rounding: float, draws: Tensor
    ) -> Resampled:
        """Return T or local of a pair; NaN where the later layer's updates vary less than ``rounding``."""
        other = Moments.concatenate(self.other[measure, layer, later])
        total = clean.sum_a - other.sum_a
        effect = Moments(clean.count, total, total, torch.cat(self.squares[measure, layer, later])).norm(draws)
        size = clean.norm(draws) + other.norm(draws)
        return ratio(effect, torch.where(size > rounding, size, 0))


def _rounding(stack: Stack, stream: Moments) -> float:
    """Return below what size updates are rounding of the stream they were added to: such a layer is dead."""
    size = (stream.product.sum() / stream.count.sum()).sqrt()
    return 8 * float(size) * max(torch.finfo(stack.dtype).eps, 1e-9)  # the moments are rounded as well


def _quantiles(
    values: Float[Tensor, " token"], owners: Float[Tensor, "resample token"], levels: Sequence[float]
) -> list[Resampled]:
    """Return, for each level, the smallest value that a share ``level`` of the resampled tokens does not exceed.

    NaN if any value is undefined: it might be the largest or the smallest.
    """
    if values.isnan().any():
        return [owners.new_full((len(owners),), torch.nan) for _ in levels]
    order = values.argsort()
    mass = owners[:, order].cumsum(1)
    return [values[order][(mass >= level * mass[:, -1:]).float().argmax(1)] for level in levels]


def _without(
    stack: Stack, run: CleanRun, layer: int, where: Bool[Tensor, "prompt pos"]
) -> Iterator[tuple[int, Stream, Stream]]:
    """Yield every later layer with the stream entering it and its update, ``layer`` taken out at tokens ``where``."""
    x = run.stream[layer] + run.ablate(layer, run.update(layer), where)
    for later in range(layer + 1, stack.n_layers):
        u = stack.update(later, x, run.context)
        yield later, x, u
        x = x + u


def _outputs(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    cuts: Sequence[int] | None,
    kind: str,
    frozen: bool,
    sampling: Sampling,
) -> tuple[Ensemble, Float[Tensor, "resample prompt"], dict[str, Tensor], Float[Tensor, " layer"]]:
    """Return the ensemble, weights of its prompts, sums of l2, kl [layer, prompt], count [prompt], the largest l2."""
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
                    largest[layer] = torch.maximum(largest[layer], l2.max())  # which keeps what is undefined
    return ensemble, weights(n_prompts, sampling.resamples, sampling.seed), sums, largest


def _distances(
    stack: Stack, clean: Float[Tensor, "row d_model"], other: Float[Tensor, "row d_model"]
) -> Float[Tensor, "2 row"]:
    """Return L2 distance and KL(clean || other) of the next-token distributions of two streams."""
    parts = []
    for rows in portions(stack, clean):
        p, q = (stack.readout(x[rows]).double().log_softmax(-1) for x in (clean, other))
        parts.append(torch.stack([(p.exp() - q.exp()).norm(dim=-1), (p.exp() * (p - q)).sum(-1)]))
    return torch.cat(parts, 1).cpu()


def _sides(
    run: CleanRun, cuts: Sequence[int]
) -> Iterator[tuple[Bool[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]]:
    """Yield the tokens of the ensemble before every cut, and those from it on."""
    position = run.context.tokens.positions
    return ((run.mask & (position < cut), run.mask & (position >= cut)) for cut in cuts)


def _cuts(ensemble: Ensemble, cuts: Sequence[int] | None) -> Sequence[int]:
    """Return the cuts, or the default ones; ValueError for one without tokens on both sides."""
    first, last = (int(end) for end in ensemble.tokens.positions[ensemble.mask].aminmax())
    if cuts is None:
        cuts = sorted({round((last + 1) * quarter / 4) for quarter in (1, 2, 3)} & set(range(first + 1, last + 1)))
    outside = [cut for cut in cuts if not first < cut <= last]
    if outside or not cuts:
        raise ValueError(
            f"cuts are positions with tokens on both sides, {first + 1} to {last} in these prompts, got {list(cuts)}"
        )
    return cuts


def _ensemble(stack: Stack, tokens: Ensemble | Tokens | Tensor, sampling: Sampling) -> Ensemble:
    if stack.n_layers < 2:
        raise ValueError(f"{stack.name} has one layer; an effect on a later one needs two")
    return Ensemble.of(stack, tokens, sampling)
