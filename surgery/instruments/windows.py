"""What has to be recorded of a window of layers, and how its measures R, O, S and N follow from it.

``Units`` are what a window consists of. ``record_stream`` and ``record_entry_updates`` add up, as per-prompt ``Sums``,
what they write in the clean run and on the window's entry. ``Reading`` computes the measures from these sums, for any
resample of the prompts. ``surgery.series`` and ``surgery.anatomy.ends_against_middle`` are made of them.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.instruments.ensemble import Ensemble
from surgery.models.stack import Context, Stack
from surgery.stats.bootstrap import Moments, ratio, rotation

Stream = Float[Tensor, "batch pos d_model"]
Resampled = Float[Tensor, " resample"]
MATCHED = 16  # prompts on which update sizes are matched


@dataclass(frozen=True)
class Units:
    """The units of a window: whole layers, or attention and MLP of each in the order in which they run.

    ``stream`` has a place before every unit and one after the last; unit ``k`` writes between ``k`` and ``k + 1`` and
    reads at ``reads[k]``: at ``k``, but where attention and MLP stand side by side both read what enters their layer.
    ``gains``, if there are any, multiply what the units write.
    """

    stack: Stack
    names: tuple[str, ...]
    reads: tuple[int, ...]
    gains: tuple[float, ...] = ()

    @classmethod
    def of(cls, stack: Stack, grain: str) -> "Units":
        """Make the units of a model; ``grain`` is ``layer`` or ``sublayer``. ValueError if layers cannot be split."""
        if grain not in ("layer", "sublayer"):
            raise ValueError(f"grain is 'layer' or 'sublayer', got {grain!r}")
        if grain == "layer":
            return cls(stack, tuple(map(str, range(stack.n_layers))), tuple(range(stack.n_layers)))
        stack.wiring("0.attn 0.mlp")  # refuses models whose layers cannot be split
        count = range(2 * stack.n_layers)
        names = tuple(f"{k // 2}.{('attn', 'mlp')[k % 2]}" for k in count)
        return cls(stack, names, tuple(k - k % 2 if stack.parallel_sublayers else k for k in count))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def a_layer(self) -> int:
        """Number of units a layer."""
        return len(self) // self.stack.n_layers

    def after(self, start: int, longest: int) -> range:
        """Return the units after ``start`` in the longest window that begins there, of at most ``longest`` units."""
        return range(start + 1, min(start + longest, len(self)))

    def update(self, unit: int, x: Stream, context: Context) -> Stream:
        """Return what a unit writes if it reads ``x``. Cost: 1/L F, a sublayer half of it."""
        update = self.stack.execute(self.names[unit], x, context) - x
        return self.gains[unit] * update if self.gains else update

    def stream(self, context: Context) -> Float[Tensor, "place batch pos d_model"]:
        """Run the model: what enters the first unit, ..., what leaves the last. Cost: 1 F."""
        if len(self) == self.stack.n_layers and not self.gains:
            return self.stack.stream(context)
        stream = [context.x0]
        for unit, read in enumerate(self.reads):
            stream.append(stream[unit] + self.update(unit, stream[read], context))
        return torch.stack(stream)

    def norm_state(self, context: Context) -> dict[str, Tensor]:
        """Return the state of the norms in the run that ``stream`` gives, for ``stack.frozen``. Cost: 1 F."""
        if not any(self.gains):  # none, or all 0: nothing is written whatever the norms do
            return self.stack.norm_state(context)
        scaled = [f"{gain!r}*({name})" for name, gain in zip(self.names, self.gains, strict=True)]
        if self.a_layer == 2 and self.stack.parallel_sublayers:
            scaled = [f"{{{attn}|{mlp}}}" for attn, mlp in zip(scaled[::2], scaled[1::2], strict=True)]
        return self.stack.norm_state(context, " ".join(scaled))

    def mean_stream(self, ensemble: Ensemble) -> Float[Tensor, "place d_model"]:
        """Return the mean over the ensemble's tokens of what ``stream`` gives, in float64. Cost: 1 F."""
        parts = (self.stream(context)[:, mask] for _, context, mask in ensemble.batches(self.stack, "mean stream"))
        totals = torch.stack([streams.sum(1, dtype=torch.float64) for streams in parts])
        return totals.sum(0) / int(ensemble.mask.sum())

    def matched(self, fresh: Stack, ensemble: Ensemble) -> "Units":
        """Return the units of another model of this shape, with gains that give their updates the size of ours.

        The size of an update is ``n(c(u_l)) / n(c(x_l))``, relative to the stream it reads, and unit after unit is
        brought to it on the first ``MATCHED`` prompts, however they are batched. Cost: 2 F of these.
        """
        context, mask = self.stack.context(ensemble.tokens[:MATCHED]), ensemble.mask[:MATCHED]
        units, theirs = replace(self, stack=fresh, gains=()), fresh.context(context.tokens)
        ours, stream, gains = self.stream(context), [theirs.x0], []
        for unit, read in enumerate(self.reads):
            update = units.update(unit, stream[read], theirs)
            size = _spread(ours[unit + 1] - ours[unit], mask) / _spread(ours[read], mask)
            gains.append(float(torch.nan_to_num(size * _spread(stream[read], mask) / _spread(update, mask), 0, 0, 0)))
            stream.append(stream[unit] + gains[-1] * update)
        return replace(units, gains=tuple(gains))

    def finish(self, stop: int, x: Stream, before: Stream, context: Context) -> Stream:
        """Return what leaves the model if ``x`` leaves the unit before ``stop`` (``before``: without its update)."""
        if stop % self.a_layer:
            read = before if self.reads[stop] < stop else x
            x, stop = x + self.update(stop, read, context), stop + 1
        layer = stop // self.a_layer
        return self.stack.execute(f"{layer}:", x, context) if layer < self.stack.n_layers else x


