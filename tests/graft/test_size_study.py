"""Grids of fresh middles: equal tokens, equal operations, resumable, and what is said of them."""

import pandas as pd
import pytest

from surgery import graft
from surgery.corpus.splits import Split
from surgery.graft import draw, say, size_study
from surgery.instruments import known_networks
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.records import tables

SCHEDULE = graft.Schedule(steps=6, batch=4, every=3)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    teacher = Stack(known_networks.random_network(n_layers=4))
    tokens = Tokens.of(known_networks.tokens(28, 8))
    pairs = graft.latents(teacher, tokens[:16], 1, 3, folder / "latents")
    data = Split(tokens[:16], tokens[24:], tokens[16:24])
    wide = teacher.model.cfg.d_mlp

    def again() -> pd.DataFrame:
        return size_study.run(
            teacher,
            pairs,
            data,
            folder / "sweep",
            widths=(wide, 4 * wide),
            depths=(2,),
            seeds=(0, 1),
            schedule=SCHEDULE,
            parts={3: Split(tokens[:16], tokens[24:], tokens[16:20])},
        )

    return again(), wide, folder / "sweep", again


def test_every_cell_is_there_for_all_prompts_and_for_its_part(grid):
    frame, _, folder, _ = grid
    assert set(frame) <= set(size_study.COLUMNS)
    assert len(frame) == 2 * 2 * 2 * 2
    assert frame.groupby(["budget", "d_mlp", "depth", "seed"])["k"].apply(list).map(str).eq("[nan, 3.0]").all()
    assert frame[frame["k"].isna()]["n_prompts"].eq(8).all()
    assert frame[frame["k"] == 3]["n_prompts"].eq(4).all()
    assert {path.name for path in folder.iterdir()} == {
        f"{width}x2_{steps}_{seed}"
        for width, steps, seed in frame[["d_mlp", "steps", "seed"]].astype(int).itertuples(index=False, name=None)
    }


def test_equal_tokens_are_equal_and_equal_operations_nearly(grid):
    frame, wide, *_ = grid
    whole = frame[frame["k"].isna()]
    tokens, operations = (whole[whole["budget"] == budget].set_index("d_mlp") for budget in size_study.BUDGETS)
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


