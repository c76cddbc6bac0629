"""Mean reversion on the page."""

from typing import Any

from surgery.page.answers import UNDECIDED, Answer
from surgery.page.chapters import Chapter, Drawing, Manifests, Sentence, Tables
from surgery.page.charts import plot
from surgery.page.parts import Section, rows, tabled
from surgery.page.phrases import ends
from surgery.reversion import draw, files, say


def _say(tables: Tables, manifests: Manifests) -> list[Sentence]:
    """Layer by layer, then everything else; the answer last."""
    return say.sentences(tables)


def _untold(tables: Tables, manifests: Manifests) -> list[str]:
    """What kappa cannot tell."""
    return say.limits(tables[files.LAYERS])


def _draw(tables: Tables, manifests: Manifests) -> dict[str, Drawing]:
    """kappa, psi and everything beside them."""
    return {name: Drawing(figure, files.CAPTIONS[name]) for name, figure in draw.figures(tables).items()}


def _section(tables: Tables, manifests: Manifests) -> Section:
    """What kappa, psi and phi are, and kappa by layer."""
    frame = tables[files.LAYERS]
    paragraphs = [
        "kappa is the part of a token's deviation from the mean that a layer writes against, by regression of what the "
        "layer writes on what enters it. Its nulls keep the size of the updates and destroy their direction; only "
        "the excess over them is a finding. psi sets it against the size of the update: at 0 the stream walks at "
        "random, at 1 its spread stays, above 1 it shrinks.",
        "A slope is not a force: the causal kappas displace the stream at one token and read what the layer does "
        "differently. And turning is not taking back: a rotation has kappa above 0 in every direction. So a layer "
        "restores only where displacements of every kind are shorter afterwards (remaining below 1) by 0.05 or more, "
        "corrected for the number of layers. Single directions are shortened by any map; more of them than by the same "
        "map turned at random are not.",
        "Several layers at once have a variance ratio: 1 if their updates are uncorrelated, below 1 if later ones undo "
        "earlier ones. Read as one autoregression over depth, the phi of a few layers is biased towards reversion "
        "wherever tokens have means of their own; so it is compared with a random walk whose steps have the same "
        "sizes.",
    ]
    names = ("kappa", "kappa_excess", "kappa_excess_untrained", "kappa_causal_difference", "remaining_random", "psi")
    columns = [name for name in (*names, "growth", "half_life", "regime", "restoring", "token_share") if name in frame]
    table = tabled("By layer", "layer", rows(frame), columns, lambda row: str(int(row["layer"])), digits=3)
    return Section("reversion", "Mean reversion", paragraphs=paragraphs, tables=[table])


def _answers(tables: Tables, manifests: Manifests) -> list[Answer]:
    """Does any layer pull the stream back to its mean?"""
    frame = say.after_first(tables[files.LAYERS])
    question, silent = "Does the stream revert to its mean?", bool(say.nothing_to_say(tables[files.LAYERS]))
    defined = frame.dropna(subset=["kappa_excess"])
    if silent or defined.empty:
        return [Answer(question, UNDECIDED)]
    best = defined.nlargest(1, "kappa_excess").iloc[0]
    directions = tables.get(files.DIRECTIONS)
    turned = {} if directions is None else say.reverting_directions(directions)
    restoring = int((frame["restoring"] == "yes").sum()) if "restoring" in frame else 0
    word = UNDECIDED if say.left_open(frame) else "no"
    if restoring or turned:
        word = f"in {restoring} of {len(frame)} layers" if restoring else "in some directions"
    measure = f"largest kappa beyond its nulls, layer {int(best['layer'])}:"
    return [Answer(question, word, measure, ends(best, "kappa_excess"), (0.0, 0.0), "a walk at random", digits=3)]


def _charts(tables: Tables, manifests: Manifests) -> dict[str, Any]:
    """kappa by layer, above its null."""
    told = "kappa of every layer with its 95 % interval: what a layer writes against a token's deviation from the mean"
    return {
        "reversion": plot(tables[files.LAYERS], "kappa", told=f"{told}; grey, the same of updates turned at random")
    }


CHAPTER = Chapter(
    "reversion",
    files.COLUMNS,
    _section,
    _say,
    _untold,
    _draw,
    _answers,
    _charts,
    requires=(files.LAYERS,),
    same_prompts=True,
)
