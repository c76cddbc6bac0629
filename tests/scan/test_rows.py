"""The table of a scan killed at any moment, continued, filled up and refused."""

import json
import os
import shutil
import signal
import time

import pytest

import surgery
from support.processes import Script
from support.scans import PROBES, same, slow_scan
from surgery import Stack, scan, wiring
from surgery.corpus.probes import ProbeSet
from surgery.records import tables
from surgery.scan import rows


def test_a_file_is_filled_finished_and_read_again(stack_of, tmp_path, monkeypatch):
    stack, out = stack_of("llama"), tmp_path / "scan.csv"
    wirings = list(wiring.every_repeat(4))
    expected = scan.run(stack, wirings, PROBES)
    frame = scan.run(stack, wirings, PROBES, out)
    assert same(frame, expected)
    assert same(tables.read(out), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.csv", "scan.manifest.json"]
    manifest = tables.read_manifest(out)
    assert manifest["scan"]["metrics"] == "loglik exact"
    assert set(manifest["columns"]) == set(frame.columns)
    monkeypatch.setattr(rows.ResumableTable, "append", lambda *args: pytest.fail("ran a wiring that was there already"))
    assert same(scan.run(stack, wirings, PROBES, out), expected)


def test_more_wirings_are_added_to_a_file(stack_of, tmp_path):
    stack, out = stack_of("llama"), tmp_path / "scan.csv"
    scan.run(stack, list(wiring.every_skip(4)), PROBES, out)
    frame = scan.run(stack, [*wiring.every_skip(4), *wiring.every_swap(4)], PROBES, out)
    assert same(frame, scan.run(stack, [*wiring.every_skip(4), *wiring.every_swap(4)], PROBES))


@pytest.fixture(scope="module")
def unfinished(stack_of, tmp_path_factory):
    """The part of a scan that was stopped before its file got its name, and the table it must become."""
    out = tmp_path_factory.mktemp("unfinished") / "scan.csv"
    stack, wirings = stack_of("llama"), list(wiring.every_repeat(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.ResumableTable, "close", lambda *args: None)
        scan.run(stack, wirings, PROBES, out)
    return out.with_name("scan.csv.part").read_bytes(), scan.run(stack, wirings, PROBES)


@pytest.mark.parametrize("cut", [0, 10, 60, 300, 1500, 2500, 3000])
def test_a_file_cut_off_anywhere_is_continued(stack_of, unfinished, tmp_path, cut):
    """What a kill leaves: the beginning of the rows, torn at any byte."""
    out, (content, expected) = tmp_path / "scan.csv", unfinished
    assert len(content) > cut
    part = tmp_path / "scan.csv.part"
    part.write_bytes(content[:cut])
    assert same(scan.run(stack_of("llama"), list(wiring.every_repeat(4)), PROBES, out), expected)
    assert same(tables.read(out), expected)
    assert not part.exists()


def test_rows_are_read_at_any_moment(stack_of, unfinished, tmp_path):
    out, (content, expected) = tmp_path / "scan.csv", unfinished
    with pytest.raises(ValueError, match="there is no scan in"):
        scan.read_part(out)
    sizes = []
    for cut in [*range(0, len(content), 501), len(content)]:
        (tmp_path / "scan.csv.part").write_bytes(content[:cut])
        if content[:cut].count(b"\n") < 2:
            with pytest.raises(ValueError, match="has no rows yet"):
                scan.read_part(out)
            continue
        frame = scan.read_part(out)
        assert list(frame) == list(scan.COLUMNS)
        frame = frame[frame["wiring"] != ":"]
        assert len(frame.merge(expected)) == len(frame), "each is a row of the table that it will be"
        sizes.append(len(frame))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == len(expected)
    (tmp_path / "scan.csv.part").unlink()
    done = scan.run(stack_of("llama"), [":2 1:"], PROBES, out)
    assert same(scan.read_part(f"{out}.part"), done), "the file itself"


@pytest.fixture(scope="module")
def finished(stack_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    scan.run(stack_of("llama"), [":", ":1 2:"], PROBES, folder / "scan.csv")
    return folder


@pytest.mark.parametrize("change", ["model", "probe set", "metrics"])
def test_another_model_probe_set_or_metric_is_refused(stack_of, finished, tmp_path, change):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    stack, out = stack_of("llama"), tmp_path / "scan.csv"
    before = out.read_bytes()
    other = Stack(surgery.models.untrained(stack.model)) if change == "model" else stack
    probes = ProbeSet("words", PROBES.probes[:4]) if change == "probe set" else PROBES
    metrics = ("loss",) if change == "metrics" else ("loglik", "exact")
    with pytest.raises(ValueError, match=f"holds another scan, with {change}"):
        scan.run(other, [":", ":1 2:"], probes, out, metrics=metrics)
    assert out.read_bytes() == before


@pytest.fixture
def part(unfinished, tmp_path):
    """The part of a scan, all of its rows in it."""
    (tmp_path / "scan.csv.part").write_bytes(unfinished[0])
    return tmp_path / "scan.csv.part"


def test_a_damaged_line_is_told_and_measured_again(stack_of, unfinished, part, tmp_path):
    lines = part.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b"-", b"+", 1)
    part.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match=rf"was damaged in 1 of its {len(lines) - 1} lines \(the first is line 4\)"):
        frame = scan.run(stack_of("llama"), list(wiring.every_repeat(4)), PROBES, tmp_path / "scan.csv")
    assert same(frame, unfinished[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda first: first.replace(b"loglik", b"loglak"), r"line 1 of .* is damaged"),
        (lambda first: b"[]", r"line 1 of .* is damaged"),
        (lambda first: first.split(b', "format"')[0] + b"}", "has no checksums, as in earlier versions"),
    ],
)
def test_a_part_whose_first_line_cannot_be_trusted_is_refused(stack_of, part, tmp_path, change, words):
    first, rest = part.read_bytes().split(b"\n", 1)
    part.write_bytes(before := change(first) + b"\n" + rest)
    with pytest.raises(ValueError, match=words):
        scan.run(stack_of("llama"), list(wiring.every_repeat(4)), PROBES, tmp_path / "scan.csv")
    assert part.read_bytes() == before


