"""A scan of probes in portions is the scan of all of them at once."""

import pytest
import torch

from support.scans import PROBES, same
from surgery import Stack, memory, progress, scan, wiring
from surgery.scan import rows


def test_probes_too_many_for_the_memory_are_scanned_in_portions(stack_of, tmp_path, monkeypatch):
    stack, wirings, out = stack_of("llama"), list(wiring.every_repeat(4)), tmp_path / "scan.csv"
    expected = scan.run(stack, wirings, PROBES)
    assert scan.plan(stack, wirings, PROBES, 60_000).portions > 2
    assert "portions of the probes" in str(scan.plan(stack, wirings, PROBES, 60_000))
    assert same(scan.run(stack, wirings, PROBES, memory=60_000), expected)
    with monkeypatch.context() as patch:  # stopped, and continued with another memory: other portions
        patch.setattr(rows.ResumableTable, "close", lambda *args: None)
        scan.run(stack, wirings[:5], PROBES, out, memory=60_000)
    assert same(scan.run(stack, wirings, PROBES, out, memory=90_000), expected)
    assert same(scan.run(stack, wirings, PROBES, out), expected)


def test_a_portion_too_large_for_the_memory_takes_less_of_it(stack_of, tmp_path, monkeypatch):
    stack, wirings, out = stack_of("llama"), list(wiring.every_repeat(4)), tmp_path / "scan.csv"
    expected, execute, seen = scan.run(stack, wirings, PROBES), Stack.execute, []

    def small(self, steps, x, context, **options):
        seen.append(x.shape[0] * x.shape[1])
        if len(seen) > 5 and seen[-1] > 12:  # what else the machine does takes memory meanwhile
            raise torch.OutOfMemoryError("CUDA out of memory")
        return execute(self, steps, x, context, **options)

    monkeypatch.setattr(Stack, "execute", small)
    with pytest.warns(memory.LowMemoryWarning) as told:
        frame = scan.run(stack, wirings, PROBES, out)
    assert "for 1 of what was planned for some probes: going on with 0.5" in str(told[0].message)
    assert max(seen) > 12 >= seen[-1]
    assert same(frame, expected)


def test_what_is_done_is_told_once(stack_of, tmp_path, monkeypatch):
    stack, wirings, out = stack_of("llama"), list(wiring.every_repeat(4)), tmp_path / "scan.csv"
    told = []
    monkeypatch.setattr(progress, "_nothing", lambda steps=1, note="", *, free=False: told.append((steps, free)))
    with monkeypatch.context() as patch:
        patch.setattr(rows.ResumableTable, "close", lambda *args: None)
        scan.run(stack, wirings[:3], PROBES, out)
    scan.run(stack, wirings, PROBES, out)
    count = len(PROBES)
    assert sum(steps for steps, _ in told) == (3 + len(wirings)) * count
    assert sum(steps for steps, free in told if free) == 3 * count


def test_encoded_probes_are_scanned_as_their_set_is(stack_of, tmp_path):
    stack, wirings, out = stack_of("llama"), list(wiring.every_repeat(4)), tmp_path / "scan.csv"
    expected = scan.run(stack, wirings, PROBES, out)
    assert scan.run(stack, wirings, PROBES.encode(stack)).equals(expected)
    assert scan.run(stack, wirings, PROBES.encode(stack), out).equals(expected)  # goes on in the same file


def test_a_scan_in_bf16_is_paired_and_not_mixed_with_one_in_float32(stack_of, tmp_path):
    stack, out, wirings = stack_of("llama"), tmp_path / "scan.csv", [":", ":2 1:"]
    exact = scan.run(stack, wirings, PROBES, metrics=("loglik", "kl"))
    half = scan.run(stack, wirings, PROBES, out, metrics=("loglik", "kl"), precision="bf16")
    assert 1e-5 < (half["value"] - exact["value"]).abs().max() < 0.2
    unmodified = half[half["wiring"] == ":"]
    assert (unmodified["value"] == unmodified["baseline"]).all()
    assert (unmodified.loc[unmodified["metric"] == "kl", "value"] == 0).all()
    assert scan.run(stack, wirings, PROBES, out, metrics=("loglik", "kl"), precision="bf16").equals(half)
    with pytest.raises(ValueError, match="holds another scan, with precision"):
        scan.run(stack, wirings, PROBES, out, metrics=("loglik", "kl"))
