import numpy as np
import pytest
import torch

from support.exact_networks import network, parameters, ragged, rng
from surgery import Stack, models
from surgery.corpus import bundled
from surgery.corpus.babel import Babel, exact
from surgery.instruments import fidelity, known_networks
from surgery.instruments.fidelity import COLUMNS, compare, measure
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import interval, weights
from surgery.stats.sampling import Sampling

TOKENS = known_networks.tokens(10, 9)
NAMES = [*fidelity.UNEXPLAINED, *fidelity.PREDICTIONS, *fidelity.ANSWERS]
ANSWERED = torch.zeros(10, 9, dtype=torch.bool)
ANSWERED[:, 5:7] = True


def transformer(**sizes):
    return Stack(known_networks.random_network(**{"n_layers": 4, "dtype": torch.float64, **sizes}))


def original(stack, start, stop):
    return lambda x, context: stack.execute(f"{start}:{stop}", x, context)


def skip(x, context):
    return x


def update(stack, tokens, start=1, stop=3):
    """x_start and u of the ensemble, all but each prompt's first token."""
    stream = stack.stream(tokens)
    return stream[start][:, 1:].flatten(0, 1), (stream[stop] - stream[start])[:, 1:].flatten(0, 1)


def variance(u):
    return (u - u.mean(0)).square().sum(-1).mean()


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [
        *(("random", *span) for span in ((1, 3), (0, 2), (2, 4), (0, 4))),
        *((name, 1, 3) for name in ("serial", "parallel", "llama", "gemma2")),
    ],
)
def test_the_original_layers_lose_nothing(load, name, start, stop):
    sizes = {"n_layers": 4}
    made = {
        "serial": lambda: known_networks.serial_network(**sizes),
        "parallel": lambda: known_networks.parallel_network(**sizes),
        "random": lambda: known_networks.random_network(**sizes),
    }
    stack = Stack(made[name]() if name in made else load(name))
    tokens = torch.randint(4, 90, (6, 7), generator=rng())
    answers = torch.zeros(6, 7, dtype=torch.bool).index_fill_(1, torch.tensor([4, 6]), True)
    row = measure(
        stack, tokens, original(stack, start, stop), start, stop, answers=answers, sampling=Sampling(resamples=20)
    ).iloc[0]
    assert (row.unexplained, row.unexplained_whitened, row.damage, row.agreement) == (0, 0, 0, 1)
    assert (row.damage_low, row.damage_high) == (0, 0)
    assert (row.exact, row.cross_entropy_answers) == (row.exact_original, row.cross_entropy_answers_original)
    assert abs(row.kl) < 1e-12


def test_leaving_the_middle_out_reads_the_second_moment_over_the_variance():
    for stack in (transformer(), Stack(known_networks.serial_network(n_layers=4, biases=True, dtype=torch.float64))):
        _, u = update(stack, TOKENS)
        row = measure(stack, TOKENS, skip, 1, 3, sampling=Sampling(resamples=0)).iloc[0]
        assert row.unexplained == pytest.approx(float(u.square().sum(-1).mean() / variance(u)), rel=1e-9)
        assert row.unexplained > 1


def test_the_mean_update_reads_one_exactly_in_either_unit():
    stack = transformer()
    _, u = update(stack, TOKENS)
    row = measure(stack, TOKENS, lambda x, context: x + u.mean(0), 1, 3, sampling=Sampling(resamples=0)).iloc[0]
    assert row.unexplained == pytest.approx(1, abs=1e-12)
    assert row.unexplained_whitened == pytest.approx(1, abs=1e-12)


def test_it_rises_steadily_from_the_original_to_the_mean():
    stack = transformer()
    _, u = update(stack, TOKENS)
    rows = [
        measure(
            stack,
            TOKENS,
            lambda x, c, part=part: (1 - part) * original(stack, 1, 3)(x, c) + part * (x + u.mean(0)),
            1,
            3,
            sampling=Sampling(resamples=0),
        ).iloc[0]
        for part in (0.0, 0.25, 0.5, 1.0)
    ]
    for row, part in zip(rows, (0.0, 0.25, 0.5, 1.0)):
        assert row.unexplained == pytest.approx(part**2, abs=1e-9)
    assert [row.kl for row in rows] == sorted(row.kl for row in rows)


