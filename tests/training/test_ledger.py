"""Operations counted against the arithmetic, and ledgers added up."""

import torch
from torch.nn.functional import scaled_dot_product_attention

import surgery
from surgery.models.loading import plain
from surgery.training.ledger import COLUMNS, Counter, Ledger


def test_a_forward_counts_twice_the_matrices_a_token_and_attention_twice_its_two_products():
    model = surgery.load("babel")
    matrices = sum(p.numel() for name, p in model.original_model.named_parameters() if p.ndim == 2)
    embedding = model.cfg.d_vocab * model.cfg.d_model
    batch, length = 3, 10
    ids = torch.zeros(batch, length, dtype=torch.long)
    _, counted = Counter()("forward", lambda: plain(model)(ids, use_cache=False))
    products = 2 * 2 * length**2 * model.cfg.d_model * batch * model.cfg.n_layers
    assert counted == 2 * (matrices - embedding) * batch * length + products


def test_a_backward_counts_twice_the_forward_and_attention_two_and_a_half_times():
    x, weight = torch.randn(6, 8), torch.randn(8, 4, requires_grad=True)
    x.requires_grad_(True)
    counter = Counter()
    y, forward = counter("forward", lambda: x @ weight)
    assert forward == 2 * 6 * 8 * 4
    assert counter("backward", lambda: y.sum().backward())[1] == 2 * forward
    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    y, forward = counter("attention", lambda: scaled_dot_product_attention(q, q, q, is_causal=True))
    assert forward == 2 * 2 * (2 * 3) * 5 * 5 * 4
    assert counter("attention back", lambda: y.sum().backward())[1] == 2.5 * forward


def test_a_known_key_is_not_counted_again_but_called():
    counter, calls = Counter(), []
    for _ in range(3):
        _, counted = counter("shape", lambda: calls.append(torch.ones(4, 4) @ torch.ones(4, 4)))
        assert counted == 128
    assert len(calls) == 3


def test_ledgers_add_by_phase_and_teacher_and_come_back_from_their_frame():
    ledger, other = Ledger(), Ledger()
    ledger.add("training", 10, 100, 1.0)
    ledger.add("training", 5, 50, 0.5)
    other.add("harvest", 7, 1000, 2.0, teacher=True)
    total = ledger + other
    assert total.operations(teacher=False) == 150
    assert total.operations(teacher=True) == 1150
    frame = total.frame()
    assert list(frame) == list(COLUMNS)
    assert frame["tokens"].tolist() == [15, 7]
    assert Ledger.of(frame).frame().equals(frame)
    assert ledger.operations(teacher=True) == 150  # adding changed neither


def test_an_empty_ledger_has_its_columns():
    assert list(Ledger().frame()) == list(COLUMNS)
    assert Ledger().operations(teacher=True) == 0
