"""The command line run in this process, what a refusal looks like, and a study whose measurements take no time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from support import fixtures, made_up
from support.places import REPOSITORY
from surgery import cli

PROMPTS = [" ".join(f"w{(7 * i + 3 * j * j) % 90}" for j in range(4 + i % 5)) for i in range(8)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    """One sentence on the error stream, nothing on the other, exit code 1."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in said[0]


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time; what is opened and written is real."""
    made_up.replace_measures(fixtures.N_LAYERS, monkeypatch.setattr)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python as a process of its own, in which nothing is imported yet."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)
