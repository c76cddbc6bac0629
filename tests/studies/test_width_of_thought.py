"""``studies/width_of_thought.py`` runs as its docstring says, on few prompts."""

from support.studies import run
from surgery.records import tables


def test_width_of_thought_compares_sizes_by_budget_and_k(tmp_path):
    options = ["--steps", "1", "--prompts", "100", "--judged", "10", "--widths", "128", "--depths", "--out", tmp_path]
    printed = run("width_of_thought.py", *options)
    assert printed.count("one seed tells nothing") == 2 * (1 + 5)
    assert "Exact answers at equal operations, width 128 and 5 layers" in printed
    frame = tables.read(tmp_path / "width_of_thought.csv")
    assert len(frame) == 2 * 2 * (1 + 5)
    assert (tmp_path / "width_of_thought.png").exists()
    assert "Width, depth and walks" in (tmp_path / "report.html").read_text()
