"""Wirings with few layers in a row: found where layers do not read each other, dear where they do."""

import numpy as np
import pandas as pd
import pytest
import torch

from surgery import Stack
from surgery.compiler import frontier, rivals, search
from surgery.compiler.frontier import Halves
from surgery.corpus.probes import Encoded
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens

FREE = 1e-6  # nats of divergence


def texts(count=12, length=8, seed=0):
    """Random tokens as running text."""
    tokens = Tokens.of(known_networks.tokens(count, length, seed))
    scored = tokens.mask.clone()
    scored[:, 0] = False
    rows = tuple(range(count))
    return Encoded(tokens, scored, rows, (0,) * count, ("",) * count, f"random {seed}", name="text")


def planted(*shares):
    """A network in which a layer reads the one before if its share is 1, and only the embedding if it is 0."""
    return Stack(known_networks.mixed_network(shares, n_layers=len(shares)))


def test_layers_that_do_not_read_each_other_are_put_side_by_side():
    stack = planted(1, 0, 1, 0, 1, 0)
    found = search.divisions(stack, texts(), metric="kl", shallowest=2, beam=2, screen=4).set_index("depth")
    assert found["cost_search"].loc[[6, 5, 4, 3]].max() < FREE
    assert found["wiring"][3] == str(stack.wiring(search.notation(((0, 1), (2, 3), (4, 5)))))
    assert found["cost_search"][2] > 1e-3


@pytest.mark.parametrize(("network", "free"), [("parallel_network", True), ("serial_network", False)])
def test_parallel_networks_are_free_and_serial_ones_dear(network, free):
    stack = Stack(getattr(known_networks, network)(n_layers=6))
    found = search.divisions(stack, texts(), metric="kl", shallowest=4)
    costs = found.loc[found["depth"] < 6, "cost_search"]
    assert (costs < FREE).all() if free else (costs > 1e-3).all()


def test_leaving_out_is_dear_where_side_by_side_is_free():
    stack = Stack(known_networks.parallel_network(n_layers=4))
    skipped = search.divisions(stack, texts(), "left out", metric="kl", shallowest=3)
    both = search.divisions(stack, texts(), "both", metric="kl", shallowest=3)
    assert skipped["cost_search"].iloc[-1] > 1e-3
    assert both["cost_search"].iloc[-1] < FREE


def test_a_search_goes_on_where_it_was_and_stops_where_it_costs_too_much(tmp_path):
    stack = planted(1, 0, 1, 1)
    options = {"metric": "kl", "shallowest": 1}
    once = search.divisions(stack, texts(), **options)
    kept = search.divisions(stack, texts(), out=tmp_path, **options)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.csv")}
    again = search.divisions(stack, texts(), out=tmp_path, **options)
    assert len(files) == 3  # a scan for every depth
    pd.testing.assert_frame_equal(once, kept)
    pd.testing.assert_frame_equal(kept, again)
    short = search.divisions(stack, texts(), limit=FREE, **options)
    assert short["depth"].tolist() == [4, 3, 2]
    assert short["cost_search"].iloc[-1] > FREE


def test_blocks_of_pairs():
    assert search.blocks(5, 2) == [((0,), (1, 2), (3, 4))]
    assert search.blocks(6, 1)[-1] == ((0,), (1,), (2,), (3,), (4, 5))
    assert search.blocks(4, 2) == []
    alone = {1: 0, 2: 5, 3: 5, 4: 1, 5: 1}
    assert search.promising_blocks(6, 1, alone, 2) == [search.block(6, 3, 1), search.block(6, 4, 1)]


def test_groups_hold_four_layers_at_most():
    assert search.merges(((0, 1, 2), (3, 4))) == {}
    assert list(search.merges(((0, 1), (2, 3)))) == [("merge", 2)]


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="side by side, left out, both; not 'pairs'"):
        search.divisions(planted(1, 0), texts(), "pairs")


