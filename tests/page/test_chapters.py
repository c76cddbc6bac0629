"""A chapter appears when its files are there, and puts its sentences and pictures into its section."""

import pandas as pd
import pytest
from matplotlib.figure import Figure

from surgery.page.answers import Answer
from surgery.page.chapters import Chapter, Drawing, Sentence, headlines
from surgery.page.charts import plot
from surgery.page.parts import MEANINGS, Section, Table

FILES = {"main.csv": {}, "more.csv": {}, "other.csv": {}}


def section(tables, manifests):
    return Section("name", f"{len(tables)} tables of {manifests['main.csv']['model']}", paragraphs=["A paragraph."])


@pytest.mark.parametrize(
    ("requires", "names", "read"),
    [
        ((), [], []),
        ((), ["unknown.csv"], []),
        ((), ["other.csv", "unknown.csv", "main.csv"], ["main.csv", "other.csv"]),
        (("main.csv",), ["other.csv"], []),
        (("main.csv",), ["other.csv", "main.csv"], ["main.csv", "other.csv"]),
        (("main.csv", "more.csv"), ["main.csv", "other.csv"], ["main.csv", "more.csv", "other.csv"]),
    ],
)
def test_the_files_to_read(requires, names, read):
    assert Chapter("name", FILES, section, requires=requires).present(names) == read


def test_sentences_and_pictures_are_put_into_the_section():
    def say(tables, manifests):
        return [Sentence("First."), *headlines(["Second."])]

    def draw(tables, manifests):
        return {"drawn": Drawing(Figure(figsize=(1, 1)), "What it shows")}

    tables, manifests = {"main.csv": pd.DataFrame()}, {"main.csv": {"model": "toy"}}
    shown = Chapter("name", FILES, section, say, draw=draw).on_page(tables, manifests)
    assert (shown.anchor, shown.title, shown.paragraphs) == ("name", "1 tables of toy", ["A paragraph."])
    assert (shown.headline, shown.findings) == ("Second.", ["First."]), "the first headline leads"
    (picture,) = shown.pictures
    assert (picture.name, picture.caption, picture.png[1:4]) == ("drawn", "What it shows", b"PNG")


def test_a_sentence_that_leads_stands_before_the_first_headline():
    def say(tables, manifests):
        return [Sentence("First.", headline=True), Sentence("Answer.", headline=True, leads=True), Sentence("Last.")]

    shown = Chapter("name", FILES, section, say).on_page({}, {"main.csv": {"model": "toy"}})
    assert (shown.headline, shown.findings) == ("Answer.", ["First.", "Last."])


def test_charts_limits_files_and_the_meanings_of_columns_are_put_into_the_section():
    frame = pd.DataFrame({"wiring": [":", ":3 2:"], "gain": [0.0, 0.1]})

    def tabled(tables, manifests):
        return Section("name", "Title", tables=[Table("", ["gain", "S", "k = 2"], [])])

    shown = Chapter(
        "name",
        {"main.csv": {"gain": "what it gains"}},
        tabled,
        untold=lambda tables, manifests: ["Undecided."],
        charts=lambda tables, manifests: {"drawn": plot(frame, "gain", told="What each gains")},
    ).on_page({"main.csv": frame}, {})
    assert (shown.points, shown.files) == (["Undecided."], ["main.csv"])
    (chart,) = shown.charts
    assert (chart.name, chart.caption, chart.copied) == ("drawn", "What each gains. From 0 to 0.1", "wiring")
    (table,) = shown.tables
    assert [table.meaning(head) for head in table.heads] == ["what it gains", MEANINGS["S"], ""]


def test_every_answer_leads_to_its_chapter():
    def answers(tables, manifests):
        return [Answer("Is it?", "no"), Answer("Was it?", "undecided")]

    answered = Chapter("name", FILES, section, answers=answers).answered({}, {})
    assert [(answer.verdict, answer.anchor) for answer in answered] == [("no", "name"), ("undecided", "name")]


def test_a_chapter_of_words_alone_claims_and_draws_nothing():
    chapter = Chapter("name", FILES, section)
    shown = chapter.on_page({}, {"main.csv": {"model": "toy"}})
    assert (shown.headline, shown.findings, shown.pictures, shown.charts, shown.points) == ("", [], [], [], [])
    assert [sentence.headline for sentence in headlines(["One.", "Two."])] == [True, True]
