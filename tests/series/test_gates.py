import functools

import numpy as np
import pytest
import torch

from support.exact_networks import last_reader
from support.known_windows import uneven_prompts
from surgery import Stack
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.records import tables
from surgery.series import gates
from surgery.series.gates import COLUMNS, exponents, hessian, path_lengths
from surgery.stats.sampling import Sampling

MEASURES = (exponents, hessian, path_lengths)


@functools.cache
def measured(measure, share, norm=None, own_head=True, frozen=True):
    made = known_networks.mixed_network(share, n_layers=4, norm=norm, dtype=torch.float64)
    model = made if own_head else last_reader(share, norm)
    return measure(Stack(model), known_networks.tokens(12, 6), frozen=frozen, sampling=Sampling(resamples=20))


@pytest.mark.parametrize("norm", [None, "RMS"])
def test_gates_of_the_parallel_network_do_not_interact(norm):
    frame = measured(exponents, 0.0, norm)
    assert np.allclose(frame["kappa_g"], 1, atol=1e-6)
    assert np.allclose(frame["kappa_g_stream"], 1, atol=1e-6)
    assert frame["gate_series"].abs().max() < 1e-6
    assert measured(hessian, 0.0, norm)["hessian"].abs().max() < 1e-6
    shares = measured(path_lengths, 0.0, norm)["share"]
    assert shares[:2].min() > 0.1
    assert shares[2:].max() < 1e-6


def test_what_the_serial_network_writes_last_grows_as_the_power_of_its_length():
    frame = measured(exponents, 1.0)
    assert np.allclose(frame["kappa_g"], frame["stop"] - frame["start"], atol=1e-6)
    assert np.allclose(frame["gate_series"], 1, atol=1e-6)
    assert (frame["kappa_g_stream"] > 1.2).all()
    assert (frame["kappa_g_stream"] < frame["stop"] - frame["start"]).all()


def test_the_serial_network_is_one_product_where_the_head_reads_the_last_layer():
    assert np.allclose(measured(hessian, 1.0, own_head=False)["hessian"], 1, atol=1e-6)
    frame = measured(path_lengths, 1.0, own_head=False)
    assert np.allclose(frame["share"], [0, 0, 0, 0, 1], atol=1e-6)
    assert np.allclose(frame[["mean_branches", "mean_branches_low", "mean_branches_high"]], 4)


def test_a_head_that_reads_every_layer_sees_chains_of_every_length():
    """Layer l of the serial network takes part in l + 1 layers' work: H_ij is the margin's share from layers >= j."""
    frame = measured(path_lengths, 1.0)
    assert frame["share"].min() > 0.05
    found = measured(hessian, 1.0).pivot(index="earlier", columns="later", values="hessian")
    assert np.allclose(found[3], found.loc[0, 3])
    assert np.allclose(found[2].dropna(), found.loc[0, 2])


def test_between_parallel_and_serial_they_rise():
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    for measure, column in ((exponents, "gate_series"), (path_lengths, "mean_branches")):
        readings = [measured(measure, share, own_head=False)[column].mean() for share in shares]
        assert (np.diff(readings) > 0.02).all()
    readings = [measured(hessian, share, own_head=False)["hessian"].abs().mean() for share in shares]
    assert readings[0] < 1e-6 < readings[1]
    assert readings[2] < readings[4]


def test_live_norms_couple_the_gates_of_a_parallel_network():
    assert measured(exponents, 0.0, "RMS", frozen=False)["gate_series"].abs().min() > 1e-3
    assert measured(hessian, 0.0, "RMS", frozen=False)["hessian"].abs().max() > 1e-3
    assert measured(path_lengths, 0.0, "RMS", frozen=False)["share"][2] > 1e-3


def gated(stack, context, gates):
    x = context.x0
    for layer, gate in enumerate(gates):
        x = x + gate * stack.update(layer, x, context)
    return x


def test_exponents_are_the_slopes_of_a_gated_run():
    stack, tokens = (
        Stack(known_networks.random_network(n_layers=3, norm=None, dtype=torch.float64)),
        known_networks.tokens(8, 6),
    )
    found = (
        exponents(stack, tokens, frozen=False, sampling=Sampling(resamples=0)).set_index(["start", "stop"]).loc[(0, 3)]
    )
    context, step, sizes = stack.context(tokens), 1e-4, []
    for factor in (1 + step, 1 - step):
        before = gated(stack, context, [factor, factor])
        written = [factor * stack.update(2, before, context), gated(stack, context, [factor] * 3) - context.x0]
        sizes.append([float((u - u.mean(0)).norm().log()) for u in (w[:, 1:].flatten(0, 1) for w in written)])
    slopes = (np.array(sizes[0]) - np.array(sizes[1])) / (2 * step)
    assert found[["kappa_g", "kappa_g_stream"]].tolist() == pytest.approx(slopes.tolist(), abs=1e-6)
    assert found["gate_series"] == pytest.approx((slopes[0] - 1) / 2, abs=1e-6)


