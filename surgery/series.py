r"""How serial is a window of layers: does a layer read what those before it wrote, or what was there before them all?

Take a window ``[a, b)`` of layers. Let ``x_l`` be the stream that enters layer ``l``, ``u_l = f_l(x_l)`` its update in
the clean run, and ``p_l = f_l(x_a)`` its update on the window's entry, at all positions: what it would have written had
the window's layers run side by side. Expectations run over the ensemble, every real token of every prompt but each
prompt's first; ``c(a) = a - E a`` and ``n(a) = sqrt(E |a|^2)``.

    R_l = n(c(u_l - p_l)) / (n(c(u_l)) + n(c(p_l)))          R = sum_{l>a} w_l R_l / sum_{l>a} w_l
    w_l = n(c(u_l))^2 + n(c(p_l))^2
    O   = n(c(U - P)) / (n(c(U)) + n(c(P)))                  U = sum_{l>a} u_l,   P = sum_{l>a} p_l
    S   = (R + O) / 2

All lie in [0, 1] by the triangle inequality. They are 0 if no layer of the window reads what another wrote, and 1 if
every layer reads nothing but the one before. What they have to be compared with stands in the same row:

* ``R_live``, ``O_live``, ``S_live`` and ``layernorm_share = S_live - S``. R, O and S keep the normalisation
  denominators of the clean run. Live, the denominators move with all that a window writes, and that alone reads as
  dependence; but a live norm also rescales a small entry to full size and hides growth, so the share may be negative.
* ``N``, the displacement null, ``N_l = n(c(x_l - x_a)) / (n(c(x_l)) + n(c(x_a)))`` averaged with the weights of R. A
  linear layer that treats all directions alike has R = N. R/N > 1: it responds to what the window wrote more than to
  another displacement of that size; R/N < 1: it prefers what was there before. R grows with the length of a window and
  with the size of its updates, so compare windows of equal length, and R/N rather than R. From layer 0 of a model with
  small embeddings both are near 1 whatever the layers do.
* ``R_shuffled``, the content null: the window's writes ``x_l - x_a`` are replaced by those that another prompt's token
  at the same position received, ``q_l = f_l(x_a + shuffled)``, and ``n(c(q_l - p_l)) / (n(c(q_l)) + n(c(p_l)))`` is
  averaged as R is. R above it: the layer answers to what was written for this very token. R equal to it: anybody's
  writes would have done, which does not speak against series (in the serial network both are 1).
* ``loss_parallel_*`` and ``kl_parallel_*``, the damage: the window really runs in parallel (norms live), the rest of
  the model follows; change of the next-token cross entropy, and KL(clean || rewired), in nats per token. ``sum`` adds
  the updates, ``x_a + sum p_l``. ``mean`` averages the outputs (Sun et al. 2024, arXiv 2407.09298): a step of 1/length,
  so its damage is no evidence against parallelism. A change of loss may be negative, the divergence may not.

S is about dependence between whole layers: attention feeding the MLP of its own layer stays inside one. It says nothing
of usefulness; for that read it beside the damage. ``_low`` and ``_high`` are 95 % percentile intervals over resampled
prompts, the measures of a row from the same resamples. Compare with ``surgery.calibration`` and with the architecture
untrained. R, O, S and N are our definitions; running layers in parallel is Sun et al.'s.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Bool, Float, Int
from rich.progress import Progress
from torch import Tensor

from surgery.ensemble import exchanged, partners
from surgery.stack import Context, Stack
from surgery.stats import RESAMPLES, Moments, columns, weights
from surgery.tokens import Tokens

Stream = Float[Tensor, "batch pos d_model"]
Resampled = Float[Tensor, " resample"]

_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32: the readout of a batch at a large vocabulary would be gigabytes


def windows(
    stack: Stack,
    tokens: Tokens | Tensor,
    max_length: int | None = None,
    *,
    skip_first: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
    batch_size: int = 64,
    damage: bool = True,
    progress: bool = False,
) -> pandas.DataFrame:
    """R, O, S, their nulls and the damage of running it parallel, for every window of 2 to ``max_length`` layers.

    None means windows of any length. Columns: ``start``, ``stop`` (half-open), ``n_prompts``; then, each followed by
    its ``_low`` and ``_high``, ``R``, ``O``, ``S``, ``R_live``, ``O_live``, ``S_live``, ``layernorm_share``, ``N``,
    ``R_over_N``, ``R_shuffled`` and, with ``damage``, ``loss_parallel_sum``, ``loss_parallel_mean``,
    ``kl_parallel_sum``, ``kl_parallel_mean``; see the module. A window whose layers write nothing that varies is
    undefined (NaN); so are the intervals and ``R_shuffled`` of a single prompt. Writes are shuffled within even
    batches of at most ``batch_size`` prompts (but three); no other column depends on it.

    Cost of W windows in a model of L layers: 2 + 3 W/L F; with ``damage`` 2/L sum (L - stop) F and 2 W + L - 1 readouts
    more. For all windows that is (3 L + 1)/2 F and (L - 1)(L - 2)/3 F: 55 F at 12 layers. Memory: three
    times the stream of one batch, and 3 W d_model numbers a prompt.

    Raises ValueError for ``max_length`` below 2, a model of one layer, prompts without two tokens to compare, and a
    stream that is not finite.

    >>> from surgery import Stack, calibration
    >>> frame = windows(Stack(calibration.parallel_network()), calibration.tokens(), max_length=2)
    >>> bool((frame.S < 1e-6).all() and (frame.N > 0.1).all())
    True
    """
    tokens = Tokens.of(tokens).to(stack.device)
    longest = stack.n_layers if max_length is None else max_length
    _check(stack, tokens, longest, skip_first, batch_size)
    starts = range(stack.n_layers - 1)
    sums, generator = _Sums(), np.random.default_rng((seed, 1))
    batches = list(tokens.batches(max(batch_size, 3)))  # in less, a prompt could have no other to exchange with
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("windows", total=2 * len(starts) * len(batches))
        for batch in batches:
            context = stack.context(batch)
            stream = stack.stream(context)
            sums.open(batch.ensemble(skip_first))
            sums.add((batch.mask[:, :-1] & batch.mask[:, 1:]).sum(1), "predictions")
            _read_stream(stream, sums)
            partner = partners(batch.mask, generator)
            with stack.frozen(context):
                for start in starts:
                    for layer, alone in _alone(stack, context, stream, start, longest, "frozen", sums):
                        written = stream[layer] - stream[start]
                        entry = stream[start] + exchanged(written, batch.mask, partner)
                        shuffled = stack.update(layer, entry, context)
                        sums.vector(shuffled, "shuffled", start, layer)
                        sums.square(shuffled - alone, "shuffled effect", start, layer)
                        sums.square(written, "written", start, layer)
                    bar.advance(task)
            for start in starts:
                updates = _alone(stack, context, stream, start, longest, "live", sums)
                if damage:
                    _run_parallel(stack, context, stream, start, updates, sums)
                else:
                    list(updates)
                bar.advance(task)
    draws = weights(len(tokens), resamples if len(tokens) > 1 else 0, seed)
    reading, rows = _Reading(stack, sums, draws), []
    for start in starts:
        layers = _layers(stack.n_layers, start, longest)
        measures = reading.measures(start, layers, damage)
        for i, layer in enumerate(layers):
            row: dict[str, float] = {"start": start, "stop": layer + 1, "n_prompts": len(tokens)}
            for name, values in measures.items():
                row |= columns(name, values[i])
            rows.append(row)
    return pandas.DataFrame(rows)


def summary(
    frame: pandas.DataFrame, n_layers: int, length: int | None = None, first_layer: int = 1
) -> pandas.DataFrame:
    """One row per third of the model: the mean of every measure over the windows of one length that lie wholly in it.

    ``length``, unless given, is the longest that fits into every third that fits any. Windows before ``first_layer``
    are left out: where embeddings are small, every window from layer 0 reads R = N = 1. Columns: ``third``, ``length``,
    ``n_windows``, the measures with intervals, and ``S_min``, ``S_max`` over the windows. A third without such a window
    has ``n_windows = 0`` and NaN.

    The ends of the windows' intervals are averaged as the estimates are: right if the windows move together from
    resample to resample (they share prompts and layers), too wide if they do not.

    >>> from surgery import Stack, calibration
    >>> frame = windows(Stack(calibration.serial_network(n_layers=9)), calibration.tokens(), max_length=3, damage=False)
    >>> summary(frame, n_layers=9)[["third", "length", "n_windows"]].values.tolist()
    [['first', 2, 1], ['middle', 2, 2], ['last', 2, 2]]
    """
    edges = [round(third * n_layers / 3) for third in range(4)]
    lengths = frame["stop"] - frame["start"]
    thirds = {
        name: (frame["start"] >= max(start, first_layer)) & (frame["stop"] <= stop)
        for name, start, stop in zip(("first", "middle", "last"), edges[:-1], edges[1:], strict=True)
    }
    if length is None:
        length = min((int(lengths[inside].max()) for inside in thirds.values() if inside.any()), default=2)
    measures = [name for name in frame.columns if name not in ("start", "stop", "n_prompts")]
    rows = []
    for name, inside in thirds.items():
        chosen = frame[inside & (lengths == length)]
        row: dict[Hashable, Any] = {"third": name, "length": length, "n_windows": len(chosen)}
        row |= chosen[measures].mean().to_dict()
        rows.append(row | {"S_min": chosen["S"].min(), "S_max": chosen["S"].max()})
    return pandas.DataFrame(rows)


class _Sums:
    """Per-prompt sums over the ensemble, by name: all that is kept of a batch's activations.

    The vector sums of x_l, p_l and q_l give those of all updates and differences; squares do not add up: each is
    kept.
    """

    def __init__(self) -> None:
        self.squares: defaultdict[tuple, list[Tensor]] = defaultdict(list)
        self.vectors: defaultdict[tuple, list[Tensor]] = defaultdict(list)

    def open(self, keep: Bool[Tensor, "batch pos"]) -> None:
        """The ensemble of the next batch."""
        self.dropped = ~keep.unsqueeze(-1)
        self.add(keep.sum(1), "count")

    def add(self, per_prompt: Float[Tensor, " batch"] | Int[Tensor, " batch"], *key: Any) -> None:
        self.squares[key].append(per_prompt.double().cpu())

    def square(self, values: Stream, *key: Any) -> None:
        kept = values.masked_fill(self.dropped, 0)
        self.add(torch.linalg.vector_norm(kept, dim=(1, 2), dtype=torch.float64) ** 2, *key)

    def vector(self, values: Stream, *key: Any) -> None:
        self.square(values, *key)
        self.vectors[key].append(values.masked_fill(self.dropped, 0).sum(1, dtype=torch.float64).cpu())

    def __getitem__(self, key: tuple) -> Float[Tensor, " prompt"]:
        return torch.cat(self.squares[key])

    def total(self, *key: Any) -> Float[Tensor, "prompt d_model"]:
        return torch.cat(self.vectors[key])


def _read_stream(stream: Float[Tensor, "layer_plus_1 batch pos d_model"], sums: _Sums) -> None:
    for layer, x in enumerate(stream):
        sums.vector(x, "stream", layer)
    for layer in range(len(stream) - 1):
        sums.square(stream[layer + 1] - stream[layer], "update", layer)


def _layers(n_layers: int, start: int, longest: int) -> range:
    return range(start + 1, min(start + longest, n_layers))


def _alone(
    stack: Stack, context: Context, stream: Tensor, start: int, longest: int, norm: str, sums: _Sums
) -> Iterator[tuple[int, Stream]]:
    """``p_l`` of every layer after ``start``, booked for R and O on the way."""
    together = torch.zeros_like(stream[start])
    for layer in _layers(stack.n_layers, start, longest):
        alone = stack.update(layer, stream[start], context)
        together = together + alone
        serial = stream[layer + 1] - stream[start + 1]
        sums.vector(alone, norm, start, layer)
        sums.square(stream[layer + 1] - stream[layer] - alone, norm, "effect", start, layer)
        sums.square(serial, norm, "serial", start, layer)
        sums.square(together, norm, "together", start, layer)
        sums.square(serial - together, norm, "error", start, layer)
        yield layer, alone


def _run_parallel(
    stack: Stack, context: Context, stream: Tensor, start: int, updates: Iterator[tuple[int, Stream]], sums: _Sums
) -> None:
    """Continue the model behind every window from ``start``, its layers run in parallel; book the damage."""
    tokens = context.tokens
    predicting = tokens.mask[:, :-1] & tokens.mask[:, 1:]
    prompts = predicting.nonzero()[:, 0]
    finals: dict[tuple, Float[Tensor, "prediction d_model"]] = {}
    together = stream[start + 1] - stream[start]
    for layer, alone in updates:
        stop, together = layer + 1, together + alone
        for form, step in (("sum", together), ("mean", together / (layer + 1 - start))):
            x = stream[start] + step
            if stop < stack.n_layers:
                x = stack.execute(f"{stop}:", x, context)
            finals[form, start, stop] = x[:, :-1][predicting]
    losses = _losses(stack, stream[-1][:, :-1][predicting], finals, tokens.ids[:, 1:][predicting])
    zero = torch.zeros(len(tokens), dtype=torch.float64, device=prompts.device)
    for key, values in losses.items():
        sums.add(zero.index_add(0, prompts, values.double()), *key)


def _losses(
    stack: Stack,
    clean: Float[Tensor, "prediction d_model"],
    finals: dict[tuple, Float[Tensor, "prediction d_model"]],
    targets: Int[Tensor, " prediction"],
) -> dict[tuple, Float[Tensor, " prediction"]]:
    """Change of the loss of every prediction, and KL(clean || rewired), for each of the final streams."""
    parts: defaultdict[tuple, list[Tensor]] = defaultdict(list)
    rows = max(1, _LOGITS_AT_ONCE // stack.d_vocab)
    for some in torch.arange(len(targets), device=targets.device).split(rows):
        before = _log_probabilities(stack, clean[some])
        for key, final in finals.items():
            after = _log_probabilities(stack, final[some])
            gain = before - after
            parts[("loss", *key)].append(gain.gather(1, targets[some].unsqueeze(1)).squeeze(1))
            parts[("kl", *key)].append((before.exp() * gain).sum(1))
    return {key: torch.cat(values) for key, values in parts.items()}


def _log_probabilities(stack: Stack, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    logits = stack.readout(x)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


class _Reading:
    """The measures of all windows from one start, under every row of ``draws``: tensors [layer, resample]."""

    def __init__(self, stack: Stack, sums: _Sums, draws: Float[Tensor, "resample prompt"]) -> None:
        self.stack, self.sums, self.draws = stack, sums, draws
        self.x = [sums.total("stream", layer) for layer in range(stack.n_layers + 1)]
        if not all(total.isfinite().all() for total in self.x):
            raise ValueError(
                f"the stream of {stack.name} is not finite on these prompts: its numbers overflow {stack.dtype}"
            )

    def norm(self, total: Float[Tensor, "prompt d_model"], *key: Any) -> Resampled:
        """``n(c(.))`` of the vectors whose squares are under ``key`` and whose sums are ``total``."""
        return Moments(self.sums["count",], total, total, self.sums[key]).norm(self.draws)

    def size(self, *key: Any) -> Resampled:
        """``n(.)``, not centred."""
        return (self.draws @ self.sums[key] / (self.draws @ self.sums["count",])).sqrt()

    def measures(self, start: int, layers: range, damage: bool) -> dict[str, Float[Tensor, "layer resample"]]:
        weight, entry_read, output = self.dependence("frozen", start, layers)
        weight_live, entry_read_live, output_live = self.dependence("live", start, layers)
        displacement, shuffled = self.nulls(start, layers)
        found = {"R": _average(entry_read, weight), "O": output}
        found["S"] = (found["R"] + found["O"]) / 2
        found |= {"R_live": _average(entry_read_live, weight_live), "O_live": output_live}
        found["S_live"] = (found["R_live"] + found["O_live"]) / 2
        found["layernorm_share"] = found["S_live"] - found["S"]
        found["N"] = _average(displacement, weight)
        found["R_over_N"] = found["R"] / found["N"]
        found["R_shuffled"] = (
            _average(shuffled, weight) if self.draws.shape[1] > 1 else torch.full_like(output, torch.nan)
        )
        if damage:
            count = self.draws @ self.sums["predictions",]
            for kind, form in itertools.product(("loss", "kl"), ("sum", "mean")):
                nats = [self.draws @ self.sums[kind, form, start, layer + 1] / count for layer in layers]
                found[f"{kind}_parallel_{form}"] = torch.stack(nats)
        return found

    def dependence(self, norms: str, start: int, layers: range) -> tuple[Tensor, Tensor, Tensor]:
        """``w_l`` and ``R_l`` of every layer, and O of the window that ends with it."""
        x, weight, entry_read, output = self.x, [], [], []
        together = torch.zeros_like(x[0])
        for layer in layers:
            update, serial = x[layer + 1] - x[layer], x[layer + 1] - x[start + 1]
            alone = self.sums.total(norms, start, layer)
            together = together + alone
            n_update, n_alone = self.norm(update, "update", layer), self.norm(alone, norms, start, layer)
            n_serial = self.norm(serial, norms, "serial", start, layer)
            n_together = self.norm(together, norms, "together", start, layer)
            entry_read.append(self.norm(update - alone, norms, "effect", start, layer) / (n_update + n_alone))
            output.append(self.norm(serial - together, norms, "error", start, layer) / (n_serial + n_together))
            # Dead is a layer whose writes vary less than the stream they are added to, or the moments, are rounded.
            rounding = torch.finfo(self.stack.dtype).eps * self.size("stream", layer + 1)
            rounding = rounding + 1e-7 * (self.size("update", layer) + self.size(norms, start, layer))
            energy = n_update**2 + n_alone**2
            weight.append(torch.where(energy > rounding**2, energy, 0))
        weights = torch.stack(weight)
        return weights, torch.stack(entry_read), torch.where(weights.cumsum(0) > 0, torch.stack(output), torch.nan)

    def nulls(self, start: int, layers: range) -> tuple[Tensor, Tensor]:
        """``N_l``, and ``R_l`` with the written content shuffled."""
        x, displacement, shuffled = self.x, [], []
        size = {layer: self.norm(x[layer], "stream", layer) for layer in (start, *layers)}
        for layer in layers:
            moved = self.norm(x[layer] - x[start], "written", start, layer)
            displacement.append(moved / (size[layer] + size[start]))
            alone, other = self.sums.total("frozen", start, layer), self.sums.total("shuffled", start, layer)
            scale = self.norm(other, "shuffled", start, layer) + self.norm(alone, "frozen", start, layer)
            shuffled.append(self.norm(other - alone, "shuffled effect", start, layer) / scale)
        return torch.stack(displacement), torch.stack(shuffled)


def _average(
    values: Float[Tensor, "layer resample"], weights: Float[Tensor, "layer resample"]
) -> Float[Tensor, "layer resample"]:
    """Weighted mean over the layers so far, for the window that ends with each; NaN while all of them are dead."""
    return torch.where(weights > 0, values * weights, 0).cumsum(0) / weights.cumsum(0)


def _check(stack: Stack, tokens: Tokens, longest: int, skip_first: bool, batch_size: int) -> None:
    if stack.n_layers < 2:
        raise ValueError(f"{stack.name} has one layer; a window needs two")
    if longest < 2:
        raise ValueError(
            f"a window has at least two layers: max_length must be 2 to {stack.n_layers} or None, got {longest}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if int(tokens.ensemble(skip_first).sum()) < 2:
        first = ", each prompt's first left out" if skip_first else ""
        raise ValueError(
            f"there are fewer than two tokens to compare in these prompts{first}; give longer or more prompts"
        )
