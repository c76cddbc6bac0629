"""Kills, full and broken disks, flipped bits, leftovers, two processes in one folder, links, cells that are formulas.

Whatever happens to a run, the same command afterwards ends with the same tables byte for byte and the same weights bit
for bit, or says in a sentence why not.
"""

import contextlib
import csv
import errno
import functools
import io
import os
import random
import re
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch

from support import fixtures, made_up
from support.attacks import Attack
from support.places import TESTS
from support.processes import Script
from support.scans import PROBES
from surgery import Stack, disk, load, scan, wiring
from surgery.corpus import splits
from surgery.dropout import trained
from surgery.graft import grafting
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.records import checked, tables
from surgery.training.loop import Schedule
from surgery.wiring.value import Wiring

SCAN = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from hardening import test_kills
print("now", flush=True)
test_kills.scanned(sys.argv[2], test_kills.stack(sys.argv[3]))
"""
GRAFT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from hardening import test_kills
from pathlib import Path
print("now", flush=True)
test_kills.grafted(Path(sys.argv[2]))
"""
DROPOUT = GRAFT.replace("grafted", "dropped_out")
COMMAND = "import torch; torch.set_num_threads(1); from surgery import cli; print('now', flush=True); cli.main()"
WIRINGS = [*wiring.every_repeat(4), *wiring.every_skip(4)]
WORDS = [" ".join(f"w{(7 * i + 3 * j * j) % 90}" for j in range(4 + i % 5)) for i in range(8)]
EVERY_CALL = ("open", "fsync", "replace", "mkdir", "unlink", "listdir", "ftruncate", "write", "rmdir")
BROKEN = (errno.ENOSPC, errno.EIO, errno.ENOENT, errno.EROFS)


# --- what is run -----------------------------------------------------------------------------------------------------


@functools.cache
def stack(folder: str) -> Stack:
    return Stack(load(folder))


def model(folder: Path) -> Path:
    place = folder / "the model"
    return place if place.exists() else fixtures.save("llama", place)


def scanned(out: Path, of: Stack, wirings: list[Wiring] = WIRINGS) -> bytes:
    scan.run(of, wirings, PROBES, out)
    return Path(out).read_bytes()


def grafted(folder: Path) -> dict[str, torch.Tensor]:
    """A harvest and a training of four steps; the weights and the curve without its seconds."""
    teacher, tokens = Stack(known_networks.mixed_network(0.5)), Tokens.of(known_networks.tokens(24, 8))
    pairs = grafting.latents(teacher, tokens[:16], 1, 3, folder / "latents", shard_tokens=32)
    schedule = Schedule(steps=4, batch=4, every=1)
    curve = grafting.train(teacher, pairs, tokens[16:], folder / "run", schedule=schedule).curve
    tensors, _ = checked.unpack(folder / "run" / "checkpoint.safetensors")
    return tensors | {"curve": torch.from_numpy(curve.drop(columns="seconds").to_numpy(float))}


def dropped_out(folder: Path) -> dict[str, torch.Tensor]:
    """A training with dropout of eight steps on few problems: the weights after it and at every rung, and the curve."""
    recipe = trained.Recipe(rate=0.1, steps=8, every=1, n_layers=2)
    with mock.patch.object(trained, "data", return_value=splits.babel(200, 60, shares=trained.SHARES)):
        model = trained.train(recipe, folder / "run")
    rungs = {f"{rung}/{name}": weight for rung, kept in model.rungs.items() for name, weight in kept.items()}
    curve = torch.from_numpy(model.curve.drop(columns="seconds").to_numpy(float))
    return {**model.weights, **rungs, "curve": curve}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


