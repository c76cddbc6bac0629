"""What fits into a budget: the parts that matter most first, and never more than the budget."""

import json
import math

import pytest

from surgery.planning import budget, plans
from surgery.planning.machine import Machine, Work
from surgery.planning.parts import Level, Part, Shape

MACHINE = Machine(forward=1.0, backward=3.0, readouts=2.0, products=0.0)


def shape_of(prompts, tokens):
    return Shape(
        n_layers=4,
        d_model=8,
        d_mlp=32,
        d_vocab=10,
        prompts=prompts,
        longest=tokens,
        tokens=prompts * tokens,
        max_length=4,
        batch_size=4,
    )


def part(name, *costs, fair=0, memory=0.0):
    """A part whose levels take so many seconds a token."""

    def levels(shape):
        return tuple(
            Level(
                {"level": place}, Work(forward=cost * shape.tokens, memory=memory), f"level {place + 1}", place >= fair
            )
            for place, cost in enumerate(costs)
        )

    return Part(name, "series", f"{name} begins", levels, lambda *_: None)


def choose(parts, budget=math.inf, asked=(256, 128), **options):
    return plans.choose(parts, shape_of, MACHINE, asked, budget=budget, **options)


def test_without_a_budget_everything_is_measured():
    plan = choose([part("first", 1, 2, 3), part("second", 1)])
    assert (plan.prompts, plan.max_tokens) == (256, 128)
    assert [dict(part.settings) for part in plan.parts] == [{"level": 2}, {"level": 0}]
    assert plan.cuts == ["first: level 3", "second: level 1"]  # the words of the levels of this test


@pytest.mark.parametrize("budget", [700, 2_000, 10_000, 100_000, 10**7])
@pytest.mark.parametrize("spent", [0, 300])
def test_a_plan_fits_and_a_larger_budget_never_buys_less(budget, spent):
    parts = [part("first", 0.5, 1, 4, fair=1), part("second", 0.1, 1), part("third", 1, 2, 8)]
    plan = choose(parts, budget, spent=spent, after=10)
    assert plan.seconds <= budget
    assert plan.seconds == pytest.approx(spent + 10 + sum(part.seconds for part in plan.parts))
    more = choose(parts, 2 * budget, spent=spent, after=10)
    assert more.prompts * more.max_tokens >= plan.prompts * plan.max_tokens
    assert len(more.parts) >= len(plan.parts)


def test_all_questions_get_a_fair_level_before_any_gets_more():
    plan = choose([part("first", 1, 100), part("second", 1, 100)], budget=16 * 32 * 4)
    assert [dict(part.settings) for part in plan.parts] == [{"level": 0}, {"level": 0}]


def test_what_has_no_time_is_left_out_from_the_end_and_said():
    plan = choose([part("first", 1), part("second", 3), part("third", 1)], budget=16 * 32 * 2.5)
    assert [part.name for part in plan.parts] == ["first", "third"]
    assert plan.left_out == {"second": "there is no time for it"}
    assert "second        " in str(plan)
    assert "left out: there is no time for it" in str(plan)


def test_what_needs_too_much_memory_is_left_out():
    plan = choose([part("first", 1), part("second", 1, memory=100)], budget=10**9, memory=50)
    assert [part.name for part in plan.parts] == ["first"]
    assert plan.left_out == {"second": "there is no memory for it"}


def test_a_plan_survives_json():
    plan = choose([part("first", 1, 2)], 5_000, left_out={"other": "it cannot be measured"})
    assert plans.Plan.of_json(json.loads(json.dumps(plan.json()))) == plan
    endless = choose([part("first", 1)])
    assert plans.Plan.of_json(json.loads(json.dumps(endless.json()))) == endless


def test_parts_that_took_too_long_lower_the_levels_of_the_rest_and_nothing_else_does():
    parts = [part("first", 1), part("second", 1, 2), part("third", 1, 2)]
    plan = choose(parts, budget=16 * 32 * 5.6, asked=(16, 32))
    assert [dict(part.settings)["level"] for part in plan.parts] == [0, 1, 1]
    shape, planned = shape_of(16, 32), plan.parts[0].seconds
    assert plan.slowed(parts, shape, {"first": planned}) is plan
    assert plan.slowed(parts, shape, {"first": 0.1 * planned}) is plan
    slower = plan.slowed(parts, shape, {"first": 1.8 * planned})
    assert [dict(part.settings)["level"] for part in slower.parts] == [0, 0, 0]
    slowest = plan.slowed(parts, shape, {"first": 4 * planned})
    assert [part.name for part in slowest.parts] == ["first"]
    assert slowest.left_out == dict.fromkeys(["second", "third"], "the parts before it took longer than planned")


@pytest.mark.parametrize("text", ["", "10", "ten minutes", "-5m", "0m", "10 d", "1e3s", "nan", "m", "9" * 40 + "s"])
def test_what_is_no_budget_is_refused_in_words(text):
    with pytest.raises(ValueError, match="such as 90s, 10m or 2h"):
        budget.seconds_of(text)
