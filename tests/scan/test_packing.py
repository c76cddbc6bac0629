"""What runs for a probe set is as little as possible, and the scores are those of every sequence run by itself."""

import itertools

import numpy as np
import pytest
import torch

from support import fixtures
from surgery import Stack, scan
from surgery.corpus.probes import Encoded, Probe, ProbeSet
from surgery.models.tokens import padded
from surgery.scan import packing

EVERY = (*fixtures.ARCHITECTURES, *fixtures.NATIVE)
WIRINGS = (":", ":3 1:", ":1 {1:3|2} 0.5*(2:4)")


def encoded_by_hand(side: str) -> Encoded:
    """Probes of 3 to 14 tokens, longer than the sliding windows of the matrix; some choices begin alike."""
    generator = torch.Generator().manual_seed(0)

    def words(count):
        return torch.randint(4, fixtures.N_VOCAB, (count,), generator=generator).tolist()

    rows, probe, choice, begins = [], [], [], []
    for index, length in enumerate((2, 9, 4, 9, 2, 12)):
        prompt, first = words(length), words(1)
        answers = [first, [*first, *words(1)], words(1), words(2)][: 1 + index % 4]
        for number, answer in enumerate(answers):
            rows.append([*prompt, *answer])
            probe.append(index)
            choice.append(number)
            begins.append(length)
    tokens = padded(rows, 0, fixtures.N_VOCAB, side)
    scored = torch.zeros_like(tokens.mask)
    for row, begin in enumerate(begins):
        scored[row, tokens.mask[row].nonzero().flatten()[begin:]] = True
    return Encoded(tokens, scored, tuple(probe), tuple(choice), tuple("ab" * 3), "sha256 of these")


def alone(stack: Stack, encoded: Encoded, wiring: str) -> dict[str, np.ndarray]:
    """The metrics by running every sequence whole, without padding, and reading out all of it."""
    loglik, exact, kl = [], [], []
    for row, mask in enumerate(encoded.tokens.mask):
        ids = encoded.tokens.ids[row][mask][None]
        targets = ids[0][encoded.scored[row][mask]]
        log_p, clean = (stack.run(ids, w)[0, -len(targets) - 1 : -1].log_softmax(-1) for w in (wiring, ":"))
        loglik.append(float(log_p.gather(1, targets[:, None]).sum()))
        exact.append(float((log_p.argmax(1) == targets).all()))
        kl.append(float((clean.exp() * (clean - log_p)).sum(1).mean()))
    first = [row for row, choice in enumerate(encoded.choice) if choice == 0]
    of_probe = np.array(encoded.probe)
    best = [loglik[row] == max(np.array(loglik)[of_probe == encoded.probe[row]]) for row in first]
    return {
        "loglik": np.array(loglik)[first],
        "exact": np.array(exact)[first],
        "kl": np.array(kl)[first],
        "choice": np.array(best, float),
    }


@pytest.mark.parametrize("name", EVERY)
def test_every_metric_is_that_of_each_sequence_run_alone(load, name):
    stack, encoded = Stack(load(name)), encoded_by_hand("right")
    encoded = Encoded.portion(encoded, [4, 1, 0, 3, 5, 2])  # not in the order of lengths
    frame = scan.run(stack, WIRINGS, encoded, metrics=("loglik", "exact", "kl", "choice"))
    for wiring in WIRINGS:
        expected = alone(stack, encoded, wiring)
        rows = frame[frame["wiring"] == str(stack.wiring(wiring))]
        for metric, values in expected.items():
            got = rows[rows["metric"] == metric].set_index("prompt")["value"][list(encoded.prompts)]
            np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-5, err_msg=f"{wiring} {metric}")


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "opt"])
def test_padding_on_the_left_and_small_portions_change_nothing(load, name):
    stack, metrics = Stack(load(name)), ("loglik", "credit", "loss", "kl", "choice")
    expected = scan.run(stack, WIRINGS, encoded_by_hand("right"), metrics=metrics)
    for options in ({}, {"batch_size": 1}, {"batch_size": 4}):
        got = scan.run(stack, WIRINGS, encoded_by_hand("left"), metrics=metrics, **options)
        assert got.drop(columns=["value", "baseline"]).equals(expected.drop(columns=["value", "baseline"]))
        for column in ("value", "baseline"):
            np.testing.assert_allclose(got[column], expected[column], rtol=1e-5, atol=1e-5)


def test_choices_of_one_token_run_once(stack_of):
    stack = stack_of("llama")
    chosen = ProbeSet("choose", tuple(Probe(f"w{i} w5", f"w{i}", choices=(f"w{i}", "w7 w8", "w20")) for i in range(4)))
    encoded = chosen.encode(stack)
    inputs = packing.Inputs.of(encoded)
    assert inputs.tokens.ids.shape == (4, 4)  # <bos> w0 w5, and w7 of the longer choice
    assert inputs.row == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert inputs.places.tolist() == [[row, at] for row in range(4) for at in (2, 3)]
    assert inputs.place.tolist() == [2 * row + after for row in range(4) for after in (0, 0, 1, 0)]


def test_portions_cost_least_of_all_cuts():
    generator = np.random.default_rng(0)
    for _ in range(30):
        n, fixed = 7, float(generator.uniform(0, 20))
        lengths, counts = generator.integers(1, 9, n).tolist(), generator.integers(1, 4, n).tolist()
        parts = packing.portions(counts, lengths, 10**6, 10**6, fixed)
        assert sorted(itertools.chain.from_iterable(parts)) == list(range(n))

        def cost(parts, lengths=lengths, counts=counts, fixed=fixed):
            return sum(fixed + sum(counts[i] for i in part) * max(lengths[i] for i in part) for part in parts)

        order = sorted(range(n), key=lengths.__getitem__)
        cuts = itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n))
        least = min(cost([order[a:b] for a, b in itertools.pairwise((0, *cut, n))]) for cut in cuts)
        assert cost(parts) == pytest.approx(least)


def test_portions_keep_to_their_limits():
    lengths = [5] * 20 + [50]
    parts = packing.portions([1] * 21, lengths, 30, 4, 0)
    assert max(map(len, parts)) == 4
    assert [20] in parts  # longer than a portion may be: by itself
    assert all(len(part) * max(lengths[i] for i in part) <= 30 for part in parts if part != [20])
