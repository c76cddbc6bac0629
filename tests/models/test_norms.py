"""Norms that are given their denominator and mean: exact by their definition."""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from support.exact_networks import rng
from surgery.models.norms import FrozenNorm

WIDTH = 16


def layer_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(WIDTH, generator=rng(), dtype=torch.float64))
        norm.bias.copy_(torch.randn(WIDTH, generator=rng(1), dtype=torch.float64))
    return norm


def streams() -> list[torch.Tensor]:
    return [3 * torch.randn(5, WIDTH, generator=rng(seed), dtype=torch.float64) + seed for seed in (2, 3)]


@torch.no_grad()
def test_layernorm_keeps_denominator_and_mean():
    norm, (clean, other) = layer_norm(), streams()
    frozen = FrozenNorm(norm, torch.randn(4, WIDTH, generator=rng(), dtype=torch.float64))
    deviation = (clean.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    expected = norm.weight * (other - clean.mean(-1, keepdim=True)) / deviation + norm.bias
    torch.testing.assert_close(frozen.with_state(other, frozen.state(clean)), expected)
    torch.testing.assert_close(frozen.with_state(clean, frozen.state(clean)), norm(clean))
    centred = norm.weight * (other - other.mean(-1, keepdim=True)) / deviation + norm.bias
    torch.testing.assert_close(frozen.with_state(other, frozen.scale(clean)), centred)


@torch.no_grad()
def test_a_root_mean_square_has_no_mean_to_keep():
    frozen, (clean, other) = FrozenNorm(norm := LlamaRMSNorm(WIDTH).double(), streams()[0]), streams()
    assert frozen.state(clean).shape[-1] == 1
    expected = other / (clean.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    torch.testing.assert_close(frozen.with_state(other, frozen.state(clean)), expected, rtol=1e-5, atol=1e-5)


def test_a_norm_that_mixes_dimensions_keeps_its_denominator_alone():
    class Mixing(nn.Module):
        eps = 1e-5

        def forward(self, x):
            x = x - x.mean(-1, keepdim=True)
            return (x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()).flip(-1)

    frozen = FrozenNorm(Mixing(), streams()[0])
    assert frozen.centres
    assert frozen.state(streams()[0]).shape[-1] == 1
