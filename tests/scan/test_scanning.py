"""A scan of probes in portions is the scan of all of them at once."""

from support.scans import PROBES, same
from surgery import scan, wiring
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


def test_encoded_probes_are_scanned_as_their_set_is(stack_of, tmp_path):
    stack, wirings, out = stack_of("llama"), list(wiring.every_repeat(4)), tmp_path / "scan.csv"
    expected = scan.run(stack, wirings, PROBES, out)
    assert scan.run(stack, wirings, PROBES.encode(stack)).equals(expected)
    assert scan.run(stack, wirings, PROBES.encode(stack), out).equals(expected)  # goes on in the same file
