import numpy as np
import pytest
import torch

from benchmarks.simulations.redundancy import SYSTEMS, damages_of, found_in, of_nothing
from support.reliability import BACKUP, HALF_BACKUP, INDEPENDENT, SERIES, TOKENS, build_system
from surgery import Stack
from surgery.instruments import interactions, known_networks
from surgery.instruments.ablation import Damages, damage, freezing
from surgery.instruments.interactions import pairs, sets, summary, table
from surgery.models.engine import Engine
from surgery.records import tables
from surgery.stats.sampling import Sampling


@pytest.mark.parametrize(
    ("system", "rho", "partial", "damages", "mass", "additivity"),
    [
        (SERIES, 1.0, 0.5, (7 / 8, 7 / 8, 7 / 8), 0.0, 0.0),
        (INDEPENDENT, 0.0, 0.0, (7 / 8, 7 / 8, 14 / 8), np.nan, 1.0),
        (BACKUP, -1.0, -1.0, (0.0, 0.0, 7 / 8), 1.0, np.nan),
        (HALF_BACKUP, -1 / 3, -0.2, (7 / 16, 7 / 16, 21 / 16), 1.0, 2.0),
    ],
    ids=["series", "independent", "backup", "half a backup"],
)
def test_systems_of_known_reliability(system, rho, partial, damages, mass, additivity):
    """The margin of one subspace holding the token is 1 less the mean over 8 tokens, 1/8."""
    stack = build_system(**system)
    frame = pairs(stack, TOKENS, "skip", sampling=Sampling(resamples=50))
    assert (frame["status"] == "measured").all()
    assert (frame["saturating"] == "no").all()
    assert (frame["freezing"] == "agrees").all()
    for name, value in (("rho", rho), ("rho_partial", partial)):
        assert np.allclose(frame[[name, f"{name}_low", f"{name}_high"]], value, atol=1e-9), name
    for name, value in zip(("damage", "damage_later", "damage_both"), damages, strict=True):
        assert np.allclose(frame[name], value), name
    assert ((frame["q"] < 0.05) == (rho != 0)).all()
    row = summary(damage(stack, TOKENS, sets(stack.n_layers), "skip", frozen=True), resamples=50).iloc[0]
    assert row["mean_rho"] == pytest.approx(rho, abs=1e-9)
    assert row["redundancy_mass"] == pytest.approx(mass, nan_ok=True)
    for end in ("additivity", "additivity_low", "additivity_high"):
        assert row[end] == pytest.approx(additivity, nan_ok=True, abs=1e-9)
    assert row["n_measured"] == row["n_pairs"] == len(frame)


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_series_and_independence_by_other_ablations(kind):
    for system, rho in ((SERIES, 1), (INDEPENDENT, 0)):
        frame = pairs(build_system(**system), TOKENS, kind, sampling=Sampling(resamples=50))
        # resampled once, the chain is lost; resampled twice, the donor's token comes through, of the same margin
        assert frame["rho"].to_numpy() == pytest.approx(rho, abs=1e-9)


def test_the_nonlinear_loss_makes_independent_layers_interact_and_the_margin_does_not():
    """Cross entropy of a sum of logits: what it has lost of a sure token it cannot lose again (and the other way)."""
    stack = build_system(**INDEPENDENT)
    assert pairs(stack, TOKENS, "skip", "loss", sampling=Sampling(resamples=50))["delta"].abs().min() > 0.01
    assert pairs(stack, TOKENS, "skip", "margin", sampling=Sampling(resamples=50))["delta"].abs().max() < 1e-12


# --- the index on damages made up ---


def simulated(first, later, both, noise=0.0, n_prompts=40):
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor([first, later, both]).double().unsqueeze(1).expand(3, n_prompts)
    value = value + noise * torch.randn(3, n_prompts, generator=generator).double()
    return Damages(((0,), (1,), (0, 1)), value, value)


