"""Seriesness reads 0 on the parallel network, 1 on the serial one, and rises in between."""

import numpy as np
import pandas as pd
import pytest
import torch

from support.known_windows import by_hand, every_window, stack, uneven_prompts
from surgery import Stack, series
from surgery.instruments import known_networks, massive, readout
from surgery.instruments.together import Together
from surgery.instruments.windows import FORMS
from surgery.models.tokens import Tokens
from surgery.series import side_by_side
from surgery.series.recording import Recording
from surgery.series.window import table
from surgery.stats.bootstrap import weights
from surgery.stats.sampling import Sampling

MEASURES = ("R", "O", "S", "R_live", "O_live", "S_live", "layernorm_share")
NULLS = ("N", "R_over_N", "R_rotated", "R_over_rotated", "preference", "R_shuffled")
DRAWN = ("R_rotated", "R_over_rotated", "preference", "R_shuffled")  # by the numbers of prompts
DAMAGE = ("loss_parallel_sum", "loss_parallel_mean", "kl_parallel_sum", "kl_parallel_mean")


def moved_left(tokens: Tokens) -> Tokens:
    """The same prompts padded on the left."""
    shifts = (~tokens.mask).sum(1).tolist()
    ids = torch.stack([row.roll(shift) for row, shift in zip(tokens.ids, shifts, strict=True)])
    mask = torch.stack([row.roll(shift) for row, shift in zip(tokens.mask, shifts, strict=True)])
    return Tokens(ids, mask)


# --- the constructed networks ---

