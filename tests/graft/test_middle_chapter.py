"""New middles by size and by data on the page: the section, its sentences, and what is left out."""

import html
import re

import pandas as pd
import pytest
from matplotlib.image import imread

from support import made_up
from support.made_up_walks import on_and_off, planted
from support.pages import Page, section
from surgery import report
from surgery.graft import say, size_study, walk_study
from surgery.records import tables as frames

SECTIONS = ["found", "middle", "what", "columns", "provenance"]
USUAL = {"settings": {"usual": [128, 2]}}


def sizes(factor: float = 0.5, seeds: int = 3) -> pd.DataFrame:
    """Two widths at equal tokens and operations, the wider with ``factor`` times the loss, and better at k = 4."""
    rows = []
    for budget in size_study.BUDGETS:
        for seed in range(seeds):
            for width in (128, 256):
                for k in (float("nan"), 0.0, 4.0):
                    loss = (1 + 0.01 * seed * (width - 192) / 64) * 0.1 * (factor if width == 256 else 1.0)
                    rows.append(
                        {
                            "budget": budget,
                            "d_mlp": width,
                            "depth": 2,
                            "seed": seed,
                            "k": k,
                            "unexplained": 0.4,
                            "cross_entropy": loss,
                            "cross_entropy_original": 0.01,
                            "damage": loss,
                            "steps": 4.0,
                            "exact": 0.5 + 0.01 * seed * (width == 256) + (0.25 if (width, k) == (256, 4.0) else 0.0),
                            "operations_with_teacher": 3.21e11,
                        }
                    )
    return pd.DataFrame(rows)


def tables_of_both(seeds: int = 4, **gains: float) -> dict[str, pd.DataFrame]:
    """What the two studies measure."""
    return {
        size_study.SIZES: sizes(seeds=seeds),
        walk_study.METHODS: planted(seeds=seeds, **gains),
        walk_study.MANIFOLD: on_and_off(),
    }


def findings(shown: str) -> list[str]:
    """The sentences of a section, without what marks their wirings and measures."""
    texts = re.findall(r'<p class="(?:finding|headline)">(.*?)</p>', shown)
    return [html.unescape(re.sub("<[^>]*>", "", text)) for text in texts]


def write(folder, tables: dict[str, pd.DataFrame]) -> None:
    """The tables in a folder, without the figures, which the page draws anew."""
    columns = {size_study.SIZES: size_study.COLUMNS} | walk_study.COLUMNS
    for name, table in tables.items():
        frames.write(table, folder / name, made_up.manifest() | USUAL, columns[name])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of both studies with its page."""
    folder = tmp_path_factory.mktemp("both")
    write(folder, tables_of_both(relabelled=0.1, more_real=0.05))
    return folder, report.build(folder).read_text()


def test_both_studies_make_a_section_with_figures_tables_and_sentences(both):
    folder, source = both
    parsed = Page(source)
    assert [part["id"] for part in parsed.all("section")] == SECTIONS
    assert parsed.open == [], "every tag is closed"
    assert len(parsed.all("img")) == 3
    for name in ("width_of_thought", "walk_manifold", "walk_methods"):
        assert imread(folder / f"{name}.png").shape[0] > 300
    shown = section(source, "middle")
    sentences = [
        *say.sizes(sizes(seeds=4), (128, 2)),
        *say.sizes_by_k(size_study.by_k(sizes(seeds=4), (128, 2)), (128, 2)),
        *say.walked_activations(on_and_off()),
        *say.walks(planted(relabelled=0.1, more_real=0.05)),
    ]
    assert sorted(findings(shown)) == sorted(sentences)
    for words in ("better.", "off the manifold", "helps.", "no difference that matters (less than 0.01)."):
        assert words in shown, words
    for cell in (
        "256",
        "3.21e+11",
        "0.765",
        "better",
        "off, control",
        "real tokens",
        "stationary, relabelled",
        "20,000",
    ):
        assert re.search(rf"(<td>|interval\">|<th[^>]*><button[^>]*>){re.escape(cell)} ?<", shown), cell
    assert re.search(r"<th[^>]*><button[^>]*>k = 4</button></th>", shown)
    assert "nan" not in shown


def test_what_was_found_says_what_size_and_walk_are_worth(both):
    folder, source = both
    found = section(source, "found")
    assert "at equal tokens, width 256 and 2 layers, times as small a loss" in found
    assert "1,000 real tokens, stationary, relabelled, share of the update&#39;s variance" in found
    assert re.findall(r'class="verdict">(.*?)<', found) == ["yes", "yes"]
    assert report.summary(folder) == [
        *say.sizes(sizes(seeds=4), (128, 2)),
        *say.walks_for_their_price(planted(relabelled=0.1, more_real=0.05)),
    ]


@pytest.mark.parametrize(
    ("name", "shown", "hidden"),
    [
        (size_study.SIZES, "What every size reached", "manifold"),
        (walk_study.MANIFOLD, "on the manifold as far as", "real tokens"),
        (walk_study.METHODS, "What every method reached", "What every size"),
    ],
)
def test_one_file_alone_makes_a_section(name, shown, hidden, tmp_path):
    write(tmp_path, {name: tables_of_both()[name]})
    source = report.build(tmp_path).read_text()
    assert [part["id"] for part in Page(source).all("section")] == SECTIONS
    assert len(Page(source).all("img")) == 1
    text = section(source, "middle")
    assert shown in text
    assert hidden not in text


def test_one_seed_is_said_not_to_be_enough(both, tmp_path):
    write(tmp_path, tables_of_both(seeds=1))
    source = report.build(tmp_path).read_text()
    assert "trained with one seed: they cannot be compared" in section(source, "middle")
    assert "one seed tells nothing" in section(source, "middle")
    _, source = both
    assert "claims are corrected for the number of comparisons" in section(source, "middle")
    assert "one seed" not in section(source, "middle")


def test_every_column_is_explained(both):
    _, source = both
    columns = section(source, "columns")
    for meaning in (size_study.COLUMNS["budget"], walk_study.COLUMNS[walk_study.METHODS]["harvested"]):
        assert meaning in columns


def test_a_changed_file_is_not_reported(tmp_path):
    write(tmp_path, tables_of_both())
    table = tmp_path / walk_study.METHODS
    frame = frames.read(table)
    frame.assign(unexplained=0.0).to_csv(table, index=False)
    with pytest.raises(ValueError, match="not the file its manifest describes"):
        report.build(tmp_path)
