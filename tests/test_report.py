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
from surgery.page.parts import MEANINGS, vega
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


def test_the_page_fetches_nothing(built):
    """The library of the charts is in it, once; it names addresses, and the policy forbids to open any."""
    assert built.count(vega()) == 1
    source = built.replace(vega(), "")
    assert len(source) < 1_000_000
    for address in ("http://", "https://", "@import", "url("):
        assert address not in source
    parsed = Page(source)
    (policy,) = (meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not any("src" in script for script in parsed.all("script"))
    assert not parsed.all("link")
    assert not parsed.all("iframe")
    assert len(parsed.all("img")) == 3
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in parsed.all("img"))
    assert parsed.open == [], "every tag is closed"


def test_every_entry_of_the_contents_leads_somewhere(built):
    sections = [section["id"] for section in Page(built).all("section")]
    assert sections == ["found", "series", "reversion", "calibration", "what", "columns", "provenance"]
    contents = built[built.index("<nav") : built.index("</nav>")]
    assert [link["href"].removeprefix("#") for link in Page(f"{contents}</nav>").all("a")] == sections[1:]


def test_every_answer_has_a_number_a_null_and_a_link_to_its_chapter(built):
    table = built[built.index('<table class="answers">') : built.index("<nav")]
    rows = re.findall(r"<tr><td>.*?</tr>", table, re.DOTALL)
    assert [re.search('href="#(.*?)"', row)[1] for row in rows] == ["series", "series", "reversion", "calibration"]
    verdicts = [re.search('class="verdict">(.*?)<', row)[1] for row in rows]
    assert verdicts == ["in series", "no", "in 5 of 5 layers", "yes"]
    for shown in ("0.65 [0.64, 0.66]", "untrained layers: 0.39 to 0.41", "0.80 [0.79, 0.81]", "no loss: 0.00"):
        assert shown in table, shown


def test_every_chapter_has_a_chart_that_says_what_it_shows_and_links_to_its_files(built):
    parsed = Page(built)
    charts = [place for place in parsed.all("div") if place.get("class") == "chart"]
    assert [place["id"] for place in charts] == ["chart-series", "chart-reversion", "chart-calibration"]
    assert charts[0]["aria-label"].startswith("S of every window of layers: 0 parallel, 1 serial;")
    assert charts[0]["aria-label"].endswith("From 0.65 (layers 0 to 1) to 0.65 (layers 0 to 1)")
    linked = [link["href"] for link in parsed.all("a") if link["href"].endswith(".csv")]
    assert linked == [made_up.SERIES, made_up.REVERSION, made_up.CALIBRATION]


def test_what_all_files_share_is_one_line(built):
    assert "All files: toy, 6 layers, d_model 8; 32 prompts, 320 tokens" in section(built, "what")
    assert "<table" not in section(built, "what")


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
    shown = section(built, "calibration")
    for name in ("parallel", "mixed 0.25", "serial", "toy"):
        assert f"<td>{name}</td>" in shown
    assert "1.000" in shown
    assert "0.650" in shown


@pytest.mark.parametrize(
    ("kept", "sections", "images"),
    [(made_up.SERIES, "found series what", 1), (made_up.REVERSION, "found reversion what", 1)],
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
    assert "series.windows" not in section(report.build(results).read_text(), "measures")
    tables.write(taken, results / made_up.COSTS, made_up.manifest(), side_by_side.COST_COLUMNS)
    text = section(report.build(results).read_text(), "measures")
    assert text.index(">serial</button>") < text.index(">toy</button>")
    assert f'title="{MEANINGS["F"]}">formula, F</button>' in text
    for shown in ("S, pairs", "0.97", "0.31", "rho", "0.12", "series.windows", "18.5", "18.4", "27.3"):
        assert f"<td>{shown}" in text, shown
    assert "nan" not in text, "what could not be told is an empty cell"


def test_files_of_different_models_are_not_passed_off_as_one(results):
    other = made_up.manifest()
    other["model"]["weights_sha256"] = "ef" * 32
    tables.write(made_up.reversion(), results / made_up.REVERSION, other, made_up.COLUMNS[made_up.REVERSION])
    source = report.build(results).read_text()
    answers = section(source, "found")
    assert answers.index("not measured on the same model") < answers.index("<table"), "before any answer"
    assert "<td>efefefefefef</td>" in section(source, "what"), "a row for each model"


def test_names_are_escaped(results):
    tables.write(
        made_up.series(), results / made_up.SERIES, made_up.manifest("<b>bold</b>"), made_up.COLUMNS[made_up.SERIES]
    )
    tables.write(
        made_up.networks().replace({"network": {"random 0": "<b>bold</b></script>"}}),
        results / made_up.CALIBRATION,
        made_up.manifest(),
        made_up.COLUMNS[made_up.SERIES],
    )
    source = report.build(results).read_text()
    assert "<b>bold" not in source
    assert "\\u003cb\\u003ebold" in source, "in the chart too"


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
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", source.replace(vega(), "")).lower())


def test_figures_are_written_beside_the_page(results):
    report.build(results)
    for name in ("calibration", "series", "reversion"):
        assert imread(results / f"{name}.png").shape[0] > 300


def test_a_graft_stands_beside_other_measurements(results):
    made_up.write_graft(results)
    parsed = page(results)
    assert [part["id"] for part in parsed.all("section")] == [
        "found",
        "series",
        "reversion",
        "graft",
        "calibration",
        "what",
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
