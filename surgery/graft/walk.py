r"""The stream that enters a span of layers as a random variable: its moments, walks through it, training on the walks.

    latents = graft.latents(stack, corpus, 4, 9, "latents")
    fitted = walk.fit(latents)                                       # mean and principal components, by position
    moved = fitted(x, mask, walk.Stationary(0.9))                    # one step from every activation
    pairs = walk.relabelled(latents, stack, fitted, walk.Stationary(0.9), share=0.5)
    graft.fit(stack, student, span, pairs, heldout, folder, schedule=schedule)

In each class of positions let ``mu`` be the mean, ``z`` the coordinates of ``x - mu`` along the first ``k`` principal
components, each over its standard deviation, and ``d^2 = |z|^2`` (Mahalanobis). Steps, ``xi`` standard normal:

    Stationary(rho)             z' = rho z + sqrt(1 - rho^2) xi: an Ornstein-Uhlenbeck walk at whole steps
    Free(eta)                   z' = z + eta xi: in n steps the covariance grows by 1 + n eta^2, it leaves the data
    Tangent(step, neighbours)   x' = x + step C^(1/2) xi, C the covariance of the nearest real activations
    Interpolated(alpha)         x' = l x + (1 - l) y, y another real activation of that class, l ~ Beta(alpha, alpha)
    Scattered(kind)             the control: as far as ``kind`` goes, in any direction

``Stationary`` keeps mean and covariance whatever the law of x, with ``E[d^2(z') | z] = rho^2 d^2 + (1 - rho^2) k``; n
of its steps are one of ``rho^n``. It keeps no more than that: a law that is not Gaussian becomes Gaussian. The part
outside the ``k`` components does not change, so that small steps tend to the identity and the covariance stays whole.
Whether a step stays among real activations is measured by ``surgery.graft.manifold``, not by d^2 alone.

A middle that is trained on walked activations may learn what the original makes of them (``relabelled``: active
distillation, a forward pass of the middle for each), or still the unwalked activation's ``x_stop`` (``unrelabelled``:
noise injection, which for small steps is a penalty on the Jacobian, Bishop 1995). The two are never mixed.

Sources: mixup of hidden states, Verma et al. 2019 (arXiv 1806.05236); extrapolation, DeVries and Taylor 2017
(1702.05538); that networks treat Gaussian activations unlike real ones, Janiak et al. 2024 (2409.17113).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.graft.steps import Free as Free
from surgery.graft.steps import Interpolated as Interpolated
from surgery.graft.steps import Kind
from surgery.graft.steps import Scattered as Scattered
from surgery.graft.steps import Stationary as Stationary
from surgery.graft.steps import Tangent as Tangent
from surgery.instruments.ensemble import REFERENCE
from surgery.instruments.massive import Usual
from surgery.meanings import with_meanings
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.training.activations import Latents, Moments, Pairs
from surgery.training.ledger import Counter, Ledger
from surgery.training.loop import Schedule
from surgery.training.regions import Gathered, Region

REAL, LONGER, MORE = "real", "longer", "more real"  # unwalked, and what it costs to relabel spent otherwise
COLUMNS: dict[str, str] = {
    "position": "position in the prompt, from 0; the last class holds all later ones too",
    "n_tokens": "activations that the moments were taken from",
    "components": "principal components that are walked: k; fewer than asked for where fewer vary",
    "variance": "share of the variance that they hold; 1 where nothing varies and nothing is walked",
    "n_massive": "activations left out because they are massive: neither fitted nor walked",
}


@dataclass(frozen=True, eq=False)
class Walk:
    """Steps through activations: a region for each of the first positions, the last one for all that follow."""

    regions: tuple[Region, ...]

    @property
    def device(self) -> torch.device:
        return self.regions[0].mean.device

    def to(self, device: torch.device | str) -> "Walk":
        """The walk on another device."""
        return Walk(tuple(region.to(device) for region in self.regions))

    @with_meanings(COLUMNS)
    def summary(self) -> pd.DataFrame:
        """A row per class of positions: ``COLUMNS``."""
        rows = [(i, r.n_tokens, r.components, r.variance, r.n_massive) for i, r in enumerate(self.regions)]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def classes(self, mask: Bool[Tensor, "prompt pos"]) -> Int[Tensor, "prompt pos"]:
        """The number of each position's region; positions count from the prompt's first real token."""
        return (mask.long().cumsum(1) - 1).clamp(0, len(self.regions) - 1)

    def distances(
        self, x: Float[Tensor, "prompt pos d_model"], mask: Bool[Tensor, "prompt pos"]
    ) -> Float[Tensor, "prompt pos"]:
        """Squared Mahalanobis distance from the mean, within the components; 0 at padding."""
        squared = x.new_zeros(mask.shape)
        for region, there in self.places(mask):
            squared[there] = region.whitened(x[there]).square().sum(1)
        return squared

    def places(self, mask: Bool[Tensor, "prompt pos"]) -> Iterator[tuple[Region, Bool[Tensor, "prompt pos"]]]:
        """Yield each region with a mask of the real tokens in it."""
        classes = self.classes(mask)
        for i, region in enumerate(self.regions):
            yield region, mask & (classes == i)

    def __call__(
        self,
        x: Float[Tensor, "prompt pos d_model"],
        mask: Bool[Tensor, "prompt pos"],
        kind: Kind,
        *,
        seed: int = 0,
        draws: Sequence[int] | None = None,
        last: bool = False,
    ) -> Float[Tensor, "prompt pos d_model"]:
        """Take one step from every real token, with ``last`` from each prompt's last one alone; padding stays, and so
        do massive activations.

        The random numbers of a prompt depend only on ``seed`` and its number in ``draws`` (default: 0, 1, ...), not on
        the prompts beside it. Cost: no model; 2 k d_model multiplications a token, and for neighbours d_model for each
        activation of the bank.

        >>> x = torch.randn(200, 3, 2)
        >>> mask = torch.ones(200, 3, dtype=torch.bool)
        >>> bool((fit(x, mask)(x, mask, Stationary(0.9)) - x).norm() < x.norm())
        True
        """
        numbers = range(len(x)) if draws is None else draws
        lengths = mask.sum(1).tolist()
        drawn = [
            kind.draw(np.random.default_rng((seed, number)), length, x.shape[2])
            for number, length in zip(numbers, lengths, strict=True)
        ]
        noise = x.new_zeros(*mask.shape, drawn[0].shape[1])
        noise[mask] = torch.from_numpy(np.concatenate(drawn)).to(noise)
        moved = x.clone()
        for region, there in self.places(mask):
            if last:
                there = there & (mask.flip(1).cumsum(1).flip(1) == 1)
            if region.components and there.any():
                there = there.clone()
                there[there.clone()] = ~region.massive(x[there])
                moved[there] = kind.move(region, x[there], noise[there])
        return moved


def fit(
    source: Latents | Float[Tensor, "prompt pos d_model"],
    mask: Bool[Tensor, "prompt pos"] | None = None,
    *,
    positions: int = 3,
    components: int | None = None,
    variance: float = 0.99,
    prompts: Sequence[int] | None = None,
    bank: int = 2048,
    batch_size: int = 64,
    seed: int = 0,
    skip_massive: bool = True,
) -> Walk:
    """Fit a walk to ``x_start`` of these ``prompts`` (default: all), or to streams with a ``mask`` of real tokens.

    There are ``positions`` classes: 0, 1, ... each by itself, the last with all that follow. Each is walked in as many
    principal ``components`` as given, or as hold this share of the ``variance``; in fewer where the covariance is
    singular, in none where nothing varies (see ``Walk.summary``). Of each class ``bank`` activations, drawn by
    ``seed``, are kept as they are.

    A few massive activations would decide the covariance by themselves, so they are left out unless ``skip_massive`` is
    False: each activation is judged against those of its class, in the same dimension (``surgery.instruments.massive``;
    what is usual is learned from ``REFERENCE`` of them, of prompts spread evenly).

    This is one pass over the latents, and one over the reference, a batch in memory at a time; moments are in float64,
    the walk in float32. Memory: ``positions`` (d_model^2 + (bank + REFERENCE) d_model) numbers. Cost: d_model^2
    multiplications a token, no model.

    Raises ValueError for numbers out of range, an activation that is not finite, a class of positions without tokens,
    and fewer than ``regions.SAMPLES`` activations per component; the message says how many are needed.

    >>> fit(torch.randn(300, 2, 4), positions=1, variance=1.0).summary().components.tolist()
    [4]
    """
    if min(positions, bank, batch_size) < 1 or not 0 < variance <= 1 or (components is not None and components < 1):
        raise ValueError(
            "positions, bank, batch_size and components are 1 or more, variance above 0 and up to 1, got "
            f"{positions}, {bank}, {batch_size}, {components}, {variance}"
        )
    generator = np.random.default_rng(seed)
    usual = _usual(source, mask, prompts, positions, batch_size) if skip_massive else [None] * positions
    gathered = [Gathered(bank, of_class) for of_class in usual]
    for x, real in _batches(source, mask, prompts, batch_size):
        for of_class, there in zip(gathered, _classes(real, positions), strict=True):
            of_class.add(x[there], generator)
    return Walk(tuple(of_class.region(i, components, variance) for i, of_class in enumerate(gathered)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Augmented(Latents):
    """Latents of which a ``share`` is walked, for ``graft.fit``; ``relabelled`` and ``unrelabelled`` make them.

    Every prompt occurs ``copies`` times, prompt ``i`` of n as ``i``, ``n + i``, ``2 n + i``, ..., each copy with a walk
    of its own. A copy is a function of its number and ``seed``, so training that was stopped goes on exactly; with
    ``steps * batch / n`` copies no draw repeats a walk. The control with the same order of prompts is ``share=0``.
    Moments, and so the scale of the loss, are those of the real pairs.
    """

    pairs: Latents
    walk: Walk
    kind: Kind
    share: float
    last: bool
    seed: int
    teacher: Stack | None  # relabels; None: x_stop stays as it was

    @property
    def n_tokens(self) -> int:
        """Tokens that were harvested: copies cost no harvest."""
        return self.pairs.n_tokens

    def walks(self, prompt: int) -> bool:
        """Whether this copy is walked."""
        return bool(np.random.default_rng((self.seed, prompt, 1)).random() < self.share)

    def batch(self, prompts: Sequence[int]) -> Pairs:
        """As ``Latents.batch``. Cost: relabelled, the teacher's layers from start to stop for what is walked."""
        pairs, walked = self.pairs.batch(self._real(prompts)), torch.tensor([self.walks(prompt) for prompt in prompts])
        if not walked.any():
            return pairs
        mask = pairs.tokens.mask[walked]
        draws = [prompt for prompt in prompts if self.walks(prompt)]
        x = pairs.x_start[walked].to(self.walk.device)
        moved = self.walk(x, mask.to(x.device), self.kind, seed=self.seed, draws=draws, last=self.last)
        x_start, x_stop = pairs.x_start.clone(), pairs.x_stop.clone()
        x_start[walked] = moved.to(x_start)
        if self.teacher is not None:
            labels = _relabel(self.teacher, replace(pairs, x_start=x_start), walked, self.start, self.stop)
            x_stop[walked] = labels.to(x_stop) * mask.unsqueeze(-1)
        return Pairs(pairs.tokens, x_start, x_stop)

    def moments(self, prompts: Sequence[int] | None = None, *, skip_first: bool = True) -> Moments:
        """Moments of the real pairs."""
        real = None if prompts is None else self._real(prompts)
        return self.pairs.moments(real, skip_first=skip_first)

    def ledger(self, teacher: Stack, schedule: Schedule | None = None, steps: int | None = None) -> Ledger:
        """What training by this schedule spends on the teacher: the harvest and, if relabelled, its middle.

        ``graft.fit`` books all of it before the first step. ``steps`` is how many were made, if training stopped early.
        Operations are counted on 64 prompts and scaled to the walked tokens; the seconds are in the training's own.
        """
        ledger = self.pairs.ledger(teacher)
        if self.teacher is None or schedule is None:
            return ledger
        drawn = [schedule.prompts(step, self.n_prompts) for step in range(schedule.steps if steps is None else steps)]
        walked = [prompt for prompt in np.concatenate(drawn).tolist() if self.walks(prompt)] if drawn else []
        tokens = int(self.lengths[walked].sum())
        sample = self.pairs.batch(range(min(64, self.pairs.n_prompts)))
        everything = torch.ones(len(sample.tokens), dtype=torch.bool)
        _, operations = Counter()("middle", lambda: _relabel(teacher, sample, everything, self.start, self.stop))
        ledger.add("relabelling", tokens, round(operations * tokens / int(sample.tokens.mask.sum())), 0.0, teacher=True)
        return ledger

    def _real(self, prompts: Sequence[int]) -> list[int]:
        """The prompts whose copies these are."""
        if missing := [prompt for prompt in prompts if not 0 <= prompt < self.n_prompts]:
            raise ValueError(f"there is no prompt {missing[0]} in these copies: there are 0 to {self.n_prompts - 1}")
        return [prompt % self.pairs.n_prompts for prompt in prompts]


