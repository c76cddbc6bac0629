"""Wirings that run together against every wiring run alone, whole and cut into parts; the plan against the run."""

import gc
import json

import pytest
import torch

import surgery
from support import fixtures
from support.scans import PROBES, all_wirings
from surgery import Stack, Wiring, scan, wiring
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens

EVERY = (*fixtures.ARCHITECTURES, *fixtures.NATIVE)


@pytest.mark.parametrize("name", EVERY)
def test_every_family_equals_running_each_wiring_alone(load, name):
    """In one piece, and in the parts that a small memory makes of it."""
    stack = Stack(load(name))
    wirings = all_wirings(4, sublayers=name != "native-attention-only")
    tokens = Tokens.of(torch.randint(4, fixtures.N_VOCAB, (3, 7), generator=torch.Generator().manual_seed(0)))
    tokens = tokens.pad(2, "left")
    context = stack.context(tokens)
    alone = [stack.execute(wiring, context.x0, context)[tokens.mask] for wiring in wirings]
    for memory in (None, 300_000):
        finals: dict[int, torch.Tensor] = {}
        scan.execute(stack, wirings, tokens, finals.__setitem__, memory)
        assert sorted(finals) == list(range(len(wirings)))
        for index, x in finals.items():
            difference = (x[tokens.mask] - alone[index]).abs().max()
            assert difference <= 1e-5 * alone[index].abs().max(), (str(wirings[index]), memory)


def test_the_plan_counts_what_will_run_and_bounds_memory(stack_of, monkeypatch):
    stack = stack_of("llama")
    wirings, tokens = list(wiring.every_repeat(4)), PROBES.encode(stack).tokens
    for memory in (10_000_000, 300_000):
        scheme = scan.plan(stack, wirings, tokens, memory)
        assert scheme.executions_naive == 60
        assert scheme.peak_bytes <= memory
        assert scheme.seconds > 0
        counted, execute = [0, 0], stack.execute

        def count(wiring, x, context, counted=counted, execute=execute):
            counted[0] += len(x) / len(tokens)
            counted[1] += 1
            return execute(wiring, x, context)

        monkeypatch.setattr(stack, "execute", count)
        scan.execute(stack, wirings, tokens, lambda index, x: None, memory)
        monkeypatch.undo()
        assert counted == [scheme.executions_shared, scheme.calls]
    assert scan.plan(stack, wirings, tokens).executions_shared == 34
    assert "10 wirings: 34 layer executions instead of 60" in str(scan.plan(stack, wirings, tokens))


def test_streams_are_forgotten(load):
    """Of a scan cut into parts no more streams live at once than the plan says."""
    stack = Stack(load("llama"))
    wirings, tokens = list(wiring.every_repeat(4)), PROBES.encode(stack).tokens
    alive: list[int] = []
    size = tokens.ids.numel() * stack.d_model

    def look(index, x):
        gc.collect()
        storages = {t.untyped_storage().data_ptr() for t in gc.get_objects() if _is_stream(t, size)}
        alive.append(len(storages))

    gc.collect()
    gc.freeze()  # what was there before is not looked through at every stream
    try:
        scan.execute(stack, wirings, tokens, look, 10_000_000)
    finally:
        gc.unfreeze()
    assert 2 <= max(alive) <= 30


def _is_stream(candidate, size):
    try:
        return isinstance(candidate, torch.Tensor) and candidate.ndim == 3 and candidate.numel() % size == 0
    except ReferenceError:
        return False


def test_stories_repeats_equal_independent_numbers(stories):
    """Losses of every span run twice, computed elsewhere from the plain Hugging Face model."""
    expected = json.loads((stories / "expected.json").read_text())
    lines = (stories.parents[1] / "text" / "tinystories_100.jsonl").read_text().splitlines()
    stack = Stack(surgery.load(stories))
    tokens = stack.tokens([json.loads(line)["text"] for line in lines], max_length=256, prepend_bos=True)
    spans = [tuple(map(int, span.split(","))) for span in expected["repeat_block_i_j"]]
    losses: dict[int, float] = {}

    def measure(index, x):
        log_p = stack.readout(x[:, :-1]).log_softmax(-1)
        each = -log_p.gather(2, tokens.ids[:, 1:, None])[..., 0]
        losses[index] = float(each.double()[tokens.mask[:, 1:]].mean())

    scan.execute(stack, [Wiring.from_rys(span, 5) for span in spans], tokens, measure)
    for index, span in enumerate(expected["repeat_block_i_j"]):
        assert losses[index] == pytest.approx(expected["repeat_block_i_j"][span], abs=1e-4), span


def test_calibration_networks_scan_as_they_are():
    """In the parallel network every order of layers is the same function; a repeated layer adds its update again."""
    stack = Stack(known_networks.parallel_network(n_layers=4))
    context, finals = stack.context(known_networks.tokens(4, 6)), {}
    wirings = [*wiring.every_swap(4), *wiring.every_reverse(4)]
    scan.execute(stack, wirings, known_networks.tokens(4, 6), finals.__setitem__)
    clean = stack.stream(context)[-1]
    assert all(torch.allclose(x, clean, atol=1e-5) for x in finals.values())
