"""From the files of a measurement to one page that can be read without the code: ``report.html``, self-contained.

``build(folder)`` reads ``series_windows.csv``, ``reversion_layers.csv``, ``calibration.csv`` and the tables of a scan,
of an anatomy, of all measures, of a graft and of new middles by size and by data (those that are there, checked against
their manifests), draws the figures beside them as PNG and writes the page: what was found, in sentences made from the
numbers; what was measured; the same measure on networks whose answer is known; the numbers with their intervals and
nulls; what could not be told; every column explained; where it all came from.
The page alone is ``surgery.page``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from surgery.anatomy import study
from surgery.anatomy.study import ENDS
from surgery.dropout import chapter
from surgery.graft import chapter as graft_report
from surgery.graft import resized_chapter
from surgery.graft.chapter import METHODS
from surgery.page import drawing, phrases
from surgery.page.parts import PAGE, Cell, Picture, Section, Table, tabled, write_page
from surgery.records import tables as frames
from surgery.reversion import study as reversion_study
from surgery.scan import draw
from surgery.scan import say as scan_findings
from surgery.stats.comparisons import Luck

SERIES, REVERSION, CALIBRATION = "series_windows.csv", "reversion_layers.csv", "calibration.csv"
SCAN, WINNERS, GROUPS = "scan_table.csv", "scan_winners.csv", "scan_groups.csv"
PAINTERS = "painters.csv"
MEASURES, COSTS = "measures.csv", "costs.csv"
UNTRAINED = "this model untrained"  # in calibration.csv


@dataclass(frozen=True)
class _Measured:
    """The frames of one folder with their manifests, by file name."""

    frames: dict[str, pandas.DataFrame]
    manifests: dict[str, dict[str, Any]]

    @property
    def own(self) -> list[dict[str, Any]]:
        """The manifests of what was measured on the user's model."""
        return [manifest for name, manifest in self.manifests.items() if name not in (CALIBRATION, MEASURES, COSTS)]

    @property
    def metric(self) -> str:
        """Of the scan."""
        return self.manifests[SCAN]["settings"]["metric"]


def build(folder: str | Path) -> Path:
    """Draw the figures and write ``report.html`` from the CSV files in ``folder``.

    Raises ``ValueError`` if there is no measurement or a file is not the one its manifest describes, ``OSError`` if the
    folder cannot be written to.
    """
    folder = Path(folder)
    measured = _read(folder)
    sections = [_found(measured), _what(measured)]
    if CALIBRATION in measured.frames:
        sections.append(_calibration(measured))
    if MEASURES in measured.frames:
        sections.append(_measures(measured))
    if SERIES in measured.frames:
        sections.append(_series(measured.frames[SERIES]))
    if REVERSION in measured.frames:
        sections.append(_reversion(measured))
    if SCAN in measured.frames:
        sections.append(_scan(measured))
    if ENDS in measured.frames:
        sections.append(_anatomy(measured))
    if METHODS in measured.frames:
        sections.append(graft_report.section(measured.frames, measured.manifests[METHODS]))
    if set(resized_chapter.FILES) & set(measured.frames):
        sections.append(resized_chapter.section(measured.frames, measured.manifests))
    if set(chapter.FILES) & set(measured.frames):
        sections.append(chapter.section(measured.frames))
    sections += [_untold(measured), _columns(measured), _provenance(measured)]
    frames.save({folder / f"{picture.name}.png": picture.png for part in sections for picture in part.pictures})
    first = measured.own[0]
    subtitle = f"{first['tokens']['prompts']} prompts, {first['time'][:10]}, surgery {first['versions']['surgery']}"
    return write_page(folder / PAGE, f"Layer surgery on {_model_name(first)}", subtitle, sections)


def summary(folder: str | Path) -> list[str]:
    """The sentences of "What was found" about the files in ``folder``."""
    return list(_found(_read(Path(folder))).findings)


