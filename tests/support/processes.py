"""Processes to interrupt and to kill, forked from one per test process that has imported everything, once.

What runs in them is the text of a script. The library is theirs alone: nothing of it is loaded with checks of shapes.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["torch", "transformer_lens", "surgery.report", "surgery.study", "surgery.graft.study", "surgery.scan.cluster"]
)


class Script:
    """A script that runs in a process of its own, as ``python -c CODE ARGUMENTS`` would."""

    def __init__(self, code: str, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "errors"
        pipe = Path(self._folder.name) / "output"
        os.mkfifo(pipe)
        words = [str(argument) for argument in arguments]
        run = (code, words, dict(environment or {}), str(pipe), str(self._errors))
        self._process = _server.Process(target=_run, args=run)
        self._process.start()
        self.output = pipe.open()

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    @property
    def errors(self) -> str:
        """What it wrote to standard error."""
        return self._errors.read_text() if self._errors.exists() else ""

    def send(self, how: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, how)

    def wait(self, timeout: float = 60) -> int:
        """Its exit code, negative for a signal; what it writes until then is thrown away."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still running after {timeout} s: {self.errors}")
        self.output.close()
        return code


def _run(code: str, arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(output, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests are a job
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
