"""Many wirings on many prompts, exactly, at the cost of few: ``scan.run(stack, wirings, probes)``.

How they run and what that costs is in ``surgery.scan.execution``, what is scored in ``surgery.scan.scores``, and how
rows survive a kill in ``surgery.scan.rows``.

Compare with the unmodified model (column ``baseline``) by ``surgery.stats.comparisons``, which knows that the best of
thousands is lucky. Prior art runs the whole model per configuration: D. Ng (RYS), alainnothere (llm-circuit-finder).
"""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from surgery.corpus.probes import Encoded, ProbeSet
from surgery.memory import halving
from surgery.models.half_precision import layers_of
from surgery.models.stack import Stack
from surgery.progress import task
from surgery.scan import execution, rows
from surgery.scan.metrics import Metric
from surgery.scan.scores import Scorer, check_metrics
from surgery.wiring.value import Wiring

if TYPE_CHECKING:
    from surgery.scan.cluster import Cluster, Pool


WHOLE = 1024  # of the memory that is planned for a portion: it may be halved ten times


class NotFiniteWarning(UserWarning):
    """Some values of a scan are not finite numbers."""


def run(
    stack: Stack,
    wirings: Iterable["Wiring | str"],
    probes: "ProbeSet | Encoded",
    out: "str | Path | None" = None,
    *,
    metrics: Sequence[Metric] = ("loglik", "exact"),
    precision: str = "float32",
    memory: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    cluster: "Cluster | Pool | str | int | None" = None,
) -> pd.DataFrame:
    """One row per wiring, probe and metric: wiring, prompt, group, metric, value, baseline.

    Equal wirings are run once. Values equal those of each wiring run alone within 1e-5 relative. Cost: see ``plan``.
    Values that are not finite are kept as they are and warned of (``NotFiniteWarning``): ``comparisons.table`` counts
    them against a wiring, where a mean of pandas would leave NaN out. Where the memory is too small for a portion of
    the probes, it takes half as much, and so on, and a warning says so.

    Args:
        stack: the model.
        wirings: in any notation that ``stack.wiring`` takes.
        probes: what is asked; whoever scans the same probes several times encodes them once and hands that over.
        out: a CSV file to fill, with a manifest beside it; without it nothing is kept if the scan is interrupted.
        metrics: which of ``surgery.scan.METRICS``, and functions of your own (``surgery.scan.metrics``): each takes
            log-probabilities [token d_vocab] at the scored tokens of a probe's answer, and these tokens [token], and
            returns a number. They are in the table, and in ``comparisons.table``, under their ``__name__``.
        precision: ``bf16`` runs the layers, of wirings and of the unmodified model alike, with their matrices in
            bfloat16 (``surgery.models.half_precision``): about twice as fast, good enough to rank wirings, not to
            measure a small gain. ``float32`` is the model as it was loaded.
        memory: bytes to stay within, half of what is free by default; on a cluster that of each worker.
        batch_size: probes run at once, at most.
        progress: draw a progress bar on standard error.
        cluster: run the same scan on a Ray cluster: a number of workers on this machine, ``"local"``, ``"auto"``, an
            address, or more exactly a ``surgery.scan.cluster.Cluster``.

    Raises:
        ValueError: an unknown metric, a function without a name of its own or that returns no number, ``choice`` on
            probes without choices, or ``out`` holds a scan of another model, probe set, choice of metrics (or source
            of a function) or precision; ``bf16`` of a model with hooks, or loaded in another type.

    >>> from surgery import models
    >>> from surgery.corpus.probes import Probe
    >>> two = ProbeSet("two", (Probe("p3 >other", "o3"), Probe("p3 pf1 >plain", "p4")))
    >>> run(Stack(models.load("babel")), [":8 4:"], two, metrics=["loglik"]).columns.tolist()
    ['wiring', 'prompt', 'group', 'metric', 'value', 'baseline']
    """
    encoded = Encoded.of(probes, stack)
    check_metrics(metrics, encoded)
    to_scan, unmodified = execution.distinct(stack, wirings), Wiring.of(stack.n_layers)
    layers = layers_of(stack, precision)
    portions = execution.portions(stack, encoded, memory, batch_size, to_scan)
    with (
        rows.ResumableTable(out, {} if out is None else rows.identity(stack, encoded, metrics, precision)) as table,
        task("wirings x probes", len(encoded.groups) * len(to_scan), progress) as advance,
        ExitStack() as workers,
    ):
        pool = None

        def scan(portion: Encoded, memory: int | None) -> None:
            nonlocal pool
            scorer = Scorer(stack, portion, metrics, layers)
            if not table.has(unmodified, scorer.prompts):
                x = layers.execute(unmodified, scorer.context.x0, scorer.context)
                table.append(scorer.rows(unmodified, x))
            missing = [wiring for wiring in to_scan if not table.has(wiring, scorer.prompts)]

            def accept(block: pd.DataFrame) -> None:
                before = table.done(block["wiring"].iloc[0], scorer.prompts)
                table.append(block)
                advance(len(scorer.prompts) - before)

            if cluster is None or not missing:
                execution.measure(scorer, missing, memory, accept)
                return
            if pool is None:
                from surgery.scan.cluster import joined

                pool = workers.enter_context(joined(cluster))
            pool.measure(scorer, missing, memory, accept)

        for portion in portions:
            advance(sum(table.done(wiring, portion.prompts) for wiring in to_scan), free=True)

            def within(share: int, portion: Encoded = portion) -> None:
                if share == WHOLE:
                    return scan(portion, memory)
                planned = execution.needed(stack, to_scan, portion.tokens.ids.numel(), memory)
                budget = planned * share // WHOLE
                for part in execution.portions(stack, portion, budget, batch_size, to_scan):
                    scan(part, budget)

            halving(WHOLE, within, lambda share: f"{share / WHOLE:.3g} of what was planned for some probes")
        frame = table.frame(to_scan, unmodified, metrics)
        table.close(frame, stack, encoded)
    for metric, values in frame.groupby("metric", sort=False):
        if said := _not_finite(values):
            warnings.warn(f"{metric} {said}", NotFiniteWarning, stacklevel=2)
    return frame


def _not_finite(rows: pd.DataFrame) -> str:
    """On how many prompts the unmodified model, and how many wirings, give no finite number; empty if all do."""
    there = np.isfinite(rows["baseline"])
    broken = rows[there & ~np.isfinite(rows["value"])]
    parts = []
    if not there.all():
        left_out, prompts = rows.loc[~there, "prompt"].nunique(), rows["prompt"].nunique()
        parts.append(f"of the unmodified model is not finite on {left_out} of {prompts} prompts")
    if len(broken):
        worst = broken["wiring"].value_counts()
        parts.append(
            f"of {len(worst)} of {rows['wiring'].nunique()} wirings is not finite on some prompts on which that of the "
            f"unmodified model is, of {worst.index[0]} on {worst.iloc[0]}"
        )
    return ", and ".join(parts)
