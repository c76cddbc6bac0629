"""``studies/series_or_parallel.py`` runs as its docstring says, on few prompts."""

import subprocess
import sys

import pytest

from support.places import REPOSITORY
from surgery.records import tables

STUDIES = REPOSITORY / "studies"


@pytest.mark.parametrize(
    ("script", "options", "file", "said"),
    [
        ("series_or_parallel.py", ["--prompts", "16", "--length", "2"], "series_by_k.csv", "From k = 0 to k = 4"),
    ],
)
def test_a_study_runs_and_leaves_its_table(script, options, file, said, tmp_path):
    done = subprocess.run(
        [sys.executable, STUDIES / script, "--out", tmp_path, *options], capture_output=True, text=True, check=True
    )
    assert said in done.stdout
    frame = tables.read(tmp_path / file)
    assert len(frame) == 3 * 5 * 11
    assert tables.read_manifest(tmp_path / file)["model"]["name"] == "babel"
