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


def test_within_a_budget_it_takes_as_many_problems_as_fit_and_the_same_again(tmp_path):
    options = ["--prompts", "17", "--length", "2", "--budget", "5m", "--out", tmp_path]
    first, again = (run("series_or_parallel.py", *options) for _ in range(2))
    assert first.startswith("Plan for a budget of 5 min: prompts 17; about ")
    assert again.startswith(f"going on with the plan in {tmp_path / 'sizes.json'}: Plan for a budget of 5 min")
    assert again.split("\n", 1)[1] == first.split("\n", 1)[1]