class Sums:
    """Per-prompt sums over the ensemble, by name: all that is kept of a batch's activations.

    The vector sums of x_l, p_l and q_l give those of all updates and differences. Squares do not add up, so each is
    kept.
    """

    def __init__(self) -> None:
        self.squares: defaultdict[tuple, list[Tensor]] = defaultdict(list)
        self.vectors: defaultdict[tuple, list[Tensor]] = defaultdict(list)

    def open(self, keep: Bool[Tensor, "batch pos"]) -> None:
        """Start the next batch, with its tokens of the ensemble."""
        self.dropped = ~keep.unsqueeze(-1)
        self.add(keep.sum(1), "count")

    def add(self, per_prompt: Float[Tensor, " batch"] | Int[Tensor, " batch"], *key: Any) -> None:
        """Record one number a prompt."""
        self.squares[key].append(per_prompt.double().cpu())

    def square(self, values: Stream, *key: Any) -> None:
        """Record the sum of squares over a prompt's tokens."""
        measured = values.masked_fill(self.dropped, 0)
        self.add(torch.linalg.vector_norm(measured, dim=(1, 2), dtype=torch.float64) ** 2, *key)

    def vector(self, values: Stream, *key: Any) -> None:
        """Record the sum of squares and the sum over a prompt's tokens."""
        self.square(values, *key)
        self.vectors[key].append(values.masked_fill(self.dropped, 0).sum(1, dtype=torch.float64).cpu())

    def __getitem__(self, key: tuple) -> Float[Tensor, " prompt"]:
        return torch.cat(self.squares[key])

    def total(self, *key: Any) -> Float[Tensor, "prompt d_model"]:
        """Return the recorded vector sums of all prompts."""
        return torch.cat(self.vectors[key])


def record_stream(stream: Float[Tensor, "layer_plus_1 batch pos d_model"], sums: Sums) -> None:
    """Record what enters and leaves every unit of the clean run, and what each writes."""
    for layer, x in enumerate(stream):
        sums.vector(x, "stream", layer)
    for layer in range(len(stream) - 1):
        sums.square(stream[layer + 1] - stream[layer], "update", layer)


def record_entry_updates(
    units: Units, context: Context, stream: Tensor, start: int, longest: int, norm: str, sums: Sums
) -> Iterator[tuple[int, Stream]]:
    """Yield ``p_l`` of every layer after ``start``, and record on the way what R and O need."""
    parallel = torch.zeros_like(stream[start])
    for layer in units.after(start, longest):
        entry_update = units.update(layer, stream[start], context)
        parallel = parallel + entry_update
        serial = stream[layer + 1] - stream[start + 1]
        sums.vector(entry_update, norm, start, layer)
        sums.square(stream[layer + 1] - stream[layer] - entry_update, norm, "effect", start, layer)
        sums.square(serial, norm, "serial", start, layer)
        sums.square(parallel, norm, "parallel", start, layer)
        sums.square(serial - parallel, norm, "error", start, layer)
        yield layer, entry_update