def relabelled(
    pairs: Latents,
    teacher: Stack,
    walk: Walk,
    kind: Kind,
    *,
    share: float = 1.0,
    copies: int = 16,
    last: bool = False,
    seed: int = 0,
) -> Augmented:
    """Walk pairs so that ``x_stop`` is what the teacher's own layers make of the walked ``x_start``.

    A ``share`` of the copies is walked, at all positions or at each prompt's ``last`` alone. Cost:
    ``(stop - start) / L`` F for every walked prompt of a batch, booked in ``Augmented.ledger``.

    Raises ValueError for a share outside 0 to 1, less than one copy, and a teacher that did not make the pairs.
    """
    pairs.require(teacher)
    return _augmented(pairs, teacher, walk, kind, share, copies, last, seed)


def unrelabelled(
    pairs: Latents, walk: Walk, kind: Kind, *, share: float = 1.0, copies: int = 16, last: bool = False, seed: int = 0
) -> Augmented:
    """Walk the ``x_start`` of pairs and leave ``x_stop`` as it was: noise injection. Cost: no model.

    Raises as ``relabelled``.
    """
    return _augmented(pairs, None, walk, kind, share, copies, last, seed)


def _augmented(
    pairs: Latents, teacher: Stack | None, walk: Walk, kind: Kind, share: float, copies: int, last: bool, seed: int
) -> Augmented:
    if not 0 <= share <= 1 or copies < 1:
        raise ValueError(f"share is 0 to 1 and copies is 1 or more, got {share} and {copies}")
    regime = "unrelabelled" if teacher is None else "relabelled"
    description = f"{regime}, {kind}, share={share}, copies={copies}, last={last}, seed={seed}, {_digest(walk)}"
    inherited = {f.name: getattr(pairs, f.name) for f in fields(Latents)}
    inherited |= {"lengths": pairs.lengths.repeat(copies), "source": {**pairs.source, "walk": description}}
    return Augmented(**inherited, pairs=pairs, walk=walk, kind=kind, share=share, last=last, seed=seed, teacher=teacher)


