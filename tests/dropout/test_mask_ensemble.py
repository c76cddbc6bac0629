import numpy as np
import pandas as pd
import pytest
import torch

import surgery
from support.exact_networks import network, parameters, ragged, rng
from surgery import Stack, dropout
from surgery.corpus import bundled
from surgery.corpus.babel import Babel
from surgery.dropout import draw, say
from surgery.dropout.mask_ensemble import ARITHMETIC, COLUMNS, GEOMETRIC, SCALING, curve
from surgery.instruments import known_networks
from surgery.instruments.fidelity import measure
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.stats.sampling import Sampling

HEAD = "unembed.hook_in"
UNITS = 6


def linear(layers=1):
    """Embedding, layers that write nothing, unembedding: softmax-linear in the units at ``HEAD``, without a norm."""
    zero = torch.zeros(UNITS, UNITS, dtype=torch.float64)
    embedding = torch.randn(20, UNITS, generator=rng(), dtype=torch.float64)
    model = network([zero] * layers, embedding)
    with torch.no_grad():
        weight = parameters(model)["head.weight"]
        weight[:] = torch.randn(weight.shape, generator=rng(1), dtype=torch.float64)
    return Stack(model)


def ids(n_prompts=6, length=5, seed=0):
    return torch.randint(20, (n_prompts, length), generator=rng(seed))


def of(frame, way, count):
    return frame[(frame["way"] == way) & (frame["count"] == count)].iloc[0]


def test_over_all_masks_of_a_softmax_linear_model_the_geometric_mean_is_the_model_itself():
    stack, tokens, p = linear(), ids(), 0.4
    kept, share = dropout.masks(UNITS, p)
    log_p = []
    for mask in kept:
        with stack.model.hooks(fwd_hooks=[(HEAD, lambda x, hook, mask=mask: x * mask / (1 - p))]):
            log_p.append(stack.run(tokens).log_softmax(-1))
    log_p, own = torch.stack(log_p), stack.run(tokens).softmax(-1)
    geometric = torch.einsum("m,m...->...", share, log_p).softmax(-1)
    arithmetic = torch.einsum("m,m...->...", share, log_p.exp())
    assert (geometric - own).abs().max() < 1e-12
    assert (arithmetic - own).abs().max() > 0.05


def test_on_a_softmax_linear_model_the_geometric_mean_converges_as_one_over_the_root_of_the_count():
    counts = (4, 16, 64)
    runs = [
        curve(linear(), ids(60), HEAD, 0.3, counts, shared=False, sampling=Sampling(seed=s, resamples=0))
        for s in range(2)
    ]
    mean = pd.concat(runs).groupby(["way", "count"])["kl"].mean()
    slope = np.polyfit(np.log(counts), np.log(np.sqrt(mean[GEOMETRIC])), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.06)
    assert mean[ARITHMETIC][64] > 5 * mean[GEOMETRIC][64]  # goes to something else
    assert mean[ARITHMETIC][64] > 0.5 * mean[ARITHMETIC][16]


def test_through_several_layers_the_geometric_mean_is_not_the_model():
    def left(stack, names):
        frame = curve(
            stack, known_networks.tokens(24, 8), names, 0.3, (64,), shared=False, sampling=Sampling(resamples=0)
        )
        return of(frame, GEOMETRIC, 64)["kl"]

    stack = Stack(known_networks.serial_network(n_layers=3, dtype=torch.float64))
    deep, last = left(stack, lambda name: name.endswith("mlp.hook_out")), left(stack, "blocks.2.mlp.hook_out")
    assert deep > 3 * last  # after the last MLP nothing but the head comes: what is left there is sampling


def test_every_number_against_its_definition():
    stack, p = Stack(known_networks.random_network(n_layers=2, dtype=torch.float64)), 0.3
    tokens = ragged("right")
    answers = torch.zeros_like(tokens.mask)
    answers[:, 1] = True
    frame = curve(stack, tokens, HEAD, p, (3,), answers=answers, sampling=Sampling(batch_size=5, seed=2, resamples=30))
    log_p = []
    for mask in range(3):
        made = surgery.hooks.dropout(stack.model, HEAD, p, 2 * 1_000_003 + mask, shared=True)
        with stack.model.hooks(fwd_hooks=made):
            log_p.append(stack.run(tokens).log_softmax(-1))
    log_p, own = torch.stack(log_p)[:, :, :-1], stack.run(tokens).log_softmax(-1)[:, :-1]
    predicted, targets, asked = tokens.mask[:, 1:], tokens.ids[:, 1:], answers[:, 1:]
    variance = log_p.exp().var(0).sum(-1)[predicted].mean()
    for way, count, q in (
        (SCALING, 0, own),
        (ARITHMETIC, 3, log_p.exp().mean(0).log()),
        (GEOMETRIC, 3, log_p.mean(0).log_softmax(-1)),
    ):
        row = of(frame, way, count)
        loss, right = -q.gather(-1, targets[..., None])[..., 0], q.argmax(-1) == targets
        own_loss = -own.gather(-1, targets[..., None])[..., 0]
        expected = {
            "cross_entropy": loss[predicted].mean(),
            "excess": (loss - own_loss)[predicted].mean(),
            "accuracy": right[predicted].double().mean(),
            "kl": (own.exp() * (own - q)).sum(-1)[predicted].mean(),
            "variance": torch.tensor(0.0) if count == 0 else variance,
            "exact": right[asked].double().mean(),
            "cross_entropy_answers": loss[asked].mean(),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), abs=1e-9), (way, name)
            assert row[f"{name}_low"] <= row[name] + 1e-12 or name == "exact"
    assert row["n_prompts"] == 12
    assert row["n_predictions"] == int(predicted.sum())
    assert list(frame) == list(COLUMNS)