def _read(folder: Path) -> _Measured:
    alone = (
        SERIES,
        CALIBRATION,
        MEASURES,
        COSTS,
        *reversion_study.COLUMNS,
        *study.COLUMNS,
        *resized_chapter.FILES,
        *chapter.FILES,
    )
    present = [name for name in alone if (folder / name).exists()]
    if (folder / SCAN).exists():
        present += [SCAN, WINNERS, GROUPS, *(name for name in (PAINTERS,) if (folder / name).exists())]
    if (folder / METHODS).exists():
        present += [name for name in graft_report.FILES if (folder / name).exists()]
    if not set(present) - {CALIBRATION, MEASURES, COSTS}:
        raise ValueError(
            f"{folder} holds no measurement ({SERIES}, {REVERSION}, {SCAN}, {ENDS}, {METHODS} or "
            f"{', '.join((*resized_chapter.FILES, *chapter.FILES))}); make one with: surgery study --out {folder}"
        )
    return _Measured(
        {name: frames.read(folder / name) for name in present},
        {name: frames.read_manifest(folder / name) for name in present},
    )


def _model_name(manifest: dict[str, Any]) -> str:
    name = manifest["model"]["name"]
    return Path(name).name if name.startswith((".", "/")) else name


def _found(measured: _Measured) -> Section:
    sentences, untrained = [], None
    asked = [measured.manifests[name]["tokens"]["sha256"] for name in (SERIES, REVERSION) if name in measured.frames]
    if len({entry["model"]["weights_sha256"] for entry in measured.own}) > 1 or len(set(asked)) > 1:
        sentences.append(
            "These files were not measured on the same model and the same prompts: do not read them together."
        )
    if CALIBRATION in measured.frames:
        networks = measured.frames[CALIBRATION]
        sentences += phrases.calibration(networks)
        fresh = networks[networks["network"] == UNTRAINED]
        untrained = fresh if len(fresh) else None
    if SERIES in measured.frames:
        sentences += phrases.series(measured.frames[SERIES], untrained)
    if REVERSION in measured.frames:
        sentences += phrases.reversion(measured.frames[REVERSION])
        sentences += reversion_study.found(measured.frames)[-2:]
    if SCAN in measured.frames:
        luck = Luck(**measured.manifests[SCAN]["settings"]["luck"])
        sentences += scan_findings.found(measured.frames[SCAN], measured.frames[WINNERS], luck, measured.metric)
    if ENDS in measured.frames:
        sentences += [one for one in measured.manifests[ENDS]["settings"]["found"] if one.startswith(("Three", "That"))]
    if METHODS in measured.frames:
        sentences += graft_report.found(measured.frames, measured.manifests[METHODS]["model"]["n_layers"])
    sentences += resized_chapter.found(measured.frames, measured.manifests)
    sentences += chapter.found(measured.frames)
    return Section("found", "What was found", findings=sentences)


def _what(measured: _Measured) -> Section:
    rows = [
        [
            Cell(manifest["file"]),
            Cell(_model_name(manifest)),
            Cell(f"{manifest['model']['n_layers']} layers, d_model {manifest['model']['d_model']}"),
            Cell(f"{manifest['tokens']['prompts']} prompts, {manifest['tokens']['tokens']} tokens"),
            Cell(manifest["model"]["weights_sha256"][:12]),
            Cell(manifest["tokens"]["sha256"][:12]),
        ]
        for manifest in measured.own
    ]
    paragraphs = [
        "The ensemble of every expectation is all prompts and all their positions but the first. Intervals are 95 % "
        "percentile intervals of a bootstrap over prompts: the prompt is the independent unit, the token is not."
    ]
    heads = ["file", "model", "size", "input", "weights (sha256)", "tokens (sha256)"]
    return Section("what", "What was measured", paragraphs=paragraphs, tables=[Table("", heads, rows, words=True)])


