r"""How serial is a window of layers: does a layer read what those before it wrote, or what was there before them all?

Take a window ``[a, b)`` of layers. Let ``x_l`` be the stream that enters layer ``l``, ``u_l = f_l(x_l)`` its update in
the clean run, and ``p_l = f_l(x_a)`` its update on the window's entry, at all positions: what it would have written if
the window's layers had run side by side. Expectations run over the ensemble, every real token of every prompt but each
prompt's first; ``c(a) = a - E a`` and ``n(a) = sqrt(E |a|^2)``.

    R_l = n(c(u_l - p_l)) / (n(c(u_l)) + n(c(p_l)))          R = sum_{l>a} w_l R_l / sum_{l>a} w_l
    w_l = n(c(u_l))^2 + n(c(p_l))^2
    O   = n(c(U - P)) / (n(c(U)) + n(c(P)))                  U = sum_{l>a} u_l,   P = sum_{l>a} p_l
    S   = (R + O) / 2

All lie in [0, 1] by the triangle inequality. They are 0 if no layer of the window reads what another wrote, and 1 if
every layer reads nothing but the one before. What to compare them with is in the same row:

* ``R_rotated``, the null: what varies of the window's writes ``x_l - x_a`` is turned at random, one rotation a prompt,
  ``q_l = f_l(x_a + Q (x_l - x_a))``, and ``n(c(q_l - p_l)) / (n(c(q_l)) + n(c(p_l)))`` is averaged as R is. Layers
  that prefer no direction read ``R_over_rotated`` 1: in random networks its mean over windows is .99 to 1.04, whatever
  the activation, the norm and the size of updates. ``preference``, the root of ``sum n(c(u_l - p_l))^2 / sum
  n(c(q_l - p_l))^2``, is 1 there as well, and has no ceiling: in the serial network both R are 1, preference is 1.4 to
  3.1. Above 1: the layers respond to what the window wrote more than to another displacement of that size. Below 1:
  they prefer what was there before.
* ``S_matched``, with ``untrained``: S of the same architecture with fresh weights whose updates are brought to the size
  that the model's have, layer by layer, relative to the stream. S grows with that size whatever the layers do: windows
  of two and three layers of random networks read .12 to .38 as it grows. ``S_excess = S - S_matched`` is what remains.
* ``R_live``, ``O_live``, ``S_live`` and ``layernorm_share = S_live - S``. R, O and S keep the denominators and means of
  the norms of the clean run. Live ones move with all that a window writes, and that alone reads as dependence; but a
  live norm also rescales a small entry to full size and hides growth, so the share may be negative.
* ``N``, the displacement, ``N_l = n(c(x_l - x_a)) / (n(c(x_l)) + n(c(x_a)))`` averaged with the weights of R: how far
  the stream moved within the window. It is no null: only linear layers that treat all directions alike have R = N,
  while random networks with a nonlinearity read R/N of 1.05 to 2.3. R grows with the length of a window and with the
  size of its updates, so compare windows of equal length. From layer 0 of a model with small embeddings R and N are
  near 1 whatever the layers do.
* ``R_shuffled``, the content null: the window's writes are replaced by those that the token of the same place in
  another prompt received. R above it: the layer responds to what was written for this very token. R equal to it: the
  writes for any token would have done, which does not speak against series (in the serial network both are 1).
* ``loss_parallel_*`` and ``kl_parallel_*``, the damage: the window really runs in parallel (norms live), and the rest
  of the model follows; change of the next-token cross entropy, and KL(clean || rewired), in nats a token. ``sum`` adds
  the updates, ``x_a + sum p_l``. ``mean`` averages the outputs (Sun et al. 2024, arXiv 2407.09298): a step of 1/length,
  so its damage is no evidence against parallelism. A change of loss may be negative, the divergence may not.

S is about dependence between whole layers: attention that feeds the MLP of its own layer does not count. With
``grain="sublayer"`` the units of a window are attention and MLP of each layer, in the order in which they run, each
reading the stream that the model gives it. Where the two stand side by side (GPT-J, GPT-NeoX) the MLP reads what enters
its layer, so a layer by itself reads R = O = 0 up to rounding and N = 0; R/N is then undefined. S says nothing about
usefulness; for that, read it beside the damage. ``profile`` is the table to look at first.

``_low`` and ``_high`` are 95 % percentile intervals over resampled prompts; all measures of a row use the same
resamples. Compare with ``surgery.instruments.known_networks`` and with the architecture untrained. Tokens of massive
activations are left out, and a row says what the largest token and dimension hold of the variance of its streams and
updates (``surgery.instruments.massive``). A window of two layers has one layer after the first, so R = O = S.
R, O, S, N and their nulls are our definitions; running layers in parallel is Sun et al.'s.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from surgery import progress
from surgery.instruments import losses, massive, similarity
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import predicting_positions
from surgery.instruments.together import Together
from surgery.instruments.windows import (
    Reading,
    Spans,
    Sums,
    Units,
    merged,
    record_entry_updates,
    record_stream,
    running_mean,
)
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.series.recording import Recording, require_measurable
from surgery.stats.bootstrap import described, measure_columns, weights
from surgery.stats.sampling import Sampling

WINDOW_MEASURES = {
    "R": "entry-read dependence of the window, 0 parallel to 1 serial, normalisation frozen at the clean run",
    "O": "error of the window's output when its layers run in parallel, 0 to 1, normalisation frozen",
    "S": "seriesness (R + O) / 2: 0 if no layer of the window reads another, 1 if each lives on the one before",
    "R_live": "R with the normalisation live: it counts rescaling by the norm as reading",
    "O_live": "O with the normalisation live",
    "S_live": "(R_live + O_live) / 2",
    "layernorm_share": "S_live - S: how much of the live value is the normalisation's doing",
    "R_rotated": "null of R: R with what the window wrote turned at random",
    "R_over_rotated": "R / R_rotated: above 1 layers respond to what the window wrote more than to any displacement",
    "preference": "how much larger the effect of what the window wrote is than that of the same turned at random",
    "N": "displacement: how far the stream moved inside the window, relative to its size; not a null",
    "R_over_N": "R / N: a description, random networks read 1.05 to 2.3",
    "R_shuffled": "content null of R: R with the written content exchanged between tokens of equal position",
    "loss_parallel_sum": "loss added by running the layers in parallel, updates summed (nats per token)",
    "loss_parallel_mean": "the same with the layers' outputs averaged (Sun et al. 2024)",
    "kl_parallel_sum": "KL(clean || parallel, updates summed) of the next-token distributions (nats per token)",
    "kl_parallel_mean": "the same with the layers' outputs averaged",
}
MATCHED_MEASURES = {
    "S_matched": "S of the architecture with fresh weights and updates of the same size",
    "S_excess": "S - S_matched",
}
LAYER_MEASURES = {
    "loss_skip": "loss added by leaving the layer out (nats per token)",
    "kl_skip": "KL(clean || without the layer) of the next-token distributions (nats per token)",
}
PROFILE = [
    *(f"{name}_{span}" for span in ("pair", "window") for name in ("S", "R", "R_over_N", "loss_parallel_sum")),
    *("loss_skip", "kl_skip", "update_ratio", "cosine", "block_influence"),
]


def _profile_meaning(name: str) -> str:
    measure, _, span = name.rpartition("_")
    of = {"pair": "the layer and the next", "window": "the window that starts with the layer"}.get(span)
    return f"{WINDOW_MEASURES[measure]}; of {of}" if of else (similarity.COLUMNS | LAYER_MEASURES)[name]


COLUMNS = {
    "start": "first layer of the window",
    "stop": "one past the last layer of the window",
    "first": "first unit of the window, a sublayer (3.attn); start and stop count sublayers",
    "last": "last unit of the window",
    "layer": "layer, counted from 0",
    "length": "length of the windows of the columns that end in _window",
    "n_prompts": "number of prompts, the unit of resampling",
    **massive.COLUMNS,
    **described(
        WINDOW_MEASURES | MATCHED_MEASURES | LAYER_MEASURES | {name: _profile_meaning(name) for name in PROFILE}
    ),
}


@with_meanings(COLUMNS)
@in_smaller_batches
def windows(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    max_length: int | None = None,
    *,
    damage: bool = True,
    damage_length: int | None = None,
    forms: Sequence[str] = ("sum",),
    grain: str = "layer",
    untrained: Stack | None = None,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure R, O, S, their nulls and the damage in parallel, for every window of 2 to ``max_length`` layers.

    None means windows of any length. ``grain="sublayer"`` counts ``start``, ``stop`` and ``max_length`` in sublayers
    (``2 l`` is the attention of layer l, ``2 l + 1`` its MLP) and names both ends, ``first`` and ``last``, as in
    ``3.attn`` (``COLUMNS``). Columns: ``start``, ``stop`` (half-open), ``n_prompts``; then, each followed by
    its ``_low`` and ``_high``, ``R``, ``O``, ``S``, ``R_live``, ``O_live``, ``S_live``, ``layernorm_share``, ``N``,
    ``R_over_N``, ``R_rotated``, ``R_over_rotated``, ``preference``, ``R_shuffled``; with ``damage``
    ``loss_parallel_sum``, ``loss_parallel_mean``, ``kl_parallel_sum``, ``kl_parallel_mean``, NaN for a form that is not
    among ``forms`` and for windows longer than ``damage_length`` (None measures the damage of all); with ``untrained``,
    the architecture with fresh weights (``surgery.models.untrained``), ``S_matched`` and ``S_excess``; and the columns
    of ``surgery.instruments.massive``. A window whose layers write nothing that varies is undefined (NaN); so are the
    intervals and ``R_shuffled`` of a single prompt. No column depends on ``batch_size``.

    Cost of W windows in a model of L layers: 4 + 4 W/L F; with ``damage``, for each form, 1/L sum (L - stop) F and W
    readouts more, and a few readouts of the clean run; with ``untrained`` 2 + W/L F, and 2 F of 16 prompts, more; and
    what it costs to find massive tokens. For all windows that is 2 L + 2 F and (L - 1)(L - 2)/6 F: 44 F at 12 layers.
    The statistics take about as long as 1 F per 10 F where layers are small. Memory: six times the stream of one batch,
    with ``damage`` up to 2^27 numbers more, and 4 W d_model single-precision numbers a prompt. A long measurement can
    be kept batch by batch (``surgery.series.recording``).

    With sublayers, read 2 L for L; each of them costs half as much as a layer.

    Raises ValueError for ``max_length`` below 2, a model of one layer, prompts without two tokens to compare, a stream
    that is not finite, and sublayers of a model whose layers cannot be split.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> frame = windows(Stack(known_networks.parallel_network()), known_networks.tokens(), max_length=2)
    >>> bool((frame.S < 1e-6).all() and (frame.N > 0.1).all())
    True
    """
    recording = Recording.of(
        stack,
        tokens,
        max_length,
        damage_length=damage_length,
        forms=forms if damage else (),
        grain=grain,
        untrained=untrained,
        sampling=sampling,
    )
    with progress.task("windows", recording.steps * len(recording.batches), sampling.progress) as advance:
        return table(recording, [recording.sums(prompts, advance) for prompts in recording.batches])


