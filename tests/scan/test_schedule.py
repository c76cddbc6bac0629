"""The graph of many wirings: nothing twice, nothing kept too long, every wiring served, exactly."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings

from support.random_wirings import wirings
from surgery import wiring
from surgery.scan import schedule
from surgery.wiring.steps import Layer, Parallel, Scaled
from surgery.wiring.value import Wiring

FAMILIES = (wiring.every_repeat, wiring.every_skip, wiring.every_parallel, wiring.every_swap, wiring.every_reverse)


def layer_by_number(step, x):
    """Any non-linear map that differs from layer to layer and part to part."""
    seed = step.index * 3 + {None: 0, "attn": 1, "mlp": 2}[step.part]
    return (x * x * (seed + 2) + seed + 1) % 1_000_003


def alone(chain, x):
    for step in chain:
        match step:
            case Layer():
                x = layer_by_number(step, x)
            case Parallel(branches, mean):
                outs = [alone(branch, x) for branch in branches]
                x = sum(outs) / len(outs) if mean else x + sum(out - x for out in outs)
            case Scaled(factor, body):
                x = x + Fraction(factor) * (alone(body, x) - x)
    return x


def together(given, group=10**9, order="up"):
    """Final streams of all wirings through the graph, and what it cost."""
    finals, executed, held = {}, [], []

    def layer(step, streams, kept):
        executed.extend((step, x) for x in streams)
        held.append(len(streams))
        return [layer_by_number(step, x) for x in streams]

    def combine(step, x, ends):
        if isinstance(step, Scaled):
            return x + Fraction(step.factor) * (ends[0] - x)
        return sum(ends) / len(ends) if step.mean else x + sum(end - x for end in ends)

    def finish(indices, x):
        for index in indices:
            assert index not in finals
            finals[index] = x

    cost = schedule.Graph(given).run(Fraction(7), layer, combine, finish, group, order)
    assert max(held) <= group
    return finals, cost, executed


@given(wirings.map(lambda one: [one]))
@settings(max_examples=100, deadline=None)
def test_any_single_wiring_is_what_it_is_alone(given):
    finals, cost, _ = together(given)
    assert finals == {0: alone(given[0].steps, Fraction(7))}
    assert cost.executions <= given[0].depth


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("group", "order"), [(10**9, "up"), (3, "up"), (10**9, "alternating"), (1, "deep")])
def test_families_are_what_they_are_alone_and_no_layer_runs_twice_on_a_stream(family, group, order):
    given = list(family(6))
    random.Random(0).shuffle(given)
    finals, cost, executed = together(given, group, order)
    assert finals == {i: alone(w.steps, Fraction(7)) for i, w in enumerate(given)}
    assert cost.executions == len(executed)
    if family is not wiring.every_parallel:  # a stream is named by the path that made it; numbers could collide
        paths = {tuple(w.steps[: i + 1]) for w in given for i in range(len(w.steps))}
        assert cost.executions == len(paths)


def test_groups_share_their_branches_and_damped_passes_the_pass():
    given = [Wiring.parse(text, 6) for text in (":1 {*1:4} 4:", ":1 {*1:5} 5:", ":1 0.5*(1:3) 4:", ":1 {1 2|3} 4:")]
    finals, cost, _ = together(given)
    assert finals == {i: alone(w.steps, Fraction(7)) for i, w in enumerate(given)}
    # layer 0; 1, 2, 3, 4 on x_1; 1 2 on x_1 (1 is shared); then what follows each of the four
    assert cost.executions == 1 + 4 + 1 + (2 + 1 + 2 + 2)


def test_equal_ends_and_empty_branches():
    given = [Wiring.parse(text, 4) for text in ("{1|1} 2", "mean{3|:0} 1", ":", "{1|1}")]
    finals, _, _ = together([*given, given[2]])
    assert finals == {i: alone(w.steps, Fraction(7)) for i, w in enumerate([*given, given[2]])}


@pytest.mark.parametrize(
    ("n_layers", "naive", "shared"),
    [(12, 1_300, 662), (24, 9_800, 4_924), (32, 22_880, 11_472), (40, 44_280, 22_180)],
)
def test_a_full_repeat_scan_costs_what_the_closed_form_says(n_layers, naive, shared):
    given = list(wiring.every_repeat(n_layers))
    cost = schedule.simulate(given)
    assert schedule.naive_executions(given) == naive
    assert cost == schedule.Cost(float(shared), 2 * n_layers, len(given))
    assert shared == n_layers + n_layers * (n_layers + 1) * (2 * n_layers + 1) // 6


def test_going_deep_holds_few_streams():
    given = list(wiring.every_repeat(24))
    assert schedule.simulate(given, order="deep").alive <= 26
    assert schedule.simulate(given, order="deep").executions == schedule.simulate(given).executions


def test_alternating_sweeps_help_reversed_spans():
    given = list(wiring.every_reverse(24))
    assert schedule.simulate(given, order="alternating").calls * 5 < schedule.simulate(given).calls


@pytest.mark.parametrize("alive", [1000, 60, 30, 2])
def test_parts_stay_within_the_streams_allowed_and_cover_everything_once(alive):
    given = list(wiring.every_repeat(16))
    parts, costs = zip(*schedule.split(given, alive), strict=True)
    assert list(costs) == [schedule.simulate([given[i] for i in part]) for part in parts]
    assert sorted(index for part in parts for index in part) == list(range(len(given)))
    for part in parts:
        assert len(part) == 1 or schedule.simulate([given[i] for i in part]).alive <= alive
    executions = sum(schedule.simulate([given[i] for i in part]).executions for part in parts)
    assert executions >= schedule.simulate(given).executions
    if alive >= 60:
        assert executions < 1.1 * schedule.simulate(given).executions
