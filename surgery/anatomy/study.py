"""The anatomy of one model (``anatomy.locate``) as files: ``anatomy_*.csv`` and figures. ``surgery study anatomy``.

anatomy_boundaries.csv     probability of each boundary by layer, over resampled prompts
anatomy_segments.csv       numbers of breaks compared, on held-out prompts and with smooth drift
anatomy_detectors.csv      where every kind of evidence puts the boundaries by itself
anatomy_agreement.csv      how far the detectors are apart
anatomy_convergence.csv    content against language by layer, where there are parallel sentences
anatomy_ends.csv           the ends against the middle: S and R/R_rotated, by kind of prompt; sentences in its manifest
anatomy_by_kind.csv        whether that depends on what is asked
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from surgery import disk
from surgery.anatomy import draw, say
from surgery.anatomy.boundaries import DRIFTS, SAMPLING, Anatomy, locate
from surgery.anatomy.convergence import Utterance
from surgery.anatomy.files import COLUMNS, NAMES
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page.drawing import png
from surgery.page.parts import rows
from surgery.records import manifest, tables
from surgery.stats.sampling import Sampling


def measure(
    stack: Stack,
    tokens: Tokens,
    folder: Path,
    kinds: Sequence[str] | None = None,
    *,
    utterances: Sequence[Utterance] | None = None,
    scan: pd.DataFrame | None = None,
    metric: str = "loglik",
    length: int = 2,
    drifts: int = DRIFTS,
    sampling: Sampling = SAMPLING,
    figures: bool = True,
) -> Anatomy:
    """Run ``anatomy.locate`` on an open model and write its tables and figures to ``folder``.

    Arguments, cost and errors are those of ``locate``; the ``verdict`` of ``ends`` is spelt out (``say.verdict``).
    Without ``figures`` only tables are written, for ``surgery.report`` draws them again.
    """
    anatomy = locate(
        stack,
        tokens,
        kinds,
        utterances=utterances,
        scan=scan,
        metric=metric,
        length=length,
        drifts=drifts,
        sampling=sampling,
    )
    verdicts = [say.verdict(row) for row in rows(anatomy.ends)]
    anatomy = replace(anatomy, ends=anatomy.ends.assign(verdict=verdicts))
    sentences = [str(sentence) for sentence in say.sentences(anatomy.tables, stack.n_layers)]
    about = manifest.manifest(
        stack, tokens, seed=sampling.seed, found=sentences, length=length, resamples=sampling.resamples
    )
    by_file = {file: anatomy.tables[name] for file, name in NAMES.items() if name in anatomy.tables}
    for file, frame in by_file.items():
        tables.write(frame, folder / file, about, COLUMNS[file])
    if figures:
        drawn = draw.figures(by_file, stack.n_layers)
        disk.save({folder / f"{name}.png": png(figure) for name, figure in drawn.items()})
    return anatomy


def cost(n_layers: int, length: int = 2, *, kinds: bool = False) -> float:
    """Return what ``measure`` costs in F of all prompts, without ``utterances``, which cost 2 F of their own.

    One half of the prompts places the boundaries, which takes a readout of it at every layer besides; the other half
    is tested, as a whole and, where there are ``kinds``, in parts.

    >>> round(cost(12), 1), round(cost(30, kinds=True), 1)
    (4.4, 7.4)
    """
    placing, windows = 3.0, n_layers - length + 1
    testing = 4 + 2 * windows * (length - 1) / n_layers
    return (placing + testing * (1 + kinds)) / 2
