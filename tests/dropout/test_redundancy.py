import numpy as np
import pytest
import torch

from support.exact_networks import parameters
from support.reliability import BACKUP, HALF_BACKUP, INDEPENDENT, SERIES, TOKENS, build_system
from surgery import Stack
from surgery.dropout import redundancy
from surgery.dropout.redundancy import across, additivity, mass, predictability, random_subsets, self_repair, subsets
from surgery.instruments import known_networks
from surgery.instruments.ablation import damage
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.records import tables
from surgery.stats.sampling import Sampling

CHAIN = SERIES | {"scored": [1, 2, 3]}  # its head reads every layer
STANDBY = BACKUP | {"rectified": []}  # writes what is missing, and takes away what is wrong


# --- damage of pairs and of subsets ---


@pytest.mark.parametrize(
    ("system", "A", "curvature"),
    [(SERIES, 0, -1), (INDEPENDENT, 1, 0), (BACKUP, np.nan, 1), (HALF_BACKUP, 2, 1 / 3)],
    ids=["series", "independent", "backup", "half a backup"],
)
def test_systems_of_known_reliability(system, A, curvature):
    stack = build_system(**system)
    for units in ("layers", "mlps"):
        row = additivity(stack, TOKENS, units, "skip", sampling=Sampling(resamples=50)).iloc[0]
        for end in ("", "_low", "_high"):
            assert row[f"additivity{end}"] == pytest.approx(A, nan_ok=True, abs=1e-9)
    frame = subsets(stack, TOKENS, (1, 2), kind="skip", sampling=Sampling(resamples=50))
    assert np.allclose(frame[["curvature", "curvature_low", "curvature_high"]], curvature, atol=1e-9)
    difference = {-1: -7 / 8, 0: 0, 1: 7 / 8, 1 / 3: 7 / 16}[curvature]
    assert frame["second_difference"].tolist() == pytest.approx([np.nan, difference, np.nan], nan_ok=True, abs=1e-9)


