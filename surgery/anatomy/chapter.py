"""The anatomy on the page: where the parts begin and end, and the ends against the middle."""

from surgery.anatomy import say as words
from surgery.anatomy import study
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables
from surgery.page.parts import Cell, Section, Table, cell, number_cell, rows


def say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """Where the parts divide; whether the ends are more parallel than the middle."""
    found = {study.NAMES[name]: frame for name, frame in tables.items() if name in study.NAMES}
    return words.sentences(found, _n_layers(manifests))


def draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """The boundaries by every detector, convergence, and D."""
    figures = study.draw(tables, _n_layers(manifests))
    return {name: Drawing(figure, study.CAPTIONS[name]) for name, figure in figures.items()}


def section(tables: Tables, manifests: Manifests) -> Section:
    """How the parts are found and tested, and the contrast of ends and middle."""
    paragraphs = [
        "Boundaries are placed on one half of the prompts by features of every layer that are not the ones tested; the "
        "ends are compared with the middle on the other half. D = mean S of the windows in the ends minus that in the "
        "middle: below 0 the ends are more parallel. It has to hold of R/N too: S grows with the size of updates.",
        "A smooth drift always looks divided: p_drift says how often one would be divided as clearly. Where it is not "
        "below .05, there are no parts to be found, wherever the boundaries were placed.",
    ]
    cells = [
        [
            Cell(row["kind"]),
            cell(row, "D"),
            cell(row, "D_over_N"),
            number_cell(row["p_windows"]),
            Cell(row["verdict"]),
        ]
        for row in rows(tables[study.ENDS])
    ]
    table = Table("The ends against the middle", ["prompts", "D", "of R/N", "p, windows", "verdict"], cells)
    return Section("anatomy", "Where the parts begin and end", paragraphs=paragraphs, tables=[table])


def _n_layers(manifests: Manifests) -> int:
    return int(manifests[study.ENDS]["model"]["n_layers"])


CHAPTER = Chapter(
    "anatomy",
    study.COLUMNS,
    section,
    say,
    draw=draw,
    requires=(study.ENDS, study.BOUNDARIES, study.SEGMENTS, study.DETECTORS, study.AGREEMENT, study.BY_KIND),
)