variants = pytest.mark.parametrize(
    ("norm", "biases", "activation"),
    [(None, False, "relu"), (None, True, "gelu"), ("RMS", False, "gelu"), ("RMS", True, "relu"), ("LN", True, "gelu")],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@variants
@dtypes
def test_parallel_network_reads_zero_in_every_window(norm, biases, activation, dtype):
    frame = every_window("parallel", damage=False, norm=norm, biases=biases, activation=activation, dtype=dtype)
    assert frame[["R", "O", "S", "R_shuffled"]].abs().max().max() < 1e-6
    assert frame[["R_over_N", "R_over_rotated", "preference"]].abs().max().max() < 2e-6
    assert frame["N"].min() > 0.05


@variants
@dtypes
def test_serial_network_reads_one_in_every_window(norm, biases, activation, dtype):
    frame = every_window("serial", damage=False, norm=norm, biases=biases, activation=activation, dtype=dtype)
    assert (frame[["R", "O", "S", "R_shuffled"]] - 1).abs().max().max() < 1e-6


@pytest.mark.parametrize(
    ("norm", "expected"), [(None, (0.18, 0.40, 0.70)), ("RMS", (0.23, 0.51, 0.78))], ids=["no norm", "frozen norm"]
)
def test_mixed_network_rises_with_its_share(norm, expected):
    """Expected: an independent simulation of the construction. One seed differs by up to .1, the mean of 4 by .05."""
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    frames = [every_window("mixed", share, damage=False, norm=norm) for share in shares]
    assert (pd.concat([frame["S"] for frame in frames], axis=1).diff(axis=1).iloc[:, 1:] > 0.02).all().all()
    for share, value, frame in zip(shares[1:4], expected, frames[1:4], strict=True):
        others = [stack("mixed", share, norm=norm, seed=seed) for seed in (1, 2, 3)]
        seeds = [
            series.windows(opened, known_networks.tokens(24, 10), damage=False, sampling=Sampling(resamples=0))
            for opened in others
        ]
        readings = [found.set_index(["start", "stop"]).loc[(0, 6), "S"] for found in (frame, *seeds)]
        assert np.mean(readings) == pytest.approx(value, abs=0.06)
        assert readings == pytest.approx([value] * 4, abs=0.12)


def test_live_normalisation_leaks_into_a_parallel_network_and_the_frozen_one_does_not():
    frame = every_window("parallel", damage=False, norm="RMS")
    assert frame["S"].max() < 1e-6
    assert frame["S_live"].mean() > 0.2
    assert (frame["S_live_low"] > 0.005).all()  # least where a late window barely moves the stream
    assert np.allclose(frame["layernorm_share"], frame["S_live"])


def test_without_normalisation_there_is_nothing_to_freeze():
    frame = every_window("mixed", 0.5, damage=False, norm=None)  # measured above
    for name in ("R", "O", "S"):
        assert np.allclose(frame[name], frame[f"{name}_live"], atol=1e-7)
    assert frame["layernorm_share"].abs().max() < 1e-7


def test_a_reader_without_preference_reads_exactly_its_displacement_null():
    frame = every_window("linear", damage=False, dtype=torch.float64)
    assert np.allclose(frame["R_over_N"], 1, atol=1e-9)
    assert frame["R"].between(0.05, 0.8).all()


@pytest.mark.parametrize("norm", [None, "RMS", "LN"])
def test_untrained_networks_stay_between_zero_and_one_and_read_no_more_than_displacement(norm):
    for seed in (0, 1):
        frame = every_window("random", damage=False, norm=norm, seed=seed)
        for name in ("R", "O", "S", "R_live", "O_live", "S_live", "N", "R_shuffled"):
            assert frame[name].between(0, 1).all(), name
        later = frame[frame["start"] > 0]
        assert later["R_over_N"].between(0.7, 1.3).all()


def test_running_a_parallel_network_in_parallel_changes_nothing_but_averaging_does():
    frame = every_window("parallel", dtype=torch.float64)
    assert frame[["loss_parallel_sum", "kl_parallel_sum"]].abs().max().max() < 1e-9
    assert frame["kl_parallel_mean"].min() > 1e-3


def test_loss_rises_by_the_divergence_where_the_network_predicts_its_own_text():
    """On text sampled from the clean network the expected change of loss is KL(clean || rewired)."""
    opened, draw = stack("serial", dtype=torch.float64), torch.Generator().manual_seed(0)
    ids = known_networks.tokens(100, 1)
    for _ in range(19):
        following = torch.multinomial(opened.run(ids)[:, -1].softmax(-1), 1, generator=draw)
        ids = torch.cat([ids, following], dim=1)
    whole = series.windows(opened, ids, forms=FORMS).set_index(["start", "stop"]).loc[(0, 6)]
    for form in ("sum", "mean"):
        assert whole[f"loss_parallel_{form}_low"] > 0
        assert whole[f"loss_parallel_{form}_low"] < whole[f"kl_parallel_{form}"] < whole[f"loss_parallel_{form}_high"]


def test_running_a_serial_network_in_parallel_does_damage():
    frame = every_window("serial")
    assert frame["kl_parallel_sum"].min() > 1e-3
    assert (frame["kl_parallel_sum_low"] > 0).all()


# --- against the definitions ---


@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(1, 3), (0, 4), (2, 6)])
def test_a_window_of_a_random_network_is_what_the_formulas_say(start, stop, skip_first):
    opened, tokens = stack("random", dtype=torch.float64), known_networks.tokens(10, 8, seed=1)
    frame = series.windows(opened, tokens, sampling=Sampling(resamples=0, skip_first=skip_first))
    found = frame.set_index(["start", "stop"]).loc[(start, stop)]
    context = opened.context(tokens)
    stream = opened.stream(context)

    def flat(values: torch.Tensor) -> np.ndarray:
        return values[:, int(skip_first) :].flatten(0, 1).numpy()

    x = {layer: flat(stream[layer]) for layer in range(7)}
    updates = {layer: x[layer + 1] - x[layer] for layer in range(6)}
    layers = range(start + 1, stop)
    live = {layer: flat(opened.update(layer, stream[start], context)) for layer in layers}
    with opened.frozen(context):
        frozen = {layer: flat(opened.update(layer, stream[start], context)) for layer in layers}
    expected = by_hand(updates, frozen, x, start)
    expected_live = by_hand(updates, live, x, start)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    for name in ("R", "O", "S"):
        assert found[f"{name}_live"] == pytest.approx(expected_live[name], rel=1e-9), name
    assert found["layernorm_share"] == pytest.approx(expected_live["S"] - expected["S"], rel=1e-6)