def _calibration(measured: _Measured) -> Section:
    networks = measured.frames[CALIBRATION]
    paragraphs = [
        "Before the measure is believed it is shown networks whose structure was decided when their weights were "
        "written: parallel (every layer reads the embedding alone), serial (every layer reads only the one before), "
        "mixtures of the two, a linear network whose layers prefer nothing (R/N must be 1), and untrained random "
        "ones."
    ]
    rows = [(str(name), part) for name, part in networks.groupby("network", sort=False)]
    pictures = []
    if SERIES in measured.frames:
        model = measured.frames[SERIES]
        name = _model_name(measured.manifests[SERIES])
        rows.append((name, model[model["start"] > 0]))
        caption = "S on networks of known structure and on the model, every window."
        pictures.append(Picture("calibration", caption, drawing.png(drawing.calibration(networks, model, name))))
    columns = [column for column in ("S", "R", "O", "S_live", "R_over_N") if column in networks]
    cells = [[Cell(name), Cell(str(len(part))), *(_spread(part[column]) for column in columns)] for name, part in rows]
    caption = "Median over windows [smallest, largest]; the model's windows from layer 1 on."
    table = Table(caption, ["network", "windows", *columns], cells)
    return Section(
        "calibration", "Networks whose answer is known", paragraphs=paragraphs, pictures=pictures, tables=[table]
    )


def _measures(measured: _Measured) -> Section:
    frame = measured.frames[MEASURES]
    values = frame.pivot(index="measure", columns="network", values="value")
    networks, names = list(dict.fromkeys(frame["network"])), list(dict.fromkeys(frame["measure"]))
    about = frame.drop_duplicates("measure").set_index("measure")["about"]
    paragraphs = [
        "Other readings of the same question, each one number a network (surgery.series.side_by_side): T, what taking a layer out "
        "changes in later ones; local, what of that is direct; rho, the interaction of taking two layers out; "
        "compositions of derivatives; gates on the updates; the length of gradient paths; the share of a layer's "
        "effect that is indirect. The last three are what series is not, beside it for comparison. An empty cell could "
        "not be told: rho needs tokens that a model predicts, and the constructed networks predict nothing.",
    ]
    rows = [[Cell(name), Cell(about[name]), *(_plain(values.loc[name, one]) for one in networks)] for name in names]
    tables = [Table("Every measure on every network; the model's from layer 1 on", ["measure", "", *networks], rows)]
    if COSTS in measured.frames:
        heads = ["function", "formula, F", "layers run, F", "time, F"]
        costs = [
            [Cell(row["function"]), *(Cell(f"{row[name]:.1f}") for name in ("formula", "counted", "timed"))]
            for _, row in measured.frames[COSTS].iterrows()
        ]
        caption = "What each costs in forward passes of the same batch; gradients and readouts are in the time alone"
        tables.append(Table(caption, heads, costs))
    return Section("measures", "Other readings of series and parallel", paragraphs=paragraphs, tables=tables)


def _plain(value: float) -> Cell:
    return Cell("" if pandas.isna(value) else f"{value:.2f}")


def _anatomy(measured: _Measured) -> Section:
    manifest, ends = measured.manifests[ENDS], measured.frames[ENDS]
    paragraphs = [
        "Boundaries are placed on one half of the prompts by features of every layer that are not the ones tested; the "
        "ends are compared with the middle on the other half. D = mean S of the windows in the ends minus that in the "
        "middle: below 0 the ends are more parallel. It has to hold of R/N too: S grows with the size of updates.",
        "A smooth drift always looks divided: p_drift says how often one would be divided as clearly. Where it is not "
        "below .05, there are no parts to be found, wherever the boundaries were placed.",
    ]
    tables = {name: measured.frames[name] for name in study.COLUMNS if name in measured.frames}
    drawn = study.draw(tables, manifest["model"]["n_layers"])
    pictures = [Picture(name, study.CAPTIONS[name], drawing.png(figure)) for name, figure in drawn.items()]
    rows = [
        [Cell(row["kind"]), _ends(row, "D{}", digits=2), _ends(row, "D_over_N{}", digits=2),
         Cell(f"{row['p_windows']:.2f}"), Cell(row["verdict"])]
        for _, row in ends.iterrows()
    ]  # fmt: skip
    table = Table("The ends against the middle", ["prompts", "D", "of R/N", "p, windows", "verdict"], rows)
    said = manifest["settings"]["found"]
    return Section("anatomy", "Where the parts begin and end", said, paragraphs, pictures=pictures, tables=[table])