def hidden(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


def started(code: str, *arguments: object) -> Script:
    process = Script(code, *arguments, environment={"OMP_NUM_THREADS": "1"})
    assert process.output.readline() == "now\n", process.errors
    return process


def stop(process: Script, how: int) -> int:
    """Send a signal, unless it has ended by itself; its exit code."""
    with contextlib.suppress(ProcessLookupError):
        process.send(how)
    return process.wait()


def lasting(code: str, *arguments: object) -> float:
    """Seconds that it takes when nothing happens to it."""
    began, process = time.monotonic(), started(code, *arguments)
    began = time.monotonic()
    assert process.wait() == 0, process.errors
    return time.monotonic() - began


def told(attempt: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an attempt gives, or one sentence of an error that a user can act on; a failed assertion for another."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that something damaged is measured again
            return attempt(), None
    except (ValueError, OSError) as error:
        sentence = str(error)
    if len(sentence) < 20 or "Errno" in sentence or "\n" in sentence:
        raise AssertionError(f"no sentence: {sentence!r}")
    return None, sentence


# --- kills -----------------------------------------------------------------------------------------------------------


def kills(code: str, finish: Callable[[Path], Any], equal: Callable[[Any, Any], bool], count: int, folder: Path):
    """SIGKILL at a random moment, up to three times, then the same once more in this process."""
    draw, expected, most = random.Random(0), finish(folder / "whole"), None
    for trial in range(count):
        out = folder / str(trial)
        out.mkdir()
        most = most or lasting(code, TESTS, folder / "timed", model(folder))
        for _ in range(draw.randint(1, 3)):
            process = started(code, TESTS, out, model(folder))
            time.sleep(draw.uniform(0, most))
            stop(process, signal.SIGKILL)
        if not equal(finish(out), expected):
            yield f"another result after kill {trial}"
        elif left := hidden(out):
            yield f"left over: {left}"
        else:
            yield None


def scans_killed(count: int, folder: Path) -> Iterator[str | None]:
    of = stack(str(model(folder)))
    code = SCAN.replace("scanned(sys.argv[2]", "scanned(sys.argv[2] + '/scan.csv'")
    yield from kills(code, lambda out: scanned(out / "scan.csv", of), bytes.__eq__, count, folder)


def grafts_killed(count: int, folder: Path) -> Iterator[str | None]:
    yield from kills(GRAFT, grafted, same, count, folder)


def dropout_killed(count: int, folder: Path) -> Iterator[str | None]:
    yield from kills(DROPOUT, dropped_out, same, count, folder)


def studies_killed(count: int, folder: Path) -> Iterator[str | None]:
    """The tables of ``surgery study scan reversion``, killed once and run again, byte for byte."""
    (folder / "prompts.txt").write_text("\n".join(WORDS))
    draw, options = random.Random(1), ["--model", model(folder), "--text", folder / "prompts.txt", "--max-length", 2]
    words = ["study", "scan", "reversion", *options, "--budget", "none"]
    most = lasting(COMMAND, *words, "--out", folder / "whole")
    expected = {path.name: path.read_bytes() for path in (folder / "whole").glob("*.csv")}
    for trial in range(count):
        out = folder / str(trial)
        process = started(COMMAND, *words, "--out", out)
        time.sleep(draw.uniform(0, most))
        stop(process, signal.SIGKILL)
        again = started(COMMAND, *words, "--out", out)
        if again.wait(120) != 0:
            yield f"did not go on: {again.errors[-300:]}"
        elif {path.name: path.read_bytes() for path in out.glob("*.csv")} != expected:
            yield "other tables"
        else:
            yield f"left over: {hidden(out)}" if hidden(out) else None


def ended_politely(count: int, folder: Path) -> Iterator[str | None]:
    """SIGTERM, SIGINT or SIGHUP at a random moment of a study: a sentence, the exit code, whole files, nothing else."""
    (folder / "prompts.txt").write_text("\n".join(WORDS))
    words = ["study", "scan", "--model", model(folder), "--text", folder / "prompts.txt", "--max-length", 2]
    draw, most = random.Random(2), lasting(COMMAND, *words, "--out", folder / "whole")
    for trial in range(count):
        how, out = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]), folder / str(trial)
        process = started(COMMAND, *words, "--out", out)
        time.sleep(draw.uniform(0.1, most + 0.1))
        code, said = stop(process, how), process.errors
        if code == 0:
            yield None  # it was done
            continue
        sentence = said.strip().splitlines()[-1] if said.strip() else ""
        begins = "interrupted: " if how == signal.SIGINT else f"ended by {how.name}: "
        broken = [str(path) for path in out.glob("*.csv") if told(functools.partial(tables.read, path))[1]]
        if code != 128 + how or "Traceback" in said or not sentence.startswith(begins):
            yield f"{how.name} ended with {code}: {said[-300:]}"
        elif out.exists() and (hidden(out) or broken):
            yield f"{how.name} left {hidden(out)}, not whole: {broken}"
        else:
            yield None


