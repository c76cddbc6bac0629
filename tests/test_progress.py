"""The display of long runs: what a terminal and a log are shown, and that it never disturbs the run."""

import contextlib
import errno
import io
import sys
import threading
import time

import pytest

from surgery import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    """A log on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(progress, "BLINK", 0.01)


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def on(file: "io.StringIO | None") -> "contextlib.redirect_stderr[io.StringIO | None]":
    """Context manager: standard error is this file. A fixture cannot do it, because pytest replaces it in between."""
    return contextlib.redirect_stderr(file)


def until(condition) -> None:
    """Wait for what a thread does, ten seconds at most."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 10
        time.sleep(0.005)


def test_nothing_is_shown_unless_somebody_asked(log):
    with on(log), progress.task("windows", 2) as advance:
        advance()
        time.sleep(0.05)
    assert log.getvalue() == ""


def test_who_runs_the_program_decides(log):
    with on(log):
        with progress.shown(False), progress.task("first", 2, show=True):
            time.sleep(0.05)
        assert log.getvalue() == ""
        with progress.shown(True), progress.task("second", 2):
            until(log.getvalue)
        with progress.task("third", 2):
            time.sleep(0.05)
    assert "third" not in log.getvalue(), "the decision ends with its context"


def test_a_log_gets_a_line_of_all_tasks_now_and_then_and_one_at_their_end(log):
    with on(log), progress.task("study", 4, True) as whole, progress.task("windows", 400, True) as advance:
        whole()
        advance(100, "loss 0.1")
        until(lambda: "windows: 100" in log.getvalue())
        advance(300)
    first, *_, last_but_one, last = log.getvalue().splitlines()
    assert first.startswith("study: 1 of 4 (25%), 0 s left; windows: 100 of 400 (25%), 0 s left, loss 0.1")
    assert last_but_one == "windows: done after 0 s"
    assert last == "study: ended at 1 of 4 (25%) after 0 s"


def test_a_short_task_leaves_no_line(log, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 30.0)
    with on(log):
        assert list(progress.track("abc", "letters", 3, show=True)) == ["a", "b", "c"]
    assert log.getvalue() == ""


def test_the_time_left_is_judged_by_the_steps_of_this_run(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    task = progress._Task("wirings", 100)
    task.advance(50, free=True)
    clock[0] = 60.0
    assert task.line() == "wirings: 50 of 100 (50%), 60 s so far"
    task.advance(10)
    assert task.line() == "wirings: 60 of 100 (60%), 4 min left"
    assert progress._Task("opening", None).line() == "opening: 0 s so far"


def test_a_terminal_shows_every_task_and_is_left_as_it_was(terminal):
    with on(terminal):
        with progress.task("study", 4, True) as whole, progress.task("a [bold] name", None, True) as advance:
            whole(2)
            advance(7, "loss 0.1")
            until(lambda: all(text in terminal.getvalue() for text in ("study", "2 of 4", "a [bold] name", "loss 0.1")))
            sys.stderr.write("a line of the run\n")
            assert sys.stderr is not terminal, "lines are put above the bars"
        assert sys.stderr is terminal
    assert "a line of the run\n" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K"), "the cursor is back, the bars are gone"
    until(lambda: not any(thread.name == "progress" for thread in threading.enumerate()))


def test_what_is_printed_stays_on_standard_output(terminal, capsys):
    with on(terminal), progress.task("windows", 2, True):
        sys.stdout.write("result\n")
    assert capsys.readouterr().out == "result\n"
    assert "result" not in terminal.getvalue()


def test_an_error_restores_everything(terminal):
    with on(terminal):
        with pytest.raises(KeyboardInterrupt), progress.shown(True), progress.task("windows", 2):
            raise KeyboardInterrupt
        assert sys.stderr is terminal
    assert progress._STDERR.tasks == []
    assert progress._shown.get() is None


def test_tasks_may_end_in_any_order_and_generators_may_be_abandoned(terminal):
    with on(terminal):
        first, second = (progress.track(range(9), name, 9, show=True) for name in ("first", "second"))
        assert (next(first), next(second)) == (0, 0)
        first.close()
        assert [task.what for task in progress._STDERR.tasks] == ["second"]
        del second
        assert progress._STDERR.tasks == []
        assert sys.stderr is terminal


def test_threads_advance_one_task_and_open_their_own(log):
    with on(log), progress.task("all", 8000, True) as advance:

        def work() -> None:
            with progress.task("part", 1000, True) as own:
                for _ in range(1000):
                    advance()
                    own()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [task.done for task in progress._STDERR.tasks] == [8000]


@pytest.mark.parametrize("broken", ["missing", "closed", "full"])
@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_standard_error_that_cannot_be_written_to_ends_no_run(monkeypatch, kind, broken):
    stderr = None if broken == "missing" else kind()
    if broken == "full":
        monkeypatch.setattr(stderr, "write", Full().write)
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with on(stderr):
        with progress.task("windows", 10, True) as advance:
            if broken == "closed":
                stderr.close()
            for _ in range(10):
                advance()
                time.sleep(0.005)
        assert sys.stderr is stderr
    assert failed == []
