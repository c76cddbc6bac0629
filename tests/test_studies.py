"""The study scripts run as their docstrings say, on few prompts."""

import runpy
import subprocess
import sys

import pytest
from safetensors.torch import save_file

import surgery
from support.places import REPOSITORY
from surgery import models
from surgery.dropout import trained as dropout_models
from surgery.records import tables

STUDIES = REPOSITORY / "studies"


@pytest.mark.parametrize(
    ("script", "options", "file", "said"),
    [
        ("series_or_parallel.py", ["--prompts", "16", "--length", "2"], "series_by_k.csv", "From k = 0 to k = 4"),
    ],
)
def test_a_study_runs_and_leaves_its_table(script, options, file, said, tmp_path):
    done = subprocess.run(
        [sys.executable, STUDIES / script, "--out", tmp_path, *options], capture_output=True, text=True, check=True
    )
    assert said in done.stdout
    frame = tables.read(tmp_path / file)
    assert len(frame) == 3 * 5 * 11
    assert tables.read_manifest(tmp_path / file)["model"]["name"] == "babel"


def test_tape_together_measures_again_what_it_chose(tmp_path):
    options = ["--out", tmp_path, "--count", "8"]
    done = subprocess.run(
        [sys.executable, STUDIES / "tape_together.py", *options], capture_output=True, text=True, check=True
    )
    for said in ("156 wirings were tried on 12 prompts", "the reach:", "Beside its controls", "The beam's best of"):
        assert said in done.stdout, said
    winners, measured = (tables.read(tmp_path / f"{name}.csv") for name in ("winners", "controls"))
    chosen = winners.iloc[0]
    assert f"{100 * chosen['gain_validation']:+.1f} [" in done.stdout
    assert set(winners["n_prompts_search"]) == {12}
    assert set(winners["n_prompts_validation"]) == {12}
    assert {"chosen", "random span", "3 passes", "norm-only", "linearised", "beam"} <= set(measured["control"])
    assert measured.set_index("control").loc["chosen", "gain"] == pytest.approx(chosen["gain_validation"])
    assert tables.read(tmp_path / "spans_by_k.csv")["group"].nunique() == 8
    assert {path.name for path in tmp_path.glob("*.png")} == {"brain_scan.png", "tape_together.png"}


