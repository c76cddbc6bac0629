"""Whole files only, leftovers swept and nothing else, one writer a folder, and no link followed."""

import errno
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from support.processes import Script
from surgery import disk

HOLDING = """
import sys, time
from pathlib import Path
from surgery import disk
with disk.{how}(Path(sys.argv[1])):
    print("now", flush=True)
    time.sleep(120)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stopped(how: str, place: Path) -> Script:
    """A process that is in the middle of writing."""
    process = Script(HOLDING.format(how=how), place)
    assert process.output.readline() == "now\n", process.errors
    return process


def killed(process: Script) -> None:
    process.send(9)
    assert process.wait() == -9


def test_a_folder_is_made_and_left_empty(tmp_path):
    assert list(disk.folder(tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_a_folder_is_wanted_is_said(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="a file, not a folder"):
        disk.folder(tmp_path / place)


def test_a_folder_without_permission_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"cannot write to the folder .* there is no permission; choose another one"):
        disk.folder(tmp_path)


# --- leftovers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["writing", "workshop", "held", "held_file"])
def test_what_a_killed_process_leaves_is_swept_but_not_what_a_living_one_writes(how, tmp_path):
    process = stopped(how, tmp_path if how == "held" else tmp_path / ("a name that is far too long" * 8))
    assert len(written := names(tmp_path)) == 1
    disk.folder(tmp_path)
    assert names(tmp_path) == written
    killed(process)
    assert names(tmp_path) == written
    disk.folder(tmp_path)
    assert names(tmp_path) == set()


def test_leftovers_of_earlier_versions_are_swept(tmp_path):
    gone = 4_194_303  # the largest process id of Linux
    for name in ("checkpoint.safetensors", "scan_search.csv", "curve.manifest.json", "graft.png", "trial"):
        (tmp_path / f".{name}.{gone}.partial").write_text("half")
    (tmp_path / f".model.{gone}.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".converting-ab_12cd3").mkdir()
    os.utime(tmp_path / ".converting-ab_12cd3", (0, 0))
    disk.sweep(tmp_path)
    assert names(tmp_path) == set()


def test_nothing_of_anybody_else_is_swept(tmp_path):
    living = os.getppid()
    own = (".notes.partial", ".x.12ab.partial", "..partial", ".partial", "a.csv", ".a.99999999999999999999.partial")
    own += (f".scan.csv.{living}.partial", ".latents.partial", ".latents-x.-1.partial", ".my thesis.2024.partial")
    own += (
        ".surgery.partial.txt",
        ".surgery.partial",
        ".x.surgery.partial",
        "notes.surgery.partial",
        ".\n.4194303.partial",
        ".x.٣.partial",
    )
    own += (".surgery.partial", ".x.surgery.partial")
    for name in own:
        (tmp_path / name).write_text("mine")
    for name in (".backup.4194303.partial", ".converting-freshly1", ".converting-my-notes"):
        (tmp_path / name).mkdir()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "file").write_text("mine")
    (tmp_path / ".a.1-00000000.surgery.partial").symlink_to(elsewhere / "file")
    (tmp_path / ".b.1-00000000.surgery.partial").symlink_to(elsewhere)
    os.mkfifo(tmp_path / ".c.1-00000000.surgery.partial")
    os.link(elsewhere / "file", tmp_path / ".d.1-00000000.surgery.partial")
    before = names(tmp_path)
    disk.sweep(tmp_path)
    assert names(tmp_path) == before
    assert names(elsewhere) == {"deep", "file"}
    disk.sweep(tmp_path / "not there")


# --- one writer ------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_the_first_named_until_it_is_killed(tmp_path):
    process = stopped("held", tmp_path)
    with pytest.raises(disk.HeldError, match=r"process \d+ on .* is writing to .*: wait until it is done, or choose"):
        with disk.held(tmp_path):
            pass
    killed(process)
    with disk.held(tmp_path / "." / ".." / tmp_path.name):
        pass
    assert names(tmp_path) == set()


def test_the_thread_that_holds_a_folder_may_hold_it_again_and_another_may_not(tmp_path):
    told: list[str] = []

    def another() -> None:
        try:
            with disk.held(tmp_path):
                told.append("held")
        except disk.HeldError as error:
            told.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()

    with disk.held(tmp_path):
        with disk.held(tmp_path):
            pass
        in_a_thread()
    in_a_thread()
    assert told == [f"another thread of this process is writing to {tmp_path}: wait, or choose another place", "held"]


def _tries_to_hold(folder: str) -> None:
    try:
        with disk.held(folder):
            os._exit(0)
    except disk.HeldError:
        os._exit(3)


def test_a_forked_process_does_not_inherit_the_hold(tmp_path):
    with disk.held(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=_tries_to_hold, args=(str(tmp_path),))
        child.start()
        child.join()
    assert child.exitcode == 3


def test_files_in_one_folder_are_held_apart(tmp_path):
    process = stopped("held_file", tmp_path / ("a" * 60))
    with disk.held_file(tmp_path / ("a" * 61)), pytest.raises(disk.HeldError):
        with disk.held_file(tmp_path / ("a" * 60)):
            pass
    killed(process)


def test_where_there_are_no_locks_nothing_is_swept_and_nobody_refused(tmp_path, monkeypatch):
    def none(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    process = stopped("held", tmp_path)
    killed(process)
    monkeypatch.setattr(disk.filelock, "lock_descriptor", none)
    before = names(tmp_path)
    disk.sweep(tmp_path)
    assert names(tmp_path) == before
    with disk.held(tmp_path):
        disk.save({tmp_path / "a": b"whole"})
    assert (tmp_path / "a").read_bytes() == b"whole"


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["symlink_to", "hardlink_to"])
def test_no_link_is_followed(how, tmp_path):
    precious, out = tmp_path / "precious", disk.folder(tmp_path / "out")
    precious.write_text("mine")
    getattr(out / "scan.csv.part", how)(precious)
    for write in (lambda path: disk.append(path, b"row"), lambda path: disk.append(path, b"", keep=0)):
        with pytest.raises(OSError, match=r".") as told:
            write(out / "scan.csv.part")
        assert disk.reason(told.value) == "it is a link"
    getattr(out / "a.csv", how)(precious)
    disk.save({out / "a.csv": b"whole"})
    assert (out / "a.csv").read_bytes() == b"whole"
    getattr(out / ".writer.surgery.partial", how)(precious)
    with pytest.raises(OSError, match="it is a link; remove it"):
        with disk.held(out):
            pass
    assert precious.read_text() == "mine"


def test_a_file_is_appended_to_only_where_it_is(tmp_path):
    with pytest.raises(FileNotFoundError):
        disk.append(tmp_path / "a", b"row")
    disk.append(tmp_path / "a", b"head", keep=0)
    disk.append(tmp_path / "a", b"row")
    disk.append(tmp_path / "a", b"er", keep=3)
    assert disk.content_of(tmp_path / "a") == b"heaer"
