"""Healing: what is planted is repaired exactly, what is whole stays, and all that was learnt is in the weights."""

import sys

import pytest
import torch

import surgery
from support.known_wirings import difference
from surgery.compiler import heal
from surgery.compiler.frontier import Halves
from surgery.corpus.probes import Encoded
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.rebuild import fuse, layout
from surgery.training.loop import Schedule

PAIR = f"0 {fuse.group([1, 2])} 3:"
FEW = Schedule(steps=6, batch=4, learning_rate=2e-2, warmup=1, every=2, patience=9)
GAIN = 0.5


@torch.no_grad()
def swelling():
    """A network whose layer 1 makes the stream (but for a common mean) 1 + GAIN times as large, while layer 2 turns it.

    Side by side, what layer 2 writes is too small by that factor and nothing else is wrong.
    """
    model = known_networks.linear_network(n_layers=4, d_model=16, gain=GAIN)
    weights = {name.replace("._original_component", ""): weight for name, weight in model.named_parameters()}
    turn, bias = weights["layers.1.mlp.fc_in.weight"][:16].clone(), weights["layers.1.mlp.fc_out.bias"]
    weights["layers.1.mlp.fc_in.weight"][:] = torch.cat([torch.eye(16), -torch.eye(16)])
    bias[:] = turn.T @ bias  # as if it had never turned
    weights["head.weight"] *= 4  # sure of the next token, so that every deviation costs
    return model


@pytest.fixture(scope="module")
def planted():
    return surgery.Stack(swelling())


def random_tokens(n_prompts=32, length=8, vocabulary=96, seed=0):
    ids = torch.randint(4, vocabulary, (n_prompts, length), generator=torch.Generator().manual_seed(seed))
    return Tokens.of(ids)


def written(stack, seed):
    """Prompts of which the network itself wrote all but the first two tokens."""
    ids = known_networks.tokens(24, 2, seed=seed)
    for _ in range(6):
        ids = torch.cat([ids, stack.run(ids)[:, -1:].argmax(-1)], 1)
    return Tokens.of(ids)


def encoded(tokens):
    scored, count = tokens.mask.clone(), len(tokens)
    scored[:, :2] = False
    return Encoded(tokens, scored, tuple(range(count)), (0,) * count, ("all",) * count, "made here")


def test_a_branch_of_the_wrong_size_is_repaired_by_its_scalar(planted):
    schedule = Schedule(steps=150, batch=16, learning_rate=5e-2, warmup=5, every=50, final_share=0.001)
    healed = heal.together(planted, PAIR, known_networks.tokens(32, 8), schedule=schedule)
    assert healed.curve["stream"].iloc[0] > 1e-3
    assert healed.curve["stream"].iloc[-1] < 1e-9
    before, after = (layout.source_of(model).layers for model in (planted.model, healed.model))
    for layer, factor in ((1, 1.0), (2, 1 + GAIN)):
        for name in ("weight", "bias"):
            old, new = (getattr(layers[layer].mlp.fc_out, name) for layers in (before, after))
            assert torch.allclose(new, factor * old, rtol=1e-3, atol=1e-4)
    tokens = known_networks.tokens(8, 8, seed=1)
    assert difference(surgery.Stack(healed.model).run(tokens, PAIR), planted.run(tokens)) < 1e-3
    assert difference(planted.run(tokens, PAIR), planted.run(tokens)) > 2e-2


def test_what_needs_no_healing_stays_as_it_is():
    stack = surgery.Stack(known_networks.parallel_network())
    for how in heal.WAYS:
        healed = heal.together(stack, PAIR, known_networks.tokens(32, 8), how, schedule=FEW)
        assert healed.curve["stream"].max() < 1e-12
        tokens = known_networks.tokens(8, 8, seed=1)
        assert difference(healed.model(tokens), stack.run(tokens)) < 1e-5


