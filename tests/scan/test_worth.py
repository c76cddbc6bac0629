"""What a gain is worth: the task against chance, the best temperature, and the controls of a repeat."""

import numpy as np
import pandas as pd
import pytest
import torch

import surgery
from surgery import scan
from surgery.corpus import probes
from surgery.corpus.probes import Probe, ProbeSet
from surgery.scan import worth


@pytest.fixture(scope="module")
def babel():
    return surgery.Stack(surgery.load("babel"))


@pytest.fixture(scope="module")
def halves(babel):
    return [half.encode(babel) for half in probes.babel(6, [1, 6]).split()]


def test_what_the_bundled_model_was_trained_on_is_a_task_and_what_it_was_not_is_none(babel):
    easy, hard = (worth.baseline(babel, probes.babel(32, [k]), "loglik") for k in (2, 6))
    assert easy.done
    assert easy.value > 0.9
    assert easy.chance < 0.3
    assert easy.above == pytest.approx(easy.value - easy.chance)
    assert easy.low < easy.above < easy.high
    assert (easy.measure, easy.metric, easy.prompts) == ("exact", "loglik", 32)
    assert hard.scored < easy.scored
    assert not hard.done


@pytest.mark.parametrize(("broken", "sound"), [(1, True), (2, True), (3, False), (19, False)])
def test_prompts_without_a_finite_number_are_left_out_and_too_many_are_no_fair_sample(
    babel, monkeypatch, broken, sound
):
    asked = probes.named("babel", 20)
    whole = worth.baseline(babel, asked, "loglik")
    run = worth.scanning.run

    def overflowing(*arguments, **options):
        rows = run(*arguments, **options)
        return rows.assign(value=rows["value"].where(rows["prompt"] >= broken))

    monkeypatch.setattr(worth.scanning, "run", overflowing)
    found = worth.baseline(babel, asked, "loglik")
    assert (whole.not_finite, whole.sound) == (0, True)
    assert (found.prompts, found.not_finite, found.sound) == (20 - broken, broken, sound)
    assert found.value <= 1
    if not sound:
        assert not found.done
    if broken == 19:
        monkeypatch.setattr(worth.scanning, "run", lambda *a, **o: run(*a, **o).assign(value=np.nan))
        with pytest.raises(ValueError, match="gives no finite number on any of 20 probes: look at its weights"):
            worth.baseline(babel, asked, "loglik")


def test_the_temperature_is_chosen_on_prompts_that_are_finite(babel, halves, monkeypatch):
    search, validation = halves
    whole = worth.softened(babel, search, validation, "loglik")[0]
    log_softmax = torch.Tensor.log_softmax

    def overflowing(logits, axis):
        log_p = log_softmax(logits, axis)
        log_p[:1] = torch.nan  # the first prompt of every portion
        return log_p

    monkeypatch.setattr(torch.Tensor, "log_softmax", overflowing)
    temperature, values = worth.softened(babel, search, validation, "loglik")
    assert temperature / whole in (0.5, 2**-0.25, 1, 2**0.25, 2)
    assert temperature > 0.5
    assert np.isnan(values).sum() == 1


def test_chance_of_choices_is_one_in_as_many(babel):
    words = [f"p{i}" for i in range(10)]
    asked = probes.ProbeSet("recall", tuple(probe for probe in probes.questions.recall(12, pairs=(2, 4), words=words)))
    known = ProbeSet("known", tuple(Probe(p.answer, p.answer, choices=p.choices) for p in asked.probes))
    found = worth.baseline(babel, known, "choice")
    assert (found.measure, found.chance) == ("choice", pytest.approx((1 / 2 + 1 / 4) / 2))


def test_chance_of_text_is_that_of_all_tokens_alike(babel):
    found = worth.baseline(babel, probes.text(["p1 pf1 pf2", "p2 pf3 >plain"]), "loss")
    assert (found.measure, found.chance) == ("loss", pytest.approx(np.log(babel.d_vocab)))
    assert found.above == pytest.approx(found.chance - found.value)


