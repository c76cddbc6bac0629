r"""Are the ends of a model wired more in parallel than its middle? One number, its interval, and a verdict.

Given the two boundaries of input part, middle and output part, and S of every window of ``length`` layers
(``surgery.series``, denominators frozen),

    D = (S(input) + S(output)) / 2 - S(middle),

each the mean over the windows that lie wholly in the part. Below 0 the ends are more parallel, above 0 the middle is;
nobody knows beforehand, so the test is two-sided. Windows are of equal length, as S grows with it, and start from layer
1 (``first_layer``), as where embeddings are small every window from layer 0 reads 1. In windows of two layers O = R, so
that S is one number, not two that agree. Beside D stand

* ``D_in``, ``D_out``: the first and the last end against the middle, each by itself: their mean hides that they
  disagree;
* ``D_over_rotated``, D of R/R_rotated: S grows with the size of the updates, whoever reads them; the rotation null
  (``surgery.series``) grows with them too;
* ``p_windows``, ``p_rotated``: S, and R/R_rotated, permuted over the windows' places. How often would windows
  regrouped at random differ as much, either way? Intervals over prompts do not know that layers differ for no reason
  of depth; this does. Windows of neighbouring layers overlap and resemble each other, so p is rather too small than
  too large.

The intervals are hierarchical: every resample draws prompts anew and, where ``boundaries`` holds several, one of the
placements of the boundaries, so that it knows how unsure these are. Prompts that placed the boundaries must not be
those tested. A part that holds no window makes D undefined (NaN).

``verdict``: ``supported`` if the intervals of D_in, D_out and D_over_rotated all lie below 0, D and D_over_rotated are
``LEAST`` away from it, both p < .05, and no token decides a variance alone (``surgery.instruments.massive``);
``contradicted`` if all lie above; else ``undecided``
(``surgery.anatomy.say.verdict`` says why). As all conditions have to hold, none is corrected for the others. What it
says of networks that are known is in ``docs/validity.md``. D is our definition.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> network = Stack(known_networks.serial_network(n_layers=9))
>>> verdict(ends(measure(network, known_networks.tokens(12), sampling=Sampling(resamples=20)), [(3, 6)]))
'undecided'
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.instruments import massive
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.together import Together
from surgery.instruments.windows import (
    Reading,
    Spans,
    Sums,
    Turns,
    Units,
    merged,
    record_entry_updates,
    record_stream,
    record_turned,
    running_mean,
)
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import columns, described, ratio, weights
from surgery.stats.sampling import Sampling

PERMUTATIONS = 2000
SURE = 0.05  # p over windows below which the ends are taken to differ from the middle
LEAST = 0.05  # a smaller difference is not told: R/R_rotated of random networks differs as much
_MEASURES = {
    "S_in": "mean S of the windows in the input part",
    "S_middle": "mean S of the windows in the middle",
    "S_out": "mean S of the windows in the output part",
    "D": "mean S of both ends minus S of the middle: below 0 the ends are more parallel",
    "D_in": "S of the input part, the first end, minus S of the middle",
    "D_out": "S of the output part, the last end, minus S of the middle",
    "D_over_rotated": "D of R / R_rotated, the rotation null, which grows with the size of the updates as R does",
}
COLUMNS = {
    "kind": "which prompts",
    "boundary_in": "first layer of the middle, most often",
    "boundary_out": "first layer of the output part, most often",
    "length": "layers in a window",
    "n_prompts": "number of prompts tested, the unit of resampling",
    "p_windows": "two-sided p of D with S permuted over the windows' places",
    "p_rotated": "the same of D_over_rotated",
    "verdict": "are the ends more parallel than the middle: supported, contradicted or undecided",
}
COLUMNS |= described(_MEASURES, over="prompts and boundaries") | massive.COLUMNS


@dataclass(frozen=True)
class Profile:
    """S and R/R_rotated of all windows of one length, by start, under every resample (row 0 is the estimate)."""

    S: Float[Tensor, "resample window"]
    R_over_rotated: Float[Tensor, "resample window"]
    length: int
    n_prompts: int
    held: Mapping[
        str, int | float
    ]  # ``surgery.instruments.massive.COLUMNS``, over all streams and updates but layer 0's

    @property
    def n_layers(self) -> int:
        return self.S.shape[1] + self.length - 1


@in_smaller_batches
def measure(stack: Stack, tokens: Tokens | Tensor, length: int = 2, *, sampling: Sampling = Sampling()) -> Profile:
    """Measure S and R/R_rotated of every window of ``length`` layers, under the resamples of ``series.windows``.

    Cost of W windows in L layers: 3 + 2 W (length - 1) / L F, and what it costs to find massive tokens. Memory: one
    batch's stream, and two vectors per prompt and update.

    Raises ValueError for a length below 2, windows that do not fit into the model, and a stream that is not finite.
    """
    if not 2 <= length <= stack.n_layers:
        raise ValueError(f"windows have 2 to {stack.n_layers} layers in {stack.name}, got length={length}")
    ensemble, units, parts = Ensemble.of(stack, tokens, sampling), Units.of(stack, "layer"), []
    starts, turns, first = range(len(units) - length + 1), Turns.of(units, ensemble), 0
    spans = Spans.of(len(units), length, starts[-1])
    for _, context, mask in ensemble.batches(stack, "ends and middle"):
        together, stream = Together(stack, context), units.stream(context)
        sums, turn = Sums(mask, spans, stack.dtype), turns.batch(first, mask)
        record_stream(stream, sums)
        with stack.frozen(context):
            for layer, some, _, alone in record_entry_updates(units, together, stream, "frozen", sums):
                record_turned(units, together, stream, layer, some, alone, turn, sums)
        parts.append(sums.tensors)
        first += len(mask)
    n_prompts = len(ensemble.tokens)
    draws = weights(n_prompts, sampling.resamples, sampling.seed)
    reading = Reading(merged(parts), spans, draws, units.reads, stack.dtype)
    S, R_over_rotated = [], []
    for start in starts:
        layers = units.after(start, length)
        weight, entry_read, output = reading.dependence("frozen", start, layers)
        R, R_rotated = (
            running_mean(values, weight)[-1] for values in (entry_read, reading.exchanged("rotated", start, layers))
        )
        S.append((R + output[-1]) / 2)
        R_over_rotated.append(ratio(R, R_rotated))
    inner = range(1, stack.n_layers)
    held = ensemble.columns(inner, inner)
    return Profile(torch.stack(S, 1), torch.stack(R_over_rotated, 1), length, n_prompts, held)


def ends(
    profile: Profile,
    boundaries: Sequence[tuple[int, int]] | np.ndarray,
    *,
    first_layer: int = 1,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> pd.Series:
    """Return D, its parts, its interval and p for boundaries ``(in, out)``: the first pair is the estimate, the rest
    are its resamples.

    A single pair is taken as certain. Keys: ``COLUMNS`` but ``kind`` and ``verdict``. No forward pass.

    Raises ValueError for boundaries that leave no layer on either side or between them.
    """
    places = np.asarray(boundaries, dtype=int).reshape(-1, 2)
    if not ((places[:, 0] > 0) & (places[:, 0] < places[:, 1]) & (places[:, 1] < profile.n_layers)).all():
        raise ValueError(
            f"boundaries are pairs 0 < in < out < {profile.n_layers}, got {places.tolist()[0]}; a part needs a layer"
        )
    parts = _parts(profile, places, first_layer)
    S_in, S_middle, S_out = (_mean(profile.S, part) for part in parts)
    ratio_in, ratio_middle, ratio_out = (_mean(profile.R_over_rotated, part) for part in parts)
    measures = {
        "S_in": S_in,
        "S_middle": S_middle,
        "S_out": S_out,
        "D": (S_in + S_out) / 2 - S_middle,
        "D_in": S_in - S_middle,
        "D_out": S_out - S_middle,
        "D_over_rotated": (ratio_in + ratio_out) / 2 - ratio_middle,
    }
    row: dict[str, float] = {
        "boundary_in": int(places[0, 0]),
        "boundary_out": int(places[0, 1]),
        "length": profile.length,
        "n_prompts": profile.n_prompts,
    }
    for name, values in measures.items():
        row |= columns(name, values)
    counted = [part[0, first_layer:] for part in parts]
    for name, values in (("p_windows", profile.S), ("p_rotated", profile.R_over_rotated)):
        row[name] = _p_windows(values[0, first_layer:], counted, permutations, seed)
    return pd.Series({**row, **profile.held}, dtype=object)


def verdict(contrast: pd.Series) -> str:
    """Return ``supported``, ``contradicted`` or ``undecided``: are the ends more parallel than the middle?

    ``contrast`` is what ``ends`` returns, or a row of a table of these.
    """
    if massive.decided_by_one(contrast["token_share"], contrast["n_tokens"]):
        return "undecided"
    sure = contrast["p_windows"] < SURE and contrast["p_rotated"] < SURE  # NaN, where a part holds no window, is not
    if sure and min(abs(contrast["D"]), abs(contrast["D_over_rotated"])) >= LEAST:
        if all(contrast[f"{name}_high"] < 0 for name in ("D_in", "D_out", "D_over_rotated")):
            return "supported"
        if all(contrast[f"{name}_low"] > 0 for name in ("D_in", "D_out", "D_over_rotated")):
            return "contradicted"
    return "undecided"


def difference(
    kind: Profile, other: Profile, boundaries: Sequence[tuple[int, int]] | np.ndarray, first_layer: int = 1
) -> dict[str, float]:
    """Return D on one kind of prompts minus D on another, with its interval and two-sided p, of the bootstrap.

    Does D depend on what is asked?
    """
    places = np.asarray(boundaries, dtype=int).reshape(-1, 2)
    values = []
    for profile in (kind, other):
        first, middle, last = (_mean(profile.S, part) for part in _parts(profile, places, first_layer))
        values.append((first + last) / 2 - middle)
    change = values[0] - values[1]
    rest = change[1:][change[1:].isfinite()]
    smaller = 1 + min(int((rest <= 0).sum()), int((rest >= 0).sum()))
    p = min(1.0, 2 * smaller / (len(rest) + 1)) if len(rest) else float("nan")
    return columns("D", change) | {"p": p}


def _parts(profile: Profile, places: np.ndarray, first_layer: int) -> list[Tensor]:
    """Return which windows lie wholly in the input part, the middle and the output part, in every resample of both."""
    later = places[1:] if len(places) > 1 else places
    chosen = np.concatenate([places[:1], later[np.arange(len(profile.S) - 1) % len(later)]])
    starts = np.arange(profile.S.shape[1])
    stops, counted = starts + profile.length, starts >= first_layer
    first, second = chosen[:, :1], chosen[:, 1:]
    inside = (stops <= first, (starts >= first) & (stops <= second), starts >= second)
    return [torch.from_numpy(counted & part) for part in inside]


def _mean(values: Float[Tensor, "resample window"], part: Tensor) -> Float[Tensor, " resample"]:
    return ratio(values.where(part, 0).sum(1), part.sum(1).to(values))


def _p_windows(S: Float[Tensor, " window"], parts: Sequence[Tensor], permutations: int, seed: int) -> float:
    if not all(part.any() for part in parts):
        return float("nan")
    signs = torch.stack([part / part.sum() for part in parts]).to(S)
    contrast = (signs[0] + signs[2]) / 2 - signs[1]
    generator = np.random.default_rng((seed, 6))
    order = np.argsort(generator.random((permutations, len(S))), axis=1)
    null = (S[torch.from_numpy(order)] * contrast).sum(1).abs()
    return float((1 + (null >= (S * contrast).sum().abs() - 1e-9).sum()) / (permutations + 1))
