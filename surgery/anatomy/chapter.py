"""The anatomy on the page: where the parts begin and end, and the ends against the middle."""

import math
from typing import Any

import pandas as pd

from surgery.anatomy import draw, ends_against_middle, files, say
from surgery.page.answers import UNDECIDED, Answer
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables
from surgery.page.charts import plot
from surgery.page.parts import Cell, Section, Table, cell, number_cell, rows
from surgery.page.phrases import ends


def _say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """Where the parts divide; whether the ends are more parallel than the middle."""
    by_name = {files.NAMES[file]: frame for file, frame in tables.items() if file in files.NAMES}
    return say.sentences(by_name, _n_layers(manifests))


def _draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """The boundaries by every detector, convergence, and D."""
    figures = draw.figures(tables, _n_layers(manifests))
    return {name: Drawing(figure, files.CAPTIONS[name]) for name, figure in figures.items()}


def _section(tables: Tables, manifests: Manifests) -> Section:
    """How the parts are found and tested, and the contrast of ends and middle."""
    contrast = tables[files.ENDS]
    paragraphs = [
        "Boundaries are placed on one half of the prompts by features of every layer that are not the ones tested; the "
        "ends are compared with the middle on the other half. D = mean S of the windows in the ends minus that in the "
        "middle: below 0 the ends are more parallel. Both ends have to differ, and R/R rotated too: S grows with the "
        "size of updates, whoever reads them, and so does what rotated writes do.",
        "A smooth drift always looks divided: p_drift says how often one would be divided as clearly, corrected for "
        "all the kinds of evidence. Where it is not below .05, it is not shown that there are parts, wherever the "
        "boundaries were placed and however stable they are under resampling.",
    ]
    if (contrast["length"] == 2).all():
        paragraphs.append("In windows of two layers R and O are the same, so that S is one number, not two that agree.")
    cells = [
        [
            Cell(row["kind"]),
            cell(row, "D"),
            cell(row, "D_in"),
            cell(row, "D_out"),
            cell(row, "D_over_rotated"),
            number_cell(row["p_windows"]),
            number_cell(row["p_rotated"]),
            Cell(row["verdict"]),
        ]
        for row in rows(contrast)
    ]
    names = ["prompts", "D", "first end", "last end", "of R/R rotated", "p, windows", "p, rotated", "verdict"]
    table = Table("The ends against the middle", names, cells)
    return Section("anatomy", "Where the parts begin and end", paragraphs=paragraphs, tables=[table])


def _answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """Are there parts, where do they meet, and are the ends more parallel?"""
    segments = tables[files.SEGMENTS]
    two = segments[segments["breaks"] == 2].iloc[0]
    first = tables[files.BOUNDARIES].sort_values("probability", ascending=False).drop_duplicates("boundary")
    where = " and ".join(str(int(layer)) for layer in sorted(first["layer"]))
    word = "not shown"
    if two["p_drift"] < say.SURE:
        word = f"before layers {where}"
    elif two["power"] >= say.STABLE:
        word = "no parts"
    share = (float(two["gain"]), math.nan, math.nan)
    drift = (float(two["gain_drift"]),) * 2
    borders = "Where do translation and reasoning meet?"
    measure = "share of how layers differ that three parts explain:"
    contrast = tables[files.ENDS].iloc[0]
    words = {"supported": "yes", "contradicted": "no, more serial"}
    word_ends = words.get(ends_against_middle.verdict(contrast), UNDECIDED)
    numbers = ends(contrast, "D")
    parallel = "Are the translation blocks wired more in parallel?"
    difference = f"D, S of the ends minus S of the middle (p {contrast['p_windows']:.3f} with windows shuffled):"
    return [
        Answer(borders, word, measure, share, drift, "of smooth drift"),
        Answer(parallel, word_ends, difference, numbers, (0.0, 0.0), "alike", digits=3),
    ]


def _charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """How stable every boundary is."""
    frame = tables[files.BOUNDARIES]
    names = [f"{name}, before layer {layer:g}" for name, layer in zip(frame["boundary"], frame["layer"])]
    shares = pd.DataFrame({"boundary": names, "share": frame["probability"]})
    told = (
        "Share of resampled prompts that put each boundary (in: where the middle begins, out: where it ends) before "
        "that layer: how stable it is, not whether it exists"
    )
    return {"anatomy": plot(shares[shares["share"] > 0.02], "share", told=told)}


def _n_layers(manifests: Manifests) -> int:
    return int(manifests[files.ENDS]["model"]["n_layers"])


CHAPTER = Chapter(
    "anatomy",
    files.COLUMNS,
    _section,
    _say,
    draw=_draw,
    answers=_answers,
    charts=_charts,
    requires=(files.ENDS, files.BOUNDARIES, files.SEGMENTS, files.DETECTORS, files.AGREEMENT, files.BY_KIND),
)
