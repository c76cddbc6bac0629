import pytest
import torch

from support.exact_networks import network, rng
from surgery import Stack
from surgery.graft.linear_maps import RIDGES, Affine, linear, mean_update, skip
from surgery.instruments import fidelity, known_networks
from surgery.stats.sampling import Sampling
from surgery.training.activations import Moments


def moments(x, u):
    x, u = x.double(), u.double()
    cx, cu = x - x.mean(0), u - u.mean(0)
    return Moments(len(x), x.mean(0), u.mean(0), cx.T @ cx / len(x), cx.T @ cu / len(x), cu.T @ cu / len(x))


def pairs(count, d=6, noise=0.5, seed=0):
    """Pairs of which a linear map, and a mean, explain a part; one dimension is massive."""
    draw, truth = rng(seed), torch.randn(d, d, generator=rng(99)).double()
    x = torch.randn(count, d, generator=draw).double() * torch.tensor([100.0, *[1.0] * (d - 1)]) + 3
    return x, x @ truth / 10 + 2 + noise * torch.randn(count, d, generator=draw).double()


def residual(fit, x, u):
    """One minus R^2, by hand."""
    return float((fit(x[None])[0] - x - u).square().sum() / (u - u.mean(0)).square().sum())


def test_without_ridge_it_is_least_squares():
    x, u = pairs(40)
    fit = linear(moments(x, u), ridge=0.0)
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    expected = torch.linalg.lstsq(design, u).solution
    torch.testing.assert_close(torch.cat([fit.matrix, fit.bias[None]]), expected)


def test_with_few_tokens_it_is_the_least_squares_of_least_length():
    x, u = pairs(4)
    fit = linear(moments(x, u), ridge=0.0)
    scale = (x - x.mean(0)).square().mean(0).sqrt()  # lengths are measured in units of what x varies
    expected = torch.linalg.pinv((x - x.mean(0)) / scale) @ (u - u.mean(0)) / scale.unsqueeze(1)
    torch.testing.assert_close(fit.matrix, expected)
    assert fit.unexplained(moments(x, u)) < 1e-12


def test_ridge_is_that_of_the_augmented_least_squares():
    x, u = pairs(50)
    fit = linear(moments(x, u), ridge=0.3)
    scale = (x - x.mean(0)).square().mean(0).sqrt()
    z = torch.cat([(x - x.mean(0)) / scale, (0.3 * len(x)) ** 0.5 * torch.eye(6).double()])
    y = torch.cat([u - u.mean(0), torch.zeros(6, 6).double()])
    torch.testing.assert_close(fit.matrix, torch.linalg.lstsq(z, y).solution / scale.unsqueeze(1))


@pytest.mark.parametrize("fit", [skip, mean_update, lambda m: linear(m, ridge=0.01)], ids=["skip", "mean", "linear"])
def test_what_moments_foretell_is_what_the_tokens_say(fit):
    fitted, other = pairs(30, seed=0), pairs(30, seed=1)
    fit = fit if isinstance(fit, Affine) else fit(moments(*fitted))
    for x, u in (fitted, other):
        assert fit.unexplained(moments(x, u)) == pytest.approx(residual(fit, x, u), rel=1e-9)


@pytest.mark.parametrize("count", [3, 6, 8, 500])
def test_never_worse_than_the_mean_on_what_it_was_fitted_to_and_no_better_with_more_ridge(count):
    m = moments(*pairs(count, noise=3.0))
    found = [linear(m, ridge=ridge).unexplained(m) for ridge in (0.0, *RIDGES)]
    assert mean_update(m).unexplained(m) == pytest.approx(1, abs=1e-12)
    assert all(one <= two + 1e-9 for one, two in zip(found, [*found[1:], 1.0]))


def test_the_ridge_chosen_on_other_prompts_overfits_less():
    fitted, held_out, third = (moments(*pairs(9, noise=2.0, seed=seed)) for seed in range(3))
    chosen, free = linear(fitted, held_out), linear(fitted, ridge=0.0)
    assert free.unexplained(fitted) < chosen.unexplained(fitted)
    assert chosen.unexplained(third) < free.unexplained(third)
    assert chosen.unexplained(held_out) == min(linear(fitted, ridge=r).unexplained(held_out) for r in RIDGES)
    many, more = (moments(*pairs(4000, noise=2.0, seed=seed)) for seed in (3, 4))
    assert linear(many, more).ridge < 0.01 < chosen.ridge  # with enough tokens nothing has to be held back