def test_killed_between_manifest_and_table_it_goes_on(stack_of, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    stack, out, wirings = stack_of("llama"), tmp_path / "scan.csv", [":", ":1 2:", ":2 1:"]
    replace, moved = os.replace, []

    def killed(source, target):
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        scan.run(stack, wirings, PROBES, out)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a run was interrupted"):
        tables.read(out)
    assert same(scan.run(stack, wirings, PROBES, out), scan.run(stack, wirings, PROBES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.csv", "scan.manifest.json"]


def test_killed_at_random_moments_and_continued(model_folder, stack_of, tmp_path):
    """SIGKILL after 1, 4 and 8 wirings; the same command then ends with the table of an uninterrupted run."""
    out = tmp_path / "scan.csv"
    code = slow_scan(str(model_folder("llama")), out, 0.02)
    for wirings_done in (1, 4, 8):
        process = Script(code)
        next(line for line in process.output if int(line) >= wirings_done)
        time.sleep(0.01 * wirings_done)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        lines = (tmp_path / "scan.csv.part").read_bytes().split(b"\n")
        assert len(lines) - 2 >= wirings_done
        assert len({json.loads(line)[0][0] for line in lines[1:-1]}) == len(lines) - 2
    assert Script(code).wait() == 0
    stack = stack_of("llama")
    assert same(tables.read(out), scan.run(stack, list(wiring.every_repeat(4)), PROBES))


def test_a_part_of_before_precisions_were_told_goes_on_in_float32_only(stack_of, unfinished, tmp_path):
    """Its first line says nothing of a precision."""
    part, stack = tmp_path / "scan.csv.part", stack_of("llama")
    with rows.ResumableTable(
        tmp_path / "scan.csv", rows.identity(stack, PROBES.encode(stack), ("loglik", "exact"))
    ) as t:
        del t.identity["precision"]
        t._begin()
    assert b"precision" not in part.read_bytes()
    with pytest.raises(ValueError, match="holds another scan, with precision"):
        scan.run(stack, list(wiring.every_repeat(4)), PROBES, tmp_path / "scan.csv", precision="bf16")
    assert same(scan.run(stack, list(wiring.every_repeat(4)), PROBES, tmp_path / "scan.csv"), unfinished[1])