# --- two at once -----------------------------------------------------------------------------------------------------


def two_at_once(count: int, folder: Path) -> Iterator[str | None]:
    """Two processes scan into one file at the same time: each ends with the table, or is refused in a sentence."""
    expected, draw = scanned(folder / "whole.csv", stack(str(model(folder)))), random.Random(3)
    for trial in range(count):
        out, processes = folder / str(trial) / "scan.csv", []
        for _ in range(2):
            processes.append(Script(SCAN, TESTS, out, model(folder), environment={"OMP_NUM_THREADS": "1"}))
            time.sleep(draw.uniform(0, 0.05))
        ends = [(process.wait(), process.errors) for process in processes]
        wrong = [said[-200:] for code, said in ends if code and "HeldError: process" not in said]
        if wrong:
            yield wrong[0]
        elif all(code for code, _ in ends):
            yield "both were refused"
        else:
            yield None if out.read_bytes() == expected and not hidden(out.parent) else "another table, or leftovers"


# --- disks -----------------------------------------------------------------------------------------------------------


class Breaking:
    """Context manager: the n-th use of a call of the system fails, and with ``stays`` every one after it."""

    def __init__(self, call: str, n: int, number: int, stays: bool) -> None:
        self.call, self.left, self.number, self.stays, self.broke = call, n, number, stays, False

    def __enter__(self) -> "Breaking":
        self.real = getattr(os, self.call)
        setattr(os, self.call, self._called)
        return self

    def _called(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0 or (self.stays and self.left < 0):
            self.broke = True
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **options)

    def __exit__(self, *_: object) -> None:
        setattr(os, self.call, self.real)


def made_table(out: Path) -> bytes:
    path = tables.write(made_up.series(), out / made_up.SERIES, {"seed": 0}, made_up.COLUMNS[made_up.SERIES])
    tables.read(path)
    return path.read_bytes() + tables.manifest_path(path).read_bytes()


def broken_disks(count: int, folder: Path) -> Iterator[str | None]:
    """Every call of the system that writes fails at its first use, its second, ...; then the same on a whole disk."""
    of = stack(str(model(folder)))
    few = WIRINGS[:3]
    runs: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Any], bool]]] = {
        "table": (lambda out: made_table(disk.folder(out)), bytes.__eq__),
        "scan": (lambda out: scanned(out / "scan.csv", of, few), bytes.__eq__),
        "graft": (grafted, same),
    }
    for name, (run, equal) in list(runs.items())[: 1 if count == 1 else None]:
        expected = run(folder / f"whole {name}")
        for call in EVERY_CALL:
            for stays in (False, True)[:count]:
                for n in range(1, 200, 5 if name == "graft" else 1):
                    out, number = folder / "broken", BROKEN[n % len(BROKEN)]
                    with Breaking(call, n, number, stays) as breaking:
                        told(functools.partial(run, out))
                    if not breaking.broke:
                        break
                    wrong = hidden(out) if equal(run(out), expected) else "another result"
                    yield f"{name}: {call} {n}, {os.strerror(number)}: {wrong}" if wrong else None
                    shutil.rmtree(out)
                shutil.rmtree(folder / "broken", ignore_errors=True)


def cut_short(count: int, folder: Path) -> Iterator[str | None]:
    """The system writes no file past a random size: the beginning of what was written stands on the disk."""
    of, draw, before = stack(str(model(folder))), random.Random(4), resource.getrlimit(resource.RLIMIT_FSIZE)
    expected, ignored = scanned(folder / "whole.csv", of), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for trial in range(count):
            out = folder / str(trial) / "scan.csv"
            for _ in range(2):
                resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randint(0, 2 * len(expected)), before[1]))
                try:
                    told(functools.partial(scanned, out, of))
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, before)
            good = scanned(out, of) == expected
            yield None if good and not hidden(out.parent) else "another table, or leftovers"
    finally:
        signal.signal(signal.SIGXFSZ, ignored)