@dataclass(frozen=True)
class Turns:
    """Random rotations of what windows write, one a prompt: the null of a reader that prefers no direction.

    What varies over the ensemble is turned, and the mean is left alone, so that all directions are met at the same
    working point: ``m + Q (w - m)``. A uniformly random rotation with random signs before it is another one, so every
    prompt has signs of its own, drawn by its number and not by its batch.
    """

    mean: Float[Tensor, "place d_model"]  # of the stream
    rotation: Float[Tensor, "d_model d_model"]
    signs: Float[Tensor, "prompt d_model"]
    mask: Bool[Tensor, "prompt pos"] | None = None

    @classmethod
    def of(cls, units: Units, ensemble: Ensemble) -> "Turns":
        """Draw them by the ensemble's seed. Cost: 1 F, and one QR decomposition of d_model x d_model."""
        generator, width = np.random.default_rng((ensemble.sampling.seed, 4)), units.stack.d_model
        turn = rotation(torch.from_numpy(generator.standard_normal((width, width))))
        signs = torch.from_numpy(generator.choice([-1.0, 1.0], (len(ensemble.tokens), width)))
        mean, turn, signs = (
            values.to(units.stack.device, units.stack.dtype) for values in (units.mean_stream(ensemble), turn, signs)
        )
        return cls(mean, turn, signs)

    def batch(self, first: int, mask: Bool[Tensor, "batch pos"]) -> "Turns":
        """Return those of the prompts from number ``first`` on, for the tokens that ``mask`` keeps."""
        return replace(self, signs=self.signs[first : first + len(mask)], mask=mask)

    def __call__(self, written: Stream, start: int, read: int) -> Stream:
        """Turn what was written between two places at the batch's tokens; leave it where they are not measured."""
        mean = self.mean[read] - self.mean[start]
        turned = mean + ((written - mean) * self.signs.unsqueeze(1)) @ self.rotation.T
        return turned if self.mask is None else torch.where(self.mask.unsqueeze(-1), turned, written)


def record_turned(
    units: Units,
    context: Context,
    stream: Tensor,
    start: int,
    layer: int,
    entry_update: Stream,
    turn: Turns,
    sums: Sums,
) -> None:
    """Record what the window wrote before a layer, and what the layer writes if that is turned.

    To be called with frozen norms. Cost: 1/L F.
    """
    read = units.reads[layer]
    written = stream[read] - stream[start]
    rotated = units.update(layer, stream[start] + turn(written, start, read), context)
    sums.square(written, "written", start, layer)
    sums.vector(rotated, "rotated", start, layer)
    sums.square(rotated - entry_update, "rotated effect", start, layer)


