"""What has to be recorded of a window of layers, and how its measures R, O, S and N follow from it.

``Units`` are what a window consists of. ``record_stream`` and ``record_entry_updates`` add up, as per-prompt ``Sums``,
what they write in the clean run and on the window's entry; the streams of all windows that wait for the same unit run
together. ``Reading`` computes the measures from these sums, for any resample of the prompts. ``surgery.series`` and
``surgery.anatomy.ends_against_middle`` are made of them.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from surgery.instruments.ensemble import Ensemble
from surgery.instruments.together import Together
from surgery.models.stack import Context, Stack
from surgery.stats.bootstrap import ratio, rotation

Stream = Float[Tensor, "batch pos d_model"]
Resampled = Float[Tensor, " resample"]
MATCHED = 16  # prompts on which update sizes are matched
FORMS = ("sum", "mean")  # of a window in parallel: updates added, or outputs averaged


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

    def to_layer(self, stop: int, x: Stream, before: Stream, context: Context) -> tuple[int, Stream]:
        """Return the next whole layer and what enters it if ``x`` leaves the unit before ``stop``.

        ``before`` is ``x`` without that unit's update.
        """
        if stop % self.a_layer:
            x, stop = x + self.update(stop, before if self.reads[stop] < stop else x, context), stop + 1
        return stop // self.a_layer, x


@dataclass(frozen=True)
class Spans:
    """The windows of up to ``longest`` units that start no later than ``last``, and the order in which they are kept.

    ``pairs`` are their starts and last units, by the last unit first: windows that wait for one unit stand together.

    >>> Spans.of(4, 3).pairs
    ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
    """

    pairs: tuple[tuple[int, int], ...]
    row: dict[tuple[int, int], int]

    @classmethod
    def of(cls, n_units: int, longest: int, last: int | None = None) -> "Spans":
        """List the windows of a model of ``n_units`` units."""
        last = n_units if last is None else last
        pairs = [(a, b) for b in range(n_units) for a in range(max(0, b - longest + 1), min(b, last + 1))]
        return cls(tuple(pairs), {pair: row for row, pair in enumerate(pairs)})

    def starts(self, layer: int, among: range, group: int) -> Iterator[slice]:
        """Yield the starts, of those ``among``, of windows that end with ``layer``, at most ``group`` at a time."""
        chosen = [start for start in among if (start, layer) in self.row]
        for i in range(0, len(chosen), group):
            yield slice(chosen[i], chosen[i : i + group][-1] + 1)


class Sums:
    """Per-prompt sums over the ensemble's tokens of one batch: all that is kept of its activations.

    ``tensors`` are [place, prompt] or, of vector sums, [place, prompt, d_model], where a place is one of the stream, a
    unit, or a window in the order of ``spans``; ``batch`` is the number of prompts. They can be stored, and joined with
    those of other batches by ``merged``. The vector sums of x_l, p_l and q_l give those of all updates and differences.
    Squares do not add up, so each is kept. All is summed in float64. The vector sums of windows, which are many, are
    kept about the ``base`` of their batch, its mean, and then in float32 (in float64 for a model in float64): what is
    lost is relative to how much the vectors vary, however large their mean.
    """

    def __init__(self, keep: Bool[Tensor, "batch pos"], spans: Spans, dtype: torch.dtype = torch.float32) -> None:
        self.spans, self.n_prompts, self.dtype = spans, len(keep), torch.promote_types(dtype, torch.float32)
        self.tokens = keep.flatten().nonzero()[:, 0]
        self.owner = keep.nonzero()[:, 0]
        self.count = keep.sum(1, dtype=torch.float64)
        batch = torch.tensor([[self.n_prompts]])
        self.tensors: dict[str, Tensor] = {"count": self.count.cpu()[None], "batch": batch}
        self.x: Float[Tensor, "place token d_model"]  # the clean stream, of ``record_stream``

    def kept(self, streams: Float[Tensor, "some batch pos d_model"]) -> Float[Tensor, "some token d_model"]:
        """Return the vectors of the ensemble's tokens."""
        return streams.flatten(1, 2).index_select(1, self.tokens)

    def placed(self, values: Float[Tensor, "some token d_model"], x: Stream) -> Float[Tensor, "some batch pos d_model"]:
        """Return copies of ``x`` with these vectors at the ensemble's tokens."""
        copies = repeat(x, "batch pos d_model -> some (batch pos) d_model", some=len(values))
        return copies.index_copy(1, self.tokens, values).unflatten(1, x.shape[:2])

    def by_prompt(self, values: Float[Tensor, "some token ..."]) -> Float[Tensor, "some prompt ..."]:
        """Sum over every prompt's tokens."""
        some = torch.arange(len(values), device=self.owner.device).unsqueeze(1)
        total = values.new_zeros(len(values) * self.n_prompts, *values.shape[2:])
        total.index_add_(0, (some * self.n_prompts + self.owner).flatten(), values.flatten(0, 1))
        return total.unflatten(0, (len(values), self.n_prompts))

    def put(self, name: str, places: int, first: int, values: Float[Tensor, "some prompt ..."]) -> None:
        """Keep sums of the places from ``first`` on, of ``places`` in all; those never put stay NaN."""
        if name not in self.tensors:
            self.tensors[name] = torch.full((places, *values.shape[1:]), torch.nan, dtype=values.dtype)
        self.tensors[name][first : first + len(values)] = values.cpu()

    def squares(self, name: str, layer: int, starts: slice, values: Float[Tensor, "start token d_model"]) -> None:
        """Record the sums of squares of windows that end with ``layer``."""
        squares = torch.linalg.vector_norm(values.double(), dim=-1).square()
        self.put(f"{name} square", len(self.spans.pairs), self.spans.row[starts.start, layer], self.by_prompt(squares))

    def vectors(self, name: str, layer: int, starts: slice, values: Float[Tensor, "start token d_model"]) -> None:
        """Record the sums of squares and the sums of windows that end with ``layer``."""
        self.squares(name, layer, starts, values)
        total, count = self.by_prompt(values.double()), self.count.unsqueeze(1)
        base = reduce(total, "start prompt d_model -> start 1 d_model", "sum") / count.sum().clamp(min=1)
        places, row = len(self.spans.pairs), self.spans.row[starts.start, layer]
        self.put(f"{name} base", places, row, base)
        self.put(f"{name} sum", places, row, (total - count * base).to(self.dtype))