# --- bits ------------------------------------------------------------------------------------------------------------


def flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = draw.choice([draw.randrange(len(content)), draw.randrange(min(len(content), 600))])
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def bits(
    kinds: tuple[str, ...], run: Callable[[Path], Any], equal: Callable[[Any, Any], bool], count: int, folder: Path
) -> Iterator[str | None]:
    """Flip a bit of one of the files that a run leaves, and run again: told, or the same result."""
    draw, whole = random.Random(5), folder / "whole"
    expected = run(whole)
    files = sorted(path.relative_to(whole) for kind in kinds for path in whole.rglob(kind))
    assert files
    for _ in range(count):
        out, file = folder / "flipped", draw.choice(files)
        shutil.copytree(whole, out)
        flipped(out / file, draw)
        result, sentence = told(functools.partial(run, out))
        yield None if sentence or equal(result, expected) else f"another result from a bit of {file}"
        shutil.rmtree(out)


def bits_of_rows(count: int, folder: Path) -> Iterator[str | None]:
    of = stack(str(model(folder)))

    def unfinished(out: Path) -> bytes:
        """The table that comes of a part; afterwards the part is there again."""
        part = out / "scan.csv.part"
        kept = part.read_bytes() if part.exists() else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # of the part; mark and partials go by the next sweep
            table = scanned(out / "scan.csv", of)
        (out / "scan.csv").unlink()
        tables.manifest_path(out / "scan.csv").unlink()
        if kept:
            part.write_bytes(kept)
        return table

    yield from bits(("*.part",), unfinished, bytes.__eq__, count, folder)


def bits_of_a_graft(count: int, folder: Path) -> Iterator[str | None]:
    yield from bits(("checkpoint.safetensors", "latents*"), grafted, same, count, folder)


def bits_of_a_checkpoint(count: int, folder: Path) -> Iterator[str | None]:
    yield from bits(("checkpoint.safetensors",), grafted, same, count, folder)


def bits_of_a_table(count: int, folder: Path) -> Iterator[str | None]:
    def read(out: Path) -> pd.DataFrame:
        path = out / made_up.SERIES
        if not path.exists():
            made_table(disk.folder(out))
        frame = tables.read(path)
        return frame.assign(manifest=repr({k: v for k, v in tables.read_manifest(path).items() if k != "checksum"}))

    yield from bits(("*.csv", "*.json"), read, pd.DataFrame.equals, count, folder)


# --- leftovers, links, cells -----------------------------------------------------------------------------------------


def odd_names(count: int, folder: Path) -> Iterator[str | None]:
    """Names that are almost those of leftovers stay; leftovers of this version and of earlier ones go."""
    draw = random.Random(6)
    pieces = [".", "surgery", "partial", "12", "-1", "x", " ", "é", ".part", "safetensors", "csv", "٣", "4194303", "\n"]
    ours = re.compile(r"\..+\.(csv|safetensors)\.[0-9]{1,7}\.partial")
    for trial in range(count):
        out, left = folder / str(trial), draw.choice([".a.1-0a1b2c3d.surgery.partial", ".a.csv.4194303.partial"])
        out.mkdir()
        (out / left).write_text("half")
        name = "." + "".join(draw.choices(pieces, k=draw.randint(1, 6))) + draw.choice(["", ".partial", ".1.partial"])
        theirs = "notes" + name if ours.fullmatch(name) or name == ".." else name
        (out / theirs).mkdir() if draw.random() < 0.3 else (out / theirs).write_text("mine")
        disk.folder(out)
        yield None if os.listdir(out) == [theirs] else f"{os.listdir(out)} instead of {theirs!r}"


