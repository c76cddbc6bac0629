"""The script that makes the reference model: resumable to the same weights, and what it writes is whole."""

import importlib.util
import json

import pandas as pd
import pytest
import torch

import surgery
from support.places import REPOSITORY
from surgery.corpus.babel import Babel

SCRIPT = REPOSITORY / "studies" / "train_reference.py"
spec = importlib.util.spec_from_file_location("train_reference", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

RECIPE = script.Recipe(n_layers=2, d_model=16, d_mlp=32, n_heads=2, mix=(0.3, 0.3, 0.4), batch=8, steps=6, warmup=2)
CORPUS = Babel()


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    """Progress is measured on many problems; here on few."""
    every = script.heldout
    monkeypatch.setattr(script, "heldout", lambda corpus, k, most: every(corpus, min(k, 3), 16))


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = script.train(RECIPE, CORPUS, tmp_path / "whole", "cpu", every=2, snapshots=[])
    losses, calls = script.losses, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(script, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.train(RECIPE, CORPUS, tmp_path / "parts", "cpu", every=2, snapshots=[])
    resumed = script.train(RECIPE, CORPUS, tmp_path / "parts", "cpu", every=2, snapshots=[5])
    assert torch.equal(weights(whole), weights(resumed))
    history = [pd.read_csv(tmp_path / run / "training.csv") for run in ("whole", "parts")]
    assert history[0].step.tolist() == [2, 4, 6]
    pd.testing.assert_frame_equal(*history)
    assert (tmp_path / "parts" / "step_000005.safetensors").exists()
    assert not list((tmp_path / "parts").glob(".*"))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    script.train(RECIPE, CORPUS, tmp_path, "cpu", every=6, snapshots=[])
    other = script.Recipe(**{**RECIPE.__dict__, "seed": 1})
    with pytest.raises(ValueError, match=r"of another run, with recipe.seed 0 \(now 1\)"):
        script.train(other, CORPUS, tmp_path, "cpu", every=6, snapshots=[])


def test_training_learns_and_what_is_written_loads(tmp_path):
    recipe = script.Recipe(**{**RECIPE.__dict__, "steps": 60, "warmup": 10, "learning_rate": 1e-2})
    model = script.train(recipe, CORPUS, tmp_path / "work", "cpu", every=20, snapshots=[])
    history = pd.read_csv(tmp_path / "work" / "training.csv")
    assert history.loss.iloc[-1] < 0.8 * torch.log(torch.tensor(float(len(CORPUS.vocabulary))))
    script.write_model(tmp_path / "out", recipe, CORPUS, model, tmp_path / "work")
    loaded = surgery.load(tmp_path / "out")
    tokens = surgery.Stack(loaded).tokens([" ".join(CORPUS.words(p)[1:]) for p in CORPUS.sample(1, 4, seed=0)])
    with torch.no_grad():
        assert torch.allclose(surgery.Stack(loaded).run(tokens), model(tokens.ids).logits, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "By language pair" in card
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["corpus"]["n_symbols"] == 10
    assert len(pd.read_csv(tmp_path / "out" / "accuracy.csv")) == 4 * 16


def test_batches_hold_training_problems_only():
    pools = script.Pools(CORPUS, RECIPE)
    out = {tuple(row[row != 0]) for k in range(3) for row in _heldout_rows(k)}
    for step in range(20):
        tokens, answers = pools.batch(step)
        assert not {tuple(row[row != 0].tolist()) for row in tokens} & out
        assert (answers.sum(1) >= 1).all()
        assert torch.equal(tokens, pools.batch(step)[0])


def _heldout_rows(k):
    return CORPUS.encode([problem for problem in CORPUS.problems(k) if CORPUS.heldout(problem)])[0]
