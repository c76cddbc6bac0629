"""Both halves of the prediction on planted tables, the figures, and the section of the page."""

import html
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from support import made_up
from support.pages import Page, section
from surgery import report
from surgery.dropout import say, study, trained
from surgery.dropout.files import COLUMNS, CONFIRMATION, ENSEMBLE, MODELS, PROBES
from surgery.dropout.verdicts import (
    CONFIRMED,
    FRESH_RATES,
    FRESH_SEEDS,
    LOSS,
    MEASURES,
    STEPS,
    confirmed,
    verdicts,
)

RATES, SEEDS = (0.0, 0.1, 0.2, 0.4), (0, 1, 2)


def planted(noise: float = 0.01, seeds=SEEDS, **slopes: float) -> pd.DataFrame:
    """Every measure at 1 and noise, those named with a slope along the rate; at matched loss half of it."""
    generator, rows = np.random.default_rng(0), []
    for matched, share in ((STEPS, 1.0), (LOSS, 0.5)):
        for seed in seeds:
            for rate in RATES:
                row = {"rate": rate, "seed": seed, "matched": matched, "loss": 1 + rate, "answers": 0.5}
                row |= {f"exact_{k}": 1 - rate for k in range(len(trained.SHARES))} | {
                    "explained": 0.9,
                    "dead": 0,
                }
                for name in MEASURES:
                    row[name] = 1 + slopes.get(name, 0.0) * rate * share + noise * generator.standard_normal()
                rows.append(row)
    return pd.DataFrame(rows)


def probed(slope: float) -> pd.DataFrame:
    generator = np.random.default_rng(1)
    return pd.DataFrame(
        [
            {
                "rate": rate,
                "seed": seed,
                "matched": matched,
                "probe": probe,
                "p": p,
                "excess": 1 + slope * rate + 0.01 * generator.standard_normal(),
            }
            for rate in RATES
            for seed in SEEDS
            for matched in ("steps", "loss")
            for probe in ("layers", "neurons")
            for p in (0.1, 0.4)
        ]
    )


@pytest.mark.parametrize(
    ("within", "across", "words"),
    [
        (-1, 1, ("confirmed", "confirmed")),
        (1, -1, ("refuted", "refuted")),
        (0, 0, ("undecided", "undecided")),
        (-1, 0, ("confirmed", "undecided")),
    ],
)
def test_each_half_by_the_measure_that_decides_it(within, across, words):
    halves = say.models(planted(psi=within, additivity=across))[:2]
    assert halves[0].startswith(f"Dropout lowers superposition within components: {words[0]}. Effective features")
    assert halves[1].startswith(f"Dropout raises redundancy across components: {words[1]}. Additivity")
    assert ("Exploratory: this measure was chosen after" in halves[1]) == (set(SEEDS) == {0, 1, 2})
    assert "Exploratory" not in halves[0]


def test_the_change_is_along_the_line_from_none_to_most():
    frame = planted(noise=1e-9, psi=-1.0)
    judged = verdicts(frame).set_index(["measure", "matched"])
    assert judged.loc[("psi", "steps"), "change"] == pytest.approx(-0.4, abs=1e-6)
    assert judged.loc[("psi", "loss"), "change"] == pytest.approx(-0.2, abs=1e-6)
    assert judged.loc[("kurtosis", "loss"), "verdict"] in ("undecided", "rises", "falls")
    assert len(judged) == 2 * len(MEASURES)


def test_disagreement_of_the_two_ways_of_matching_is_undecided():
    frame = planted(psi=-1.0)
    frame.loc[(frame["matched"] == "loss"), "psi"] = 1 + frame["rate"]
    assert "components: undecided." in say.models(frame)[0]


@pytest.mark.parametrize(
    ("slope", "seeds", "word"),
    [
        (1, FRESH_SEEDS, "confirmed"),
        (0, FRESH_SEEDS, "not confirmed"),
        (-1, FRESH_SEEDS, "not confirmed"),
        (1, FRESH_SEEDS[:-1], "incomplete"),
        (1, range(5), "exploratory"),
    ],
)
def test_the_prediction_is_confirmed_by_fresh_seeds_at_both_ways_of_matching(slope, seeds, word):
    frame = planted(seeds=seeds, additivity=slope)
    frame = frame[frame["rate"].isin(FRESH_RATES)]
    said = say.confirmation(frame)
    assert len(said) == 3
    assert said[0].startswith("Primary prediction")
    assert f", from p = 0 to 0.4: {word};" in said[0]
    if word == "confirmed":
        one = frame.assign(additivity=frame["additivity"].where(frame["matched"] == STEPS, 1.0))
        assert "not confirmed" in say.confirmation(one)[0]
        lacking = frame.assign(additivity=frame["additivity"].where(frame["seed"] != 3))
        assert "incomplete" in say.confirmation(lacking)[0]


