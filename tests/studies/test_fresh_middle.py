"""``studies/fresh_middle.py`` runs as its docstring says, on few prompts."""

import pytest

from support.studies import run
from surgery.records import tables


def test_a_fresh_middle_is_compared_at_equal_operations(tmp_path):
    options = ["--steps", "2", "--prompts", "80", "--judged", "10", "--out", tmp_path]
    printed = run("fresh_middle.py", *options)
    for said in (
        "Which layers are replaceable?",
        "Over 1 seed, exact answers of the graft by k: k = 0 1.000",
        "The bundled model's own training answered",
        "Is the fresh middle wired like the old one? S ",
    ):
        assert said in printed, said
    methods, ledger, ks = (tables.read(tmp_path / f"graft_{name}.csv") for name in ("methods", "ledger", "by_k"))
    trained = methods.dropna(subset=["seed"]).set_index("method")
    assert methods["method"].tolist()[:3] == ["skip", "mean update", "linear map"]
    budget = trained.loc["graft", "operations_with_teacher"]
    for name in ("graft + kl", "cross entropy only", "distilled from scratch", "whole from scratch"):
        assert trained.loc[name, "operations_with_teacher"] == pytest.approx(budget, rel=0.5)  # whole steps, of two
    assert trained["unexplained"].isna().tolist() == [False] * 4 + [True] * 2
    assert set(ledger.query("method == 'graft, healed'")["phase"]) == {
        "harvest",
        "training",
        "healing",
        "healing: teacher",
    }
    assert set(ks["k"]) == set(range(5))
