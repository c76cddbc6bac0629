"""``studies/anatomy.py`` runs as its docstring says, on few prompts."""

from support.studies import run
from surgery.records import tables


def test_anatomy_says_of_every_model_whether_its_ends_are_more_parallel(tmp_path):
    options = ["--out", tmp_path, "--prompts", "8", "--probes", "1", "--resamples", "5"]
    printed = run("anatomy.py", *options)
    assert printed.count("That the ends are more parallel than the middle is") == 3
    for model in ("babel", "untrained", "translation"):
        ends = tables.read(tmp_path / model / "anatomy_ends.csv")
        assert ends["kind"].tolist() == ["all", "k=0", "k=4"]
        assert (tmp_path / model / "anatomy_boundaries.png").exists()