def merged(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Shaped[Tensor, "place prompt ..."]]:
    """Join the ``tensors`` of consecutive batches."""
    batches = list(parts)
    return {name: torch.cat([tensors[name] for tensors in batches], 1) for name in batches[0]}


def record_stream(stream: Float[Tensor, "place batch pos d_model"], sums: Sums) -> None:
    """Record what enters and leaves every unit of the clean run, and what each writes."""
    x = sums.x = sums.kept(stream)
    for place, values in enumerate(x):
        wide = values.double()[None]
        sums.put("stream sum", len(x), place, sums.by_prompt(wide))
        sums.put("stream square", len(x), place, sums.by_prompt(wide.square().sum(-1)))
        if place:
            update = (values - x[place - 1]).double()[None]
            sums.put("update square", len(x) - 1, place - 1, sums.by_prompt(update.square().sum(-1)))


def record_entry_updates(
    units: Units,
    together: Together,
    stream: Float[Tensor, "place batch pos d_model"],
    norms: str,
    sums: Sums,
    starts: range | None = None,
) -> Iterator[tuple[int, slice, list[Stream], Float[Tensor, "start token d_model"]]]:
    """Record what R and O need of every window, and yield ``p_l`` on the way: unit, starts, streams, kept tokens.

    ``starts`` are consecutive starts of windows, by default all. ``norms``, ``frozen`` or ``live``, says how they run.
    """
    x, among = sums.x, range(len(units)) if starts is None else starts
    parallel = torch.zeros_like(x[:-1])
    for layer in range(len(units)):
        for some in sums.spans.starts(layer, among, together.group):
            written = together.run(partial(units.update, layer), list(stream[some]))
            entry_update = sums.kept(torch.stack(written))
            parallel[some] += entry_update
            serial = x[layer + 1] - x[some.start + 1 : some.stop + 1]
            sums.vectors(norms, layer, some, entry_update)
            sums.squares(f"{norms} effect", layer, some, x[layer + 1] - x[layer] - entry_update)
            sums.squares(f"{norms} serial", layer, some, serial)
            sums.squares(f"{norms} parallel", layer, some, parallel[some])
            sums.squares(f"{norms} error", layer, some, serial - parallel[some])
            yield layer, some, written, entry_update


