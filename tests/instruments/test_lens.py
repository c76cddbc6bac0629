"""The lens is the model's own head on every stream; its translators are least squares, fitted on other prompts."""

import numpy as np
import pandas as pd
import pytest
import torch

from support.exact_networks import network, ragged, rng
from surgery import Stack
from surgery.instruments import known_networks, lens, readout
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.regression import halves
from surgery.models.engine import Engine
from surgery.models.targets import Prompt, Targets
from surgery.models.tokens import Tokens
from surgery.records import tables
from surgery.stats.sampling import Sampling

TOKENS = known_networks.tokens(40, 8)


def random_stack() -> Stack:
    return Stack(known_networks.random_network(dtype=torch.float64))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_logit_lens_is_what_the_formulas_say(side, monkeypatch):
    monkeypatch.setattr(readout, "LOGITS_AT_ONCE", 7 * known_networks.D_VOCAB)
    stack, tokens = random_stack(), ragged(side)
    frame = lens.layers(stack, tokens, tuned=False, sampling=Sampling(resamples=0, batch_size=5))
    stream = stack.stream(tokens)[:, tokens.ensemble()]
    p = stack.readout(stream[-1]).softmax(-1)
    for layer in range(7):
        q = stack.readout(stream[layer]).softmax(-1)
        row = frame.iloc[layer]
        assert row["kl_lens_final"] == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), abs=1e-12)
        assert row["kl_final_lens"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-12)
        assert row["entropy"] == pytest.approx(float(-(q * q.log()).sum(-1).mean()))
        top, own = (values.argsort(-1, descending=True)[:, :5].tolist() for values in (q, p))
        shared = [len(set(a) & set(b)) / 5 for a, b in zip(top, own, strict=True)]
        assert row["top5_overlap"] == pytest.approx(np.mean(shared))
        assert row["top1_agreement"] == pytest.approx(np.mean([a[0] == b[0] for a, b in zip(top, own, strict=True)]))


def test_the_last_stream_reads_what_the_model_says():
    frame = lens.layers(random_stack(), TOKENS, sampling=Sampling(resamples=20))
    last = frame[frame["layer"] == 6].set_index("lens")
    assert np.allclose(last[["kl_lens_final", "kl_final_lens"]], 0, atol=1e-12)
    assert np.allclose(last[["top5_overlap", "top1_agreement"]], 1)


def test_the_constant_lens_sees_nothing_of_the_token():
    stack = random_stack()
    measured, fitted = halves(Tokens.of(TOKENS), seed=0)
    frame = lens.layers(stack, TOKENS, sampling=Sampling(resamples=0)).set_index(["lens", "layer"])
    mean = stack.stream(fitted)[-1, fitted.ensemble()].mean(0)
    p = stack.run(measured)[measured.ensemble()].log_softmax(-1)
    q = stack.readout(mean).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert frame.loc[("constant", 0), "kl_final_lens"] == pytest.approx(float(expected))
    assert frame["n_prompts"].tolist() == [20] * 15


def test_the_tuned_lens_undoes_what_is_affine_and_nothing_when_all_penalty():
    turn = torch.linalg.qr(torch.randn(6, 6, generator=rng(), dtype=torch.float64))[0]
    embedding = torch.randn(known_networks.D_VOCAB, 6, generator=rng(1), dtype=torch.float64)
    stack = Stack(network([turn, -0.5 * turn.T], embedding, [torch.ones(6), torch.arange(6)]))
    frame = lens.layers(stack, TOKENS, ridge=0.0, sampling=Sampling(resamples=0))
    tuned, logit = (frame[frame["lens"] == name]["kl_final_lens"].to_numpy() for name in ("tuned", "logit"))
    assert np.allclose(tuned, 0, atol=1e-9)
    assert logit[0] > 0.1
    shrunk = lens.layers(stack, TOKENS, ridge=1e9, sampling=Sampling(resamples=0))
    context = halves(Tokens.of(TOKENS), 0)[1]
    stream = stack.stream(context)[:, context.ensemble()]
    shift = (stream[-1] - stream[0]).mean(0)  # what is left of the translator: the mean step
    measured = halves(Tokens.of(TOKENS), 0)[0]
    streams = stack.stream(measured)[:, measured.ensemble()]
    p, q = (stack.readout(x).log_softmax(-1) for x in (streams[-1], streams[0] + shift))
    found = shrunk[shrunk["lens"] == "tuned"]["kl_final_lens"].iloc[0]
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["parallel", "serial", "random"])
def test_translation_brings_the_reading_nearer_in_serial_parallel_and_untrained_networks_alike(kind):
    stack = Stack(getattr(known_networks, f"{kind}_network")())
    frame = lens.layers(stack, known_networks.tokens(150, 10), sampling=Sampling(resamples=20))
    tuned, logit = (frame[frame["lens"] == name]["kl_final_lens"].to_numpy() for name in ("tuned", "logit"))
    assert (np.diff(logit) < 0).all()
    assert (np.diff(tuned) < 0).all()
    assert (tuned[:-1] < logit[:-1]).all()
    assert tuned[0] < frame[frame["lens"] == "constant"]["kl_final_lens"].iloc[0]