def test_frozen_values_of_a_mixed_network_follow_from_its_weights_alone():
    """No part of the model is called: the update is ``V relu(W x / rms)`` with the clean run's root mean square."""
    network = known_networks.mixed_network(0.4, norm="RMS", dtype=torch.float64)
    named = ((name.replace("._original_component", ""), value) for name, value in network.named_parameters())
    weight = {name: value.detach().numpy() for name, value in named}
    tokens = known_networks.tokens(8, 6, seed=2)
    found = series.windows(Stack(network), tokens, damage=False, sampling=Sampling(resamples=0)).set_index(
        ["start", "stop"]
    )
    x, updates, sizes = {0: weight["tok_embed.weight"][tokens[:, 1:].flatten()]}, {}, {}

    def update(layer: int, entry: np.ndarray) -> np.ndarray:
        hidden = entry / sizes[layer] @ weight[f"layers.{layer}.mlp.fc_in.weight"].T
        return np.maximum(hidden, 0) @ weight[f"layers.{layer}.mlp.fc_out.weight"].T

    for layer in range(6):
        sizes[layer] = np.sqrt((x[layer] ** 2).mean(1, keepdims=True) + 1e-5)
        updates[layer] = update(layer, x[layer])
        x[layer + 1] = x[layer] + updates[layer]
    for start, stop in ((0, 2), (1, 5), (0, 6)):
        expected = by_hand(updates, {layer: update(layer, x[start]) for layer in range(start + 1, stop)}, x, start)
        for name, value in expected.items():
            assert found.loc[(start, stop), name] == pytest.approx(value, rel=1e-5), name  # the model's norm is float32


@pytest.mark.parametrize(("start", "stop"), [(1, 3), (3, 6)])
def test_damage_is_that_of_the_parallel_wiring(start, stop):
    opened, tokens = stack("random", dtype=torch.float64), known_networks.tokens(6, 8, seed=3)
    frame = series.windows(opened, tokens, forms=FORMS, sampling=Sampling(resamples=0))
    found = frame.set_index(["start", "stop"]).loc[(start, stop)]
    targets = tokens[:, 1:].flatten()
    clean = opened.run(tokens)[:, :-1].flatten(0, 1).log_softmax(-1)
    group = "|".join(str(layer) for layer in range(start, stop))
    for form, text in (("sum", f":{start} {{{group}}} {stop}:"), ("mean", f":{start} mean{{{group}}} {stop}:")):
        rewired = opened.run(tokens, text)[:, :-1].flatten(0, 1).log_softmax(-1)
        change = torch.nn.functional.nll_loss(rewired, targets) - torch.nn.functional.nll_loss(clean, targets)
        divergence = torch.nn.functional.kl_div(rewired, clean, log_target=True, reduction="batchmean")
        assert found[f"loss_parallel_{form}"] == pytest.approx(change.item(), rel=1e-7)
        assert found[f"kl_parallel_{form}"] == pytest.approx(divergence.item(), rel=1e-7)


def test_damage_does_not_depend_on_how_many_rows_are_read_out_at_once(monkeypatch):
    whole = every_window("random")
    monkeypatch.setattr(readout, "LOGITS_AT_ONCE", 50 * known_networks.D_VOCAB)
    parts = series.windows(stack("random"), known_networks.tokens(24, 10), forms=FORMS, sampling=Sampling(resamples=20))
    assert np.allclose(parts[list(DAMAGE)], whole[list(DAMAGE)], atol=1e-6)


def test_it_costs_what_it_says():
    opened, tokens = stack("random"), known_networks.tokens(4, 6)
    n, sampling = opened.n_layers, Sampling(resamples=0, skip_massive=False)

    def passes(**options) -> float:
        with side_by_side.counted_layers() as count:
            series.windows(opened, tokens, sampling=sampling, **options)
        return count[0] / tokens.numel()

    assert passes(damage=False) == n * (2 * n + 2)
    in_parallel = n * (n - 1) * (n - 2) / 6
    assert passes() == n * (2 * n + 2) + in_parallel
    assert passes(forms=FORMS) == n * (2 * n + 2) + 2 * in_parallel
    assert passes(damage_length=2) == n * (2 * n + 2) + (n - 1) * (n - 2) / 2
    assert passes(max_length=2, damage=False) == 4 * n + 4 * (n - 1)
    assert passes(max_length=2, damage=False, untrained=opened) == 4 * n + 4 * (n - 1) + (2 + 2) * n + (n - 1)


