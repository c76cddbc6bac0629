"""How far back layers read: exact at the ends, right on networks whose layers read known ones, and refused in words."""

import pytest
import torch

from surgery import Stack, models
from surgery.instruments import known_networks
from surgery.series import horizon
from surgery.stats.sampling import Sampling

QUICK = Sampling(resamples=20)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return known_networks.tokens(8, 8)


def test_the_whole_horizon_is_the_model_itself(tokens):
    stack = Stack(known_networks.random_network(n_layers=5))
    frame = horizon.losses(stack, tokens, [4], sampling=QUICK)
    assert frame.loss.abs().max() < 1e-5
    assert frame.kl.abs().max() < 1e-5


def test_parallel_layers_hear_nothing_and_serial_ones_the_last(tokens):
    parallel = horizon.losses(Stack(known_networks.parallel_network()), tokens, [0, 2], sampling=QUICK)
    assert parallel.kl.abs().max() < 1e-5, "no layer reads another, whichever is cut off"
    serial = horizon.losses(Stack(known_networks.serial_network(n_layers=6)), tokens, [0, 1], sampling=QUICK)
    by = serial.set_index(["k", "heard", "seed"]).kl
    assert by[1, "last", 0] < 1e-5
    assert min(by[0, "last", 0], by[1, "first", 0], by[1, "random", 0]) > 1e-3


def test_no_layer_heard_is_every_layer_on_the_embedding_and_the_means(tokens):
    """With k = 0 all choices are one; and the same by hand, one layer at a time."""
    stack = Stack(known_networks.random_network(n_layers=4))
    frame = horizon.losses(stack, tokens, [0], sampling=QUICK.but(skip_massive=False))
    assert frame.loss.nunique() == 1
    context = stack.context(tokens)
    x, clean = context.x0, stack.stream(context)
    keep = torch.arange(x.shape[1]) > 0  # the ensemble leaves out first tokens
    updates, heard = [], x
    for layer in range(4):
        u = stack.update(layer, heard, context)
        mean = (clean[layer + 1] - clean[layer])[:, keep].mean((0, 1))
        heard = heard + torch.where(keep[:, None], mean, u)
        updates.append(u)
    final = x + sum(updates)
    targets = tokens[:, 1:, None]
    before, after = (
        stack.readout(value)[:, :-1].log_softmax(-1).gather(2, targets).mean() for value in (clean[-1], final)
    )
    assert frame.loss[0] == pytest.approx((before - after).item(), abs=1e-5)


def test_batches_change_nothing(tokens):
    stack = Stack(models.load("babel"))
    prompts = stack.tokens(["p3 pf1 >other", "p1 pf2 pf4 >plain", "o1 of0 >plain p7", "p5 pf1 pf4 >other"])
    whole, small = (
        horizon.losses(stack, prompts, [2], sampling=QUICK.but(batch_size=size)).loss.tolist() for size in (4, 2)
    )
    assert whole == pytest.approx(small, abs=1e-5)


def test_each_layer_hears_at_most_k_earlier_ones():
    for heard in horizon.HEARD:
        for layer, chosen in enumerate(horizon.chosen_layers(7, 3, heard)):
            assert len(chosen) == min(3, layer)
            assert all(earlier < layer for earlier in chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ks": [6]}, "0 to 5"), ({"ks": [-1]}, "0 to 5"), ({"ks": []}, "0 to 5"), ({"heard": ["next"]}, "not 'next'")],
)
def test_what_cannot_be_heard_is_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        horizon.losses(Stack(known_networks.parallel_network(n_layers=6)), tokens, **options)