def test_few_tokens_overfit_and_it_shows():
    """Measured where it was fitted, a translator with more dimensions than tokens would be perfect."""
    stack = Stack(known_networks.random_network())
    found = lens.layers(stack, known_networks.tokens(8, 6), ridge=1e-6, sampling=Sampling(resamples=0)).set_index(
        ["lens", "layer"]
    )
    assert found.loc[("tuned", 0), "kl_final_lens"] > 0.1


def test_it_costs_what_it_says(monkeypatch):
    stack, calls, heads, run = Stack(known_networks.random_network(n_layers=3)), [], [], Engine.layer
    read = Stack.readout
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(1) or run(*arguments))
    monkeypatch.setattr(Stack, "readout", lambda self, x, **options: heads.append(1) or read(self, x, **options))
    lens.layers(stack, TOKENS, tuned=False, sampling=Sampling(resamples=0, skip_massive=False))
    assert (len(calls), len(heads)) == (3, 3 + 2)
    calls.clear()
    heads.clear()
    lens.layers(stack, TOKENS, sampling=Sampling(resamples=0, skip_massive=False))
    assert (len(calls), len(heads)) == (2 * 3, 2 * 3 + 4)  # each walk meets half of the prompts


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_it_opens_what_the_stack_opens_and_its_columns_are_explained(name, opened, tmp_path):
    stack, tokens = opened(name), torch.randint(4, 96, (12, 8), generator=rng())
    frame = lens.layers(stack, tokens, sampling=Sampling(resamples=5))
    assert list(frame.columns) == list(lens.COLUMNS)
    assert frame.groupby("lens")["layer"].max().to_dict() == {"logit": 4, "tuned": 4, "constant": 0}
    tables.write(frame, tmp_path / "lens.csv", {}, lens.COLUMNS)
    pd.testing.assert_frame_equal(tables.read(tmp_path / "lens.csv"), frame)


def test_half_precision_is_read_in_float32():
    half = lens.layers(
        Stack(known_networks.random_network(dtype=torch.bfloat16)), TOKENS, sampling=Sampling(resamples=0)
    )
    full = lens.layers(random_stack(), TOKENS, sampling=Sampling(resamples=0))
    assert np.allclose(half["kl_final_lens"], full["kl_final_lens"], atol=0.02)


def test_the_seed_decides_the_halves_and_the_intervals():
    stack = random_stack()
    one, again, other = (lens.layers(stack, TOKENS, sampling=Sampling(resamples=50, seed=seed)) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, again)
    assert not np.allclose(one["entropy"], other["entropy"])
    inside = (one["kl_final_lens_low"] <= one["kl_final_lens"]) & (one["kl_final_lens"] <= one["kl_final_lens_high"])
    assert inside.all()
    measured, fitted = halves(Tokens.of(torch.arange(14).view(7, 2)), seed=3)
    assert sorted([*measured.ids[:, 0].tolist(), *fitted.ids[:, 0].tolist()]) == list(range(0, 14, 2))


def test_bad_input_is_refused_in_a_sentence():
    stack = random_stack()
    with pytest.raises(ValueError, match="there is one prompt: give at least two, better hundreds"):
        lens.layers(stack, known_networks.tokens(1, 9))
    with pytest.raises(ValueError, match="ridge is a penalty, 0 or more, got -1"):
        lens.layers(stack, TOKENS, ridge=-1.0)
    with pytest.raises(ValueError, match="no token is left to measure"):
        lens.layers(stack, known_networks.tokens(9, 1))
    broken = Stack(known_networks.random_network())
    with torch.no_grad():
        dict(broken.model.named_parameters())["tok_embed._original_component.weight"].fill_(float("inf"))
    with pytest.raises(ValueError, match="is not finite on these prompts"):
        lens.readings(broken, Ensemble(Tokens.of(TOKENS)), lens.logit(broken))


# --- along the steps of a wiring ---


def test_of_the_model_as_it_is_the_steps_are_the_layers():
    stack, sampling = random_stack(), Sampling(resamples=20)
    plain, steps = (lens.layers(stack, TOKENS, wiring, sampling=sampling) for wiring in (None, ":"))
    assert steps["step"].tolist() == plain["layer"].tolist()
    measures = list(plain.columns[3:])
    assert list(steps.columns) == list(lens.WIRING_COLUMNS)
    pd.testing.assert_frame_equal(steps[["lens", "n_prompts", *measures]], plain[["lens", "n_prompts", *measures]])


