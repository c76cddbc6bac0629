"""Superposition is counted exactly where it is known, trained as theory says, and told from mere shrinkage."""

import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from support.places import REPOSITORY
from surgery import stats
from surgery.dropout import draw, say
from surgery.dropout import toy_model as toy
from surgery.records import tables

BENCHMARKS = REPOSITORY / "benchmarks"


def polygon(n):
    angle = 2 * torch.pi * torch.arange(n, dtype=torch.float64) / n
    return torch.stack([angle.cos(), angle.sin()])


def antiprism():
    """The eight corners of a square antiprism whose sum D is its three dimensions."""
    angle = torch.pi / 4 * torch.arange(8, dtype=torch.float64)
    flat, high = (2 / 3) ** 0.5, (1 / 3) ** 0.5
    return torch.stack([flat * angle.cos(), flat * angle.sin(), high * (-1.0) ** torch.arange(8)])


TETRAHEDRON = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 3**0.5
ARRANGED = {
    "alone": (torch.eye(3, dtype=torch.float64), 1),
    "tetrahedron": (TETRAHEDRON, 3 / 4),
    "triangle": (polygon(3), 2 / 3),
    "antipodal pair": (torch.tensor([[1.0, -1.0]], dtype=torch.float64), 1 / 2),
    "pentagon": (polygon(5), 2 / 5),
    "square antiprism": (antiprism(), 3 / 8),
}


def trained(cells, **settings):
    sparsity, rate, seed = (torch.tensor(axis) for axis in zip(*cells))
    *_, (w, b) = toy.training(sparsity.float(), rate.float(), seed.long(), **settings)
    return w, b, toy.loss(w, b, sparsity.float(), settings.get("decay", 0.7))


# --- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRANGED)
@pytest.mark.parametrize("size", [1.0, 0.6])
def test_known_arrangements_have_their_dimensionality_turned_and_at_any_size(name, size):
    w, expected = ARRANGED[name]
    turn = stats.rotation(torch.randn(len(w), len(w), dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    w = size * turn @ w
    torch.testing.assert_close(toy.dimensionality(w), torch.full((w.shape[1],), expected, dtype=w.dtype))
    assert set(toy.geometry(w)) == {name}
    assert toy.dimensionality(w).sum() == pytest.approx(len(w))  # they fill the space
    torch.testing.assert_close(toy.features_per_dimension(w).item(), size**2 / expected)
    assert toy.effective_features(w).item() == pytest.approx(w.shape[1] / len(w))
    torch.testing.assert_close(toy.interference(w), torch.full_like(w[0], size**2 * (1 / expected - 1)))


def test_no_arrangement_has_more_than_its_dimensions_and_capacity_is_dimensionality():
    generator = torch.Generator().manual_seed(0)
    for n_hidden, n_features in ((1, 3), (2, 5), (5, 5), (5, 20), (7, 3)):
        w = torch.randn(200, n_hidden, n_features, generator=generator, dtype=torch.float64)
        share = toy.dimensionality(w)
        assert (share.sum(-1) <= min(n_hidden, n_features) + 1e-9).all()
        assert share.sum(-1).min() < min(n_hidden, n_features) - 1e-3 or 1 in w.shape
        torch.testing.assert_close(toy.capacity(w), share)


def test_features_that_are_not_there_count_for_nothing():
    w = torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.0, 0.0]])
    assert toy.dimensionality(w)[1] == toy.interference(w)[1] == 0
    assert toy.represented(w).tolist() == [True, False, False]
    assert toy.geometry(w) == ["other", "absent", "absent"]
    empty = toy.measures(torch.zeros(1, 2, 3))
    assert empty["represented"] == empty["features_per_dimension"] == 0
    assert all(empty[name].isnan().all() for name in ("dimensionality", "interference", "superposed"))


