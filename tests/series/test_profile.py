"""The profile gathers what the measures say of every layer, and what leaving it out costs."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch

from support.known_windows import every_window, random_tokens, stack, uneven_prompts
from surgery import Stack, series
from surgery.instruments import known_networks, massive, similarity
from surgery.records import tables
from surgery.series import side_by_side
from surgery.stats.sampling import Sampling


def test_the_profile_gathers_what_the_measures_say():
    opened, tokens = stack("random"), known_networks.tokens(24, 10)
    frame = series.profile(opened, tokens, length=3, sampling=Sampling(resamples=20))
    assert list(frame.columns[: 3 + len(series.PROFILE)]) == ["layer", "n_prompts", "length", *series.PROFILE]
    windows = every_window("random").set_index(["start", "stop"])
    for layer, row in frame.iterrows():
        for span, length in (("pair", 2), ("window", 3)):
            for name in ("S", "R", "R_over_N", "loss_parallel_sum"):
                for end in ("", "_low", "_high"):
                    if layer + length <= 6:
                        expected = windows.loc[(layer, layer + length), name + end]
                        assert row[f"{name}_{span}{end}"] == pytest.approx(expected, rel=1e-6), (name, span, end)
                    else:
                        assert np.isnan(row[f"{name}_{span}{end}"])
    alike = similarity.layers(opened, tokens, sampling=Sampling(resamples=20))
    shared = [name for name in alike if name not in massive.COLUMNS]
    pd.testing.assert_frame_equal(frame[shared], alike[shared])


@functools.cache
def profile_of_uneven_prompts() -> pd.DataFrame:
    sampling = Sampling(resamples=0, batch_size=4)
    return series.profile(stack("random", dtype=torch.float64), uneven_prompts(), length=2, sampling=sampling)


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_the_damage_of_skipping_is_that_of_the_wiring_without_the_layer(layer):
    opened, tokens = stack("random", dtype=torch.float64), uneven_prompts()
    row = profile_of_uneven_prompts().iloc[layer]
    predicting = tokens.mask[:, :-1] & tokens.mask[:, 1:]
    targets = tokens.ids[:, 1:][predicting]
    clean, rewired = (
        opened.run(tokens, wiring)[:, :-1][predicting].log_softmax(-1)
        for wiring in (":", f":{layer} {layer + 1}:" if layer < 5 else ":5")
    )
    change = torch.nn.functional.nll_loss(rewired, targets) - torch.nn.functional.nll_loss(clean, targets)
    divergence = torch.nn.functional.kl_div(rewired, clean, log_target=True, reduction="batchmean")
    assert row["loss_skip"] == pytest.approx(change.item(), rel=1e-7)
    assert row["kl_skip"] == pytest.approx(divergence.item(), rel=1e-7)


@pytest.mark.parametrize(("kind", "value"), [("parallel", 0), ("serial", 1)])
def test_the_profile_tells_serial_from_parallel_by_s_alone(kind, value):
    frame = series.profile(stack(kind), known_networks.tokens(24, 10), sampling=Sampling(resamples=20))
    for name, windows in (("S_pair", 5), ("S_window", 3)):
        assert frame[name].dropna().tolist() == pytest.approx([value] * windows, abs=1e-6)
    assert frame["cosine"].abs().max() < 1e-6
    assert (frame["kl_skip_low"] > 0).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_profiles_of_models_are_whole_and_explained(name, load, tmp_path):
    opened = Stack(load(name))
    frame = series.profile(opened, random_tokens(), sampling=Sampling(resamples=5))
    assert frame["length"].tolist() == [4] * 4
    assert frame[["S_pair", "S_window"]].notna().sum().tolist() == [3, 1]
    assert frame[["loss_skip", "update_ratio"]].notna().all().all()
    tables.write(frame, tmp_path / "profile.csv", {}, series.COLUMNS)


def test_windows_of_sublayers_can_be_written_with_their_names(load, tmp_path):
    sub = series.windows(Stack(load("gpt2")), random_tokens(), 2, grain="sublayer", sampling=Sampling(resamples=5))
    tables.write(sub, tmp_path / "sublayers.csv", {}, series.COLUMNS)
    assert tables.read(tmp_path / "sublayers.csv")["first"].tolist() == sub["first"].tolist()


def test_the_profile_costs_what_it_says():
    opened, tokens, n = stack("random"), known_networks.tokens(4, 6), 6
    sampling = Sampling(resamples=0, skip_massive=False)
    with side_by_side.counted_layers() as alone:
        series.windows(opened, tokens, 3, sampling=sampling)
    with side_by_side.counted_layers() as count:
        series.profile(opened, tokens, 3, sampling=sampling)
    assert (count[0] - alone[0]) / tokens.numel() == n * (n + 3) / 2


@pytest.mark.parametrize(("length", "message"), [(7, "no window of 7 layers fits"), (1, "max_length must be 2 to 6")])
def test_a_profile_of_windows_that_cannot_be_is_refused(length, message):
    with pytest.raises(ValueError, match=message):
        series.profile(stack("random"), known_networks.tokens(), length)
