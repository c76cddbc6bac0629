"""A chapter appears when its files are there, and puts its sentences and pictures into its section."""

import pandas as pd
import pytest
from matplotlib.figure import Figure

from surgery.page.chapters import Chapter, Drawing, Sentence, headlines
from surgery.page.parts import Section

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
    assert shown.findings == ["First.", "Second."]
    (picture,) = shown.pictures
    assert (picture.name, picture.caption, picture.png[1:4]) == ("drawn", "What it shows", b"PNG")


def test_a_chapter_of_words_alone_claims_and_draws_nothing():
    chapter = Chapter("name", FILES, section)
    shown = chapter.on_page({}, {"main.csv": {"model": "toy"}})
    assert (shown.findings, shown.pictures, chapter.untold({}, {})) == ([], [], [])
    assert [sentence.headline for sentence in headlines(["One.", "Two."])] == [True, True]
