import re

import numpy as np
import pandas as pd
import pytest
import torch

import surgery
from surgery import Stack, Wiring, scan, wiring
from surgery.corpus.probes import Probe, ProbeSet
from surgery.scan import rows, search

PROBES = ProbeSet(
    "words",
    tuple(Probe(f"w{i} w{i + 1} w{2 * i}", f"w{i + 3} w{i}") for i in range(5))
    + tuple(Probe(f"w{i} w9 w8 w7 w6", f"w{i}", choices=(f"w{i}", "w30 w31")) for i in range(3)),
)

WRITES = re.compile(r"\.o\.|c_proj|o_proj|down_proj|mlp\.out\.")


def true_gains(stack, given):
    frame = scan.run(stack, given, PROBES, metrics=("loglik",))
    return (frame.value - frame.baseline).groupby(frame.wiring, sort=False).mean()


@pytest.fixture(scope="module")
def double(model_folder):
    """A model in double precision, for finite differences."""
    return Stack(surgery.load(model_folder("llama"), dtype=torch.float64))


@pytest.mark.parametrize("layer", range(5))
def test_the_gradient_equals_finite_differences(double, layer):
    stack = double
    (encoded,) = search._batches(PROBES.encode(stack))
    streams, gradients = search._gradients(stack, encoded)
    context = stack.context(encoded.tokens)
    noise = torch.randn(streams[layer].shape, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)

    def total(x):
        x = stack.execute(f"{layer}:", x, context) if layer < 4 else x
        return float(search.loglik(stack, encoded, x).sum())

    step = 1e-3
    slope = (total(streams[layer] + step * noise) - total(streams[layer] - step * noise)) / (2 * step)
    assert float((gradients[layer] * noise).sum()) == pytest.approx(slope, rel=1e-3)


def test_the_log_likelihood_is_the_scan_s(stack_of):
    stack = stack_of("gpt2")
    (encoded,) = search._batches(PROBES.encode(stack))
    context = stack.context(encoded.tokens)
    found = search.loglik(stack, encoded, stack.execute(":3 1:", context.x0, context))
    frame = scan.run(stack, [":3 1:"], PROBES, metrics=("loglik",))
    assert found.tolist() == pytest.approx(frame.value.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_first_order_is_exact_for_small_updates(load, name):
    """Half the layers' size, a quarter of the error."""
    model, errors = load(name, torch.float64), []
    written = [p for key, p in model.named_parameters() if WRITES.search(key)]
    assert len(written) == 8 + 8 * (name == "gpt2")
    given = [w for family in (wiring.every_repeat, wiring.every_skip) for w in family(4)]
    for size in (0.02, 0.5):
        with torch.no_grad():
            for parameter in written:
                parameter.mul_(size)
        stack = Stack(model)
        expected, estimate = true_gains(stack, given), search.first_order(stack, PROBES)
        found = np.array([estimate[search.span_of(w)[::-1]] for w in given])
        errors.append(np.abs(found - expected.to_numpy()).max())
        assert errors[-1] < 0.1 * np.abs(expected).max()
        assert np.abs(np.diag(estimate)).max() == 0
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.2)


def test_first_order_in_batches_is_the_same(stack_of, monkeypatch):
    stack = stack_of("llama")
    whole = search.first_order(stack, PROBES)
    monkeypatch.setattr(search, "_TOKENS_AT_ONCE", 20)
    assert len(list(search._batches(PROBES.encode(stack)))) > 2
    np.testing.assert_allclose(search.first_order(stack, PROBES), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "span"), [(":3 1:", (1, 3)), (": :", (0, 4)), (":1 3:", (3, 1)), ("2:", (2, 0)), (":2", (4, 2))]
)
def test_spans_are_read_off_wirings(text, span):
    assert search.span_of(Wiring.parse(text, 4)) == span


@pytest.mark.parametrize("text", [":3 1:3 1:", "3 2 1 0", ":1 {1|2} 3:", "3 1:"])
def test_other_wirings_are_refused(text):
    with pytest.raises(ValueError, match="one span run twice or left out") as refused:
        search.span_of(Wiring.parse(text, 4))
    assert "':4 2:'" in str(refused.value)


def test_a_beam_of_every_width_is_a_scan_of_everything(stack_of):
    stack = stack_of("llama")
    frame = search.beam(stack, PROBES, width=99, depth=2, spans=[(0, 1), (1, 3)])
    first, second = (frame[frame.level == level] for level in (1, 2))
    assert set(first.wiring) == {"0 :", ":3 1:"}
    assert set(second.wiring) == {"0 0 :", "0 :3 1:", ":3 1:3 1:"}
    assert first.gain.is_monotonic_decreasing
    assert second.layers.tolist() == [Wiring.parse(text, 4).depth for text in second.wiring]
    np.testing.assert_allclose(frame.gain, true_gains(stack, frame.wiring).loc[frame.wiring], atol=1e-5)


def test_a_beam_grows_from_the_best_and_stops_when_nothing_is_left(stack_of, tmp_path, monkeypatch):
    stack = stack_of("llama")
    frame = search.beam(stack, PROBES, width=1, depth=3, out=tmp_path)
    assert frame.level.unique().tolist() == [1, 2, 3]
    assert len(frame[frame.level == 1]) == 10
    for level in (2, 3):
        best = Wiring.parse(frame[frame.level == level - 1].wiring.iloc[0], 4)
        grown = {str(best.repeat(i, j)) for i in range(best.depth) for j in range(i + 1, best.depth + 1)}
        assert set(frame[frame.level == level].wiring) <= grown
    assert not frame.wiring.duplicated().any()
    assert search.beam(stack, PROBES, spans=[(0, 4)], depth=1).wiring.tolist() == [": :"]
    monkeypatch.setattr(rows.ResumableTable, "append", lambda *_: pytest.fail("a wiring ran that was there"))
    pd.testing.assert_frame_equal(search.beam(stack, PROBES, width=1, depth=3, out=tmp_path), frame)


@pytest.mark.parametrize(("width", "depth"), [(0, 1), (1, 0)])
def test_a_beam_of_nothing_is_refused(stack_of, width, depth):
    with pytest.raises(ValueError, match="at least 1"):
        search.beam(stack_of("gpt2"), PROBES, width, depth)