@dataclass(frozen=True)
class Turns:
    """Random rotations of what windows write, one a prompt: the null of a reader that prefers no direction.

    What varies over the ensemble is turned, and the mean is left alone, so that all directions are met at the same
    working point: ``m + Q (w - m)``. A uniformly random rotation with random signs before it is another one, so every
    prompt has signs of its own, drawn by its number and not by its batch.
    """

    mean: Float[Tensor, "place d_model"]  # of the stream
    rotation: Float[Tensor, "d_model d_model"]
    signs: Float[Tensor, "prompt d_model"]  # or, of a batch, those of the prompt of every token

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
        """Return those of the tokens that ``mask`` keeps, of the prompts from number ``first`` on."""
        return replace(self, signs=self.signs[first + mask.nonzero()[:, 0]])

    def __call__(
        self, written: Float[Tensor, "start token d_model"], starts: slice, read: int
    ) -> Float[Tensor, "start token d_model"]:
        """Turn what was written between each of ``starts`` and the place ``read``."""
        mean = rearrange(self.mean[read] - self.mean[starts], "start d_model -> start 1 d_model")
        return mean + ((written - mean) * self.signs) @ self.rotation.T


def record_turned(
    units: Units,
    together: Together,
    stream: Float[Tensor, "place batch pos d_model"],
    layer: int,
    starts: slice,
    entry_update: Float[Tensor, "start token d_model"],
    turn: Turns,
    sums: Sums,
) -> None:
    """Record what windows wrote before a layer, and what the layer writes if that is turned.

    To be called with frozen norms. Cost: 1/L F a window.
    """
    read = units.reads[layer]
    written = sums.x[read] - sums.x[starts]
    sums.squares("written", layer, starts, written)
    turned = turn(written, starts, read)
    record_exchanged("rotated", units, together, stream, layer, starts, entry_update, turned, sums)


def record_exchanged(
    name: str,
    units: Units,
    together: Together,
    stream: Float[Tensor, "place batch pos d_model"],
    layer: int,
    starts: slice,
    entry_update: Float[Tensor, "start token d_model"],
    written: Float[Tensor, "start token d_model"],
    sums: Sums,
) -> None:
    """Record what a layer writes if windows had ``written`` something else before it. Cost: 1/L F a window."""
    entries = sums.placed(sums.x[starts] + written, stream[units.reads[layer]])
    other = sums.kept(torch.stack(together.run(partial(units.update, layer), list(entries))))
    sums.vectors(name, layer, starts, other)
    sums.squares(f"{name} effect", layer, starts, other - entry_update)


