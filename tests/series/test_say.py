"""Sentences about series in every direction: serial, parallel, undecided; none claims too much."""

import numpy as np
import pytest

from support import made_up
from surgery.series import say


def text(sentences: list[str]) -> str:
    return " ".join(sentences)


def test_serial_windows_are_called_serial_with_value_and_interval():
    sentences = say.windows(made_up.series(S=0.8))
    assert sentences[0] == (
        "Layers 1 to 5 together read S = 0.80 [0.79, 0.81], from 0 (parallel) to 1 (serial): closer to serial."
    )


def test_parallel_windows_are_called_parallel():
    assert say.windows(made_up.series(S=0.2))[0].endswith("closer to parallel.")


def test_an_interval_around_one_half_decides_nothing():
    sentences = say.windows(made_up.series(S=0.5))[0]
    assert "is undecided" in sentences
    assert "closer to serial" not in sentences
    assert "closer to parallel" not in sentences


def test_without_an_interval_nothing_is_claimed():
    frame = made_up.series(S=0.9)
    frame[[name for name in frame if name.endswith(("_low", "_high"))]] = np.nan
    sentences = text(say.windows(frame))
    assert "0.90 (no interval)" in sentences
    assert "closer to serial" not in sentences
    assert "more than a reader" not in sentences


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (1.5, "more than a reader without preference"),
        (0.6, "less than a reader without preference"),
        (1.0, "the interval includes 1"),
    ],
)
def test_seriality_is_held_against_the_displacement_null(ratio, says):
    sentences = say.windows(made_up.series(R_over_N=ratio))[1]
    assert says in sentences
    assert f"R/N = {ratio:.2f}" in sentences


def test_the_thirds_are_windows_of_one_length_without_layer_0():
    windows = [(row["start"], row["stop"]) for row in say.thirds(made_up.series(12))]
    assert windows == [(1, 4), (5, 8), (9, 12)]
    assert [(row["start"], row["stop"]) for row in say.thirds(made_up.series(5))] == [(1, 3), (2, 4), (3, 5)]
    assert [(row["start"], row["stop"]) for row in say.thirds(made_up.series(12, max_length=2))] == [
        (1, 3),
        (5, 7),
        (10, 12),
    ]


def test_a_third_is_called_most_serial_only_if_its_interval_is_clear_of_the_others():
    frame = made_up.series(12)
    assert "which is the most serial is undecided" in text(say.windows(frame))
    middle = (frame["start"] == 5) & (frame["stop"] == 8)
    frame.loc[middle, ["S", "S_low", "S_high"]] = 0.9, 0.89, 0.91
    assert "layers 5 to 7 are the most serial." in text(say.windows(frame))
    frame.loc[middle, "S_low"] = 0.655
    assert "most serial is undecided" in text(say.windows(frame))
    frame.loc[middle, ["S", "S_low", "S_high"]] = 0.1, 0.09, 0.11
    assert "layers 5 to 7 are the most parallel." in text(say.windows(frame))


@pytest.mark.parametrize(
    ("change", "says"),
    [(0.8, "raise the loss by 0.80 [0.79, 0.81]"), (0.0, "includes no change"), (-0.1, "it falls")],
)
def test_the_price_of_running_in_parallel(change, says):
    assert says in text(say.windows(made_up.series(loss_parallel_sum=change)))


@pytest.mark.parametrize(
    ("fresh", "ratio", "says"),
    [
        (0.4, 2.0, "training raised S and lowered R/N."),
        (0.9, 1.0, "training lowered S and raised R/N."),
        (0.66, 1.5, "training did not clearly change S and did not clearly change R/N."),
    ],
)
def test_seriality_is_held_against_the_untrained_model(fresh, ratio, says):
    sentences = text(say.windows(made_up.series(), made_up.series(S=fresh, R_over_N=ratio)))
    assert f"with fresh weights read S = {fresh:.2f}" in sentences
    assert says in sentences
    assert "fresh weights" not in text(say.windows(made_up.series(), made_up.series(max_length=2)))


def test_windows_too_short_for_the_whole_speak_of_the_middle():
    assert say.windows(made_up.series(12, max_length=3))[0].startswith("Layers 5 to 7 together")


def test_a_model_of_two_layers_has_one_sentence_about_its_only_window():
    assert say.windows(made_up.series(2))[0].startswith("Layers 0 to 1 together")
    assert "Windows of" not in text(say.windows(made_up.series(2)))


def test_the_share_of_the_normalisation_and_layer_0_are_told():
    assert "Every window starts at layer 0" in text(say.limits(made_up.series(2)))
    notes = text(say.limits(made_up.series()))
    assert "difference of +0.05 is rescaling by the normalisation" in notes
    assert "Windows that start at layer 0 (S = 0.65 to 0.65, N = 0.40 to 0.40) are left out" in notes
    assert "In 0 of 10 windows" in notes
    assert "In 10 of 10 windows" in text(say.limits(made_up.series(R_over_N=1.0)))


def test_undefined_windows_and_few_prompts_are_told():
    frame = made_up.series(n_prompts=5)
    frame.loc[0, "S"] = np.nan
    notes = text(say.limits(frame))
    assert "undefined in 1 windows" in notes
    assert "5 prompts only" in notes
    assert "prompts only" not in text(say.limits(made_up.series(n_prompts=20)))


def test_a_sound_calibration_and_failed_ones():
    assert (
        "0.20, 0.40, 0.70 (medians) in between: the measure reads what it must"
        in say.known_networks(made_up.networks())[0]
    )
    for network, value in (("parallel", 0.1), ("serial", 0.9), ("mixed 0.5", 0.1)):
        frame = made_up.networks()
        frame.loc[frame["network"] == network, "S"] = value
        assert "the measure fails" in say.known_networks(frame)[0]
