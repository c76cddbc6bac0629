"""A fresh middle on the page: what ``surgery graft`` and ``studies/fresh_middle.py`` leave in a folder, as a section.

``graft_methods.csv``, ``graft_curves.csv`` and ``graft_ledger.csv`` are always there; what the study adds (single
layers put back to random weights, answers by the steps they take, how the middle is wired) is shown where it is.
"""

import math
from typing import Any

import pandas as pd

from surgery.graft import draw as figures
from surgery.graft import say as words
from surgery.graft import study
from surgery.graft.study import CURVES, LEDGER, METHODS
from surgery.page.answers import UNDECIDED, Answer
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables
from surgery.page.charts import plot
from surgery.page.parts import Cell, Section, Table, cell, count_cell, number_cell, rows, tabled
from surgery.planning.budget import told

ALIKE = 0.01  # nats a token: a middle that adds less stands in for the layers
LAYERS, BY_K, WIRING = "graft_layers.csv", "graft_by_k.csv", "graft_wiring.csv"


def say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """How close the trained middles come (headlines, of the first seed), and what the study itself said."""
    methods, manifest, trained = tables[METHODS], manifests[METHODS], _trained(tables)
    n_layers = manifest["model"]["n_layers"]
    first = trained[trained["seed"] == trained["seed"].iloc[0]] if len(trained) else trained
    top = words.methods(first, n_layers) if len(first) else []
    stored = manifest["settings"].get("found") or words.methods(methods[methods["seed"].fillna(0) == 0], n_layers)
    lead = top[1] if len(top) > 1 else ""
    return [Sentence(text, headline=text in top, leads=text == lead) for text in dict.fromkeys((*stored, *top))]


def untold(tables: Tables, manifests: Manifests) -> list[str]:
    """What these tables leave open."""
    notes, trained = list[str](), _trained(tables)
    if trained["seed"].nunique() == 1:
        notes.append("Every middle was trained with one seed: its intervals are over prompts, not over random weights.")
    if trained["method"].nunique() > 1:
        notes.append(
            "Methods are compared with one schedule for all: learning rates were not searched for each, so small "
            "differences between methods may be due to them."
        )
    plan = manifests[METHODS]["settings"].get("plan")
    sentence = told(plan["budget"], plan["cuts"]) if plan else ""
    return [*notes, sentence] if sentence else notes


def draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """The curves of training."""
    return {"graft": Drawing(figures.curves(tables[CURVES], tables[METHODS]), figures.CURVES_CAPTION)}


def answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """Can a middle trained on stored activations stand in for the layers, and is that better than a linear map?"""
    methods, trained = tables[METHODS], _trained(tables)
    scored = trained.dropna(subset=["damage"])
    if scored.empty:
        return []
    best = scored.nsmallest(1, "damage").iloc[0]
    linear = methods[methods["method"].str.contains("linear") & methods["seed"].isna()]["damage"]
    null = (float(linear.iloc[0]),) * 2 if len(linear) else (math.nan, math.nan)
    layers = f"{int(best['start'])}:{int(best['stop'])}"
    question = f"Can a fresh middle stand in for layers {layers}?"
    low, high = float(best.get("damage_low", math.nan)), float(best.get("damage_high", math.nan))
    word = UNDECIDED  # also where there is no interval
    if high <= ALIKE:
        word = "yes"
    elif low > ALIKE:
        word = "in part" if high < null[0] else "no"
    measure = f"loss added by the best ({_method(best)}), nats a token:"
    return [Answer(question, word, measure, (float(best["damage"]), low, high), null, "a linear map", digits=3)]


def charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """What every method costs on held-out prompts."""
    frame = tables[METHODS].assign(method=[_method(row) for row in rows(tables[METHODS])])
    if frame["damage"].isna().all():
        return {}
    told = "Loss that every method of making a middle adds on held-out prompts, nats a token"
    columns = ["method", "damage", "damage_low", "damage_high", "unexplained", "exact", *study.SPENT]
    return {"graft": plot(frame[[name for name in columns if name in frame]], "damage", told=told)}


