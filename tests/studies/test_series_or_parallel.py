"""``studies/series_or_parallel.py`` runs as its docstring says, on few prompts."""

import pytest

from support.studies import run
from surgery.records import tables


@pytest.mark.parametrize(
    ("script", "options", "file", "said"),
    [
        ("series_or_parallel.py", ["--prompts", "16", "--length", "2"], "series_by_k.csv", "From k = 0 to k = 4"),
    ],
)
def test_a_study_runs_and_leaves_its_table(script, options, file, said, tmp_path):
    printed = run(script, "--out", tmp_path, *options)
    assert said in printed
    frame = tables.read(tmp_path / file)
    assert len(frame) == 3 * 5 * 11
    assert tables.read_manifest(tmp_path / file)["model"]["name"] == "babel"
