"""Sentences about reversion in every direction: reverting, not, contradicted, undecided; none claims too much."""

from support import made_up
from surgery.reversion import say


def text(sentences: list[str]) -> str:
    return " ".join(sentences)


def test_reversion_that_displacing_confirms():
    said = text(say.by_layer(made_up.reversion()))
    assert (
        "kappa exceeds its rotated and token-shuffled nulls in 5 of 5 layers (layers 1 to 5), where it is 0.200:"
        in said
    )
    assert "Displacing the stream confirms a restoring pull there." in said
    assert "layers 1 to 5 (psi below 1, spread grows)" in said
    assert "could not be decided" not in said


def test_reversion_that_displacing_contradicts_is_called_correlation():
    said = text(say.by_layer(made_up.reversion(restoring="no")))
    assert "this is correlation, not a restoring force" in said
    assert "confirms" not in said


def test_reversion_that_displacing_leaves_open():
    frame = made_up.reversion(restoring="undecided")
    assert "confirms a restoring pull in none of them; the others" in text(say.by_layer(frame))
    frame.loc[1, "restoring"], frame.loc[2, "restoring"] = "yes", "no"
    assert "pull in layer 1 and contradicts it in layer 2; the others stay" in text(say.by_layer(frame))


def test_reversion_not_looked_into_is_said():
    frame = made_up.reversion().drop(columns="restoring")
    assert "was not measured" in text(say.by_layer(frame))


def test_no_reversion_is_said_as_plainly():
    said = say.by_layer(made_up.reversion(kappa=0.0, kappa_excess=-0.1))
    assert said == [
        "In none of the 5 layers looked at does kappa exceed its rotated and token-shuffled nulls: no mean reversion "
        "was found."
    ]


def test_what_an_interval_around_0_leaves_open_is_said():
    said = text(say.by_layer(made_up.reversion(kappa=0.2, kappa_excess=0.005)))
    assert "no mean reversion was found" in said
    assert (
        "In layers 1 to 5 the interval of the excess includes 0: a weak reversion is neither shown nor ruled out"
        in said
    )


def test_spreading_is_called_spreading():
    said = text(say.by_layer(made_up.reversion(kappa=-0.2, kappa_excess=-0.2)))
    assert "In layers 1 to 5 kappa is below 0" in said
    assert "carry deviations further out" in said


def test_below_one_null_alone_is_not_spreading():
    frame = made_up.reversion(kappa=-0.2, kappa_excess=-0.2, kappa_excess_rotated=0.0)
    assert "carry deviations further out" not in text(say.by_layer(frame))
    assert "In layers 1 to 5 the interval of the excess includes 0" in text(say.by_layer(frame))


def test_one_layer_in_forty_is_no_surprise_and_said_so():
    frame = made_up.reversion(41, kappa=0.0, kappa_excess=0.0)
    frame.loc[7, ["kappa", "kappa_low", "kappa_excess", "kappa_excess_low"]] = 0.1, 0.05, 0.1, 0.05
    assert "so few would be no surprise" in text(say.by_layer(frame))
    assert "no surprise" not in text(say.by_layer(made_up.reversion(41)))


def test_contracting_layers_are_told_from_growing_ones():
    frame = made_up.reversion(psi=1.5)
    frame.loc[5, ["psi", "psi_low", "psi_high"]] = 0.4, 0.3, 0.5
    said = text(say.by_layer(frame))
    assert "in layer 5 (psi below 1" in said
    assert "larger in layers 1 to 4 (psi above 1, spread shrinks)" in said
    assert "could not be decided" in text(say.by_layer(made_up.reversion(psi=1.0)))


def test_layer_0_is_left_out_and_shown():
    frame = made_up.reversion(kappa=0.0, kappa_excess=0.0)
    frame.loc[0, ["kappa", "kappa_low", "kappa_high", "kappa_excess_low"]] = 9.0, 8.9, 9.1, 8.0
    assert "no mean reversion" in text(say.by_layer(frame))
    assert "Layer 0 (kappa = 9.00 [8.90, 9.10]) is left out" in text(say.limits(frame))


def test_reversion_that_the_untrained_model_has_too_is_told():
    notes = text(say.limits(made_up.reversion(kappa_excess_untrained=0.0)))
    assert "In layers 1 to 5 kappa does not exceed that of the same architecture untrained" in notes
    assert "does not exceed" not in text(say.limits(made_up.reversion()))
    without = made_up.reversion().drop(columns="kappa_untrained")
    assert "was not measured" in text(say.limits(without))


def test_no_process_is_claimed():
    assert "no Ornstein-Uhlenbeck process is claimed" in text(say.limits(made_up.reversion()))
