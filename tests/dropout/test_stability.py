"""Variance and gradients over training: on inputs that are known, on one network and many, and on planted claims."""

from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from surgery.dropout import draw, perceptrons, say, stability
from surgery.models.tokens import Tokens
from surgery.page import drawing

SMALL = {"steps": 12, "every": 4, "batch": 16, "examples": 64}
CELL = ["width", "depth", "rate", "seed", "step", "layer"]


@pytest.fixture(scope="module")
def swept():
    return perceptrons.perceptrons((6, 8), (1, 2), (0.0, 0.3), (0, 1), **SMALL, dtype=torch.float64)


def test_a_row_per_network_look_and_layer(swept):
    assert list(swept.columns) == list(perceptrons.COLUMNS)
    assert len(swept) == 2 * 2 * 2 * 4 * (1 + 2)
    assert not swept[CELL].duplicated().any()
    assert (swept[["variance", "gradient", "loss", "heldout"]] > 0).all().all()
    assert set(swept["step"]) == {0, 4, 8, 12}


def test_without_dropout_training_and_evaluation_agree_exactly_and_with_it_they_do_not(swept):
    plain, dropped = swept[swept.rate == 0], swept[swept.rate > 0]
    assert (plain["variance"] == plain["variance_training"]).all()
    assert (dropped["variance_training"] > dropped["variance"]).all()


def test_rates_of_one_seed_begin_alike_and_seeds_do_not(swept):
    first = swept[swept.step == 0].pivot(index=["width", "depth", "seed", "layer"], columns="rate", values="variance")
    assert (first[0.0] == first[0.3]).all()
    assert first.loc[(8, 2, 0), 0.0].iloc[0] != first.loc[(8, 2, 1), 0.0].iloc[0]


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_variance_shift_of_a_layer_with_known_inputs_is_the_identity(p):
    x = torch.randn(1, 40_000, perceptrons.N_INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layers = perceptrons.initial_layers(12, 1, seed=0)
    uniform = torch.rand(1, 1, 40_000, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    masks = perceptrons.inverted_masks(uniform, torch.tensor([p], dtype=torch.float64))
    (still,), _ = perceptrons.forward(layers, x)
    (noisy,), _ = perceptrons.forward(layers, x, masks)
    c, v = still.mean(1), still.var(1, correction=0)
    shifted = (c**2 + v) / (1 - p) - c**2
    assert noisy.var(1, correction=0).numpy() == pytest.approx(shifted.numpy(), rel=0.03)
    assert (shifted > 1.2 * v).all()
    assert noisy.mean(1).numpy() == pytest.approx(c.numpy(), rel=0.03)  # inverted: the expectation stays


def test_the_frame_shows_the_identity_at_initialisation():
    frame = perceptrons.perceptrons((64,), (2,), (0.4,), (0,), steps=1, every=1, examples=8192)
    x = perceptrons.Task.of(2 * 8192, 0).x[8192:]
    (first, _), _ = perceptrons.forward(perceptrons.initial_layers(64, 2, 0), x.unsqueeze(0))
    c, v = first.mean(1), first.var(1, correction=0)
    row = frame[(frame.step == 0) & (frame.layer == 0)].iloc[0]
    assert row.variance == pytest.approx(float(v.mean()), rel=1e-5)
    assert row.variance_training == pytest.approx(float(((c**2 + v) / 0.6 - c**2).mean()), rel=0.01)


def test_a_network_trained_alone_ends_as_among_others(swept):
    for width, depth, rate, seed in ((6, 1, 0.0, 1), (8, 2, 0.3, 0)):
        alone = perceptrons.perceptrons((width,), (depth,), (rate,), (seed,), **SMALL, dtype=torch.float64)
        among = swept.query("width == @width and depth == @depth and rate == @rate and seed == @seed")
        assert alone.to_numpy() == pytest.approx(among.to_numpy(), rel=1e-9)


def test_the_gradient_is_that_of_autograd_and_looks_change_nothing(swept):
    often = perceptrons.perceptrons((6,), (1,), (0.3,), (0,), **SMALL | {"every": 1}, dtype=torch.float64)
    seldom = swept.query("width == 6 and depth == 1 and rate == 0.3 and seed == 0")
    assert often[often.step.isin(seldom.step)].to_numpy() == pytest.approx(seldom.to_numpy(), rel=1e-9)

    whole = perceptrons.perceptrons((6,), (1,), (0.0,), (0,), **SMALL | {"batch": 4000}, dtype=torch.float64)
    task = perceptrons.Task.of(128, 0)
    layers = [tuple(t.requires_grad_() for t in pair) for pair in perceptrons.initial_layers(6, 1, 0)]
    _, logits = perceptrons.forward(layers, task.x[:64].unsqueeze(0))
    loss = torch.nn.functional.cross_entropy(logits[0], task.y[:64])
    loss.backward()
    norm = float(torch.cat([t.grad.flatten() for t in layers[0]]).norm())
    assert whole.iloc[0].gradient == pytest.approx(norm, rel=0.1)  # examples drawn with replacement
    assert whole.iloc[0].loss == pytest.approx(loss.item(), rel=1e-12)


def test_training_learns():
    frame = perceptrons.perceptrons((32,), (1,), (0.0,), (0,), steps=200, every=200)
    first, last = frame.sort_values("step").iloc[0], frame.sort_values("step").iloc[-1]
    assert last.loss < 0.7 * first.loss
    assert last.heldout < 0.8 * first.heldout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rates": (0.0, 1.0)}, "rate = 1.0: it is the probability"),
        ({"rates": (-0.1,)}, "rate = -0.1"),
        ({"widths": (0,)}, "widths must be 1 or more, got 0"),
        ({"every": 0}, "every must be 1 or more"),
        ({"seeds": ()}, "give at least one width, depth, rate and seed"),
        ({"learning_rate": 1e30, "depths": (3,)}, "the loss is not finite at step"),
    ],
)
def test_what_cannot_be_trained_is_said(change, said):
    with pytest.raises(ValueError, match=said):
        perceptrons.perceptrons(**{"widths": (4,), "depths": (1,), "seeds": (0,), **SMALL} | change)