def _series(frame: pandas.DataFrame) -> Section:
    paragraphs = [
        "S = (R + O) / 2 asks whether the layers of a window depend on one another. R compares what each layer "
        "writes with what it would write given the stream that enters the window; O compares what the whole window "
        "writes with what its layers write side by side. Both are 0 if no layer reads another, 1 if each lives only "
        "on the one before. The normalisation is frozen at the clean run; S_live lets it move.",
        "A layer also changes its output because the stream has moved at all. N is how far it moved relative to its "
        "size: R/N above 1 is response to what the window wrote beyond that, below 1 is preference for what was "
        "there before. Compare windows of equal length.",
    ]
    caption = "S and R/N of every window measured; the numbers are in " + SERIES + "."
    picture = Picture("series", caption, drawing.png(drawing.windows(frame)))
    chosen = phrases.thirds(frame) + [row for row in [phrases.whole(frame)] if row is not None]
    pairs = frame[frame["stop"] - frame["start"] == 2]
    columns = [
        name for name in ("S", "R", "O", "N", "R_over_N", "R_shuffled", "S_live", "loss_parallel_sum") if name in frame
    ]
    tables = [
        tabled("Three windows of equal length, and all layers but the first", "window", chosen, columns, _window),
        tabled("Neighbours: windows of two layers", "window", [row for _, row in pairs.iterrows()], columns, _window),
    ]
    return Section("series", "Series or parallel", paragraphs=paragraphs, pictures=[picture], tables=tables)


def _reversion(measured: _Measured) -> Section:
    frame = measured.frames[REVERSION]
    paragraphs = [
        "kappa is the part of a token's deviation from the mean that a layer takes back, by regression of what the "
        "layer writes on what enters it. Its nulls keep the size of the updates and destroy their direction; only "
        "the excess over them is a finding. psi sets it against the size of the update: at 0 the stream walks at "
        "random, at 1 its spread stays, above 1 it shrinks.",
        "A slope is not a force: the causal kappas displace the stream at one token and read what the layer does "
        "differently.",
        "Several layers at once have a variance ratio: 1 if their updates are uncorrelated, below 1 if later ones undo "
        "earlier ones. Read as one autoregression over depth, the phi of a few layers is biased towards reversion "
        "wherever tokens have means of their own; so it is compared with a random walk whose steps have the same "
        "sizes.",
    ]
    drawn = reversion_study.draw(measured.frames)
    pictures = [Picture(name, reversion_study.CAPTIONS[name], drawing.png(one)) for name, one in drawn.items()]
    names = ("kappa", "kappa_excess", "kappa_excess_untrained", "kappa_causal_difference", "psi", "growth", "half_life")
    columns = [name for name in (*names, "regime", "restoring") if name in frame]
    rows = [row for _, row in frame.iterrows()]
    table = tabled("By layer", "layer", rows, columns, lambda row: str(int(row["layer"])), digits=3)
    said = reversion_study.found(measured.frames)
    return Section("reversion", "Mean reversion", said, paragraphs, pictures=pictures, tables=[table])


