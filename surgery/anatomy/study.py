"""What ``anatomy.locate`` found on one model, as files: ``anatomy_*.csv`` and figures. ``surgery study anatomy``.

anatomy_boundaries.csv     probability of each boundary by layer, over resampled prompts
anatomy_segments.csv       numbers of breaks compared, on held-out prompts and with smooth drift
anatomy_detectors.csv      where every kind of evidence puts the boundaries by itself
anatomy_agreement.csv      how far the detectors are apart
anatomy_convergence.csv    content against language by layer, where there are parallel sentences
anatomy_ends.csv           the ends against the middle: S and R/N, by kind of prompt; the sentences are in its manifest
anatomy_by_kind.csv        whether that depends on what is asked
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from surgery.anatomy import boundaries as anatomy
from surgery.anatomy import convergence, ends_against_middle, say
from surgery.anatomy import draw as anatomy_figures
from surgery.anatomy.boundaries import Anatomy
from surgery.anatomy.convergence import Sentence
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.records import manifest as provenance
from surgery.records import tables as frames
from surgery.stats import changepoints
from surgery.stats.sampling import Sampling

BOUNDARIES, SEGMENTS, DETECTORS = "anatomy_boundaries.csv", "anatomy_segments.csv", "anatomy_detectors.csv"
AGREEMENT, CONVERGENCE = "anatomy_agreement.csv", "anatomy_convergence.csv"
ENDS, BY_KIND = "anatomy_ends.csv", "anatomy_by_kind.csv"
COLUMNS: dict[str, dict[str, str]] = {
    BOUNDARIES: changepoints.COLUMNS,
    SEGMENTS: changepoints.COLUMNS,
    DETECTORS: anatomy.DETECTORS_COLUMNS,
    AGREEMENT: anatomy.AGREEMENT_COLUMNS,
    CONVERGENCE: convergence.COLUMNS,
    ENDS: ends_against_middle.COLUMNS,
    BY_KIND: anatomy.KINDS_COLUMNS,
}
NAMES = {file: file.removeprefix("anatomy_").removesuffix(".csv") for file in COLUMNS}  # as in ``Anatomy.tables``
CAPTIONS = {
    "anatomy_boundaries": "Above, the probability of each boundary over resampled prompts; below, where every detector "
    "puts them by itself.",
    "anatomy_convergence": "How alike the stream is for the same content in different languages and for different "
    "content in the same language.",
    "anatomy_ends": "D, mean S of the ends minus mean S of the middle (below 0: the ends are more parallel), and the "
    "same of R/N.",
}


def measure(
    stack: Stack,
    tokens: Tokens,
    folder: Path,
    kinds: Sequence[str] | None = None,
    *,
    said: Sequence[Sentence] | None = None,
    scanned: pd.DataFrame | None = None,
    metric: str = "loglik",
    length: int = 2,
    sampling: Sampling = anatomy.SAMPLING,
) -> Anatomy:
    """``anatomy.locate`` on an opened model, its frames and figures written to ``folder``. Cost: that of the study."""
    found = anatomy.locate(
        stack, tokens, kinds, said=said, scanned=scanned, metric=metric, length=length, sampling=sampling
    )
    sentences = [str(sentence) for sentence in say.sentences(found.tables, stack.n_layers)]
    manifest = provenance.manifest(
        stack, tokens, seed=sampling.seed, found=sentences, length=length, resamples=sampling.resamples
    )
    tables = {file: found.tables[name] for file, name in NAMES.items() if name in found.tables}
    for file, frame in tables.items():
        frames.write(frame, folder / file, manifest, COLUMNS[file])
    drawn = draw(tables, stack.n_layers)
    frames.save({folder / f"{name}.png": drawing.png(figure) for name, figure in drawn.items()})
    return found


def draw(tables: Mapping[str, pd.DataFrame], n_layers: int) -> dict[str, Figure]:
    """The figures of what ``measure`` wrote, by the name of their file."""
    drawn = {
        "anatomy_boundaries": anatomy_figures.boundaries(tables[BOUNDARIES], tables[DETECTORS], n_layers),
        "anatomy_ends": anatomy_figures.ends(tables[ENDS]),
    }
    if CONVERGENCE in tables:
        drawn["anatomy_convergence"] = anatomy_figures.convergence(tables[CONVERGENCE])
    return drawn
