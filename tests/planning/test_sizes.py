"""The sizes of a script or a training: as large as fits, never smaller for more time, and the same when it goes on."""

import argparse
import itertools
import json
import math

import pytest
import torch

from support import fixtures
from surgery import Stack
from surgery.models.tokens import Tokens
from surgery.planning import remembered, sizes
from surgery.planning.machine import Machine, Work

MACHINE = Machine(forward=1.0, backward=3.0, readouts=0.0, products=0.0)
STAGES = (
    {"prompts": 4, "steps": 10, "seeds": 1, "full": 0},
    {"prompts": 64, "steps": 100},
    {"steps": 1000},
    {"seeds": 3},
    {"full": 1},
)


def work(size):
    return Work(forward=size["seeds"] * (size["prompts"] + size["steps"]) * (1 + size["full"]), memory=size["prompts"])


def choose(budget, limits=None, **options):
    return sizes.choose(sizes.levels(STAGES, work, limits), MACHINE, budget, **options)


def test_levels_lead_from_stage_to_stage_and_no_size_ever_falls():
    rungs = [dict(level.settings) for level in sizes.levels(STAGES, work)]
    whole = {"prompts": 64, "steps": 1000, "seeds": 3, "full": 1}
    assert rungs[0] == STAGES[0]
    assert rungs[-1] == whole
    assert {**whole, "steps": 100, "seeds": 1, "full": 0} in rungs
    for before, after in itertools.pairwise(rungs):
        assert before != after
        assert all(before[name] <= after[name] for name in whole)
        assert all(after[name] <= max(before[name] + 1, math.ceil(1.16 * before[name])) for name in whole)


@pytest.mark.parametrize("spent", [0, 40])
def test_a_choice_fits_and_a_larger_budget_never_buys_less(spent):
    before = None
    for budget in (70, 100, 200, 500, 1500, 5000, 10_000, math.inf):
        choice = choose(budget, spent=spent, after=5)
        assert choice.seconds <= budget
        assert choice.seconds == pytest.approx(spent + 5 + work(choice.sizes).forward)
        assert before is None or all(before[name] <= size for name, size in choice.sizes.items())
        before = choice.sizes
    assert choice.sizes == choice.asked
    assert choice.cuts == []
    assert choice.told == ""


def test_memory_is_kept_too():
    assert choose(math.inf, memory=20).sizes["prompts"] <= 20
    with pytest.raises(ValueError, match="MiB beside the model"):
        choose(math.inf, memory=2)


def test_limits_are_kept_and_what_is_cut_is_told():
    assert choose(math.inf, {"steps": 50, "prompts": 2}).sizes == {"prompts": 2, "steps": 50, "seeds": 3, "full": 1}
    choice = choose(130, {"seeds": 1, "full": 0})
    assert choice.sizes["steps"] < 100
    assert f"steps: {choice.sizes['steps']} of 1000" in choice.cuts
    assert not [cut for cut in choice.cuts if "seeds" in cut or "full" in cut]
    assert choice.told == f"To fit into 2 min this was cut: {'; '.join(choice.cuts)}."
    assert "of 1000" in str(choice)
    assert "full" not in str(choice), "nobody asked for it"


def test_a_budget_that_holds_nothing_is_refused_in_words():
    with pytest.raises(ValueError, match=r"nothing fits into 10 s: the least \(prompts 4, steps 10, .* with --budget"):
        choose(10)


def test_a_choice_survives_json():
    for budget in (100, math.inf):
        choice = choose(budget)
        assert sizes.Choice.of_json(json.loads(json.dumps(choice.json()))) == choice


# --- kept beside the work --------------------------------------------------------------------------------------------


def test_a_plan_is_kept_for_the_same_command_and_for_nothing_else(tmp_path):
    file = tmp_path / "plan.json"
    made = iter({"steps": count} for count in range(9))

    def planned(**identity):
        return remembered.planned(file, identity, lambda: next(made))

    assert planned(seed=0) == ({"steps": 0}, False)
    assert planned(seed=0) == ({"steps": 0}, True)
    assert planned(seed=1) == ({"steps": 1}, False)
    assert planned(seed=0) == ({"steps": 2}, False)
    file.write_text(file.read_text().replace('"steps": 2', '"steps": 7'))  # damaged: its checksum is another
    assert planned(seed=0) == ({"steps": 3}, False)
    for broken in ("", "[]", "{", '{"format": 0}'):
        file.write_text(broken)
        assert planned(seed=0)[1] is False


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stack():
    return Stack(fixtures.native())


def parsed(*words, **defaults):
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--full", action="store_true")
    parser.set_defaults(steps=None, seeds=None, out="results", **defaults)
    sizes.add_option(parser)
    return parser.parse_args(list(words))


def settle(args, stack, folder, said, speed=1.0, monkeypatch=None):
    tokens = Tokens.of(torch.arange(64).reshape(8, 8) % stack.d_vocab)
    machine = Machine(forward=speed, backward=1.0, readouts=0.0, products=0.0)
    monkeypatch.setattr(Machine, "of", classmethod(lambda *_: machine))
    return sizes.settle(args, STAGES, lambda size, shape_of: work(size), stack, folder, tokens, say=said.append)


def test_a_script_without_a_budget_is_left_alone(stack, tmp_path, monkeypatch):
    args, said = parsed(), []
    assert settle(args, stack, tmp_path, said, monkeypatch=monkeypatch) is None
    assert (args.prompts, args.steps, said, list(tmp_path.iterdir())) == (None, None, [], [])


def test_a_script_gets_sizes_says_them_and_goes_on_with_them_on_a_slower_machine(stack, tmp_path, monkeypatch):
    first, again, other = parsed("--budget", "10m"), parsed("--budget", "10m"), parsed("--budget", "20m")
    said = []
    choice = settle(first, stack, tmp_path, said, monkeypatch=monkeypatch)
    assert {name: getattr(first, name) for name in choice.sizes} == choice.sizes
    assert said == [str(choice)]
    assert settle(again, stack, tmp_path, said, speed=2.0, monkeypatch=monkeypatch) == choice
    assert said[-1].startswith("going on with the plan in ")
    assert settle(other, stack, tmp_path, said, monkeypatch=monkeypatch).sizes["steps"] > choice.sizes["steps"]


def test_a_number_that_a_script_is_given_is_what_is_asked_for(stack, tmp_path, monkeypatch):
    for asked in (1, 8, 500):
        args = parsed("--budget", "none", "--prompts", str(asked))
        choice = settle(args, stack, tmp_path, [], monkeypatch=monkeypatch)
        assert (args.prompts, args.full, choice.asked["prompts"]) == (asked, 1, asked)
        assert choice.cuts == []


def test_what_a_script_cut_is_told_at_the_end():
    said = []
    sizes.tell(None, said.append)
    sizes.tell(choose(math.inf), said.append)
    assert said == []
    sizes.tell(choose(100), said.append)
    assert "this was cut: " in said[0]


@pytest.mark.parametrize("text", ["10", "soon", "0m"])
def test_what_is_no_budget_of_a_script_is_wrong_usage(text, capsys):
    with pytest.raises(SystemExit) as left:
        parsed("--budget", text)
    assert left.value.code == 2
    assert "such as 90s, 10m or 2h, or none for everything" in " ".join(capsys.readouterr().err.split())
