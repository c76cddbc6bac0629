"""The tables that the anatomy of a model leaves in a folder: file names, meaning of columns, captions of figures."""

from surgery.anatomy import boundaries, convergence, ends_against_middle
from surgery.stats import changepoints

BOUNDARIES, SEGMENTS, DETECTORS = "anatomy_boundaries.csv", "anatomy_segments.csv", "anatomy_detectors.csv"
AGREEMENT, CONVERGENCE = "anatomy_agreement.csv", "anatomy_convergence.csv"
ENDS, BY_KIND = "anatomy_ends.csv", "anatomy_by_kind.csv"
COLUMNS: dict[str, dict[str, str]] = {
    BOUNDARIES: changepoints.COLUMNS,
    SEGMENTS: changepoints.COLUMNS,
    DETECTORS: boundaries.DETECTORS_COLUMNS,
    AGREEMENT: boundaries.AGREEMENT_COLUMNS,
    CONVERGENCE: convergence.COLUMNS,
    ENDS: ends_against_middle.COLUMNS,
    BY_KIND: boundaries.KINDS_COLUMNS,
}
NAMES = {file: file.removeprefix("anatomy_").removesuffix(".csv") for file in COLUMNS}  # as in ``Anatomy.tables``
CAPTIONS = {
    "anatomy_boundaries": "Above, the share of resampled prompts that put each boundary there: how stable it is, not "
    "whether it exists. Below, where every detector puts them by itself.",
    "anatomy_convergence": "How alike the stream is for the same content in different languages and for different "
    "content in the same language.",
    "anatomy_ends": "D, mean S of the ends minus mean S of the middle (below 0: the ends are more parallel), for each "
    "end too, and the same of R/R rotated.",
}
