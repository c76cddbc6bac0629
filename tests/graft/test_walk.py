"""Walks: what they must keep they keep, whatever the law of the data; training on them goes on exactly."""

import math

import numpy as np
import pytest
import torch
from einops import rearrange

from surgery import Stack, graft
from surgery.graft import walk
from surgery.graft.grafting import Schedule
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.rebuild import layout

N, D = 20_000, 5
LENGTH = 20  # tokens of a prompt: random numbers are drawn prompt by prompt, so few long prompts are fast


def gaussian(count=N, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=draw) @ torch.randn(D, D, generator=draw) + 3


def skewed(count=N, seed=0):
    """Two far clusters in one direction, exponential in others, dependent: nothing Gaussian about it."""
    draw = torch.Generator().manual_seed(seed)
    sides = torch.randint(0, 2, (count, 1), generator=draw) * 4.0 - 2
    tails = torch.empty(count, D).exponential_(generator=draw) * torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    return tails + sides * torch.tensor([3.0, 0.0, -1.0, 2.0, 0.0])


LAWS = {"gaussian": gaussian, "skewed": skewed}


def streams(x):
    """Activations as streams of prompts, with their mask."""
    length = LENGTH if len(x) % LENGTH == 0 else 1
    x = rearrange(x, "(prompt pos) d_model -> prompt pos d_model", pos=length)
    return x, torch.ones(x.shape[:2], dtype=torch.bool)


def fitted(x, **options):
    return walk.fit(*streams(x), **{"positions": 1, "variance": 1.0, **options})


def moved(found, x, kind, **options):
    return rearrange(found(*streams(x), kind, **options), "prompt pos d_model -> (prompt pos) d_model")


def whitened(found, x):
    return found.regions[0].whitened(x).double()


def within_error(values, expected=0.0, errors=5.0):
    """Whether the mean of every column is what is expected, within standard errors of it."""
    error = values.std(0) / math.sqrt(len(values))
    return bool(((values.mean(0) - expected).abs() <= errors * error).all())


# --- massive activations ---------------------------------------------------------------------------------------------


def with_massive(x, share=0.02, times=500.0):
    """2 % of the activations at 500 times the usual in one dimension, which are these, and the rest."""
    massive = torch.rand(len(x), generator=torch.Generator().manual_seed(9)) < share
    x = x.clone()
    x[massive, 2] += times * x.std()
    return x, massive


