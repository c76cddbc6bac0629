"""The nulls beside S: content shuffled, writes turned, update sizes matched, massive tokens left out."""

import numpy as np
import pytest
import torch
from einops import rearrange

from support.exact_networks import parameters
from support.known_windows import every_window, spread, stack
from surgery import Stack, series
from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.windows import MATCHED, Turns, Units
from surgery.stats.sampling import Sampling


def test_shuffled_writes_are_another_prompts():
    """With two prompts of equal length the shuffle has to be their exchange, of measured tokens."""
    opened, tokens = stack("random", dtype=torch.float64), known_networks.tokens(2, 8, seed=4)
    found = series.windows(opened, tokens, damage=False, sampling=Sampling(resamples=0)).set_index(["start", "stop"])
    context = opened.context(tokens)
    stream = opened.stream(context)
    effects, sizes = [], []
    with opened.frozen(context):
        for layer in (2, 3, 4):
            exchanged = stream[1] + (stream[layer] - stream[1])[[1, 0]]
            exchanged[:, 0] = stream[layer, :, 0]
            entries = stream[1], exchanged, stream[layer]
            alone, shuffled, update = (opened.update(layer, x, context)[:, 1:].flatten(0, 1).numpy() for x in entries)
            effects.append(spread(shuffled - alone) / (spread(shuffled) + spread(alone)))
            sizes.append(spread(update) ** 2 + spread(alone) ** 2)
    assert found.loc[(1, 3), "R_shuffled"] == pytest.approx(effects[0], rel=1e-6)
    assert found.loc[(1, 5), "R_shuffled"] == pytest.approx(np.average(effects, weights=sizes), rel=1e-6)


def test_turned_writes_are_a_rotation_of_what_varies():
    opened, tokens = stack("random", dtype=torch.float64), known_networks.tokens(3, 8, seed=4)
    units, ensemble = Units.of(opened, "layer"), Ensemble.of(opened, tokens)
    x = opened.stream(tokens)[:, ensemble.mask]
    turn = Turns.of(units, ensemble).batch(0, ensemble.mask)
    written, starts = x[4] - x[1:3], slice(1, 3)
    mean = written.mean(1, keepdim=True)
    turned = turn(written, starts, 4)
    per_prompt = "start (prompt pos) d_model -> start prompt pos d_model"
    before, after = (rearrange(values - mean, per_prompt, prompt=3) for values in (written, turned))
    assert torch.allclose(before @ before.mT, after @ after.mT)  # within a prompt, all angles and sizes stay
    cosine = torch.cosine_similarity(before, after, dim=-1)
    assert cosine.abs().mean() < 0.3
    others = Turns.of(units, Ensemble.of(opened, tokens, Sampling(seed=1))).batch(0, ensemble.mask)
    assert not torch.allclose(others(written, starts, 4), turned)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_a_random_network_reads_its_rotation_null(scale):
    """Without attention and with relu, where the displacement N is furthest from being a null (R/N up to 2.3)."""
    ratios, displaced = [], []
    for norm, attention in (("RMS", True), ("LN", False)):
        model = known_networks.random_network(activation="relu", norm=norm, seed=2)
        with torch.no_grad():
            for name, weight in parameters(model).items():
                if name.endswith("attn.o.weight"):
                    weight *= scale * attention
                elif name.endswith("mlp.fc_out.weight"):
                    weight *= scale
        frame = series.windows(
            Stack(model), known_networks.tokens(32, 12), 3, damage=False, sampling=Sampling(resamples=0)
        )
        later = frame[frame["start"] > 0]
        ratios.append(later["R_over_rotated"].mean())
        displaced.append(later["R_over_N"].mean())
    assert ratios == pytest.approx([1, 1], abs=0.05)
    assert min(displaced) > 1.1


def test_a_window_that_reads_what_it_wrote_is_above_the_rotation_null_and_one_that_does_not_below():
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    preference = [every_window("mixed", share, damage=False).query("start > 0")["preference"] for share in shares]
    assert (np.diff([values.mean() for values in preference]) > 0.2).all()
    assert (preference[0] < 1e-6).all()
    assert (preference[-1] > 1.3).all()
    assert np.allclose(every_window("linear", damage=False, dtype=torch.float64)["preference"], 1, atol=0.02)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_matched_updates_have_the_models_sizes(scale):
    def sizes(stream, mask):
        x = stream[:, mask].double()
        return [float((x[i + 1] - x[i]).var(0).sum().sqrt() / x[i].var(0).sum().sqrt()) for i in range(len(x) - 1)]

    opened, fresh = stack("mixed", 0.5, norm="RMS"), Stack(known_networks.random_network(6, 56, seed=1))
    ensemble = Ensemble.of(opened, known_networks.tokens(MATCHED, 10))
    with torch.no_grad():
        for weight in parameters(fresh.model).values():
            weight *= scale
    units = Units.of(opened, "layer")
    matched = units.matched(fresh, ensemble)
    context = fresh.context(ensemble.tokens)
    ours, theirs = opened.stream(ensemble.tokens), matched.stream(context)
    assert sizes(theirs, ensemble.mask) == pytest.approx(sizes(ours, ensemble.mask), rel=1e-4)


def test_a_network_is_as_serial_as_itself_with_matched_updates():
    opened = stack("random")
    frame = series.windows(
        opened, known_networks.tokens(24, 10), 3, damage=False, untrained=opened, sampling=Sampling(resamples=20)
    )
    assert np.allclose(frame["S_matched"], frame["S"], atol=1e-5)
    assert np.allclose(frame[["S_excess", "S_excess_low", "S_excess_high"]], 0, atol=1e-5)


def test_two_layers_have_one_number():
    frame = every_window("random").query("stop - start == 2")
    assert np.allclose(frame["R"], frame["O"])
    assert np.allclose(frame["R"], frame["S"])


def test_massive_tokens_do_not_change_how_serial_a_window_is():
    """A dimension at 500 times the median in 2 % of the tokens; without the guard the writes of these alone count."""

    def read(planted, **sampling):
        model = known_networks.random_network(4, norm=None, seed=1)
        weights = parameters(model)
        with torch.no_grad():
            for layer in range(4):  # so that massive tokens change no other
                weights[f"layers.{layer}.attn.o.weight"].zero_()
            if planted:
                weights["tok_embed.weight"][::50, 3] = 500 * weights["tok_embed.weight"].abs().median()
        return series.windows(Stack(model), tokens, 2, damage=False, sampling=Sampling(resamples=0, **sampling))

    tokens = known_networks.tokens(48, 16)
    tokens[:, 0] = 1
    clean, guarded, unguarded = read(False), read(True), read(True, skip_massive=False)
    assert (guarded["n_massive"] == int(torch.isin(tokens[:, 1:], torch.arange(0, 256, 50)).sum())).all()
    for name in ("S", "R_over_rotated"):
        off = [(frame[name] - clean[name]).abs().max() for frame in (guarded, unguarded)]
        assert off[0] < 0.02
        assert off[1] > 3 * off[0]
    assert (guarded["token_share"] < 0.05).all()
