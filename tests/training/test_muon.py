"""Muon in float32 and in batches is torch's Muon, but for the rounding of half precision."""

import pytest
import torch
from torch import nn

from surgery.training import muon

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (24, 8)]


def trained(kind, steps=3, **options):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = kind(weights, lr=0.1, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "momentum": 0.5}, {"weight_decay": 0.9}])
def test_a_step_is_torchs_but_for_half_precision(monkeypatch, options):
    ours, _ = trained(muon.Muon, **options)
    half, _ = trained(torch.optim.Muon, **options)
    assert max(float((a - b).detach().abs().max()) for a, b in zip(ours, half, strict=True)) < 0.02
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's own iteration, in single precision
    single, _ = trained(torch.optim.Muon, **options)
    for a, b in zip(ours, single, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_what_is_remembered_opens_in_torchs():
    _, ours = trained(muon.Muon)
    weights, torchs = trained(torch.optim.Muon, steps=1)
    torchs.load_state_dict(ours.state_dict())
    for mine, weight in zip(ours.param_groups[0]["params"], weights, strict=True):
        assert torch.equal(ours.state[mine]["momentum_buffer"], torchs.state[weight]["momentum_buffer"])


def test_a_batch_gives_what_each_matrix_gives_alone(monkeypatch):
    whole, _ = trained(muon.Muon)
    monkeypatch.setattr(muon, "AT_ONCE", 1)
    alone, _ = trained(muon.Muon)
    assert muon._same_shape(alone) == [[0], [1], [2], [4], [3]]
    for a, b in zip(whole, alone, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(muon.orthogonalised(torch.randn(3, 6, 9)))
    assert (values > 0.3).all()
    assert (values < 1.3).all()


def test_in_half_precision_where_training_is_and_the_cpu_is_fast_in_it(monkeypatch):
    half, _ = trained(muon.HalfMuon)
    single, _ = trained(muon.Muon)
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(half, single, strict=True)]
    assert 1e-5 < max(gaps) < 0.02
    for tiles in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert muon.of_precision("bf16") is (muon.HalfMuon if tiles else muon.Muon)
        assert muon.of_precision("no") is muon.Muon
