"""Width, depth and walks on the page: what the studies of the size of a new middle and of its data leave in a folder.

That is ``width_of_thought.csv`` (``surgery.graft.size_study``), ``walk_manifold.csv`` and ``walk_methods.csv``
(``surgery.graft.walk_study``); those that are there are shown.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from surgery.graft import draw as figures
from surgery.graft import manifold, size_study, walk_study
from surgery.graft import say as words
from surgery.graft.size_study import SIZES
from surgery.graft.walk_study import MANIFOLD, METHODS
from surgery.page import phrases
from surgery.page.answers import UNDECIDED, Answer
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables, headlines
from surgery.page.charts import plot
from surgery.page.parts import Cell, Section, Table, count_cell, number_cell, rows, tabled
from surgery.stats.bootstrap import t_interval
from surgery.stats.claims import ABOVE, Effect, sides
from surgery.stats.claims import UNDECIDED as UNDECIDED_SIDE

SCORES = (
    "on held-out prompts, mean over seeds [95 %]: unexplained, share of the update's variance; damage, nats per token; "
    "exact, share of answers; operations, the teacher's among them"
)


def say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """Is another size better (headlines), and by the number of steps? Are walked activations on the manifold? What does
    each kind of walk help, and is it worth its price (headlines)?"""
    sentences = list[Sentence]()
    if SIZES in tables:
        usual = _usual(manifests)
        sentences += headlines(words.sizes(tables[SIZES], usual))
        sentences += map(Sentence, words.sizes_by_k(size_study.by_k(tables[SIZES], usual), usual))
    if MANIFOLD in tables:
        sentences += map(Sentence, words.walked_activations(tables[MANIFOLD]))
    if METHODS in tables:
        worth = words.walks_for_their_price(tables[METHODS])
        sentences += (Sentence(text, headline=text in worth) for text in words.walks(tables[METHODS]))
    return sentences


def untold(tables: Tables, manifests: Manifests) -> list[str]:
    """What these tables leave open."""
    notes, trained = list[str](), [tables[name] for name in (SIZES, METHODS) if name in tables]
    if any(table["seed"].nunique() == 1 for table in trained):
        notes.append("New middles of another size or other data were trained with one seed: they cannot be compared.")
    elif trained:
        notes.append(
            "Sizes and methods are compared over few seeds, and claims are corrected for the number of comparisons: "
            "undecided means that more seeds are needed, not that nothing differs."
        )
    if METHODS in tables:
        notes += words.short_of_real_data(tables[METHODS])
        notes.append(
            "Kinds and sizes of walks were not searched: another step, or another share of walked prompts, may do "
            "what these do not."
        )
    return notes


def draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """A figure for each table that is there."""
    drawn = {
        SIZES: (figures.sizes, figures.SIZES_CAPTION),
        MANIFOLD: (figures.walked_activations, figures.WALKED_CAPTION),
        METHODS: (figures.walks, figures.WALKS_CAPTION),
    }
    return {
        file.removesuffix(".csv"): Drawing(figure(tables[file]), caption)
        for file, (figure, caption) in drawn.items()
        if file in tables
    }


def answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """Is another width or depth better, and does a walk help more than it costs?"""
    found = []
    if SIZES in tables:
        ratios = words.ratios(tables[SIZES], _usual(manifests))
        question, measure = "Is a wider or narrower middle better?", "times as small a loss"
        found.append(_answer(question, measure, ratios, words.TIMES, "the usual size", as_ratio=True))
    if METHODS in tables:
        question, measure = "Does walking in the input space help training?", "share of the update's variance"
        found.append(_answer(question, measure, words.gains(tables[METHODS]), words.GAINED, "real data alone"))
    return [answer for answer in found if answer]


def _answer(
    question: str, measure: str, effects: Mapping[str, Effect], least: float, null: str, *, as_ratio: bool = False
) -> Answer | None:
    """Whether any of several effects is surely more than the least that matters, and the largest of them."""
    defined = {name: effect for name, effect in effects.items() if not math.isnan(effect.value)}
    if not defined:
        return None
    claims = sides([*effects.values()], np.log(least) if as_ratio else least)
    word = "yes" if ABOVE in claims else UNDECIDED if UNDECIDED_SIDE in claims else "no"
    name = max(defined, key=lambda one: defined[one].value)
    ends = [defined[name].value, defined[name].low, defined[name].high]
    value, low, high = (float(np.exp(end)) for end in ends) if as_ratio else ends
    none = (1.0, 1.0) if as_ratio else (0.0, 0.0)
    return Answer(question, word, f"{name[0].lower()}{name[1:]}, {measure}:", (value, low, high), none, null, digits=3)


def charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """What every size and every walk reached, mean over seeds."""
    drawn = {}
    if SIZES in tables:
        whole = tables[SIZES][tables[SIZES]["k"].isna()]
        frame = _means(whole, ["budget", "d_mlp", "depth"], "unexplained")
        names = [f"{row['d_mlp']} x {row['depth']}, equal {row['budget']}" for row in rows(frame)]
        told = "What middles (MLP width x layers) leave unexplained, mean over seeds with its 95 % interval"
        drawn["sizes"] = plot(frame.assign(size=names)[["size", *_ENDS]], "unexplained", told=told)
    if METHODS in tables:
        frame = _means(tables[METHODS], ["real_tokens", "method"], "unexplained")
        names = [f"{row['method']}, {row['real_tokens'] / 1000:g}k" for row in rows(frame)]
        told = (
            "What every method leaves unexplained by thousands of real tokens, mean over seeds with its 95 % interval"
        )
        drawn["walks"] = plot(frame.assign(how=names)[["how", *_ENDS]], "unexplained", told=told)
    return drawn


_ENDS = ["unexplained", "unexplained_low", "unexplained_high"]


def _means(frame: pd.DataFrame, by: list[str], name: str) -> pd.DataFrame:
    """The mean of a column over seeds, with its t interval, a row per group."""
    found = [
        dict(zip(by, group)) | dict(zip((name, f"{name}_low", f"{name}_high"), t_interval(part[name].to_numpy())))
        for group, part in frame.groupby(by, sort=False)
    ]
    return pd.DataFrame(found)


def section(tables: Tables, manifests: Manifests) -> Section:
    """What was compared, and the tables of what is there."""
    paragraphs, shown = list[str](), list[Table]()
    if SIZES in tables:
        usual, sizes = _usual(manifests), tables[SIZES]
        paragraphs.append(
            "New middles of other widths and depths: at equal tokens all make the same steps, at equal operations a "
            "smaller one makes more. Compared are ratios of held-out losses, seed by seed: above 1 is better than "
            f"the usual size, MLP width {usual[0]} and {usual[1]} layers, and {words.TIMES} times is the least that "
            "matters."
        )
        shown.append(_sizes(sizes))
        compared = size_study.by_k(sizes, usual)
        if len(compared):
            shown.append(_by_k(compared))
    if MANIFOLD in tables:
        changes = ", ".join(f"{name} {least}" for name, least in words.JUDGED_BY.values())
        paragraphs.append(
            f"Walked activations are on the manifold if no measure has changed by more than matters ({changes}) from "
            "the same prompts unwalked, and undecided where these are too few to tell. The distance from the mean is "
            "no evidence by itself: a stationary walk keeps it by construction."
        )
        shown.append(_manifold(tables[MANIFOLD]))
    if METHODS in tables:
        paragraphs.append(
            "Relabelled: a share of each batch is walked, and the original gives x_stop for it; unrelabelled: x_stop "
            "is left as it was, which is noise. The operations of relabelling could buy something else: longer spends "
            "them on steps, more real on real data. A walk is worth its price if it helps more than these do, by "
            f"{words.GAINED} of the update's variance or more."
        )
        shown.append(_methods(tables[METHODS]))
    return Section("middle", "Width, depth and walks", paragraphs=paragraphs, tables=shown)


def _usual(manifests: Manifests) -> tuple[int, int]:
    width, depth = manifests[SIZES]["settings"]["usual"]
    return width, depth


def _over_seeds(part: pd.DataFrame, names: Sequence[str]) -> list[Cell]:
    """Means with their t intervals."""
    return [number_cell(*t_interval(part[name].to_numpy()), digits=3) for name in names]


def _scores(frame: pd.DataFrame) -> list[str]:
    return [name for name in ("unexplained", "damage", "exact") if name in frame]


def _spent(part: pd.DataFrame) -> list[Cell]:
    """Steps and operations, the teacher's among them, mean over seeds."""
    return [count_cell(part["steps"].mean()), Cell(f"{part['operations_with_teacher'].mean():.2e}")]