def section(tables: Tables, manifests: Manifests) -> Section:
    """What is trained on what, and what every method reached and spent."""
    paragraphs = [
        "The layers before and behind are frozen, bit for bit; a middle of random weights learns the update u = x_stop "
        "- x_start from activations that were stored once. unexplained is what is left of the variance of u: 0 the "
        "original, 1 the mean update; no middle at all reads more than 1. "
        "R^2 of x_stop itself would flatter: x_start is a part of it.",
        "A small unexplained is not a small damage (nats per predicted token): the linear map and the mean update, "
        "which take no training, show how much the one says about the other. Compare methods at equal operations; it "
        "matters whether the teacher's are among them, as the activations are paid for once, however many middles "
        "learn from them.",
    ]
    shown = [_methods(tables[METHODS])]
    if BY_K in tables:
        shown.append(_by_k(tables[BY_K]))
    if WIRING in tables:
        names = [name for name in ("S", "preference", "kappa", "kappa_excess") if name in tables[WIRING]]
        shown.append(
            tabled("Is the fresh middle wired like the old one?", "middle", rows(tables[WIRING]), names, _method, 3)
        )
    if LAYERS in tables:
        shown.append(_layers(tables[LAYERS]))
    shown.append(_ledger(tables[LEDGER]))
    return Section("graft", "A fresh middle", paragraphs=paragraphs, tables=shown)


def _trained(tables: Tables) -> pd.DataFrame:
    return tables[METHODS].dropna(subset=["seed"])


def _method(row: pd.Series) -> str:
    return str(row["method"]) if pd.isna(row["seed"]) else f"{row['method']}, seed {int(row['seed'])}"


def _methods(methods: pd.DataFrame) -> Table:
    scores = [name for name in ("damage", "unexplained", "exact") if name in methods]
    spent = [name for name in study.SPENT if name in methods]
    cells = [
        [
            Cell(_method(row)),
            *(cell(row, name, 3) for name in scores),
            *(count_cell(float(row[name])) for name in spent),
        ]
        for row in rows(methods)
    ]
    return Table("What every method reached on held-out prompts, and spent", ["method", *scores, *spent], cells)


def _by_k(table: pd.DataFrame) -> Table:
    mean = table.groupby(["method", "k"], sort=False)["exact"].agg(["mean", "min", "max", "size"])
    ks = list(dict.fromkeys(table["k"]))

    def over_seeds(method: str, k: int) -> Cell:
        row = mean.loc[[(method, k)]].iloc[0]
        low, high = (row["min"], row["max"]) if row["size"] > 1 else (math.nan, math.nan)
        return number_cell(row["mean"], low, high, 3)

    cells = [[Cell(str(method)), *(over_seeds(method, k) for k in ks)] for method in dict.fromkeys(table["method"])]
    caption = "Exact answers by the steps k that a problem takes; of several seeds mean [smallest, largest]"
    return Table(caption, ["method", *(f"k = {k}" for k in ks)], cells)


def _layers(table: pd.DataFrame) -> Table:
    names = ("damage", "damage_least", "damage_most", "damage_skip", "robust")
    caption = "Single layers put back to random weights, nats a token"
    return tabled(caption, "layer", rows(table), names, lambda row: str(int(row["layer"])), 3)


def _ledger(spent: pd.DataFrame) -> Table:
    cells = [
        [
            Cell(_method(row)),
            Cell(row["phase"]),
            Cell("teacher" if row["teacher"] else "student"),
            *(count_cell(float(row[name])) for name in ("tokens", "operations", "seconds")),
        ]
        for row in rows(spent)
    ]
    heads = ["method", "phase", "whose", "tokens", "operations", "seconds"]
    return Table("The ledger: operations are counted, not estimated; seconds are wall time", heads, cells)


CHAPTER = Chapter(
    "graft",
    study.COLUMNS | {LAYERS: {}, BY_K: {}, WIRING: {}},  # the last three are of studies/fresh_middle.py
    section,
    say,
    untold,
    draw,
    answers,
    charts,
    requires=(METHODS, CURVES, LEDGER),
)