def test_a_first_token_far_from_all_others_is_learnt_beside_them():
    x, u = pairs(2000)
    far, own = torch.full((200, 6), 50.0).double(), torch.full((200, 6), -20.0).double()
    others = moments(x, u)
    with_it = linear(moments(torch.cat([x, far]), torch.cat([u, own])), others)
    without = linear(others, others)

    def error(fit):
        return float((fit(far[None])[0] - far - own).norm(dim=-1).mean() / own.norm(dim=-1).mean())

    assert error(without) > 1 > 0.1 > error(with_it)
    assert with_it.unexplained(others) < 1.5 * without.unexplained(others)


def test_a_direction_that_does_not_vary_gets_no_weight():
    x, u = pairs(40)
    x[:, 2] = 5.0
    fit = linear(moments(x, u), ridge=0.0)
    assert not fit.matrix[2].any()
    assert residual(fit, x, u) < 1


def test_a_middle_that_is_linear_is_found_exactly_by_measure():
    d, draw = 8, rng()
    maps = [torch.randn(d, d, generator=draw) / 4 for _ in range(4)]
    biases = [torch.randn(d, generator=draw) for _ in maps]
    stack = Stack(network(maps, torch.randn(256, d, generator=draw), biases))
    tokens = known_networks.tokens(12, 10)
    stream = stack.stream(tokens)
    x, u = stream[1, :, 1:].flatten(0, 1), (stream[3] - stream[1])[:, 1:].flatten(0, 1)
    m = moments(x, u)
    rows = {
        name: fidelity.measure(stack, tokens, middle, 1, 3, sampling=Sampling(resamples=0)).iloc[0]
        for name, middle in (("skip", skip), ("mean", mean_update(m)), ("linear", linear(m, ridge=0.0)))
    }
    assert rows["linear"].unexplained < 1e-20
    assert abs(rows["linear"].damage) < 1e-10
    assert rows["linear"].agreement == 1
    assert rows["mean"].unexplained == pytest.approx(1, abs=1e-9)
    assert rows["skip"].unexplained == pytest.approx(skip.unexplained(m), rel=1e-9)
    assert rows["mean"].kl > 1e-3


def test_what_bends_is_not_found():
    stack = Stack(known_networks.serial_network(n_layers=4, dtype=torch.float64))
    stream = stack.stream(known_networks.tokens(64, 12))
    x, u = stream[1, :, 1:].flatten(0, 1), (stream[3] - stream[1])[:, 1:].flatten(0, 1)
    m = moments(x, u)
    assert 0.02 < linear(m, ridge=0.0).unexplained(m) < 0.9


def test_size_and_precision():
    fit = linear(moments(*pairs(40)), ridge=0.0)
    assert (fit.n_parameters, fit.operations) == (42, 72)
    assert (mean_update(moments(*pairs(40))).n_parameters, skip.n_parameters, skip.operations) == (6, 0, 0)
    x = torch.randn(2, 3, 6, generator=rng())
    half, single = fit(x.bfloat16()), fit(x)
    assert (half.dtype, single.dtype, fit(x.double()).dtype) == (torch.bfloat16, torch.float32, torch.float64)
    torch.testing.assert_close(half, fit(x.bfloat16().double()).bfloat16())
    assert skip(x) is x


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((), {}, "either the moments of other prompts"),
        ((moments(*pairs(9)),), {"ridge": 1.0}, "either the moments of other prompts"),
        ((), {"ridge": -1.0}, "0 or more, got -1"),
        ((), {"ridge": float("nan")}, "0 or more, got nan"),
        ((moments(*pairs(9, d=5)),), {}, "of 6 dimensions, those to validate with of 5"),
    ],
)
def test_what_cannot_be_fitted_is_said(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        linear(moments(*pairs(9)), *arguments, **options)


def test_moments_that_are_not_finite_are_refused():
    x, u = pairs(9)
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        linear(moments(x, u), ridge=0.0)
