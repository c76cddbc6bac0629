"""Turn the files of a measurement into one self-contained page, ``report.html``, that can be read without the code.

``build(folder)`` reads the CSV files of all chapters (``CHAPTERS``) that a folder holds, checks them against their
manifests, draws the figures beside them as PNG and writes the page: on top a table of answers, then a section for each
chapter, with its headline, a chart to touch, and the rest folded: all findings, how they are measured, tables, what
stays open. At the end what was measured, every column explained, and where it all came from.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from surgery import disk, memory
from surgery.chapters import CHAPTERS as CHAPTERS
from surgery.chapters import every_chapter
from surgery.outside import lacks, shown
from surgery.page.chapters import Chapter, Manifests, Tables
from surgery.page.parts import PAGE, Cell, Section, Table, model_name, write_page
from surgery.planning.agenda import Agenda
from surgery.progress import duration
from surgery.records import tables

SHAPE: dict[str, Any] = {  # of the manifest of a measurement: what the page says of each
    "model": {"name": str, "n_layers": int, "d_model": int, "weights_sha256": str},
    "tokens": {"prompts": int, "tokens": int, "sha256": str},
    "settings": dict,
    "versions": {"surgery": str},
    "time": str,
}


@dataclass(frozen=True)
class Measured:
    """The tables of a folder and their manifests, by file name, and the chapters that they make."""

    tables: Mapping[str, pd.DataFrame]
    manifests: Mapping[str, Mapping[str, Any]]
    chapters: Sequence[Chapter]

    @property
    def of_model(self) -> list[Mapping[str, Any]]:
        """The manifests of what was measured on the user's model."""
        return [
            self.manifests[name]
            for chapter in self.chapters
            if chapter.of_model
            for name in chapter.present([*self.tables])
        ]

    @classmethod
    def read(cls, folder: Path) -> "Measured":
        """Read a folder.

        Raises ValueError if it holds no measurement, or a file is not the one that its manifest describes.
        """
        every = every_chapter()
        names = [path.name for path in folder.glob("*.csv")]
        present = {chapter.name: chapter.present(names) for chapter in every}
        if not any(present[chapter.name] for chapter in every if chapter.of_model):
            known = (name for chapter in every if chapter.of_model for name in chapter.requires[:1] or chapter.files)
            raise ValueError(
                f"{folder} holds no measurement ({', '.join(known)}); make one with: surgery study --out {folder}"
            )
        listed = [name for files in present.values() for name in files]
        manifests = {name: tables.read_manifest(folder / name) for name in listed}
        for name in (name for chapter in every if chapter.of_model for name in present[chapter.name]):
            if lacking := next(lacks(manifests[name], SHAPE), None):
                raise ValueError(f"the manifest of {folder / name} is of no measurement: {lacking}; measure it again")
        return cls(
            {name: tables.read(folder / name) for name in listed},
            manifests,
            [chapter for chapter in every if present[chapter.name]],
        )

    def of(self, chapter: Chapter, part: Callable[[Tables, Manifests], Any]) -> Any:
        """What a ``part`` of a chapter makes of these tables.

        Raises ValueError, naming the files, if it cannot be made of them: their columns or values are not those that
        this version of surgery writes.
        """
        try:
            return part(self.tables, self.manifests)
        except OSError:
            raise
        except Exception as error:  # files from outside can hold anything, and their hash says nothing about that
            names, why = chapter.present([*self.tables]), shown(f"{type(error).__name__}: {error}", 200)
            for name in names:
                lacking = [column for column in chapter.files[name] if column not in self.tables[name]]
                if absent := [column for column in lacking if f"'{column}'" in str(error)]:
                    why = f"{name} has no column {absent[0]}"
                elif self.tables[name].empty:
                    why += f" ({name} has no row)"
            raise ValueError(
                f"the files of {chapter.name} ({', '.join(names)}) are not as this version of surgery writes them: "
                f"{why}; measure again, or take them out of the folder"
            ) from error


def build(folder: str | Path) -> Path:
    """Draw the figures and write ``report.html`` from the CSV files in ``folder``; return the path of the page.

    Raises ``ValueError`` if there is no measurement or a file is not the one that its manifest describes, ``OSError``
    if the folder cannot be written to.
    """
    folder = Path(folder)
    measured = Measured.read(folder)
    agenda = Agenda.read(folder)
    sections = [
        _found(measured),
        *(measured.of(chapter, chapter.on_page) for chapter in measured.chapters),
        _measurements(measured),
        *([_planned(agenda)] if agenda is not None else []),
        _columns(measured),
        _provenance(measured),
    ]
    disk.save({folder / f"{picture.name}.png": picture.png for part in sections for picture in part.pictures})
    first = measured.of_model[0]
    subtitle = (
        f"{first['model']['n_layers']} layers, d_model {first['model']['d_model']}; "
        f"{first['tokens']['prompts']} prompts, {first['tokens']['tokens']} tokens; {first['time'][:10]}, surgery "
        f"{first['versions']['surgery']}, weights {first['model']['weights_sha256'][:12]}"
    )
    return write_page(folder / PAGE, f"Layer surgery on {model_name(first)}", subtitle, sections)


def summary(folder: str | Path) -> list[str]:
    """The sentences of "What was found" about the files in ``folder``. Raises ``ValueError`` as ``build`` does."""
    measured = Measured.read(Path(folder))
    sentences = _warnings(measured)
    for chapter in measured.chapters:
        sentences += [sentence.text for sentence in measured.of(chapter, chapter.say) if sentence.headline]
    return sentences


