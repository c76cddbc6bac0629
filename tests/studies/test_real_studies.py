"""The studies of real models and the atlas, on the bundled one and few prompts: each makes what its docstring lists."""

import pandas as pd
import pytest

from support.studies import run
from surgery import atlas
from surgery.compiler.frontier import ALLOWANCES
from surgery.records import tables


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An atlas of the bundled model, of ten problems."""
    folder = tmp_path_factory.mktemp("atlas")
    printed = run("atlas.py", "--prompts", "2", "--longest", "3", "--out", folder)
    assert "swap: the least damage is" in printed
    return folder


def test_the_atlas_is_tidy_and_reads_back(made):
    assert atlas.models(made) == ["babel"]
    items, wirings = atlas.read("babel", "items", made), atlas.read("babel", folder=made)
    assert set(items.family) == {"repeat", "skip", "parallel", "swap"}
    means = items.assign(added=items.loss - items.baseline).groupby(["family", "wiring"]).added.mean()
    expected = wirings.set_index(["family", "wiring"]).loss
    pd.testing.assert_series_equal(means, expected, check_names=False, check_like=True, check_dtype=False, atol=1e-4)
    assert set(atlas.read("babel", "windows", made).columns) >= {"S", "S_matched", "kind"}
    settings = atlas.manifest("babel", made)["settings"]
    assert max(settings["exactness"].values()) < 1e-4
    assert {"seconds", "peak_memory", "texts"} <= set(settings)


def test_series(made, tmp_path):
    printed = run(
        "real_series.py", "--atlas", made, "--model", "babel", "--prompts", "1", "--fresh", "4", "--out", tmp_path
    )
    assert "run in parallel for less than 0.01 nats" in printed
    heard = tables.read(tmp_path / "real_horizon.csv")
    assert heard[(heard.k == 11) & (heard.model == "babel")].loss.abs().max() < 1e-5
    pairs = tables.read(tmp_path / "real_pairs.csv")
    assert pairs.groupby("form").layer.agg(list).tolist() == [list(range(1, 11))] * 2
    assert (pairs.loss_low <= pairs.loss).all()
    assert (tmp_path / "real_series.png").exists()


def test_three_parts(made, tmp_path):
    options = ("--prompts", "8", "--draws", "19", "--atlas", made)
    printed = run("three_parts.py", *options, "--out", tmp_path)
    frame = tables.read(tmp_path / "three_parts.csv")
    assert frame.groupby("model").size().tolist() == [6] * 5
    of_network = frame[frame.model == "wired in three parts"].set_index(["family", "looked_for"])
    assert of_network.p["parallel", "3"] == 0.05  # none of 19 draws
    assert (of_network.parts[["swap", "parallel"]] == ":6 6:12 12:").all()
    assert "wired as a chain, random tokens, swap: of 3 parts" in printed


def test_repeats_and_anti_layers(tmp_path):
    options = ("--model", "babel", "--count", "16", "--prompts", "4", "--sets", "text", "--share", "1")
    printed = run("real_repeats.py", *options, "--out", tmp_path)
    assert "replaced by its neighbours' mean" in printed
    frame = tables.read(tmp_path / "anti_layers.csv")
    assert len(frame) == 12
    assert (tmp_path / "repeats.csv").exists()


def test_width_and_walks(tmp_path):
    run("real_width.py", "--model", "babel", "--prompts", "16", "--max-tokens", "16", "--out", tmp_path)
    walked, narrower = (tables.read(tmp_path / f"real_{name}.csv") for name in ("walk", "narrower"))
    assert set(walked.kind) >= {"along what is read least", "along what is read most"}
    assert set(narrower.part) == {"mlp", "heads", "stream"}


def test_redundancy(tmp_path):
    options = ("--model", "babel", "--prompts", "6", "--pairs", "3", "--out", tmp_path)
    run("real_dropout.py", *options)
    assert set(tables.read(tmp_path / "real_redundancy.csv").units) == {"layers", "mlps", "heads"}
    assert (tmp_path / "real_dropout.png").exists()
    before = (tmp_path / "real_masks.csv").read_bytes()
    assert "heads" not in run("real_dropout.py", *options)  # it is there already
    assert (tmp_path / "real_masks.csv").read_bytes() == before


def test_reversion_and_arrival(tmp_path):
    printed = run("real_reversion.py", "--model", "babel", "--prompts", "6", "--draws", "1", "--out", tmp_path)
    assert "tr J/d" in printed
    assert len(tables.read(tmp_path / "real_arrival.csv")) == 2 * 11


def test_a_fresh_middle(tmp_path):
    options = ("--model", "babel", "--middle", "4", "9", "--prompts", "300", "--steps", "4", "--heal", "1")
    printed = run("real_middle.py", *options, "--max-tokens", "16", "--batch", "8", "--out", tmp_path)
    methods = tables.read(tmp_path / "graft_methods.csv").method.tolist()
    assert methods == ["skip", "mean update", "linear map", "graft", "graft, healed", "cross entropy only"]
    assert tables.read(tmp_path / "real_elsewhere.csv").method.tolist() == methods
    assert "The page is" in printed


def test_compile(tmp_path):
    options = ("--prompts", "24", "--shallowest", "11", "--rounds", "0", "--heal", "low-rank", "--out", tmp_path)
    printed = run("compile.py", *options)
    assert "layers in a row" in printed or "no wiring is shown to save a layer" in printed
    frame = tables.read(tmp_path / "compile.csv")
    assert frame.groupby("family")["allowance"].apply(tuple).map(ALLOWANCES.__eq__).all()
    assert {"side by side", "left out", "random pairs", "linear map"} <= set(frame["family"])
    assert (frame.cost_high <= frame.allowance)[frame.saved > 0].all()
    assert (tmp_path / "babel" / "report.html").exists()
