"""The chapter of mean reversion, from made-up tables."""

from support import made_up
from surgery.reversion import files, say
from surgery.reversion.chapter import CHAPTER

LAYERS = made_up.reversion()
PANEL = made_up.panel()
MANIFESTS = dict.fromkeys(files.COLUMNS, made_up.manifest())


def test_layers_alone_make_a_section_with_their_sentences_figure_and_table():
    section = CHAPTER.on_page({files.LAYERS: LAYERS}, MANIFESTS)
    assert [section.headline, *section.findings] == say.by_layer(LAYERS)
    assert [(picture.name, picture.caption) for picture in section.pictures] == [
        ("reversion", files.CAPTIONS["reversion"])
    ]
    (table,) = section.tables
    assert [row[0].value for row in table.rows] == [str(layer) for layer in range(6)]
    assert table.rows[1][1].value == "0.200"
    assert table.rows[1][1].interval == "[0.190, 0.210]"
    assert table.rows[1][-1].value == "yes"


def test_other_tables_add_their_sentences_behind_those_of_the_layers():
    sentences = CHAPTER.say({files.LAYERS: LAYERS, files.PANEL: PANEL}, MANIFESTS)
    headlines = [str(sentence) for sentence in sentences if sentence.headline]
    assert headlines == say.by_layer(LAYERS)
    assert [str(sentence) for sentence in sentences[len(headlines) :]] == say.panel(PANEL)


def test_limits_are_those_of_kappa():
    assert CHAPTER.untold({files.LAYERS: LAYERS}, MANIFESTS) == say.limits(LAYERS)


def test_it_appears_with_the_table_of_layers():
    assert CHAPTER.present([files.PANEL]) == []
    assert CHAPTER.present([files.PANEL, files.LAYERS]) == [files.LAYERS, files.PANEL]