def test_answers_are_swapped_within_clusters_then_groups_then_anywhere():
    rows = [("a", "g", "c"), ("b", "g", "c"), ("d", "g", ""), ("e", "g", ""), ("f", "h", ""), ("i", "j", "")]
    asked = ProbeSet("x", tuple(Probe(f"q{a}", a, g, cluster=c) for a, g, c in rows))
    other = [probe.answer for probe in worth.swapped(asked).probes]
    assert other == ["b", "a", "e", "d", "i", "f"]
    assert worth.swapped(asked).joiner == asked.joiner


def test_probes_are_drawn_by_their_clusters_or_by_many_groups_or_each_by_itself(babel):
    def labels(asked):
        rows = pd.DataFrame({"prompt": range(len(asked))})
        return worth.clustered(rows, asked.encode(babel))["cluster"].nunique()

    assert labels(probes.babel(4, [1])) == 4  # language pairs
    many = [Probe(f"p{i % 10} pf{i % 6}", "p1", f"template {i % 25}") for i in range(50)]
    assert labels(ProbeSet("many", tuple(many))) == 25
    assert labels(ProbeSet("few", tuple(many[:24]))) == 24, "as many groups as probes: each by itself"


def test_the_best_temperature_of_one_half_is_measured_on_the_other(babel, halves):
    search, validation = halves
    temperature, values = worth.softened(babel, search, validation, "loglik")
    assert temperature > 1, "it is too sure where it errs"
    means = []
    for t in worth.TEMPERATURES:
        context = babel.context(search.tokens)
        logits = babel.readout(babel.execute(":", context.x0, context)) / t
        log_p = logits[:, :-1].log_softmax(-1).gather(2, search.tokens.ids[:, 1:, None]).squeeze(2)
        means.append(float((log_p * search.scored[:, 1:]).sum(1).mean()))
    assert temperature == worth.TEMPERATURES[int(np.argmax(means))]
    rows = scan.run(babel, [":"], validation, metrics=("loglik",))
    assert values.mean() > rows["value"].mean()
    small = worth.softened(babel, search, validation, "loglik", memory=1)[1]
    np.testing.assert_allclose(small, values, rtol=1e-4)
    with pytest.raises(ValueError, match="a temperature changes loglik and loss, not exact"):
        worth.softened(babel, search, validation, "exact")


def test_a_wiring_that_is_a_temperature_gains_nothing_beyond_it(babel, halves):
    search, validation = halves
    values = worth.softened(babel, search, validation, "loglik")[1]
    rows = worth.clustered(scan.run(babel, [":8 4:"], validation, metrics=("loglik",)), validation)
    found = worth.beyond_temperature(rows.assign(value=values[rows["prompt"]]), values, "loglik").iloc[0]
    assert found["temperature"] == pytest.approx((values - rows["baseline"]).mean())
    assert (found["beyond"], found["p_beyond"]) == (0, 1)


def test_controls_of_a_repeat_stand_beside_it_on_the_same_probes(babel, halves):
    found = worth.beside(babel, babel.wiring(":8 4:"), halves[1], "loglik")
    kinds = found["control"].value_counts().to_dict()
    assert kinds == {"random span": 5, "repeat": 1, "damped 0.5": 1, "norm-only": 1, "linearised": 1}
    assert list(found) == list(worth.CONTROLS_COLUMNS)
    own = found[found["control"] == "repeat"]["gain"].iloc[0]
    others = found[found["control"] != "repeat"]
    np.testing.assert_allclose(others["less"], own - others["gain"], atol=1e-6)
    assert worth.beside(babel, babel.wiring(":4 8:"), halves[1], "loglik").empty


def test_streams_are_scored_as_a_scan_scores_them(babel, halves):
    rows = worth.by_streams(babel, halves[1], 4, 8, ("exact", "loglik"))
    assert set(rows["wiring"]) == {"norm-only", "linearised"}
    context = babel.context(halves[1].tokens)
    x = scan.controls.norm_only(babel, 4, 8, context)
    logits = babel.readout(x)[:, :-1].log_softmax(-1)
    expected = (logits.gather(2, halves[1].tokens.ids[:, 1:, None]).squeeze(2) * halves[1].scored[:, 1:]).sum(1)
    got = rows[(rows["wiring"] == "norm-only") & (rows["metric"] == "loglik")]["value"].to_numpy()
    np.testing.assert_allclose(got, expected.to(torch.float64).numpy(), rtol=1e-4, atol=1e-6)