def test_anatomy_says_of_every_model_whether_its_ends_are_more_parallel(tmp_path):
    options = ["--out", tmp_path, "--prompts", "8", "--probes", "1", "--resamples", "5"]
    done = subprocess.run(
        [sys.executable, STUDIES / "anatomy.py", *options], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("That the ends are more parallel than the middle is") == 3
    for model in ("babel", "untrained", "translation"):
        ends = tables.read(tmp_path / model / "anatomy_ends.csv")
        assert ends["kind"].tolist() == ["all", "k=0", "k=4"]
        assert (tmp_path / model / "anatomy_boundaries.png").exists()


def test_every_study_says_how_to_run_it():
    for script in STUDIES.glob("*.py"):
        assert f"python studies/{script.name}" in script.read_text().split('"""')[1]


def test_mean_reversion_follows_wirings_and_training(tmp_path):
    other = models.plain(models.untrained(surgery.load("babel"), seed=1)).state_dict()
    save_file({name: weight.half() for name, weight in other.items()}, tmp_path / "step_000010.safetensors")
    options = ["--out", tmp_path / "out", "--prompts", "6", "--checkpoints", tmp_path]
    done = subprocess.run(
        [sys.executable, STUDIES / "mean_reversion.py", *options], capture_output=True, text=True, check=True
    )
    said = [
        "Layers that push back at both sizes",
        "Taped together as :9 6:",
        "From the untrained model to the final one",
    ]
    said += ["these checkpoints are of another training run", "Is reversion stronger in the ends than in the middle?"]
    for words in said:
        assert words in done.stdout, words
    assert done.stdout.splitlines()[-1].startswith("In one sentence:")
    names = ("reversion_by_size", "mean_reversion_wirings", "mean_reversion_training", "reversion_layers")
    sized, wired, trained, clean = (tables.read(tmp_path / "out" / f"{name}.csv") for name in names)
    assert len(sized) == 2 * 12
    passes = wired[(wired["wiring"] == ":9 6:") & (wired["part"] == "layer")]
    assert passes["layer"].tolist() == [*range(9), *range(6, 12)]
    assert passes["time"].tolist() == [1] * 9 + [2] * 3 + [1] * 3
    middle = wired[wired["part"] == "middle"].set_index("wiring")[["start", "stop"]]
    assert middle.loc[":"].tolist() == [4, 9]
    assert middle.loc[":9 6:"].tolist() == [4, 12]
    assert trained["checkpoint"].tolist() == ["untrained", "step_000010", "final"]
    assert trained["step"].tolist()[:2] == [0, 10]
    assert trained["kappa"].iloc[-1] == pytest.approx(clean["kappa"][1:].mean(), rel=1e-5)
    assert trained["psi"].iloc[-1] == pytest.approx(clean["psi"][1:].mean(), rel=1e-4)
    assert (tmp_path / "out" / "mean_reversion_training.png").exists()


def test_a_fresh_middle_is_compared_at_equal_operations(tmp_path):
    options = ["--steps", "2", "--prompts", "80", "--judged", "10", "--out", tmp_path]
    command = [sys.executable, STUDIES / "fresh_middle.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for said in (
        "Which layers are replaceable?",
        "Over 1 seed, exact answers of the graft by k: k = 0 1.000",
        "The bundled model's own training answered",
        "Is the fresh middle wired like the old one? S ",
    ):
        assert said in done.stdout, said
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
    done = subprocess.run(
        [sys.executable, STUDIES / "latent_walk.py", *options], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("one seed tells nothing") == 5 + 2 * 2
    methods = tables.read(tmp_path / "walk_methods.csv").set_index("method")
    spent = methods["operations_with_teacher"]
    for kind in ("stationary", "tangent"):
        assert spent[f"{kind}, relabelled"] > spent["stationary, unrelabelled"] == spent["real"]
    assert methods.loc["longer", "steps"] >= methods.loc["real", "steps"]
    assert spent["more real"] == pytest.approx(spent["tangent, relabelled"], rel=0.05)
    kinds = tables.read(tmp_path / "walk_manifold.csv")
    assert kinds["kind"].iloc[0] == "real"
    assert all((tmp_path / name).exists() for name in ("walk_manifold.png", "walk_methods.png", "report.html"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "somewhere"], "somewhere brings no prompts of its own: give a file with --text FILE"),
        (["--checkpoints", "nowhere"], "nowhere has no step_*.safetensors: make some with"),
    ],
)
def test_mean_reversion_says_what_is_missing(options, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mean_reversion.py", *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(STUDIES / "mean_reversion.py"), run_name="__main__")
    assert said in " ".join(capsys.readouterr().err.split())


def test_dropout_reads_a_file_of_models_and_does_not_make_tables_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(dropout_models, "LADDER", (9.0,))
    sizes = {"n_layers": 2, "d_model": 16, "d_mlp": 32, "n_heads": 2, "steps": 2, "every": 1}
    recipes = [dropout_models.Recipe(rate=rate, seed=seed, **sizes) for rate in (0.0, 0.4) for seed in (0, 1)]
    made = [dropout_models.train(recipe, tmp_path / recipe.name) for recipe in recipes]
    dropout_models.ship(made, tmp_path / "models.safetensors")
    options = ["--models", tmp_path / "models.safetensors", "--problems", "30", "--out", tmp_path / "out", "--only"]
    options += ["dropout_probes.csv", "dropout_ensemble.csv"]
    command = [sys.executable, STUDIES / "dropout.py", *options]
    first, again = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first.count("making ") == 2
    assert "making" not in again
    assert again.strip() in first
    assert "Dropping layers at test time costs" in again
    assert "Dropout: within and across components" in (tmp_path / "out" / "report.html").read_text()
