"""``studies/width_of_thought.py`` runs as its docstring says, on few prompts."""

import subprocess
import sys

from support.places import REPOSITORY
from surgery.records import tables

STUDIES = REPOSITORY / "studies"


def test_width_of_thought_compares_sizes_by_budget_and_k(tmp_path):
    options = ["--steps", "1", "--prompts", "100", "--judged", "10", "--widths", "128", "--depths", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, STUDIES / "width_of_thought.py", *options], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("one seed tells nothing") == 2 * (1 + 5)
    assert "Exact answers at equal operations, width 128 and 5 layers" in done.stdout
    frame = tables.read(tmp_path / "width_of_thought.csv")
    assert len(frame) == 2 * 2 * (1 + 5)
    assert (tmp_path / "width_of_thought.png").exists()
    assert "Width, depth and walks" in (tmp_path / "report.html").read_text()