@pytest.mark.parametrize("how", heal.WAYS)
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "native-ln"])
def test_what_was_learnt_is_in_the_weights(opened, name, how):
    """The healed model computes what the last row of the curve says, fused too, and nothing outside has changed."""
    stack = opened(name)
    wiring = "0 2 {1.attn | 3.attn} {1.mlp | 3.mlp}" if name == "gemma3" else PAIR  # two layers of one kind
    start, group = (1, (1, 3)) if name == "gemma3" else (1, (1, 2))
    tokens, before = random_tokens(), stack.run(random_tokens(seed=1))
    healed = heal.together(stack, wiring, tokens, how, rank=2, schedule=FEW)
    after = surgery.Stack(healed.model)
    heldout = tokens[28:]
    _, stop, middle = heal.changed(healed.wiring)
    context = stack.context(heldout)
    entering = stack.execute(f":{start}", context.x0, context)
    expected = stack.execute(f"{start}:{stop}", entering, context)
    error = (after.execute(middle, entering, context) - expected).square().sum(-1) / expected.square().sum(-1)
    best = healed.curve["stream"].min()
    assert best < 0.99 * healed.curve["stream"].iloc[0]
    assert float(error.mean()) == pytest.approx(best, rel=1e-3)
    if name != "gpt2":
        fused = fuse.together(healed.model, wiring)
        assert difference(fused(heldout.ids), after.run(heldout, wiring)) < 1e-4
    old, new = (dict(layout.tensors(layout.source_of(model))) for model in (stack.model, healed.model))
    path = layout.layers_path(stack.model)
    inside = tuple(f"{path}.{layer}." for layer in group)
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith(inside))
    assert torch.equal(stack.run(random_tokens(seed=1)), before)


def test_how_much_is_recovered(planted):
    halves = Halves(encoded(written(planted, 0)), encoded(written(planted, 1)), written(planted, 2), metric="loss")
    schedule = Schedule(steps=60, batch=8, learning_rate=5e-2, warmup=5, every=20, patience=9)
    frame = heal.measure(planted, halves, PAIR, ways=["norms"], schedule=schedule).set_index("way")
    assert frame.columns.tolist() == list(heal.COLUMNS)[1:]
    assert frame.loc["none", "cost_low"] > 0
    assert frame.loc["none", ["recovered", "parameters", "operations"]].fillna(0).eq(0).all()
    norms = frame.loc["norms"]
    assert abs(norms["cost"]) < 0.02 * frame.loc["none", "cost"]
    assert 0.95 < norms["recovered_low"] <= norms["recovered"] <= norms["recovered_high"] < 1.05
    assert norms["parameters"] == 4
    assert norms["tokens"] == 60 * 8 * 8
    assert norms["passes"] > norms["tokens"] / 4  # two layers of four forward and backward


def test_nothing_is_recovered_where_nothing_was_lost():
    stack = surgery.Stack(known_networks.parallel_network())
    halves = Halves(encoded(written(stack, 0)), encoded(written(stack, 1)), written(stack, 2))
    frame = heal.measure(stack, halves, PAIR, ways=["norms"], schedule=FEW)
    assert frame["cost"].abs().max() < 1e-5
    assert frame["recovered"].isna().all()


def test_with_logits_too(opened):
    stack = opened("llama")
    healed = heal.together(stack, PAIR, random_tokens(), stream=0.0, kl=1.0, schedule=FEW)
    assert healed.curve["kl"].min() < 0.99 * healed.curve["kl"].iloc[0]
    entries = healed.ledger.frame().set_index("phase")["operations"]
    assert entries["healing: teacher"] > 0
    assert healed.operations == entries.sum()


def test_the_same_call_again_gives_the_same(opened, tmp_path):
    first, again = (
        heal.together(opened("llama"), PAIR, random_tokens(), "low rank", schedule=FEW, folder=tmp_path) for _ in "12"
    )
    assert torch.equal(first.model(known_networks.tokens(2, 8) % 96), again.model(known_networks.tokens(2, 8) % 96))
    assert first.curve.equals(again.curve)


def test_what_cannot_be_healed_says_why(opened, planted, monkeypatch):
    stack, tokens = opened("llama"), random_tokens()
    with pytest.raises(ValueError, match="norms or low rank, not 'all'"):
        heal.together(stack, PAIR, tokens, "all")
    with pytest.raises(ValueError, match=r"no layers side by side to heal: write groups as \{7"):
        heal.together(stack, ":2 3:", tokens)
    with pytest.raises(ValueError, match="cannot be one layer"):
        heal.together(stack, "0 mean{1 | 2} 3", tokens)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs PEFT, .*pip install 'surgery\[heal\]', or heal norms"):
        heal.together(stack, PAIR, tokens, "low rank", schedule=FEW)
    probes = encoded(written(planted, 0))
    with pytest.raises(ValueError, match="nothing to learn from"):
        heal.measure(planted, Halves(probes, probes), PAIR)
    with pytest.raises(ValueError, match="all texts to learn from are measured on"):
        heal.measure(planted, Halves(probes, probes, written(planted, 0)), PAIR)
