"""The study of walks: what is compared with what, what is said of planted answers, and its files."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from surgery import calibration, figures, frames, graft, graft_study, manifold, walk, walk_study
from surgery.graft_study import Data
from surgery.stack import Stack
from surgery.tokens import Tokens

SCHEDULE = graft.Schedule(steps=4, batch=4, every=2)
KINDS = {"stationary": walk.Stationary(0.9)}
NAMES = ["real", "stationary, relabelled", "stationary, unrelabelled", "longer", "more real"]
MOST = 1600


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walks")
    teacher = Stack(calibration.random_network(n_layers=4, d_model=8))
    tokens = Tokens.of(calibration.tokens(216, 8))
    data = Data(tokens[:200], tokens[200:])
    harvested = walk_study.harvester(teacher, data.corpus, (1, 3), folder)

    def again() -> pd.DataFrame:
        return walk_study.run(
            teacher, harvested, data, folder, amounts=(800,), most=MOST, seeds=(0, 1), schedule=SCHEDULE, kinds=KINDS
        )

    return again(), folder, again, teacher, harvested, data


def test_every_method_is_there_for_every_seed_in_a_folder_of_its_own(small):
    frame, folder, *_ = small
    assert set(frame) <= set(walk_study.COLUMNS[walk_study.METHODS])
    assert frame.groupby("seed")["method"].apply(list).tolist() == [NAMES, NAMES]
    assert frame["real_tokens"].eq(800).all()
    for name in ("real", "stationary_relabelled", "stationary_unrelabelled", "longer", "more_real"):
        for seed in (0, 1):
            assert (folder / f"{name}_800_{seed}" / "curve.csv").is_file(), name


def test_the_controls_cost_what_the_relabelling_does(small):
    frame, *_ = small
    first = frame[frame["seed"] == 0].set_index("method")
    spent, harvested = first["operations_with_teacher"], first["harvested"]
    paid = spent["stationary, relabelled"] - spent["real"]
    assert paid > 0
    assert spent["stationary, unrelabelled"] == spent["real"]
    prompt = 8 * (spent["more real"] - spent["real"]) / (harvested["more real"] - 800)
    assert abs(spent["more real"] - spent["real"] - paid) <= 1.05 * prompt < paid  # whole prompts
    step = first.loc["real", "operations"] / SCHEDULE.steps
    assert abs(spent["longer"] - spent["real"] - paid) <= 0.55 * step  # whole steps
    assert harvested.drop("more real").eq(800).all()


def test_called_again_it_gives_the_same_without_training(small):
    frame, folder, again, *_ = small
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoint.safetensors")}
    assert len(made) == 2 * len(NAMES)
    pd.testing.assert_frame_equal(again(), frame)
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_what_cannot_be_harvested_or_compared_is_said(small):
    *_, teacher, harvested, data = small
    for amount in (3, 1601):
        with pytest.raises(ValueError, match="the corpus has 1600 and its first prompt 8: give an amount from the one"):
            harvested(amount)
    with pytest.raises(ValueError, match="give at least one kind of walk"):
        next(walk_study.methods(teacher, harvested, 800, SCHEDULE, most=MOST, kinds={}))
    with pytest.raises(ValueError, match="give at least one amount of real tokens and one seed"):
        walk_study.run(teacher, harvested, data, "nowhere", amounts=(), most=MOST)


# --- planted answers -------------------------------------------------------------------------------------------------


def planted(noise: float = 0.002, seeds: int = 4, **gains: float) -> pd.DataFrame:
    """Unexplained shares: ``gains`` below what the real pairs leave, with noise that differs between methods."""
    rows = []
    for amount in (1000.0, 10_000.0):
        for seed in range(seeds):
            for place, name in enumerate(NAMES):
                gain = gains.get(name.split(", ")[-1].replace(" ", "_"), 0.0)
                luck = 0.1 * seed + noise * np.sin(2.4 * (seed + 1) * (place + 1))  # that of the seed all have alike
                missed = 0.6 + luck - gain
                rows.append({
                    "method": name, "seed": float(seed), "unexplained": missed, "cross_entropy": missed / 2,
                    "cross_entropy_original": 0.1, "damage": missed / 3, "steps": 4.0, "operations_with_teacher": 1e9,
                    "real_tokens": amount, "harvested": amount * (2 if name == "more real" else 1),
                })  # fmt: skip
    return pd.DataFrame(rows)


def sentence(said: list[str], *words: str) -> str:
    (one,) = (one for one in said if all(word in one for word in words))
    return one


def test_a_walk_that_truly_helps_is_said_to_help_and_one_that_harms_to_harm():
    said = walk_study.found(planted(relabelled=0.1, unrelabelled=-0.1, more_real=0.05))
    assert len(said) == 2 * (4 + 1)
    assert sentence(said, "1,000 real tokens, stationary, relabelled: +0.10").endswith("helps.")
    assert sentence(said, "10,000 real tokens, stationary, unrelabelled: -0.10").endswith("harms.")
    assert sentence(said, "1,000 real tokens, longer:").endswith("undecided.")
    worth = sentence(said, "10,000 real tokens, stationary, relabelled, against as much more real data")
    assert "price: +0.048 [+0.045, +0.052]" in worth
    assert worth.count("helps more") == 2


def test_a_walk_may_help_less_than_as_much_real_data_would():
    one, other = walk_study.worth(planted(relabelled=0.1, more_real=0.3))
    for said in (one, other):
        data, steps = said.split("Against as many more steps")
        assert "price: -0." in data
        assert "helps less" in data
        assert "helps more" in steps


def test_noise_is_undecided_and_one_seed_tells_nothing():
    for said in walk_study.found(planted(noise=0.2)):
        assert "undecided" in said
        assert "helps" not in said
    for said in walk_study.found(planted(seeds=1, relabelled=0.5)):
        assert "one seed tells nothing" in said
        assert "[" not in said


def test_too_few_real_data_to_compare_with_are_said_to_be():
    frame = planted()
    prices = {"stationary, relabelled": 2e9, "longer": 2e9, "more real": 2e9}
    spent = frame["method"].map(prices).fillna(1e9)
    assert walk_study.short(frame.assign(operations_with_teacher=spent)) == []
    few = spent.mask((frame["method"] == "more real") & (frame["real_tokens"] == 10_000), 1.4e9)
    (said,) = walk_study.short(frame.assign(operations_with_teacher=few))
    assert said.startswith("At 10,000 real tokens more real had 20,000, for 40% of what the relabelling cost")


def test_the_figure_has_a_line_a_method_and_a_dot_a_seed():
    figure = walk_study.draw(planted(relabelled=0.1))
    left, right = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES
    assert left.get_ylabel() == "held-out unexplained share of the update"
    assert right.get_ylabel() == "held-out loss, nats per token"
    assert left.get_xlabel() == right.get_xlabel() == "real tokens"
    assert left.get_xscale() == "log"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1,000", "10,000"]
    lines = [line for line in left.lines if line.get_label() in NAMES]
    assert [to_hex(line.get_color()).upper() for line in lines] == list(graft_study.COLOURS[: len(NAMES)])
    dots = [line for line in left.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in dots] == [2 * 4] * len(NAMES)
    assert len({float(line.get_xdata()[0]) for line in lines}) == len(NAMES), "no line hides another"
    assert figures.png(figure).startswith(b"\x89PNG")


# --- on the manifold or off it ---------------------------------------------------------------------------------------


def moved(**values: float) -> dict[str, float]:
    usual = {"moved": 0.0, "mahalanobis": 1.0, "beyond_real": 0.05, "beyond_chi_squared": 0.1, "nearest": 1.0,
             "entropy": 1.0, "entropy_change": 0.0} | values  # fmt: skip
    ends = {"": 0.0, "_low": -0.01, "_high": 0.01}
    return {f"{name}{end}": value + half for name, value in usual.items() for end, half in ends.items()}


def on_and_off() -> pd.DataFrame:
    far = {"moved": 0.4, "nearest": 3.0, "mahalanobis": 2.0, "beyond_real": 0.4}
    return pd.DataFrame([
        {"kind": "real", "control": False, "n_prompts": 250} | moved(),
        {"kind": "near", "control": False, "n_prompts": 250} | moved(moved=0.4, nearest=1.005),
        {"kind": "near", "control": True, "n_prompts": 250} | moved(**far),
        {"kind": "off", "control": False, "n_prompts": 250} | moved(moved=0.4, nearest=3.0, entropy_change=0.2),
        {"kind": "off", "control": True, "n_prompts": 250} | moved(**far),
        {"kind": "shrunk", "control": False, "n_prompts": 250} | moved(moved=0.4, mahalanobis=0.5),
        {"kind": "shrunk", "control": True, "n_prompts": 250} | moved(moved=0.4),
    ])  # fmt: skip


def test_a_step_is_on_the_manifold_by_all_measures_or_off_it_by_those_that_say_so():
    near, off, shrunk = manifold.found(on_and_off())
    assert near.startswith("near, 0.40 of the spread moved: on the manifold as far as these measures tell.")
    assert near.endswith("by squared distance, share beyond 95 % of real ones, distance to the nearest real one.")
    assert "off the manifold: distance to the nearest real one 3.00 [2.99, 3.01] where real ones have 1.00" in off
    assert "change of entropy 0.20 [0.19, 0.21] where real ones have 0.00 and the control 0.00." in off
    assert "squared distance 1.00" not in off
    assert off.endswith("by squared distance, share beyond 95 % of real ones.")
    assert "off the manifold: squared distance 0.50" in shrunk, "nearer to the mean than real ones is not real either"
    assert shrunk.endswith("by none of them.")


def test_what_is_written_is_read_again_with_its_figures(tmp_path):
    tables = {walk_study.METHODS: planted(relabelled=0.1), walk_study.MANIFOLD: on_and_off()}
    walk_study.write(tmp_path, tables, {"settings": {}})
    assert {path.name for path in tmp_path.glob("*.png")} == {"walk_methods.png", "walk_manifold.png"}
    for name, table in tables.items():
        pd.testing.assert_frame_equal(frames.read(tmp_path / name), table)


def test_scarce_data_is_harvested_in_full_precision(small):
    *_, harvested, _ = small
    assert harvested(800).batch([0]).x_start.dtype == torch.float32