def _found(measured: Measured) -> Section:
    """The table of answers, and what holds for all of them."""
    answers = [answer for chapter in measured.chapters for answer in measured.of(chapter, chapter.answered)]
    held = (
        "Bars are 95 % intervals over prompts (seeds, where models were trained), grey what is measured without an "
        "effect. All of it holds for these prompts and this model."
    )
    return Section("found", "Answers", answers=answers, headline=" ".join(_warnings(measured)), paragraphs=[held])


def _warnings(measured: Measured) -> list[str]:
    """Why the files should not be read together, if they should not."""
    models = {manifest["model"].get("identity", manifest["model"]["weights_sha256"]) for manifest in measured.of_model}
    prompts = {
        measured.manifests[chapter.requires[0]]["tokens"]["sha256"]
        for chapter in measured.chapters
        if chapter.same_prompts
    }
    if len(models) > 1 or len(prompts) > 1:
        return ["These files were not measured on the same model and the same prompts: do not read them together."]
    return []


def _measurements(measured: Measured) -> Section:
    """What the files were measured on: in one line what they share, else a row for each group that shares it."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for manifest in measured.of_model:
        model, tokens = manifest["model"], manifest["tokens"]
        key = (
            model_name(manifest),
            f"{model['n_layers']} layers, d_model {model['d_model']}",
            f"{tokens['prompts']} prompts, {tokens['tokens']} tokens",
            model["weights_sha256"][:12],
            tokens["sha256"][:12],
        )
        shared.setdefault(key, []).append(manifest["file"])
    paragraphs = [
        "Every expectation is over all prompts and all their positions but the first and tokens of massive "
        "activations. Intervals are 95 % percentile intervals of a bootstrap over prompts: the prompt is the "
        "independent unit, the token is not."
    ]
    heads = ["model", "size", "input", "weights (sha256)", "tokens (sha256)", "files"]
    if len(shared) == 1:
        ((name, size, given, weights, texts),) = shared
        paragraphs.insert(0, f"All files: {name}, {size}; {given}; sha256 of weights {weights}, of tokens {texts}.")
        return Section("what", "What was measured", paragraphs=paragraphs, aside=True)
    rows = [[*map(Cell, key), Cell(", ".join(names))] for key, names in shared.items()]
    return Section(
        "what", "What was measured", paragraphs=paragraphs, tables=[Table("", heads, rows, words=True)], aside=True
    )


def _planned(agenda: Agenda) -> Section:
    """What a study planned, what it took, and what it cut or has not measured yet."""
    heads = ["part", "planned", "took", "most memory of the process", "without"]
    rows = []
    for part in agenda.plan.parts:
        done = agenda.done.get(part.name)
        took = [duration(done.seconds), memory.size(done.peak)] if done else ["not measured yet", ""]
        rows.append([Cell(text) for text in (part.name, duration(part.seconds), *took, part.cut)])
    rows += [[Cell(text) for text in (name, "", "left out", "", why)] for name, why in agenda.plan.left_out.items()]
    plan = agenda.plan
    limit = "without a limit of time" if math.isinf(plan.budget) else f"within {duration(plan.budget)}"
    said = [
        f"The study was planned {limit}: {plan.prompts} prompts of up to {plan.max_tokens} tokens, {plan.tokens:,} in "
        f"all, of at most {plan.asked[0]} prompts of up to {plan.asked[1]}. What a budget cuts can be had with a "
        "longer one, and everything with --budget none."
    ]
    if agenda.missing:
        said.append(f"Not measured yet: {', '.join(agenda.missing)}. The same command goes on with that.")
    return Section(
        "plan",
        "What was planned, and what was cut",
        paragraphs=said,
        tables=[Table("", heads, rows, words=True)],
        aside=True,
    )


def _columns(measured: Measured) -> Section:
    meanings: dict[str, dict[str, list[str]]] = {}  # column -> meaning -> files, as files can differ
    for file, manifest in measured.manifests.items():
        for name, text in manifest["columns"].items():
            meanings.setdefault(name, {}).setdefault(text, []).append(file)
    rows = [
        [Cell(name if len(texts) == 1 else f"{name}, {', '.join(files)}"), Cell(text)]
        for name, texts in meanings.items()
        for text, files in texts.items()
        if name.removesuffix("_low").removesuffix("_high") not in set(meanings) - {name}
    ]
    caption = "A column a with an interval has a_low and a_high beside it."
    return Section(
        "columns",
        "Columns of the CSV files",
        tables=[Table(caption, ["column", "meaning"], rows, words=True)],
        aside=True,
    )


def _provenance(measured: Measured) -> Section:
    manifests = measured.manifests.values()
    files = [[Cell(entry["file"]), Cell(str(entry["rows"])), Cell(entry["sha256"])] for entry in manifests]
    rows = []
    for key in next(iter(manifests)).keys() - {"file", "rows", "sha256", "columns"}:
        values = {entry["file"]: _text(entry.get(key)) for entry in manifests}
        if len(set(values.values())) == 1:
            rows.append([Cell(key), Cell(next(iter(values.values())))])
        else:
            rows += [[Cell(f"{key}, {name}"), Cell(value)] for name, value in values.items()]
    contents = [
        Table("The files", ["file", "rows", "sha256"], files, words=True),
        Table("How they were made", ["", ""], sorted(rows, key=lambda row: row[0].value), words=True),
    ]
    return Section("provenance", "Where the numbers come from", tables=contents, aside=True)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
