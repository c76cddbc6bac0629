"""The share of a displacement that arrives at the end: the Jacobian lens's trace, and a displaced run's ``along``."""

import pytest
import torch
from transformer_lens.tools.analysis import JacobianLens

import surgery
from surgery import Stack
from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble
from surgery.models.tokens import Tokens
from surgery.reversion import arrival
from surgery.stats.sampling import Sampling

QUICK = Sampling(resamples=50, batch_size=8, skip_massive=False)


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(surgery.load("babel"))


@pytest.fixture(scope="module")
def ids(stack) -> torch.Tensor:
    return stack.tokens(["p3 pf1 pf4 >other"] * 1 + ["p1 pf2 pf5 >plain", "p7 pf0 pf3 >other"]).ids


def test_whole_is_the_trace_of_the_jacobian_lens(stack, ids):
    tokenizer = stack.tokenizer
    texts = [" ".join(tokenizer.convert_ids_to_tokens(row[1:].tolist())) for row in ids]
    lens = JacobianLens.fit(
        stack.model, texts, corpus="three problems", dim_batch=32, skip_first_positions=1, show_progress=False
    )
    mask = torch.ones_like(ids, dtype=torch.bool)
    last = torch.zeros_like(mask)
    last[:, -1] = True
    ensemble = Ensemble(Tokens(ids, mask), QUICK, left_out=last)
    frame = arrival.shares(stack, ensemble, draws=200, sampling=QUICK)
    for layer in (0, 5, 10):
        exact = lens.jacobians[layer].trace().item() / stack.d_model
        assert frame.whole[layer] == pytest.approx(exact, abs=0.02)


def test_own_is_what_a_small_displacement_leaves_at_its_token(stack, ids):
    """By hand: one token moved a little in many random directions, and followed to the end."""
    ensemble = Ensemble(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), QUICK)
    frame = arrival.shares(stack, ensemble, draws=100, sampling=QUICK)
    context, layer = stack.context(ids), 8
    clean = stack.stream(context)
    generator, along = torch.Generator().manual_seed(0), []
    for position in range(1, ids.shape[1]):
        for _ in range(40):
            moved, d = clean[layer + 1].clone(), torch.zeros_like(clean[0])
            d[:, position] = 1e-3 * torch.randn(d[:, position].shape, generator=generator)
            ends = stack.execute(f"{layer + 1}:", moved + d, context)
            along.append(((ends - clean[-1]) * d).sum() / d.square().sum())
    assert frame.own[layer] == pytest.approx(torch.stack(along).mean().item(), abs=0.03)


def test_a_stack_that_nobody_reads_lets_everything_through():
    parallel = Stack(known_networks.linear_network(n_layers=3))
    frame = arrival.shares(parallel, known_networks.tokens(6, 5), draws=2, sampling=QUICK)
    assert (frame.own > 0).all()
    doubled = arrival.shares(parallel, known_networks.tokens(6, 5), draws=2, sampling=QUICK.but(batch_size=2))
    assert doubled.own.tolist() == pytest.approx(frame.own.tolist(), abs=0.3)


def test_no_draws_are_refused(stack, ids):
    with pytest.raises(ValueError, match="1 or more, got 0"):
        arrival.shares(stack, ids, draws=0)
