"""``studies/mean_reversion.py`` runs as its docstring says, on few prompts."""

import runpy
import sys

import pytest
from safetensors.torch import save_file

import surgery
from support.studies import STUDIES, run
from surgery import models
from surgery.records import tables


def test_mean_reversion_follows_wirings_and_training(tmp_path):
    other = models.plain(models.untrained(surgery.load("babel"), seed=1)).state_dict()
    save_file({name: weight.half() for name, weight in other.items()}, tmp_path / "step_000010.safetensors")
    options = ["--out", tmp_path / "out", "--prompts", "6", "--checkpoints", tmp_path]
    printed = run("mean_reversion.py", *options)
    said = [
        "Layers that push back at both sizes",
        "Taped together as :9 6:",
        "From the untrained model to the final one",
    ]
    said += ["these checkpoints are of another training run", "Is reversion stronger in the ends than in the middle?"]
    for words in said:
        assert words in printed, words
    assert printed.splitlines()[-1].startswith("In one sentence:")
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