def _digest(walk: Walk) -> str:
    """A hash that tells walks apart, so that a checkpoint of a training on another walk is refused."""
    digest = hashlib.sha256()
    for region in walk.regions:
        for tensor in (region.mean, region.axes, region.scale, region.bank):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _relabel(
    teacher: Stack, pairs: Pairs, walked: Bool[Tensor, " prompt"], start: int, stop: int
) -> Float[Tensor, "walked pos d_model"]:
    """The stream that leaves the teacher's own layers for the ``x_start`` of the ``walked`` prompts."""
    tokens = Tokens(pairs.tokens.ids[walked], pairs.tokens.mask[walked]).to(teacher.device)
    context = teacher.context(tokens)
    with torch.no_grad():
        return teacher.execute(f"{start}:{stop}", pairs.x_start[walked].to(context.x0), context)


def _batches(
    source: Latents | Tensor, mask: Tensor | None, prompts: Sequence[int] | None, size: int
) -> Iterator[tuple[Float[Tensor, "prompt pos d_model"], Bool[Tensor, "prompt pos"]]]:
    """Yield streams and masks, ``size`` prompts at a time."""
    numbers = range(source.n_prompts if isinstance(source, Latents) else len(source)) if prompts is None else prompts
    for first in range(0, len(numbers), size):
        part = list(numbers[first : first + size])
        if isinstance(source, Latents):
            pairs = source.batch(part)
            yield pairs.x_start, pairs.tokens.mask
        else:
            x = source[part]
            yield x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask[part]


