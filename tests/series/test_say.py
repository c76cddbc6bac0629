"""Sentences about series in every direction: serial, parallel, undecided; none claims too much."""

import numpy as np
import pytest

from support import made_up
from surgery.series import say


def text(sentences: list[str]) -> str:
    return " ".join(sentences)


def test_a_window_is_called_serial_beside_untrained_layers_with_updates_of_its_size():
    assert say.windows(made_up.series(S=0.8))[0] == (
        "Layers 1 to 5 together read S = 0.80 [0.79, 0.81], from 0 (parallel) to 1 (serial), where untrained layers "
        "with updates of the same size read 0.40 [0.39, 0.41]: closer to serial than these."
    )


@pytest.mark.parametrize(
    ("excess", "says", "side"),
    [
        (-0.2, "closer to parallel than these", "below"),
        (0.0, "as serial as these, within 0.05", "within"),
        (0.045, "whether they differ is undecided", "undecided"),
    ],
)
def test_every_s_stands_beside_that_of_matched_sizes(excess, says, side):
    frame = made_up.series(S_excess=excess)
    assert says in say.windows(frame)[0]
    assert say.sides_of(frame.iloc[-1])["S"] == side


@pytest.mark.parametrize(
    ("ratio", "says", "side"),
    [
        (
            1.5,
            "1.50 [1.49, 1.51] times as much as the same turned at random: they prefer what the window wrote",
            "above",
        ),
        (0.6, "they prefer what was there before", "below"),
        (1.05, "they prefer neither, within 10%", "within"),
        (1.1, "whether they prefer it is undecided", "undecided"),
    ],
)
def test_a_preference_is_one_beyond_what_random_networks_read(ratio, says, side):
    frame = made_up.series(preference=ratio)
    assert says in say.windows(frame)[1]
    assert say.sides_of(frame.iloc[-1])["preference"] == side


def test_serial_layers_that_prefer_nothing_are_no_contradiction():
    apart = "To depend on a window is not to prefer it"
    assert apart in say.windows(made_up.series(S_excess=0.25, preference=1.0))[1]
    for values in ({"S_excess": 0.25, "preference": 1.5}, {"S_excess": 0.0, "preference": 1.0}):
        assert apart not in say.windows(made_up.series(**values))[1]


def test_where_nothing_varies_no_number_is_made_up():
    frame = made_up.series(**dict.fromkeys(("S", "R", "O", "N", "S_excess", "preference", "S_live"), np.nan))
    assert "nan" not in text(say.windows(frame) + say.limits(frame))
    assert "Windows that start at layer 0 are left out of these sentences" in text(say.limits(frame))


def test_high_and_low_values_alone_claim_nothing():
    """S of .9 is what random layers with large updates read."""
    frame = made_up.series()
    for S in (0.1, 0.9):
        assert "closer" not in say.windows(made_up.series(S=S, S_matched=S, S_excess=0.0))[0]
    without = made_up.series(S=0.9).drop(columns=[c for c in frame if c.startswith(("S_excess", "preference"))])
    assert "untrained layers were not measured beside it" in say.windows(without)[0]
    assert "moves them" not in text(say.windows(without))


CLAIMS = ("closer to", "as serial as", "prefer", "is the most serial (", "it rises", "it falls", "no difference")


def no_intervals(frame):
    frame[[name for name in frame if name.endswith(("_low", "_high"))]] = np.nan
    return frame


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (no_intervals(made_up.series(S=0.9)), "no interval"),
        (made_up.series(S=0.9, n_prompts=1), "one prompt has no interval"),
        (made_up.series(S=np.nan, S_excess=np.nan, preference=np.nan, loss_parallel_sum=np.nan), "undefined"),
        (
            made_up.series(S=0.9).assign(token_share=0.73, dimension_share=0.8, n_massive=0, n_tokens=900),
            "one token holds 73 % of the variance",
        ),
    ],
    ids=["no interval", "one prompt", "constant stream", "one token"],
)
def test_where_nothing_can_be_told_nothing_is_claimed_and_the_reason_given(frame, reason):
    sentences = text(say.windows(frame))
    assert reason in sentences
    assert not [claim for claim in CLAIMS if claim in sentences]
    assert "cannot be told" in sentences
    say.limits(frame)


def test_the_thirds_are_windows_of_one_length_without_layer_0():
    windows = [(row["start"], row["stop"]) for row in say.thirds(made_up.series(12))]
    assert windows == [(1, 4), (5, 8), (9, 12)]
    assert [(row["start"], row["stop"]) for row in say.thirds(made_up.series(5))] == [(1, 3), (2, 4), (3, 5)]
    assert [(row["start"], row["stop"]) for row in say.thirds(made_up.series(12, max_length=2))] == [
        (1, 3),
        (5, 7),
        (10, 12),
    ]


def test_a_ranking_ranks_all_windows_of_its_length():
    frame = made_up.series(12)
    assert "Of all 9 of them from layer 1 on, 9 may be the most serial and 9 may be the most parallel." in text(
        say.windows(frame)
    )
    shown, between = ((frame["start"] == start) & (frame["stop"] == start + 3) for start in (5, 7))
    frame.loc[shown, ["S", "S_low", "S_high"]] = 0.37, 0.36, 0.38
    assert "5 to 7 is the most parallel (0.37)" in text(say.windows(frame))
    frame.loc[between, ["S", "S_low", "S_high"]] = 0.22, 0.21, 0.23  # not among the three that are shown
    assert "7 to 9 is the most parallel (0.22)" in text(say.windows(frame))
    frame.loc[between, ["S", "S_low", "S_high"]] = 0.33, 0.32, 0.34
    assert "2 may be the most parallel" in text(say.windows(frame))  # clear of one another, by less than matters
    frame.loc[between, ["S", "S_low", "S_high"]] = 0.9, 0.89, 0.91
    assert "7 to 9 is the most serial (0.90) and 5 to 7 is the most parallel (0.37)." in text(say.windows(frame))
    frame.loc[between, ["S", "S_low", "S_high"]] = np.nan
    assert "which is the most serial cannot be told" in text(say.windows(frame))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (0.8, "change the loss by +0.80 [+0.79, +0.81] nats per token: it rises."),
        (-0.1, "nats per token: it falls."),
        (0.005, "nats per token: undecided."),
    ],
)
def test_the_price_of_running_in_parallel(change, says):
    assert says in text(say.windows(made_up.series(loss_parallel_sum=change)))


def test_a_price_that_does_not_matter_is_said_not_to():
    row = made_up.series().iloc[0].copy()
    row["loss_parallel_sum_low"], row["loss_parallel_sum"], row["loss_parallel_sum_high"] = 5e-5, 7e-5, 9e-5
    assert say.price(row).endswith("no difference that matters (0.01 nats).")


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
    assert "whether they differ from their nulls: 0 in S and 0 in preference" in notes
    assert "0 in S and 10 in preference" in text(say.limits(made_up.series(preference=1.1)))
    assert "S is one number, not two" in notes
    shares = made_up.series().assign(token_share=0.02, dimension_share=0.4, n_massive=35, n_tokens=1504)
    assert "35 tokens of massive activations were left out. Of those measured, one token holds up to 2%" in text(
        say.limits(shares)
    )


def test_undefined_windows_and_few_prompts_are_told():
    frame = made_up.series(n_prompts=5)
    frame.loc[0, "S"] = np.nan
    notes = text(say.limits(frame))
    assert "undefined in 1 window," in notes
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
