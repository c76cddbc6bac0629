"""Wirings with few layers in a row: found where layers do not read each other, dear where they do."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from surgery import Stack
from surgery.compiler import branches, frontier, rivals, search
from surgery.compiler.frontier import Halves
from surgery.corpus.probes import Encoded
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.wiring.value import Wiring

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


def parsed(text, n_layers=4):
    return branches.sublayers(Wiring.parse(text, n_layers))


def test_spans_run_beside_each_other_or_in_step():
    divided = {move: branches.notation(wiring) for move, wiring in branches.moves(parsed(":")).items()}
    assert divided["beside 1 attn", 2] == str(Wiring.parse("0 1.attn {1.mlp | 2.attn} 2.mlp 3", 4))
    assert divided["beside 2 attn", 2] == str(Wiring.parse("0 {1 | 2} 3", 4))
    assert divided["beside 4 attn", 2] == str(Wiring.parse("{0 1 | 2 3}", 4))
    assert divided["in step 2 attn", 2] == str(Wiring.parse(search.notation(((0,), (1, 2), (3,))), 4))
    assert divided["in step 4 attn", 2] == str(Wiring.parse(search.notation(((0, 2), (1, 3))), 4))
    further = branches.moves(parsed("0 {1 | 2} 3"))
    assert branches.notation(further["beside 2 attn", 3]) == str(Wiring.parse("0 {*1:4}", 4))


@pytest.mark.parametrize("text", [":", "{0 | 1} 2:", "0.attn {0.mlp | 1.attn} 1.mlp 2:", ":4 {4 5 | 6 7} 8:"])
def test_every_move_saves_as_many_sublayers_as_it_says(text):
    wiring = parsed(text, 12)
    before = branches.in_a_row(wiring.steps)
    for (how, _), after in branches.moves(wiring).items():
        assert before - branches.in_a_row(after.steps) == int(how.split()[-2])
        assert sorted(map(str, after.layers)) == sorted(map(str, wiring.layers)), "every sublayer runs once"


def test_four_branches_are_most():
    widest = branches.moves(parsed("{*:4} 4:", 8))
    assert not any(layer == 4 and how != "beside 1 mlp" for how, layer in widest if how.startswith(("beside 2", "in")))


def listening(*shares, layer, to):
    """The planted network in which a layer also hears what a later one writes, if that has run before it."""
    stack = planted(*shares)
    width = stack.model.cfg.d_model // (len(shares) + 1)
    weights = {name.replace("._original_component", ""): of for name, of in stack.model.named_parameters()}
    into = weights[f"layers.{layer}.mlp.fc_in.weight"]
    with torch.no_grad():
        into[:, (to + 1) * width : (to + 2) * width] = into[:, layer * width : (layer + 1) * width]
    return stack


def test_a_chain_beside_a_chain_is_found_where_pairs_are_dear():
    stack = planted(1, 1, 0, 1)  # layers 0 and 1 are a chain, and 2 and 3
    pairs = search.divisions(stack, texts(), metric="kl", shallowest=2).set_index("depth")["cost_search"]
    chains = search.divisions(stack, texts(), "branches", metric="kl", shallowest=2).set_index("depth")["cost_search"]
    assert pairs[3] < FREE
    assert pairs[2] > 1e-3
    assert chains[2] < FREE
    assert chains.index.is_monotonic_decreasing
    assert {3.5, 2} <= set(chains.index)


def test_beside_is_free_where_in_step_a_layer_hears_too_much():
    stack = listening(1, 1, 0, 1, layer=1, to=2)
    moves = branches.moves(branches.sublayers(Wiring.of(4)))
    names = {how: branches.notation(moves[f"{how} 4 attn", 2]) for how in ("beside", "in step")}
    gains = search.mean_gains(stack, list(names.values()), texts(), "kl")
    assert abs(gains[names["beside"]]) < FREE
    assert gains[names["in step"]] < -1e-3
    assert search.divisions(stack, texts(), "branches", metric="kl", shallowest=2)["cost_search"].iloc[-1] < FREE


def test_no_freedom_of_wiring_makes_a_chain_of_mlps_shorter():
    stack = Stack(known_networks.serial_network(n_layers=4))
    found = search.divisions(stack, texts(), "branches", metric="kl", shallowest=1).set_index("depth")["cost_search"]
    assert found[found.index >= 2].max() < FREE, "attention writes nothing here, so it can run beside any MLP"
    assert found[found.index < 2].min() > 1e-3


def test_a_ranking_takes_the_place_of_single_costs(tmp_path):
    stack = planted(1, 0, 1, 0, 1, 0)
    options = {"metric": "kl", "shallowest": 3, "screen": 3}
    told = {layer: float(layer % 2 == 0) for layer in range(1, 6)}
    led = search.divisions(stack, texts(), ranking=told, out=tmp_path, **options)
    assert led["cost_search"].max() < FREE
    scanned = [pd.read_csv(file)["wiring"].nunique() for file in tmp_path.glob("*.csv")]
    assert max(scanned) <= 2 * 2 * 3 + 1, "no scan of all single moves"
    misled = search.divisions(stack, texts(), ranking={layer: -cost for layer, cost in told.items()}, beam=1, **options)
    assert misled["cost_search"].max() >= led["cost_search"].max()
    with pytest.raises(ValueError, match="cannot lead a search of 'both'"):
        search.divisions(stack, texts(), "both", ranking=told)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="side by side, left out, both, branches; not 'pairs'"):
        search.divisions(planted(1, 0), texts(), "pairs")


def test_the_frontier_is_measured_on_texts_that_did_not_choose_it(tmp_path):
    stack = planted(1, 0, 1, 0, 1, 1)
    halves = Halves(texts(), texts(16, seed=1), Tokens.of(known_networks.tokens(60, 8, seed=2)), metric="kl")
    frame = frontier.measure(stack, halves, tmp_path, shallowest=3)
    assert set(frame["family"]) == {*search.FUSED, "random pairs", "block of pairs", frontier.LINEAR}
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


def scanned(d, metric, baseline, names):
    """The rows of a scan in which each wiring changes the texts by a column of ``d``."""
    texts, wirings = d.shape
    return pd.DataFrame(
        {"wiring": np.repeat(names, texts), "prompt": np.tile(range(texts), wirings), "group": "", "metric": metric}
        | {"value": baseline + d.T.ravel(), "baseline": float(baseline)}
    )


def claimed(d, metric, allowance, baseline=0.0):
    """Whether any of the wirings is said to keep within the allowance."""
    names = [f"w{place}" for place in range(d.shape[1])]
    places = list(range(1, len(names) + 1))
    frame = pd.DataFrame({"family": "side by side", "depth": [-place for place in places], "saved": places})
    frame = frontier.on_fresh(frame.assign(wiring=names), scanned(d, metric, baseline, names), metric)
    whole = pd.DataFrame({"family": ["side by side"], "depth": [0], "saved": [0], "wiring": [":"], "cost_high": [0.0]})
    return bool(frontier.within(pd.concat([whole, frame]), allowance)["saved"])


def test_what_costs_a_little_more_than_is_allowed_is_seldom_claimed():
    generator = np.random.default_rng(0)

    def loss(mean):
        shared = generator.normal(size=(32, 1))
        return mean + 0.03 * (shared + generator.normal(size=(32, 4))) / 2**0.5

    assert np.mean([claimed(loss(0.0101), "loss", 0.01) for _ in range(25)]) <= 0.05
    assert np.mean([claimed(loss(-0.02), "loss", 0.01) for _ in range(5)]) == 1


@pytest.mark.parametrize("count", [96, 1200])
def test_answers_that_no_text_showed_wrong_are_not_claimed_to_be_right(count):
    generator = np.random.default_rng(0)

    def lost(share):
        return -(generator.random((count, 8)) < share).astype(float)

    assert np.mean([claimed(lost(0.0105), "exact", 0.01, 1.0) for _ in range(25)]) <= 0.05
    assert np.mean([claimed(lost(0.001), "exact", 0.01, 1.0) for _ in range(5)]) == (count == 1200)


def test_intervals_of_counts_are_exact():
    d = np.zeros((20, 2))
    d[:3, 1], d[3, 1] = -1, 1
    gains = frontier.counted(scanned(d, "exact", 1.0, [":", "w"]), "exact").set_index("wiring")
    assert gains.loc[":"].tolist() == [0, 0, 0]
    assert gains.loc["w", "gain"] == pytest.approx(-0.1)
    tail = (
        scipy.stats.binomtest(3, 20).proportion_ci(0.975).high - scipy.stats.binomtest(1, 20).proportion_ci(0.975).low
    )
    assert gains.loc["w", "gain_low"] == pytest.approx(-tail)
    nothing = frontier.counted(scanned(np.zeros((96, 1)), "exact", 1.0, ["w"]), "exact").iloc[0]
    assert 0.04 < -nothing["gain_low"] < 0.05, "3 of 96 may go wrong unseen, and a little more for two sides"


@pytest.mark.parametrize("metric", ["exact", "choice"])
def test_a_drop_of_right_answers_is_measured(metric):
    stack = planted(1, 0, 1, 1)
    ids = known_networks.tokens(48, 6, seed=3)
    best = stack.run(Tokens.of(ids))[:, -1].topk(2).indices.T  # what it answers, and what comes next
    answers = best[:1] if metric == "exact" else best

    def asked(rows):
        tokens = Tokens.of(torch.cat([torch.cat([ids[rows], answer[rows, None]], 1) for answer in answers]))
        scored = torch.zeros_like(tokens.mask)
        scored[:, -1] = True
        count = len(range(*rows.indices(48)))
        probe, choice = tuple(range(count)) * len(answers), np.repeat(range(len(answers)), count).tolist()
        return Encoded(tokens, scored, probe, tuple(choice), ("",) * count, f"{metric} {rows}", name=metric)

    halves = Halves(asked(slice(16)), asked(slice(16, 48)), metric=metric)
    frame = frontier.measure(stack, halves, families=["side by side"], shallowest=2)
    own = frame[frame["family"] == "side by side"].set_index("saved")
    assert own.loc[0, ["cost", "cost_low", "cost_high"]].tolist() == [0, 0, 0]
    assert own.loc[1, "cost"] == 0
    assert 0.1 < own.loc[1, "cost_high"] < 0.3, "32 answers cannot show less"
    assert own.loc[2, "cost"] > 0
    assert ((32 * frame["cost"]).round(9) % 1 == 0).all(), "fractions of 32 answers"
    assert frontier.within(frame, 0.01)["saved"] == 0
    assert frontier.within(frame, 0.3)["saved"] == 1


def test_the_frontier_counts_sublayers_in_a_row():
    stack = planted(1, 1, 0, 1)
    halves = Halves(texts(), texts(16, seed=1), metric="kl")
    frame = frontier.measure(stack, halves, families=["side by side", "branches"], shallowest=2)
    assert (frame["sublayers"] == 2 * frame["depth"]).all()
    assert (frame["saved"] == 4 - frame["depth"]).all()
    assert frontier.within(frame, 1e-4, "branches")["sublayers"] == 4
    assert frontier.within(frame, 1e-4, "side by side")["sublayers"] == 6
    assert frontier.best(frame, 1e-4)["family"] != "branches", "what cannot be built is not chosen"
    assert set(frame.loc[frame["family"].isin(["random pairs", "block of pairs"]), "saved"]) == {1, 2}
