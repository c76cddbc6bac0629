"""``studies/fresh_middle.py`` runs as its docstring says, on few prompts."""

import runpy
from pathlib import Path

import pandas as pd
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


@pytest.fixture(scope="module")
def study():
    """What the script defines, without running it."""
    return runpy.run_path(str(Path(__file__).parents[2] / "studies" / "fresh_middle.py"))


def test_the_worst_layer_is_named_only_where_it_is_told_from_all_others(study):
    def said(half, *damages):
        rows = [
            {"layer": i, "damage": d, "damage_low": d - half, "damage_high": d + half} for i, d in enumerate(damages)
        ]
        return study["replaceable_layers"](pd.DataFrame(rows))

    assert said(0.01, 0.1, 0.5, 0.3).endswith("1: 0.50, 2: 0.30. Worst is layer 1.")
    assert said(0.15, 0.1, 0.5, 0.3).endswith("The worst are not told apart: layers 1 to 2.")
    for half, damage in ((float("nan"), 0.5), (0.01, float("nan"))):
        assert said(half, 0.1, damage, 0.3).endswith("Which is worst is undecided: not all have an interval.")


def test_the_first_snapshot_as_good_is_chosen_by_other_prompts_and_seed_by_seed(study):
    spent = {"operations_with_teacher": 30.0, "operations": 20.0}
    grown = pd.DataFrame(
        [{"exact": 0.5, "chosen_by": loss, "cross_entropy_answers": 0.2} | spent for loss in (0.15, 0.25)]
    )
    snapshots = pd.DataFrame(
        {
            "method": ["whole, step 30", "whole, step 10", "whole, step 20"],
            "steps": [30, 10, 20],
            "chosen_by": [0.1, 0.3, 0.2],
            "cross_entropy_answers": [0.3, 0.1, 0.3],  # on the prompts reported on, step 10 would be as good
            "operations": [300.0, 100.0, 200.0],
        }
    )
    said = study["fraction"](grown, snapshots, 1.0)
    assert (
        "of the snapshots it is step 30 and step 20 that is first with as small a loss on the prompts to stop by"
        in said
    )
    assert "12.5 [-19.3, 44.3] % of its operations" in said
    assert "undefined" in study["fraction"](grown.assign(exact=float("nan")), snapshots, 1.0)
