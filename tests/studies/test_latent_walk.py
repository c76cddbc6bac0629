"""``studies/latent_walk.py`` runs as its docstring says, on few prompts."""

import pytest

from support.studies import run
from surgery.records import tables


def test_latent_walk_compares_walks_with_as_much_real_data(tmp_path):
    options = [
        "--steps",
        "2",
        "--tokens",
        "2000",
        "--judged",
        "20",
        "--kinds",
        "stationary",
        "tangent",
        "--out",
        tmp_path,
    ]
    printed = run("latent_walk.py", *options)
    assert printed.count("one seed tells nothing") == 5 + 2 * 2
    methods = tables.read(tmp_path / "walk_methods.csv").set_index("method")
    spent = methods["operations_with_teacher"]
    for kind in ("stationary", "tangent"):
        assert spent[f"{kind}, relabelled"] > spent["stationary, unrelabelled"] == spent["real"]
    assert methods.loc["longer", "steps"] >= methods.loc["real", "steps"]
    assert spent["more real"] == pytest.approx(spent["tangent, relabelled"], rel=0.05)
    kinds = tables.read(tmp_path / "walk_manifold.csv")
    assert kinds["kind"].iloc[0] == "real"
    assert all((tmp_path / name).exists() for name in ("walk_manifold.png", "walk_methods.png", "report.html"))