class Reading:
    """The measures of all windows from one start, under every row of ``draws``: tensors [layer, resample].

    ``layer`` counts the units of a window, layers or sublayers; ``reads`` says where in the stream each of them reads.
    """

    def __init__(
        self,
        sums: Mapping[str, Float[Tensor, "place prompt ..."]],
        spans: Spans,
        draws: Float[Tensor, "resample prompt"],
        reads: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.sums, self.spans, self.draws, self.reads, self.dtype = sums, spans, draws, reads, dtype
        if not all(sums[f"stream {kind}"].isfinite().all() for kind in ("sum", "square")):
            raise ValueError(f"the stream is not finite on these prompts: its numbers overflow {dtype}")
        self.count = draws @ sums["count"][0]
        batches = torch.repeat_interleave(torch.arange(sums["batch"].numel()), sums["batch"][0])
        of_batches = draws.new_zeros(len(draws), sums["batch"].numel())
        self.shares = of_batches.index_add(1, batches, draws * sums["count"]) / self.count.unsqueeze(1)
        self.x = [self._mean(total) for total in sums["stream sum"]]
        squares = (name for name in sums if name.endswith(" square"))
        self.squares = {name: (sums[name] @ draws.T) / self.count for name in squares}
        self._start = -1
        self._means: dict[tuple[str, int], Tensor] = {}  # of the windows from one start

    def _mean(self, total: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "resample d_model"]:
        return (self.draws @ total.double()) / self.count.unsqueeze(1)

    def mean(self, name: str, start: int, layer: int) -> Float[Tensor, "resample d_model"]:
        """Return the mean of a window's vectors."""
        if start != self._start:
            self._start, self._means = start, {}
        if (name, layer) not in self._means:
            row = self.spans.row[start, layer]
            about = self.shares @ self.sums[f"{name} base"][row]
            self._means[name, layer] = about + self._mean(self.sums[f"{name} sum"][row])
        return self._means[name, layer]

    def norm(self, mean: Float[Tensor, "resample d_model"], name: str, place: int) -> Resampled:
        """Return ``n(c(.))`` of the vectors whose squares are under ``name`` and whose mean is ``mean``."""
        return (self.squares[f"{name} square"][place] - mean.square().sum(-1)).clamp(min=0).sqrt()

    def size(self, name: str, place: int) -> Resampled:
        """Return ``n(.)``, not centred, of the vectors whose squares are under ``name``."""
        return self.squares[f"{name} square"][place].sqrt()

    def measures(self, start: int, layers: range, damage: bool) -> dict[str, Float[Tensor, "layer resample"]]:
        """Return every measure of ``surgery.series.window`` for the windows that end with each of ``layers``.

        With ``damage``, that in each of ``FORMS``: NaN where it was not measured.
        """
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
            rows, count = [self.spans.row[start, layer] for layer in layers], self.draws @ self.sums["predictions"][0]
            for kind, form in itertools.product(("loss", "kl"), FORMS):
                nats = self.sums.get(
                    f"{kind} {form}", torch.full((len(self.spans.pairs), len(self.draws.T)), torch.nan)
                )
                measures[f"{kind}_parallel_{form}"] = nats[rows].double() @ self.draws.T / count
        return measures

    def seriesness(self, start: int, layers: range) -> Float[Tensor, "layer resample"]:
        """Return S of the windows that end with each of ``layers``."""
        weight, entry_read, output = self.dependence("frozen", start, layers)
        return (running_mean(entry_read, weight) + output) / 2

    def dependence(self, norms: str, start: int, layers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``w_l`` and ``R_l`` of every layer, and O of the window that ends with it."""
        x, weight, entry_read, output = self.x, [], [], []
        parallel = torch.zeros_like(x[0])
        for layer in layers:
            row, update, serial = self.spans.row[start, layer], x[layer + 1] - x[layer], x[layer + 1] - x[start + 1]
            entry_update = self.mean(norms, start, layer)
            parallel = parallel + entry_update
            n_update, n_entry = self.norm(update, "update", layer), self.norm(entry_update, norms, row)
            n_serial = self.norm(serial, f"{norms} serial", row)
            n_parallel = self.norm(parallel, f"{norms} parallel", row)
            entry_read.append(self.norm(update - entry_update, f"{norms} effect", row) / (n_update + n_entry))
            output.append(self.norm(serial - parallel, f"{norms} error", row) / (n_serial + n_parallel))
            # A layer is dead if its writes vary less than the rounding of the stream, or less than the moments tell:
            # the sums of an update are exact, but its squares are of a rounded difference.
            eps = torch.finfo(self.dtype).eps
            rounding = eps * self.size("stream", layer + 1) + eps**0.5 * self.size("update", layer)
            rounding = rounding + 1e-7 * self.size(norms, row)
            energy = n_update**2 + n_entry**2
            weight.append(torch.where(energy <= rounding**2, 0, energy))  # what is not finite stays so
        weights = torch.stack(weight)
        return weights, torch.stack(entry_read), torch.where(weights.cumsum(0) > 0, torch.stack(output), torch.nan)

    def displacement(self, start: int, layers: range) -> Float[Tensor, "layer resample"]:
        """Return ``N_l`` of every layer."""
        x, nulls = self.x, []
        size = {place: self.norm(x[place], "stream", place) for place in (start, *map(self.reads.__getitem__, layers))}
        for layer in layers:
            read, row = self.reads[layer], self.spans.row[start, layer]
            nulls.append(self.norm(x[read] - x[start], "written", row) / (size[read] + size[start]))
        return torch.stack(nulls)

    def preference(
        self, start: int, layers: range, weight: Float[Tensor, "layer resample"]
    ) -> Float[Tensor, "layer resample"]:
        """Return how much larger the effect of what the window wrote is than that of the same turned."""
        own, turned = [], []
        for layer in layers:
            row, entry_update = self.spans.row[start, layer], self.mean("frozen", start, layer)
            update, rotated = self.x[layer + 1] - self.x[layer], self.mean("rotated", start, layer)
            own.append(self.norm(update - entry_update, "frozen effect", row) ** 2)
            turned.append(self.norm(rotated - entry_update, "rotated effect", row) ** 2)
        dead = weight == 0  # only rounding
        sums = (torch.where(dead, 0, torch.stack(squares)).cumsum(0) for squares in (own, turned))
        return ratio(*sums).sqrt()

    def exchanged(self, how: str, start: int, layers: range) -> Float[Tensor, "layer resample"]:
        """Return ``R_l`` of every layer with what the window wrote before it ``rotated`` or ``shuffled``."""
        nulls = []
        for layer in layers:
            row = self.spans.row[start, layer]
            entry_update, other = self.mean("frozen", start, layer), self.mean(how, start, layer)
            scale = self.norm(other, how, row) + self.norm(entry_update, "frozen", row)
            nulls.append(self.norm(other - entry_update, f"{how} effect", row) / scale)
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
