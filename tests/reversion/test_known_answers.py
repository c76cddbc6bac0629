"""The answer on networks whose answer is known: rotations, constructed reversion, random networks, nothing to say.

The simulation in full, with thirty random networks, is ``benchmarks.simulations.reversion``.
"""

import pytest
import torch

from benchmarks.simulations import reversion as known

CLAIMS = ("reverts to a mean in", "only in part", "confirms a restoring pull", "ends shorter", "Reversion is stronger")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_rotation_turns_and_takes_nothing_back():
    said, tables = known.told(known.turning(3.1, n_layers=3), prompts=24, length=8)
    assert known.answer(said) == "no"
    assert not [one for one in said if any(claim in one for claim in CLAIMS)]
    assert not [one for one in said if "spread grows" in one or "spread shrinks" in one]
    layers = tables["reversion_layers.csv"]
    assert (layers["restoring"] == "no").all()
    assert (layers[[f"remaining_{kind}" for kind in ("difference", "random", "principal")]] - 1).abs().max(None) < 1e-4
    assert (layers["kappa_low"] > 0.5).all()  # a slope all the same


@pytest.mark.parametrize(
    ("options", "answer", "words"),
    [
        ({}, "yes", "in every layer (layers 1 to 2), as a force, and over all layers"),
        (
            {"directions": 1, "spread": 2.0},
            "in part",
            "in layers 1 to 2: along 1 direction, it holds 4% to 6% of the variance",
        ),
        ({"which": [2]}, "in part", "as a force in layer 2"),
    ],
    ids=["all", "one direction", "one layer"],
)
def test_constructed_reversion_is_found_where_it_is(options, answer, words):
    said, _ = known.told(known.reverting(0.3, n_layers=3, **options))
    assert known.answer(said) == answer
    assert words in said[-1]


@pytest.mark.parametrize("seed", range(2))
def test_random_networks_revert_no_more_than_they_grow(seed):
    setting = known.RANDOM[37 * seed % len(known.RANDOM)]
    said, _ = known.told(known.random(*setting, seed=seed, n_layers=3), prompts=24, length=8)
    assert known.answer(said) not in ("yes", "in part")
    assert not [one for one in said if any(claim in one for claim in CLAIMS[:3])]


def test_one_prompt_and_a_constant_stream_allow_no_claim():
    one, _ = known.told(known.reverting(0.3, n_layers=3), prompts=1)
    constant, _ = known.told(known.linear([torch.zeros(8, 8)] * 3, spread=0.0), prompts=8)
    for said, why in ((one, "one prompt has no intervals"), (constant, "the stream does not vary")):
        assert len(said) == 2
        assert all(why in sentence for sentence in said)
