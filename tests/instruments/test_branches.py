"""Tokens moved together against tokens moved one at a time, on the architecture matrix."""

import pytest
import torch

from support import fixtures
from surgery import Stack
from surgery.instruments import branches, known_networks
from surgery.instruments.branches import answers, one_by_one
from surgery.instruments.ensemble import Ensemble
from surgery.models.engine import Engine
from surgery.models.tokens import Tokens

DOUBLE = {"gpt2"}  # its softmax is in the precision of its weights; that of the others is in single precision
OBEYS = {"gpt2", "llama"}  # these must run together; of the others some do, and all must be right
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 9, [1] * 8 + [0]]).bool()


def moves(visit, seed=0):
    """Three moved tokens of each prompt that has any, the last prompt's first among them."""
    generator = torch.Generator().manual_seed(seed)
    prompt = visit.context.tokens.mask.any(1).nonzero()[:, 0]
    lengths = visit.context.tokens.mask.sum(1)[prompt]
    first = visit.context.tokens.mask[prompt].long().argmax(1)
    place = first + (torch.rand(3, len(prompt), generator=generator) * lengths).long()
    x = visit.x[prompt, place]
    return prompt, place, x + 0.3 * x.norm(dim=-1, keepdim=True) * torch.randn(x.shape, generator=generator).to(x) / 4


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*fixtures.ARCHITECTURES, *fixtures.NATIVE])
def test_moving_tokens_together_is_moving_them_one_at_a_time(name, side, opened, monkeypatch):
    dtype = torch.float64 if side == "right" else torch.float32
    single = side == "left" or name not in DOUBLE
    rounding = 1e-5 if single else 1e-9
    stack = opened(name, dtype)
    mask = MASK[[0, 1, 3]] if side == "right" else MASK[[0, 1, 3]].flip(1)
    ids = torch.randint(4, stack.d_vocab, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    seen: list[int] = []
    layer = Engine.layer
    monkeypatch.setattr(
        Engine, "layer", lambda engine, index, x, call: seen.append(index) or layer(engine, index, x, call)
    )
    for visit in Ensemble(Tokens(ids, mask)).visits(stack):
        if visit.layer == 0:
            try:
                states = [None, stack.norm_state(visit.context)]
            except ValueError:
                states = [None]
        for state in states:
            seen.clear()
            found = answers(stack, visit, *moves(visit), state)
            assert name not in OBEYS or len(seen) == 1
            plain = one_by_one(stack, visit, *moves(visit), state)
            assert plain.norm() > 0
            torch.testing.assert_close(found, plain, rtol=0, atol=rounding * float(visit.u[visit.mask].abs().max()))


def test_a_model_that_ignores_the_mask_moves_its_tokens_one_at_a_time(monkeypatch):
    stack, ensemble = Stack(known_networks.random_network(n_layers=1)), Ensemble(Tokens.of(known_networks.tokens(4, 6)))
    (visit,) = ensemble.visits(stack)
    with_branches = branches._with_branches

    def ignoring(context, prompt, places):
        context = with_branches(context, prompt, places)
        for call in context.recording.calls:
            for key, value in call.kwargs.items():
                if "mask" in key and value is not None:
                    call.kwargs[key] = torch.zeros_like(value)
        return context

    plain = one_by_one(stack, visit, *moves(visit))
    monkeypatch.setattr(branches, "_with_branches", ignoring)
    assert branches._together(stack, visit, *moves(visit), None) is None
    torch.testing.assert_close(answers(stack, visit, *moves(visit)), plain)