@pytest.mark.parametrize("law", LAWS)
def test_massive_activations_decide_nothing_and_stay_where_they_are(law):
    plain = LAWS[law](4000)
    x, massive = with_massive(plain)
    found, kept = fitted(x), fitted(plain[~massive][: 20 * ((~massive).sum() // 20)])
    summary = found.summary().iloc[0]
    assert (summary["n_massive"], summary["n_tokens"]) == (massive.sum(), (~massive).sum())
    torch.testing.assert_close(found.regions[0].scale, kept.regions[0].scale, rtol=0.02, atol=0)
    after = moved(found, x, walk.Stationary(0.5))
    assert torch.equal(after[massive], x[massive])
    assert not (after[~massive] == x[~massive]).all(1).any()
    decided = fitted(x, skip_massive=False).regions[0]
    assert decided.scale[0] > 20 * found.regions[0].scale[0], "what one would have walked by"


def test_a_large_constant_dimension_and_massive_first_tokens_are_usual():
    x, mask = streams(gaussian(4000) + torch.tensor([0, 0, 5000.0, 0, 0]))
    x[:, 0] += 3000
    assert walk.fit(x, mask, positions=2).summary()["n_massive"].tolist() == [0, 0]


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95])
def test_stationary_keeps_mean_and_covariance(law, rho):
    x = LAWS[law]()
    found = fitted(x)
    z, after = whitened(found, x), whitened(found, moved(found, x, walk.Stationary(rho)))
    assert within_error(after - z)
    products = [some.unsqueeze(2) * some.unsqueeze(1) for some in (after, z)]
    assert within_error((products[0] - products[1]).flatten(1))
    assert within_error((after.unsqueeze(2) * z.unsqueeze(1)).flatten(1), rho * torch.eye(D).double().flatten())


@pytest.mark.parametrize("law", LAWS)
def test_distance_tends_to_the_number_of_components(law):
    x, rho = LAWS[law](), 0.8
    found = fitted(x)
    before, after = (whitened(found, some).square().sum(1) for some in (x, moved(found, x, walk.Stationary(rho))))
    error = after - (rho**2 * before + (1 - rho**2) * D)
    for part in before.argsort().chunk(5):  # at every distance, not on average alone
        assert within_error(error[part].unsqueeze(1))
    assert torch.allclose(found.distances(*streams(x)).flatten().double(), before, rtol=1e-4)
    assert before.mean().item() == pytest.approx(D, rel=1e-4)


@pytest.mark.parametrize("law", LAWS)
def test_several_steps_are_one_of_the_power(law):
    x, steps = LAWS[law](), 3
    found = fitted(x)
    many, one = x, moved(found, x, walk.Stationary(0.9**steps), seed=99)
    for step in range(steps):
        many = moved(found, many, walk.Stationary(0.9), seed=step)
    z, a, b = (whitened(found, some) for some in (x, many, one))
    for some in (a, b):
        assert within_error((some * z), 0.9**steps)
    assert within_error((a - 0.9**steps * z).square() - (b - 0.9**steps * z).square())


@pytest.mark.parametrize("law", LAWS)
def test_free_walk_inflates_the_covariance(law):
    x, eta, steps = LAWS[law](), 0.4, 3
    found, after = fitted(x), x
    for step in range(steps):
        after = moved(found, after, walk.Free(eta), seed=step)
        z = whitened(found, after)
        assert within_error(z.square() - whitened(found, x).square(), (step + 1) * eta**2)


def test_rho_0_is_a_fresh_gaussian_and_rho_1_the_identity():
    x = skewed()
    found = fitted(x)
    z, fresh = whitened(found, x), whitened(found, moved(found, x, walk.Stationary(0.0)))
    assert within_error(fresh.pow(4), 3.0)
    assert within_error(fresh.pow(3))
    assert not within_error(z.pow(3))  # which the data are not: no more than mean and covariance is kept
    assert torch.allclose(moved(found, x, walk.Stationary(1 - 1e-9)), x, atol=1e-2)
    assert torch.equal(x, skewed())


def test_what_lies_outside_the_components_is_kept():
    x = gaussian(2000) * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.01])
    found = fitted(x, components=2)
    after, region = moved(found, x, walk.Stationary(0.3)), found.regions[0]
    outside = torch.eye(D) - region.axes.T @ region.axes
    assert region.components == 2
    assert torch.allclose((after - x) @ outside, torch.zeros_like(x), atol=1e-4)
    assert (after - x).norm() > x.std()