@with_meanings(COLUMNS)
@in_smaller_batches
def longest(
    stack: Stack, tokens: Ensemble | Tokens | Tensor, start: int = 0, *, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Measure R, O and S alone, of the window from ``start`` to the last layer: a row with columns of ``windows``.

    Cost: 2 F and ``(L - start - 1) / L`` F. Raises as ``windows``, and ValueError for a start that leaves no window.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> longest(Stack(known_networks.serial_network()), known_networks.tokens())["S"].round(4).tolist()
    [1.0]
    """
    units, ensemble, parts = Units.of(stack, "layer"), Ensemble.of(stack, tokens, sampling), []
    require_measurable(units, ensemble.tokens, len(units), sampling.batch_size, sampling.skip_first)
    if not 0 <= start < len(units) - 1:
        raise ValueError(f"a window has at least two layers: start must be 0 to {len(units) - 2}, got {start}")
    spans = Spans.of(len(units), len(units))
    for _, context, mask in ensemble.batches(stack, "the longest window"):
        stream, sums = units.stream(context), Sums(mask, spans, stack.dtype)
        record_stream(stream, sums)
        with stack.frozen(context):
            for _ in record_entry_updates(
                units, Together(stack, context), stream, "frozen", sums, range(start, start + 1)
            ):
                pass
        parts.append(sums.tensors)
    draws = weights(len(ensemble.tokens), sampling.resamples, sampling.seed)
    reading = Reading(merged(parts), spans, draws, units.reads, stack.dtype)
    weight, entry_read, output = reading.dependence("frozen", start, units.after(start, len(units)))
    R = running_mean(entry_read, weight)[-1]
    row = {"start": start, "stop": len(units), "n_prompts": len(ensemble.tokens)}
    return pd.DataFrame([row | measure_columns({"R": R, "O": output[-1], "S": (R + output[-1]) / 2})])


@with_meanings(COLUMNS)
def table(recording: Recording, parts: Iterable[Mapping[str, Tensor]]) -> pd.DataFrame:
    """Return the table of ``windows`` from the sums of its batches, in their order. Cost: no forward pass.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> recording = Recording.of(Stack(known_networks.serial_network(n_layers=3)), known_networks.tokens(8, 6))
    >>> table(recording, [recording.sums(prompts) for prompts in recording.batches])["S"].round(4).tolist()
    [1.0, 1.0, 1.0]
    """
    units, ensemble, spans = recording.units, recording.ensemble, recording.spans
    draws = weights(len(ensemble.tokens), ensemble.sampling.resamples, ensemble.sampling.seed)
    sums = merged(parts)
    reading = Reading(sums, spans, draws, units.reads, units.stack.dtype)
    matched = None
    if recording.matched is not None:
        theirs = {name.removeprefix("matched "): values for name, values in sums.items() if name.startswith("matched ")}
        matched = Reading(theirs, spans, draws, units.reads, recording.matched.stack.dtype)
    rows = []
    for start in range(len(units) - 1):
        layers = range(start + 1, max(last for first, last in spans.pairs if first == start) + 1)
        measures = reading.measures(start, layers, damage=bool(recording.forms))
        if matched is not None:
            measures["S_matched"] = matched.seriesness(start, layers)
            measures["S_excess"] = measures["S"] - measures["S_matched"]
        for i, layer in enumerate(layers):
            row: dict[str, str | float] = {"start": start, "stop": layer + 1}
            if units.a_layer == 2:
                row |= {"first": units.names[start], "last": units.names[layer]}
            row["n_prompts"] = len(ensemble.tokens)
            row |= measure_columns({name: values[i] for name, values in measures.items()})
            inside = range(start // units.a_layer, layer // units.a_layer + 1)
            row |= ensemble.columns(streams=inside, updates=inside)
            rows.append(row)
    return pd.DataFrame(rows)


@with_meanings(COLUMNS)
def summary(frame: pd.DataFrame, n_layers: int, length: int | None = None, first_layer: int = 1) -> pd.DataFrame:
    """Average every measure over the windows of one length that lie wholly in a third of the model: one row per third.

    ``length`` is by default the longest that fits every third that has windows at all. Windows before ``first_layer``
    are left out: where embeddings are small, every window from layer 0 reads R = N = 1. Columns: ``third``, ``length``,
    ``n_windows``, the measures with intervals, and ``S_min``, ``S_max`` over the windows. A third without such a window
    has ``n_windows = 0`` and NaN.

    The ends of the windows' intervals are averaged like the estimates: that is right if the windows move together from
    resample to resample (they share prompts and layers), and too wide if they do not.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.serial_network(n_layers=9))
    >>> frame = windows(stack, known_networks.tokens(), max_length=3, damage=False)
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
    return pd.DataFrame(rows)


