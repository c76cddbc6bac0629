"""The chapter of the anatomy, from made-up tables."""

import pandas as pd

from support import made_up, made_up_anatomy
from surgery.anatomy import files, say
from surgery.anatomy.chapter import CHAPTER

TABLES = {file: made_up_anatomy.tables()[name] for file, name in files.NAMES.items() if file != files.CONVERGENCE}
CURVE = pd.DataFrame(
    {"layer": [0, 1], "same_content": 0.2, "same_language": 0.1, "neither": 0.0, "difference": [0.1, 0.1]}
)
MANIFESTS = dict.fromkeys(files.COLUMNS, made_up.manifest())


def test_the_section_has_the_sentences_the_figures_and_the_contrast():
    section = CHAPTER.on_page(TABLES, MANIFESTS)
    assert [section.headline, *section.findings] == [*map(str, say.sentences(made_up_anatomy.tables(), 6))]
    assert [picture.name for picture in section.pictures] == ["anatomy_boundaries", "anatomy_ends"]
    (table,) = section.tables
    (row,) = table.rows
    assert [cell.value for cell in row[:7]] == ["all", "-0.20", "-0.20", "-0.20", "-0.30", "0.01", "0.01"]
    assert row[1].interval == "[-0.21, -0.19]"
    assert row[7].value == "supported: ..."
    assert section.paragraphs[-1].startswith("In windows of two layers R and O are the same")


def test_convergence_is_drawn_where_it_was_measured():
    figures = CHAPTER.draw(TABLES | {files.CONVERGENCE: CURVE}, MANIFESTS)
    assert set(figures) == set(files.CAPTIONS)
    assert {drawing.caption for drawing in figures.values()} == set(files.CAPTIONS.values())


def test_it_appears_with_the_table_of_the_ends():
    assert CHAPTER.present([files.BOUNDARIES]) == []
    assert set(CHAPTER.present([files.ENDS])) == set(files.COLUMNS) - {files.CONVERGENCE}
