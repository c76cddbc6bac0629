"""Are walked activations like real ones? On streams of which it is known."""

import pytest
import torch

from surgery import Stack
from surgery.graft import draw, manifold, walk
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.stats.sampling import Sampling


@pytest.fixture(scope="module")
def made():
    stack = Stack(known_networks.random_network(n_layers=4, d_model=12))
    seen, heldout = (Tokens.of(known_networks.tokens(count, 8, seed=count)) for count in (160, 60))
    return stack, walk.fit(stack.stream(seen)[2], seen.mask, positions=2, variance=0.9), heldout


KINDS = {
    "near": walk.Stationary(0.99),
    "stationary": walk.Stationary(0.5),
    "far": walk.Free(2.0),
    "between": walk.Interpolated(1.0),
}


@pytest.fixture(scope="module")
def frame(made):
    stack, found, heldout = made
    return manifold.report(stack, found, KINDS, heldout, 2, sampling=Sampling(batch_size=13))


def row(frame, kind, control=False):
    return frame[(frame.kind == kind) & (frame.control == control)].iloc[0]


def test_real_activations_are_usual(frame):
    real = row(frame, "real")
    assert real.moved == 0
    assert real.entropy_change == 0
    assert real.nearest == 1
    assert real.mahalanobis_low < 1.1
    assert real.mahalanobis_high > 0.9
    assert real.beyond_real_low <= 0.06
    assert real.beyond_real_high >= 0.04


def test_stationary_steps_are_usual_and_free_ones_are_not(frame):
    still, far = row(frame, "stationary"), row(frame, "far")
    assert abs(still.mahalanobis - 1) < 0.1
    assert far.mahalanobis == pytest.approx(5, rel=0.1)  # 1 + eta^2
    assert still.beyond_chi_squared < 0.1 < 0.9 < far.beyond_chi_squared
    assert still.beyond_real < 0.15 < 0.9 < far.beyond_real
    assert 1 < still.nearest < far.nearest
    assert row(frame, "between").mahalanobis_high < 1  # between two is nearer to the mean
    assert abs(row(frame, "near").entropy_change) < abs(far.entropy_change)


def test_the_control_goes_as_far_and_leaves_where_the_kind_stays(frame):
    for kind in KINDS:
        one, control = row(frame, kind), row(frame, kind, True)
        assert control.moved == pytest.approx(one.moved, rel=0.1)
        if kind != "far":
            assert control.mahalanobis > one.mahalanobis
            assert control.nearest > one.nearest


def test_it_is_the_streams_entropy(made, frame):
    stack, _, heldout = made
    half = manifold.halves(heldout)[1]
    log_p = stack.run(half).log_softmax(-1)[:, 1:]
    assert row(frame, "real").entropy == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-5)


def test_rows_do_not_depend_on_batches_and_have_every_column(made, frame):
    stack, found, heldout = made
    again = manifold.report(stack, found, KINDS, heldout, 2)
    assert list(frame.columns) == list(manifold.COLUMNS)
    assert (frame.n_prompts == 30).all()
    numbers = [name for name in frame.columns if name not in ("kind", "control")]
    assert torch.allclose(*(torch.tensor(f[numbers].to_numpy(float)) for f in (frame, again)), rtol=1e-3, atol=1e-3)
    assert ((frame.entropy_low <= frame.entropy) & (frame.entropy <= frame.entropy_high)).all()


def test_padding_is_left_out(made):
    stack, found, heldout = made
    plain, padded = (
        manifold.report(stack, found, {"s": walk.Stationary(0.5)}, tokens, 2, sampling=Sampling(resamples=20))
        for tokens in (heldout, heldout.pad(3, "right"))
    )
    for name in manifold.MEASURES:
        assert padded[name].to_numpy() == pytest.approx(plain[name].to_numpy(), rel=1e-3, abs=1e-5)


def test_halves_are_disjoint_and_drawn_by_seed(made):
    tokens = Tokens.of(torch.arange(21).reshape(7, 3))
    one, other = manifold.halves(tokens)
    assert (len(one), len(other)) == (3, 4)
    assert sorted([*one.ids[:, 0].tolist(), *other.ids[:, 0].tolist()]) == tokens.ids[:, 0].tolist()
    assert one.ids.tolist() != tokens.ids[:3].tolist()
    assert one.ids.tolist() != manifold.halves(tokens, seed=1)[0].ids.tolist()


def test_figure(frame):
    assert drawing.png(draw.walked_activations(frame))[1:4] == b"PNG"


def test_what_cannot_be_is_said(made):
    stack, found, heldout = made
    wide = walk.fit(torch.randn(300, 2, 5), positions=1)
    for arguments in ((found, {}, heldout[:3], 2), (found, {}, heldout, 4), (wide, {}, heldout, 2)):
        with pytest.raises(ValueError, match="four prompts or more, a layer of"):
            manifold.report(stack, *arguments)