@with_meanings(COLUMNS)
@in_smaller_batches
def profile(
    stack: Stack, tokens: Tokens | Tensor, length: int | None = None, *, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Make the table to look at first: one row per layer, on its neighbours, its use to the model, and the stream.

    * ``S_pair``, ``R_pair``, ``R_over_N_pair``, ``loss_parallel_sum_pair``: the window of this layer and the next, how
      serial it is and what running it in parallel costs (nats per token);
    * the same with ``_window``: the window of ``length`` layers (by default 4, or all if fewer) that starts here;
    * ``loss_skip``, ``kl_skip``: what leaving the layer out costs;
    * ``update_ratio``, ``cosine``, ``block_influence``: what it does to the stream's size and direction, which is *not*
      series (``surgery.instruments.similarity``).

    Then the interval of each (``_low``, ``_high``); ``PROFILE`` lists the columns without them. Empty where no such
    window starts. Compare with the architecture untrained. Cost: that of ``windows(max_length=length)`` with damage and
    (L + 3)/2 F and L + 1 readouts. Raises as ``windows`` does, and for a ``length`` beyond the model.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> frame = profile(Stack(known_networks.serial_network(n_layers=3)), known_networks.tokens(24, 8), length=3)
    >>> print(frame[["layer", "S_pair", "S_window", "cosine"]].round(2).abs().to_string(index=False))
     layer  S_pair  S_window  cosine
         0     1.0       1.0     0.0
         1     1.0       NaN     0.0
         2     NaN       NaN     0.0
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    length = min(4, stack.n_layers) if length is None else length
    if length > stack.n_layers:
        raise ValueError(
            f"no window of {length} layers fits {stack.name}: length must be 2 to {stack.n_layers} or None"
        )
    all_windows = windows(stack, ensemble, length, sampling=sampling)
    frame = similarity.layers(stack, ensemble, sampling=sampling).set_index("layer")
    frame.insert(1, "length", length)
    lengths = all_windows["stop"] - all_windows["start"]
    for span, rows in (("pair", all_windows[lengths == 2]), ("window", all_windows[lengths == length])):
        names = {name: re.sub("(_low|_high)?$", rf"_{span}\1", str(name), count=1) for name in all_windows}
        frame = frame.join(rows.set_index("start").rename(columns=names))
    frame = frame.join(_skip_damage(stack, ensemble.tokens, sampling=sampling))
    ends = [f"{name}_{end}" for name in PROFILE for end in ("low", "high")]
    return frame.reset_index()[["layer", "n_prompts", "length", *PROFILE, *ends]]


def _skip_damage(stack: Stack, tokens: Tokens, sampling: Sampling) -> pd.DataFrame:
    """Measure the damage of leaving out each layer. Cost: (L + 1)/2 F and L + 1 readouts."""
    parts, counts = [], []
    for batch in tokens.batches(sampling.batch_size):
        context, predicting = stack.context(batch), predicting_positions(batch)
        stream = stack.stream(context)
        finals = Together(stack, context).ride({layer + 1: [stream[layer]] for layer in range(stack.n_layers)})
        finals = [losses.predicted(x, predicting) for x in finals]
        parts.append(losses.by_prompt(stack, batch, stream[-1], finals).cpu())
        counts.append(predicting.sum(1, dtype=torch.float64).cpu())
    draws, measured = weights(len(tokens), sampling.resamples, sampling.seed), torch.cat(parts, 2)
    nats = measured @ draws.T / (draws @ torch.cat(counts))
    rows = (
        {"layer": layer} | measure_columns({"loss_skip": nats[0, layer], "kl_skip": nats[1, layer]})
        for layer in range(stack.n_layers)
    )
    return pd.DataFrame(rows).set_index("layer")
