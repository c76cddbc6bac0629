"""Width, depth and walks on the page: what the studies of the size of a new middle and of its data leave in a folder.

``width_of_thought.csv`` (``surgery.graft.size_study``), ``walk_manifold.csv`` and ``walk_methods.csv`` (``surgery.graft.walk_study``):
what is there is shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from surgery.graft import manifold, size_study, walk_study
from surgery.graft.chapter import Tables
from surgery.graft.size_study import SIZES
from surgery.graft.walk_study import MANIFOLD, METHODS
from surgery.page import drawing
from surgery.page.parts import Cell, Picture, Section, Table, tabled
from surgery.stats import bootstrap as stats

FILES = (SIZES, MANIFOLD, METHODS)
SCORES = (
    "on held-out prompts, mean over seeds [95 %]: unexplained, share of the update's variance; damage, nats per token; "
    "exact, share of answers; operations, the teacher's among them"
)

Manifests = Mapping[str, Mapping[str, Any]]


def found(tables: Tables, manifests: Manifests) -> list[str]:
    """Is another size better; does a walk help more than what it costs? Over seeds, a sentence each."""
    said = list[str]()
    if SIZES in tables:
        said += size_study.found(tables[SIZES], _usual(manifests))
    if METHODS in tables:
        said += walk_study.worth(tables[METHODS])
    return said


def untold(tables: Tables) -> list[str]:
    """What these tables leave open."""
    notes, trained = list[str](), [tables[name] for name in (SIZES, METHODS) if name in tables]
    if any(table["seed"].nunique() == 1 for table in trained):
        notes.append("New middles of another size or other data were trained with one seed: they cannot be compared.")
    elif trained:
        notes.append(
            "Sizes and methods are compared over few seeds, each comparison by itself: of twenty where nothing "
            "differs, one is said to differ."
        )
    if METHODS in tables:
        notes += walk_study.short(tables[METHODS])
        notes.append(
            "Kinds and sizes of walks were not searched: another step, or another share of walked prompts, may do "
            "what these do not."
        )
    return notes


def section(tables: Tables, manifests: Manifests) -> Section:
    """Sentences, figures and tables of ``FILES``; ``manifests`` by file name."""
    said, paragraphs = list[str](), list[str]()
    pictures, shown = list[Picture](), list[Table]()
    if SIZES in tables:
        usual, sizes = _usual(manifests), tables[SIZES]
        said += size_study.found(sizes, usual) + size_study.found_by_k(sizes, usual)
        paragraphs.append(
            "New middles of other widths and depths: at equal tokens all make the same steps, at equal operations a "
            "smaller one makes more. Compared are ratios of held-out losses, seed by seed: above 1 is better than "
            f"the usual size, MLP width {usual[0]} and {usual[1]} layers."
        )
        pictures.append(_picture(SIZES, size_study.CAPTION, size_study.draw(sizes)))
        shown.append(_sizes(sizes))
        compared = size_study.by_k(sizes, usual)
        if len(compared):
            shown.append(_by_k(compared))
    if MANIFOLD in tables:
        said += manifold.found(tables[MANIFOLD])
        paragraphs.append(
            "Walked activations are on the manifold if no measure tells them from the same prompts unwalked; a step "
            "too small for these prompts to tell is not told. The distance from the mean alone is no evidence: a "
            "stationary walk keeps it by construction."
        )
        pictures.append(_picture(MANIFOLD, manifold.CAPTION, manifold.figure(tables[MANIFOLD])))
        shown.append(_manifold(tables[MANIFOLD]))
    if METHODS in tables:
        said += walk_study.found(tables[METHODS])
        paragraphs.append(
            "Relabelled: a share of each batch is walked and the original says what follows; unrelabelled: what "
            "follows is left as it was, which is noise. The operations of relabelling buy something else too: longer "
            "spends them on steps, more real on real data. A walk is worth its price if it helps more than these do."
        )
        pictures.append(_picture(METHODS, walk_study.CAPTION, walk_study.draw(tables[METHODS])))
        shown.append(_methods(tables[METHODS]))
    return Section("middle", "Width, depth and walks", said, paragraphs, pictures=pictures, tables=shown)


def _usual(manifests: Manifests) -> tuple[int, int]:
    width, depth = manifests[SIZES]["settings"]["usual"]
    return width, depth


def _picture(file: str, caption: str, figure: drawing.Figure) -> Picture:
    return Picture(file.removesuffix(".csv"), caption, drawing.png(figure))


def _over_seeds(part: pandas.DataFrame, names: Sequence[str]) -> list[Cell]:
    """Means with their t intervals."""
    cells = []
    for name in names:
        mean, low, high = stats.t_interval(part[name].to_numpy())
        cells.append(Cell(f"{mean:.3f}", "" if low != low else f"[{low:.3f}, {high:.3f}]"))
    return cells


def _scores(frame: pandas.DataFrame) -> list[str]:
    return [name for name in ("unexplained", "damage", "exact") if name in frame]


def _spent(part: pandas.DataFrame) -> list[Cell]:
    return [Cell(f"{part['steps'].mean():,.0f}"), Cell(f"{part['operations_with_teacher'].mean():.2e}")]


def _sizes(frame: pandas.DataFrame) -> Table:
    names, whole = _scores(frame), frame[frame["k"].isna()]
    rows = [
        [Cell(str(one)) for one in place] + _over_seeds(part, names) + _spent(part)
        for place, part in whole.groupby(["budget", "d_mlp", "depth"], sort=False)
    ]
    return Table(
        f"What every size reached; {SCORES}", ["equal", "width", "layers", *names, "steps", "operations"], rows
    )


def _by_k(compared: pandas.DataFrame) -> Table:
    ks = list(dict.fromkeys(compared["k"]))
    rows = [
        [Cell(str(one)) for one in place] + [
            Cell(f"{one['exact']:.3f}", str(one["verdict"]) if one["verdict"] in ("better", "worse") else "")
            for k in ks for _, one in part[part["k"] == k].iterrows()
        ]
        for place, part in compared.groupby(["budget", "d_mlp", "depth"], sort=False)
    ]  # fmt: skip
    caption = (
        "Exact answers by the steps k that a problem takes, mean over seeds; better or worse than the usual size where "
        "the seeds, in pairs, tell"
    )
    return Table(caption, ["equal", "width", "layers", *(f"k = {k:.0f}" for k in ks)], rows)


def _manifold(frame: pandas.DataFrame) -> Table:
    def label(row: pandas.Series) -> str:
        return f"{row['kind']}, control" if row["control"] else str(row["kind"])

    caption = "Walked activations, their controls (as far in any direction) and the same prompts unwalked (real)"
    return tabled(caption, "kind", [row for _, row in frame.iterrows()], list(manifold.MEASURES), label, 2)


def _methods(frame: pandas.DataFrame) -> Table:
    names = _scores(frame)
    rows = [
        [Cell(f"{amount:,.0f}"), Cell(str(name)), *_over_seeds(part, names), *_spent(part),
         Cell(f"{part['harvested'].mean():,.0f}")]
        for (amount, name), part in frame.groupby(["real_tokens", "method"], sort=False)
    ]  # fmt: skip
    caption = f"What every method reached by the amount of real tokens; {SCORES}; harvested, real tokens paid for"
    return Table(caption, ["real tokens", "method", *names, "steps", "operations", "harvested"], rows)