def test_heads_of_one_layer_add_up_and_a_layer_is_its_parts():
    """Heads side by side do not read each other; with them all and the MLP gone, the layer is."""
    model = known_networks.random_network(1, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in parameters(model).items():
            if name.startswith("layers.0.mlp.fc_out"):
                weight.zero_()
    stack, tokens = Stack(model), known_networks.tokens(8, 6)
    heads = tuple(range(int(model.cfg.n_heads)))
    options = {"frozen": True, "sampling": Sampling(resamples=0)}
    found = damage(stack, tokens, [*((head,) for head in heads), (0, 1), heads], units="heads", **options)
    torch.testing.assert_close(found.margin[found.row[0, 1]], found.margin[0] + found.margin[1])
    torch.testing.assert_close(found.margin[found.row[heads]], damage(stack, tokens, [(0,)], **options).margin[0])
    with pytest.raises(ValueError, match=r"no head 9 to take out: .* has 0 to 3"):
        damage(stack, tokens, [(9,)], units="heads")
    with pytest.raises(ValueError, match="units are layers, mlps, heads, not 'neurons'"):
        damage(stack, tokens, [(0,)], units="neurons")


def test_an_update_that_is_not_finite_has_no_predictability(monkeypatch):
    stack = Stack(known_networks.random_network(3, 16))
    update = stack.update
    monkeypatch.setattr(stack, "update", lambda layer, *rest: update(layer, *rest) * (np.nan if layer == 2 else 1))
    with pytest.raises(ValueError, match="not finite"):
        predictability(stack, known_networks.tokens(24, 8))


def test_curvature_rises_from_a_chain_to_a_backup():
    """One layer that all rest on, beside one that stands alone: in between, and monotone in the chain's share."""
    mixed = dict(reads=[{0: 1}, {1: 1}, {0: 1}], writes=[1, 2, 3], scored=[2, 3])
    found = [
        subsets(build_system(**system), TOKENS, (1, 2), kind="skip", sampling=Sampling(resamples=0))["curvature"][0]
        for system in (SERIES, mixed, INDEPENDENT)
    ]
    assert found[0] < found[1] < found[2]


def test_the_curve_is_the_mean_damage_of_the_drawn_sets():
    stack, tokens = Stack(known_networks.random_network()), known_networks.tokens(8, 6)
    frame = subsets(stack, tokens, (1, 2, 3), draws=4, sampling=Sampling(seed=3, resamples=0))
    drawn = random_subsets(6, (1, 2, 3), 4, 3)
    assert frame["n_subsets"].tolist() == [1, 4, 4, 4]
    assert len(set(drawn)) == 13
    for size in range(4):
        sets = [layers for layers in drawn if len(layers) == size]
        assert frame["damage"][size] == pytest.approx(float(damage(stack, tokens, sets, frozen=True).margin.mean()))
    assert drawn == random_subsets(6, (1, 2, 3), 4, 3) != random_subsets(6, (1, 2, 3), 4, 4)


def test_an_untrained_transformer_has_no_curvature():
    frame = subsets(
        Stack(known_networks.random_network(n_layers=4)), known_networks.tokens(16, 8), sampling=Sampling(resamples=100)
    )
    assert (frame["damage_low"][1:] < 0).all()
    assert frame["curvature"].isna().all()


# --- self-repair ---


@pytest.mark.parametrize(
    ("system", "slopes"),
    [(CHAIN, [-2, -1, 0]), (INDEPENDENT, [0, 0, 0]), (STANDBY, [1, np.nan]), (SERIES, [np.nan, np.nan, 0])],
    ids=["chain", "independent", "backup", "unread"],
)
def test_self_repair_of_known_systems(system, slopes):
    frame = self_repair(build_system(**system), TOKENS, sampling=Sampling(resamples=50))
    for end in ("", "_low", "_high"):
        assert frame[f"self_repair{end}"].tolist() == pytest.approx(slopes, nan_ok=True, abs=1e-9)
    assert frame["norm_repair"].dropna().tolist() == pytest.approx([0] * frame["norm_repair"].notna().sum(), abs=1e-9)


def test_what_repairs_the_last_layer_is_the_norm():
    frame = self_repair(
        Stack(known_networks.random_network(4)), known_networks.tokens(24, 10), sampling=Sampling(resamples=50)
    )
    last = frame.iloc[-1]
    assert last["self_repair"] == pytest.approx(last["norm_repair"], abs=1e-6)
    assert abs(last["norm_repair"]) > 1e-4
    if last["self_repair_low"] > 0:
        assert last["norm_share"] == pytest.approx(1, abs=1e-3)
    without = self_repair(
        Stack(known_networks.random_network(4, norm=None)),
        known_networks.tokens(24, 10),
        sampling=Sampling(resamples=0),
    )
    assert without["norm_repair"].abs().max() < 1e-5


def test_batches_and_padding_change_little_but_the_donors():
    """With one batch the donors are the same, so padding changes nothing."""
    stack, tokens = build_system(**CHAIN), Tokens.of(TOKENS)
    for side in ("left", "right"):
        padded = self_repair(stack, tokens.pad(2, side), sampling=Sampling(resamples=0))["self_repair"]
        assert padded.tolist() == pytest.approx([-2, -1, 0], abs=1e-9)


# --- predictability ---


@torch.no_grad()
def related(kind):
    """Two layers of eight numbers that compute the same, or of different halves of them, or one after the other."""
    model = (
        known_networks.serial_network(n_layers=2) if kind == "chain" else known_networks.parallel_network(n_layers=2)
    )
    weight = parameters(model)
    first, second = (weight[f"layers.{layer}.mlp.fc_in.weight"] for layer in (0, 1))
    if kind == "same":
        second[:] = first
        weight["layers.1.mlp.fc_out.weight"][16:24] = weight["layers.0.mlp.fc_out.weight"][8:16]
    if kind == "halves":
        first[:, 4:8], second[:, :4] = 0, 0
    return Stack(model)


@pytest.mark.parametrize(
    ("kind", "low", "high", "actual_low", "actual_high"),
    [
        ("same", 0.99, 1, 0.99, 1),
        ("halves", -0.1, 0.1, -0.1, 0.1),
        ("parallel", 0.05, 0.5, 0.05, 0.5),
        ("chain", None, None, 0.5, 0.95),
    ],
)
def test_predictability_of_known_layers(kind, low, high, actual_low, actual_high):
    row = predictability(related(kind), known_networks.tokens(120, 8), sampling=Sampling(resamples=50)).iloc[0]
    assert actual_low < row["predictability_actual"] < actual_high
    if low is None:
        assert np.isnan(row["predictability"])
    else:
        assert low < row["predictability"] < high
        assert row["predictability_low"] <= row["predictability"] <= row["predictability_high"]
        assert -0.2 < row["predictability_shuffled"] < 0.05


# --- all in a row ---


def test_across_is_what_its_parts_are(tmp_path):
    stack, tokens = Stack(known_networks.random_network(3, 16)), known_networks.tokens(24, 8)
    row = across(stack, tokens, sampling=Sampling(resamples=30)).iloc[0]
    parts = additivity(stack, tokens, sampling=Sampling(resamples=30)).iloc[0]
    assert row["mean_rho_high"] == pytest.approx(parts["mean_rho_high"], nan_ok=True)
    parts = additivity(stack, tokens, "heads", sampling=Sampling(resamples=30)).iloc[0]
    assert row["additivity_heads_high"] == pytest.approx(parts["additivity_high"], nan_ok=True)
    curve = subsets(stack, tokens, sampling=Sampling(resamples=30))
    assert row["curvature"] == pytest.approx(curve["curvature"][0], nan_ok=True)
    assert row["second_difference_low"] == pytest.approx(curve["second_difference_low"][1])
    repair = self_repair(stack, tokens, sampling=Sampling(resamples=0))["self_repair"][:2]
    assert repair.min() <= row["self_repair"] <= repair.max()
    pairs = predictability(stack, tokens, sampling=Sampling(resamples=0))
    assert row["predictability"] == pytest.approx(pairs["predictability"].mean())
    assert set(row.index) <= set(redundancy.COLUMNS)
    for name, frame in (
        ("across", across(stack, tokens, sampling=Sampling(resamples=0))),
        ("subsets", curve),
        ("pairs", pairs),
    ):
        path = tables.write(frame, tmp_path / f"{name}.csv", {}, redundancy.COLUMNS)
        assert len(tables.read(path)) == len(frame)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2"])
def test_architectures(opened, name):
    tokens = torch.randint(4, 90, (30, 8), generator=torch.Generator().manual_seed(0))
    row = across(opened(name), tokens, sampling=Sampling(resamples=20)).iloc[0]
    for measure in ("self_repair", "norm_repair", "predictability"):
        assert row[f"{measure}_low"] <= row[measure] <= row[f"{measure}_high"]


def test_it_costs_what_it_says(monkeypatch):
    stack, run, calls = Stack(known_networks.random_network(3, 16)), Engine.layer, []
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(arguments[1]) or run(*arguments))
    tokens = known_networks.tokens(24, 8)
    for measure, cost in ((mass, 1 + 1 / 3 + 3), (self_repair, 2), (predictability, 2)):
        calls.clear()
        measure(stack, tokens, sampling=Sampling(resamples=0, skip_massive=False))
        assert len(calls) == pytest.approx(3 * cost), measure


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda stack, tokens: subsets(stack, tokens, (2, 3)), r"up to 3, two or more, and at least one draw, got \[2"),
        (lambda stack, tokens: subsets(stack, tokens, (1,)), "the curve goes from 0 in steps of one layer"),
        (lambda stack, tokens: subsets(stack, tokens, draws=0), "draws=0"),
        (lambda stack, tokens: predictability(stack, tokens[:4]), "give 14 tokens to fit on, and .* stream of 16"),
        (lambda stack, tokens: self_repair(stack, tokens[:, :2]), "give prompts of 3 tokens or more"),
        (lambda stack, tokens: self_repair(stack, tokens[:1]), "resample takes the updates of another prompt"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(Stack(known_networks.random_network(3, 16)), known_networks.tokens(24, 8))
