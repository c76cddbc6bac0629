"""A fresh middle on the page: what ``surgery graft`` and ``studies/fresh_middle.py`` leave in a folder, as a section.

``graft_methods.csv``, ``graft_curves.csv`` and ``graft_ledger.csv`` are always there; what the study adds (single
layers put back to random weights, answers by the steps they take, how the middle is wired) is shown where it is.
"""

from collections.abc import Mapping
from typing import Any

import pandas

from surgery.graft import study
from surgery.graft.study import CURVES, LEDGER, METHODS
from surgery.page import drawing
from surgery.page.parts import Cell, Picture, Section, Table, cell, tabled

LAYERS, BY_K, WIRING = "graft_layers.csv", "graft_by_k.csv", "graft_wiring.csv"
FILES = (METHODS, CURVES, LEDGER, LAYERS, BY_K, WIRING)

Tables = Mapping[str, pandas.DataFrame]


def found(tables: Tables, n_layers: int) -> list[str]:
    """How close the trained middles come: a sentence each, of the first seed."""
    trained = _trained(tables)
    return study.found(trained[trained["seed"] == trained["seed"].iloc[0]], n_layers) if len(trained) else []


def untold(tables: Tables) -> list[str]:
    """What these tables leave open."""
    notes, trained = list[str](), _trained(tables)
    if trained["seed"].nunique() == 1:
        notes.append(
            "Every middle was trained with one seed: its intervals speak of other prompts, not of other random weights."
        )
    if trained["method"].nunique() > 1:
        notes.append(
            "Methods are compared with one schedule for all: learning rates were not searched for each, so small "
            "differences between methods may be theirs."
        )
    return notes


def section(tables: Tables, manifest: Mapping[str, Any]) -> Section:
    """Sentences, curves, and what every method reached and spent; ``manifest`` is that of ``graft_methods.csv``."""
    methods, n_layers = tables[METHODS], manifest["model"]["n_layers"]
    said = manifest["settings"].get("found") or study.found(methods[methods["seed"].fillna(0) == 0], n_layers)
    paragraphs = [
        "The layers before and behind are frozen, bit for bit; a middle of random weights learns the update u = x_stop "
        "- x_start from activations that were stored once. unexplained is what is left of the variance of u: 0 the "
        "original, 1 the mean update; no middle at all reads more than 1. "
        "R^2 of x_stop itself would flatter: x_start is a part of it.",
        "A small unexplained is not a small damage (nats per predicted token): the linear map and the mean update, "
        "which take no training, say how much the one tells about the other. Methods are to be compared at equal "
        "operations, and whether the teacher's are among them decides: the activations are paid for once, however many "
        "middles learn from them.",
    ]
    picture = Picture("graft", study.CAPTION, drawing.png(study.draw(tables[CURVES], methods)))
    shown = [_methods(methods)]
    if BY_K in tables:
        shown.append(_by_k(tables[BY_K]))
    if WIRING in tables:
        rows = [row for _, row in tables[WIRING].iterrows()]
        names = [name for name in ("S", "R_over_N", "kappa", "kappa_excess") if name in tables[WIRING]]
        shown.append(tabled("Is the fresh middle wired like the old one?", "middle", rows, names, _method, 3))
    if LAYERS in tables:
        shown.append(_layers(tables[LAYERS]))
    shown.append(_ledger(tables[LEDGER]))
    return Section("graft", "A fresh middle", said, paragraphs, pictures=[picture], tables=shown)


def _trained(tables: Tables) -> pandas.DataFrame:
    return tables[METHODS].dropna(subset=["seed"])


def _method(row: pandas.Series) -> str:
    return str(row["method"]) if pandas.isna(row["seed"]) else f"{row['method']}, seed {int(row['seed'])}"


def _methods(methods: pandas.DataFrame) -> Table:
    scores = [name for name in ("damage", "unexplained", "exact") if name in methods]
    spent = [name for name in study.SPENT if name in methods]
    rows = [
        [Cell(_method(row)), *(cell(row, name, 3) for name in scores), *(_count(float(row[name])) for name in spent)]
        for _, row in methods.iterrows()
    ]
    return Table("What every method reached on held-out prompts, and spent", ["method", *scores, *spent], rows)


def _by_k(table: pandas.DataFrame) -> Table:
    mean = table.groupby(["method", "k"], sort=False)["exact"].agg(["mean", "min", "max", "size"])
    ks = list(dict.fromkeys(table["k"]))
    rows = [
        [Cell(str(name)), *(
            Cell(f"{one['mean']:.3f}", f"[{one['min']:.3f}, {one['max']:.3f}]" if one["size"] > 1 else "")
            for one in (mean.loc[(name, k)] for k in ks)
        )]
        for name in dict.fromkeys(table["method"])
    ]  # fmt: skip
    caption = "Exact answers by the steps k that a problem takes; of several seeds mean [smallest, largest]"
    return Table(caption, ["method", *(f"k = {k}" for k in ks)], rows)


def _layers(table: pandas.DataFrame) -> Table:
    names = ("damage", "damage_least", "damage_most", "damage_skip", "robust")
    rows = [row for _, row in table.iterrows()]
    caption = "Single layers put back to random weights, nats a token"
    return tabled(caption, "layer", rows, names, lambda row: str(int(row["layer"])), 3)


def _ledger(spent: pandas.DataFrame) -> Table:
    rows = [
        [Cell(_method(row)), Cell(row["phase"]), Cell("teacher" if row["teacher"] else "student"),
         *(_count(float(row[name])) for name in ("tokens", "operations", "seconds"))]
        for _, row in spent.iterrows()
    ]  # fmt: skip
    heads = ["method", "phase", "whose", "tokens", "operations", "seconds"]
    return Table("The ledger: operations are counted, not estimated; seconds are wall time", heads, rows)


def _count(value: float) -> Cell:
    """A number of things, or of very many."""
    return Cell("" if pandas.isna(value) else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}")