def test_the_bundled_confirmation_is_of_all_that_was_predicted():
    frame = trained.confirmation()
    assert list(frame) == list(COLUMNS[CONFIRMATION])
    assert {(r, s) for r, s in zip(frame["rate"], frame["seed"])} == {(r, s) for r in FRESH_RATES for s in FRESH_SEEDS}
    assert all(confirmed(frame, name) in ("confirmed", "not confirmed") for name in CONFIRMED)


def test_a_measure_that_a_model_does_not_have_is_left_out_of_its_seed():
    frame = planted(self_repair=1.0)
    frame.loc[frame["seed"] == 2, "self_repair"] = float("nan")
    judged = verdicts(frame).set_index(["measure", "matched"])
    assert judged.loc[("self_repair", "steps"), "seeds"] == 2
    one = verdicts(planted(seeds=(0,)))
    assert (one["verdict"] == "one seed tells nothing").all()
    with pytest.raises(ValueError, match="models of 1 rates of dropout: a change needs two or more"):
        verdicts(frame[frame["rate"] == 0])


def test_probes_say_whether_training_with_dropout_hardens():
    said = say.probes(probed(-1.0))
    assert len(said) == 4
    assert all(sentence.endswith("hurts less.") for sentence in said)
    assert all(sentence.endswith("hurts more.") for sentence in say.probes(probed(1.0)))
    assert all(sentence.endswith("undecided.") for sentence in say.probes(probed(0.0)))


def test_the_page_has_a_section_with_figures_table_and_sentences(tmp_path):
    frame, probes = planted(psi=-1.0), probed(-1.0)
    study.write(tmp_path, {MODELS: frame, PROBES: probes}, made_up.manifest())
    source = report.build(tmp_path).read_text()
    assert Page(source).open == []
    for name in ("dropout_models", "dropout_probes"):
        assert imread(tmp_path / f"{name}.png").shape[0] > 300
    shown = section(source, "dropout")
    marked = re.findall(r'<p class="(?:finding|headline)">(.*?)</p>', shown)
    said = [html.unescape(re.sub("<[^>]*>", "", text)) for text in marked]
    assert said == [*say.models(frame)[:2], *say.probes(probes)]
    assert shown.count("<tr>") == 1 + 2 * len(MEASURES)
    assert "nan" not in shown
    assert report.summary(tmp_path) == say.models(frame)[:2]


def test_small_models_are_measured_from_end_to_end(tmp_path, monkeypatch):
    small = {"n_layers": 3, "d_model": 16, "d_mlp": 32, "n_heads": 2, "steps": 2, "every": 1}
    monkeypatch.setattr(trained, "LADDER", (9.0,))
    made = [trained.train(trained.Recipe(rate=rate, **small), tmp_path / str(rate)) for rate in (0.0, 0.4)]
    frame = study.measure(made, layers=[1], count=30, coder_steps=20, resamples=10)
    assert list(frame) == list(COLUMNS[MODELS])
    assert frame[["rate", "matched"]].values.tolist() == [[r, m] for r in (0.0, 0.4) for m in ("steps", "loss")]
    assert frame["psi"].between(0, 2).all()
    confirmed = study.confirm(made, count=30)
    assert list(confirmed) == list(COLUMNS[CONFIRMATION])
    assert confirmed["additivity_heads"].notna().any()
    ensembles = study.ensemble(made, counts=(1, 2), count=30)
    assert set(ensembles["count"]) == {0, 1, 2}
    assert len(say.ensembles(ensembles)) == 2
    probes = study.probe(made, rates=(0.3,), draws=1, count=30)
    assert len(probes) == 2 * 2 * 2
    assert (probes["excess"].abs() < 5).all()
    tables = {MODELS: frame, CONFIRMATION: confirmed, PROBES: probes, ENSEMBLE: ensembles}
    assert all(path.exists() for path in study.write(tmp_path / "out", tables, made_up.manifest()))
