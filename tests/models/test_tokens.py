"""Tokens: where each prompt ends, whatever the side of its padding."""

import pytest
import torch

from support.exact_networks import ragged
from surgery.models.tokens import Tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_the_last_real_one(side):
    tokens = ragged(side)
    expected = [int(row.nonzero().max()) for row in tokens.mask]
    assert len(set(expected)) > 1 or side == "left"
    assert tokens.last.tolist() == expected
    assert Tokens.of(tokens.ids).last.tolist() == [tokens.ids.shape[1] - 1] * len(tokens)


def test_padding_on_either_side_moves_it_with_the_prompt(opened):
    stack = opened("llama")
    right, left = (stack.tokens(["w1 w2 w3 w4", "w5 w6"], padding_side=side) for side in ("right", "left"))
    rows = range(2)
    assert left.last.tolist() != right.last.tolist()
    assert torch.equal(left.ids[rows, left.last], right.ids[rows, right.last])
    assert torch.allclose(stack.run(left)[rows, left.last], stack.run(right)[rows, right.last], atol=1e-5)


def test_a_prompt_of_padding_alone_has_none():
    with pytest.raises(ValueError, match="prompt 2 is all padding, it has no last token"):
        _ = Tokens(torch.ones(2, 3).long(), torch.tensor([[True] * 3, [False] * 3])).last
