"""The sentences about a scan: what was found, what luck gives, what was confirmed, nothing beyond the numbers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from surgery.scan import say, worth
from surgery.scan.halving import Effort
from surgery.scan.worth import Baseline
from surgery.stats import comparisons
from surgery.stats.comparisons import Luck


def table(gains, p_max=0.5, n_prompts=40, group=None):
    gains = np.asarray(gains, dtype=float)
    frame = pd.DataFrame({"wiring": [f":{place + 2} 1:" for place in range(len(gains))], "gain": gains})
    frame = frame.assign(
        gain_low=gains - 0.1, gain_high=gains + 0.1, p=p_max, p_max=p_max, q=p_max, n_prompts=n_prompts
    )
    return frame if group is None else frame.assign(group=group)


def winners(*rows):
    """Rows of claim, gain on validation, verdict."""
    claim, again, verdict = (np.array(column) for column in zip(*rows))
    frame = pd.DataFrame({"wiring": [f":{place + 2} 1:" for place in range(len(rows))], "verdict": verdict})
    for half, gain in (("search", claim), ("validation", again)):
        frame[f"gain_{half}"], frame[f"gain_low_{half}"], frame[f"gain_high_{half}"] = gain, gain - 0.1, gain + 0.1
        frame[f"n_prompts_{half}"] = 30
    for end in ("", "_low", "_high"):
        frame[f"survived{end}"] = frame[f"gain{end}_validation"] / frame["gain_search"]
    return frame


BASELINE = Baseline("exact", 0.85, 0.086, 0.76, 0.68, 0.83, 256, 112, "loglik", -1.21)
GUESSING = replace(BASELINE, value=0.004, chance=0.0, above=0.004, low=-0.01, high=0.02, scored=-22.45)
LUCK = Luck(wirings=3, prompts=40, worse=0, mean=0.2, high=0.4)

NO_CONTROLS = pd.DataFrame(columns=list(worth.CONTROLS_COLUMNS))


def text(sentences):
    return " ".join(sentences)


def test_how_many_were_tried_and_the_largest_gain_with_its_interval():
    sentences = say.search(table([0.1, 0.5, -0.3]), LUCK, "loglik")
    assert sentences[0] == (
        "3 wirings were tried on 40 prompts. The largest gain is that of :3 1:, +0.50 [+0.40, +0.60] nats per answer."
    )


@pytest.mark.parametrize(
    ("best", "says"),
    [(0.5, "beyond both"), (0.3, "above the first and within the second"), (0.1, "below even the first")],
)
def test_the_best_is_held_against_luck(best, says):
    sentences = say.search(table([best, -1.0, -1.0]), LUCK, "loglik")[1]
    assert sentences.startswith(
        "If none had any effect, the best of 3 would still gain +0.20 nats per answer on average"
    )
    assert "and +0.40 or more in one scan of twenty" in sentences
    assert says in sentences


def test_no_improvement_is_said_as_plainly():
    sentences = say.search(table([0.5, 0.1, -0.3], p_max=[0.3, 0.9, 0.01]), LUCK, "loglik")
    assert sentences[2] == (
        "Each held against its own spread, none gains more than luck allows (smallest p_max of a gain: 0.30): "
        "no improvement was found; 1 is worse beyond luck."
    )


def test_improvements_are_named_largest_first():
    sentences = text(say.search(table([0.1, 0.5, -0.3, 0.4], p_max=[0.01, 0.01, 0.2, 0.3]), LUCK, "loglik"))
    assert "2 gain more than luck allows (:3 1:, :2 1:); 0 are worse beyond luck." in sentences
    assert "no improvement" not in sentences


def test_a_large_but_uncertain_best_is_not_among_the_improvements():
    sentences = text(say.search(table([0.9, 0.1], p_max=[0.4, 0.01]), LUCK, "loglik"))
    assert "1 gains more than luck allows (:3 1:); the largest gain is not among them" in sentences


def test_long_lists_are_cut():
    sentences = text(say.search(table(np.arange(9, 0, -1), p_max=0.01), LUCK, "loglik"))
    assert "(:2 1:, :3 1:, :4 1:, :5 1:, :6 1: and 4 more)" in sentences


def test_a_scan_in_which_everything_harms():
    sentences = say.search(table([-0.5, -0.2], p_max=0.01), LUCK, "loglik")
    assert "None gains anything; the least harmful, :3 1:, reads -0.20 [-0.30, -0.10] nats per answer." in sentences[0]
    assert sentences[1].endswith("no improvement was found; 2 are worse beyond luck.")
    assert "luck allows:" in sentences[1]


def test_the_unmodified_model_and_unmeasured_wirings_are_not_counted():
    frame = table([0.0, 0.5, np.nan])
    frame.loc[0, "wiring"] = ":"
    assert say.search(frame, LUCK, "loglik")[0].startswith("1 wiring was tried on 40 prompts.")
    assert say.search(frame[:1], LUCK, "loglik") == [
        "Nothing was tried: the table holds no wiring except the unmodified model."
    ]


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("exact", "+50.0 [+40.0, +60.0] percentage points of exact answers"),
        ("choice", "+50.0 [+40.0, +60.0] percentage points of right choices"),
        ("loss", "+0.500 [+0.400, +0.600] nats per token"),
        ("brier", "+0.500 [+0.400, +0.600] of brier"),
    ],
)
def test_every_metric_has_its_unit(metric, says):
    assert says in say.search(table([0.5]), LUCK, metric)[0]


def test_a_gain_without_interval_is_said_to_have_none():
    frame = table([0.5]).assign(gain_low=np.nan, gain_high=np.nan)
    assert "+0.50 nats per answer (no interval)" in say.search(frame, LUCK, "loglik")[0]


def test_luck_that_could_not_be_estimated_is_said():
    unknown = Luck(2, 40, 2, float("nan"), float("nan"))
    assert "All are clearly worse" in say.search(table([0.5, 0.1]), unknown, "loglik")[1]


def test_what_survived_is_said_with_its_share():
    found = winners((0.5, 0.4, "survived"), (0.4, 0.2, "survived in part"), (0.3, 0.0, "vanished"))
    sentences = say.validation(found, "loglik")
    assert sentences == [
        "The 3 largest gains were measured again on 30 prompts that took no part in the choice: "
        "1 survived, 1 survived in part, 1 shrank to what may be nothing.",
        "The best of the search, :2 1:, had claimed +0.50 nats per answer and reads +0.40 [+0.30, +0.50] nats per "
        "answer there: it survived, 80 % of the claim [60 %, 100 %].",
        "Averaged over them, +0.40 nats per answer was claimed and +0.20 found: 50 % survived. Gains chosen for being "
        "the largest shrink on fresh probes even where a wiring helps (regression to the mean).",
        "Confirmed on fresh probes: :2 1:, :3 1:.",
    ]


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("vanished", "less than claimed, and not shown to be any"),
        ("undecided", "too uncertain to say whether anything survived"),
        ("reversed", "it is worse than the unmodified model"),
    ],
)
def test_a_best_that_did_not_survive(verdict, says):
    sentences = say.validation(winners((0.5, -0.2, verdict)), "loglik")
    assert says in sentences[1]
    assert sentences[-1] == "No gain was confirmed on fresh probes: nothing was found that is worth keeping."
    assert sentences[0].startswith("The largest gain was measured again")
    assert "Averaged" not in text(sentences)


def test_gains_that_turn_into_losses_have_no_share():
    sentences = text(say.validation(winners((0.5, -0.2, "reversed"), (0.3, 0.1, "vanished")), "loglik"))
    assert "-0.05 found: nothing survived" in sentences
    assert "1 shrank to what may be nothing, 1 turned into losses" in sentences


def test_nothing_claimed_is_nothing_to_measure():
    assert say.validation(winners((-0.5, 0.2, "no gain")), "loglik") == [
        "The search half showed no gain, so there was none to measure again."
    ]


def test_groups_that_gain_that_lose_and_that_show_no_effect():
    parts = [
        table([0.5, 0.1], p_max=[0.01, 0.9], group="k = 1"),
        table([-0.4, 0.1], p_max=[0.01, 0.9], group="k = 2"),
        table([0.1, 0.1], p_max=[0.9, 0.8], group=""),
    ]
    found = pd.concat(parts)
    assert say.groups(found, "loglik") == [
        ":2 1: helps k = 1 (+0.50) and harms k = 2 (-0.40); in the other 1 no effect was shown (nats per answer).",
        "In none of 3 groups was an effect of :3 1: shown.",
    ]
    assert len(say.groups(found, "loglik", [":3 1:"])) == 1
    without = table([0.5], p_max=0.01, group="")
    assert say.groups(without, "loglik") == [":2 1: helps probes without a group (+0.50) (nats per answer)."]


def test_what_remains_open_is_said():
    notes = text(say.limits(table([0.5, 0.1], p_max=[0.01, 0.6], n_prompts=[12, 10])))
    assert "none is more than a candidate" in notes
    assert "For 1 wiring of 2 a small effect is neither shown nor ruled out" in notes
    assert "1 wiring could not be measured on every prompt" in notes
    assert "12 prompts in the search half, fewer than 128: only large effects can be shown" in notes
    clustered = text(say.limits(table([0.5], n_prompts=128).assign(n_units=12)))
    assert "128 prompts count as 12. 12 clusters are too few to show much" in clustered
    quiet = text(say.limits(table([0.5], p_max=0.01, n_prompts=128), winners((0.5, 0.4, "survived"))))
    assert (
        quiet == "Each interval is of one wiring by itself; that of the best does not allow for its having been chosen."
    )


def test_from_a_scan_without_any_effect_to_the_sentence_that_nothing_was_found():
    rng = np.random.default_rng(0)
    halves = [
        pd.DataFrame(
            {
                "wiring": np.repeat([f":{stop} 1:" for stop in range(2, 302)], 16),
                "prompt": np.tile(np.arange(16), 300),
                "group": "",
                "metric": "loglik",
                "value": rng.normal(0, 0.3, 4800),
                "baseline": 0.0,
            }
        )
        for _ in range(2)
    ]
    found = comparisons.winners(*halves, "loglik")
    luck = comparisons.expected_best(halves[0], "loglik")
    sentences = text(say.search(comparisons.table(halves[0], "loglik"), luck, "loglik"))
    assert "no improvement was found" in sentences
    assert "nothing was found that is worth keeping" in text(say.validation(found, "loglik"))


def painted(gains):
    rows = [
        {"variant": variant, "size": size, "gain": gain * size, "p_max": 0.01 if gain * size < -1 else 0.5}
        for variant, gain in gains.items()
        for size in (2, 4, 6)
    ]
    return pd.DataFrame(rows)


def test_painters_are_ordered_by_what_they_cost_at_the_middle_size():
    sentences = say.painters(painted({"skip": -1.0, "reverse": -0.1, "parallel sum": -0.2}), "loglik")
    assert sentences == [
        "A centred window of 4 layers, from the least harmful change on: reverse -0.40, parallel sum -0.80, skip -4.00 "
        "(nats per answer).",
        "The largest window at which a change is not shown to harm: parallel sum (4 layers), reverse (6 layers).",
    ]
    assert say.painters(painted({"skip": -1.0}), "loss")[1] == "Every variant harms at every size, beyond luck."


def test_an_effect_that_is_next_to_nothing_is_none():
    row = {"wiring": ":3 1:", "group": "k=1", "gain": -0.0004, "p_max": 0.01}
    sentences = say.groups(pd.DataFrame([row]), "loglik")
    assert sentences == ["In none of 1 groups was an effect of :3 1: shown."], "less than a hundredth of a nat"
    assert say.groups(pd.DataFrame([row | {"gain": -0.0012}]), "loss") == [":3 1: harms k=1 (-0.001) (nats per token)."]


def test_the_three_best_are_described_by_group_and_without_groups_nothing_is_said():
    rows = [{"wiring": f":{n} 1:", "group": "k=1", "gain": 0.5, "p_max": 0.01} for n in (5, 4, 3, 2)]
    sentences = say.best_groups(pd.DataFrame(rows), BASELINE)
    assert len(sentences) == 4
    assert sentences[1].startswith(":5 1: helps")
    assert say.best_groups(pd.DataFrame(rows).iloc[:0], BASELINE) == []
    assert say.best_groups(pd.DataFrame(rows), GUESSING) == []


def test_what_the_model_can_do_stands_first_with_chance():
    assert say.baseline(BASELINE) == (
        "The model as it is: 85.0 % exact answers on 256 prompts, against 8.6 % by chance (the answers of other "
        "questions), 76.0 [68.0, 83.0] percentage points more; -1.21 nats per answer. It does this task."
    )
    choice = say.baseline(replace(GUESSING, measure="choice", value=0.34, chance=1 / 3))
    assert "34.0 % right choices on 256 prompts, against 33.3 % by chance, 0.4 [-1.0, 2.0] percentage points" in choice
    assert choice.endswith(
        "It is not shown to do this task: the low end of that interval must be above 5 percentage points."
    )
    words = say.baseline(Baseline("loss", 1.3, 6.24, 4.94, 4.8, 5.0, 40, 40, "loss", 1.3))
    assert "1.300 nats per token on 40 prompts, against 6.240 if all tokens were alike, 4.940 [4.800, 5.000]" in words
    found = say.findings(table([0.5]), winners((0.5, 0.4, "survived")), LUCK, BASELINE, NO_CONTROLS)
    assert found[0] == say.baseline(BASELINE)
    assert "The largest gain is that of :2 1:" in found[1]


def test_without_a_task_nothing_else_is_said():
    frame, found = table([3.06, 2.5], p_max=0.001), winners((3.06, 2.9, "not above chance"))
    sentences = say.findings(frame, found, LUCK, GUESSING, NO_CONTROLS)
    assert len(sentences) == 2
    assert sentences[1].startswith("So no winner is named among 2 wirings")
    assert ":2 1:" not in text(sentences)
    assert "3.06" not in text(sentences)


@pytest.mark.parametrize(("low", "done"), [(0.06, True), (0.04, False), (np.nan, False)])
def test_a_task_is_done_above_chance_by_a_least_effect(low, done):
    assert replace(BASELINE, low=low).done == done


def softer(found, **columns):
    defaults = {"answers": 0.02, "answers_low": -0.01, "answers_high": 0.05, "temperature": 0.3, "by_temperature": 0.75}
    beyond = {"beyond": 0.1, "beyond_low": 0.02, "beyond_high": 0.2, "p_beyond": 0.01}
    return found.assign(**(defaults | beyond | columns))


def test_right_answers_and_a_temperature_stand_beside_the_best():
    found = softer(winners((0.5, 0.4, "survived")))
    assert say.beside(found, NO_CONTROLS, BASELINE) == [
        "In right answers the best on fresh probes, :2 1:, gains +2.0 [-1.0, +5.0] percentage points of exact answers. "
        "One temperature for the logits of the unmodified model, chosen on the search half, gains +0.30 nats per "
        "answer, 75 % of what the wiring gains: the rest is not explained by it."
    ]
    explained = softer(winners((0.5, 0.4, "as a temperature")), beyond=-0.1, by_temperature=1.25)
    assert "125 % of what the wiring gains: the wiring is not shown to gain more" in text(
        say.beside(explained, NO_CONTROLS, BASELINE)
    )
    assert "1 gained no more, for all that is shown, than a temperature does" in text(
        say.validation(explained, "loglik")
    )
    assert "No gain was confirmed" in text(say.validation(explained, "loglik"))
    nothing = softer(winners((0.5, 0.4, "survived")), temperature=0.0, by_temperature=0.0)
    assert "gains +0.00 nats per answer, next to nothing" in text(say.beside(nothing, NO_CONTROLS, BASELINE))
    assert say.beside(winners((0.5, 0.4, "survived")), NO_CONTROLS, BASELINE) == []
    assert say.beside(softer(winners((0.5, 0.4, "no gain"))), NO_CONTROLS, BASELINE) == []


@pytest.mark.parametrize(
    ("p_less", "says"),
    [
        (0.01, "it gains more than each of them"),
        (0.4, "it is not shown to gain more than random spans of its length or half of the second pass, so what helps"),
    ],
)
def test_controls_stand_beside_a_confirmed_repeat(p_less, says):
    names = ["repeat", "random span", "random span", "damped 0.5"]
    rows = pd.DataFrame({"winner": ":4 2:", "control": names, "gain": [0.5, 0.1, 0.3, 0.4], "less": 0.2})
    sentence = text(say.beside(winners((0.5, 0.4, "survived")), rows.assign(p_less=p_less), BASELINE))
    assert sentence.startswith(
        "Beside :4 2: (+0.50 nats per answer), on the same probes: random spans of its length (2, on average) +0.20, "
        "half of the second pass +0.40; "
    )
    assert says in sentence


@pytest.mark.parametrize(
    ("change", "done", "verdict"),
    [
        ({}, True, "survived"),
        ({"p_beyond": 0.2}, True, "as a temperature"),
        ({"beyond": -0.1}, True, "as a temperature"),
        ({"gain_validation": 0.005}, True, "too small"),
        ({}, False, "not above chance"),
    ],
)
def test_a_verdict_is_withdrawn_where_the_gain_is_none_of_the_wirings(change, done, verdict):
    found = softer(winners((0.5, 0.4, "survived"))).assign(**change)
    assert worth.judged(found, BASELINE if done else GUESSING).tolist() == [verdict]


def test_wirings_that_are_not_finite_are_told_and_named_by_how_often():
    frame = table([0.5, -np.inf, -np.inf]).assign(n_not_finite=[0, 2, 15])
    sentences = say.search(frame, LUCK, "loglik")
    assert sentences[-1] == (
        "2 wirings of 3 give no finite number on some of the prompts, though the unmodified model does (:4 1: on 15 of "
        "40, :3 1: on 2 of 40): each counts as a loss without bound, whatever it gains on the others."
    )
    assert "worse beyond luck" in text(sentences)
    assert "finite" not in text(say.search(table([0.5]).assign(n_not_finite=0), LUCK, "loglik"))
    none = say.search(table([-np.inf]).assign(n_not_finite=3), LUCK, "loglik")
    assert none[1].startswith("1 wiring of 1 gives no finite number on some of the prompts")
    assert "For 1 wiring of 3 a small effect is neither shown nor ruled out." in say.limits(frame)


def test_a_winner_that_is_not_finite_on_fresh_probes_is_no_winner():
    found = winners((0.5, -np.inf, "not finite"), (0.4, 0.3, "survived"))
    sentences = text(say.validation(found, "loglik"))
    assert "1 survived, 1 gave no finite number on some prompt" in sentences
    assert "there: on some prompts it gives no finite number, though the unmodified model does." in sentences
    assert "Averaged" not in sentences
    assert "Confirmed on fresh probes: :3 1:." in sentences


def test_a_model_that_is_not_finite_on_too_many_prompts_has_no_winner():
    few, many = replace(BASELINE, not_finite=3), replace(BASELINE, not_finite=60)
    assert "On 3 of 259 prompts it gives no finite number; these are left out for every wiring." in say.baseline(few)
    assert say.baseline(few).endswith("It does this task.")
    assert say.baseline(many).endswith("That is more than one in 10.")
    sentences = say.findings(table([0.5, 0.1]), winners((0.5, 0.4, "survived")), LUCK, many, NO_CONTROLS)
    assert len(sentences) == 2
    assert sentences[1].startswith("So no winner is named among 2 wirings: the prompts that are left are not a fair")
    assert worth.judged(softer(winners((0.5, 0.4, "survived"))), many).tolist() == ["not finite"]


def test_controls_groups_and_windows_that_are_not_finite_are_told():
    names = ["repeat", "random span", "random span", "damped 0.5"]
    rows = pd.DataFrame({"winner": ":4 2:", "control": names, "gain": [0.5, 0.1, -np.inf, -np.inf], "less": np.nan})
    sentence = text(say.beside(winners((0.5, 0.4, "survived")), rows.assign(p_less=1.0), BASELINE))
    assert "random spans of its length +0.10, 1 not finite, half of the second pass 1 not finite; it is not" in sentence
    frame = pd.concat([table([0.5], 0.01, group="a"), table([-np.inf], 1.0, group="b"), table([0.0], 0.9, group="c")])
    assert say.groups(frame, "loglik") == [
        ":2 1: helps a (+0.50); in the other 1 no effect was shown; it is not finite on some probes of b "
        "(nats per answer)."
    ]
    windows = table([-1.0, -np.inf], p_max=[0.01, 1.0]).assign(variant=["skip", "reverse"], size=2, n_not_finite=[0, 4])
    assert text(say.painters(windows, "loglik")).count("Every variant harms at every size") == 1
    assert "1 wiring of 2 gives no finite number" in say.painters(windows, "loglik")[-1]


def test_one_prompt_tells_nothing():
    assert say.search(table([0.5], n_prompts=1), LUCK, "loglik") == [
        "1 wiring on one prompt: nothing can be told from luck."
    ]


def test_an_effect_beyond_luck_that_is_too_small_to_matter_is_not_named():
    sentences = text(say.search(table([0.004, -0.003], p_max=0.001), LUCK, "loglik"))
    assert "no improvement was found; 0 are worse beyond luck" in sentences


def test_a_search_in_rounds_says_what_it_ran_and_that_its_gains_are_optimistic():
    tried = table([0.3, 0.1, -0.2], n_prompts=16).assign(n_prompts=[16, 8, 0])
    effort = Effort(executions=900, share=0.152, rounds=8, probes=128, stopped=False)
    said = text(say.search(tried, LUCK, "loglik", effort))
    assert "3 wirings were searched by successive halving, with 15 % of the layer executions of a full scan" in said
    assert "128 prompts: 2 were measured" in said
    assert "stopped" not in said
    limits = text(say.limits(tried, winners((0.3, 0.1, "vanished")), effort))
    assert "optimistic" in limits
    assert "compared on the rest" not in limits
    assert "optimistic" not in text(say.limits(tried, winners((0.3, 0.1, "vanished"))))


def test_a_search_that_stopped_says_that_nothing_beats_the_model():
    effort = Effort(executions=900, share=0.04, rounds=2, probes=128, stopped=True)
    said = text(say.search(table([-0.3, -0.1]), LUCK, "loglik", effort))
    assert "It stopped after 2 rounds: no wiring beats the unmodified model by +0.01 nats per answer" in said
