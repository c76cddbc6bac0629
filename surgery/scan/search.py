"""Searching where a scan of everything is too expensive: a screen of spans, and a beam over composed spans.

**Screen.** The gain of a repeated span hardly changes from a span to its neighbours. So some spans, spread over the
plane of (start, stop), are measured, the others predicted from them by a Gaussian process, the most promising measured
next, and again. ``recall`` says what a screen would have missed, ``cost`` how much of a full scan it took.

With nothing measured (``share=0``) what is left is the **first-order estimate**. A wiring ``:a b:`` enters layer ``b``
with the stream ``x_a`` in place of ``x_b`` (``b < a``: layers b to a - 1 run twice; ``a < b``: they are left out). With
``g_b`` the gradient of the answers' log-likelihood at ``x_b``,

    gain(a, b)  ~  sum over positions of g_b . (x_a - x_b)

for all spans from one forward and one backward pass. It is exact for small updates; but a second pass is no small step.

On the bundled model (12 layers, babel probes of k = 0 to 6, 30 of each; mean and worst of four sets of probes) the true
top ten of its 78 repeated spans were recalled as follows:

=============================  ==============  =============  =============  =============
screen                         cost, % of all  among best 10  among best 20  among best 30
=============================  ==============  =============  =============  =============
``share=0``                                 5     .30 (.00)      .50 (.40)      .90 (.90)
``share=0.15``                             21     .32 (.20)      .45 (.30)      .60 (.40)
``share=0.25``                             33     .70 (.40)      .88 (.70)     1.00 (1.00)
``share=0.4``                              48     .90 (.70)      .92 (.70)      .92 (.70)
full scan, 25 % of the probes              25     .45            .69            .83
full scan, 40 % of the probes              40     .55            .81            .92
=============================  ==============  =============  =============  =============

The share of layers run exceeds the share of wirings, as fewer of them have beginnings in common. Every wiring measured
is exact, so scan what a screen ranks high before believing it.

On other sets the first-order estimate as the mean of the Gaussian process lowered the recall more often than it raised
it, so it is left out. At share 0.15 the screen is no better than the first-order estimate at a quarter of its cost.

**Beam.** ``beam`` adds one repeated span after the other to the best wirings so far, as D. Ng's RYS does, every level
one scan with shared beginnings. What either finds is the best of many on the probes it was searched with: measure it
again on the other half of ``ProbeSet.split`` (``surgery.stats.comparisons``), beside the controls of
``surgery.scan.controls``.

The first-order estimate from the stream that is replaced is ours; kriging is an old idea.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.corpus.probes import Encoded, ProbeSet
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.scan import scanning, schedule
from surgery.scan.execution import distinct
from surgery.scan.scores import predicting
from surgery.stats import comparisons
from surgery.wiring.families import every_repeat
from surgery.wiring.value import Wiring

_TOKENS_AT_ONCE = 2048  # with what a backward pass keeps of every layer
_NOISE = 1e-3  # of a gain, beside the variance over the plane: how much neighbours differ without a pattern


def first_order(stack: Stack, probes: "ProbeSet | Encoded") -> Float[np.ndarray, "left entered"]:
    """Estimate the gain of leaving the stack before layer ``left`` and going on at ``entered``: mean over probes, nats.

    Exact in the limit of ``x_left - x_entered -> 0``. Zero on the diagonal (the unmodified model). Probes on which the
    unmodified model is not finite are left out; an estimate that is not finite on another is -inf.
    Cost: 3 F (a forward and a backward pass).

    >>> from surgery import models
    >>> from surgery.corpus.probes import Probe
    >>> first_order(Stack(models.load("babel")), ProbeSet("one", (Probe("p3 >other", "o3"),))).shape
    (13, 13)
    """
    encoded = Encoded.of(probes, stack)
    total, count = np.zeros((stack.n_layers + 1, stack.n_layers + 1)), 0
    for batch in _batches(encoded):
        streams, gradients = _gradients(stack, batch)
        finite = loglik(stack, batch, streams[-1]).isfinite()
        real = batch.tokens.mask.unsqueeze(-1) & finite[:, None, None]
        count += int(finite.sum())
        for entered, (x, gradient) in enumerate(zip(streams, gradients, strict=True)):
            for left, x_left in enumerate(streams):
                product = torch.where(real, gradient * (x_left - x), 0)
                total[left, entered] += float(product.sum(dtype=torch.float64))
    if not count:
        raise ValueError(f"{stack.name} gives no finite number on any of {len(encoded.groups)} probes")
    return np.where(np.isfinite(total), total / count, -np.inf)


def screen(
    stack: Stack,
    wirings: Iterable["Wiring | str"],
    probes: ProbeSet,
    share: int | float = 0.25,
    out: "Path | None" = None,
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """Gains of repeated or skipped spans, most of them estimated: wiring, estimate, round; best first.

    A ``share`` of the wirings is measured: half of it spread out (``round`` 1), then twice a quarter where the gain is
    predicted to be highest (2 and 3). Their estimate is the gain itself, mean over probes of log-likelihood in nats,
    -inf where that is not finite on some probe; where ``round`` is 0 it is predicted. With a folder ``out`` an
    interrupted screen resumes.

    Cost: ``cost(frame, n_layers)``; 3 F for ``share=0``, the first-order estimate alone.

    Raises ValueError for a wiring that is not of the form ``:a b:`` and for a share outside [0, 1].

    >>> from surgery import models
    >>> from surgery.corpus.probes import Probe
    >>> two = ProbeSet("two", (Probe("p3 >other", "o3"), Probe("p3 pf1 >plain", "p4")))
    >>> screen(Stack(models.load("babel")), every_repeat(12), two, share=0).columns.tolist()
    ['wiring', 'estimate', 'round']
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is the part of the wirings to measure, from 0 to 1, got {share}")
    candidates, encoded = distinct(stack, wirings), probes.encode(stack)
    spans = np.array([span_of(wiring) for wiring in candidates])
    rounds, estimate = np.zeros(len(candidates), dtype=int), np.zeros(len(candidates))
    if share == 0:
        estimate = first_order(stack, encoded)[spans[:, 1], spans[:, 0]]
    for number, count in enumerate(_rounds(math.ceil(share * len(candidates))), start=1):
        chosen = _spread(spans, count) if number == 1 else _best(estimate, count, rounds == 0)
        path = None if out is None else Path(out) / f"round_{number}.csv"
        rounds[chosen] = number
        estimate[chosen] = _gains(stack, [candidates[i] for i in chosen], encoded, path, progress)
        known = rounds > 0
        estimate[~known] = _predicted(spans[known], estimate[known], spans[~known], stack.n_layers / 6)
    frame = pd.DataFrame({"wiring": list(map(str, candidates)), "estimate": estimate, "round": rounds})
    return frame.sort_values("estimate", ascending=False, kind="stable", ignore_index=True)


