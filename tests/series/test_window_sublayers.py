"""Windows of sublayers: attention and MLP of each layer, one behind the other or side by side."""

import functools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

import surgery
from support.known_windows import by_hand, every_window, random_tokens, stack
from surgery import Stack, series
from surgery.instruments import known_networks
from surgery.series import side_by_side
from surgery.stats.sampling import Sampling


def inside_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """The windows that are attention and MLP of one layer."""
    return frame[(frame["start"] % 2 == 0) & (frame["stop"] == frame["start"] + 2)]


@pytest.mark.parametrize("name", ["gptj", "gpt_neox"])
def test_attention_and_mlp_side_by_side_read_nothing_of_each_other(name, load):
    frame = series.windows(Stack(load(name)), random_tokens(), 3, grain="sublayer", sampling=Sampling(resamples=5))
    inside = inside_layers(frame)
    assert inside["first"].tolist() == [f"{layer}.attn" for layer in range(4)]
    assert inside["last"].tolist() == [f"{layer}.mlp" for layer in range(4)]
    assert inside[["R", "O", "S", "R_live", "O_live"]].max().max() < 1e-6
    assert (inside[["N", "R_shuffled"]] == 0).all().all()
    assert inside["R_over_N"].isna().all()
    assert inside[["loss_parallel_sum", "kl_parallel_sum"]].abs().max().max() < 1e-6
    assert frame.drop(index=inside.index)["S"].min() > 0.02


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_mlp_behind_its_attention_reads_it(name, load):
    inside = inside_layers(
        series.windows(Stack(load(name)), random_tokens(), 2, grain="sublayer", sampling=Sampling(resamples=20))
    )
    assert inside["S_low"].min() > 0.02
    assert inside["kl_parallel_sum_low"].min() > 0


@functools.cache
def windows_of_three_sublayers(opened: Stack) -> pd.DataFrame:
    frame = series.windows(opened, random_tokens(), 3, grain="sublayer", sampling=Sampling(resamples=0))
    return frame.set_index(["start", "stop"])


@pytest.fixture(scope="module")
def in_double(model_folder) -> Callable[[str], Stack]:
    return functools.cache(lambda name: Stack(surgery.load(model_folder(name), dtype=torch.float64)))


@pytest.mark.parametrize(("name", "start", "stop"), [("gptj", 2, 5), ("gptj", 3, 6), ("gpt2", 2, 5), ("gpt2", 1, 4)])
def test_a_window_of_sublayers_is_what_the_formulas_say(name, start, stop, in_double):
    opened, tokens = in_double(name), random_tokens()
    found = windows_of_three_sublayers(opened).loc[(start, stop)]
    context, names = opened.context(tokens), [f"{unit // 2}.{('attn', 'mlp')[unit % 2]}" for unit in range(8)]
    beside = name == "gptj"
    whole, x = opened.stream(context), {}
    for layer in range(5):
        x[2 * layer] = whole[layer]
        if layer < 4:
            x[2 * layer + 1] = opened.execute(f"{layer}.attn", whole[layer], context)

    def update(unit: int, entry: torch.Tensor) -> torch.Tensor:
        return opened.execute(names[unit], entry, context) - entry

    def flat(values: torch.Tensor) -> np.ndarray:
        return values[:, 1:].flatten(0, 1).numpy()

    units = range(start + 1, stop)
    reads = {unit: x[unit - unit % 2 if beside else unit] for unit in (start, *units)}
    with opened.frozen(context):
        alone = {unit: flat(update(unit, x[start])) for unit in units}
    updates = {unit: flat(x[unit + 1] - x[unit]) for unit in units}
    entries = {unit: flat(values) for unit, values in reads.items()} | {start: flat(x[start])}
    for measure, value in by_hand(updates, alone, entries, start).items():
        assert found[measure] == pytest.approx(value, rel=1e-9), measure

    together = {unit: update(unit, x[start]) for unit in units} | {start: x[start + 1] - x[start]}
    y = x[start] + sum(together.values())
    if stop % 2:  # the window ends with an attention, whose MLP is still to run
        y = y + update(stop, y - together[stop - 1] if beside else y)
    rewired = opened.readout(opened.execute(f"{(stop + 1) // 2}:", y, context))[:, :-1].flatten(0, 1).log_softmax(-1)
    clean = opened.run(tokens)[:, :-1].flatten(0, 1).log_softmax(-1)
    divergence = torch.nn.functional.kl_div(rewired, clean, log_target=True, reduction="batchmean")
    assert found["kl_parallel_sum"] == pytest.approx(divergence.item(), rel=1e-6)


def test_where_attention_writes_nothing_sublayers_read_what_their_layers_do():
    """In the constructed networks the MLPs are the layers: a window of sublayers is that of its MLPs."""
    for kind, value in (("parallel", 0), ("serial", 1)):
        opened = stack(kind, n_layers=4, norm="RMS", dtype=torch.float64)
        found = series.windows(
            opened, known_networks.tokens(24, 10), grain="sublayer", damage=False, sampling=Sampling(resamples=0)
        )
        found = found.set_index(["start", "stop"])
        for start, stop in ((1, 4), (3, 6), (1, 8)):
            assert found.loc[(start, stop), ["R", "O", "S"]].tolist() == pytest.approx([value] * 3, abs=1e-6)
    mixed = stack("mixed", 0.5, n_layers=4, dtype=torch.float64)
    sub = series.windows(
        mixed, known_networks.tokens(24, 10), grain="sublayer", damage=False, sampling=Sampling(resamples=0)
    )
    sub = sub.set_index(["start", "stop"])
    for _, row in every_window("mixed", 0.5, damage=False, n_layers=4, dtype=torch.float64).iterrows():
        assert sub.loc[(2 * row["start"] + 1, 2 * row["stop"]), "S"] == pytest.approx(row["S"], abs=1e-9)


def test_sublayers_cost_what_it_says(load):
    opened, tokens = Stack(load("gpt2")), random_tokens()
    opened.wiring("0.attn")  # asked once: can the layers be split
    assert not opened.parallel_sublayers
    sampling = Sampling(resamples=0, skip_massive=False)
    with side_by_side.counted_layers() as count:
        series.windows(opened, tokens, 2, damage=False, grain="sublayer", sampling=sampling)
    # three streams by sublayers, the norms' state by layers, 7 windows
    assert count[0] / tokens.numel() == 3 * 8 + 4 + 4 * 7


def test_layers_that_cannot_be_split_have_no_sublayers(load):
    with pytest.raises(ValueError, match="runs sublayers"):
        series.windows(Stack(load("native-attention-only")), random_tokens(), grain="sublayer")
    with pytest.raises(ValueError, match="grain is 'layer' or 'sublayer', got 'head'"):
        series.windows(stack("random"), known_networks.tokens(), grain="head")