def test_damage_of_short_windows_alone():
    opened, tokens, sampling = stack("random"), known_networks.tokens(24, 10), Sampling(resamples=20)
    short = series.windows(opened, tokens, damage_length=3, sampling=sampling)
    whole, long = every_window("random"), short["stop"] - short["start"] > 3
    damage = [name for name in short if "parallel_sum" in name]
    assert short.loc[long, damage].isna().all().all()
    assert short["loss_parallel_mean"].isna().all()  # not among the forms
    pd.testing.assert_frame_equal(short.loc[~long, damage], whole.loc[~long, damage], rtol=1e-5)
    rest = [name for name in short if "parallel" not in name]
    pd.testing.assert_frame_equal(short[rest], whole[rest], rtol=1e-6)


def test_a_form_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="put together by sum or mean, not by 'product'"):
        series.windows(stack("random"), known_networks.tokens(4, 6), forms=("product",))


@pytest.mark.parametrize("group", [1, 2, 7, 100])
def test_streams_that_run_together_give_what_each_gives_alone(group, monkeypatch):
    """Under frozen and live norms, and with the mask and positions of padded prompts."""
    opened = stack("random", n_layers=4, dtype=torch.float64)
    whole = series.windows(opened, uneven_prompts(), forms=FORMS, sampling=Sampling(resamples=5))
    monkeypatch.setattr(Together, "group", property(lambda self: group, lambda self, value: None), raising=False)
    parts = series.windows(opened, uneven_prompts(), forms=FORMS, sampling=Sampling(resamples=5))
    pd.testing.assert_frame_equal(parts, whole, rtol=1e-7)


def test_the_sums_of_batches_can_be_kept_and_joined(tmp_path):
    opened, tokens, sampling = stack("random", n_layers=4), uneven_prompts(), Sampling(resamples=20, batch_size=4)
    whole = series.windows(opened, tokens, untrained=opened, sampling=sampling)
    for number, prompts in enumerate(Recording.of(opened, tokens, untrained=opened, sampling=sampling).batches):
        again = Recording.of(opened, tokens, untrained=opened, sampling=sampling)  # as in another process
        torch.save(again.sums(prompts), tmp_path / f"{number}.pt")
    parts = [torch.load(path) for path in sorted(tmp_path.glob("*.pt"))]
    pd.testing.assert_frame_equal(table(again, parts), whole)


# --- prompts, batches, intervals ---


def test_rows_are_all_windows_and_columns_come_with_intervals():
    frame = every_window("random")
    assert list(zip(frame["start"], frame["stop"], strict=True)) == [(a, b) for a in range(5) for b in range(a + 2, 7)]
    named = [f"{name}{end}" for name in (*MEASURES, *NULLS, *DAMAGE) for end in ("", "_low", "_high")]
    assert list(frame.columns) == ["start", "stop", "n_prompts", *named, *massive.COLUMNS]
    assert (frame["n_prompts"] == 24).all()
    assert frame.notna().all().all()


def test_short_windows_are_the_same_rows_as_among_all():
    tokens = known_networks.tokens(24, 10)
    short = series.windows(stack("random"), tokens, max_length=3, forms=FORMS, sampling=Sampling(resamples=20))
    among_all = every_window("random").query("stop - start <= 3").reset_index(drop=True)
    pd.testing.assert_frame_equal(short, among_all, rtol=1e-6)
    longer_than_the_model = series.windows(
        stack("random"), tokens, max_length=99, forms=FORMS, sampling=Sampling(resamples=20)
    )
    pd.testing.assert_frame_equal(longer_than_the_model, every_window("random"), rtol=1e-6)