@pytest.mark.parametrize(
    ("first", "later", "both", "rho"),
    [(2, 3, 3, 1), (2, 3, 5, 0), (2, 3, 4, 0.5), (0, 0, 4, -1), (1, 1, 4, -0.5), (0, 3, 6, -0.5), (2, 3, 2.5, 1.25)],
)
def test_the_index_of_given_damages(first, later, both, rho):
    row = table(simulated(first, later, both), simulated(first, later, both), resamples=20).iloc[0]
    assert row["rho"] == pytest.approx(rho, abs=1e-9)
    assert row["delta"] == pytest.approx(both - first - later)
    noisy = table(*[simulated(first, later, both, 0.2)] * 2, resamples=200).iloc[0]
    assert noisy["rho_low"] < rho < noisy["rho_high"] or noisy["rho"] == pytest.approx(rho, abs=0.1)


@pytest.mark.parametrize(
    ("damages", "status"),
    [
        ((0.0, 3.0, 2.5), "inside noise"),
        ((0.0, 0.0, 0.0), "inside noise"),
        ((-2.0, 3.0, 3.0), "ablation helps"),
        ((2.0, 3.0, 4.0), "measured"),
        ((0.0, 0.0, 3.0), "measured"),  # a backup: its single damages are nothing
    ],
)
def test_pairs_without_an_index_say_why(damages, status):
    row = table(*[simulated(*damages, noise=0.5)] * 2, resamples=100).iloc[0]
    assert row["status"] == status
    assert np.isnan(row["rho"]) == (status != "measured")
    assert row["saturating"] == ("no" if status == "measured" and damages[2] == 3 else "undecided") or damages[2] == 4


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_bound_is_an_objection_to_needed_together_and_to_nothing_else(name):
    system = SYSTEMS[name]
    row = table(damages_of(system.worth), damages_of(system.worth, 0.5), resamples=100).iloc[0]
    assert row["rho"] == pytest.approx(system.rho, abs=0.1)
    assert row["saturating"] == ("yes" if name == "saturating readout" else "no")
    A = summary(damages_of(system.worth), resamples=100)["additivity"][0]
    assert pytest.approx(system.additivity, rel=0.02, abs=0.02, nan_ok=True) == A


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named_and_decides_nothing_else(bad):
    generator = torch.Generator().manual_seed(0)
    value = 1 + torch.rand(10, 40, generator=generator).double()
    made = Damages(tuple(sets(4)), value, value)
    good, sums = table(made, made, resamples=50), summary(made, resamples=50).iloc[0]
    spoilt = value.clone()
    spoilt[made.row[2,], 6] = bad
    frame = table(Damages(made.sets, spoilt, spoilt), made, resamples=50)
    hit = (frame[["layer", "later"]] == 2).any(axis=1)
    assert set(frame.loc[hit, "status"]) == {"undefined: not finite without 2 (prompt 7)"}
    assert frame.loc[hit, ["rho", "q", "delta"]].abs().replace(np.inf, np.nan).isna().all(axis=None)
    assert (frame.loc[hit, "saturating"] == "undecided").all()
    kept = ["rho", "rho_low", "rho_high", "delta", "status", "saturating"]
    assert frame.loc[~hit, kept].equals(good.loc[~hit, kept])
    row = summary(Damages(made.sets, spoilt, spoilt), resamples=50).iloc[0]
    assert row["n_undefined"] == 3
    assert np.isfinite(row[["mean_rho", "additivity", "redundancy_mass"]].astype(float)).all()
    assert sums["n_undefined"] == 0
    nothing = summary(Damages(made.sets, spoilt * bad, spoilt * bad), resamples=50).iloc[0]
    assert nothing[["mean_rho", "additivity", "redundancy_mass"]].isna().all()


def test_one_huge_damage_is_no_excuse_for_the_others():
    """Rounding is judged by the median prompt; by the largest damage, every pair would read rho 0."""
    made = simulated(1, 1, 1, 0.01)
    made.margin[:, 3] *= 1e12
    others = [prompt for prompt in range(40) if prompt != 3]
    rest = interactions._damages(made, made.margin, (0, 1), 1e-5)[:, others]
    assert torch.equal(rest, made.margin[:, others])