def _scan(measured: _Measured) -> Section:
    manifest, winners, metric = measured.manifests[SCAN], measured.frames[WINNERS], measured.metric
    groups = measured.frames[GROUPS]
    painted = measured.frames.get(PAINTERS)
    paragraphs = [
        "The model is run with its layers in another order (a wiring, in the notation of Python's slices: ':8 4:' runs "
        "layers 4 to 7 twice) and compared on the same probes with itself unmodified. "
        f"Gains are in {draw.UNITS[metric]}. The largest of many gains is large partly by luck. So one half of "
        "the probes chooses, and the largest are measured again on the other half, which took no part in the choice: "
        "that column is what to believe.",
        "p_max asks whether the luckiest of all wirings would reach as much if none had any effect (of all that were "
        "tried in the search, of those in the table on fresh probes). Verdicts: survived, better on fresh probes by "
        "p_max < .05; in part, by less than claimed; vanished, less than claimed and not shown to be better; "
        "undecided, too few probes to exclude either; reversed, worse.",
    ]
    drawn = draw.of_scan(measured.frames[SCAN], groups, manifest["model"]["n_layers"], metric, painted)
    pictures = [Picture(name, caption, drawing.png(figure)) for name, (figure, caption) in drawn.items()]
    heads = ["wiring", "gain, search half", "p_max", "gain, validation half", "p_max", "survived", "verdict"]
    rows = [
        [
            Cell(row["wiring"]),
            _ends(row, "gain{}_search"),
            Cell(f"{row['p_max_search']:.3f}"),
            _ends(row, "gain{}_validation"),
            Cell(f"{row['p_max_validation']:.3f}"),
            _ends(row, "survived{}", digits=2),
            Cell(row["verdict"]),
        ]
        for _, row in winners.iterrows()
    ]
    said = scan_findings.best_groups(groups, metric)
    if painted is not None:
        said += scan_findings.painters(painted, metric)
    table = Table("The largest gains of the search half, and what they are worth on fresh probes", heads, rows)
    return Section("scan", "What rewiring does", said, paragraphs, pictures=pictures, tables=[table])


def _ends(row: pandas.Series, name: str, digits: int = 3) -> Cell:
    """``name`` with the place of ``_low`` and ``_high`` marked."""
    value, low, high = (row[name.format(end)] for end in ("", "_low", "_high"))
    if pandas.isna(value):
        return Cell("")
    return Cell(f"{value:.{digits}f}", "" if pandas.isna(low) else f"[{low:.{digits}f}, {high:.{digits}f}]")


def _untold(measured: _Measured) -> Section:
    notes = []
    for name, say in ((SERIES, phrases.series_untold), (REVERSION, phrases.reversion_untold)):
        if name in measured.frames:
            notes += say(measured.frames[name])
    if SCAN in measured.frames:
        notes += scan_findings.untold(measured.frames[SCAN], measured.frames[WINNERS])
    if METHODS in measured.frames:
        notes += graft_report.untold(measured.frames)
    notes += resized_chapter.untold(measured.frames) + chapter.untold(measured.frames)
    notes.append(
        "All of this holds for these prompts and for whole layers; attention and MLP inside one layer are not told "
        "apart."
    )
    return Section("untold", "What could not be told", points=list(dict.fromkeys(notes)))


def _columns(measured: _Measured) -> Section:
    meanings: dict[str, dict[str, list[str]]] = {}  # of one name in several files
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
        "columns", "Columns of the CSV files", tables=[Table(caption, ["column", "meaning"], rows, words=True)]
    )


def _provenance(measured: _Measured) -> Section:
    manifests = measured.manifests.values()
    files = [[Cell(entry["file"]), Cell(str(entry["rows"])), Cell(entry["sha256"])] for entry in manifests]
    rows = []
    for key in next(iter(manifests)).keys() - {"file", "rows", "sha256", "columns"}:
        values = {entry["file"]: _text(entry.get(key)) for entry in manifests}
        if len(set(values.values())) == 1:
            rows.append([Cell(key), Cell(next(iter(values.values())))])
        else:
            rows += [[Cell(f"{key}, {name}"), Cell(value)] for name, value in values.items()]
    tables = [
        Table("The files", ["file", "rows", "sha256"], files, words=True),
        Table("How they were made", ["", ""], sorted(rows, key=lambda row: row[0].value), words=True),
    ]
    return Section("provenance", "Where the numbers come from", tables=tables)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _spread(values: pandas.Series) -> Cell:
    if values.isna().all():
        return Cell("")
    return Cell(f"{values.median():.3f}", f"[{values.min():.3f}, {values.max():.3f}]")


def _window(row: pandas.Series) -> str:
    return f"{int(row['start'])}:{int(row['stop'])}"