def test_damage_can_be_left_out():
    frame = series.windows(
        stack("random"), known_networks.tokens(24, 10), damage=False, sampling=Sampling(resamples=20)
    )
    assert not any("parallel" in name for name in frame)
    pd.testing.assert_frame_equal(frame, every_window("random")[frame.columns], rtol=1e-6)


def test_results_are_reproducible():
    tokens = known_networks.tokens(24, 10)
    again = series.windows(stack("random"), tokens, forms=FORMS, sampling=Sampling(resamples=20))
    pd.testing.assert_frame_equal(again, every_window("random"))
    other = series.windows(stack("random"), known_networks.tokens(24, 10), sampling=Sampling(resamples=20, seed=1))
    assert not np.allclose(other["S_low"], again["S_low"])
    assert not np.allclose(other["R_shuffled"], again["R_shuffled"])
    assert np.allclose(other["S"], again["S"])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 100])
def test_batches_do_not_matter(batch_size):
    opened, tokens = stack("random", n_layers=4, dtype=torch.float64), uneven_prompts()
    fresh = stack("random", n_layers=4, dtype=torch.float64, seed=1)
    whole = series.windows(opened, tokens, untrained=fresh, sampling=Sampling(resamples=20))
    parts = series.windows(opened, tokens, untrained=fresh, sampling=Sampling(resamples=20, batch_size=batch_size))
    pd.testing.assert_frame_equal(parts, whole, rtol=1e-6)


def test_padding_does_not_matter():
    opened, tokens = stack("random", n_layers=4, dtype=torch.float64), uneven_prompts()
    plain = series.windows(opened, tokens, sampling=Sampling(resamples=20))
    for padded in (tokens.pad(3, "right"), moved_left(tokens), moved_left(tokens).pad(2, "left")):
        pd.testing.assert_frame_equal(series.windows(opened, padded, sampling=Sampling(resamples=20)), plain, rtol=1e-6)


def test_a_resample_is_the_measurement_of_the_resampled_prompts():
    """With one resample both ends of every interval are its value, which must be that of the data set it stands for."""
    opened, tokens = stack("random", n_layers=4, dtype=torch.float64), uneven_prompts()
    frame = series.windows(opened, tokens, forms=FORMS, sampling=Sampling(resamples=1, seed=3))
    draw = weights(len(tokens), 1, seed=3)[1]
    prompts = torch.repeat_interleave(torch.arange(len(tokens)), (draw / draw[draw > 0].min()).round().long())
    drawn = Tokens(tokens.ids[prompts], tokens.mask[prompts])
    resampled = series.windows(opened, drawn, forms=FORMS, sampling=Sampling(resamples=0))
    for name in (*MEASURES, *NULLS, *DAMAGE):
        if name not in DRAWN:
            assert np.allclose(frame[f"{name}_low"], resampled[name], rtol=1e-6, atol=1e-9), name


def test_intervals_hold_the_estimate_and_shrink_with_more_prompts():
    opened = stack("random", n_layers=4)
    few, many = (
        series.windows(opened, known_networks.tokens(count, 10), forms=FORMS, sampling=Sampling(resamples=200))
        for count in (16, 144)
    )
    for name in ("S_live", "R_over_N", *DAMAGE):
        assert (many[f"{name}_low"] < many[f"{name}_high"]).all(), name
        inside = (many[f"{name}_low"] <= many[name]) & (many[name] <= many[f"{name}_high"])
        assert inside.mean() > 0.9, name
        width = [(frame[f"{name}_high"] - frame[f"{name}_low"]).mean() for frame in (few, many)]
        assert width[1] < 0.6 * width[0], name  # a third is expected


def test_one_prompt_has_no_interval_and_nobody_to_exchange_with():
    frame = series.windows(stack("random"), known_networks.tokens(1, 20))
    assert frame[["R", "O", "S", "N", "loss_parallel_sum"]].notna().all().all()
    assert frame[["S_low", "S_high", "R_shuffled", "loss_parallel_sum_low"]].isna().all().all()