def _classes(real: Bool[Tensor, "prompt pos"], positions: int) -> list[Bool[Tensor, "prompt pos"]]:
    """The real tokens of every class of positions."""
    place = (real.long().cumsum(1) - 1).clamp(max=positions - 1)
    return [real & (place == i) for i in range(positions)]


def _usual(
    source: Latents | Tensor, mask: Tensor | None, prompts: Sequence[int] | None, positions: int, batch_size: int
) -> list[Usual | None]:
    """What is usual in every class of positions, by prompts spread evenly; None of a class without finite tokens."""
    numbers = list(
        range(source.n_prompts if isinstance(source, Latents) else len(source)) if prompts is None else prompts
    )
    some = numbers[:: max(1, len(numbers) // REFERENCE)][:REFERENCE]
    parts: list[list[Tensor]] = [[] for _ in range(positions)]
    for x, real in _batches(source, mask, some, batch_size):
        for of_class, there in zip(parts, _classes(real, positions), strict=True):
            of_class.append(x[there].float())
    usual = list[Usual | None]()
    for rows in map(torch.cat, parts):
        known = rows[rows.isfinite().all(1)]
        known = known[:: max(1, len(known) // REFERENCE)]
        usual.append(Usual.of(known.unsqueeze(0)) if len(known) else None)
    return usual
