"""Width, depth and walks on the page: what the studies of the size of a new middle and of its data leave in a folder.

``width_of_thought.csv`` (``surgery.graft.size_study``), ``walk_manifold.csv`` and ``walk_methods.csv`` (``surgery.graft.walk_study``):
what is there is shown.
"""

from collections.abc import Sequence

import pandas as pd

from surgery.graft import manifold, size_study, walk_study
from surgery.graft.size_study import SIZES
from surgery.graft.walk_study import MANIFOLD, METHODS
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables, headlines
from surgery.page.parts import Cell, Section, Table, number_cell, tabled
from surgery.stats import bootstrap

SCORES = (
    "on held-out prompts, mean over seeds [95 %]: unexplained, share of the update's variance; damage, nats per token; "
    "exact, share of answers; operations, the teacher's among them"
)


def say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """Is another size better; does a walk help more than what it costs (headlines)? Then by number of steps, the
    manifold, and every kind of walk."""
    said = list[Sentence]()
    if SIZES in tables:
        usual = _usual(manifests)
        said += headlines(size_study.found(tables[SIZES], usual))
        said += map(Sentence, size_study.found_by_k(tables[SIZES], usual))
    if MANIFOLD in tables:
        said += map(Sentence, manifold.found(tables[MANIFOLD]))
    if METHODS in tables:
        worth = walk_study.worth(tables[METHODS])
        said += headlines(worth)
        said += (Sentence(text) for text in walk_study.found(tables[METHODS]) if text not in worth)
    return said


def untold(tables: Tables, manifests: Manifests) -> list[str]:
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


def draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """A figure for each table that is there."""
    drawn = {
        SIZES: (size_study.draw, size_study.CAPTION),
        MANIFOLD: (manifold.figure, manifold.CAPTION),
        METHODS: (walk_study.draw, walk_study.CAPTION),
    }
    return {
        file.removesuffix(".csv"): Drawing(figure(tables[file]), caption)
        for file, (figure, caption) in drawn.items()
        if file in tables
    }


def section(tables: Tables, manifests: Manifests) -> Section:
    """What was compared, and the tables of what is there."""
    paragraphs, shown = list[str](), list[Table]()
    if SIZES in tables:
        usual, sizes = _usual(manifests), tables[SIZES]
        paragraphs.append(
            "New middles of other widths and depths: at equal tokens all make the same steps, at equal operations a "
            "smaller one makes more. Compared are ratios of held-out losses, seed by seed: above 1 is better than "
            f"the usual size, MLP width {usual[0]} and {usual[1]} layers."
        )
        shown.append(_sizes(sizes))
        compared = size_study.by_k(sizes, usual)
        if len(compared):
            shown.append(_by_k(compared))
    if MANIFOLD in tables:
        paragraphs.append(
            "Walked activations are on the manifold if no measure tells them from the same prompts unwalked; a step "
            "too small for these prompts to tell is not told. The distance from the mean alone is no evidence: a "
            "stationary walk keeps it by construction."
        )
        shown.append(_manifold(tables[MANIFOLD]))
    if METHODS in tables:
        paragraphs.append(
            "Relabelled: a share of each batch is walked and the original says what follows; unrelabelled: what "
            "follows is left as it was, which is noise. The operations of relabelling buy something else too: longer "
            "spends them on steps, more real on real data. A walk is worth its price if it helps more than these do."
        )
        shown.append(_methods(tables[METHODS]))
    return Section("middle", "Width, depth and walks", paragraphs=paragraphs, tables=shown)


def _usual(manifests: Manifests) -> tuple[int, int]:
    width, depth = manifests[SIZES]["settings"]["usual"]
    return width, depth


def _over_seeds(part: pd.DataFrame, names: Sequence[str]) -> list[Cell]:
    """Means with their t intervals."""
    cells = []
    for name in names:
        cells.append(number_cell(*bootstrap.t_interval(part[name].to_numpy()), digits=3))
    return cells


def _scores(frame: pd.DataFrame) -> list[str]:
    return [name for name in ("unexplained", "damage", "exact") if name in frame]


def _spent(part: pd.DataFrame) -> list[Cell]:
    return [Cell(f"{part['steps'].mean():,.0f}"), Cell(f"{part['operations_with_teacher'].mean():.2e}")]


def _sizes(frame: pd.DataFrame) -> Table:
    names, whole = _scores(frame), frame[frame["k"].isna()]
    rows = [
        [Cell(str(one)) for one in place] + _over_seeds(part, names) + _spent(part)
        for place, part in whole.groupby(["budget", "d_mlp", "depth"], sort=False)
    ]
    return Table(
        f"What every size reached; {SCORES}", ["equal", "width", "layers", *names, "steps", "operations"], rows
    )


def _by_k(compared: pd.DataFrame) -> Table:
    ks = list(dict.fromkeys(compared["k"]))
    rows = [
        [Cell(str(one)) for one in place]
        + [
            Cell(f"{one['exact']:.3f}", str(one["verdict"]) if one["verdict"] in ("better", "worse") else "")
            for k in ks
            for _, one in part[part["k"] == k].iterrows()
        ]
        for place, part in compared.groupby(["budget", "d_mlp", "depth"], sort=False)
    ]
    caption = (
        "Exact answers by the steps k that a problem takes, mean over seeds; better or worse than the usual size where "
        "the seeds, in pairs, tell"
    )
    return Table(caption, ["equal", "width", "layers", *(f"k = {k:.0f}" for k in ks)], rows)


def _manifold(frame: pd.DataFrame) -> Table:
    def label(row: pd.Series) -> str:
        return f"{row['kind']}, control" if row["control"] else str(row["kind"])

    caption = "Walked activations, their controls (as far in any direction) and the same prompts unwalked (real)"
    return tabled(caption, "kind", [row for _, row in frame.iterrows()], list(manifold.MEASURES), label, 2)


def _methods(frame: pd.DataFrame) -> Table:
    names = _scores(frame)
    rows = [
        [
            Cell(f"{amount:,.0f}"),
            Cell(str(name)),
            *_over_seeds(part, names),
            *_spent(part),
            Cell(f"{part['harvested'].mean():,.0f}"),
        ]
        for (amount, name), part in frame.groupby(["real_tokens", "method"], sort=False)
    ]
    caption = f"What every method reached by the amount of real tokens; {SCORES}; harvested, real tokens paid for"
    return Table(caption, ["real tokens", "method", *names, "steps", "operations", "harvested"], rows)


CHAPTER = Chapter("middle", {SIZES: size_study.COLUMNS} | walk_study.COLUMNS, section, say, untold, draw)