def _sizes(frame: pd.DataFrame) -> Table:
    names, whole = _scores(frame), frame[frame["k"].isna()]
    cells = [
        [Cell(str(value)) for value in size] + _over_seeds(part, names) + _spent(part)
        for size, part in whole.groupby(["budget", "d_mlp", "depth"], sort=False)
    ]
    heads = ["equal", "width", "layers", *names, "steps", "operations"]
    return Table(f"What every size reached; {SCORES}", heads, cells)


def _by_k(compared: pd.DataFrame) -> Table:
    ks = list(dict.fromkeys(compared["k"]))

    def exact(row: pd.Series) -> Cell:
        return Cell(phrases.value(row["exact"], 3), row["verdict"] if row["verdict"] in ("better", "worse") else "")

    cells = [
        [Cell(str(value)) for value in size] + [exact(row) for k in ks for row in rows(part[part["k"] == k])]
        for size, part in compared.groupby(["budget", "d_mlp", "depth"], sort=False)
    ]
    caption = (
        "Exact answers by the steps k that a problem takes, mean over seeds; better or worse than the usual size "
        "where the seeds, in pairs, decide"
    )
    return Table(caption, ["equal", "width", "layers", *(f"k = {k:.0f}" for k in ks)], cells)


def _manifold(frame: pd.DataFrame) -> Table:
    def label(row: pd.Series) -> str:
        return f"{row['kind']}, control" if row["control"] else str(row["kind"])

    caption = "Walked activations, their controls (as far, in any direction) and the same prompts unwalked (real)"
    return tabled(caption, "kind", rows(frame), list(manifold.MEASURES), label, 2)


def _methods(frame: pd.DataFrame) -> Table:
    names = _scores(frame)
    cells = [
        [
            Cell(f"{amount:,.0f}"),
            Cell(str(name)),
            *_over_seeds(part, names),
            *_spent(part),
            count_cell(part["harvested"].mean()),
        ]
        for (amount, name), part in frame.groupby(["real_tokens", "method"], sort=False)
    ]
    caption = f"What every method reached by the amount of real tokens; {SCORES}; harvested, real tokens paid for"
    return Table(caption, ["real tokens", "method", *names, "steps", "operations", "harvested"], cells)


CHAPTER = Chapter(
    "middle", {SIZES: size_study.COLUMNS} | walk_study.COLUMNS, section, say, untold, draw, answers, charts
)
