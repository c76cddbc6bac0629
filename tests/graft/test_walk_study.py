"""The study of walks: what is compared with what, what is said of planted answers, and its files."""

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from support.made_up_walks import NAMES, moved, on_and_off, planted
from surgery import graft
from surgery.corpus.splits import Split
from surgery.graft import draw, say, walk, walk_study
from surgery.instruments import known_networks
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.records import tables as frames

SCHEDULE = graft.Schedule(steps=4, batch=4, every=2)
KINDS = {"stationary": walk.Stationary(0.9)}
MOST = 1600


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walks")
    teacher = Stack(known_networks.random_network(n_layers=4, d_model=8))
    tokens = Tokens.of(known_networks.tokens(220, 8))
    data = Split(tokens[:200], tokens[216:], tokens[200:216])
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
        with pytest.raises(ValueError, match="the corpus has 1600 and its first prompt 8, give an amount between"):
            harvested(amount)
    with pytest.raises(ValueError, match="give at least one kind of walk"):
        next(walk_study.methods(teacher, harvested, 800, SCHEDULE, most=MOST, kinds={}))
    with pytest.raises(ValueError, match="give at least one amount of real tokens and one seed"):
        walk_study.run(teacher, harvested, data, "nowhere", amounts=(), most=MOST)


# --- planted answers -------------------------------------------------------------------------------------------------


def sentence(said: list[str], *words: str) -> str:
    (one,) = (one for one in said if all(word in one for word in words))
    return one


def test_a_walk_that_truly_helps_is_said_to_help_and_one_that_harms_to_harm():
    said = say.walks(planted(relabelled=0.1, unrelabelled=-0.1, more_real=0.05))
    assert len(said) == 2 * (4 + 1)
    assert sentence(said, "1,000 real tokens, stationary, relabelled: +0.10").endswith("helps.")
    assert sentence(said, "10,000 real tokens, stationary, unrelabelled: -0.10").endswith("harms.")
    assert sentence(said, "1,000 real tokens, longer:").endswith("no difference that matters (less than 0.01).")
    worth = sentence(said, "10,000 real tokens, stationary, relabelled, against as much more real data")
    assert "price: +0.048 [+0.045, +0.052]" in worth
    assert worth.count("helps more") == 2


def test_a_walk_may_help_less_than_as_much_real_data_would():
    one, other = say.walks_for_their_price(planted(relabelled=0.1, more_real=0.3))
    for said in (one, other):
        data, steps = said.split("Against as many more steps")
        assert "price: -0." in data
        assert "helps less" in data
        assert "helps more" in steps


def test_noise_is_undecided_and_one_seed_tells_nothing():
    for said in say.walks(planted(noise=0.2)):
        assert "undecided" in said
        assert "helps" not in said
    for said in say.walks(planted(seeds=1, relabelled=0.5)):
        assert "one seed tells nothing" in said
        assert "[" not in said


def test_too_few_real_data_to_compare_with_are_said_to_be():
    frame = planted()
    prices = {"stationary, relabelled": 2e9, "longer": 2e9, "more real": 2e9}
    spent = frame["method"].map(prices).fillna(1e9)
    assert say.short_of_real_data(frame.assign(operations_with_teacher=spent)) == []
    few = spent.mask((frame["method"] == "more real") & (frame["real_tokens"] == 10_000), 1.4e9)
    (said,) = say.short_of_real_data(frame.assign(operations_with_teacher=few))
    assert said.startswith("At 10,000 real tokens more real had 20,000, for 40% of what the relabelling cost")


def test_the_figure_has_a_line_a_method_and_a_dot_a_seed():
    figure = draw.walks(planted(relabelled=0.1))
    left, right = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES
    assert left.get_ylabel() == "held-out unexplained share of the update"
    assert right.get_ylabel() == "held-out loss, nats per token"
    assert left.get_xlabel() == right.get_xlabel() == "real tokens"
    assert left.get_xscale() == "log"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1,000", "10,000"]
    lines = [line for line in left.lines if line.get_label() in NAMES]
    assert [to_hex(line.get_color()).upper() for line in lines] == list(drawing.COLOURS[: len(NAMES)])
    dots = [line for line in left.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in dots] == [2 * 4] * len(NAMES)
    assert len({float(line.get_xdata()[0]) for line in lines}) == len(NAMES), "no line hides another"
    assert drawing.png(figure).startswith(b"\x89PNG")


# --- on the manifold or off it ---------------------------------------------------------------------------------------


def test_a_step_is_on_the_manifold_by_all_measures_or_off_it_by_those_that_say_so():
    near, off, shrunk = say.walked_activations(on_and_off())
    assert near.startswith("near, 0.40 of the spread moved: on the manifold as far as these measures show.")
    assert near.endswith("by squared distance, share beyond 95 % of real ones, distance to the nearest real one.")
    assert "off the manifold: distance to the nearest real one 3.00 [3.00, 3.00] where real ones have 1.00" in off
    assert "entropy 1.20 [1.20, 1.20] where real ones have 1.00 and the control 1.00." in off
    assert "squared distance 1.00" not in off
    assert off.endswith("by squared distance, share beyond 95 % of real ones.")
    assert "off the manifold: squared distance 0.50" in shrunk, "nearer to the mean than real ones is not real either"
    assert shrunk.endswith("by none of these measures.")


@pytest.mark.parametrize(
    ("half", "why"),
    [(0.5, "squared distance"), (float("nan"), "squared distance (no interval)"), (0.0, "entropy (nothing varies)")],
)
def test_a_step_is_not_on_the_manifold_because_nothing_is_known_of_it(half, why):
    """Wide intervals, one prompt, what does not vary: "on the manifold" would be a claim from nothing."""
    table = pd.DataFrame(
        [
            {"kind": kind, "control": control, "n_prompts": 1} | moved(half, nearest=3.0 if control else 1.0)
            for kind, control in (("real", False), ("near", False), ("near", True))
        ]
    )
    (said,) = say.walked_activations(table)
    assert ": undecided by squared distance" in said
    assert why in said
    assert "on the manifold" not in said
    assert half == 0.5 or said.endswith("by none of these measures.")


def test_what_is_written_is_read_again_with_its_figures(tmp_path):
    tables = {walk_study.METHODS: planted(relabelled=0.1), walk_study.MANIFOLD: on_and_off()}
    walk_study.write(tmp_path, tables, {"settings": {}})
    assert {path.name for path in tmp_path.glob("*.png")} == {"walk_methods.png", "walk_manifold.png"}
    for name, table in tables.items():
        pd.testing.assert_frame_equal(frames.read(tmp_path / name), table)


def test_scarce_data_is_harvested_in_full_precision(small):
    *_, harvested, _ = small
    assert harvested(800).batch([0]).x_start.dtype == torch.float32
