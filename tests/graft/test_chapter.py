"""A graft on the page: its sentences, its tables, and what the study of fresh middles adds."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from support import made_up
from support.pages import Page, section
from surgery import report
from surgery.graft import chapter, reinitialise, study
from surgery.instruments import fidelity
from surgery.records import tables
from surgery.reversion import kappa
from surgery.series import window

SECTIONS = ["found", "graft", "what", "columns", "provenance"]


@pytest.mark.parametrize("answers", [True, False])
def test_a_graft_alone_makes_a_page(tmp_path, answers):
    made_up.write_graft(tmp_path, answers=answers)
    source = report.build(tmp_path).read_text()
    parsed = Page(source)
    assert [part["id"] for part in parsed.all("section")] == SECTIONS
    assert len(parsed.all("img")) == 1
    assert imread(tmp_path / "graft.png").shape[0] > 300
    shown = section(source, "graft")
    for sentence in made_up.GRAFT_FINDINGS:
        assert f'<p class="finding">{sentence}</p>' in shown, sentence
    for cell in (
        "skip",
        "0.777",
        "[0.767, 0.787]",
        "graft, seed 0",
        "0.111",
        "0.500",
        "1,000",
        "20,000",
        "3.21e+11",
        "4.32e+11",
        "16",
        "harvest",
        "teacher",
        "student",
        "16,059",
        "1.23e+10",
    ):
        assert re.search(rf"(<td>|interval\">){re.escape(cell)} ?<", shown), cell
    assert (">0.750 <" in shown) == answers
    assert "nan" not in shown
    assert re.search(r'<p class="headline">Graft: \+0\.111 \[\+0\.101, \+0\.121\] .*nats.* a token', shown)
    found = section(source, "found")
    assert "loss added by the best (graft, seed 0)" in found
    assert "0.111 [0.101, 0.121]" in found
    assert not [text for text in report.summary(tmp_path) if "Skip" in text]


def test_a_graft_without_sentences_of_its_own_gets_some(tmp_path):
    made_up.write_graft(tmp_path, findings=None)
    assert "Skip: +0.777" in section(report.build(tmp_path).read_text(), "graft")


def test_seeds_are_told_apart_and_one_alone_is_said_to_be(tmp_path):
    made_up.write_graft(tmp_path, seeds=1)
    assert "trained with one seed" in section(report.build(tmp_path).read_text(), "graft")
    made_up.write_graft(tmp_path, seeds=2)
    source = report.build(tmp_path).read_text()
    assert "trained with one seed" not in section(source, "graft")
    assert "graft, seed 1" in section(source, "graft")
    assert not [text for text in report.summary(tmp_path) if "0.222" in text], "sentences are of the first seed"


def test_what_the_study_of_fresh_middles_adds_is_shown(tmp_path):
    manifest = made_up.write_graft(tmp_path)
    run = study.RUN
    by_k = pd.DataFrame(
        [
            {"method": "graft", "seed": float(seed), "k": k} | made_up.graft_scores(exact=1 - k / 4 - seed / 8)
            for seed in (0, 1)
            for k in (0, 2)
        ]
    )
    wiring = pd.DataFrame([{"method": "the old middle", "seed": np.nan, "S": 0.543, "preference": 1.665}])
    layers = pd.DataFrame(
        [
            {
                "layer": 3,
                **made_up.with_interval("damage", 0.432),
                "damage_least": 0.321,
                "damage_most": 0.543,
                **made_up.with_interval("damage_skip", 0.654),
                "robust": "no",
            }
        ]
    )
    tables.write(by_k, tmp_path / chapter.BY_K, manifest, run | fidelity.COLUMNS | {"k": "steps"})
    tables.write(wiring, tmp_path / chapter.WIRING, manifest, run | window.COLUMNS | kappa.COLUMNS)
    tables.write(layers, tmp_path / chapter.LAYERS, manifest, reinitialise.COLUMNS)
    shown = section(report.build(tmp_path).read_text(), "graft")
    for cell in (
        "0.938",
        "[0.875, 1.000]",
        "0.438",
        "the old middle",
        "0.543",
        "1.665",
        "3",
        "0.432",
        "0.321",
        "0.654",
    ):
        assert re.search(rf"(<td>|interval\">){re.escape(cell)} ?<", shown), cell
    assert re.search(r"<th[^>]*><button[^>]*>k = 2</button></th>", shown)
