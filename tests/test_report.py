"""The page: self-contained, complete, made from the files alone; and the figures that go with it."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from support import made_up
from support.pages import Page, section
from surgery import report
from surgery.graft import chapter, reinitialise, study
from surgery.instruments import fidelity
from surgery.page import drawing
from surgery.records import tables as frames
from surgery.reversion import draw as reversion_draw
from surgery.reversion import kappa
from surgery.series import draw, side_by_side, window
from surgery.training.ledger import Ledger


@pytest.fixture
def results(tmp_path):
    """A folder with all three measurements."""
    frames.write(made_up.series(), tmp_path / made_up.SERIES, made_up.manifest(), made_up.COLUMNS[made_up.SERIES])
    frames.write(
        made_up.networks(), tmp_path / made_up.CALIBRATION, made_up.manifest(), made_up.COLUMNS[made_up.SERIES]
    )
    frames.write(
        made_up.reversion(), tmp_path / made_up.REVERSION, made_up.manifest(), made_up.COLUMNS[made_up.REVERSION]
    )
    return tmp_path


def page(folder) -> Page:
    return Page(report.build(folder).read_text())


def test_the_page_fetches_nothing_and_runs_nothing(results):
    source = report.build(results).read_text()
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    assert "url(" not in source
    parsed = Page(source)
    assert not parsed.all("script")
    assert not parsed.all("link")
    assert not parsed.all("iframe")
    assert len(parsed.all("img")) == 3
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in parsed.all("img"))
    assert parsed.open == [], "every tag is closed"


def test_every_entry_of_the_contents_leads_somewhere(results):
    parsed = page(results)
    targets = [link["href"].removeprefix("#") for link in parsed.all("a")]
    assert targets == [section["id"] for section in parsed.all("section")]
    assert targets == ["found", "what", "calibration", "series", "reversion", "untold", "columns", "provenance"]


def test_the_page_says_what_was_found_and_measured(results):
    text = "".join(page(results).words)
    for expected in (
        "Layers 1 to 5 together read S = 0.65 [0.64, 0.66]",
        "the measure reads what it must",
        "confirms a restoring pull",
        "with fresh weights read S = 0.35 [0.34, 0.36]",
        "rescaling by the normalisation",
        "32 prompts, 320 tokens",
        "abababababab",
        "Layer surgery on toy",
        "surgery study",
    ):
        assert expected in text, expected


def test_every_column_of_the_files_is_explained(results):
    text = "".join(page(results).words)
    for column in (*made_up.series(), *made_up.reversion()):
        base = column.removesuffix("_low").removesuffix("_high")
        assert (made_up.COLUMNS[made_up.SERIES] | made_up.COLUMNS[made_up.REVERSION])[base] in text


def test_the_numbers_of_the_networks_stand_beside_the_model(results):
    source = report.build(results).read_text()
    section = source[source.index('id="calibration"') : source.index('id="series"')]
    for name in ("parallel", "mixed 0.25", "serial", "toy"):
        assert f"<td>{name}</td>" in section
    assert "1.000" in section
    assert "0.650" in section


@pytest.mark.parametrize(
    ("kept", "sections", "images"),
    [(made_up.SERIES, "found what series untold", 1), (made_up.REVERSION, "found what reversion untold", 1)],
)
def test_one_measurement_alone_makes_a_page(results, kept, sections, images):
    for name in {made_up.SERIES, made_up.REVERSION, made_up.CALIBRATION} - {kept}:
        (results / name).unlink()
    parsed = page(results)
    assert [section["id"] for section in parsed.all("section")] == [*sections.split(), "columns", "provenance"]
    assert len(parsed.all("img")) == images


def test_every_measure_and_what_it_costs_stand_in_one_section(results):
    table = pd.DataFrame(
        [
            ("S, pairs", "series", "serial", 0.97),
            ("S, pairs", "series", "toy", 0.31),
            ("rho", "series", "serial", np.nan),
            ("rho", "series", "toy", 0.12),
        ],
        columns=list(side_by_side.COLUMNS),
    )
    taken = pd.DataFrame([("series.windows", 18.5, 18.4, 27.3)], columns=list(side_by_side.COST_COLUMNS))
    frames.write(table, results / made_up.MEASURES, made_up.manifest(), side_by_side.COLUMNS)
    without = report.build(results).read_text()
    assert "series.windows" not in without[without.index('id="measures"') : without.index('id="series"')]
    frames.write(taken, results / made_up.COSTS, made_up.manifest(), side_by_side.COST_COLUMNS)
    source = report.build(results).read_text()
    section = source[source.index('id="measures"') : source.index('id="series"')]
    assert section.index(">serial</th>") < section.index(">toy</th>")
    for shown in ("S, pairs", "0.97", "0.31", "rho", "0.12", "series.windows", "18.5", "18.4", "27.3"):
        assert f"<td>{shown}" in section, shown
    assert "nan" not in section, "what could not be told is an empty cell"


def test_files_of_different_models_are_not_passed_off_as_one(results):
    other = made_up.manifest()
    other["model"]["weights_sha256"] = "ef" * 32
    frames.write(made_up.reversion(), results / made_up.REVERSION, other, made_up.COLUMNS[made_up.REVERSION])
    assert "not measured on the same model" in "".join(page(results).words)


def test_names_are_escaped(results):
    frames.write(
        made_up.series(), results / made_up.SERIES, made_up.manifest("<b>bold</b>"), made_up.COLUMNS[made_up.SERIES]
    )
    assert "<b>bold" not in report.build(results).read_text()


def test_a_folder_without_measurement_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"holds no measurement .* surgery study --out"):
        report.build(tmp_path)


def test_a_changed_file_is_not_reported(results):
    (results / made_up.SERIES).write_text("start,stop,S\n1,3,0.5\n")
    with pytest.raises(ValueError, match="not the file its manifest describes"):
        report.build(results)


def test_missing_intervals_and_undefined_numbers_make_a_page(tmp_path):
    frame = made_up.series(3)
    frame[[name for name in frame if name.endswith(("_low", "_high"))]] = np.nan
    frame.loc[0, ["S", "R", "R_over_N"]] = np.nan
    frames.write(frame, tmp_path / made_up.SERIES, made_up.manifest(), made_up.COLUMNS[made_up.SERIES])
    source = report.build(tmp_path).read_text()
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", source).lower())


def test_figures_are_written_beside_the_page(results):
    report.build(results)
    for name in ("calibration", "series", "reversion"):
        assert imread(results / f"{name}.png").shape[0] > 300


@pytest.mark.parametrize("n_layers", [2, 5, 12, 48])
def test_figures_are_drawn_for_any_depth(n_layers):
    for figure in (
        draw.windows(made_up.series(n_layers)),
        reversion_draw.by_layer(made_up.reversion(n_layers)),
        draw.known_networks(made_up.networks(), made_up.series(n_layers)),
    ):
        assert drawing.png(figure).startswith(b"\x89PNG")


def test_the_triangle_shows_each_window_in_its_place_and_nothing_else():
    frame = pd.DataFrame({"start": [0, 1], "stop": [2, 4], "S": [0.25, 0.75], "R_over_N": [0.5, 2.0]})
    axes = draw.windows(frame).axes[0]
    shown = axes.images[0].get_array()
    assert shown[1, 0] == 0.25
    assert shown[3, 1] == 0.75
    assert shown.count() == 2
    assert {text.get_text(): text.get_position() for text in axes.texts} == {".25": (0, 1), ".75": (1, 3)}


def test_numbers_are_printed_into_the_triangle_only_where_they_fit():
    assert len(draw.windows(made_up.series(16)).axes[0].texts) == 16 * 15 / 2
    assert not draw.windows(made_up.series(17)).axes[0].texts


def test_the_ratio_is_shown_around_one_on_a_logarithmic_scale():
    norm = draw.windows(made_up.series(R_over_N=8.0)).axes[1].images[0].norm
    assert norm(1.0) == pytest.approx(0.5)
    assert norm(8.0) == pytest.approx(1.0)
    assert norm(1 / 8) == pytest.approx(0.0)


def test_layer_0_is_left_out_of_the_depth_figure():
    above, below = reversion_draw.by_layer(made_up.reversion(6)).axes
    assert list(above.lines[-2].get_xdata()) == [1, 2, 3, 4, 5]
    assert "layer 0 is left out" in below.get_xlabel()


def test_the_nulls_are_in_the_legend():
    words = [
        entry.get_text() for entry in reversion_draw.by_layer(made_up.reversion()).axes[0].get_legend().get_texts()
    ]
    assert sum(word.startswith("null: ") for word in words) == 4
    assert sum(word.startswith("by intervention: ") for word in words) == 3


def test_the_same_figure_gives_the_same_bytes():
    once, again = (drawing.png(draw.windows(made_up.series())) for _ in range(2))
    assert once == again


SECTIONS = ["found", "what", "graft", "untold", "columns", "provenance"]
SAID = ["Layers 2 to 3 of 6 replaced.", "Graft: as close as that."]


def scores(**values: float) -> dict[str, float]:
    numbers = {
        "damage": 0.25,
        "unexplained": 0.5,
        "exact": 0.75,
        "exact_original": 1.0,
        "cross_entropy": 1.5,
        "cross_entropy_original": 1.25,
        "cross_entropy_answers": 0.5,
        "cross_entropy_answers_original": 0.125,
    }
    ends = [made_up.with_interval(name, number) for name, number in (numbers | values).items()]
    return {"start": 2.0, "stop": 4.0, "n_prompts": 32.0} | {k: value for one in ends for k, value in one.items()}


def write_graft(folder, seeds: int = 1, found: list[str] | None = SAID, answers: bool = True) -> dict:
    """What ``surgery graft`` leaves."""
    runs = [(name, float(seed)) for seed in range(seeds) for name in ("graft", "whole")]
    spent = {
        "parameters": 1e3,
        "steps": 6.0,
        "tokens": 2e4,
        "operations": 3.21e11,
        "operations_with_teacher": 4.32e11,
        "seconds": 16.4,
    }
    rows = [{"method": "skip", "seed": np.nan, "parameters": 0.0} | scores(damage=0.777)]
    rows += [{"method": name, "seed": seed} | scores(damage=0.111 * (1 + seed)) | spent for name, seed in runs]
    curve = pd.DataFrame(
        [
            {
                "method": name,
                "seed": seed,
                "step": step,
                "tokens": 1e4 * step,
                "operations": 1e11 * step,
                "operations_with_teacher": 1e11 * (1 + step),
            }
            | scores(cross_entropy=2.0 - step / 4)
            for name, seed in runs
            for step in range(3)
        ]
    )
    ledger = Ledger()
    ledger.add("harvest", 16059, 12_300_000_000, 3.0, teacher=True)
    ledger.add("training", 20510, 321_000_000_000, 16.4)
    tables = {
        study.METHODS: pd.DataFrame(rows),
        study.CURVES: curve,
        study.LEDGER: ledger.frame().assign(method="graft", seed=0),
    }
    manifest = made_up.manifest() | {"settings": {} if found is None else {"found": found}}
    for name, table in tables.items():
        kept = (
            table
            if answers
            else table[[column for column in table if "exact" not in column and "answers" not in column]]
        )
        frames.write(kept, folder / name, manifest, study.COLUMNS[name])
    return manifest


@pytest.mark.parametrize("answers", [True, False])
def test_a_graft_alone_makes_a_page(tmp_path, answers):
    write_graft(tmp_path, answers=answers)
    source = report.build(tmp_path).read_text()
    parsed = Page(source)
    assert [part["id"] for part in parsed.all("section")] == SECTIONS
    assert len(parsed.all("img")) == 1
    assert imread(tmp_path / "graft.png").shape[0] > 300
    shown = section(source, "graft")
    for sentence in SAID:
        assert f'<p class="finding">{sentence}</p>' in shown
    for cell in (
        "skip",
        "0.777",
        "[0.767, 0.787]",
        "graft, seed 0",
        "0.111",
        "0.500",
        "1,000",
        "20,000",
        "3.21e+11",
        "4.32e+11",
        "16",
        "harvest",
        "teacher",
        "student",
        "16,059",
        "1.23e+10",
    ):
        assert re.search(rf"(<td>|interval\">){re.escape(cell)} ?<", shown), cell
    assert ("0.750" in shown) == answers
    assert "nan" not in shown
    found = section(source, "found")
    assert "Graft: +0.111 [+0.101, +0.121] nats a token" in found
    assert "Skip" not in found


def test_a_graft_stands_beside_other_measurements(results):
    write_graft(results)
    parsed = page(results)
    assert [part["id"] for part in parsed.all("section")] == [
        "found",
        "what",
        "calibration",
        "series",
        "reversion",
        *SECTIONS[2:],
    ]
    text = "".join(parsed.words)
    assert "confirms a restoring pull" in text
    assert "Graft: +0.111" in text


def test_a_graft_without_sentences_of_its_own_gets_some(tmp_path):
    write_graft(tmp_path, found=None)
    assert "Skip: +0.777" in section(report.build(tmp_path).read_text(), "graft")


def test_what_a_column_means_is_told_file_by_file_where_files_differ(tmp_path):
    write_graft(tmp_path)
    text = section(report.build(tmp_path).read_text(), "columns")
    for file in (study.METHODS, study.LEDGER):
        assert study.COLUMNS[file]["tokens"] in text
    assert f"<td>tokens, {study.LEDGER}</td>" in text
    assert "<td>damage</td>" in text, "one meaning, one row"


def test_seeds_are_told_apart_and_one_alone_is_said_to_be(tmp_path):
    write_graft(tmp_path, seeds=1)
    assert "trained with one seed" in section(report.build(tmp_path).read_text(), "untold")
    write_graft(tmp_path, seeds=2)
    source = report.build(tmp_path).read_text()
    assert "trained with one seed" not in section(source, "untold")
    assert "graft, seed 1" in section(source, "graft")
    assert "0.222" not in section(source, "found"), "sentences are of the first seed"


def test_what_the_study_of_fresh_middles_adds_is_shown(tmp_path):
    manifest = write_graft(tmp_path)
    run = study.RUN
    by_k = pd.DataFrame(
        [
            {"method": "graft", "seed": float(seed), "k": k} | scores(exact=1 - k / 4 - seed / 8)
            for seed in (0, 1)
            for k in (0, 2)
        ]
    )
    wiring = pd.DataFrame([{"method": "the old middle", "seed": np.nan, "S": 0.543, "R_over_N": 1.665}])
    layers = pd.DataFrame(
        [
            {
                "layer": 3,
                **made_up.with_interval("damage", 0.432),
                "damage_least": 0.321,
                "damage_most": 0.543,
                **made_up.with_interval("damage_skip", 0.654),
                "robust": "no",
            }
        ]
    )
    frames.write(by_k, tmp_path / chapter.BY_K, manifest, run | fidelity.COLUMNS | {"k": "steps"})
    frames.write(wiring, tmp_path / chapter.WIRING, manifest, run | window.COLUMNS | kappa.COLUMNS)
    frames.write(layers, tmp_path / chapter.LAYERS, manifest, reinitialise.COLUMNS)
    shown = section(report.build(tmp_path).read_text(), "graft")
    for cell in (
        "0.938",
        "[0.875, 1.000]",
        "0.438",
        "the old middle",
        "0.543",
        "1.665",
        "3",
        "0.432",
        "0.321",
        "0.654",
    ):
        assert re.search(rf"(<td>|interval\">){re.escape(cell)} ?<", shown), cell
    assert re.search(r"<th[^>]*>k = 2</th>", shown)


def test_a_changed_ledger_is_not_reported(tmp_path):
    write_graft(tmp_path)
    ledger = tmp_path / study.LEDGER
    ledger.write_text(ledger.read_text().replace("16059", "16"))
    with pytest.raises(ValueError, match="not the file its manifest describes"):
        report.build(tmp_path)
