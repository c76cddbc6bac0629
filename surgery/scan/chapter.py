"""What rewiring does, on the page: the best wirings of a scan, and what they are worth on fresh probes."""

from typing import Any

import pandas as pd

from surgery.page.answers import UNDECIDED, Answer
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables
from surgery.page.charts import plot
from surgery.page.parts import Cell, Section, Table, cell, number_cell, rows
from surgery.scan import draw as figures
from surgery.scan import say as words
from surgery.scan import study
from surgery.scan.halving import Effort
from surgery.scan.worth import CONTROLS_COLUMNS, Baseline
from surgery.stats import comparisons
from surgery.stats.comparisons import Luck


def say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """What the scan found, then by group of probes, and the reorderings of Sun et al."""
    luck, found = Luck(**_settings(manifests)["luck"]), Baseline(**_settings(manifests)["baseline"])
    told = words.findings(
        tables[study.TABLE], tables[study.WINNERS], luck, found, tables[study.CONTROLS], _effort(manifests)
    )
    worth = told[-1:] if not found.done else words.validation(tables[study.WINNERS], found.metric)[-1:]
    sentences = [Sentence(text, headline=True, leads=text in worth) for text in told]
    groups = tables[study.GROUPS].fillna({"group": ""})  # a CSV file has no empty text
    sentences += map(Sentence, words.best_groups(groups, found))
    if study.PAINTERS in tables and found.done:
        sentences += map(Sentence, words.painters(tables[study.PAINTERS], found.metric))
    return sentences


def untold(tables: Tables, manifests: Manifests) -> list[str]:
    """What the scan leaves open."""
    found = Baseline(**_settings(manifests)["baseline"])
    notes = words.limits(tables[study.TABLE], tables[study.WINNERS], _effort(manifests)) if found.done else []
    return notes + words.planned(_settings(manifests).get("plan"))


def draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """The map of spans, gain against depth, gains by group, the reorderings: those there are tables for."""
    return figures.of_scan(
        tables[study.TABLE],
        tables[study.GROUPS],
        manifests[study.TABLE]["model"]["n_layers"],
        _settings(manifests)["metric"],
        tables.get(study.PAINTERS),
    )


def section(tables: Tables, manifests: Manifests) -> Section:
    """How gains are measured twice, and the table of winners."""
    paragraphs = [
        "The model is run with its layers in another order (a wiring, in the notation of Python's slices: ':8 4:' runs "
        "layers 4 to 7 twice) and compared on the same probes with itself unmodified. "
        f"Gains are in {figures.UNITS[_settings(manifests)['metric']]}. The largest of many gains is large partly by "
        "luck. So one half of the probes chooses, and the largest are measured again on the other half, which took no "
        "part in the choice: that column is what to believe.",
        "p_max asks whether the luckiest of all wirings would reach as much if none had any effect (of all that were "
        "tried in the search, of those in the table on fresh probes). Verdicts: survived, better on fresh probes by "
        "p_max < .05; in part, by less than claimed; vanished, less than claimed and not shown to be better; "
        "undecided, too few probes to exclude either; reversed, worse; not finite, no finite number on some probe.",
        "Withdrawn: as a temperature, where one temperature for the logits of the unmodified model (chosen on the "
        "search half) gains as much for all that is shown; too small to matter; not above chance, where the model does "
        "not do the task. Beside each gain in likelihood stand its gain in right answers and the share of it that the "
        "temperature gains.",
    ]
    heads = [
        "wiring",
        "gain, search half",
        "p_max",
        "gain, validation half",
        "p_max",
        "survived",
        "right answers",
        "by a temperature",
        "verdict",
    ]
    cells = [
        [
            Cell(row["wiring"]),
            _gain_cell(row, "search"),
            number_cell(row["p_max_search"], digits=3),
            _gain_cell(row, "validation"),
            number_cell(row["p_max_validation"], digits=3),
            cell(row, "survived"),
            number_cell(row["answers"], row["answers_low"], row["answers_high"], 3),
            number_cell(row["by_temperature"]),
            Cell(row["verdict"]),
        ]
        for row in rows(tables[study.WINNERS])
    ]
    table = Table("The largest gains of the search half, and what they are worth on fresh probes", heads, cells)
    return Section("scan", "What rewiring does", paragraphs=paragraphs, tables=[table])


def answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """Does any rewiring help on fresh probes?"""
    found, winners = Baseline(**_settings(manifests)["baseline"]), tables[study.WINNERS]
    question = "Does it help to run layers again, or in another order?"
    if not found.sound or not found.done:
        return [Answer(question, "not asked: the model cannot do the task")]
    judged = winners.dropna(subset=["gain_validation"])
    if judged.empty:
        return [Answer(question, "no")]
    confirmed = judged[judged["verdict"].isin(["survived", "survived in part"])]
    best = (confirmed if len(confirmed) else judged).nlargest(1, "gain_validation").iloc[0]
    word = "not shown" if UNDECIDED in set(winners["verdict"]) else "no"
    if len(confirmed):
        word = f"yes: {len(confirmed)} of {len(tables[study.TABLE])}"
    effect = (float(best["gain_validation"]), float(best["gain_low_validation"]), float(best["gain_high_validation"]))
    measure = f"best on fresh probes, {best['wiring']}, {figures.UNITS[found.metric]}:"
    if best["verdict"] == "as a temperature":  # held to what it is not shown to exceed
        null, name = (float(best["temperature"]),) * 2, "one temperature for all logits"
    else:
        null, name = (0.0, 0.0), "the model as it is"
    return [Answer(question, word, measure, effect, null, name)]


def charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """The winners on fresh probes."""
    named = {f"{end}_validation": end for end in ("gain", "gain_low", "gain_high")}
    frame = tables[study.WINNERS].rename(columns=named)
    if frame["gain"].isna().all():
        return {}
    told = f"What the largest gains of the search half are worth on fresh probes, {figures.UNITS[_metric(manifests)]}"
    columns = ["wiring", "gain", "gain_low", "gain_high", "gain_search", "answers", "by_temperature", "verdict"]
    return {"scan": plot(frame[[name for name in columns if name in frame]], "gain", told=told)}


def _metric(manifests: Manifests) -> str:
    return str(_settings(manifests)["metric"])


def _gain_cell(row: pd.Series, half: str) -> Cell:
    return number_cell(row[f"gain_{half}"], row[f"gain_low_{half}"], row[f"gain_high_{half}"], 3)


def _effort(manifests: Manifests) -> Effort | None:
    effort = _settings(manifests).get("effort")
    return effort and Effort(**effort)


def _settings(manifests: Manifests) -> dict[str, Any]:
    return manifests[study.TABLE]["settings"]


CHAPTER = Chapter(
    "scan",
    {
        study.TABLE: comparisons.COLUMNS,
        study.WINNERS: study.WINNERS_COLUMNS,
        study.GROUPS: comparisons.COLUMNS,
        study.CONTROLS: CONTROLS_COLUMNS,
        study.PAINTERS: study.PAINTERS_COLUMNS,
    },
    section,
    say,
    untold,
    draw,
    answers,
    charts,
    requires=(study.TABLE, study.WINNERS, study.GROUPS, study.CONTROLS),
)
