import numpy as np
import pytest
import torch

from benchmarks.simulations import redundancy as simulations
from surgery import Stack
from surgery.dropout import features
from surgery.dropout.features import activations, effective, kurtosis, participation, sae, sparsity, within
from surgery.models.errors import ModelError
from surgery.models.loading import untrained
from surgery.models.tokens import Tokens
from surgery.rebuild import units
from surgery.records import tables
from surgery.stats.sampling import Sampling

TOKENS = torch.randint(4, 90, (12, 8), generator=torch.Generator().manual_seed(0))


def planted(n_features, n_neurons, tokens=3000, active=2.0, seed=1):
    return simulations.planted(n_features, n_neurons, tokens, active, seed)[0]


def fitted(x, n_features, **options):
    """F and explained variance on the last third of the tokens, mean of two autoencoders fitted to the others."""
    learnt, held = x[: 2 * len(x) // 3], x[2 * len(x) // 3 :]
    coders = [sae(learnt, n_features, 2, seed=seed, **options) for seed in range(2)]
    return tuple(
        np.mean([[float(effective(coder.encode(held))), coder.report(held)["explained"]] for coder in coders], 0)
    )


# --- the effective number of features ---


@pytest.mark.parametrize(("n_features", "n_neurons"), [(32, 16), (16, 16)])
def test_planted_features_are_counted(n_features, n_neurons):
    """The number that is true is what the planted features themselves give: all of them, to a hundredth."""
    found, explained = fitted(planted(n_features, n_neurons), 64)
    assert found == pytest.approx(n_features, rel=0.12)
    assert explained > 0.85
    assert (found / n_neurons > 1.5) == (n_features > n_neurons)


def test_matched_variance_does_not_follow_density_and_a_fixed_k_does():
    fixed, read = zip(*(simulations.psi(active) for active in (2, 8)))
    assert abs(fixed[0] - fixed[1]) > 0.4
    assert read == pytest.approx([0.75, 0.75], abs=0.13)
    assert abs(read[0] - read[1]) < 0.1


def test_a_level_that_no_autoencoder_reaches_has_no_number():
    x = planted(24, 16, tokens=600)
    found = features.matched(x[:400], x[400:], 40, ks=(1, 2), level=0.999, steps=30)
    assert (found.k, bool(found.F.isnan().all())) == (2, True)
    assert found.explained < 0.999
    with pytest.raises(ValueError, match="give rising ks"):
        features.matched(x, x, 40, ks=(4, 2))


def test_shuffled_neurons_are_features_each():
    """Sixteen neurons that carry 32 features are, each by itself, no more than sixteen."""
    x = planted(32, 16, active=1.0)
    shuffled = features._shuffle(x, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.sort(0).values, x.sort(0).values)
    together = torch.corrcoef(x.T).fill_diagonal_(0).abs().max()
    assert torch.corrcoef(shuffled.T).fill_diagonal_(0).abs().max() < 0.1 < together


def test_the_autoencoder_is_what_it_says():
    x = planted(24, 16, tokens=600)
    coder = sae(x, 40, 3, steps=60)
    assert torch.allclose(coder.decoder.norm(dim=1), torch.ones(40), atol=1e-5)
    found = coder.encode(x)
    report = coder.report(x)
    assert (found >= 0).all()
    assert report["L0"] == pytest.approx(3)
    missed = (x - coder.decode(found)).square().sum() / (x - x.mean(0)).square().sum()
    assert report["explained"] == pytest.approx(1 - float(missed))
    assert report["dead"] == pytest.approx(float((found == 0).all(0).float().mean()))
    again = sae(x, 40, 3, steps=60)
    assert torch.equal(again.encoder, coder.encoder)
    assert not torch.equal(sae(x, 40, 3, steps=60, seed=1).encoder, coder.encoder)


def test_longer_training_explains_more():
    x = planted(32, 16, tokens=900)
    assert fitted(x, 48, steps=10)[1] < fitted(x, 48, steps=100)[1] - 0.1


# --- statistics of neurons ---


def gaussian(tokens=20000, n=8, seed=0):
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))


def test_gaussian_and_uniform_neurons():
    assert float(kurtosis(gaussian())) == pytest.approx(0, abs=0.05)
    assert float(kurtosis(gaussian().erf())) < -0.5
    assert float(kurtosis(torch.rand(20000, 4, generator=torch.Generator().manual_seed(0)))) == pytest.approx(
        -1.2, 0.03
    )
    sparse = gaussian() * (torch.rand(20000, 8, generator=torch.Generator().manual_seed(1)) < 0.1)
    assert float(kurtosis(sparse)) == pytest.approx(3 / 0.1 - 3, rel=0.1)
    assert float(participation(gaussian(4000))) == pytest.approx(8, rel=0.01)
    assert float(participation(gaussian(4000) @ torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])))) == pytest.approx(
        3, rel=0.01
    )
    line = gaussian(100, 1) @ torch.ones(1, 5) + 7
    assert float(participation(line)) == pytest.approx(1)