def test_tangent_steps_have_the_covariance_of_the_neighbours():
    """On a circle they go along it."""
    angle = torch.rand(3000, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    x = torch.stack([angle.cos(), angle.sin()], 1)
    found = fitted(x)
    step = moved(found, x, walk.Tangent(3.0, 8)) - x
    along = (step * torch.stack([-x[:, 1], x[:, 0]], 1)).sum(1)
    assert along.square().sum() > 0.99 * step.square().sum()
    far = moved(found, x, walk.Scattered(walk.Tangent(3.0, 8))) - x
    share = (far * x).sum(1).square().sum() / far.square().sum()
    assert 0.45 < share < 0.55
    assert found.regions[0].nearest(x[:3], 8).shape == (3, 8, 2)
    one, many = x[:1], 4000
    near = found.regions[0].nearest(one, 8)[0].double()
    steps = (moved(found, one.repeat(many, 1), walk.Tangent(0.5, 8)) - one).double()
    expected = 0.25 * torch.cov(near.T, correction=0)
    assert within_error((steps.unsqueeze(2) * steps.unsqueeze(1)).flatten(1), expected.flatten())


def test_interpolation_and_extrapolation():
    x, found = skewed(2000, seed=1), fitted(skewed(3000), bank=50)
    bank = found.regions[0].bank
    apart = x.unsqueeze(1) - bank
    for beyond, (low, high) in ((False, (0, 1)), (True, (1, 2))):
        after = moved(found, x, walk.Interpolated(2.0, beyond)).unsqueeze(1) - bank
        weight = (after * apart).sum(2) / apart.square().sum(2)  # if it lies on the line to that one of the bank
        missed = (after - weight.unsqueeze(2) * apart).norm(dim=2)
        partner = missed.argmin(1, keepdim=True)
        assert (missed.gather(1, partner) < 1e-3).all()
        assert len(partner.unique()) == 50
        used = weight.gather(1, partner)
        assert ((used >= low - 1e-3) & (used <= high + 1e-3)).all()
        assert within_error(used, (low + high) / 2)
        assert used.var().item() == pytest.approx(1 / 20, rel=0.1)  # of Beta(2, 2)


def test_control_moves_as_far():
    x = skewed(2000)
    found = fitted(x, components=2)
    kind = walk.Stationary(0.7)
    far = (moved(found, x, walk.Scattered(kind)) - x).norm(dim=1)
    assert far.mean().item() == pytest.approx((moved(found, x, kind) - x).norm(dim=1).mean().item(), rel=0.05)
    outside = torch.eye(D) - found.regions[0].axes.T @ found.regions[0].axes
    assert ((moved(found, x, walk.Scattered(kind)) - x) @ outside).norm() > 0.5 * far.norm()


# --- positions and prompts -------------------------------------------------------------------------------------------


def by_position(count=500, length=4):
    """A constant first position, others of covariances of their own; padded on either side."""
    x = gaussian(count * length).reshape(count, length, D) * torch.tensor([0.0, 1.0, 5.0, 5.0])[:, None] + 1
    mask = torch.arange(length) < torch.randint(2, length + 1, (count, 1), generator=torch.Generator().manual_seed(1))
    mask[0] = True
    return x * mask.unsqueeze(-1), mask


def test_every_class_of_positions_has_moments_of_its_own():
    x, mask = by_position()
    found = walk.fit(x, mask, positions=3, variance=1.0)
    described = found.summary()
    assert list(described.columns) == list(walk.COLUMNS)
    assert described.components.tolist() == [0, D, D]  # where nothing varies nothing is walked
    assert described.n_tokens.tolist() == [500, 500, int(mask[:, 2:].sum())]
    for place, region in enumerate(found.regions[:2]):
        assert torch.allclose(region.mean, x[:, place].mean(0), atol=1e-5)
    rows = x[:, 2:][mask[:, 2:]].double()
    sigma = found.regions[2].axes.T * found.regions[2].scale.square() @ found.regions[2].axes
    assert torch.allclose(sigma.double(), torch.cov(rows.T, correction=0), rtol=1e-3, atol=1e-2)
    after = found(x, mask, walk.Stationary(0.5))
    assert torch.equal(after[:, 0], x[:, 0])
    assert torch.equal(after[~mask], x[~mask])
    assert ((after != x).any(2) == (mask & (torch.arange(4) > 0))).all()
    last = found(x, mask, walk.Stationary(0.5), last=True)
    final = mask.sum(1) - 1
    assert ((last != x).any(2) == (torch.arange(4) == final.unsqueeze(1))).all()


def test_padding_side_does_not_matter():
    x, mask = by_position()
    found, kind = walk.fit(x, mask, variance=1.0), walk.Free(0.1)
    there = mask.flip(1)
    left = torch.zeros_like(x)
    left[there] = x[mask]
    again = walk.fit(left, there, variance=1.0)
    assert again.summary().equals(found.summary())
    assert torch.equal(again(left, there, kind)[there], found(x, mask, kind)[mask])


def test_draws_depend_on_seed_and_number_alone():
    x, mask = by_position()
    found, kind = walk.fit(x, mask, variance=1.0), walk.Stationary(0.5)
    whole = found(x, mask, kind)
    part = found(x[[7, 3]], mask[[7, 3]], kind, draws=[7, 3])
    assert torch.allclose(part, whole[[7, 3]], atol=1e-5)
    assert not torch.allclose(found(x, mask, kind, seed=1), whole)
    assert torch.equal(found.to("cpu")(x, mask, kind), whole)


@pytest.mark.parametrize("memory", [0.0, 0.6, 1.0])
def test_memory_correlates_neighbouring_positions(memory):
    x = gaussian(2000 * 3).reshape(2000, 3, D)
    mask = torch.ones(2000, 3, dtype=torch.bool)
    found = walk.fit(x, mask, positions=1, variance=1.0)
    for kind in (walk.Stationary(0.0, memory), walk.Free(1.0, memory)):
        noise = found(x, mask, kind)
        noise = noise if isinstance(kind, walk.Stationary) else noise - x + found.regions[0].mean
        z = found.regions[0].whitened(noise.flatten(0, 1)).reshape(2000, 3, D).double()
        assert within_error(z[:, 2].square(), 1.0)
        for gap in (1, 2):
            assert within_error(z[:, 2] * z[:, 2 - gap] - memory**gap * z[:, 2].square(), 0.0)


# --- fitting ---------------------------------------------------------------------------------------------------------


def test_singular_covariance_has_fewer_components():
    x = gaussian(500)
    x[:, 3:] = x[:, :2] @ torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    found = fitted(x, components=5)
    assert found.summary().components.item() == 3
    after = moved(found, x, walk.Stationary(0.2))
    assert torch.allclose(after[:, 3:], after[:, :2] @ torch.tensor([[1.0, 2.0], [0.5, -1.0]]), atol=1e-3)


def test_components_cover_the_variance_asked_for():
    x = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0, 3.0, 1.0, 0.1])
    for share, count in ((0.5, 1), (0.95, 2), (0.995, 3), (1.0, 4)):
        found = fitted(x, variance=share).summary()
        assert found.components.item() == count
        assert found.variance.item() >= share - 1e-12


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fitted(gaussian(20), variance=1.0), "20 activations, 5 components need 25 or more"),
        (lambda: walk.fit(gaussian(100).unsqueeze(1)), "position 1 has 0 activations"),
        (lambda: fitted(gaussian(100) / 0), "not finite"),
        (lambda: fitted(gaussian(100), variance=0.0), "variance above 0"),
        (lambda: fitted(gaussian(100), components=0), "1 or more"),
        (lambda: moved(fitted(gaussian(100)), gaussian(3), walk.Tangent(1.0, 101)), "100 real activations"),
        (lambda: walk.Stationary(1.0), "rho is what"),
        (lambda: walk.Stationary(-0.1), "rho is what"),
        (lambda: walk.Stationary(math.nan), "rho is what"),
        (lambda: walk.Stationary(0.5, 1.5), "memory"),
        (lambda: walk.Free(0.0), "eta is the size"),
        (lambda: walk.Free(0.1, -0.1), "memory"),
        (lambda: walk.Tangent(1.0, 1), "two neighbours"),
        (lambda: walk.Tangent(-1.0), "step is"),
        (lambda: walk.Interpolated(0.0), "alpha is"),
    ],
)
def test_what_cannot_be_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- training on walks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model, its latents and a walk through them."""
    stack = Stack(known_networks.random_network(n_layers=4, d_model=8))
    mask = torch.arange(7) < torch.randint(3, 8, (48, 1), generator=torch.Generator().manual_seed(0))
    corpus = Tokens(known_networks.tokens(48, 7) * mask, mask)
    pairs = graft.latents(stack, corpus, 1, 3, tmp_path_factory.mktemp("latents"), dtype=torch.float32)
    return stack, pairs, walk.fit(pairs)


def test_latents_and_streams_give_the_same_walk(made):
    _, pairs, found = made
    everything = pairs.batch(range(48))
    other = walk.fit(everything.x_start, everything.tokens.mask, batch_size=48)
    assert other.summary().equals(found.summary())
    for one, two in zip(found.regions, other.regions, strict=True):
        assert torch.allclose(one.mean, two.mean, atol=1e-5)
        assert torch.allclose(one.scale, two.scale, rtol=1e-4)
    few = walk.fit(pairs, prompts=range(30), components=2)
    assert few.summary().n_tokens.tolist()[0] == 30
    assert few.summary().components.max() <= 2


def test_relabelled_pairs_are_what_the_layers_make(made):
    stack, pairs, found = made
    kind = walk.Stationary(0.8)
    augmented = walk.relabelled(pairs, stack, found, kind, copies=3)
    assert augmented.n_prompts == 3 * 48
    assert augmented.n_tokens == pairs.n_tokens
    assert augmented.lengths.tolist() == pairs.lengths.tolist() * 3
    prompts = [5, 53, 101, 0]
    given, real = augmented.batch(prompts), pairs.batch([5, 5, 5, 0])
    assert torch.equal(given.tokens.ids, real.tokens.ids)
    mask = real.tokens.mask
    expected = stack.execute("1:3", given.x_start, stack.context(real.tokens))
    assert torch.allclose(given.x_stop[mask], expected[mask], atol=1e-5)
    assert (given.x_stop[~mask] == 0).all()
    assert (given.x_start[~mask] == 0).all()
    assert ((given.x_start - real.x_start)[mask].norm(dim=1) > 0).all()
    assert not torch.allclose(given.x_start[0], given.x_start[1])  # every copy walks otherwise
    noisy = walk.unrelabelled(pairs, found, kind, copies=3).batch(prompts)
    assert torch.equal(noisy.x_start, given.x_start)
    assert torch.equal(noisy.x_stop, real.x_stop)
    augmented.verify()
    assert torch.equal(augmented.moments().uu, pairs.moments().uu)
    assert torch.equal(augmented.moments([50, 2]).uu, pairs.moments([2, 2]).uu)


def test_share_of_walked_prompts(made):
    stack, pairs, found = made
    for share in (0.0, 0.25, 1.0):
        some = walk.unrelabelled(pairs, found, walk.Free(0.3), share=share, copies=20)
        walked = [some.walks(prompt) for prompt in range(some.n_prompts)]
        assert abs(np.mean(walked) - share) <= 5 * math.sqrt(share * (1 - share) / len(walked))
        given = some.batch(range(60))
        changed = (given.x_start != pairs.batch([i % 48 for i in range(60)]).x_start).any(2).any(1)
        assert changed.tolist() == walked[:60]
    mixed = walk.relabelled(pairs, stack, found, walk.Free(0.3), share=0.5).batch(range(48))
    real = pairs.batch(range(48))
    untouched = (mixed.x_start == real.x_start).all(2).all(1)
    assert 0 < untouched.sum() < 48
    assert torch.equal(mixed.x_stop[untouched], real.x_stop[untouched])


SCHEDULE = Schedule(steps=6, batch=8, every=2, warmup=2)


def trained(made, folder, pairs, **options):
    stack, _, _ = made
    student = layout.build(stack.model, layout.middle(4, 1, 3), 0)
    heldout = Tokens.of(known_networks.tokens(8, 7, seed=5))
    done = graft.fit(stack, student, (1, 3), pairs, heldout, folder, schedule=SCHEDULE, **options)
    return done, {name: weight.detach().clone() for name, weight in student.named_parameters()}


def test_training_that_was_stopped_goes_on_exactly(made, tmp_path, monkeypatch):
    stack, pairs, found = made
    augmented = walk.relabelled(pairs, stack, found, walk.Stationary(0.7), share=0.5, copies=4)
    options = {"spent": augmented.ledger(stack, SCHEDULE)}
    _, whole = trained(made, tmp_path / "whole", augmented, **options)
    calls, batch = [], walk.Augmented.batch

    def stopping(self, prompts):
        calls.append(prompts)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return batch(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(walk.Augmented, "batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(made, tmp_path / "parts", augmented, **options)
    _, parts = trained(made, tmp_path / "parts", augmented, **options)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    _, real = trained(made, tmp_path / "real", pairs)
    assert any(not torch.equal(whole[name], real[name]) for name in whole)
    for other in (
        walk.unrelabelled(pairs, found, walk.Stationary(0.7), share=0.5, copies=4),
        walk.relabelled(pairs, stack, found, walk.Stationary(0.6), share=0.5, copies=4),
        walk.relabelled(pairs, stack, walk.fit(pairs, components=2), walk.Stationary(0.7), share=0.5, copies=4),
    ):
        with pytest.raises(ValueError, match="another run"):
            trained(made, tmp_path / "whole", other, **options)


def test_relabelling_is_in_the_ledger(made):
    stack, pairs, found = made
    harvest = pairs.ledger(stack).operations(teacher=True)
    noisy = walk.unrelabelled(pairs, found, walk.Stationary(0.7)).ledger(stack, SCHEDULE)
    assert noisy.operations(teacher=True) == harvest
    for share in (1.0, 0.5):
        augmented = walk.relabelled(pairs, stack, found, walk.Stationary(0.7), share=share)
        booked = augmented.ledger(stack, SCHEDULE)
        entry = booked.entries["relabelling", True]
        drawn = [p for step in range(6) for p in SCHEDULE.prompts(step, augmented.n_prompts) if augmented.walks(int(p))]
        assert entry.tokens == int(augmented.lengths[drawn].sum())
        assert booked.operations(teacher=False) == 0
        # layers 1 and 2 of the three that a harvest runs
        a_token = entry.operations / entry.tokens
        assert a_token == pytest.approx(harvest / pairs.n_tokens * 2 / 3, rel=0.01)
    half = augmented.ledger(stack, SCHEDULE, steps=3).entries["relabelling", True]
    assert 0 < half.tokens < entry.tokens
    assert augmented.ledger(stack, SCHEDULE, steps=0).entries["relabelling", True].tokens == 0


def test_pairs_that_cannot_be_walked(made):
    _, pairs, found = made
    kind, other = walk.Stationary(0.5), Stack(known_networks.random_network(n_layers=4, d_model=8, seed=1))
    for call, words in (
        (lambda: walk.relabelled(pairs, other, found, kind), "not of native as it is now, but with weights"),
        (lambda: walk.unrelabelled(pairs, found, kind, share=1.5), "share is 0 to 1"),
        (lambda: walk.unrelabelled(pairs, found, kind, copies=0), "copies is 1 or more"),
        (lambda: walk.unrelabelled(pairs, found, kind, copies=2).batch([96]), "there are 0 to 95"),
        (lambda: walk.unrelabelled(pairs, found, kind).batch([]), "no prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
