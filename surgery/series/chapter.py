"""Series or parallel on the page: every window, the networks whose answer is known, and all measures side by side."""

import math
from typing import Any

import pandas as pd

from surgery.page.answers import UNDECIDED, Answer
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables, headlines
from surgery.page.charts import plot
from surgery.page.parts import Cell, Section, Table, model_name, number_cell, rows, spread_cell, tabled
from surgery.page.phrases import ends
from surgery.series import draw as figures
from surgery.series import say as words
from surgery.series import side_by_side, window
from surgery.stats.claims import ABOVE, BELOW, WITHIN

WINDOWS, NETWORKS = "series_windows.csv", "calibration.csv"
MEASURES_FILE, COSTS_FILE = "measures.csv", "costs.csv"
UNTRAINED = "this model untrained"  # in the column ``network``
NETWORKS_COLUMNS = window.COLUMNS | {"network": "which network the row is about"}


# --- every window of the model ---------------------------------------------------------------------------------------


def say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """Say how serial the model is, against its nulls, and what running it in parallel costs."""
    return headlines(words.windows(tables[WINDOWS]))


def untold(tables: Tables, manifests: Manifests) -> list[str]:
    """State what the windows leave undecided."""
    return words.limits(tables[WINDOWS])


def draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """Draw S and the preference of every window."""
    caption = f"S and the preference of every window measured; the numbers are in {WINDOWS}."
    return {"series": Drawing(figures.windows(tables[WINDOWS]), caption)}


def section(tables: Tables, manifests: Manifests) -> Section:
    """Explain S and its nulls, and show the windows that the sentences speak of."""
    frame = tables[WINDOWS]
    paragraphs = [
        "S = (R + O) / 2 asks whether the layers of a window depend on one another. R compares what each layer "
        "writes with what it would write given the stream that enters the window; O compares what the whole window "
        "writes with what its layers write side by side. Both are 0 if no layer reads another, 1 if each lives only "
        "on the one before. The normalisation is frozen at the clean run; S_live lets it move.",
        "A layer also changes its output simply because the stream has moved, so S grows with the size of updates. Two "
        "nulls stand beside it. S matched is S of the same architecture with fresh weights and updates of the same "
        "size, layer by layer. Preference is how much more a layer responds to what the window wrote before it than to "
        "the same turned at random: 1 without preference, below 1 if it rather reads what was there before. N, how far "
        "the stream moved relative to its size, is no null. Compare windows of equal length.",
    ]
    chosen = words.thirds(frame) + [row for row in [words.whole_window(frame)] if row is not None]
    pairs = frame[frame["stop"] - frame["start"] == 2]
    columns = [
        name
        for name in (
            "S",
            "S_matched",
            "S_excess",
            "R",
            "O",
            "preference",
            "R_over_rotated",
            "R_shuffled",
            "N",
            "S_live",
            "loss_parallel_sum",
        )
        if name in frame
    ]
    shown = [
        tabled("Three windows of equal length, and all layers but the first", "window", chosen, columns, _span),
        tabled("Neighbours: windows of two layers", "window", rows(pairs), columns, _span),
    ]
    return Section("series", "Series or parallel", paragraphs=paragraphs, tables=shown)


def answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """Do layers work in series, beside untrained ones; and what does running them side by side cost?"""
    row = words.main(tables[WINDOWS])
    reason, found = words.withheld(row, "S"), words.sides_of(row)
    word = {ABOVE: "in series", BELOW: "in parallel", WITHIN: "as untrained layers do"}.get(
        found.get("S", ""), UNDECIDED
    )
    null = ends(row, "S_matched")[1:] if "S_matched" in row else (math.nan, math.nan)
    question = "Do the layers work in series or in parallel?"
    measure = f"S of layers {words.span(row)}:"
    result = [Answer(question, UNDECIDED if reason else word, measure, ends(row, "S"), null, "untrained layers")]
    if "loss_parallel_sum" in row:
        word = words.priced(row)
        measure = f"loss of layers {words.span(row)} side by side, nats a token:"
        cost = ends(row, "loss_parallel_sum")
        result.append(Answer("Can they all run side by side?", word, measure, cost, (0.0, 0.0), "no loss"))
    return result


def charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """S of every window."""
    told = "S of every window of layers: 0 parallel, 1 serial; first layer across, last layer up"
    return {"series": plot(tables[WINDOWS], "S", told=told)}


CHAPTER = Chapter(
    "series",
    {WINDOWS: window.COLUMNS},
    section,
    say,
    untold,
    draw,
    answers,
    charts,
    requires=(WINDOWS,),
    same_prompts=True,
)


# --- networks whose answer is known ----------------------------------------------------------------------------------


def _say_networks(tables: Tables, manifests: Manifests) -> list[Sentence]:
    return headlines(words.known_networks(tables[NETWORKS]))