@pytest.mark.parametrize("wiring", [":4 2:", ":1 {1:3|4} 0.5*(2:4) 5:", "::-1"])
def test_every_stream_of_a_wiring_is_read_against_what_the_wiring_says(wiring):
    stack, tokens = random_stack(), ragged("left")
    sampling = Sampling(resamples=0, batch_size=5)
    frame = lens.layers(stack, tokens, wiring, tuned=False, sampling=sampling)
    recorded = stack.record(tokens, wiring)
    assert frame["after"].tolist() == [name for name, _ in recorded]
    assert frame["step"].tolist() == list(range(len(recorded)))
    seen = frame["after"].tolist()
    assert frame["pass"].tolist() == [0, *(seen[: n + 1].count(name) for n, name in enumerate(seen) if n)]
    p = stack.run(tokens, wiring)[tokens.ensemble()].softmax(-1)
    for row, (_, x) in zip(frame.itertuples(), recorded):
        q = stack.readout(x[tokens.ensemble()]).softmax(-1)
        assert row.kl_lens_final == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), abs=1e-12)


def test_the_tuned_lens_of_a_wiring_predicts_its_own_end():
    frame = lens.layers(random_stack(), TOKENS, ":4 2:", sampling=Sampling(resamples=0))
    last = frame[frame["step"] == 8].set_index("lens")
    assert np.allclose(last["kl_final_lens"], 0, atol=1e-12)
    tuned, constant = frame[frame["lens"] == "tuned"], frame[frame["lens"] == "constant"]
    assert (tuned["kl_final_lens"] < constant["kl_final_lens"].iloc[0]).all()


# --- a logit difference through depth ---

ASKED = [Prompt("w1 w2 w3", ("w4", "w5")), Prompt("w6", ("w7", "w8", "w9")), Prompt("w2 w2", ("w1", "w4"))]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_last_row_is_the_difference_of_the_models_own_logits(name, opened):
    stack = opened(name)
    wirings = [":", ":3 1:", ":1 {1|2} 3:"]
    frame = lens.logit_difference(stack, ASKED, wirings, sampling=Sampling(resamples=20, batch_size=2))
    assert list(frame.columns) == list(lens.DIFFERENCE_COLUMNS)
    for wiring in wirings:
        differences = []
        for prompt in ASKED:
            ids = stack.tokens(prompt.text).ids
            run = stack.model(ids) if wiring == ":" else stack.run(ids, wiring)
            words = [int(stack.tokens(f"{prompt.text} {target}").ids[0, -1]) for target in prompt.targets]
            first, *others = run[0, -1, words].tolist()
            differences.append(first - sum(others) / len(others))
        last = frame[frame["wiring"] == str(stack.wiring(wiring))].iloc[-1]
        assert last["logit_difference"] == pytest.approx(np.mean(differences), abs=1e-4)
        assert last["logit_difference_low"] <= last["logit_difference"] <= last["logit_difference_high"]


def by_ids(tokens: torch.Tensor) -> Targets:
    ids = torch.stack([tokens[:, 0], (tokens[:, 0] + 1) % known_networks.D_VOCAB], 1)
    return Targets(Tokens.of(tokens), ids, torch.tensor([[1.0, -1.0]]).expand(len(ids), 2))


@pytest.mark.parametrize(("kind", "same"), [("parallel", True), ("serial", False)])
def test_layers_beside_each_other_change_the_difference_only_where_they_read_each_other(kind, same):
    stack = Stack(getattr(known_networks, f"{kind}_network")(dtype=torch.float64))
    frame = lens.logit_difference(stack, by_ids(TOKENS), [":", "{*:}"], sampling=Sampling(resamples=0))
    series, beside = (part["logit_difference"].iloc[-1] for _, part in frame.groupby("wiring", sort=False))
    assert (abs(series - beside) < 1e-9) == same


def test_every_row_is_a_difference_by_hand_and_does_not_depend_on_the_batches():
    stack, targets = random_stack(), by_ids(TOKENS)
    frame = lens.logit_difference(stack, targets, sampling=Sampling(resamples=30, batch_size=7))
    whole = lens.logit_difference(stack, targets, sampling=Sampling(resamples=30))
    pd.testing.assert_frame_equal(frame, whole)
    for layer, x in enumerate(stack.stream(TOKENS)[:, :, -1]):
        read = stack.readout(x).gather(1, targets.ids)
        assert frame["logit_difference"][layer] == pytest.approx(float((read[:, 0] - read[:, 1]).mean()))
        assert frame["first"][layer] == pytest.approx(float((read[:, 0] > read[:, 1]).double().mean()))


def test_swapping_the_targets_turns_the_sign():
    stack, targets = random_stack(), by_ids(TOKENS)
    swapped = Targets(targets.tokens, targets.ids.flip(1), targets.weights)
    ours, theirs = (lens.logit_difference(stack, t, sampling=Sampling(resamples=0)) for t in (targets, swapped))
    assert np.allclose(ours["logit_difference"], -theirs["logit_difference"])
