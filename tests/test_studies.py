"""The study scripts run as their docstrings say, on few prompts."""

import subprocess
import sys
from pathlib import Path

import pytest

from surgery import frames

STUDIES = Path(__file__).parents[1] / "studies"


@pytest.mark.parametrize(
    ("script", "options", "file", "said"),
    [
        ("series_or_parallel.py", ["--prompts", "16", "--length", "2"], "series_by_k.csv", "From k = 0 to k = 4"),
        ("mean_reversion.py", ["--prompts", "10"], "reversion_by_size.csv", "Layers that push back at both sizes"),
    ],
)
def test_a_study_runs_and_leaves_its_table(script, options, file, said, tmp_path):
    done = subprocess.run(
        [sys.executable, STUDIES / script, "--out", tmp_path, *options], capture_output=True, text=True, check=True
    )
    assert said in done.stdout
    frame = frames.read(tmp_path / file)
    assert len(frame) == {"series_by_k.csv": 3 * 5 * 11, "reversion_by_size.csv": 2 * 12}[file]
    assert frames.read_manifest(tmp_path / file)["model"]["name"] == "babel"


def test_tape_together_measures_again_what_it_chose(tmp_path):
    options = ["--out", tmp_path, "--count", "8"]
    done = subprocess.run(
        [sys.executable, STUDIES / "tape_together.py", *options], capture_output=True, text=True, check=True
    )
    for said in ("156 wirings were tried on 12 prompts", "the reach:", "Beside its controls", "The beam's best of"):
        assert said in done.stdout, said
    winners, measured = (frames.read(tmp_path / f"{name}.csv") for name in ("winners", "controls"))
    chosen = winners.iloc[0]
    assert f"{100 * chosen['gain_validation']:+.1f} [" in done.stdout
    assert set(winners["n_prompts_search"]) == {12}
    assert set(winners["n_prompts_validation"]) == {12}
    assert {"chosen", "random span", "3 passes", "norm-only", "linearised", "beam"} <= set(measured["control"])
    assert measured.set_index("control").loc["chosen", "gain"] == pytest.approx(chosen["gain_validation"])
    assert frames.read(tmp_path / "spans_by_k.csv")["group"].nunique() == 8
    assert {path.name for path in tmp_path.glob("*.png")} == {"brain_scan.png", "tape_together.png"}


def test_anatomy_says_of_every_model_whether_its_ends_are_more_parallel(tmp_path):
    options = ["--out", tmp_path, "--prompts", "8", "--probes", "1", "--resamples", "5"]
    done = subprocess.run(
        [sys.executable, STUDIES / "anatomy.py", *options], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("That the ends are more parallel than the middle is") == 3
    for model in ("babel", "untrained", "translation"):
        ends = frames.read(tmp_path / model / "anatomy_ends.csv")
        assert ends["kind"].tolist() == ["all", "k=0", "k=4"]
        assert (tmp_path / model / "anatomy_boundaries.png").exists()


def test_every_study_says_how_to_run_it():
    for script in STUDIES.glob("*.py"):
        assert f"python studies/{script.name}" in script.read_text().split('"""')[1]