def _draw_networks(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    if WINDOWS not in tables:
        return {}
    figure = figures.known_networks(tables[NETWORKS], tables[WINDOWS], model_name(manifests[WINDOWS]))
    return {"calibration": Drawing(figure, "S on networks of known structure and on the model, every window.")}


def _networks_section(tables: Tables, manifests: Manifests) -> Section:
    networks = tables[NETWORKS]
    paragraphs = [
        "Before the measure is trusted, it is tried on networks whose structure was decided when their weights were "
        "written: parallel (every layer reads the embedding alone), serial (every layer reads only the one before), "
        "mixtures of the two, a linear network whose layers prefer nothing (preference must be 1, and R = N), and "
        "untrained random ones (preference about 1)."
    ]
    parts = [(str(name), part) for name, part in networks.groupby("network", sort=False)]
    if WINDOWS in tables:
        model = tables[WINDOWS]
        parts.append((model_name(manifests[WINDOWS]), model[model["start"] > 0]))
    columns = [column for column in ("S", "R", "O", "S_live", "preference", "R_over_N") if column in networks]
    cells = [
        [Cell(name), Cell(str(len(part))), *(spread_cell(part[column]) for column in columns)] for name, part in parts
    ]
    caption = "Median over windows [smallest, largest]; the model's windows from layer 1 on."
    table = Table(caption, ["network", "windows", *columns], cells)
    return Section("calibration", "Networks whose answer is known", paragraphs=paragraphs, tables=[table])


def _answers_networks(tables: Tables, manifests: Manifests) -> list[Answer]:
    grouped = tables[NETWORKS].groupby("network", sort=False)["S"]
    built = {str(name): (float(S.median()), float(S.min()), float(S.max())) for name, S in grouped}
    word = "yes" if words.sound(tables[NETWORKS]) else "no"
    question = "Does S read what it must on networks whose answer is known?"
    return [
        Answer(question, word, "S of the serial one:", built["serial"], built["parallel"][1:], "of the parallel one")
    ]


def _charts_networks(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    grouped = tables[NETWORKS].groupby("network", sort=False)["S"]
    frame = grouped.agg(S="median", S_low="min", S_high="max").reset_index()
    told = "S of networks of known structure: median over windows, and the smallest and largest"
    return {"calibration": plot(frame, "S", told=told)}


CALIBRATION = Chapter(
    "calibration",
    {NETWORKS: NETWORKS_COLUMNS},
    _networks_section,
    _say_networks,
    draw=_draw_networks,
    answers=_answers_networks,
    charts=_charts_networks,
    requires=(NETWORKS,),
    of_model=False,
)


# --- all measures side by side ---------------------------------------------------------------------------------------


def _measures_section(tables: Tables, manifests: Manifests) -> Section:
    frame = tables[MEASURES_FILE]
    values = frame.pivot(index="measure", columns="network", values="value")
    networks, names = list(dict.fromkeys(frame["network"])), list(dict.fromkeys(frame["measure"]))
    about = frame.drop_duplicates("measure").set_index("measure")["about"]
    paragraphs = [
        "Other measures of the same question, each one number a network (surgery.series.side_by_side): T, how much "
        "taking a layer out changes later ones; local, how much of that is direct; rho, the interaction of taking two "
        "layers out; compositions of derivatives; gates on the updates; the length of gradient paths; the share of a "
        "layer's effect that is indirect. The last three do not measure series; they stand beside it for comparison. "
        "An empty cell is undefined: rho needs tokens that a model predicts, and the constructed networks predict "
        "nothing.",
    ]
    cells = [
        [Cell(name), Cell(about[name]), *(number_cell(values.loc[name, network]) for network in networks)]
        for name in names
    ]
    caption = "Every measure on every network; the model's from layer 1 on"
    shown = [Table(caption, ["measure", "", *networks], cells)]
    if COSTS_FILE in tables:
        costs = [
            [Cell(row["function"]), *(number_cell(row[name], digits=1) for name in ("formula", "counted", "timed"))]
            for row in rows(tables[COSTS_FILE])
        ]
        caption = "What each costs in forward passes of the same batch; gradients and readouts are in the time alone"
        shown.append(Table(caption, ["function", "formula, F", "layers run, F", "time, F"], costs))
    return Section("measures", "Other measures of series and parallel", paragraphs=paragraphs, tables=shown)


MEASURES = Chapter(
    "measures",
    {MEASURES_FILE: side_by_side.COLUMNS, COSTS_FILE: side_by_side.COST_COLUMNS},
    _measures_section,
    requires=(MEASURES_FILE,),
    of_model=False,
)


def _span(row: pd.Series) -> str:
    return f"{int(row['start'])}:{int(row['stop'])}"