def test_a_dead_layer_has_no_say_and_an_all_dead_window_is_undefined():
    network = known_networks.serial_network(biases=True)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.startswith(("layers.4", "layers.5")) and "fc_out" in name and name.endswith("weight"):
                value.zero_()  # what is left is a bias: the layer writes, but the same for every token
    tokens, sampling = known_networks.tokens(24, 10), Sampling(resamples=20)
    frame = series.windows(Stack(network), tokens, forms=FORMS, sampling=sampling).set_index(["start", "stop"])
    undefined = [(3, 5), (3, 6), (4, 6)]
    assert frame.loc[undefined, ["R", "O", "S", "S_low", "S_live", "N", "R_over_N", "R_shuffled"]].isna().all().all()
    assert frame.loc[undefined, list(DAMAGE)].notna().all().all()
    assert (frame.drop(index=undefined)[["R", "O", "S"]] - 1).abs().max().max() < 1e-6


def test_bfloat16_measures():
    frame = series.windows(
        stack("random", dtype=torch.bfloat16), known_networks.tokens(24, 10), sampling=Sampling(resamples=5)
    )
    later = frame["start"] > 0
    assert np.allclose(frame.loc[later, "S"], every_window("random").loc[later, "S"], atol=0.05)


def test_progress_draws_on_the_terminal_only_when_asked(capsys):
    series.windows(
        stack("parallel"), known_networks.tokens(4, 6), max_length=2, damage=False, sampling=Sampling(resamples=0)
    )
    assert capsys.readouterr() == ("", "")


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "max_length must be 2 to 6 or None, got 1"),
        ({"sampling": Sampling(batch_size=0)}, "batch_size must be at least 1, got 0"),
        (
            {"tokens": known_networks.tokens(5, 1)},
            "fewer than two tokens to compare in these prompts, each prompt's first",
        ),
        ({"tokens": torch.zeros(3, 4)}, "integer ids"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        series.windows(stack("parallel"), **{"tokens": known_networks.tokens(), **arguments})


def test_a_model_of_one_layer_has_no_window():
    with pytest.raises(ValueError, match="one layer; a window needs two"):
        series.windows(Stack(known_networks.parallel_network(n_layers=1)), known_networks.tokens())


def test_a_stream_that_is_not_finite_is_refused():
    network = known_networks.parallel_network()
    opened = Stack(network)
    with torch.no_grad():
        dict(network.named_parameters())["tok_embed._original_component.weight"].fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        series.windows(opened, known_networks.tokens())


def test_a_share_outside_zero_and_one_is_refused():
    with pytest.raises(ValueError, match=r"from 0 \(parallel\) to 1 \(serial\), one or 6 of them, got 1.5"):
        known_networks.mixed_network(1.5)


# --- thirds of the model ---


def test_summary_averages_windows_of_one_length_inside_each_third():
    opened = stack("random", n_layers=12)
    frame = series.windows(
        opened, known_networks.tokens(8, 8), max_length=4, damage=False, sampling=Sampling(resamples=10)
    )
    thirds = series.summary(frame, n_layers=12)
    assert thirds["third"].tolist() == ["first", "middle", "last"]
    assert thirds["length"].tolist() == [3, 3, 3]  # layer 0 is left out, so the first third holds no window of 4
    assert thirds["n_windows"].tolist() == [1, 2, 2]
    middle = frame[(frame["stop"] - frame["start"] == 3) & frame["start"].isin([4, 5])]
    for name in ("S", "S_low", "S_high", "R_over_N"):
        assert thirds[name][1] == pytest.approx(middle[name].mean())
    assert (thirds["S_min"][1], thirds["S_max"][1]) == (middle["S"].min(), middle["S"].max())
    assert series.summary(frame, 12, length=2)["n_windows"].tolist() == [2, 3, 3]
    assert series.summary(frame, 12, first_layer=0)["length"].tolist() == [4, 4, 4]


def test_summary_of_a_small_model_says_where_no_window_is():
    frame = series.windows(
        stack("random", n_layers=5), known_networks.tokens(4, 6), damage=False, sampling=Sampling(resamples=0)
    )
    thirds = series.summary(frame, n_layers=5)
    assert thirds["n_windows"].tolist() == [0, 0, 1]
    assert thirds["S"].isna().tolist() == [True, True, False]