def test_a_cross_is_the_row_and_the_column_through_the_usual_size(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(size_study, "trained", lambda *arguments: asked.append(arguments[4]) or iter(()))
    teacher, tokens = Stack(known_networks.random_network(n_layers=2)), Tokens.of(known_networks.tokens(8, 8))
    pairs = graft.latents(teacher, tokens, 1, 2, tmp_path / "latents")
    data = Split(tokens[:4], tokens[4:6], tokens[6:])
    size_study.run(teacher, pairs, data, tmp_path, widths=(1, 2, 3), depths=(4, 5), cross=(2, 5))
    assert asked == [[(1, 5), (2, 4), (2, 5), (3, 5)]]


def made_up(factor: float, noise: float) -> pd.DataFrame:
    rows = []
    for seed in range(3):
        for width, times in ((128, 1.0), (256, factor)):
            loss = times * 0.1 * (1 + noise * (seed - 1) * (1 if width == 256 else -1))
            rows.append(
                {
                    "budget": "tokens",
                    "d_mlp": width,
                    "depth": 2,
                    "seed": seed,
                    "k": float("nan"),
                    "cross_entropy": loss,
                    "cross_entropy_original": 0.01,
                }
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("factor", "noise", "said"),
    [
        (0.5, 0.01, "2.00 times as small a loss [1.9"),
        (0.5, 0.01, "better."),
        (2.0, 0.01, "worse."),
        (0.9, 0.4, "undecided."),
        (0.999, 0.0001, "no difference that matters (less than 1.05 times)."),
    ],
)
def test_what_is_said_compares_seeds_in_pairs(factor, noise, said):
    (sentence,) = say.sizes(made_up(factor, noise), (128, 2))
    assert sentence.startswith("At equal tokens, width 256 and 2 layers: ")
    assert said in sentence


def test_one_seed_is_not_judged_and_without_the_usual_size_nothing_is_compared():
    frame = made_up(0.5, 0.0)
    assert say.sizes(frame[frame["seed"] == 0], (128, 2))[0].endswith("undecided (one seed tells nothing).")
    assert say.sizes(frame, (64, 2)) == []


def by_steps(gain: float, noise: float = 0.0, seeds: int = 3) -> pd.DataFrame:
    """Exact answers of two sizes: nothing between them at k = 0, ``gain`` at k = 4."""
    rows = [
        {
            "budget": "tokens",
            "d_mlp": width,
            "depth": 2,
            "seed": seed,
            "k": float(k),
            "exact": 0.5
            + 0.1 * seed
            + (gain if (k, width) == (4, 256) else 0.0)
            + noise * (-1) ** (seed + width // 256),
        }
        for seed in range(seeds)
        for width in (128, 256)
        for k in (0, 4)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("gain", "noise", "verdict"), [(0.1, 0.001, "better"), (-0.1, 0.001, "worse"), (0.1, 0.2, "undecided")]
)
def test_at_each_k_sizes_are_compared_seed_by_seed(gain, noise, verdict):
    frame = by_steps(gain, noise)
    found = size_study.by_k(frame, (128, 2)).set_index(["d_mlp", "k"])
    assert set(found.reset_index()) == set(size_study.BY_K)
    assert found.loc[(256, 4), "verdict"] == verdict
    nothing = "no difference that matters (less than 0.01)" if noise < 0.01 else "undecided"
    assert found.loc[(256, 0), "verdict"] == nothing
    assert found.loc[128, "verdict"].isna().all()
    assert found.loc[(128, 0), "exact_low"] < 0.6 < found.loc[(128, 0), "exact_high"], "seeds differ by 0.1"
    (sentence,) = say.sizes_by_k(size_study.by_k(frame, (128, 2)), (128, 2))
    assert sentence.startswith("Exact answers at equal tokens, width 256 and 2 layers, and their difference from width")
    assert f" {verdict}." in sentence
    assert "k = 0 " in sentence


def test_by_k_one_seed_is_not_judged_and_without_answers_there_is_nothing(grid):
    (sentence,) = say.sizes_by_k(size_study.by_k(by_steps(0.1, seeds=1), (128, 2)), (128, 2))
    assert sentence.count("one seed tells nothing") == 2
    assert say.sizes_by_k(size_study.by_k(grid[0], (grid[1], 2)), (grid[1], 2)) == []
    assert len(size_study.by_k(grid[0], (grid[1], 2))) == 0


def test_what_is_written_is_read_again_with_its_figure(grid, tmp_path):
    size_study.write(tmp_path, grid[0], {"settings": {"usual": (grid[1], 2)}})
    pd.testing.assert_frame_equal(tables.read(tmp_path / "width_of_thought.csv"), grid[0])
    assert (tmp_path / "width_of_thought.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_a_panel_a_budget_and_a_line_a_depth(grid):
    figure = draw.sizes(grid[0])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["equal tokens", "equal operations"]
    assert figure.axes[0].lines[0].get_label() == "2 layers"
    assert drawing.png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [{"widths": ()}, {"budgets": ("time",)}])
def test_an_empty_axis_or_unknown_budget_is_said(wrong, grid, tmp_path):
    teacher = Stack(known_networks.random_network(n_layers=4))
    tokens = Tokens.of(known_networks.tokens(8, 8))
    pairs = graft.latents(teacher, tokens, 1, 3, tmp_path / "latents")
    options = {"widths": (8,), "depths": (1,)} | wrong
    with pytest.raises(ValueError, match="give at least one width, depth and seed, and budgets of tokens, operations"):
        size_study.run(teacher, pairs, Split(tokens[:4], tokens[4:6], tokens[6:]), tmp_path, **options)
