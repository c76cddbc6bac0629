"""Sentences about reversion in every direction: reverting, not, turned, undecided, withheld; none claims too much."""

import math

import pytest

from support import made_up
from surgery.reversion import say


def text(sentences: list[str]) -> str:
    return " ".join(sentences)


def test_reversion_that_displacing_confirms():
    said = text(say.by_layer(made_up.reversion()))
    assert "kappa reaches 0.05 beyond its rotated and token-shuffled nulls in 5 of 5 layers (layers 1 to 5)" in said
    assert "where it is 0.200: their updates run against" in said
    assert "Displacing the stream confirms a restoring pull in layers 1 to 5." in said
    assert "layers 1 to 5 (psi below 1, spread grows)" in said
    assert "undecided" not in said
    assert "could not be decided" not in said


def test_reversion_that_displacing_contradicts_is_no_force():
    said = text(say.by_layer(made_up.reversion(restoring="no")))
    assert "shows no force in layers 1 to 5, where some kind is shortened by less than 0.05" in said
    assert "confirms" not in said


def test_reversion_that_displacing_leaves_open():
    frame = made_up.reversion(restoring="undecided")
    assert "Displacing the stream leaves it open in layers 1 to 5." in text(say.by_layer(frame))
    frame.loc[1, "restoring"], frame.loc[2, "restoring"] = "yes", "no"
    said = text(say.by_layer(frame))
    assert "confirms a restoring pull in layer 1, and shows no force in layer 2, where" in said
    assert said.count("and leaves it open in layers 3 to 5.") == 1


def test_reversion_not_looked_into_is_said():
    frame = made_up.reversion().drop(columns="restoring")
    assert "was not measured" in text(say.by_layer(frame))


@pytest.mark.parametrize("kappa", [0.0, 0.03])  # the second surely above 0, and nothing to speak of
def test_no_reversion_is_said_as_plainly(kappa):
    assert say.by_layer(made_up.reversion(kappa=kappa, kappa_excess=kappa)) == [
        "In none of the 5 layers looked at is kappa shown to reach 0.05 beyond its rotated and token-shuffled nulls: "
        "no layer as a whole was seen to write against deviations."
    ]


def test_what_an_interval_around_the_least_effect_leaves_open_is_said():
    said = text(say.by_layer(made_up.reversion(kappa=0.2, kappa_excess=0.045)))
    assert "In none of the 5 layers" in said
    assert "In layers 1 to 5 this is undecided: whether kappa is 0.05 or more beyond its nulls was neither" in said


def test_spreading_is_called_spreading():
    said = text(say.by_layer(made_up.reversion(kappa=-0.2, kappa_excess=-0.2)))
    assert "In layers 1 to 5 kappa is below -0.05" in said
    assert "carry deviations further out" in said
    assert "undecided" not in said


def test_below_one_null_alone_is_not_spreading():
    frame = made_up.reversion(kappa=-0.2, kappa_excess=-0.2, kappa_excess_rotated=0.0)
    assert "carry deviations further out" not in text(say.by_layer(frame))


def test_a_layer_must_be_surer_among_forty_than_by_itself():
    for n_layers, found in ((2, True), (41, False)):
        frame = made_up.reversion(n_layers, kappa=0.05, kappa_excess=0.05)
        for name in ("kappa", "kappa_excess_rotated", "kappa_excess_token_shuffled"):
            frame.loc[1, [f"{name}_low", name, f"{name}_high"]] = 0.06, 0.14, 0.22
        assert ("kappa reaches 0.05" in say.by_layer(frame)[0]) is found


def test_contracting_layers_are_told_from_growing_ones_and_from_those_that_turn():
    frame = made_up.reversion(psi=1.5)
    frame.loc[5, ["psi", "psi_low", "psi_high"]] = 0.4, 0.3, 0.5
    frame.loc[4, ["psi", "psi_low", "psi_high"]] = 1 - 1e-7, 1 - 2e-7, 1 + 1e-7
    said = text(say.by_layer(frame))
    assert "in layer 5 (psi below 1, spread grows)" in said
    assert "larger in layers 1 to 3 (psi above 1, spread shrinks)" in said
    assert "as large in layer 4 (psi 1, spread stays)" in said
    assert "could not be decided" in text(say.by_layer(made_up.reversion(psi=1.0)))


@pytest.mark.parametrize(
    ("lost", "more", "why"),
    [
        (["kappa", "kappa_low"], {}, "the stream does not vary, so that kappa is undefined"),
        (["kappa_low"], {"n_prompts": 1}, "one prompt has no intervals"),
        (["kappa_low"], {}, "there are no intervals"),
        ([], {"token_share": 0.6}, "in every layer one token holds more than 10% of the variance, and decides what is"),
    ],
)
def test_nothing_is_claimed_of_what_tells_nothing(lost, more, why):
    frame = made_up.reversion().assign(**dict.fromkeys(lost, math.nan), **more)
    (sentence,) = say.by_layer(frame)
    assert sentence.startswith(f"Nothing can be said of mean reversion: {why}")
    assert f"nothing can be said of reversion to a mean: {why}" in say.answer(frame, frame)


def test_a_layer_that_one_token_decides_is_left_out_by_name():
    frame = made_up.reversion().assign(token_share=0.01)
    frame.loc[3, "token_share"] = 0.4
    said = say.by_layer(frame)
    assert "in 4 of 4 layers (layers 1 to 2, 4 to 5)" in said[0]
    assert said[-1].startswith("Of layer 3 nothing is said: kappa is undefined or has no interval, or one token holds")


def test_layer_0_is_left_out_and_shown():
    frame = made_up.reversion(kappa=0.0, kappa_excess=0.0)
    frame.loc[0, ["kappa", "kappa_low", "kappa_high", "kappa_excess_low"]] = 9.0, 8.9, 9.1, 8.0
    assert "In none of the 5 layers" in text(say.by_layer(frame))
    assert "Layer 0 (kappa = 9.00 [8.90, 9.10]) is left out" in text(say.limits(frame))


def test_reversion_that_the_untrained_model_has_too_is_told():
    notes = text(say.limits(made_up.reversion(kappa_excess_untrained=0.0)))
    assert "In layers 1 to 5 kappa does not exceed that of the same architecture untrained" in notes
    assert "does not exceed" not in text(say.limits(made_up.reversion()))
    without = made_up.reversion().drop(columns="kappa_untrained")
    assert "was not measured" in text(say.limits(without))


def test_no_process_is_claimed():
    assert "no Ornstein-Uhlenbeck process is claimed" in text(say.limits(made_up.reversion()))
