"""What is recorded of windows tells how far it is, to the last step."""

import pytest

from surgery import Stack
from surgery.instruments import known_networks
from surgery.series.recording import Recording
from surgery.stats.sampling import Sampling


@pytest.mark.parametrize("grain", ["layer", "sublayer"])
@pytest.mark.parametrize("options", [{}, {"damage_length": 2, "forms": ("sum", "mean")}, {"forms": ()}])
def test_every_batch_takes_the_steps_that_were_told(grain, options):
    stack = Stack(known_networks.random_network(n_layers=4))
    sampling = Sampling(batch_size=4)
    recording = Recording.of(stack, known_networks.tokens(6, 5), 3, grain=grain, sampling=sampling, **options)
    for prompts in recording.batches:
        steps: list[int] = []
        recording.sums(prompts, steps.append)
        assert sum(steps) == recording.steps
