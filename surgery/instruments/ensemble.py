r"""The tokens that a measure averages over: visit every layer on all of them, and pair them across prompts.

A measure of layers is an expectation over the real tokens of many prompts, each prompt's first left out. ``Ensemble``
walks through them, batch by batch and layer by layer, and hands out the stream that enters and what the layer adds,

    x_0 = embedding,      u_l = f_l(x_l),      x_{l+1} = x_l + u_l,

in the model's order of layers or in any other. ``Ensemble.of`` leaves out tokens of massive activations as well, unless
``Sampling.skip_massive`` is False (``surgery.instruments.massive``). Nothing is kept: a measure adds up what it needs
of a visit, prompt by prompt (``surgery.stats``) or, where a corpus may be large, by ``units`` of prompts that are
resampled together (``Totals``), so that a long corpus takes no more memory than a short one. Cost: 1 F a walk. Memory:
one batch's stream.

``partners`` pairs every token with one of another prompt at the same place. That gives a null for whatever is claimed
of a particular token: give each its partner's vector (``exchange``), and nothing should be left of the claim. As the
vectors are permuted, they keep their mean and their size exactly.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> ensemble = Ensemble(Tokens.of(known_networks.tokens(48)), Sampling(batch_size=32))
>>> [(visit.first, visit.layer) for visit in ensemble.visits(Stack(known_networks.parallel_network(n_layers=2)))]
[(0, 0), (0, 1), (24, 0), (24, 1)]
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery import progress
from surgery.instruments.massive import Concentration, Spreads, Usual
from surgery.instruments.memory import Memory
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling

UNITS = 256  # of resampling: with more, intervals gain nothing and memory grows with the corpus
REFERENCE = 2048  # tokens, about, from whose medians massive ones are told


@dataclass(frozen=True)
class Visit:
    """One layer on the way through one batch."""

    first: int  # index of the batch's first prompt among all
    unit: Int[Tensor, " prompt"]  # unit of resampling of every prompt of the batch
    layer: int
    context: Context
    mask: Bool[Tensor, "prompt pos"]  # the batch's tokens that are in the ensemble; elsewhere x and u may hold anything
    x: Float[Tensor, "prompt pos d_model"]
    u: Float[Tensor, "prompt pos d_model"]


@dataclass(frozen=True)
class Ensemble:
    """The tokens to measure, and how to go through them: even batches of at most ``sampling.batch_size`` prompts.

    ``left_out`` are tokens that run but are not measured, ``concentration`` is what single tokens and dimensions hold
    of the variance of those that are; ``of`` finds both.

    Raises ValueError if no token is left to measure, or if the batch size is not positive.
    """

    tokens: Tokens
    sampling: Sampling = Sampling()
    left_out: Bool[Tensor, "prompt pos"] | None = None
    concentration: Concentration | None = None
    memory: Memory | None = None  # of the updates of former walks

    def __post_init__(self) -> None:
        if self.sampling.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got batch_size={self.sampling.batch_size}")
        if not self.mask.any():
            hint = (
                "prompts of two tokens or more, or skip_first=False"
                if self.sampling.skip_first
                else "prompts with tokens"
            )
            raise ValueError(f"no token is left to measure in {len(self.tokens)} prompts: give {hint}")

    @classmethod
    def of(cls, stack: Stack, tokens: "Ensemble | Tokens | Tensor", sampling: Sampling = Sampling()) -> "Ensemble":
        """Make the ensemble of prompts, or of ids without padding, on the device of ``stack``.

        Unless ``sampling.skip_massive`` is False, tokens of massive activations are left out, and the ensemble knows
        its ``concentration``. An ensemble made of the same model by the same rules is taken as it is, with ``sampling``
        for all else; so make one, and pass it on, where several measures look at the same prompts. Cost: 1 F, and up to
        1 F on the first ``REFERENCE`` tokens where there is more than one batch; none for an ensemble.
        """
        if isinstance(tokens, Ensemble):
            rules = ("skip_first", "skip_massive")
            if any(getattr(tokens.sampling, rule) != getattr(sampling, rule) for rule in rules):
                raise ValueError(
                    f"this ensemble was made with {tokens.sampling}; it cannot be measured with {sampling}"
                )
            return replace(tokens, sampling=sampling)
        ensemble = cls(Tokens.of(tokens).to(stack.device), sampling)
        return ensemble.without_massive(stack) if sampling.skip_massive else ensemble

    @property
    def mask(self) -> Bool[Tensor, "prompt pos"]:
        """Which tokens are in the ensemble."""
        mask = self.tokens.ensemble(self.sampling.skip_first)
        return mask if self.left_out is None else mask & ~self.left_out

    @property
    def units(self) -> Int[Tensor, " prompt"]:
        """Unit of resampling of every prompt: its own or, beyond ``UNITS`` prompts, one shared by neighbours."""
        count = len(self.tokens)
        return torch.arange(count) * min(count, UNITS) // count

    @property
    def n_units(self) -> int:
        """Number of units of resampling."""
        return min(len(self.tokens), UNITS)

    @property
    def n_massive(self) -> int:
        """Number of tokens left out for massive activations."""
        return 0 if self.left_out is None else int(self.left_out.sum())

    def remembering(self, memory: Memory) -> "Ensemble":
        """Return the same ensemble, in which a walk costs no F where ``memory`` still has its updates.

        Only while the model stays as it is: see ``surgery.instruments.memory``.
        """
        return replace(self, memory=memory)

    def columns(self, streams: Iterable[int] = (), updates: Iterable[int] = ()) -> dict[str, float]:
        """Return the columns of a row about these streams and updates that say what it rests on: ``massive.COLUMNS``.

        Shares are undefined (NaN) where massive tokens were not looked for.
        """
        unknown = {"token_share": float("nan"), "dimension_share": float("nan")}
        shares = unknown if self.concentration is None else self.concentration.columns(streams, updates)
        return {"n_tokens": int(self.mask.sum()), "n_massive": self.n_massive, **shares}

    def annotate(self, frame: pd.DataFrame, first: str | None = None, last: str | None = None) -> pd.DataFrame:
        """Return a frame with the ``columns`` of the streams that enter, and the updates of, each row's layers.

        ``first`` and ``last`` are the columns that name these layers: one alone a single layer, none all of them;
        ``stop`` is one past the last.
        """
        if self.concentration is None:
            return frame.assign(**self.columns())
        whole = len(self.concentration.update_token)
        shares = []
        for _, row in frame.iterrows():
            begin = int(row[first]) if first else 0
            end = whole if first is None else begin + 1 if last is None else int(row[last]) + (last != "stop")
            shares.append(self.columns(streams=range(begin, end), updates=range(begin, end)))
        return pd.concat([frame, pd.DataFrame(shares, index=frame.index)], axis=1)

    def without_massive(self, stack: Stack) -> "Ensemble":
        """Return the same ensemble without tokens of massive activations (``surgery.instruments.massive``).

        What is usual is learned from about ``REFERENCE`` tokens, of prompts spread evenly over all, so that the result
        does not depend on the size of batches. Cost: as ``of``. Memory: the streams of a batch, and of these tokens.

        Raises ValueError if the stream is not finite.
        """
        batches = self.batches(stack, "massive activations")
        parts: Iterable[Tensor] = (_measured_streams(stack, context, mask) for _, context, mask in batches)
        reference = self._reference_prompts()
        if len(self.tokens) <= self.sampling.batch_size:
            parts = [streams := next(iter(parts))]
            usual = Usual.of(streams[:, torch.isin(self.mask.nonzero()[:, 0], reference)])
        else:
            some = Ensemble(self.tokens[reference], self.sampling).batches(stack, "what is usual")
            usual = Usual.of(torch.cat([_measured_streams(stack, context, mask) for _, context, mask in some], 1))
        spreads, massive = Spreads(usual), []
        for streams in parts:
            exceeding = usual.exceeds(streams).any(0)
            massive.append(exceeding)
            spreads.add(streams[:, ~exceeding])
        left_out = torch.zeros_like(self.mask)
        left_out[self.mask] = torch.cat(massive)
        left_out = left_out if self.left_out is None else left_out | self.left_out
        return replace(self, left_out=left_out, concentration=spreads.concentration())

    def _reference_prompts(self) -> Int[Tensor, " prompt"]:
        """Return prompts from all over with ``REFERENCE`` tokens or just more; all prompts if they are few."""
        order = np.random.default_rng((self.sampling.seed, 3)).permutation(len(self.tokens))
        lengths = self.mask.sum(1).cpu().numpy()[order]
        count = int(np.searchsorted(lengths.cumsum(), REFERENCE)) + 1
        return torch.from_numpy(np.sort(order[:count])).to(self.mask.device)

    def batches(
        self, stack: Stack, label: str = "prompts", least: int = 1
    ) -> "Iterable[tuple[Tensor, Context, Tensor]]":
        """Yield units of resampling, context and mask of each batch, for measures that need all layers at once.

        ``least`` is the smallest batch that will do, where there are as many prompts.
        """
        batches = list(self.tokens.batches(max(self.sampling.batch_size, least)))
        return progress.track(self._contexts(stack, batches), label, len(batches), self.sampling.progress)

    def visits(self, stack: Stack, label: str = "layers", order: Sequence[int] | None = None) -> Iterable[Visit]:
        """Yield every layer of every batch, the layers run in ``order`` (the model's by default).

        Cost: 1 F; none where the ``memory`` has this walk.

        ``label`` stands beside the progress bar. Raises ValueError on the way if the stream is not finite.
        """
        order = range(stack.n_layers) if order is None else order
        batches = list(self.tokens.batches(self.sampling.batch_size))
        total = len(batches) * len(order)
        return progress.track(self._walk(stack, batches, order), label, total, self.sampling.progress)

    def streams(
        self, stack: Stack, label: str = "streams", order: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Context, Tensor, Float[Tensor, "place prompt pos d_model"]]]:
        """Yield units of resampling, context, mask and the streams of each batch: ``x_0``, then after every layer run.

        Cost, and errors, as ``visits``.
        """
        depth, places = stack.n_layers if order is None else len(order), list[Tensor]()
        for visit in self.visits(stack, label, order):
            places.append(visit.x)
            if len(places) == depth:
                last = visit.x + visit.u
                _require_finite(stack, visit.layer, last[visit.mask])
                yield visit.unit, visit.context, visit.mask, torch.stack([*places, last])
                places = []

    def generator(self, visit: Visit, *purpose: int) -> np.random.Generator:
        """Random generator for one visit; it starts the same whenever the visit is repeated for the same purpose."""
        return np.random.default_rng((self.sampling.seed, *purpose, visit.layer, visit.first))

    def _contexts(self, stack: Stack, batches: Sequence[Tokens]) -> Iterator[tuple[Tensor, Context, Tensor]]:
        mask, units, first = self.mask, self.units, 0
        for batch in batches:
            rows = slice(first, first + len(batch))
            yield units[rows], stack.context(batch), mask[rows, : batch.ids.shape[1]]
            first += len(batch)

    def _walk(self, stack: Stack, batches: Sequence[Tokens], order: Sequence[int]) -> Iterator[Visit]:
        first = 0
        for unit, context, mask in self._contexts(stack, batches):
            x = context.x0
            for place, layer in enumerate(order):
                u = self._update(stack, tuple(order[: place + 1]), first, x, context, mask)
                yield Visit(first, unit, layer, context, mask, x, u)
                x = x + u
            first += len(unit)

    def _update(
        self, stack: Stack, way: tuple[int, ...], first: int, x: Tensor, context: Context, mask: Tensor
    ) -> Tensor:
        """Return what the last layer of ``way`` writes to ``x``: its layers ran on the batch from prompt ``first``."""

        def compute() -> Tensor:
            u = stack.update(way[-1], x, context)
            _require_finite(stack, way[-1], x[mask], u[mask])
            return u

        key = (stack, context.tokens.ids.shape, first, way)
        return compute() if self.memory is None else self.memory.recall(key, compute)


def _measured_streams(
    stack: Stack, context: Context, mask: Bool[Tensor, "prompt pos"]
) -> Float[Tensor, "place token d_model"]:
    """Return the stream before every layer and after the last, of the tokens of the ensemble. Cost: 1 F."""
    streams = stack.stream(context)[:, mask]
    for place, x in enumerate(streams):
        _require_finite(stack, max(place - 1, 0), x)
    return streams.float()


def _require_finite(stack: Stack, layer: int, *values: Float[Tensor, "token d_model"]) -> None:
    if not all(x.isfinite().all() for x in values):
        raise ValueError(
            f"the stream of {stack.name} is not finite at layer {layer}: load the model in float32, or fix its weights"
        )


class Totals(dict[Hashable, Tensor]):
    """Sums over the rows of each unit of resampling, by name, in float64 on the CPU.

    >>> totals = Totals(2)
    >>> totals.add("count", torch.tensor([0, 1, 1]), torch.ones(3))
    >>> totals["count"].tolist()
    [1.0, 2.0]
    """

    def __init__(self, n_units: int) -> None:
        super().__init__()
        self.n_units = n_units

    def add(self, key: Hashable, unit: Int[Tensor, " row"], values: Float[Tensor, "row ..."]) -> None:
        """Add every row of ``values`` to its unit's sum under ``key``."""
        if key not in self:
            self[key] = torch.zeros(self.n_units, *values.shape[1:], dtype=torch.float64)
        self[key].index_add_(0, unit.cpu(), values.double().cpu())


def partner_prompts(mask: Bool[Tensor, "prompt pos"], generator: np.random.Generator) -> Int[Tensor, " prompt"]:
    """Return another prompt for every prompt: a random permutation among those of about the same number of kept tokens.

    It knows all prompts, so what is made of it does not depend on how they are batched. A prompt without tokens, or
    alone with them, is its own partner.

    >>> partner_prompts(torch.ones(2, 3, dtype=torch.bool), np.random.default_rng(0)).tolist()
    [1, 0]
    """
    lengths = mask.sum(1).cpu().numpy()
    order = np.lexsort((generator.random(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    partner = np.arange(len(lengths))
    partner[order] = np.roll(order, 1)
    return torch.from_numpy(partner)


def partner_places(
    mask: Bool[Tensor, "prompt pos"], of_partner: Bool[Tensor, "prompt pos"]
) -> Int[Tensor, "prompt pos"]:
    """Return, for each kept token, where in its partner the token of the same place is, counted among kept tokens.

    Where the partner has fewer, its tokens are counted through again. Elsewhere the entry is 0.

    >>> partner_places(torch.tensor([[False, True, True]]), torch.tensor([[True, False, True]])).tolist()
    [[0, 0, 2]]
    """
    place = (mask.cumsum(1) - 1) % of_partner.sum(1, keepdim=True).clamp(min=1)
    where = of_partner.long().argsort(dim=1, descending=True, stable=True)
    return torch.where(mask, where.gather(1, place.clamp(min=0)), 0)


def partners(mask: Bool[Tensor, "prompt pos"], generator: np.random.Generator) -> Int[Tensor, " token"]:
    """Return a random permutation of the kept tokens (numbered prompt by prompt) in which none stays where it was.

    Each is paired with the same place, counted from its prompt's first kept token, in another prompt. The places that
    only the longest prompt has are pooled with the last shared one. A token that is alone is its own partner.

    >>> partners(torch.ones(2, 3, dtype=torch.bool), np.random.default_rng(0)).tolist()
    [3, 4, 5, 0, 1, 2]
    """
    place = (mask.cumsum(1) - 1)[mask].cpu().numpy()
    lengths = np.sort(mask.sum(1).cpu().numpy())
    shared = lengths[-2] - 1 if len(lengths) > 1 else 0
    group = np.minimum(place, max(shared, 0))
    order = np.lexsort((generator.random(len(group)), group))
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    following = np.arange(1, len(order) + 1)
    following[np.append(first[1:], len(order)) - 1] = first
    partner = np.empty_like(order)
    partner[order] = order[following]
    return torch.from_numpy(partner).to(mask.device)


def exchange(
    values: Float[Tensor, "prompt pos d_model"], mask: Bool[Tensor, "prompt pos"], partner: Int[Tensor, " token"]
) -> Float[Tensor, "prompt pos d_model"]:
    """Replace the vector of every kept token by that of its partner, and leave the rest."""
    result = values.clone()
    result[mask] = values[mask][partner]
    return result