# --- the residual stream ----------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    dropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.3)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropped, bos_token_id=1, eos_token_id=2))


IDS = torch.randint(3, 20, (5, 7), generator=torch.Generator().manual_seed(0))


def test_the_recorder_reads_what_the_model_says_of_itself(model):
    model.train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    recorder = stability.Recorder(model, rate=0.3, seed=2)
    recorder.record(10, IDS, loss=loss.item())
    frame = recorder.frame
    model.eval()
    with torch.no_grad():
        out = model(IDS, labels=IDS, output_hidden_states=True)
    rows = [h[:, 1:].flatten(0, 1).double().var(0, correction=0).mean() for h in out.hidden_states[:-1]]
    assert frame["variance"].tolist()[:-1] == pytest.approx([float(row) for row in rows], rel=1e-6)
    block = torch.cat([p.grad.flatten() for p in model.transformer.h[1].parameters()])
    assert frame["gradient"][1] == pytest.approx(float(block.norm()), rel=1e-5)
    assert np.isnan(frame["gradient"].iloc[-1])
    assert frame["heldout"][0] == pytest.approx(float(out.loss), rel=1e-5)
    assert frame["loss"][0] == loss.item()
    assert frame["layer"].tolist() == [0, 1, 2, 3]
    assert frame.loc[0, ["width", "depth", "rate", "seed", "step"]].tolist() == [16, 3, 0.3, 2, 10]


def test_the_recorder_leaves_modes_hooks_and_random_state_alone(model):
    model.train()
    model.transformer.h[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    recorder = stability.Recorder(model, rate=0.3)
    recorder.record(0, IDS, training=True)
    recorder.record(0, IDS, training=True)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.transformer.h)
    noisy = recorder.frame["variance_training"].to_numpy().reshape(2, -1)
    assert (noisy[0] == noisy[1]).all()  # masks of a step and seed
    assert (noisy[0] > 1.05 * recorder.frame["variance"].to_numpy()[:4]).all()
    assert recorder.frame["gradient"].isna().all()


