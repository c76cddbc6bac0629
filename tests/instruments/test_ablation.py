import pandas as pd
import pytest
import torch

from support.exact_networks import ragged, rng
from surgery import Stack
from surgery.instruments import ablation, known_networks
from surgery.instruments.ablation import Damages, damage
from surgery.instruments.ensemble import Ensemble
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling

TOKENS = known_networks.tokens(8, 8)
SETS = [(), (0,), (2,), (0, 2), (1, 2, 3), (0, 1, 2, 3)]


def transformer(**sizes):
    return Stack(known_networks.random_network(**{"n_layers": 4, "dtype": torch.float64, **sizes}))


def by_hand(stack, tokens, layers, amount, replacement):
    """The last stream, layer by layer, with no sharing; the first token of every prompt as it is."""
    context = stack.context(tokens)
    clean = stack.stream(context)
    x = context.x0
    for layer in range(stack.n_layers):
        u = stack.update(layer, x, context)
        if layer in layers:
            instead = (1 - amount) * u + amount * replacement(clean[layer + 1] - clean[layer])
            u = torch.cat([u[:, :1], instead[:, 1:]], 1)
        x = x + u
    return x


def lost(stack, tokens, x):
    """Margin and loss of every prompt, averaged over its predictions from the second token on."""
    logits, targets = stack.readout(x[:, 1:-1]), tokens[:, 2:].unsqueeze(-1)
    margin = logits.gather(-1, targets).squeeze(-1) - logits.mean(-1)
    loss = -logits.log_softmax(-1).gather(-1, targets).squeeze(-1)
    return margin.mean(1), loss.mean(1)


REPLACEMENTS = {
    "skip": lambda u: 0 * u,
    "mean": lambda u: u[:, 1:].mean((0, 1)),
    "resample": lambda u: u.flip(0),  # of two prompts each is the other's donor
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("amount", [1.0, 0.3])
def test_damages_are_those_of_the_layers_taken_out_by_hand(kind, amount):
    stack, tokens = transformer(), known_networks.tokens(2, 8)
    found = damage(stack, tokens, SETS, kind, amount)
    margin, loss = lost(stack, tokens, by_hand(stack, tokens, (), amount, REPLACEMENTS[kind]))
    for layers in SETS:
        after = lost(stack, tokens, by_hand(stack, tokens, layers, amount, REPLACEMENTS[kind]))
        torch.testing.assert_close(found.margin[found.row[layers]], margin - after[0])
        torch.testing.assert_close(found.loss[found.row[layers]], after[1] - loss)
    assert found.margin[1:].abs().min() > 1e-6


def test_frozen_norms_make_independent_layers_add_up_and_live_ones_do_not():
    sets = [(1,), (3,), (1, 3)]
    for frozen, most in ((True, 1e-6), (False, None)):
        stack = Stack(known_networks.mixed_network(0.0, 4, norm="RMS", dtype=torch.float64))
        found = damage(stack, TOKENS, sets, "skip", frozen=frozen)
        excess = (found.margin[2] - found.margin[0] - found.margin[1]).abs().max() / found.margin.abs().max()
        assert excess < most if most else excess > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_with_frozen_norms_taking_nothing_out_costs_nothing(opened, name):
    stack = opened(name, torch.float64)
    found = damage(stack, torch.randint(4, 90, (3, 6), generator=rng()), SETS, "resample", frozen=True)
    assert found.margin[0].abs().max() < 1e-9
    assert (found.margin[1:].abs().amax(1) > 0).all()


def test_padding_and_batches_do_not_matter():
    stack, longer = transformer(), slice(1, None)  # the first of these prompts has two tokens: it predicts none
    right, left = ragged("right")[longer], ragged("left")[longer]
    for frozen in (False, True):
        plain = damage(stack, right, SETS, frozen=frozen)
        for other in (
            damage(stack, left, SETS, frozen=frozen),
            damage(stack, right, SETS, frozen=frozen, sampling=Sampling(batch_size=4)),
        ):
            torch.testing.assert_close(other.margin, plain.margin)
            torch.testing.assert_close(other.loss, plain.loss)


def test_resampled_updates_are_another_prompts_and_reproducible():
    ensemble = Ensemble(Tokens.of(TOKENS), Sampling(batch_size=1, seed=3))
    runs = list(ablation.clean_runs(transformer(), ensemble, "resample"))
    assert [len(run.mask) for run in runs] == [3, 3, 2]  # nobody is left without a donor
    for run in runs:
        own, given = run.update(1), run.replacement(1)
        assert (own[:, 1:] - given[:, 1:]).norm(dim=-1).min() > 0
        torch.testing.assert_close(own.sum(0), given.sum(0))  # a permutation within every place
    one, same, other = (
        damage(transformer(), TOKENS, SETS, "resample", sampling=Sampling(seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one.margin, same.margin)
    assert not torch.equal(one.margin, other.margin)


def test_it_costs_what_it_says(monkeypatch):
    stack, run, calls = transformer(n_layers=6), Engine.layer, []
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(arguments[1]) or run(*arguments))
    monkeypatch.setattr(Stack, "readout", lambda self, x: x @ torch.ones(48, 256, dtype=torch.float64))
    singles = [(i,) for i in range(6)]
    pairs = [(i, j) for j in range(6) for i in range(j)]
    for sets, amount, expected in (
        (singles, 1.0, 6 * 5 / 2),
        ([*singles, *pairs], 1.0, 6 * (5 / 2 + 5 * 4 / 6)),
        ([*singles, *pairs], 0.5, 6 * (5 / 2 + 5 * 4 / 6)),
    ):
        for kind, frozen, more in (("skip", False, 1), ("mean", False, 2), ("mean", True, 3)):
            calls.clear()
            damage(stack, TOKENS, sets, kind, amount, frozen=frozen, sampling=Sampling(skip_massive=False))
            assert len(calls) == expected + 6 * more


def test_the_frame_names_sets_and_holds_their_intervals():
    found = damage(transformer(), TOKENS, [(2, 0), (0, 2), (1,)])
    assert found.sets == ((0, 2), (1,))
    frame = found.frame(resamples=50)
    assert list(frame) == list(ablation.COLUMNS)
    assert frame["layers"].tolist() == ["0 2", "1"]
    assert frame["margin"].tolist() == pytest.approx(found.margin.mean(1).tolist())
    assert (frame["loss_low"] < frame["loss"]).all()
    assert (frame["loss"] < frame["loss_high"]).all()
    pd.testing.assert_frame_equal(found.frame(resamples=50), frame)
    single = Damages(((0,),), torch.ones(1, 1).double(), torch.ones(1, 1).double()).frame()
    assert single["margin_low"].isna().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "zero"}, "taken out by skip, mean, resample, not by 'zero'"),
        ({"amount": 1.5}, "above 0 and up to 1, got 1.5"),
        ({"sets": [(1, 9)]}, "no layer 9 to take out: .* has 0 to 3"),
        ({"tokens": TOKENS[:1], "kind": "resample"}, "give two or more, or kind='mean'"),
        ({"tokens": TOKENS[:, :2]}, "prompt 1 predicts no token from the ensemble: give prompts of 3 tokens or more"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        damage(transformer(), **{"tokens": TOKENS, "sets": SETS, **arguments})


def test_a_stream_that_is_not_finite_is_refused():
    stack = transformer()
    with torch.no_grad():
        dict(stack.model.named_parameters())["tok_embed._original_component.weight"].fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        damage(stack, TOKENS, SETS, "skip")
