"""How commands and scripts end when they are interrupted, and what a study stopped in the middle leaves."""

import signal
import threading
import time

import pytest

from support import made_up
from support.commands import hurry, run, write_prompts
from support.processes import Script
from surgery import cli
from surgery.records import tables
from surgery.reversion import study as reversion_study


@pytest.fixture(scope="module")
def model(model_folder):
    return model_folder("llama")


@pytest.fixture
def text(tmp_path):
    return write_prompts(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    hurry(monkeypatch)


def test_an_interruption_is_a_sentence_and_130(quick, model, text, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(reversion_study, "measure", interrupt)
    result = run("study", "--model", model, "--text", text, "--out", tmp_path / "results")
    assert result.exit_code == 130
    assert "interrupted: nothing is half-written" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on where it was\n"),
        (ValueError("3 is too many: give [1, 2]"), 1, "error: 3 is too many: give [1, 2]\n"),
        (OSError("the disk is full"), 1, "error: the disk is full\n"),
    ],
)
def test_a_script_ends_in_a_sentence(error, code, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        cli.script(main)
    assert left.value.code == code
    assert capsys.readouterr().err == said


def test_signals_are_listened_to_only_meanwhile_and_only_where_nobody_else_does(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        cli.script(lambda: signal.raise_signal(signal.SIGTERM))
    assert left.value.code == 143
    assert capsys.readouterr().err == "ended by SIGTERM: the same command goes on where it was\n"
    assert signal.getsignal(signal.SIGTERM) is before
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("mine"))
    try:
        cli.script(lambda: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["mine"]
    thread = threading.Thread(target=cli.script, args=(lambda: heard.append("in a thread"),))
    thread.start()
    thread.join()
    assert heard == ["mine", "in a thread"]


def test_a_mistake_of_a_script_itself_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.script(lambda: 1 / 0)


SLOW = """
import os, sys, time
from support import made_up
from surgery import cli

def slowly(*_, **__):
    print("now", flush=True)
    time.sleep(120)

moment = sys.argv.pop(1)
made_up.replace_measures(4, setattr, slowly if moment == "measuring" else None)
if moment == "writing":
    real, count = os.fsync, [0]
    def fsync(descriptor):
        count[0] += 1
        slowly() if count[0] == 7 else real(descriptor)
    os.fsync = fsync
cli.main()
"""


@pytest.mark.parametrize(
    ("moment", "how", "code"),
    [
        ("measuring", signal.SIGINT, 130),
        ("writing", signal.SIGINT, 130),
        ("writing", signal.SIGTERM, 143),
        ("measuring", signal.SIGHUP, 129),
        ("writing", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_real_study_stopped_in_the_middle_leaves_whole_files_only(model, text, tmp_path, moment, how, code):
    out = tmp_path / "results"
    process = Script(SLOW, moment, "study", "--model", model, "--text", text, "--out", out, "--max-length", 2)
    assert process.output.readline() == "now\n", process.errors
    time.sleep(0.1)
    process.send(how)
    assert process.wait() == code
    said = {signal.SIGINT: "interrupted: ", signal.SIGKILL: ""}.get(how, f"ended by {how.name}: ")
    assert f"{said}nothing is half-written" in process.errors or how == signal.SIGKILL
    final = {file.name for file in out.iterdir() if not file.name.endswith(".partial")}
    page = set() if how == signal.SIGKILL else {"report.html", "series.png"}
    assert final == {"series_windows.csv", "series_windows.manifest.json", "study.json", *page}
    assert how == signal.SIGKILL or len(list(out.iterdir())) == len(final), "temporary files are removed"
    tables.read(out / made_up.SERIES)
    if page:
        assert "Not measured yet: reversion, calibration, measures" in (out / "report.html").read_text()