def test_without_dropout_the_stream_is_the_same_in_training_mode(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    recorder = stability.Recorder(model, rate=0.0)
    recorder.record(0, IDS, training=True)
    assert (recorder.frame["variance"] == recorder.frame["variance_training"]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    recorder = stability.Recorder(model, rate=0.0)
    recorder.record(0, IDS)
    recorder.record(1, Tokens.of(IDS).pad(3, side))
    plain, padded = (part.drop(columns="step").to_numpy() for _, part in recorder.frame.groupby("step"))
    assert padded == pytest.approx(plain, rel=1e-5, nan_ok=True)


def test_what_cannot_be_recorded_is_said(model):
    with pytest.raises(ValueError, match=r"give surgery.models.plain"):
        stability.Recorder(torch.nn.Linear(2, 2), rate=0.1)
    with pytest.raises(ValueError, match=r"rate = 1\.5"):
        stability.Recorder(model, rate=1.5)
    with pytest.raises(ValueError, match="give longer prompts"):
        stability.Recorder(model, rate=0.1).record(0, IDS[:, :1])


# --- the claims -------------------------------------------------------------------------------------------------------


def planted(level=0.0, swing=0.0, wide=0.0, gradient=0.0, near=0.0, far=0.0, split=False, seeds=5):
    """Two widths, two depths, one and three layers; what dropout adds to log variance, to its swings and, by depth, to
    the loss; and what a doubling of the width adds to the swings of log variance and of the gradient. ``split``: with
    the other sign in every other seed."""
    rng, rows = np.random.default_rng(0), []
    for width, depth, seed, rate in product((8, 16), (1, 3), range(seeds), (0.0, 0.5)):
        own = rng.normal(scale=0.01, size=4)
        sign = -1 if split and seed % 2 else 1
        dropped, doubled = sign * (rate > 0), sign * np.log2(width / 8)
        loss = 1 + (near, far)[depth == 3] * dropped + own[0]
        size = 0.3 + swing * dropped + wide * doubled + own[1]
        for step, layer in product(range(11), range(depth)):
            turn = 1 if step % 2 else -1
            log = level * dropped + own[2] + size * turn
            pull = (0.3 + gradient * doubled + own[3]) * turn
            rows.append((width, depth, rate, seed, step, layer, np.exp(log), np.exp(log), np.exp(pull), loss, loss))
    return pd.DataFrame(rows, columns=list(perceptrons.COLUMNS))


@cache
def claims(**effects):
    return say.stability(planted(**effects))


def word(sentences, *parts):
    """What the one sentence with all these parts says."""
    (sentence,) = [said for said in sentences if all(part in said for part in parts)]
    return sentence.split(": ", 1)[1].split(";")[0]


def test_a_changed_variance_is_confirmed_an_unchanged_one_refuted_and_an_unclear_one_neither():
    for where in ("at equal steps", "at equal held-out loss"):
        assert word(claims(level=0.5), "changes", where) == "confirmed (higher)"
        assert word(claims(level=-0.5), "changes", where) == "confirmed (lower)"
        assert word(claims(), "changes", where) == "refuted (less than 5%)"
        assert word(claims(level=0.5, split=True), "changes", where) == "undecided"


def test_equal_loss_is_not_equal_steps():
    frame = planted()
    falling = 3 * np.exp(-frame["step"] / np.where(frame["rate"] > 0, 8, 4))  # with dropout half as fast ...
    frame["heldout"] = falling
    frame["variance"] = 1 / falling  # ... and the variance is a function of the loss
    said = say.stability(frame)
    assert word(said, "changes", "at equal steps") == "confirmed (lower)"
    assert word(said, "changes", "at equal held-out loss") == "refuted (less than 5%)"


@pytest.mark.parametrize("how", ["coefficient of variation", "about its drift"])
def test_steadier_with_dropout(how):
    assert word(claims(swing=-0.1), "With dropout", "steadier", how) == "confirmed"
    assert word(claims(swing=0.1), "With dropout", "steadier", how) == "refuted"
    assert word(claims(swing=0.1, split=True), "With dropout", "steadier", how) == "undecided"


@pytest.mark.parametrize(
    ("how", "name"), [("log variance over", "wide"), ("about its drift", "wide"), ("log gradient norm", "gradient")]
)
@pytest.mark.parametrize("which", ["without dropout", "with dropout 0.5"])
def test_wider_is_steadier(which, how, name):
    assert word(claims(**{name: -0.1}), "wider", which, how) == "confirmed"
    assert word(claims(**{name: 0.1}), "wider", which, how) == "refuted"
    assert word(claims(**{name: 0.1}, split=True), "wider", which, how) == "undecided"


@pytest.mark.parametrize("sign", [1, -1])
def test_dropout_hardly_shows_on_a_shallow_network(sign):
    shows = ("hardly shows", "held-out loss")
    assert word(claims(near=0.02, far=0.5 * sign), *shows) == "confirmed"
    assert word(claims(near=0.4, far=0.5 * sign), *shows) == "refuted"
    assert word(claims(near=0.4 * sign, far=0.02), *shows) == "refuted"
    assert word(claims(near=0.3, far=0.5, split=True), *shows).startswith("undecided")


def test_drift_is_no_jitter():
    frame = planted()
    frame["variance"] = np.exp(0.1 * frame["step"])
    runs = stability.run_statistics(frame)
    assert runs["variance_jitter"].max() < 1e-12
    assert runs["variance_spread"].min() > 0.1
    assert list(runs.columns) == list(stability.RUN_STATISTICS)


def test_a_shallower_network_that_converges_sooner():
    frame = planted()
    frame["heldout"] = 1 + np.exp(-frame["step"] / frame["depth"])
    assert word(say.stability(frame), "converges sooner") == "confirmed"
    frame["heldout"] = 1 + np.exp(-frame["step"] / (4 - frame["depth"]))
    assert word(say.stability(frame), "converges sooner") == "refuted"
    frame["heldout"] = 1 + np.exp(-frame["step"])
    assert word(say.stability(frame), "converges sooner") == "undecided"


def test_a_layer_in_which_nothing_varies_is_left_out():
    frame = planted(level=0.5)
    dead = frame.copy()
    dead.loc[dead["layer"] == 2, ["variance", "gradient"]] = 0.0
    without = stability.run_statistics(frame[frame["layer"] < 2])
    pd.testing.assert_frame_equal(stability.run_statistics(dead), without)
    assert word(say.stability(dead), "changes", "at equal steps") == "confirmed (higher)"


def test_a_sweep_with_holes_is_judged_where_it_can_be():
    frame = planted(near=0.02, far=0.5)
    holes = frame[(frame["width"] == 8) | (frame["depth"] == 1)]
    (said,) = [said for said in say.stability(holes) if "hardly shows" in said and "held-out" in said]
    assert ": confirmed;" in said
    assert "at width 8" in said
    assert "at width 16" not in said


def test_what_cannot_be_judged_is_said():
    frame = planted()
    assert {sentence.split(": ")[1].split(";")[0] for sentence in claims(seeds=1)} == {"one seed tells nothing"}
    with pytest.raises(ValueError, match=r"the rates are 0.5: give 0 and at least one more"):
        say.stability(frame[frame.rate > 0])
    with pytest.raises(ValueError, match="a spread over steps needs 3"):
        say.stability(frame[frame.step.isin([0, 10])])
    with pytest.raises(ValueError, match="give runs of the same width, depth and seed"):
        say.stability(frame[(frame.rate > 0) == (frame.seed > 2)])


def test_a_frame_of_one_width_and_depth_is_judged_on_the_rest(model):
    runs = []
    for rate, seed in product((0.0, 0.3), (0, 1)):
        recorder = stability.Recorder(model, rate=rate, seed=seed)
        for step in range(5):
            recorder.record(step, IDS)
        runs.append(recorder.frame)
    frame = pd.concat(runs)
    assert len(say.stability(frame)) == 4
    assert drawing.png(draw.stability(frame))[1:4] == b"PNG"


def test_the_figure_has_a_line_for_every_layer_and_rate():
    figure = draw.stability(planted())
    variance, gradient, loss, shift, width, depth = figure.axes
    assert [len(axes.lines) for axes in (variance, gradient, shift)] == [6, 6, 6]
    assert len(loss.lines) == 4
    assert len(width.containers) == 6
    assert len(depth.containers) == 2
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