def cost(screened: pd.DataFrame, n_layers: int) -> float:
    """Layers that a screen ran, in percent of those of a full scan of its wirings (which shares beginnings too).

    Every round runs the unmodified model once; a backward pass counts as two forward passes.
    """
    wirings = {text: Wiring.parse(text, n_layers) for text in screened["wiring"]}
    executions = 0.0 if screened["round"].any() else 3.0 * n_layers
    unmodified = Wiring.of(n_layers)
    for _, measured in screened[screened["round"] > 0].groupby("round"):
        executions += schedule.simulate([unmodified, *(wirings[text] for text in measured["wiring"])]).executions
    return 100 * executions / schedule.simulate([unmodified, *wirings.values()]).executions


def recall(screened: pd.DataFrame, full: pd.DataFrame, top: int = 10) -> pd.DataFrame:
    """Share of the true ``top`` wirings among the best ``top``, 2 and 3 times ``top`` of a screen: looked_at, recall.

    ``full`` is what ``scan.run`` gave for the same wirings and probes, with the metric ``loglik``.
    """
    best = set(_mean_gain(full).nlargest(top).index)
    ranked = screened.sort_values("estimate", ascending=False, kind="stable")["wiring"].tolist()
    looked_at = [top, 2 * top, 3 * top]
    return pd.DataFrame({"looked_at": looked_at, "recall": [len(best & set(ranked[:n])) / top for n in looked_at]})


