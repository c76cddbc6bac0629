"""``studies/tape_together.py`` runs as its docstring says, on few prompts."""

import pytest

from support.studies import run
from surgery.records import tables


def test_tape_together_measures_again_what_it_chose(tmp_path):
    options = ["--out", tmp_path, "--count", "8"]
    printed = run("tape_together.py", *options)
    for said in ("156 wirings were tried on 12 prompts", "the reach:", "Beside its controls", "The beam's best of"):
        assert said in printed, said
    winners, measured = (tables.read(tmp_path / f"{name}.csv") for name in ("winners", "controls"))
    chosen = winners.iloc[0]
    assert f"{100 * chosen['gain_validation']:+.1f} [" in printed
    assert set(winners["n_prompts_search"]) == {12}
    assert set(winners["n_prompts_validation"]) == {12}
    assert {"chosen", "random span", "3 passes", "norm-only", "linearised", "beam"} <= set(measured["control"])
    assert measured.set_index("control").loc["chosen", "gain"] == pytest.approx(chosen["gain_validation"])
    assert tables.read(tmp_path / "spans_by_k.csv")["group"].nunique() == 8
    assert {path.name for path in tmp_path.glob("*.png")} == {"brain_scan.png", "tape_together.png"}
