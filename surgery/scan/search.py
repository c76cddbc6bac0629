"""Searching beyond single spans, and an estimate of every span from one backward pass.

**First-order estimate.** A wiring ``:a b:`` enters layer ``b`` with the stream ``x_a`` in place of ``x_b`` (``b < a``:
layers b to a - 1 run twice; ``a < b``: they are left out). With ``g_b`` the gradient of the answers' log-likelihood at
``x_b``,

    gain(a, b)  ~  sum over positions of g_b . (x_a - x_b)

for all spans from one forward and one backward pass. It is exact for small updates; but a second pass is no small step:
of the true top ten of the bundled model's 78 repeated spans (12 layers, babel probes of k = 0 to 6, 30 of each; mean of
four sets of probes) .30 are among its best 10, .50 among its best 20 and .90 among its best 30, at 5 % of the cost of a
full scan. Whoever wants the best spans searches them in rounds (``surgery.scan.halving``).

**Beam.** ``beam`` adds one repeated span after the other to the best wirings so far, as D. Ng's RYS does, every level
one scan with shared beginnings. What it finds is the best of many on the probes it was searched with: measure it again
on the other half of ``ProbeSet.split`` (``surgery.stats.comparisons``), beside the controls of
``surgery.scan.controls``.

The first-order estimate from the stream that is replaced is ours.
"""

from collections.abc import Iterator, Sequence
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
from surgery.scan import scanning
from surgery.scan.scores import predicting
from surgery.stats import comparisons
from surgery.wiring.families import every_repeat
from surgery.wiring.value import Wiring

_TOKENS_AT_ONCE = 2048  # with what a backward pass keeps of every layer


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
    the best of ``halving.search``. With a folder ``out`` an interrupted search resumes.

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
            f"a search takes one span run twice or left out, such as ':4 2:' or ':2 4:', not {str(wiring)!r}"
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
    return comparisons.differences(frame, "loglik").mean().loc[[str(wiring) for wiring in wirings]].to_numpy()
