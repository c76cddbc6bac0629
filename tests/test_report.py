"""The page: self-contained, complete, made from the files alone; and the figures that go with it."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from support import made_up
from support.pages import Page, section
from surgery import report
from surgery.graft import study
from surgery.records import tables
from surgery.series import side_by_side


def write_results(folder):
    """Leave three measurements in a folder."""
    series, reversion = made_up.COLUMNS[made_up.SERIES], made_up.COLUMNS[made_up.REVERSION]
    tables.write(made_up.series(), folder / made_up.SERIES, made_up.manifest(), series)
    tables.write(made_up.networks(), folder / made_up.CALIBRATION, made_up.manifest(), series)
    tables.write(made_up.reversion(), folder / made_up.REVERSION, made_up.manifest(), reversion)
    return folder


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source of the page of three measurements, built once."""
    return report.build(write_results(tmp_path_factory.mktemp("results"))).read_text()


def page(folder) -> Page:
    return Page(report.build(folder).read_text())


def test_the_page_fetches_nothing_and_runs_nothing(built):
    source = built
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


def test_every_entry_of_the_contents_leads_somewhere(built):
    parsed = Page(built)
    targets = [link["href"].removeprefix("#") for link in parsed.all("a")]
    assert targets == [section["id"] for section in parsed.all("section")]
    assert targets == ["found", "what", "calibration", "series", "reversion", "untold", "columns", "provenance"]


def test_the_page_says_what_was_found_and_measured(built):
    text = "".join(Page(built).words)
    for expected in (
        "Layers 1 to 5 together read S = 0.65 [0.64, 0.66]",
        "the measure reads what it must",
        "confirms a restoring pull",
        "untrained layers with updates of the same size read 0.40 [0.39, 0.41]",
        "rescaling by the normalisation",
        "32 prompts, 320 tokens",
        "abababababab",
        "Layer surgery on toy",
        "surgery study",
    ):
        assert expected in text, expected


def test_every_column_of_the_files_is_explained(built):
    text = "".join(Page(built).words)
    for column in (*made_up.series(), *made_up.reversion()):
        base = column.removesuffix("_low").removesuffix("_high")
        assert (made_up.COLUMNS[made_up.SERIES] | made_up.COLUMNS[made_up.REVERSION])[base] in text


def test_the_numbers_of_the_networks_stand_beside_the_model(built):
    source = built
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
    tables.write(table, results / made_up.MEASURES, made_up.manifest(), side_by_side.COLUMNS)
    without = report.build(results).read_text()
    assert "series.windows" not in without[without.index('id="measures"') : without.index('id="series"')]
    tables.write(taken, results / made_up.COSTS, made_up.manifest(), side_by_side.COST_COLUMNS)
    source = report.build(results).read_text()
    section = source[source.index('id="measures"') : source.index('id="series"')]
    assert section.index(">serial</th>") < section.index(">toy</th>")
    for shown in ("S, pairs", "0.97", "0.31", "rho", "0.12", "series.windows", "18.5", "18.4", "27.3"):
        assert f"<td>{shown}" in section, shown
    assert "nan" not in section, "what could not be told is an empty cell"


def test_files_of_different_models_are_not_passed_off_as_one(results):
    other = made_up.manifest()
    other["model"]["weights_sha256"] = "ef" * 32
    tables.write(made_up.reversion(), results / made_up.REVERSION, other, made_up.COLUMNS[made_up.REVERSION])
    assert "not measured on the same model" in "".join(page(results).words)


def test_names_are_escaped(results):
    tables.write(
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
    tables.write(frame, tmp_path / made_up.SERIES, made_up.manifest(), made_up.COLUMNS[made_up.SERIES])
    source = report.build(tmp_path).read_text()
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", source).lower())


def test_figures_are_written_beside_the_page(results):
    report.build(results)
    for name in ("calibration", "series", "reversion"):
        assert imread(results / f"{name}.png").shape[0] > 300


def test_a_graft_stands_beside_other_measurements(results):
    made_up.write_graft(results)
    parsed = page(results)
    assert [part["id"] for part in parsed.all("section")] == [
        "found",
        "what",
        "calibration",
        "series",
        "reversion",
        "graft",
        "untold",
        "columns",
        "provenance",
    ]
    text = "".join(parsed.words)
    assert "confirms a restoring pull" in text
    assert "Graft: +0.111" in text


def test_what_a_column_means_is_told_file_by_file_where_files_differ(tmp_path):
    made_up.write_graft(tmp_path)
    text = section(report.build(tmp_path).read_text(), "columns")
    for file in (study.METHODS, study.LEDGER):
        assert study.COLUMNS[file]["tokens"] in text
    assert f"<td>tokens, {study.LEDGER}</td>" in text
    assert "<td>damage</td>" in text, "one meaning, one row"


def test_a_changed_ledger_is_not_reported(tmp_path):
    made_up.write_graft(tmp_path)
    ledger = tmp_path / study.LEDGER
    ledger.write_text(ledger.read_text().replace("16059", "16"))
    with pytest.raises(ValueError, match="not the file its manifest describes"):
        report.build(tmp_path)
