"""Directions that the following layers read least and most: by hand on one token, and what walks along them do."""

import pytest
import torch

import surgery
from surgery import Stack
from surgery.corpus import bundled
from surgery.graft import manifold, unread, walk
from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling

START = 4


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(surgery.load("babel"))


@pytest.fixture(scope="module")
def tokens(stack) -> Tokens:
    return stack.tokens(bundled.prompts(160))


def test_strength_is_the_mean_square_of_the_jacobian():
    """On a network whose Jacobian at the last token can be written out: one prompt, its last token alone measured."""
    stack, ids = Stack(known_networks.random_network(n_layers=3, d_model=8)), known_networks.tokens(1, 4)
    x, context = stack.stream(ids)[1], stack.context(ids)

    def end(last):
        return stack.execute("1:", torch.cat([x[:, :-1], last[None, None]], 1), context, grad=True)[0, -1]

    jacobian = torch.autograd.functional.jacobian(end, x[0, -1])
    exact = torch.linalg.eigvalsh(jacobian.T @ jacobian)
    left_out = torch.ones_like(ids, dtype=torch.bool)
    left_out[:, -1] = False
    sampling = Sampling(skip_massive=False)
    ensemble = Ensemble(Tokens.of(ids), sampling, left_out=left_out)
    strength, basis = unread.read_directions(stack, ensemble, 1, draws=3000, sampling=sampling)
    assert strength.float().tolist() == pytest.approx(exact.tolist(), rel=0.2)
    assert torch.allclose(basis.T @ basis, torch.eye(8), atol=1e-5)


def test_walks_along_what_is_not_read_cost_less_than_others(stack, tokens):
    few, rest = tokens[:112], tokens[112:]
    _, basis = unread.read_directions(stack, few, START)
    step = walk.Stationary(0.9)
    kinds = {
        "least": unread.Confined(step, basis[:, :32]),
        "most": unread.Confined(step, basis[:, -32:]),
    }
    fitted = walk.fit(stack.stream(few)[START], few.mask)
    report = manifold.report(stack, fitted, kinds, rest, START, sampling=Sampling(resamples=20))
    by = report.set_index(["kind", "control"])
    assert by.moved["least", False] == pytest.approx(by.moved["least", True], rel=1e-4), "as far, in any direction"
    assert by.loss_change["least", False] < by.loss_change["least", True] < by.loss_change["most", False]


def test_the_loss_of_unwalked_activations_is_the_models_own(stack, tokens):
    few, rest = tokens[:112], tokens[112:]
    fitted = walk.fit(stack.stream(few)[START], few.mask)
    sampling = Sampling(resamples=0, skip_massive=False)
    row = manifold.report(stack, fitted, {}, rest, START, sampling=sampling).iloc[0]
    _, half = manifold.halves(rest)
    log_p = stack.run(half).log_softmax(-1)[:, :-1].gather(2, half.ids[:, 1:, None])[..., 0]
    predicting = half.mask[:, 1:] & half.mask[:, :-1]
    predicting[:, 0] = False  # the ensemble leaves out first tokens
    assert row.loss == pytest.approx(-log_p[predicting].mean().item(), abs=1e-4)
    assert row.loss_change == 0


def test_what_cannot_be_is_refused(stack, tokens):
    with pytest.raises(ValueError, match="0 to 11"):
        unread.read_directions(stack, tokens, 12)
    with pytest.raises(ValueError, match="orthonormal"):
        unread.Confined(walk.Stationary(0.9), torch.ones(4, 2))