def test_the_frontier_is_measured_on_texts_that_did_not_choose_it(tmp_path):
    stack = planted(1, 0, 1, 0, 1, 1)
    halves = Halves(texts(), texts(16, seed=1), Tokens.of(known_networks.tokens(60, 8, seed=2)), metric="kl")
    frame = frontier.measure(stack, halves, tmp_path, shallowest=3)
    assert set(frame["family"]) == {*search.FAMILIES, "random pairs", "block of pairs", frontier.LINEAR}
    own = frame[frame["family"] == "side by side"].set_index("saved")
    assert own["cost"].loc[[1, 2]].abs().max() < FREE
    assert (frame["cost_low"] <= frame["cost"] + 1e-9).all()
    assert (frame["cost"] <= frame["cost_high"] + 1e-9).all()
    assert (frame["n_prompts"] == 16).all()
    best = frontier.within(frame, 1e-4)
    assert best["saved"] == 2
    assert frontier.within(frame, 1e-4, "left out")["saved"] == 0
    pd.testing.assert_frame_equal(frontier.measure(stack, halves, tmp_path, shallowest=3), frame)


def test_only_a_whole_interval_within_the_allowance_counts():
    frame = pd.DataFrame(
        {"family": "side by side", "depth": [4, 3, 2], "saved": [0, 1, 2], "cost": [0, 0.001, 0.004]}
        | {"cost_high": [0, 0.009, 0.02], "wiring": [":", "a", "b"]}
    )
    assert frontier.within(frame, 0.01)["wiring"] == "a"
    assert frontier.within(frame, 0.001)["wiring"] == ":"


def test_the_best_can_be_fused():
    rows = {"family": ["side by side"] * 2 + ["left out"] * 2, "depth": [4, 3, 4, 2], "saved": [0, 1, 0, 2]}
    frame = pd.DataFrame(rows | {"cost_high": [0, 0.005, 0, 0.001], "wiring": [":", "a", ":", "b"]})
    assert frontier.best(frame, 0.01)["wiring"] == "a"
    rows = {"family": ["block of pairs"] * 2, "depth": [3, 2], "saved": [1, 2]}
    both = pd.concat([frame, pd.DataFrame(rows | {"cost_high": [0.2, 0.009], "wiring": ["c", "d"]})])
    assert frontier.best(both, 0.01)["wiring"] == "d"
    assert frontier.best(both, 0.001)["wiring"] == ":"
    assert frontier.within(both, 0.001, "block of pairs")["saved"] == 0


def test_intervals_hold_for_all_that_was_searched_at_once():
    stack = planted(1, 0, 1, 1, 1)
    halves = Halves(texts(), texts(16, seed=1), metric="kl")
    alone = frontier.measure(stack, halves, families=["side by side"], shallowest=4)
    every = frontier.measure(stack, halves, shallowest=4)
    widths = [
        frame[(frame["family"] == "side by side") & (frame["saved"] == 1)]
        .iloc[0][["cost_low", "cost_high"]]
        .diff()
        .iloc[-1]
        for frame in (alone, every)
    ]
    assert widths[1] >= widths[0]


def test_a_linear_span_is_replaced_by_its_map():
    stack = Stack(known_networks.linear_network())
    tokens = Tokens.of(known_networks.tokens(400, 8))
    affine = rivals.linear_map(stack, tokens, 1, 3)
    context = stack.context(tokens[:20])
    x = stack.execute(":1", context.x0, context)
    exact = stack.execute("1:3", x, context)
    assert float((affine(x) - exact).norm() / (exact - x).norm()) < 0.02


def test_random_pairs_are_pairs_of_neighbours_and_differ():
    drawn = {rivals.at_random(10, 3, seed) for seed in range(8)}
    assert len(drawn) > 4
    for groups in drawn:
        assert sorted(len(group) for group in groups) == [1] * 4 + [2] * 3
        assert np.concatenate(groups).tolist() == list(range(10))


def test_spans_to_leave_out_are_those_that_cost_least():
    stack = Stack(known_networks.parallel_network(n_layers=4))
    best = rivals.best_spans(stack, texts(), [1, 2], metric="kl")
    alone = {
        start: search.mean_gains(stack, [f":{start} {start + 1}:" if start < 3 else ":3"], texts(), "kl").iloc[0]
        for start in (1, 2, 3)
    }
    assert best[1][0] == max(alone, key=alone.get)
    assert best[2] in {(1, 3), (2, 4)}
    assert torch.tensor(best[1]).diff().item() == 1