def test_frozen_and_live_damages_that_part_are_told():
    frozen, live = simulated(1.3, 1, 2, 0.1), simulated(-0.6, 0.9, 2, 0.1)
    assert freezing(frozen, live)["freezing"].tolist() == ["parts in sign", "agrees", "agrees"]
    assert freezing(frozen, simulated(0.3, 0.9, 2, 0.1))["freezing"].tolist()[0] == "parts in size"
    assert table(frozen, frozen, live=live, resamples=100)["freezing"].tolist() == ["layer 0 parts in sign"]
    live.margin[1, 2] = np.nan
    assert freezing(frozen, live)["freezing"].tolist() == ["parts in sign", "undefined", "agrees"]
    with pytest.raises(ValueError, match="different sets or prompts"):
        freezing(frozen, simulated(1, 1, 1, n_prompts=3))


@pytest.mark.parametrize("shape", ["normal", "skewed, rare gains"])
def test_noise_is_told_from_damage_at_the_rate_of_a_family(shape):
    """Of damages whose true mean is 0, one in twenty networks has a pair with an index; by two errors each, half.

    In full, and for random networks: ``benchmarks.simulations.redundancy``.
    """
    outside, discovered = np.mean([found_in(of_nothing(shape, seed)) for seed in range(20)], axis=0)
    assert outside <= 0.15
    assert discovered <= 0.15


def test_noise_has_half_of_its_mass_in_redundancy():
    value = torch.randn(36, 40, generator=torch.Generator().manual_seed(1)).double()
    row = summary(Damages(tuple(sets(8)), value, value), resamples=50).iloc[0]
    assert 0.2 < row["redundancy_mass"] < 0.8


def test_too_few_prompts_show_nothing():
    for n_prompts, status in ((5, "inside noise"), (6, "measured")):
        made = simulated(2, 3, 4, n_prompts=n_prompts)
        assert table(made, made, resamples=20)["status"].tolist() == [status]


# --- models ---


def test_the_parallel_network_adds_up():
    stack = Stack(known_networks.parallel_network(n_layers=4, norm="RMS", dtype=torch.float64))
    frame = pairs(stack, known_networks.tokens(8, 8), sampling=Sampling(resamples=20))
    assert frame["delta"].abs().max() < 1e-6 * frame["damage"].abs().max()
    live = pairs(stack, known_networks.tokens(8, 8), frozen=False, sampling=Sampling(resamples=20))
    assert live["delta"].abs().max() > 1e-3 * live["damage"].abs().max()


def test_pairs_of_the_untrained_transformer_lie_inside_noise():
    frame = pairs(
        Stack(known_networks.random_network(n_layers=4)),
        known_networks.tokens(32, 10),
        sampling=Sampling(resamples=400),
    )
    assert (frame["status"] == "inside noise").all()
    assert (frame["q"] > 0.05).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_architectures(opened, name, tmp_path):
    tokens = torch.randint(4, 90, (6, 7), generator=torch.Generator().manual_seed(0))
    frame = pairs(opened(name), tokens, sampling=Sampling(resamples=20))
    assert len(frame) == 6
    assert set(frame) == set(interactions.COLUMNS) - {
        column
        for column in interactions.COLUMNS
        if column.startswith(("mean_rho", "redundancy", "additivity", "n_pairs", "n_meas", "n_undef"))
    }
    assert (frame["delta_low"] <= frame["delta_high"]).all()
    path = tables.write(frame, tmp_path / "interactions.csv", {}, interactions.COLUMNS)
    assert tables.read(path)["status"].tolist() == frame["status"].tolist()


def test_it_costs_what_it_says(monkeypatch):
    stack, run, calls = build_system(**SERIES), Engine.layer, []
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(arguments[1]) or run(*arguments))
    pairs(stack, TOKENS, sampling=Sampling(resamples=0, skip_massive=False))
    assert len(calls) == 2 * 3 * (2 / 2 + 2 * 1 / 6 + 3) + 3 * (2 / 2 + 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairs(build_system(**SERIES), TOKENS, amount=1.0), "between 0 and 1, got 1.0"),
        (lambda: table(*[simulated(1, 1, 1)] * 2, "kl"), r"margin \(logits\) or loss \(nats\), not as 'kl'"),
        (lambda: summary(Damages(((0,),), torch.ones(1, 2).double(), torch.ones(1, 2).double())), "no pair of layers"),
        (
            lambda: pairs(Stack(known_networks.parallel_network(n_layers=1)), TOKENS),
            "one layer; an interaction needs two",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
