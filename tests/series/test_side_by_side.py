"""Every measure of series on the networks whose answer is known, in one table; and that it costs what it says."""

import pytest

from surgery import Stack
from surgery.instruments import known_networks
from surgery.series import side_by_side

TOKENS = known_networks.tokens(16, 8)
SHARES = ["parallel", "mixed 0.25", "mixed 0.5", "mixed 0.75", "serial"]


@pytest.fixture(scope="module")
def table():
    frame = side_by_side.calibrate(side_by_side.networks(n_layers=4), TOKENS)
    return frame.pivot(index="measure", columns="network", values="value")


@pytest.mark.parametrize("measure", ["S", "R", "O", "T", "local, next", "gate exponent"])
def test_from_exactly_parallel_to_exactly_serial(table, measure):
    values = table.loc[measure, SHARES]
    assert abs(values["parallel"]) < 1e-6
    assert abs(values["serial"] - 1) < 1e-6
    assert values.is_monotonic_increasing
    assert values["parallel"] < table.loc[measure, "random"] < values["serial"]


@pytest.mark.parametrize("measure", ["gate hessian", "indirect share"])
def test_zero_in_parallel_only(table, measure):
    values = table.loc[measure, SHARES]
    assert abs(values["parallel"]) < 1e-6
    assert values["serial"] > 0.3


@pytest.mark.parametrize("measure", ["jacobian, next", "jacobian, total", "path length"])
def test_rising_with_the_share_that_is_serial(table, measure):
    assert table.loc[measure, SHARES].is_monotonic_increasing


def test_untrained_weights_compose_no_more_than_random_directions(table):
    assert abs(table.loc["jacobian, next", "random"]) < 0.1 * table.loc["jacobian, next", "serial"]


def test_only_the_next_layer_reads_a_chain_directly(table):
    assert table.loc["local, beyond", SHARES].abs().max() < 1e-6
    assert table.loc["local, beyond", "random"] > 0.05


def test_what_is_not_series_does_not_say_so(table):
    """On these networks the stream of a serial model turns and grows as that of a parallel one."""
    assert abs(table.loc["cosine", "serial"] - table.loc["cosine", "parallel"]) < 1e-6
    assert 0.5 < table.loc["block influence", "serial"] / table.loc["block influence", "parallel"] < 2


def test_layers_before_the_first_are_left_out():
    stack = Stack(known_networks.random_network(3))
    _, frames = side_by_side.readings(stack, TOKENS, first_layer=1)
    assert all(frame[name].min() >= 1 for frame in frames.values() for name in ("start", "layer") if name in frame)


def test_what_refuses_the_tokens_is_left_out():
    """In prompts of two tokens the second predicts nothing: no interaction can be measured."""
    stack, tokens = Stack(known_networks.random_network(3)), known_networks.tokens(6, 2)
    values, frames = side_by_side.readings(stack, tokens)
    assert "interactions.pairs" not in frames
    assert values["rho"] != values["rho"]
    assert 0 <= values["S"] <= 1
    costs = side_by_side.costs(stack, tokens, ("series.windows", "interactions.pairs"))
    assert costs["function"].tolist() == ["series.windows"]


def test_every_function_costs_what_its_docstring_says():
    stack = Stack(known_networks.random_network(4))
    frame = side_by_side.costs(stack, TOKENS).set_index("function")
    for name, function in side_by_side.FUNCTIONS.items():
        assert frame.loc[name, "counted"] == pytest.approx(function.forwards(4), abs=0.05), name
        assert frame.loc[name, "formula"] == function.formula(4)
    assert (frame["timed"] > 0).all()


def test_costs_come_with_the_measures():
    stack, costs = Stack(known_networks.random_network(3)), []
    stacks = {"random": stack, "again": stack}
    side_by_side.calibrate(stacks, TOKENS, costs=costs)
    assert [row["function"] for row in costs] == list(side_by_side.FUNCTIONS)  # of the first network alone
    alone = side_by_side.costs(stack, TOKENS)
    counted = [row["counted"] for row in costs]
    assert counted[:-1] == pytest.approx(alone["counted"].tolist()[:-1])
    assert counted[-1] == pytest.approx(alone["counted"].iloc[-1] + 1)  # linearity looks for massive tokens by itself


def test_without_costs_no_more_is_run_than_is_read():
    stack, tokens = Stack(known_networks.random_network(4)), known_networks.tokens(12, 6)
    with side_by_side.counted_layers() as whole:
        of_all, _ = side_by_side.readings(stack, tokens, 1)
    with side_by_side.counted_layers() as count:
        alone, _ = side_by_side.readings(stack, tokens, 1, whole=False)
    assert alone == pytest.approx(of_all, rel=1e-6, nan_ok=True)
    assert count[0] < 0.8 * whole[0]


def test_no_window_is_left_after_the_last_but_one_layer():
    stack = Stack(known_networks.random_network(3))
    values, frames = side_by_side.readings(stack, TOKENS, first_layer=2, whole=False)
    assert "series.windows" not in frames
    assert values["S"] != values["S"]