def test_the_row_of_scaling_is_the_model():
    stack = Stack(surgery.load("babel"))
    ids, answers = Babel().encode(bundled.problems(10))
    tokens = Tokens(torch.from_numpy(ids), torch.from_numpy(ids != Babel().token_ids["<pad>"]))
    row = curve(
        stack, tokens, "blocks.3.hook_mlp_out", 0.1, (1,), answers=answers, sampling=Sampling(resamples=0)
    ).iloc[0]
    own = measure(
        stack, tokens, lambda x, _: x, 3, 4, answers=torch.from_numpy(answers), sampling=Sampling(resamples=0)
    ).iloc[0]
    for name in ("cross_entropy", "exact", "cross_entropy_answers"):
        assert row[name] == pytest.approx(own[f"{name}_original"], abs=1e-6)  # in float32


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_dropped_is_scaling_exactly(shared):
    frame = curve(linear(), ids(), [HEAD], 0.0, (1, 2), shared=shared, sampling=Sampling(resamples=10))
    scaling = of(frame, SCALING, 0)
    for _, row in frame.iterrows():
        assert row["cross_entropy"] == pytest.approx(scaling["cross_entropy"], abs=1e-12)
        assert row["kl"] == pytest.approx(0, abs=1e-12)
        assert row["excess_high"] == pytest.approx(0, abs=1e-12)
    assert of(frame, GEOMETRIC, 2)["variance"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(of(frame, GEOMETRIC, 1)["variance"])  # of one mask there is none


def test_subnetworks_do_not_depend_on_batches_and_the_same_seed_gives_the_same():
    def averages(shared=True, **options):
        return curve(
            linear(),
            ids(),
            HEAD,
            0.3,
            (1, 4),
            shared=shared,
            sampling=Sampling(resamples=5, batch_size=32).but(**options),
        )

    own = averages()
    pd.testing.assert_frame_equal(averages(batch_size=4), averages(batch_size=6))
    pd.testing.assert_frame_equal(averages(shared=False), averages(shared=False))
    assert of(averages(shared=False), GEOMETRIC, 4)["kl"] != of(own, GEOMETRIC, 4)["kl"]
    assert of(averages(seed=1), GEOMETRIC, 4)["kl"] != of(own, GEOMETRIC, 4)["kl"]


def test_fewer_counts_are_the_first_of_more():
    some, more = (
        curve(linear(), ids(), HEAD, 0.3, counts, sampling=Sampling(resamples=0)) for counts in ((2,), (4, 2, 2))
    )
    assert of(some, ARITHMETIC, 2)["kl"] == of(more, ARITHMETIC, 2)["kl"]
    assert more["count"].tolist() == [0, 2, 2, 4, 4]


def test_the_variance_does_not_depend_on_the_count_but_for_sampling():
    frame = curve(linear(), ids(80), HEAD, 0.3, (2, 32), shared=False, sampling=Sampling(resamples=0))
    mean = frame[frame["way"] == ARITHMETIC].set_index("count")["variance"]
    assert mean[2] == pytest.approx(mean[32], rel=0.15)


def test_the_model_is_left_as_it_was():
    stack = linear()
    before = stack.run(ids())
    curve(stack, ids(), HEAD, 0.3, (2,), sampling=Sampling(resamples=0))
    assert torch.equal(stack.run(ids()), before)
    assert all(not point.fwd_hooks for point in stack.model.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": ()}, "each 1 or more; got"),
        ({"counts": (0, 2)}, r"each 1 or more; got \(0, 2\)"),
        ({"p": 1.0}, "from 0 to below 1"),
        ({"names": "unembed.hook_inn"}, "near it are unembed.hook_in"),
        ({"tokens": ids(3, 1)}, "two tokens or more"),
        ({"answers": torch.ones(6, 5, dtype=torch.bool)}, "the answer of prompt 1"),
    ],
)
def test_bad_requests(options, message):
    given = {"tokens": ids(), "names": HEAD, "p": 0.2, "counts": (1,)} | options
    with pytest.raises(ValueError, match=message):
        curve(linear(), **given)


def test_a_model_with_dropout_left_on_is_refused():
    stack = linear()
    with (
        stack.model.hooks(fwd_hooks=surgery.hooks.dropout(stack.model, HEAD, 0.5)),
        pytest.raises(ValueError, match=r"still random: unembed\.hook_in"),
    ):
        curve(stack, ids(), HEAD, 0.2)


@pytest.mark.parametrize("n_prompts", [1, 6])
def test_sentences_and_figure(n_prompts):
    answers = torch.zeros(n_prompts, 5, dtype=torch.bool)
    answers[:, 2] = True
    frame = curve(linear(), ids(n_prompts), HEAD, 0.2, (1, 2, 4), answers=answers, sampling=Sampling(resamples=20))
    sentences = say.mask_averages(frame)
    assert [text.split(" mean of 4 masks: ")[0] for text in sentences] == ["Arithmetic", "Geometric"]
    assert f"{of(frame, GEOMETRIC, 4)['kl']:.4f}" in sentences[1]
    figure = draw.mask_averages(frame)
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == [
        "loss",
        "KL from dropout off",
        "variance of the probabilities",
    ]
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    shown = frame[frame["way"] == GEOMETRIC]["cross_entropy_answers"]
    assert drawn["geometric mean"].get_ydata().tolist() == shown.tolist()
    assert drawing.png(figure)[1:4] == b"PNG"
    assert set(draw.WAYS) == {ARITHMETIC, GEOMETRIC, SCALING}
