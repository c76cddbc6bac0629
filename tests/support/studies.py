"""Study scripts, run as a user runs them."""

import contextlib
import io
import runpy
import sys
from unittest import mock

from support.places import REPOSITORY

STUDIES = REPOSITORY / "studies"


def run(script: str, *options: object) -> str:
    """What ``python studies/<script> <options>`` prints; run in this process, where everything is imported already."""
    command = [str(STUDIES / script), *map(str, options)]
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(printed):
        runpy.run_path(command[0], run_name="__main__")  # SystemExit, which an error ends with, fails the test
    return printed.getvalue()
