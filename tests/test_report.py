"""The page: self-contained, complete, made from the files alone; and the figures that go with it."""

import re
from html.parser import HTMLParser

import made_up
import numpy as np
import pandas
import pytest
from matplotlib.image import imread

from surgery import figures, frames, measures, report


@pytest.fixture
def results(tmp_path):
    """A folder with all three measurements."""
    frames.write(made_up.series(), tmp_path / report.SERIES, made_up.manifest())
    frames.write(made_up.networks(), tmp_path / report.CALIBRATION, made_up.manifest())
    frames.write(made_up.reversion(), tmp_path / report.REVERSION, made_up.manifest())
    return tmp_path


class Page(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


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
        assert frames.COLUMNS[base] in text


def test_the_numbers_of_the_networks_stand_beside_the_model(results):
    source = report.build(results).read_text()
    section = source[source.index('id="calibration"') : source.index('id="series"')]
    for name in ("parallel", "mixed 0.25", "serial", "toy"):
        assert f"<td>{name}</td>" in section
    assert "1.000" in section
    assert "0.650" in section


@pytest.mark.parametrize(
    ("kept", "sections", "images"),
    [(report.SERIES, "found what series untold", 1), (report.REVERSION, "found what reversion untold", 1)],
)
def test_one_measurement_alone_makes_a_page(results, kept, sections, images):
    for name in {report.SERIES, report.REVERSION, report.CALIBRATION} - {kept}:
        (results / name).unlink()
    parsed = page(results)
    assert [section["id"] for section in parsed.all("section")] == [*sections.split(), "columns", "provenance"]
    assert len(parsed.all("img")) == images


def test_every_measure_and_what_it_costs_stand_in_one_section(results):
    table = pandas.DataFrame(
        [("S, pairs", "series", "serial", 0.97), ("S, pairs", "series", "toy", 0.31),
         ("rho", "series", "serial", np.nan), ("rho", "series", "toy", 0.12)],
        columns=list(measures.COLUMNS),
    )  # fmt: skip
    taken = pandas.DataFrame([("series.windows", 18.5, 18.4, 27.3)], columns=list(measures.COST_COLUMNS))
    frames.write(table, results / report.MEASURES, made_up.manifest(), measures.COLUMNS)
    without = report.build(results).read_text()
    assert "series.windows" not in without[without.index('id="measures"') : without.index('id="series"')]
    frames.write(taken, results / report.COSTS, made_up.manifest(), measures.COST_COLUMNS)
    source = report.build(results).read_text()
    section = source[source.index('id="measures"') : source.index('id="series"')]
    assert section.index(">serial</th>") < section.index(">toy</th>")
    for shown in ("S, pairs", "0.97", "0.31", "rho", "0.12", "series.windows", "18.5", "18.4", "27.3"):
        assert f"<td>{shown}" in section, shown
    assert "nan" not in section, "what could not be told is an empty cell"


def test_files_of_different_models_are_not_passed_off_as_one(results):
    other = made_up.manifest()
    other["model"]["weights_sha256"] = "ef" * 32
    frames.write(made_up.reversion(), results / report.REVERSION, other)
    assert "not measured on the same model" in "".join(page(results).words)


def test_names_are_escaped(results):
    frames.write(made_up.series(), results / report.SERIES, made_up.manifest("<b>bold</b>"))
    assert "<b>bold" not in report.build(results).read_text()


def test_a_folder_without_measurement_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"holds no measurement .* surgery study --out"):
        report.build(tmp_path)


def test_a_changed_file_is_not_reported(results):
    (results / report.SERIES).write_text("start,stop,S\n1,3,0.5\n")
    with pytest.raises(ValueError, match="not the file its manifest describes"):
        report.build(results)


def test_missing_intervals_and_undefined_numbers_make_a_page(tmp_path):
    frame = made_up.series(3)
    frame[[name for name in frame if name.endswith(("_low", "_high"))]] = np.nan
    frame.loc[0, ["S", "R", "R_over_N"]] = np.nan
    frames.write(frame, tmp_path / report.SERIES, made_up.manifest())
    source = report.build(tmp_path).read_text()
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", source).lower())


def test_figures_are_written_beside_the_page(results):
    report.build(results)
    for name in ("calibration", "series", "reversion"):
        assert imread(results / f"{name}.png").shape[0] > 300


@pytest.mark.parametrize("n_layers", [2, 5, 12, 48])
def test_figures_are_drawn_for_any_depth(n_layers):
    for figure in (
        figures.windows(made_up.series(n_layers)),
        figures.reversion(made_up.reversion(n_layers)),
        figures.calibration(made_up.networks(), made_up.series(n_layers)),
    ):
        assert figures.png(figure).startswith(b"\x89PNG")


def test_the_triangle_shows_each_window_in_its_place_and_nothing_else():
    frame = pandas.DataFrame({"start": [0, 1], "stop": [2, 4], "S": [0.25, 0.75], "R_over_N": [0.5, 2.0]})
    axes = figures.windows(frame).axes[0]
    shown = axes.images[0].get_array()
    assert shown[1, 0] == 0.25
    assert shown[3, 1] == 0.75
    assert shown.count() == 2
    assert {text.get_text(): text.get_position() for text in axes.texts} == {".25": (0, 1), ".75": (1, 3)}


def test_numbers_are_printed_into_the_triangle_only_where_they_fit():
    assert len(figures.windows(made_up.series(16)).axes[0].texts) == 16 * 15 / 2
    assert not figures.windows(made_up.series(17)).axes[0].texts


def test_the_ratio_is_shown_around_one_on_a_logarithmic_scale():
    norm = figures.windows(made_up.series(R_over_N=8.0)).axes[1].images[0].norm
    assert norm(1.0) == pytest.approx(0.5)
    assert norm(8.0) == pytest.approx(1.0)
    assert norm(1 / 8) == pytest.approx(0.0)


def test_layer_0_is_left_out_of_the_depth_figure():
    above, below = figures.reversion(made_up.reversion(6)).axes
    assert list(above.lines[-2].get_xdata()) == [1, 2, 3, 4, 5]
    assert "layer 0 is left out" in below.get_xlabel()


def test_the_nulls_are_in_the_legend():
    words = [entry.get_text() for entry in figures.reversion(made_up.reversion()).axes[0].get_legend().get_texts()]
    assert sum(word.startswith("null: ") for word in words) == 4
    assert sum(word.startswith("by intervention: ") for word in words) == 3


def test_the_same_figure_gives_the_same_bytes():
    once, again = (figures.png(figures.windows(made_up.series())) for _ in range(2))
    assert once == again
