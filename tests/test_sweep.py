"""Grids of fresh middles: equal tokens, equal operations, resumable, and what is said of them."""

import pandas as pd
import pytest

from surgery import calibration, figures, graft, sweep
from surgery.graft_study import Data
from surgery.stack import Stack
from surgery.tokens import Tokens

SCHEDULE = graft.Schedule(steps=6, batch=4, every=3)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    teacher = Stack(calibration.random_network(n_layers=4))
    tokens = Tokens.of(calibration.tokens(24, 8))
    pairs, data = graft.latents(teacher, tokens[:16], 1, 3, folder / "latents"), Data(tokens[:16], tokens[16:])
    wide = teacher.model.cfg.d_mlp

    def again() -> pd.DataFrame:
        return sweep.run(
            teacher, pairs, data, folder / "sweep", widths=(wide, 4 * wide), depths=(2,), seeds=(0, 1),
            schedule=SCHEDULE, parts={3: Data(tokens[:16], tokens[16:20])},
        )  # fmt: skip

    return again(), wide, folder / "sweep", again


def test_every_cell_is_there_for_all_prompts_and_for_its_part(grid):
    frame, wide, folder, _ = grid
    assert set(frame) <= set(sweep.COLUMNS)
    assert len(frame) == 2 * 2 * 2 * 2
    assert frame.groupby(["budget", "d_mlp", "depth", "seed"])["k"].apply(list).map(str).eq("[nan, 3.0]").all()
    assert frame[frame["k"].isna()]["n_prompts"].eq(8).all()
    assert frame[frame["k"] == 3]["n_prompts"].eq(4).all()
    assert {path.name for path in folder.iterdir()} == {f"{b}_{w}x2_{s}" for b in sweep.BUDGETS
                                                        for w in (wide, 4 * wide) for s in (0, 1)}  # fmt: skip


def test_equal_tokens_are_equal_and_equal_operations_nearly(grid):
    frame, wide, *_ = grid
    whole = frame[frame["k"].isna()]
    tokens, operations = (whole[whole["budget"] == budget].set_index("d_mlp") for budget in sweep.BUDGETS)
    assert tokens["tokens"].nunique() == 1
    assert operations.loc[wide, "steps"].eq(SCHEDULE.steps).all()  # the original's own size
    assert operations.loc[4 * wide, "steps"].lt(SCHEDULE.steps).all()
    each = (operations["operations"] / operations["steps"]).groupby("d_mlp").mean()
    spent = operations["operations"].groupby("d_mlp").mean()
    assert abs(spent[wide] - spent[4 * wide]) <= each.max() / 2 * 1.01  # whole steps: half of one at most
    assert each[4 * wide] > 1.5 * each[wide]


def test_called_again_it_gives_the_same_without_training(grid, monkeypatch):
    frame, _, folder, again = grid
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoint.safetensors")}
    pd.testing.assert_frame_equal(again(), frame)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoint.safetensors")} == made


def made_up(factor: float, noise: float) -> pd.DataFrame:
    rows = []
    for seed in range(3):
        for width, times in ((128, 1.0), (256, factor)):
            loss = times * 0.1 * (1 + noise * (seed - 1) * (1 if width == 256 else -1))
            rows.append({"budget": "tokens", "d_mlp": width, "depth": 2, "seed": seed, "k": float("nan"),
                         "cross_entropy": loss, "cross_entropy_original": 0.01})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("factor", "noise", "said"),
    [(0.5, 0.01, "2.00 times as small a loss [1.9"), (0.5, 0.01, "better."), (2.0, 0.01, "worse."),
     (0.9, 0.4, "undecided.")],
)  # fmt: skip
def test_what_is_said_compares_seeds_in_pairs(factor, noise, said):
    (sentence,) = sweep.found(made_up(factor, noise), (128, 2))
    assert sentence.startswith("At equal tokens, width 256 and 2 layers: ")
    assert said in sentence


def test_one_seed_is_not_judged_and_without_the_usual_size_nothing_is_compared():
    frame = made_up(0.5, 0.0)
    assert sweep.found(frame[frame["seed"] == 0], (128, 2))[0].endswith("one seed tells nothing.")
    assert sweep.found(frame, (64, 2)) == []


def test_the_figure_has_a_panel_a_budget_and_a_line_a_depth(grid):
    figure = sweep.draw(grid[0])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["equal tokens", "equal operations"]
    assert figure.axes[0].lines[0].get_label() == "2 layers"
    assert figures.png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [{"widths": ()}, {"budgets": ("time",)}])
def test_an_empty_axis_or_unknown_budget_is_said(wrong, grid, tmp_path):
    teacher = Stack(calibration.random_network(n_layers=4))
    tokens = Tokens.of(calibration.tokens(8, 8))
    pairs = graft.latents(teacher, tokens, 1, 3, tmp_path / "latents")
    options = {"widths": (8,), "depths": (1,)} | wrong
    with pytest.raises(ValueError, match="give at least one width, depth and seed, and budgets of tokens, operations"):
        sweep.run(teacher, pairs, Data(tokens, tokens), tmp_path, **options)