class Reading:
    """The measures of all windows from one start, under every row of ``draws``: tensors [layer, resample].

    ``layer`` counts the units of a window, layers or sublayers; ``reads`` says where in the stream each of them reads.
    """

    def __init__(
        self, sums: Sums, draws: Float[Tensor, "resample prompt"], reads: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.sums, self.draws, self.reads, self.dtype = sums, draws, reads, dtype
        self.x = [sums.total("stream", place) for place in range(len(reads) + 1)]
        if not all(total.isfinite().all() for total in self.x):
            raise ValueError(f"the stream is not finite on these prompts: its numbers overflow {dtype}")

    def norm(self, total: Float[Tensor, "prompt d_model"], *key: Any) -> Resampled:
        """Return ``n(c(.))`` of the vectors whose squares are under ``key`` and whose sums are ``total``."""
        return Moments(self.sums["count",], total, total, self.sums[key]).norm(self.draws)

    def size(self, *key: Any) -> Resampled:
        """Return ``n(.)``, not centred, of the vectors whose squares are under ``key``."""
        return (self.draws @ self.sums[key] / (self.draws @ self.sums["count",])).sqrt()

    def measures(self, start: int, layers: range, damage: bool) -> dict[str, Float[Tensor, "layer resample"]]:
        """Return every measure of ``surgery.series.window`` for the windows that end with each of ``layers``."""
        weight, entry_read, output = self.dependence("frozen", start, layers)
        weight_live, entry_read_live, output_live = self.dependence("live", start, layers)
        R, R_live = running_mean(entry_read, weight), running_mean(entry_read_live, weight_live)
        S, S_live = (R + output) / 2, (R_live + output_live) / 2
        measures = {"R": R, "O": output, "S": S, "R_live": R_live, "O_live": output_live, "S_live": S_live}
        measures["layernorm_share"] = S_live - S
        measures["N"] = running_mean(self.displacement(start, layers), weight)
        measures["R_over_N"] = ratio(R, measures["N"])
        measures["R_rotated"] = running_mean(self.exchanged("rotated", start, layers), weight)
        measures["R_over_rotated"] = ratio(R, measures["R_rotated"])
        measures["preference"] = self.preference(start, layers, weight)
        measures["R_shuffled"] = torch.full_like(output, torch.nan)
        if self.draws.shape[1] > 1:
            measures["R_shuffled"] = running_mean(self.exchanged("shuffled", start, layers), weight)
        if damage:
            count = self.draws @ self.sums["predictions",]
            for kind, form in itertools.product(("loss", "kl"), ("sum", "mean")):
                nats = [self.draws @ self.sums[kind, form, start, layer + 1] / count for layer in layers]
                measures[f"{kind}_parallel_{form}"] = torch.stack(nats)
        return measures

    def dependence(self, norms: str, start: int, layers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``w_l`` and ``R_l`` of every layer, and O of the window that ends with it."""
        x, weight, entry_read, output = self.x, [], [], []
        parallel = torch.zeros_like(x[0])
        for layer in layers:
            update, serial = x[layer + 1] - x[layer], x[layer + 1] - x[start + 1]
            entry_update = self.sums.total(norms, start, layer)
            parallel = parallel + entry_update
            n_update, n_entry = self.norm(update, "update", layer), self.norm(entry_update, norms, start, layer)
            n_serial = self.norm(serial, norms, "serial", start, layer)
            n_parallel = self.norm(parallel, norms, "parallel", start, layer)
            entry_read.append(self.norm(update - entry_update, norms, "effect", start, layer) / (n_update + n_entry))
            output.append(self.norm(serial - parallel, norms, "error", start, layer) / (n_serial + n_parallel))
            # A layer is dead if its writes vary less than the rounding of the stream, or less than the moments tell:
            # the sums of an update are exact, but its squares are of a rounded difference.
            eps = torch.finfo(self.dtype).eps
            rounding = eps * self.size("stream", layer + 1) + eps**0.5 * self.size("update", layer)
            rounding = rounding + 1e-7 * self.size(norms, start, layer)
            energy = n_update**2 + n_entry**2
            weight.append(torch.where(energy <= rounding**2, 0, energy))  # what is not finite stays so
        weights = torch.stack(weight)
        return weights, torch.stack(entry_read), torch.where(weights.cumsum(0) > 0, torch.stack(output), torch.nan)

    def displacement(self, start: int, layers: range) -> Float[Tensor, "layer resample"]:
        """Return ``N_l`` of every layer."""
        x, nulls = self.x, []
        size = {place: self.norm(x[place], "stream", place) for place in (start, *map(self.reads.__getitem__, layers))}
        for layer in layers:
            read = self.reads[layer]
            nulls.append(self.norm(x[read] - x[start], "written", start, layer) / (size[read] + size[start]))
        return torch.stack(nulls)

    def preference(
        self, start: int, layers: range, weight: Float[Tensor, "layer resample"]
    ) -> Float[Tensor, "layer resample"]:
        """Return how much larger the effect of what the window wrote is than that of the same turned."""
        own, turned = [], []
        for layer in layers:
            entry_update = self.sums.total("frozen", start, layer)
            update, rotated = self.x[layer + 1] - self.x[layer], self.sums.total("rotated", start, layer)
            own.append(self.norm(update - entry_update, "frozen", "effect", start, layer) ** 2)
            turned.append(self.norm(rotated - entry_update, "rotated effect", start, layer) ** 2)
        dead = weight == 0  # only rounding
        sums = (torch.where(dead, 0, torch.stack(squares)).cumsum(0) for squares in (own, turned))
        return ratio(*sums).sqrt()

    def exchanged(self, how: str, start: int, layers: range) -> Float[Tensor, "layer resample"]:
        """Return ``R_l`` of every layer with what the window wrote before it ``rotated`` or ``shuffled``."""
        nulls = []
        for layer in layers:
            entry_update, other = self.sums.total("frozen", start, layer), self.sums.total(how, start, layer)
            scale = self.norm(other, how, start, layer) + self.norm(entry_update, "frozen", start, layer)
            nulls.append(self.norm(other - entry_update, f"{how} effect", start, layer) / scale)
        return torch.stack(nulls)


def _spread(values: Stream, mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Return ``n(c(.))`` over the tokens of one batch."""
    return values[mask].double().var(0, correction=0).sum().sqrt()


def running_mean(
    values: Float[Tensor, "layer resample"], weights: Float[Tensor, "layer resample"]
) -> Float[Tensor, "layer resample"]:
    """Average over the layers so far, for the window that ends with each; NaN while all of them are dead.

    A layer without weight does not count, and one that is undefined makes every window that holds it undefined.
    """
    return torch.where(weights == 0, 0, values * weights).cumsum(0) / weights.cumsum(0)
