"""Cells, tables and the page itself."""

import math

import pandas as pd
import pytest

from support.pages import Page
from surgery.page.parts import (
    Cell,
    Picture,
    Section,
    Table,
    cell,
    count_cell,
    model_name,
    number_cell,
    rows,
    spread_cell,
    tabled,
    write_page,
)


def test_a_number_with_its_interval():
    assert number_cell(0.634, 0.6, 0.66) == Cell("0.63", "[0.60, 0.66]")
    assert number_cell(0.634, 0.6, 0.66, 1) == Cell("0.6", "[0.6, 0.7]")
    assert number_cell(0.634, -0.6, 0.66, signed=True) == Cell("+0.63", "[-0.60, +0.66]")


def test_a_number_without_an_interval_and_no_number():
    assert number_cell(0.634) == Cell("0.63")
    assert number_cell(0.634, 0.6, math.nan) == Cell("0.63"), "half an interval is none"
    assert number_cell(math.nan) == number_cell(math.nan, 0.1, 0.2) == Cell("")


def test_cells_of_a_row():
    row = pd.Series({"S": 0.2, "S_low": 0.1, "S_high": 0.3, "R": 0.5, "verdict": "yes", "O": math.nan})
    assert cell(row, "S") == Cell("0.20", "[0.10, 0.30]")
    assert cell(row, "R", 1, signed=True) == Cell("+0.5")
    assert cell(row, "verdict") == Cell("yes")
    assert cell(row, "O") == Cell("")


def test_cells_of_counts_and_spreads():
    assert [count_cell(number).value for number in (math.nan, 0.0, 20_510.0, 9_999_999.0, 3.21e11)] == [
        "",
        "0",
        "20,510",
        "9,999,999",
        "3.21e+11",
    ]
    assert spread_cell(pd.Series([0.1, 0.4, math.nan, 0.2])) == Cell("0.200", "[0.100, 0.400]")
    assert spread_cell(pd.Series([math.nan])) == Cell("")


def test_a_table_has_a_labelled_row_for_each_of_a_frame():
    frame = pd.DataFrame({"layer": [1, 2], "S": [0.25, 0.5], "S_low": [0.2, 0.4], "S_high": [0.3, 0.6]})
    table = tabled("By layer", "layer", rows(frame), ["S"], lambda row: f"layer {row['layer']:.0f}")
    assert (table.caption, table.heads) == ("By layer", ["layer", "S"])
    assert table.rows == [
        [Cell("layer 1"), Cell("0.25", "[0.20, 0.30]")],
        [Cell("layer 2"), Cell("0.50", "[0.40, 0.60]")],
    ]


@pytest.mark.parametrize(
    ("name", "shown"), [("babel", "babel"), ("org/model", "org/model"), ("/a/b/mine", "mine"), ("./mine", "mine")]
)
def test_a_model_is_named_without_the_path_of_its_folder(name, shown):
    assert model_name({"model": {"name": name}}) == shown


def test_a_page_shows_every_part_of_a_section_and_links_to_it(tmp_path):
    part = Section(
        "one",
        "Title",
        findings=["Found."],
        paragraphs=["Said."],
        points=["Point."],
        pictures=[Picture("drawn", "Caption", b"png")],
        tables=[Table("Numbers", ["head"], [[Cell("0.63", "[0.60, 0.66]")]])],
    )
    parsed = Page(write_page(tmp_path / "page.html", "Name", "below", [part]).read_text())
    text = "".join(parsed.words)
    for shown in ("Name", "below", "Title", "Found.", "Said.", "Point.", "Numbers", "head", "0.63", "[0.60, 0.66]"):
        assert shown in text, shown
    assert [link["href"] for link in parsed.all("a")] == ["#one"]
    (image,) = parsed.all("img")
    assert image["alt"] == "Caption"
    assert image["src"].endswith(part.pictures[0].base64)
