"""A compiled model on the page."""

from typing import Any

from surgery.compiler import draw, files, frontier
from surgery.compiler import say as words
from surgery.compiler.floor import Machine
from surgery.compiler.rivals import BLOCK
from surgery.compiler.search import FAMILIES
from surgery.page.answers import Answer
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables
from surgery.page.charts import plot
from surgery.page.parts import Cell, Section, Table, cell, rows, tabled
from surgery.page.phrases import ends


def _say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """What is saved, against what, and how much faster it runs."""
    settings = manifests[files.FRONTIER]["settings"]
    n_layers = manifests[files.FRONTIER]["model"]["n_layers"]
    found = words.sentences(tables, settings["allow"], settings["metric"], n_layers, settings["refused"])
    return [Sentence(text, headline=place == 0) for place, text in enumerate(found)]


def _draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """The frontier and the speed, and what can be gained at most."""
    settings = manifests[files.FRONTIER]["settings"]
    speed = tables.get(files.SPEED, tables[files.FRONTIER].iloc[:0])
    figures = {"compile": draw.frontier(tables[files.FRONTIER], speed, settings["allow"], settings["metric"])}
    if settings.get("machine"):
        figures["compile_floor"] = draw.floor(Machine(**settings["machine"]))
    return {name: Drawing(figure, files.CAPTIONS[name]) for name, figure in figures.items()}


def _section(tables: Tables, manifests: Manifests) -> Section:
    """How the search and its confirmation work, and the frontier as a table."""
    paragraphs = [
        "Layers that hardly need one another can run side by side: both attentions read one stream, then both MLPs, "
        "and each pair is one layer of twice the heads and neurons. The search makes one such move after another, or "
        "leaves a layer out, and keeps the best wirings of every depth; what it finds is measured again on texts that "
        "took no part in the search, with intervals that hold for the whole frontier at once. What goes wrong in one "
        "text of a hundred cannot be seen in a hundred texts, by any interval.",
        "Rivals that save as many layers: layers left out by the same search, a contiguous block of pairs (LP, arXiv "
        "2502.02790), pairs at random, and a span replaced by the best linear map.",
    ]
    frame = tables[files.FRONTIER]
    own = frame[frame["family"].isin([*FAMILIES, BLOCK]) & (frame["saved"] > 0)]
    cells = [
        [Cell(str(row["family"])), Cell(f"{row['saved']:g}"), cell(row, "cost", 3), Cell(str(row["wiring"]))]
        for row in rows(own)
    ]
    shown = [Table("The frontier on fresh texts", ["how", "layers saved", "loss added", "wiring"], cells)]
    if files.HEAL in tables:
        healed = [
            [
                Cell(str(row["way"])),
                cell(row, "cost", 3),
                cell(row, "recovered"),
                Cell(f"{row['parameters']:,}"),
                Cell(f"{row['operations']:.1e}"),
            ]
            for row in rows(tables[files.HEAL])
        ]
        heads = ["healed by", "loss added", "recovered", "numbers trained", "operations"]
        shown.append(Table("What healing recovers", heads, healed))
    if files.SPEED in tables:
        times = [
            [
                Cell(str(row["model"])),
                Cell(str(row["runs"])),
                Cell(f"{row['phase']}, batch {row['batch']}"),
                Cell(f"{row['per_second']:.0f}"),
                cell(row, "ratio"),
                Cell(f"{row['floor']:.2f}"),
            ]
            for row in rows(tables[files.SPEED])
        ]
        heads = ["model", "runs", "phase", "tokens a second", "of the original's", "floor"]
        shown.append(Table("Speed", heads, times))
    if files.DRAFT in tables:
        columns = [
            "shared",
            "agreement_predicted",
            "agreement",
            "block",
            "per_step_expected",
            "per_step",
            "ratio",
            "same",
        ]
        drafts = rows(tables[files.DRAFT])
        shown.append(tabled("The compiled model as a draft", "draft", drafts, columns, lambda row: str(row["draft"])))
    return Section("compile", "From series to parallel", paragraphs=paragraphs, tables=shown)


def _answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """How many layers in a row can be saved, and how much faster is that?"""
    settings, n_layers = manifests[files.FRONTIER]["settings"], manifests[files.FRONTIER]["model"]["n_layers"]
    frame, allow = tables[files.FRONTIER], float(settings["allow"])
    best = frontier.best(frame, allow)
    own = frame[frame["family"].isin([*FAMILIES, BLOCK]) & (frame["saved"] > 0)]
    row = best if best["saved"] or own.empty else own.sort_values("cost").iloc[0]
    saved, healed = best["saved"], ""
    if not saved and files.HEAL in tables and (way := settings["compiled"][1]):
        saved = frame.loc[frame["wiring"] == settings["timed"], "saved"].iloc[0]
        healed, row = ", healed", tables[files.HEAL].set_index("way").loc[way].copy()
        row["wiring"] = settings["timed"]
    question = "Can layers run side by side, so that fewer wait?"
    word = f"yes{healed}: {saved:g} of {n_layers} layers" if saved else "not at that loss"
    measure = f"loss of {row['wiring']}{healed}, {words.UNITS[settings['metric']]}:"
    return [Answer(question, word, measure, ends(row, "cost"), (0.0, allow), "allowed", digits=3)]


def _charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """The frontier, to be touched."""
    told = "Loss that saving layers in a row adds on fresh texts, by how they are saved"
    return {"compile": plot(tables[files.FRONTIER], "cost", told=told)}


CHAPTER = Chapter(
    "compile", files.COLUMNS, _section, _say, draw=_draw, answers=_answers, charts=_charts, requires=(files.FRONTIER,)
)