def test_the_hessian_is_that_of_a_gated_run():
    stack = Stack(known_networks.random_network(n_layers=3, norm=None, dtype=torch.float64))
    tokens = known_networks.tokens(6, 5)
    found = hessian(stack, tokens, sampling=Sampling(resamples=0)).set_index(["earlier", "later"])["hessian"]
    context, step = stack.context(tokens), 1e-3
    clean = stack.readout(gated(stack, context, [1, 1, 1])[:, 1:])
    best, second = clean.topk(2).indices.unbind(-1)

    def margin(gates):
        logits = stack.readout(gated(stack, context, gates)[:, 1:])
        return float((logits.gather(-1, best[..., None]) - logits.gather(-1, second[..., None])).sum())

    for pair, value in found.items():
        corners = []
        for a, b in ((step, step), (step, -step), (-step, step), (-step, -step)):
            gates = [1.0] * 3
            gates[pair[0]] += a
            gates[pair[1]] += b
            corners.append(margin(gates))
        expected = (corners[0] - corners[1] - corners[2] + corners[3]) / (4 * step**2) / margin([1.0] * 3)
        assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2"])
def test_every_architecture_is_measured(load, name):
    stack = Stack(load(name))
    for measure in MEASURES:
        frame = measure(stack, known_networks.tokens(6, 6) % 96, sampling=Sampling(resamples=5))
        assert np.isfinite(frame).all().all()
    assert frame["share"].sum() == pytest.approx(1)


@pytest.mark.parametrize("measure", MEASURES)
def test_batches_do_not_matter_and_tables_can_be_written(measure, tmp_path):
    stack, tokens = Stack(known_networks.random_network(n_layers=3)), known_networks.tokens(10, 6)
    whole, parts = (measure(stack, tokens, sampling=Sampling(resamples=20, batch_size=size)) for size in (64, 4))
    assert np.allclose(whole, parts, rtol=1e-3, atol=1e-5)
    tables.write(whole, tmp_path / "gates.csv", {}, COLUMNS)
    assert set(whole) <= set(COLUMNS)


def test_untrained_networks_read_the_share_of_the_stream_that_the_window_wrote():
    stack = Stack(known_networks.random_network(n_layers=4))
    tokens = known_networks.tokens(16, 6)
    found = exponents(stack, tokens, sampling=Sampling(resamples=0)).set_index(["start", "stop"])["gate_series"]
    assert found[0, 2] > 0.9  # the embeddings are small beside what layer 0 writes: it is nearly all that layer 1 reads
    assert found[1:].drop(index=0, level="start").between(0, 0.6).all()
    assert path_lengths(stack, tokens, sampling=Sampling(resamples=0))["mean_branches"][0] == pytest.approx(
        4 / 2, abs=0.5
    )


def test_they_cost_what_the_docstrings_say(monkeypatch):
    stack, seen, grads = Stack(known_networks.random_network(n_layers=4)), [], []
    engine, grad = type(stack.engines[0]), torch.autograd.grad
    layer = engine.layer
    monkeypatch.setattr(engine, "layer", lambda *args: seen.append(args[1]) or layer(*args))
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **more: grads.append(1) or grad(*args, **more))
    for measure, forwards, backwards in (
        (exponents, 3, 4 + 4 * 3 / 2),  # linearisations, derivatives along a vector
        # the margin, the gradient at every later layer, their linearisations, a product for every pair
        (hessian, 2 + 2 * 3 / 4, 1 + 3 + 3 + 4 * 3 / 2),
        (path_lengths, 3, 1 + 4 * 5 / 2),
    ):
        seen.clear()
        grads.clear()
        measure(stack, known_networks.tokens(4, 5), sampling=Sampling(skip_massive=False))
        assert (len(seen) / 4, len(grads)) == (forwards, backwards)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "mixtral"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_hessian_is_that_of_the_whole_graph(name, frozen, load):
    """Against the second derivatives of the gated model by autograd, prompts of different lengths among them."""
    stack, tokens = Stack(load(name)), uneven_prompts(5, 8)
    tokens = Tokens(tokens.ids % 96, tokens.mask)
    context, mask = stack.context(tokens), tokens.ensemble()
    margin, slope = gates._margin(stack, stack.stream(context)[-1], mask)
    with gates._running(stack, context, frozen):
        alpha = torch.ones(stack.n_layers, len(mask), requires_grad=True)
        x = context.x0
        for layer, gate in enumerate(alpha):
            x = x + gate[:, None, None] * stack.update(layer, x, context, grad=True)
        (slopes,) = torch.autograd.grad((slope * x).sum(), alpha, create_graph=True)
        second = torch.stack([torch.autograd.grad(row.sum(), alpha, retain_graph=True)[0] for row in slopes])
    expected = (second.sum(-1).double() / margin.sum())[tuple(torch.triu_indices(4, 4, 1))]
    found = hessian(stack, tokens, frozen=frozen, sampling=Sampling(resamples=0, skip_massive=False))["hessian"]
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("measure", MEASURES[:2])
def test_a_model_of_one_layer_is_refused(measure):
    with pytest.raises(ValueError, match="one layer; gates interact between two"):
        measure(Stack(known_networks.random_network(n_layers=1)), known_networks.tokens(4, 4))


@pytest.mark.parametrize("measure", MEASURES)
def test_no_token_is_refused(measure):
    with pytest.raises(ValueError, match="no token is left"):
        measure(Stack(known_networks.random_network(n_layers=2)), known_networks.tokens(4, 1))
