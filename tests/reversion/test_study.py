"""What is said of mean reversion, and drawn: on frames made up for each branch, and on networks that are known."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import ou_network
from surgery import Stack
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.records import tables as csv_tables
from surgery.reversion import draw, files, say, study


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def around(name, value, spread=0.01):
    """A column with its interval."""
    return {name: value, f"{name}_low": value - spread, f"{name}_high": value + spread}


def raw(excess, restoring, kappas=None):
    """Layers from 0 on; layer 0 would decide wrongly."""
    rows = []
    for layer, (kappa, over, word) in enumerate(zip([0.9, *(kappas or excess)], [0.9, *excess], ["yes", *restoring])):
        row = {"layer": layer, "restoring": word} | around("kappa", kappa) | around("kappa_excess", over)
        rows.append(row | around("kappa_excess_rotated", over) | around("kappa_excess_token_shuffled", over))
    return pd.DataFrame(rows)


def spans(pooled, excess, walk=1.0, walk_excess=0.0):
    """The panel of the model and its two walks."""
    rows = [("model", pooled, excess), ("rotated", 1.0, 0.0), ("token_shuffled", walk, walk_excess)]
    return pd.DataFrame(
        {"series": name, "span": "all", "start": 1, "stop": 4, "within": 0.5, "within_walk": 0.5 - low}
        | around("pooled", phi)
        | around("within_excess", low)
        for name, phi, low in rows
    )


def drift(*verdicts, balance=0.1):
    """Directions of layer 0, which revert and do not count, and of layers from 1 on; each holds a twentieth."""
    rows = [
        {"layer": layer, "verdict": word} for layer, words in enumerate((("reverts",), *verdicts)) for word in words
    ]
    return pd.DataFrame(rows).assign(decay=0.1, decay_low=0.05, R2=0.3, share=0.05, **around("balance_excess", balance))


def left(*remaining):
    """What is left, when it leaves the model, of displacements made at layers from 1 on."""
    return pd.DataFrame(
        {"layer": layer, "q": 4 - layer, "kind": kind, "size": 0.1}
        | around("remaining", value)
        | around("along", value)
        for kind in ("random", "principal")
        for layer, value in enumerate(remaining, 1)
    )


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "directions", "back", "said"),
    [
        (
            raw([0.2, 0.3], ["yes"] * 2),
            drift(("grows",)),
            left(0.5, 0.8),
            "the stream reverts to a mean in every layer (layers 1 to 2), as a force, and over all layers together",
        ),
        (
            raw([0.2], ["yes"]),
            drift(("grows",)),
            None,
            "the stream reverts to a mean in every layer (layer 1), as a force",
        ),
        (
            raw([0.2, 0.3], ["yes"] * 2),
            drift(("reverts",)),
            left(1.5, 0.8),
            "the stream reverts to a mean only in part: as a force in layers 1 to 2; that displacements leave the "
            "model shorter is not shown",
        ),
        (
            raw([0.2, 0.3, -0.2], ["yes", "no", "no"]),
            drift(("reverts",), ("reverts", "grows", "reverts"), ("reverts",)),
            left(0.5),
            "the stream reverts to a mean only in part: as a force in layer 1; in layers 2 to 3: along 1 to 2 "
            "directions, they hold 5% to 10% of the variance",
        ),
        (
            raw([-0.2, -0.1], ["no"] * 2),
            drift(("reverts", "grows"), balance=0.0),  # as many as a map turned at random has
            None,
            "the stream does not revert to a mean: in no layer does kappa reach 0.05 while displacements of every "
            "kind get shorter by as much, and in none do more directions revert than under the same map turned at "
            "random",
        ),
        (
            raw([0.3, 0.3], ["no", "no"]),  # a rotation
            drift(("turns", "turns")),
            left(1.0, 1.0),
            "the stream does not revert to a mean: in no layer does kappa reach 0.05 while displacements of every "
            "kind get shorter by as much, and in none do more directions revert than under the same map turned at "
            "random",
        ),
        (
            raw([-0.2, 0.3], ["no", "undecided"]),
            drift(("grows",)),
            None,
            "no reversion to a mean was shown, but in layer 2 it is not ruled out either",
        ),
        (
            raw([0.2, 0.2], ["undecided"] * 2),
            drift(("undecided",)),
            None,
            "it could not be decided whether the stream reverts to a mean: no reversion was shown",
        ),
        (
            raw([math.nan] * 2, ["undecided"] * 2),
            drift(("undecided",)),
            None,
            "nothing can be said of reversion to a mean: the stream does not vary, so that kappa is undefined",
        ),
    ],
)
def test_the_answer(layers, directions, back, said):
    assert say.answer(layers, directions, back) == f"In one sentence: on these prompts {said}."


def test_a_kappa_above_one_walk_only_is_no_reversion():
    frame = raw([0.3], ["undecided"])
    frame.loc[1, list(around("kappa_excess_token_shuffled", 0))] = -0.02, -0.03, -0.01
    assert "In none of the 1 layers" in say.by_layer(frame)[0]


LESS = "less of a deviation is left along itself than there, be it shortened or turned"

# --- the sentences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("panel", "common", "own"),
    [
        (spans(0.9, -0.1), LESS, "shocks are forgotten faster than there"),
        (spans(1.1, 0.1), "deviations grow along themselves", "shocks live on longer than there"),
        (spans(1.0, 0.0), *["this could not be distinguished from a random walk"] * 2),
        # beyond a random walk, and not beyond the walks of these very updates
        (spans(1.1, 0.1, walk=1.1, walk_excess=0.1), *["this could not be distinguished from a random walk"] * 2),
        (spans(0.9, -0.1, walk=0.9, walk_excess=-0.1), *["this could not be distinguished from a random walk"] * 2),
        # straight to one mean, as an OU stream without noise goes
        (spans(0.8, 0.5), LESS, "shocks live on longer than there (as where the stream runs straight to one mean)"),
    ],
)
def test_the_panel(panel, common, own):
    (sentence,) = say.panel(panel)
    assert sentence.startswith("As one autoregression over layers 1 to 3, phi is ")
    assert f"): {common}. With a mean for every token it is 0.50" in sentence
    assert sentence.endswith(f"): {own}.")


def test_the_panel_claims_nothing_within_rounding_nor_of_what_does_not_vary():
    row = spans(1.0, 0.0).query("series == 'model'").iloc[0].to_dict()
    row |= around("pooled", 1 - 1e-7, 1e-9) | around("within_excess", -1e-7, 1e-9)
    assert say.panel(pd.DataFrame([row]))[0].count("could not be distinguished from a random walk") == 2
    assert say.panel(spans(math.nan, math.nan))[0].endswith("the stream cannot be read: it does not vary.")


def test_what_the_architecture_does_untrained_is_no_feature_of_the_model():
    frame, no_more = spans(0.9, -0.1), "not shown to be more so than in the same architecture untrained"
    fresh = frame[frame["series"] == "model"].assign(series="untrained")
    assert say.panel(pd.concat([frame, fresh]))[0].count(no_more) == 2
    fresh = fresh.assign(**around("pooled", 1.0), **around("within_excess", 0.0))
    assert no_more not in say.panel(pd.concat([frame, fresh]))[0]
    rates = {"model": 0.5, **dict.fromkeys(say.WALKS, 0.1), "untrained": 0.5}
    frame = pd.DataFrame([{"network": name, "enough": "yes"} | around("lambda", rate) for name, rate in rates.items()])
    assert no_more in say.noise(frame)[0]
    frame.loc[frame["network"] == "untrained", list(around("lambda", 0))] = 0.2, 0.19, 0.21
    assert no_more not in say.noise(frame)[0]


def test_where_one_token_decides_nothing_is_claimed_and_it_is_said_why():
    row = around("kappa", 0.1) | around("variance_ratio", 1.2) | {"token_share": 0.13}
    row |= {f"variance_ratio_excess_{name}": 0.2 for name in say.WALKS}
    ends = {"boundary_in": 2, "boundary_out": 3} | around("kappa_ends", 0.3) | around("kappa_middle", 0.1)
    ends |= around("difference", 0.2) | {"token_share": 0.13}
    for said in (
        say.windows(pd.DataFrame([{"start": 1, "stop": 4} | row])),
        say.panel(spans(0.9, -0.1).assign(token_share=0.13)),
        say.returns(left(0.5).assign(token_share=0.13)),
        [say.ends(pd.Series(ends), raw([0.3] * 4, ["yes"] * 4))],
    ):
        assert said
        assert all("nothing is claimed, as one token holds" in sentence for sentence in said)
        assert not any("decided" in sentence or "distinguished" in sentence for sentence in said)


@pytest.mark.parametrize(
    ("excess", "said"),
    [
        ((-0.2, -0.1), "the updates of later layers run against those of earlier ones"),
        ((0.2, 0.1), "later layers go on in the direction of earlier ones (and both run against deviations)"),
        ((0.2, -0.1), "whether later layers run against earlier ones or go on could not be decided"),
        ((math.nan, math.nan), "whether later layers run against earlier ones or go on could not be decided"),
        (None, "to be compared with random walks"),
    ],
)
def test_windows(excess, said):
    row = around("kappa", 0.1) | around("variance_ratio", 1.2)
    if excess:
        for name, value in zip(say.WALKS, excess):
            row |= around(f"variance_ratio_excess_{name}", value) | {f"variance_ratio_{name}": 1.0}
    spanned = [(start, stop) for start in range(4) for stop in range(start + 1, 5)]
    frame = pd.DataFrame({"start": start, "stop": stop} | row for start, stop in spanned)
    sentences = say.windows(frame)
    assert [sentence.split(" together: ")[0] for sentence in sentences] == ["Layers 1 to 3", "Layers 1 to 2"]
    assert all(sentence.endswith(f": {said}.") for sentence in sentences)
    assert ("random walks 1.00 and 1.00" in sentences[0]) is bool(excess)
    assert say.windows(frame[frame["stop"] <= 2]) == []


def test_coordinates():
    part = raw([0.2, 0.3, -0.2], [""] * 3).assign(kappa_mechanical=0.1)
    for end in ("", "_low", "_high"):
        part[f"kappa_corrected{end}"] = [0.0, 0.1, 0.0, -0.1]
    frame = pd.concat([part.assign(coordinates=name) for name in ("raw", "normalised", "logits")])
    normalised, logits = say.coordinates(frame)
    assert normalised == (
        "Seen divided by each token's own length, kappa reaches 0.05 beyond both random walks in 2 of 3 layers (layers "
        "1 to 2); there a random update of the same size reads 0.10 on average by arithmetic alone, the model 0.10: "
        "more by 0.05 in 1 of 3 layers, less in 1."
    )
    assert (
        logits
        == "Seen as centred logits, kappa reaches 0.05 beyond both random walks in 2 of 3 layers (layers 1 to 2)."
    )
    still = raw([0.0], [""]).assign(coordinates="principal")
    assert say.coordinates(still)[0].endswith("beyond both random walks in none of 1 layer.")


def test_directions():
    (sentence,) = say.directions(drift(("reverts", "grows"), ("persists", "undecided")))
    assert sentence == (
        "Of 4 directions looked at, the top principal ones of every layer, 1 come out shorter by 0.05 or more, 1 "
        "longer, 0 only turned, 1 stay, 0 are shorter by regression and not when moved, and 1 could not be decided; "
        "the drift predicts 0.30 of an update's variance in them on held-out prompts (median over layers). More come "
        "out shorter than under the same map turned at random in layer 1: along 1 direction, it holds 5% of the "
        "variance."
    )
    assert "nan" not in say.directions(drift(("grows",)).assign(R2=math.nan))[0]
    (balanced,) = say.directions(drift(("reverts", "grows"), balance=0.0))
    assert balanced.endswith("In no layer do more come out shorter than under the same map turned at random.")
    assert say.directions(drift(("undecided",)).assign(decay_low=math.nan)) == []


def test_returns():
    first, second = say.returns(left(0.5, 1.5, 1.0, 0.945))
    assert first == (
        "A displacement (random, 0.1 of the spread) made at layer 1 leaves the model 0.50 [0.49, 0.51] times as long, "
        "and 0.50 [0.49, 0.51] of it is left along itself; from layer 1 it ends shorter, from layer 2 it ends longer, "
        "from layer 3 it ends as long as it was, from layer 4 this could not be decided."
    )
    assert "principal" in second
    turned = left(1.0, 1.0).assign(**around("remaining", 1 - 1e-8, 0), **around("along", 0.4, 0))
    assert "from layers 1 to 2 it ends as long as it was" in say.returns(turned)[0]
    some = left(0.5).assign(remaining_low=lambda frame: frame["remaining_low"].where(frame["kind"] != "random"))
    assert len(say.returns(some)) == 1


@pytest.mark.parametrize(
    ("outer", "middle", "excess", "forces", "said"),
    [
        (0.3, 0.1, 0.2, "yes", "Reversion is stronger in the ends: "),
        (0.3, 0.1, 0.2, "no", "kappa is higher in the ends, but no layer there is shown to restore: "),  # they turn
        (0.1, 0.3, -0.2, "yes", "Reversion is stronger in the middle: "),
        (-0.1, -0.3, 0.2, "no", "Deviations grow in the ends too, though less than in the middle: "),
        (-0.3, -0.1, -0.2, "no", "Deviations grow in the middle too, though less than in the ends: "),
        (0.0, -0.2, 0.2, "no", "kappa is higher in the ends, but no layer there is shown to restore: "),
        (0.3, 0.1, 0.0, "yes", "Whether kappa is higher in the ends or in the middle could not be decided: "),
        (
            0.3,
            0.26,
            0.04,
            "yes",
            "Whether kappa is higher in the ends or in the middle could not be decided: ",
        ),  # for certain, and little
        (0.3, 0.3, 0.0, "yes", "kappa is as high in the ends as in the middle, within 0.05: "),
        (0.3, 0.1, None, "yes", "Reversion is stronger in the ends: "),
        (0.3, 0.1, math.nan, "yes", "Whether kappa is higher in the ends or in the middle could not be decided: "),
    ],
)
def test_ends(outer, middle, excess, forces, said):
    row = {"boundary_in": 2, "boundary_out": 3} | around("kappa_ends", outer) | around("kappa_middle", middle)
    row |= around("difference", outer - middle) | ({} if excess is None else around("excess", excess))
    sentence = say.ends(pd.Series(row), raw([0.3] * 4, [forces] * 4))
    assert sentence.startswith(said)
    assert sentence.endswith(" in layer 2.")


def test_ends_without_a_middle():
    row = {"boundary_in": 2, "boundary_out": 2} | around("difference", math.nan)
    assert "could not be tested" in say.ends(pd.Series(row), raw([0.3], ["yes"]))


@pytest.mark.parametrize(
    ("rate", "walks", "said"),
    [
        (0.5, (0.1, 0.2), "more than in random walks of the same updates (published"),
        (0.0, (0.1, 0.2), "less than in random walks of the same updates (published"),
        (0.15, (0.1, 0.2), "not shown to differ from random walks of the same updates (published"),
        (0.2, (0.1, 0.2), "not shown to differ from random walks of the same updates (published"),
        (0.5, (), "to be compared with random walks (published"),
        (math.nan, (0.1, 0.2), "leaves no noise at two depths or more, so none grows."),
    ],
)
def test_noise(rate, walks, said):
    rows = [{"network": name} | around("lambda", value) for name, value in zip(("model", *say.WALKS), (rate, *walks))]
    (sentence,) = say.noise(pd.DataFrame(rows).assign(enough="no: 9 lines in 8 dimensions, give 24 or more"))
    assert said in sentence
    assert "undefined" not in sentence
    assert sentence.endswith("give 24 or more.") is not math.isnan(rate)


# --- the figures ------------------------------------------------------------------------------------------------------


def points(axes):
    """What is really drawn in an axes: points of its lines and cells of its images."""
    drawn = [np.isfinite(line.get_ydata()).sum() for line in axes.lines]
    return sum(drawn) + sum(np.isfinite(image.get_array().filled(np.nan)).sum() for image in axes.images)


def test_a_row_of_the_figure_for_every_coordinate():
    part = raw([0.2, 0.3, -0.2], [""] * 3)
    frame = pd.concat([part.assign(coordinates=name) for name in ("raw", "principal")], ignore_index=True)
    figure = draw.coordinates(frame)
    assert [axes.get_title(loc="left").split(":")[0] for axes in figure.axes] == ["raw", "principal"]
    assert [len(axes.lines[-1].get_xdata()) for axes in figure.axes] == [3, 3]
    nothing = draw.coordinates(part.assign(coordinates="raw", kappa=math.nan, kappa_rotated=math.nan))
    assert points(nothing.axes[0]) == 0
    assert drawing.png(figure)


@pytest.mark.parametrize("kappa", [0.1, math.nan])
@pytest.mark.parametrize("n_layers", [2, 4])
def test_a_cell_for_every_window_from_layer_one_on(n_layers, kappa):
    spanned = [(start, stop) for start in range(n_layers) for stop in range(start + 1, n_layers + 1)]
    frame = pd.DataFrame({"start": a, "stop": b, "variance_ratio": 9 * kappa, "kappa": kappa} for a, b in spanned)
    figure = draw.windows(frame)
    assert len(figure.axes) == 4  # two triangles and their scales
    later = [(start, stop) for start, stop in spanned if start]
    longer = [(start, stop) for start, stop in later if stop - start > 1]
    expected = [len(longer), len(later)] if kappa == 0.1 else [0, 0]
    assert [points(axes) for axes in figure.axes[:2]] == expected
    assert drawing.png(figure)


@pytest.mark.parametrize("decay", [0.1, math.nan])
def test_a_point_for_every_direction_but_those_of_layer_zero(decay):
    frame = drift(("reverts", "grows"), ("persists", "undecided")).assign(rank=0, modulus=0.9, angle=0.1)
    frame = frame.assign(**around("decay", decay), **around("decay_null", 0.0))
    figure = draw.directions(frame)
    assert len(figure.axes) == 3
    assert sum(np.isfinite(line.get_ydata()).sum() for line in figure.axes[0].lines[:6]) == (4 if decay == 0.1 else 0)
    assert len(figure.axes[1].collections[0].get_offsets()) == 4
    assert drawing.png(figure)


@pytest.mark.parametrize("left", [0.5, math.nan])
def test_a_curve_for_every_layer_moved_and_kind(left):
    frame = pd.DataFrame(
        {"layer": layer, "q": q, "kind": kind, "size": 0.1, "remaining": left, "along": left}
        for layer in (1, 2)
        for kind in ("random", "principal")
        for q in range(1, 4 - layer)
    )
    figure = draw.returns(frame)
    assert len(figure.axes) == 4
    for axes in figure.axes:
        curves = [line for line in axes.lines if len(line.get_xdata()) and line.get_xdata()[0] in (1, 2)]
        assert len(curves) == 2
        assert curves[0].get_xdata().tolist() == [1, 2, 3]
    assert drawing.png(figure)


# --- whole studies ----------------------------------------------------------------------------------------------------


@pytest.fixture
def undrawn(monkeypatch):
    """The figures are made, but not turned into pixels, which takes longer than all the measures."""
    monkeypatch.setattr(study, "png", lambda figure: b"figure")


def measured(model, tokens, folder, untrained=None):
    """The tables of a whole study, which are those in its folder, and its sentences."""
    tables = study.measure(Stack(model), Tokens.of(tokens), folder, untrained)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(csv_tables.read(folder / name), table, check_dtype=False)
    assert {path.name for path in folder.glob("*.csv")} == set(tables)
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == set(draw.figures(tables)) <= set(files.CAPTIONS)
    sentences = [str(sentence) for sentence in say.sentences(tables)]
    assert not any("nan" in sentence.split() for sentence in sentences)
    return tables, sentences


def test_an_ou_stream_is_told_to_revert_in_every_layer_as_a_force(tmp_path, undrawn):
    tables, sentences = measured(ou_network([0.2, 0.3, 0.1], d_model=8), known_networks.tokens(20, 6), tmp_path)
    assert set(tables) == set(files.COLUMNS)
    assert sentences[-1] == (
        "In one sentence: on these prompts the stream reverts to a mean in every layer (layers 1 to 2), as a force, "
        "and over all layers together."
    )
    own = tables[files.PANEL].query("series == 'model' and span == 'all'").iloc[0]
    assert own["within_excess_low"] > 0.1  # no shocks: what is taken back shows about the common mean alone
    assert any("one mean for all tokens" in one and f"): {LESS}." in one for one in sentences)
    assert sum("it ends shorter" in one for one in sentences) == 3


def test_two_layers_in_parallel_are_told_not_to_revert(tmp_path, undrawn):
    tables, sentences = measured(
        known_networks.parallel_network(n_layers=2, width=4), known_networks.tokens(20, 6), tmp_path
    )
    assert set(files.COLUMNS) - set(tables) == {files.PANEL, files.NOISE}
    assert len(tables[files.NORMS]) == 2
    assert sentences[-1].startswith("In one sentence: on these prompts the stream does not revert to a mean: ")
    assert not any("shorter." in one or "run against" in one or "go on in" in one for one in sentences)


def test_one_prompt_and_a_head_that_caps_its_logits(tmp_path, load, undrawn):
    model = load("gemma2")
    tables, sentences = measured(model, torch.randint(4, 90, (1, 8)), tmp_path, untrained=Stack(model))
    assert set(tables[files.COORDINATES]["coordinates"]) == {"raw", "normalised", "principal"}
    assert sentences == [
        "Nothing can be said of mean reversion: one prompt has no intervals.",
        "In one sentence: on these prompts nothing can be said of reversion to a mean: one prompt has no intervals.",
    ]
