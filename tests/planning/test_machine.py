"""Work adds up, and a machine's speed is that of the model on it."""

import torch

from surgery.instruments import known_networks
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.planning.machine import Machine, Work


def test_work_adds_up_and_memory_is_the_most_of_it():
    both = 2 * Work(forward=1, memory=5) + Work(forward=1, readouts=3, memory=4)
    assert both == Work(forward=3, readouts=3, memory=5)


def test_the_machine_is_timed_on_the_model_and_leaves_no_trace():
    stack = Stack(known_networks.random_network())
    tokens = Tokens.of(known_networks.tokens(4, 8))
    before = torch.get_rng_state()
    machine = Machine.of(stack, tokens)
    assert all(0 < getattr(machine, kind) < 1 for kind in ("forward", "backward", "readouts", "products"))
    assert machine.backward > machine.forward
    assert 0 < machine.half <= 1
    assert torch.equal(before, torch.get_rng_state())
    assert all(weight.grad is None for weight in stack.model.parameters())
