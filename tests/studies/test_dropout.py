"""``studies/dropout.py`` runs as its docstring says, on few prompts."""

from support.studies import run
from surgery.dropout import trained as dropout_models


def test_dropout_reads_a_file_of_models_and_does_not_make_tables_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(dropout_models, "LADDER", (9.0,))
    sizes = {"n_layers": 2, "d_model": 16, "d_mlp": 32, "n_heads": 2, "steps": 2, "every": 1}
    recipes = [dropout_models.Recipe(rate=rate, seed=seed, **sizes) for rate in (0.0, 0.4) for seed in (0, 1)]
    made = [dropout_models.train(recipe, tmp_path / recipe.name) for recipe in recipes]
    dropout_models.ship(made, tmp_path / "models.safetensors")
    options = ["--models", tmp_path / "models.safetensors", "--problems", "30", "--out", tmp_path / "out", "--only"]
    options += ["dropout_probes.csv", "dropout_ensemble.csv"]
    first, again = (run("dropout.py", *options) for _ in range(2))
    assert first.count("making ") == 2
    assert "making" not in again
    assert again.strip() in first
    assert "Dropping layers at test time costs" in again
    assert "Dropout: within and across components" in (tmp_path / "out" / "report.html").read_text()