def test_what_is_massive_owns_the_plain_number_and_not_the_whitened_one():
    d, draw = 16, rng()
    maps = [torch.zeros(d, d), torch.randn(d, d, generator=draw), torch.zeros(d, d)]
    maps[1][0] *= 1000
    stack = Stack(network(maps, torch.randn(256, d, generator=draw)))

    def all_but_the_massive(x, context):
        found = original(stack, 1, 2)(x, context)
        return torch.cat([found[..., :1], x[..., 1:]], -1)

    row = measure(stack, TOKENS, all_but_the_massive, 1, 2, sampling=Sampling(resamples=0)).iloc[0]
    assert row.unexplained < 1e-4
    assert row.unexplained_whitened == pytest.approx(15 / 16, abs=0.1)


def test_dimensions_that_hardly_vary_are_held_at_the_floor():
    d, draw = 16, rng()
    maps = [torch.zeros(d, d), torch.randn(d, d, generator=draw), torch.zeros(d, d)]
    maps[1][0] *= 1e-6
    stack = Stack(network(maps, torch.randn(256, d, generator=draw)))
    _, u = update(stack, TOKENS, 1, 2)
    off = 0.01 * u.std(0).median()

    def one_dimension_off(x, context):
        found = original(stack, 1, 2)(x, context).clone()
        found[..., 0] += off
        return found

    row = measure(stack, TOKENS, one_dimension_off, 1, 2, sampling=Sampling(resamples=0)).iloc[0]
    floor = fidelity.FLOOR * u.std(0, correction=0).median()
    assert row.unexplained_whitened == pytest.approx(float((off / floor) ** 2 / 15), rel=1e-3)


