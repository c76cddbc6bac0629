"""A compiled model on the page."""

from surgery.compiler import draw, files
from surgery.compiler import say as words
from surgery.compiler.rivals import BLOCK
from surgery.compiler.search import FAMILIES
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables
from surgery.page.parts import Cell, Section, Table, cell, rows


def _say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """What is saved, against what, and how much faster it runs."""
    settings = manifests[files.FRONTIER]["settings"]
    n_layers = manifests[files.FRONTIER]["model"]["n_layers"]
    found = words.sentences(
        tables[files.FRONTIER],
        tables.get(files.SPEED, tables[files.FRONTIER].iloc[:0].assign(model=[])),
        tables.get(files.DRAFT, tables[files.FRONTIER].iloc[:0]),
        settings["allow"],
        settings["metric"],
        n_layers,
        settings["refused"],
    )
    return [Sentence(text, headline=place == 0) for place, text in enumerate(found)]


def _draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """The frontier, and the speed."""
    settings = manifests[files.FRONTIER]["settings"]
    speed = tables.get(files.SPEED, tables[files.FRONTIER].iloc[:0])
    figure = draw.frontier(tables[files.FRONTIER], speed, settings["allow"], settings["metric"])
    return {"compile": Drawing(figure, files.CAPTION)}


def _section(tables: Tables, manifests: Manifests) -> Section:
    """How the search and its confirmation work, and the frontier as a table."""
    paragraphs = [
        "Layers that hardly need one another can run side by side: both attentions read one stream, then both MLPs, "
        "and each pair is one layer of twice the heads and neurons. The search makes one such move after another, or "
        "leaves a layer out, and keeps the best wirings of every depth; what it finds is measured again on texts that "
        "took no part in the search, with intervals that hold for the whole frontier at once.",
        "Rivals that save as many layers: layers left out by the same search, a contiguous block of pairs (LP, arXiv "
        "2502.02790), pairs at random, and a span replaced by the best linear map.",
    ]
    frame = tables[files.FRONTIER]
    own = frame[frame["family"].isin([*FAMILIES, BLOCK]) & (frame["saved"] > 0)]
    cells = [
        [Cell(str(row["family"])), Cell(str(row["saved"])), cell(row, "cost", 3), Cell(str(row["wiring"]))]
        for row in rows(own)
    ]
    shown = [Table("The frontier on fresh texts", ["how", "layers saved", "loss added", "wiring"], cells)]
    if files.SPEED in tables:
        times = [
            [
                Cell(str(row["model"])),
                Cell(f"{row['phase']}, batch {row['batch']}"),
                Cell(f"{row['per_second']:.0f}"),
                cell(row, "ratio"),
                Cell(f"{row['floor']:.2f}"),
            ]
            for row in rows(tables[files.SPEED])
        ]
        shown.append(Table("Speed", ["model", "phase", "tokens a second", "of the original's", "floor"], times))
    return Section("compile", "From series to parallel", paragraphs=paragraphs, tables=shown)


CHAPTER = Chapter("compile", files.COLUMNS, _section, _say, draw=_draw, requires=(files.FRONTIER,))
