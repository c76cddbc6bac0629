"""Wirings of every kind for four layers, tokens to run them on, and how far two results are apart."""

import torch

SERIAL = {"repeat": ":3 1:", "skip": ":1 2:", "reorder": "0 2 1 3", "reverse": "::-1"}
GROUPS = {
    "sum": ":1 {1|2} 3",
    "mean": "mean{*:4}",
    "chains": ":1 {1 2|3 1} 3",
    "damped": ":3 0.5*(1:3) 3",
    "nested": "0 0.5*({1|mean{2|3 2}} 3) 3",
    "last": ":2 mean{2|3}",
}
SUBLAYERS = {"sublayers": "0.mlp 0.attn 1.attn 2:", "sublayers in groups": "{0.mlp|0.attn 1} 2 3.attn"}
TOKENS = torch.tensor([[1, 17, 40, 23, 9, 61, 33, 80, 12, 50], [1, 5, 7, 7, 90, 31, 64, 28, 13, 44]])


def difference(result, expected):
    """The largest difference, relative to the largest expected value."""
    return float((result - expected).detach().abs().max() / expected.detach().abs().max())
