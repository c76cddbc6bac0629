import pytest
import torch

from support.exact_networks import network
from surgery import Stack, Wiring
from surgery.instruments import known_networks
from surgery.scan import controls


@pytest.fixture(scope="module")
def stack():
    return Stack(known_networks.random_network(6, dtype=torch.float64))


def test_a_span_has_its_controls_by_name():
    frame = controls.repeats(12, 4, 8, count=3, factors=(0.5, 1), seed=1)
    names = ["repeat", "random span", "random span", "random span", "damped 0.5", "damped 1"]
    assert frame.control.tolist() == names
    assert frame.wiring[0] == ":8 4:"
    assert frame.wiring[4:].tolist() == [":8 0.5*(4:8) 8:", ":8 4:"]


def test_random_spans_are_other_spans_of_equal_length():
    wirings = controls.random_spans(12, 4, 8, count=5, seed=3)
    assert wirings == controls.random_spans(12, 4, 8, count=5, seed=3)
    assert wirings != controls.random_spans(12, 4, 8, count=5, seed=4)
    assert len(set(wirings)) == 5
    every = {Wiring.of(12).repeat(i, i + 4) for i in range(9)} - {Wiring.of(12).repeat(4, 8)}
    assert set(wirings) < every
    assert set(controls.random_spans(12, -8, -4, count=99)) == every


@pytest.mark.parametrize("call", [controls.random_spans, controls.damped])
def test_a_span_outside_the_model_is_refused(call):
    with pytest.raises(ValueError, match="the span 4:4 is empty"):
        call(12, 4, 4, 1)
    with pytest.raises(ValueError, match="the span 4:13 leaves"):
        call(12, 4, 13, 1)


def final(stack, text, context):
    return stack.execute(text, context.x0, context)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1])
@pytest.mark.parametrize("span", [(1, 4), (0, 6), (5, 6)])
def test_a_damped_pass_is_a_part_of_the_second_update(stack, span, factor):
    context, (i, j) = stack.context(known_networks.tokens(3, 7)), span
    x = final(stack, f":{j}", context)
    x = x + factor * (stack.execute(f"{i}:{j}", x, context) - x)
    x = stack.execute(f"{j}:", x, context) if j < 6 else x
    found = stack.execute(controls.damped(6, i, j, factor), context.x0, context)
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("span", [(1, 4), (0, 6), (5, 6)])
def test_norm_only_has_the_second_pass_s_size_and_the_first_s_direction(stack, span):
    context, (i, j) = stack.context(known_networks.tokens(3, 7)), span
    x = final(stack, f":{j}", context)
    size = stack.execute(f"{i}:{j}", x, context).norm(dim=-1, keepdim=True)
    expected = torch.nn.functional.normalize(x, dim=-1) * size
    expected = stack.execute(f"{j}:", expected, context) if j < 6 else expected
    torch.testing.assert_close(controls.norm_only(stack, i, j, context), expected)


@pytest.mark.parametrize("span", [(1, 4), (0, 6), (5, 6)])
def test_linearised_is_the_limit_of_small_steps(span):
    stack = Stack(known_networks.random_network(6, norm=None, dtype=torch.float64))  # norms would compute in float32
    context, (i, j), step = stack.context(known_networks.tokens(3, 7)), span, 1e-5
    x_i = final(stack, f":{i}", context) if i else context.x0
    x_j = final(stack, f":{j}", context)
    ends = [stack.execute(f"{i}:{j}", x_i + side * step * (x_j - x_i), context) for side in (1, -1)]
    expected = x_j + (ends[0] - ends[1]) / (2 * step)
    expected = stack.execute(f"{j}:", expected, context) if j < 6 else expected
    found = controls.linearised(stack, i, j, context)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert (found - final(stack, str(Wiring.of(6).repeat(i, j)), context)).abs().max() > 1e-4


def test_affine_layers_are_their_own_linearisation():
    matrices = [
        0.3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(4)
    ]
    embedding = torch.randn(256, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    stack = Stack(network(matrices, embedding))
    context = stack.context(known_networks.tokens(3, 7))
    torch.testing.assert_close(controls.linearised(stack, 1, 3, context), final(stack, ":3 1:", context))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_layers_of_every_kind_can_be_linearised(stack_of, name):
    stack = stack_of(name)
    context = stack.context(torch.arange(4, 20).view(2, 8))
    found = controls.linearised(stack, 1, 3, context)
    assert torch.isfinite(found).all()
    assert not found.requires_grad


def test_layers_without_a_derivative_are_named(stack_of):
    stack = stack_of("qwen3_moe")
    with pytest.raises(ValueError, match="cannot be linearised"):
        controls.linearised(stack, 1, 3, stack.context(torch.arange(4, 20).view(2, 8)))


def test_painters_one_window():
    frame = controls.painters(12, [4], seeds=(5, 6))
    assert frame.columns.tolist() == ["variant", "size", "wiring"]
    rows = frame.groupby("variant").wiring.agg(list).to_dict()
    shuffled = rows.pop("random order")
    assert rows == {
        "skip": [":4 8:"],
        "middle-repeat": [":4 6 6 6 6 8:"],
        "reverse": [":4 7:3:-1 8:"],
        "parallel mean": [":4 mean{*4:8} 8:"],
        "parallel sum": [":4 {*4:8} 8:"],
        "looped parallel": [":4 mean{*4:8} mean{*4:8} mean{*4:8} 8:"],
    }
    for text in shuffled:
        layers = Wiring.parse(text, 12).layers
        assert layers != tuple(range(12))
        assert sorted(layers[4:8]) == [4, 5, 6, 7]
        assert layers[:4] + layers[8:] == (0, 1, 2, 3, 8, 9, 10, 11)


@pytest.mark.parametrize("n_layers", [3, 6, 7, 12, 13])
def test_painters_windows_are_centred_and_grow(n_layers):
    frame = controls.painters(n_layers)
    assert frame.groupby("size").size().tolist() == [9] * (n_layers - 2)
    for row in frame[frame.variant == "skip"].itertuples():
        left = set(range(n_layers)) - set(Wiring.parse(row.wiring, n_layers).layers)
        assert len(left) == row.size
        assert abs(min(left) - (n_layers - 1 - max(left))) <= 1
        assert n_layers // 2 in left


@pytest.mark.parametrize("size", [0, 1, 12, 13])
def test_painters_refuse_other_sizes(size):
    with pytest.raises(ValueError, match=f"2 to 11 of 12 layers, got {size}"):
        controls.painters(12, [size])