def test_the_measures_of_a_mixed_arrangement():
    w = torch.tensor([[[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]])
    said = {name: value.item() for name, value in toy.measures(w).items()}
    assert said["features_per_dimension"] == said["represented"] == said["effective_features"] == pytest.approx(1.5)
    assert said["dimensionality"] == said["superposed"] == said["interference"] == pytest.approx(2 / 3)
    assert said["capacity"] == pytest.approx(1)


# --- training --------------------------------------------------------------------------------------------------------


def test_a_cell_alone_in_a_sweep_and_by_autograd_is_the_same(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    alone = runpy.run_path(str(BENCHMARKS / "superposition.py"))["alone"]
    cells = [(s, p, seed) for s in (0.0, 0.5, 0.9) for p in (0.0, 0.3) for seed in (0, 7)]
    w, b, _ = trained(cells, steps=150)
    assert (w[0] - w[2]).abs().max() > 0.01  # dropout does something
    for i in (0, 5, 11):
        own_w, own_b, _ = trained([cells[i]], steps=150)
        torch.testing.assert_close(own_w[0], w[i], atol=2e-5, rtol=0)
        torch.testing.assert_close(own_b[0], b[i], atol=2e-5, rtol=0)
        by_autograd, bias = alone(*cells[i], steps=150)
        torch.testing.assert_close(by_autograd, w[i], atol=2e-5, rtol=0)
        torch.testing.assert_close(bias, b[i], atol=2e-5, rtol=0)


def test_checkpoints_are_on_the_way():
    settings = {"n_features": 4, "n_hidden": 2, "steps": 20}
    cell = (torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    seen = [w.clone() for w, _ in toy.training(*cell, **settings, checkpoints=(0, 10, 20))]
    assert len(seen) == 3
    assert (seen[0] - seen[1]).abs().min() > 0.01
    torch.testing.assert_close(seen[2], trained([(0.0, 0.0, 0)], **settings)[0])


def test_examples_are_as_sparse_as_they_say_and_uniform_otherwise():
    uniform = torch.rand(1, 20_000, 1, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    x = toy.examples(uniform, torch.tensor([0.0, 0.5, 0.9]))[..., 0]
    for row, sparsity in zip(x, (0.0, 0.5, 0.9)):
        there = row[row > 0]
        assert (row == 0).float().mean() == pytest.approx(sparsity, abs=0.01)
        assert np.quantile(there, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def test_dropout_shrinks_a_feature_that_is_alone_to_one_minus_its_rate():
    """Where its only unit is kept, |W|^2 / (1 - p) = 1 is exact; where it is dropped, ReLU(0) passes no gradient."""
    cells = [(s, p, 0) for s in (0.0, 0.5, 0.9) for p in (0.0, 0.2, 0.5)]
    w, b, _ = trained(cells, n_features=1, n_hidden=1, steps=3000, batch=64)
    assert w.square().flatten().tolist() == pytest.approx([1 - p for _, p, _ in cells], abs=0.01)
    assert b.abs().max() < 0.01
    assert toy.features_per_dimension(w).tolist() == pytest.approx([1 - p for _, p, _ in cells], abs=0.01)
    assert toy.effective_features(w).tolist() == pytest.approx([1] * 9)  # free of scale
    assert toy.dimensionality(w).flatten().tolist() == pytest.approx([1] * 9)


def test_dense_features_get_a_dimension_each_by_importance_and_the_others_none():
    w, _, _ = trained([(0.0, 0.0, seed) for seed in range(3)], n_features=6, n_hidden=3, steps=2000, decay=0.5)
    for one in w:
        assert toy.geometry(one) == ["alone"] * 3 + ["absent"] * 3


@pytest.mark.parametrize(("n_features", "n_hidden", "name"), [(2, 1, "antipodal pair"), (5, 2, "pentagon")])
def test_sparse_features_of_equal_importance_arrange_themselves(n_features, n_hidden, name):
    cells = [(0.95, 0.0, seed) for seed in range(8)]
    w, _, lost = trained(cells, n_features=n_features, n_hidden=n_hidden, steps=1200, batch=256, decay=1.0)
    assert toy.geometry(w[lost.argmin()]) == [name] * n_features  # the best of eight starts


# --- the sweep and what it says --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept():
    return toy.sweep((0.0, 0.97), (0.0, 0.35), (0, 1, 2), steps=1500)


def test_a_sweep_has_a_row_per_cell_all_columns_and_survives_the_disk(swept, tmp_path):
    assert tuple(swept.columns) == tuple(toy.COLUMNS)
    assert len(swept[["sparsity", "rate", "seed"]].drop_duplicates()) == len(swept) == 12
    path = tables.write(swept, tmp_path / "superposition.csv", {"seed": 0}, toy.COLUMNS)
    pd.testing.assert_frame_equal(tables.read(path), swept, check_dtype=False, rtol=0, atol=0)
    table = toy.differences(swept)
    path = tables.write(table, tmp_path / "differences.csv", {"seed": 0}, toy.DIFFERENCES)
    pd.testing.assert_frame_equal(tables.read(path), table, check_dtype=False, rtol=0, atol=0)


def test_trained_alone_a_row_reads_the_same(swept):
    again = toy.sweep((0.97,), (0.0,), (1,), steps=1500).iloc[0]
    row = swept[(swept["sparsity"] == 0.97) & (swept["rate"] == 0) & (swept["seed"] == 1)].iloc[0]
    for name in ("loss", "features_per_dimension", "effective_features"):
        assert again[name] == pytest.approx(row[name], rel=0.02)


def test_models_without_dropout_are_their_own_match_and_the_others_matches_are_less_trained(swept):
    none, dropped = swept[swept["rate"] == 0], swept[swept["rate"] > 0]
    for name in toy.MATCHED:
        assert none[f"{name}_matched"].to_numpy() == pytest.approx(none[name].to_numpy(), rel=1e-6)
    assert (dropped["loss"].to_numpy() > none["loss"].to_numpy()).all()
    assert (dropped["effective_features_matched"].to_numpy() > none["effective_features"].to_numpy()).all()


def test_the_match_is_where_the_loss_last_came_down_to_it():
    losses, frame = [9.0, 2.0, 4.0, 1.0], pd.DataFrame({"sparsity": 0.5, "seed": 0, "rate": [0.0] + [0.5] * 4})
    frame["loss"] = [1.0, 2.5, 9.5, 0.5, 1.0]
    history = [
        {"loss": torch.tensor([lost])} | {name: torch.tensor([10.0 * i]) for name in toy.MATCHED}
        for i, lost in enumerate(losses)
    ]
    matched = toy._matched(frame, history)["interference_matched"]
    assert matched[[0, 1, 3, 4]].tolist() == pytest.approx([30, 25, 30, 30])
    assert np.isnan(matched[2])  # worse than an untrained one


def test_dropout_lowers_superposition_of_sparse_features_and_not_of_dense_ones_of_varied_importance(swept):
    (sentence,) = say.toy_model(swept)
    assert "sparsity by sparsity it lowers superposition at sparsity 0.97 and raises it at sparsity 0;" in sentence
    table = toy.differences(swept).query("sparsity == 0 and control == 'steps'").set_index("measure")
    assert table.loc["features_per_dimension", "verdict"] == "lower"  # as its weights shrink
    assert table.loc["effective_features", "verdict"] == "higher"  # though it has more of them


def made_up(changes, seeds=4, spread=0.01):
    """A sweep in which dropout at .5 changes (effective features, dimensionality) by what is said per sparsity."""
    rng, rows = np.random.default_rng(0), []
    for sparsity, (features, share) in changes.items():
        for seed in range(seeds):
            for rate in (0.0, 0.5):
                by = (rate > 0) * np.array([features, share]) + spread * rng.standard_normal(2)
                values = dict(zip(("effective_features", "dimensionality"), np.array([1.5, 0.7]) + by + seed))
                values |= {"features_per_dimension": 1.0, "interference": 0.3}
                values |= {f"{name}_matched": values[name] for name in toy.MATCHED}
                rows.append({"decay": 0.9, "sparsity": sparsity, "rate": rate, "seed": seed, **values})
    return pd.DataFrame(rows)


def test_differences_are_paired_by_seed():
    table = toy.differences(made_up({0.0: (-0.5, 0.1), 0.9: (-0.3, 0.1)}))
    steps = table[(table["control"] == "steps") & (table["measure"] == "effective_features")]
    assert steps["sparsity"].isna().tolist() == [True, False, False]
    assert steps["difference"].tolist() == pytest.approx([-0.4, -0.5, -0.3], abs=0.02)
    assert (steps["difference_high"] - steps["difference_low"] < 0.1).all()  # seeds differ by 1 each: that cancels
    assert set(table["n_seeds"]) == {4}


@pytest.mark.parametrize(
    ("changes", "seeds", "said"),
    [
        ({0.0: (-0.5, 0.2), 0.9: (-0.3, 0.2)}, 4, "dropout lowers superposition at rate 0.5 (at rate 0.5, 4 seeds"),
        ({0.0: (0.5, -0.2), 0.9: (0.3, -0.2)}, 4, "dropout raises superposition at rate 0.5"),
        ({0.0: (0.5, -0.2), 0.9: (-0.5, 0.2)}, 4, "lowers superposition at sparsity 0.9 and raises it at sparsity 0;"),
        ({0.0: (0.0, 0.0), 0.9: (0.0, 0.0)}, 4, "dropout does not clearly change superposition anywhere"),
        (
            {0.0: (-0.5, -0.2), 0.9: (-0.5, -0.2)},
            4,
            "dropout does not clearly change superposition anywhere",
        ),  # they disagree
        ({0.0: (-0.5, 0.2), 0.9: (-0.5, 0.2)}, 1, "dropout does not clearly change superposition anywhere"),  # one seed
        ({0.0: (-0.5, 0.2), 0.9: (-0.3, 0.2)}, 4, "at equal loss, it does not clearly change superposition anywhere."),
    ],
)
def test_what_is_found_follows_the_differences(changes, seeds, said):
    assert said in say.toy_model(made_up(changes, seeds))[0]


def test_small_changes_are_not_spoken_of_however_certain():
    (sentence,) = say.toy_model(made_up({0.0: (-0.005, 0.005), 0.9: (-0.005, 0.005)}, spread=1e-5))
    assert "sparsity by sparsity it does not clearly change superposition anywhere" in sentence


def test_the_figure_shows_the_means_over_seeds_in_their_places(swept):
    both = pd.concat([swept, swept.assign(decay=1.0)])
    figure = draw.toy_model(both)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 8
    for axes, name in zip(panels, list(draw.TOY_PANELS) * 2):
        shown = axes.images[0].get_array()
        for column, sparsity in enumerate((0.0, 0.97)):
            for row, rate in enumerate((0.0, 0.35)):
                cell = swept[(swept["sparsity"] == sparsity) & (swept["rate"] == rate)]
                assert shown[row, column] == pytest.approx(cell[name].mean())
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == ["0", "0.97"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((0.5, 1.0),), "sparsities are probabilities from 0 to below 1, and 1 is not one"),
        (((0.5,), (0.0, -0.1)), "rates are probabilities from 0 to below 1, and -0.1 is not one"),
        (((0.5,), (0.1, 0.5)), "rates 0.1, 0.5 have nothing to be compared with: put 0 among them"),
    ],
)
def test_what_cannot_be_swept_says_why(arguments, said):
    with pytest.raises(ValueError, match=said):
        toy.sweep(*arguments, steps=1)