def by_hand(stack, tokens, x):
    """Log-probabilities of every prediction, in double precision, and its target."""
    p = stack.readout(x).double().log_softmax(-1)[:, :-1]
    return p, tokens.ids[:, 1:], tokens.mask[:, 1:] & tokens.mask[:, :-1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_predictions_are_those_worked_out_by_hand(side):
    stack, tokens = transformer(), ragged(side)
    answers = tokens.mask & (tokens.positions == tokens.mask.sum(1, keepdim=True) - 1)
    middle = lambda x, context: 1.3 * x  # noqa: E731
    context = stack.context(tokens)
    clean = stack.stream(context)
    p, target, kept = by_hand(stack, tokens, clean[-1])
    q, _, _ = by_hand(stack, tokens, stack.execute("3:", middle(clean[1], context), context))
    row = measure(stack, tokens, middle, 1, 3, answers=answers, sampling=Sampling(batch_size=5)).iloc[0]

    def loss(log, where):
        return float(-log.gather(-1, target[..., None])[..., 0][where].mean())

    asked = answers[:, 1:]
    right = {name: ((log.argmax(-1) == target) | ~asked).all(1).double().mean() for name, log in (("p", p), ("q", q))}
    for name, expected in {
        "cross_entropy": loss(q, kept),
        "cross_entropy_original": loss(p, kept),
        "damage": loss(q, kept) - loss(p, kept),
        "kl": float((p.exp() * (p - q)).sum(-1)[kept].mean()),
        "agreement": float((p.argmax(-1) == q.argmax(-1))[kept].double().mean()),
        "cross_entropy_answers": loss(q, asked),
        "cross_entropy_answers_original": loss(p, asked),
        "exact": float(right["q"]),
        "exact_original": float(right["p"]),
    }.items():
        assert row[name] == pytest.approx(expected, abs=1e-12), name
    assert row.n_predictions == int(kept.sum())
    assert 0 < row.agreement < 1


def test_padding_and_batches_and_portions_do_not_matter(monkeypatch):
    stack = transformer()
    rows = [measure(stack, ragged("right"), skip, 1, 3), measure(stack, ragged("left"), skip, 1, 3)]
    rows.append(measure(stack, ragged("right"), skip, 1, 3, sampling=Sampling(batch_size=4)))
    monkeypatch.setattr("surgery.instruments.readout.LOGITS_AT_ONCE", 700)
    rows.append(measure(stack, ragged("right"), skip, 1, 3))
    for row in rows[1:]:
        np.testing.assert_allclose(row.to_numpy(), rows[0].to_numpy(), rtol=1e-9)


def test_the_bundled_model_answers_as_exact_says():
    corpus, stack = Babel(), Stack(models.load("babel"))
    ids, answers = corpus.encode(bundled.problems(30))
    tokens = Tokens(torch.from_numpy(ids), torch.from_numpy(ids) != 0)
    predicted = stack.run(tokens).argmax(-1).numpy()
    row = measure(stack, tokens, skip, 4, 9, answers=answers, sampling=Sampling(resamples=50)).iloc[0]
    assert row.exact_original == pytest.approx(exact(predicted, ids, answers).mean())
    assert row.exact_original > 0.9 > row.exact
    assert row.cross_entropy_answers > 1 > row.cross_entropy_answers_original


def test_intervals_are_the_bootstrap_over_prompts_paired():
    stack = transformer()
    row = measure(stack, TOKENS, skip, 1, 3, sampling=Sampling(resamples=300, seed=5)).iloc[0]
    p, target, _ = by_hand(stack, Tokens.of(TOKENS), stack.stream(TOKENS)[-1])
    context = stack.context(TOKENS)
    q, _, _ = by_hand(stack, Tokens.of(TOKENS), stack.execute("3:", stack.stream(context)[1], context))
    lost = (p - q).gather(-1, target[..., None])[..., 0].mean(1)
    expected = interval(weights(10, 300, 5) @ lost / 10)
    assert (row.damage, row.damage_low, row.damage_high) == pytest.approx(expected, abs=1e-12)


def test_a_small_damage_is_told_from_none_because_both_models_meet_the_same_prompts():
    stack = transformer()
    nearly = lambda x, context: x + 0.9 * (original(stack, 1, 3)(x, context) - x)  # noqa: E731
    row = measure(stack, TOKENS, nearly, 1, 3).iloc[0]
    assert row.damage_high - row.damage_low < 0.3 * (row.cross_entropy_high - row.cross_entropy_low)


def test_intervals_cover_what_more_prompts_say():
    stack = Stack(known_networks.mixed_network(0.5, 4))
    truth = measure(
        stack, known_networks.tokens(1500, 8, seed=99), skip, 1, 3, sampling=Sampling(resamples=0, batch_size=750)
    ).iloc[0]
    names = ["unexplained", "unexplained_whitened", "damage", "kl", "agreement"]
    covered = dict.fromkeys(names, 0)
    for seed in range(30):
        row = measure(
            stack, known_networks.tokens(60, 8, seed=seed), skip, 1, 3, sampling=Sampling(resamples=100)
        ).iloc[0]
        for name in names:
            covered[name] += row[f"{name}_low"] <= truth[name] <= row[f"{name}_high"]
    assert min(covered.values()) >= 25  # of 30; 95 % would be 28, a bootstrap of 60 prompts is a little narrow


def test_one_prompt_has_no_interval_and_many_share_units():
    stack = Stack(known_networks.serial_network(n_layers=3))
    row = measure(stack, TOKENS[:1], skip, 1, 2, answers=ANSWERED[:1]).iloc[0]
    assert all(np.isfinite(row[name]) and np.isnan(row[f"{name}_low"]) for name in NAMES)
    many = measure(stack, known_networks.tokens(300, 4), skip, 1, 2, sampling=Sampling(resamples=30)).iloc[0]
    assert many.n_prompts == 300
    assert many.damage_low < many.damage < many.damage_high


def test_where_nothing_is_written_nothing_can_be_explained():
    d = 8
    stack = Stack(network([torch.zeros(d, d)] * 3, torch.randn(256, d, generator=rng())))
    row = measure(stack, TOKENS, skip, 1, 2, sampling=Sampling(resamples=10)).iloc[0]
    assert np.isnan(row.unexplained)
    assert np.isnan(row.unexplained_whitened)
    assert row.damage == 0


def test_a_whole_model_compared_with_itself_and_with_its_layers_left_out():
    stack = transformer()
    row = compare(stack, stack, TOKENS, (1, 3), (1, 3), answers=ANSWERED, sampling=Sampling(resamples=20))
    assert (row.unexplained[0], row.damage[0], row.agreement[0], row.exact[0]) == (0, 0, 1, row.exact_original[0])
    assert abs(row.kl[0]) < 1e-12
    embedding = torch.randn(256, 8, generator=rng())
    longer, shorter = (network([torch.eye(8) / 4] * depth, embedding) for depth in (3, 2))
    with torch.no_grad():
        parameters(shorter)["head.weight"].copy_(parameters(longer)["head.weight"])
    three, two = Stack(longer), Stack(shorter)
    left_out = measure(three, TOKENS, skip, 1, 2, answers=ANSWERED, sampling=Sampling(resamples=20))
    student = compare(three, two, TOKENS, (1, 2), (1, 1), answers=ANSWERED, sampling=Sampling(resamples=20))
    assert list(student)[:4] == ["start", "stop", "student_start", "student_stop"]
    np.testing.assert_allclose(student[list(left_out)].to_numpy(), left_out.to_numpy(), rtol=1e-9, atol=1e-12)


def test_half_precision_is_measured_in_single():
    stack = Stack(known_networks.random_network(n_layers=4, dtype=torch.bfloat16))
    row = measure(stack, TOKENS, skip, 1, 3, sampling=Sampling(resamples=5)).iloc[0]
    stream = stack.stream(TOKENS).double()
    u = (stream[3] - stream[1])[:, 1:].flatten(0, 1)
    assert row.unexplained == pytest.approx(float(u.square().sum(-1).mean() / variance(u)), rel=1e-9)
    double = measure(stack, TOKENS, lambda x, context: x.double(), 1, 3, sampling=Sampling(resamples=5)).iloc[
        0
    ]  # of another precision
    assert double.equals(row)


def test_it_costs_what_it_says(monkeypatch):
    stack, run, calls = transformer(), Engine.layer, []
    monkeypatch.setattr(Engine, "layer", lambda *arguments: calls.append(arguments[1]) or run(*arguments))
    reads, readout = [], Stack.readout
    monkeypatch.setattr(Stack, "readout", lambda self, x, **options: reads.append(len(x)) or readout(self, x))
    calls.clear()
    measure(stack, TOKENS, skip, 1, 3, sampling=(whole := Sampling(skip_massive=False)))
    assert len(calls) == 4 + 1
    assert len(reads) == 2
    calls.clear()
    compare(stack, stack, TOKENS, (1, 3), (1, 3), sampling=whole)
    assert len(calls) == 8


def test_deterministic_by_seed_and_every_column_is_explained():
    stack = transformer()
    one, same, other = (
        measure(stack, TOKENS, skip, 1, 3, answers=ANSWERED, sampling=Sampling(seed=seed)) for seed in (1, 1, 2)
    )
    assert one.equals(same)
    assert not one.equals(other)
    assert set(one) < set(COLUMNS)
    assert set(compare(stack, stack, TOKENS, (1, 3), (1, 3), answers=ANSWERED, sampling=Sampling(resamples=2))) == set(
        COLUMNS
    )


@pytest.mark.parametrize(
    ("start", "stop", "says"),
    [(2, 2, "0 <= start < stop <= 3"), (-1, 2, "layers 0 to 2"), (1, 4, "no middle of"), (2, 1, "layers 2 to 1")],
)
def test_spans_that_are_none_are_refused(start, stop, says):
    stack = Stack(known_networks.serial_network(n_layers=3))
    with pytest.raises(ValueError, match=says):
        measure(stack, TOKENS, skip, start, stop)
    with pytest.raises(ValueError, match="no middle of"):
        compare(stack, stack, TOKENS, (1, 2), (1, 4))


@pytest.mark.parametrize(
    ("middle", "says"),
    [
        (lambda x, context: x[:, :-1], r"shape \[10, 9, 32\] and gave \[10, 8, 32\] back"),
        (lambda x, context: x / 0, "what leaves the other middle is not finite"),
        (lambda x, context: x.clone().index_fill_(1, torch.tensor([3]), torch.nan), "not finite"),
    ],
)
def test_middles_that_are_none_are_refused(middle, says):
    with pytest.raises(ValueError, match=says):
        measure(Stack(known_networks.serial_network(n_layers=3)), TOKENS, middle, 1, 2)


def test_prompts_and_answers_that_cannot_be_measured_are_refused():
    stack = Stack(known_networks.serial_network(n_layers=3))
    with pytest.raises(ValueError, match="no token is left to measure"):
        measure(stack, TOKENS[:, :1], skip, 1, 2)
    with pytest.raises(ValueError, match=r"their shape is \[10, 9\], not \[10, 8\]"):
        measure(stack, TOKENS, skip, 1, 2, answers=ANSWERED[:, 1:])
    none, first = ANSWERED.clone(), ANSWERED.clone()
    none[3], first[4, 0] = False, True
    for wrong, prompt in ((none, 4), (first, 5)):
        with pytest.raises(ValueError, match=f"the answer of prompt {prompt} is not made of tokens that follow"):
            measure(stack, TOKENS, skip, 1, 2, answers=wrong)
    padded = Tokens(TOKENS, torch.arange(9) < torch.tensor([[9]] * 9 + [[6]]))
    with pytest.raises(ValueError, match="the answer of prompt 10"):
        measure(stack, padded, skip, 1, 2, answers=ANSWERED.numpy())


def test_models_that_cannot_be_compared_are_refused():
    one, other = (Stack(known_networks.serial_network(n_layers=3, width=width)) for width in (4, 8))
    with pytest.raises(ValueError, match="256 tokens and 16 dimensions"):
        compare(one, other, TOKENS, (1, 2), (1, 2))


def test_weights_that_are_not_finite_are_said():
    model = known_networks.serial_network(n_layers=3)
    stack = Stack(model)
    with torch.no_grad():
        parameters(model)["layers.1.mlp.fc_out.weight"].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the stream of .* is not finite"):
        measure(stack, TOKENS, skip, 1, 2)