def test_sparsity_counts_what_is_small_for_its_neuron():
    x = torch.tensor([[10.0, 1.0], [0.4, -0.04], [-0.6, 0.5], [0.0, 0.06]])
    assert float(sparsity(x)) == pytest.approx(3 / 8)
    assert float(sparsity(x, torch.tensor([[0.0, 2.0, 0.0, 2.0]]).double())) == pytest.approx(3 / 4)
    assert sparsity(x.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan))).isnan()


@pytest.mark.parametrize("measure", [effective, participation, kurtosis])
def test_weights_are_repetitions(measure):
    x = gaussian(60, 5).relu() ** 2
    counts = torch.randint(0, 4, (3, 60), generator=torch.Generator().manual_seed(1))
    repeated = [float(measure(x.repeat_interleave(row, 0))) for row in counts]
    assert measure(x, counts.double()).tolist() == pytest.approx(repeated)


def test_neurons_that_never_vary_count_nothing():
    x = torch.cat([gaussian(500, 3), torch.zeros(500, 2)], 1)
    for measure in (participation, kurtosis, effective):
        assert float(measure(x)) == pytest.approx(float(measure(x[:, :3])))


# --- models ---


def test_neurons_of_a_native_model_are_recorded(load):
    """Multiplied by the output weights, the recorded activations are what the MLP writes."""
    model = load("native-gated")
    written = []
    model.blocks[1].mlp.hook_out.add_hook(lambda out, hook: written.append(out[:, 1:].flatten(0, 1)))
    model(TOKENS)
    model.reset_hooks()
    neurons = activations(Stack(model), TOKENS, [1])[0]
    rows = units.writers(model, "mlp")[1].rows.squeeze(1)
    rest = written[0] - neurons @ rows
    assert rest.std(0).max() < 1e-5 < written[0].std(0).min()  # but for the bias


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "mixtral"])
def test_recorded_activations_are_those_that_write(load, name):
    """The importance of a neuron is the sum of its recorded activations, times the length of what it writes."""
    model = load(name)
    recorded = activations(Stack(model), TOKENS)
    assert len(recorded) == 4
    assert all(len(x) == 12 * 7 for x in recorded)
    for x, expected, writer in zip(recorded, units.importance(model, "mlp", TOKENS), units.writers(model, "mlp")):
        found = x.double().abs().sum(0).reshape(writer.shape) * writer.magnitude()
        assert torch.allclose(found, expected, rtol=1e-4)


def test_padding_and_batches_change_nothing(load):
    stack, tokens = Stack(load("llama")), Tokens.of(TOKENS)
    expected = activations(stack, tokens)[2]
    for other in (tokens.pad(3, "left"), tokens.pad(3, "right")):
        assert torch.allclose(activations(stack, other, [2], batch_size=5)[0], expected, atol=1e-5)


def test_within_a_model_and_the_same_untrained(load, tmp_path):
    model = load("gpt2")
    options = dict(layers=[1, 3], steps=15, ks=(2, 40), level=0.1, n_features=64, sampling=Sampling(resamples=30))
    frame = within(Stack(model), TOKENS, **options)
    assert frame["layer"].tolist() == [1, 3]
    assert set(frame) == set(features.COLUMNS)
    assert frame["L0"].between(2, 40).all()
    assert (frame["psi"] == frame["F"] / frame["n_neurons"]).all()
    for name in ("F", "kurtosis", "sparsity"):
        assert (frame[f"{name}_low"] <= frame[f"{name}_high"]).all()
    everything = torch.cat(activations(Stack(model), TOKENS, [3]))
    assert frame["participation"][1] == pytest.approx(float(participation(everything)))
    assert (frame["participation"] < frame["participation_shuffled"]).all()
    again = within(Stack(model), TOKENS, **options)
    assert again.equals(frame)
    assert not within(Stack(untrained(model, 0)), TOKENS, **options)["F"].equals(frame["F"])
    path = tables.write(frame, tmp_path / "features.csv", {}, features.COLUMNS)
    assert tables.read(path)["F"].tolist() == frame["F"].tolist()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda stack: sae(torch.randn(9, 4), 8, 9), ValueError, "give a k from 1 to 8, got 9"),
        (lambda stack: sae(torch.ones(9, 4), 8, 2), ValueError, "constant or not finite"),
        (lambda stack: activations(stack, TOKENS, [0, 4]), ValueError, "no layer 4 to record: .* has 0 to 3"),
        (lambda stack: within(stack, TOKENS, seeds=0), ValueError, "at least one seed"),
        (lambda stack: within(stack, TOKENS[:1]), ValueError, "there is one prompt"),
        (lambda stack: activations(stack, TOKENS), ModelError, "has no mlp"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(load, call, error, message):
    stack = Stack(load("native-attention-only"))
    with pytest.raises(error, match=message):
        call(stack)
