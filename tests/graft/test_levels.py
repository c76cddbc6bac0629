"""How much of a graft fits into a budget: harvest, steps and healing cut together, and the same when it goes on."""

import math
from types import SimpleNamespace

import pytest

import surgery
from surgery import report
from surgery.corpus import bundled
from surgery.graft import levels, study
from surgery.graft.grafting import Objective, Schedule
from surgery.planning import sizes
from surgery.planning.machine import Machine
from surgery.records import tables

SPAN = (4, 9)
ASKED = {"prompts": 20_000, "judged": 512, "steps": 1000, "heal": 100}
MACHINE = Machine(forward=1.5e-5, backward=3e-5, readouts=7e-6, products=6e-11)


@pytest.fixture(scope="module")
def prompt():
    stack = surgery.Stack(surgery.load("babel"))
    return sizes.shape(stack, stack.tokens(bundled.prompts(32)), 1)


def seconds(prompt, size=ASKED, **options):
    return MACHINE.seconds(levels.work(prompt, size, SPAN, **options))


def choose(prompt, budget, asked=ASKED):
    rungs = sizes.levels([levels.LEAST, asked], lambda size: levels.work(prompt, size, SPAN), asked)
    return sizes.choose(rungs, MACHINE, budget, after=levels.PAGE_SECONDS)


def test_a_choice_fits_and_a_larger_budget_never_buys_less(prompt):
    before = dict.fromkeys(ASKED, 0)
    for budget in (40, 60, 120, 300, 600, 3600, math.inf):
        choice = choose(prompt, budget)
        assert choice.seconds <= budget
        assert all(before[name] <= size for name, size in choice.sizes.items())
        before = choice.sizes
    assert before == ASKED


def test_what_is_asked_for_is_the_most_of_each_and_nothing_is_healed_unasked(prompt):
    choice = choose(prompt, math.inf, {**ASKED, "prompts": 64, "judged": 16, "heal": 0})
    assert choice.sizes == {"prompts": 64, "judged": 16, "steps": 1000, "heal": 0}
    assert choose(prompt, 60, {**ASKED, "heal": 0}).sizes["heal"] == 0
    assert 0 < choose(prompt, 60).sizes["heal"] < 100


def test_more_of_anything_costs_more(prompt):
    usual = seconds(prompt)
    assert seconds(prompt, depth=10) > seconds(prompt, depth=5) == usual
    assert seconds(prompt, d_mlp=2 * prompt.d_mlp) > usual
    assert seconds(prompt, d_model=prompt.d_model // 2) < usual
    assert seconds(prompt, objective=Objective(kl=1.0)) > usual
    assert seconds(prompt, schedule=Schedule(batch=128)) > usual > seconds(prompt, schedule=Schedule(every=1000))
    assert seconds(prompt, parts="all") > usual
    assert seconds(prompt, processes=2) < usual
    for name in ASKED:
        assert seconds(prompt, {**ASKED, name: 2 * ASKED[name]}) > usual


RUN = {"prompts": 60, "judged": 20, "steps": 8, "heal": 0}
SCHEDULE = Schedule(steps=8, batch=8, every=4, warmup=2)


def graft(folder, budget, monkeypatch, speed=1e-5, **options):
    machine = Machine(speed, 2 * speed, speed, 1e-7 * speed)
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: 0.0))  # however long it takes here
    monkeypatch.setattr(Machine, "of", classmethod(lambda *_: machine))
    said = []
    options = {"count": 60, "judged": 20, "schedule": SCHEDULE, "device": "cpu"} | options
    return study.run(out=folder, budget=budget, say=said.append, **options), said


def test_a_graft_within_a_budget_says_what_it_cut_and_goes_on_with_its_plan(prompt, tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "LEAST", {"prompts": 20, "judged": 10, "steps": 1, "heal": 0})
    monkeypatch.setattr(levels, "OPENED", 0)
    monkeypatch.setattr(levels, "PAGE_SECONDS", 0)
    speed = 1.3 * 600 / Machine(1, 2, 1, 1e-7).seconds(levels.work(prompt, RUN, SPAN, schedule=SCHEDULE))
    outcome, said = graft(tmp_path, "10m", monkeypatch, speed)
    plan = outcome.plan
    assert str(plan) in said
    assert plan.asked == RUN
    assert all(levels.LEAST[name] <= size <= plan.asked[name] for name, size in plan.sizes.items())
    assert plan.sizes["steps"] < 8
    manifest = tables.read_manifest(tmp_path / study.METHODS)
    assert manifest["settings"]["plan"]["sizes"] == plan.sizes
    assert manifest["settings"]["schedule"]["steps"] == plan.sizes["steps"]
    assert outcome.methods["steps"].dropna().tolist() == [plan.sizes["steps"]]
    report.build(tmp_path)
    assert plan.told in (tmp_path / report.PAGE).read_text()
    monkeypatch.setattr(study.grafting.Task, "batch", lambda *_: pytest.fail("a step was made again"))
    again, said = graft(tmp_path, "10m", monkeypatch, 100 * speed)
    assert any(line.startswith("going on with the plan in ") for line in said)
    assert again.plan == plan
    assert again.methods.drop(columns="seconds").equals(outcome.methods.drop(columns="seconds"))


def test_a_budget_that_holds_no_graft_or_is_none_is_refused_in_words(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nothing fits into 1 s: the least \(prompts 60, judged 20, .* --budget"):
        graft(tmp_path / "least", "1s", monkeypatch)
    with pytest.raises(ValueError, match="'soon' is no budget"):
        graft(tmp_path / "none", "soon", monkeypatch)
    assert not (tmp_path / "none").exists()