def beam(
    stack: Stack,
    probes: ProbeSet,
    width: int = 8,
    depth: int = 3,
    spans: "Sequence[tuple[int, int]] | None" = None,
    out: "Path | None" = None,
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """Search wirings of 1, 2, ... ``depth`` repeated spans, each level made of the ``width`` best of the level before.

    A span is repeated wherever in a wiring its layers still run one after another; so spans are repeated side by side,
    within each other, or again. ``spans`` are those to choose from, ``(start, stop)``; by default all, else for example
    the best of a ``screen``. With a folder ``out`` an interrupted search resumes.

    Returns everything measured: level, wiring, layers (how many run), gain (mean over probes of log-likelihood, nats;
    -inf where that is not finite on some probe: nothing is built on such a wiring), best first within a level. The
    gains are of the best of many: measure the winners again on other probes.

    Raises ValueError for a width or depth below 1. Cost: ``scan.plan`` of the wirings of every level.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"a beam has a width and a depth of at least 1, got {width} and {depth}")
    if spans is None:
        spans = [span_of(wiring) for wiring in every_repeat(stack.n_layers)]
    encoded = probes.encode(stack)
    best, seen, levels = [Wiring.of(stack.n_layers)], {Wiring.of(stack.n_layers)}, []
    for level in range(1, depth + 1):
        extended = dict.fromkeys(longer for wiring in best for span in spans for longer in _extensions(wiring, *span))
        candidates = [wiring for wiring in extended if wiring not in seen]
        if not candidates:
            break
        seen.update(candidates)
        path = None if out is None else Path(out) / f"level_{level}.csv"
        gains = _gains(stack, candidates, encoded, path, progress)
        order = np.argsort(-gains, kind="stable")
        best = [candidates[i] for i in order[:width] if np.isfinite(gains[i])]
        rows = [(level, str(candidates[i]), int(candidates[i].depth), gains[i]) for i in order]
        levels.append(pd.DataFrame(rows, columns=["level", "wiring", "layers", "gain"]))
    return pd.concat(levels, ignore_index=True)


def loglik(
    stack: Stack, encoded: Encoded, x: Float[Tensor, "row pos d_model"], *, grad: bool = False
) -> Float[Tensor, " row"]:
    """Log-likelihood in nats of every row's scored tokens if ``x`` leaves the last layer.

    Cost: the readout of the scored tokens.
    """
    log_p = stack.readout(x[predicting(encoded.scored)], grad=grad).log_softmax(-1)
    of_targets = log_p.gather(1, encoded.tokens.ids[encoded.scored].unsqueeze(1)).squeeze(1)
    return of_targets.new_zeros(len(x)).index_add(0, encoded.scored.nonzero()[:, 0], of_targets)


def _gradients(stack: Stack, encoded: Encoded) -> tuple[list[Tensor], list[Tensor]]:
    """The streams ``x_0 .. x_L`` of the clean run and the gradients of the summed log-likelihood at each."""
    context = stack.context(encoded.tokens)
    streams = [context.x0.detach().requires_grad_()]
    stack.execute(":", streams[0], context, tap=lambda layer, before, after: streams.append(after), grad=True)
    with torch.enable_grad():
        total = loglik(stack, encoded, streams[-1], grad=True).sum()
    gradients = torch.autograd.grad(total, streams)
    return [x.detach() for x in streams], list(gradients)


def _batches(encoded: Encoded) -> Iterator[Encoded]:
    """Batches of the rows of right answers, small enough for a backward pass."""
    right = [row for row, choice in enumerate(encoded.choice) if choice == 0]
    size = max(1, _TOKENS_AT_ONCE // encoded.tokens.ids.shape[1])
    for first in range(0, len(right), size):
        rows = right[first : first + size]
        yield replace(
            encoded,
            tokens=Tokens(encoded.tokens.ids[rows], encoded.tokens.mask[rows]),
            scored=encoded.scored[rows],
            probe=tuple(encoded.probe[row] for row in rows),
            choice=(0,) * len(rows),
            credit=None,
        )


def span_of(wiring: Wiring) -> tuple[int, int]:
    """``(b, a)`` of the wiring ``:a b:``: for a repeated span its start and stop."""
    layers, n_layers = wiring.layers, wiring.n_layers
    left = next((at for at, layer in enumerate(layers) if layer != at), len(layers))
    entered = layers[left] if left < len(layers) else n_layers
    if not wiring.is_serial or layers != (*range(left), *range(entered, n_layers)):
        raise ValueError(
            f"a screen takes one span run twice or left out, such as ':4 2:' or ':2 4:', not {str(wiring)!r}"
        )
    return entered, left


def _extensions(wiring: Wiring, start: int, stop: int) -> Iterator[Wiring]:
    """The wiring with the span run twice, at every place where its layers run one after another."""
    span, layers = tuple(range(start, stop)), wiring.layers
    for at in range(len(layers) - len(span) + 1):
        if layers[at : at + len(span)] == span:
            yield wiring.repeat(at, at + len(span))


def _gains(
    stack: Stack, wirings: Sequence[Wiring], encoded: Encoded, out: "Path | None", progress: bool
) -> Float[np.ndarray, " wiring"]:
    frame = scanning.run(stack, wirings, encoded, out, metrics=("loglik",), progress=progress)
    return _mean_gain(frame).loc[[str(wiring) for wiring in wirings]].to_numpy()


def _mean_gain(frame: pd.DataFrame) -> pd.Series:
    return comparisons.differences(frame, "loglik").mean()


def _rounds(count: int) -> list[int]:
    """How many wirings to measure in each round: half, a quarter, a quarter."""
    first = math.ceil(count / 2)
    second = math.ceil((count - first) / 2)
    return [size for size in (first, second, count - first - second) if size]


def _best(estimate: np.ndarray, count: int, among: np.ndarray) -> np.ndarray:
    """Indices of the ``count`` highest estimates where ``among`` is true."""
    order = np.argsort(-estimate, kind="stable")
    return order[among[order]][:count]


def _spread(spans: np.ndarray, count: int) -> np.ndarray:
    """Indices of ``count`` spans far from each other in the plane: each the farthest from those before it."""
    distance = ((spans - spans.mean(0)) ** 2).sum(1)
    chosen = [int(distance.argmin())]
    distance = np.full(len(spans), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, ((spans - spans[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


def _predicted(spans: np.ndarray, gains: np.ndarray, new_spans: np.ndarray, reach: float) -> np.ndarray:
    """Gains of new spans from a Gaussian process with a constant mean (kriging); ``reach`` in layers."""
    known = gains[np.isfinite(gains)]
    gains = np.where(np.isfinite(gains), gains, known.min(initial=0.0))  # as bad as the worst, for their neighbours
    inverse = np.linalg.inv(_kernel(spans, spans, reach) + _NOISE * np.eye(len(spans)))
    mean = (inverse @ gains).sum() / inverse.sum()
    return mean + _kernel(new_spans, spans, reach) @ inverse @ (gains - mean)


def _kernel(a: np.ndarray, b: np.ndarray, reach: float) -> np.ndarray:
    return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * reach**2))
