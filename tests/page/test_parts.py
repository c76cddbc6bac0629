"""Cells, tables and the page itself."""

import json
import math
import re

import pandas as pd
import pytest

from support.pages import Page
from surgery.page.answers import Answer
from surgery.page.parts import (
    MEANINGS,
    Cell,
    Chart,
    Picture,
    Section,
    Table,
    cell,
    count_cell,
    marked,
    model_name,
    number_cell,
    rows,
    spread_cell,
    tabled,
    vega,
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
    first = Section("found", "Answers", answers=[Answer("Is it?", "no", "S:", (0.1, 0.0, 0.2), anchor="one")])
    part = Section(
        "one",
        "Title",
        headline="Mainly.",
        findings=["Found."],
        paragraphs=["Said."],
        points=["Point."],
        pictures=[Picture("drawn", "Caption", b"png")],
        tables=[Table("Numbers; of two kinds", ["head"], [[Cell("0.63", "[0.60, 0.66]")]])],
        files=["numbers.csv"],
    )
    parsed = Page(write_page(tmp_path / "page.html", "Name", "below", [first, part]).read_text())
    text = "".join(parsed.words)
    every = ("Name", "below", "Title", "Mainly.", "Found.", "Said.", "Point.", "Numbers", "of two kinds", "head")
    for shown in (*every, "0.63", "[0.60, 0.66]", "Is it?", "no", "0.10 [0.00, 0.20]"):
        assert shown in text, shown
    assert [link["href"] for link in parsed.all("a")] == ["#one", "#one", "numbers.csv"]
    (image,) = parsed.all("img")
    assert image["alt"] == "Caption"
    assert image["src"].endswith(part.pictures[0].base64)
    assert parsed.open == [], "every tag is closed"


def test_an_aside_is_folded_whole_and_a_page_without_charts_has_no_library(tmp_path):
    sections = [Section("found", "Answers", paragraphs=["Held."]), Section("aside", "Columns", aside=True)]
    source = write_page(tmp_path / "page.html", "Name", "", sections).read_text()
    assert '<section id="aside"><details class="aside"><summary>Columns</summary>' in source
    assert "<p>Held.</p>" in source.split("<details", 1)[0], "what holds for all answers is not folded"
    assert len(source) < 50_000


def test_text_from_outside_is_neither_markup_nor_control(tmp_path):
    evil = '</script><img src=x onerror="alert(1)">\u202e\x1b'
    chart = Chart(evil, evil, {"data": {"values": [{"wiring": evil}]}}, "wiring")
    table = Table(evil, [evil, "wiring"], [[Cell(evil, evil), Cell(evil)]], meanings={evil: evil})
    answer = Answer(evil, evil, evil, (0.0, 0.0, 0.0), null=(0.0, 0.0), null_name=evil, anchor=evil)
    parts = {"findings": [evil], "paragraphs": [evil], "points": [evil], "headline": evil, "files": [evil]}
    sections = [Section(evil, evil, answers=[answer], charts=[chart], tables=[table], **parts)]
    source = write_page(tmp_path / "page.html", evil, evil, [*sections, *sections]).read_text()
    assert not {"\u202e", "\x1b"} & set(source)
    assert "<img" not in source.replace(vega(), "")
    parsed = Page(source)
    assert parsed.open == []
    data = next(text for text in parsed.scripts if text.startswith('{"data"'))
    assert json.loads(data) == chart.spec, "as it was, inside its script element"


@pytest.mark.parametrize(
    ("text", "wirings"),
    [
        ("the best, :10 3:, gains", [":10 3:"]),
        ("of :7 {7.attn|8.attn} 9: and :2 (2:4)*3 4:.", [":7 {7.attn|8.attn} 9:", ":2 (2:4)*3 4:"]),
        ("layers 1 to 11: 0.96 [0.95, 0.96], as said: no", []),
        ("ratio 1:2 at 10 %", ["1:2"]),
    ],
)
def test_wirings_in_a_sentence_are_code(text, wirings):
    assert re.findall("<code>(.*?)</code>", str(marked(text))) == wirings


def test_the_letters_of_measures_are_explained_once_and_the_article_is_not():
    said = str(marked("A layer reads S = 1 and S = 2, R/R rotated; A = 0.3"))
    assert re.findall("<abbr[^>]*>(.*?)</abbr>", said) == ["S", "R", "A"]
    assert "A layer" in said


def test_a_head_is_explained_by_its_column_or_the_measure_in_it():
    table = Table("", [], [], meanings={"S": "of this file"})
    heads = ("S", "R_over_rotated", "formula, F", "wiring")
    assert [table.meaning(head) for head in heads] == ["of this file", MEANINGS["R"], MEANINGS["F"], ""]