def links(count: int, folder: Path) -> Iterator[str | None]:
    """Under every name that a scan or a training writes lies a link to something precious, which stays as it was."""
    of = stack(str(model(folder)))
    mark = ".writer.surgery.partial"
    scans = ("scan.csv", "scan.manifest.json", "scan.csv.part", f".scan.csv{mark}", mark)
    trained = ("run/checkpoint.safetensors", "run/curve.csv", "run/curve.manifest.json", f"run/{mark}")
    trained += ("latents/latents.json", "latents/latents-00000.safetensors", f"latents/{mark}")
    runs: list[tuple[str, Callable[[Path], Any]]] = [(n, lambda out: scanned(out / "scan.csv", of)) for n in scans]
    runs += [(name, grafted) for name in trained]
    for name, run in runs[:: max(1, len(runs) // count)]:
        for how in ("symlink_to", "hardlink_to"):
            out, precious = folder / "linked", folder / "precious"
            precious.write_text("precious")
            (out / name).parent.mkdir(parents=True)
            getattr(out / name, how)(precious)
            told(functools.partial(run, out))
            yield None if precious.read_text() == "precious" else f"{name} was followed ({how})"
            shutil.rmtree(out)


def formulas(count: int, folder: Path) -> Iterator[str | None]:
    """Random text with = + - @ in every place: no cell of the file begins with one, and all reads back."""
    draw = random.Random(7)
    pieces = [
        "=",
        "+",
        "-",
        "@",
        "'",
        "\t",
        "\r",
        "\n",
        ";",
        ",",
        '"',
        "cmd|' /C calc'!A0",
        "a",
        "1",
        " ",
        "＝",
        "-1:",
        ":4",
    ]
    for _ in range(count):
        texts = ["".join(draw.choices(pieces, k=draw.randint(1, 6))) for _ in range(4)]
        frame = pd.DataFrame({"group": texts, "value": [-1.5, 2.0, -0.0, 1e-9], "=name": [-1, 2, 3, -4]})
        path = tables.write(frame, folder / "cells.csv", {}, dict.fromkeys(frame, "a column"))
        content = path.read_bytes().decode()
        cells = [cell for row in csv.reader(io.StringIO(content, newline="")) for cell in row[:1]]
        cells += [cell for separator in ";\t" for line in content.splitlines() for cell in line.split(separator)]
        risky = [cell for cell in cells if cell.lstrip('"')[:1] in tuple("=+-@\t\r＝＋－＠") and cell.lstrip('"')]
        if risky:
            yield f"a spreadsheet would run {risky[0]!r}"
        elif not tables.read(path).equals(frame):
            yield f"{texts} read back as {tables.read(path)['group'].tolist()}"
        else:
            yield None


# What is not tried at all quickly has tests of its own: tests/test_disk.py, tests/test_cli_refusals.py,
# tests/scan/test_rows.py, tests/training/test_activations.py and tests/graft/test_study.py.
ATTACKS = [
    Attack("SIGKILL of a scan at random moments, resumed: the same table byte for byte", scans_killed, 0, 60),
    Attack("SIGKILL of a harvest and graft, resumed: the same weights bit for bit", grafts_killed, 0, 40),
    Attack("SIGKILL of a training with dropout, resumed: the same weights bit for bit", dropout_killed, 0, 20),
    Attack("SIGKILL of a study, run again: the same tables byte for byte", studies_killed, 0, 10),
    Attack("SIGTERM, SIGINT or SIGHUP at random moments of a study", ended_politely, 0, 40, "every SIGTERM"),
    Attack("Two processes scan into one file at once", two_at_once, 0, 30, "a damaged file or a traceback"),
    Attack("Every system call of a table, scan or graft fails in turn (full or broken disk)", broken_disks, 1, 2),
    Attack("No file can be written past a random size", cut_short, 1, 60),
    Attack("A flipped bit in the rows of an unfinished scan", bits_of_rows, 3, 200, "not noticed in a number"),
    Attack("A flipped bit in a checkpoint", bits_of_a_checkpoint, 2, 40, "23 of 25"),
    Attack("A flipped bit in a checkpoint or in stored activations", bits_of_a_graft, 0, 40),
    Attack("A flipped bit in a table or its manifest", bits_of_a_table, 10, 1000, "not noticed in a manifest"),
    Attack("Odd names beside leftovers", odd_names, 10, 1000),
    Attack("Links under every name that is written", links, 3, 12, "a scan's part was followed"),
    Attack("Cells that a spreadsheet would run as a formula", formulas, 10, 2000, "all"),
]


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.quick], ids=str)
def test_nothing_fails(attack, tmp_path):
    attack.hold(tmp_path)
