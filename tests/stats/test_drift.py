"""The sums of one step, and what is made of them: padding, streams that do not vary, half-life, regime."""

import dataclasses
import math

import pytest
import torch

from support.exact_networks import rng
from surgery.stats.bootstrap import weights
from surgery.stats.drift import Step, half_life, regime

MEASURES = ("kappa", "psi", "growth", "variance_ratio_next")


def test_step_ignores_what_padding_holds():
    x, u = torch.randn(2, 4, 6, 3, generator=rng())
    mask = torch.arange(6) < torch.tensor([[3], [6], [2], [5]])
    clean = Step.of(x, u, mask)
    dirty = Step.of(x.masked_fill(~mask.unsqueeze(-1), math.nan), u.masked_fill(~mask.unsqueeze(-1), math.inf), mask)
    for field in dataclasses.fields(Step):
        assert torch.equal(getattr(clean, field.name), getattr(dirty, field.name))
    parts = Step.concatenate([Step.of(x[:1], u[:1], mask[:1]), Step.of(x[1:], u[1:], mask[1:])])
    assert torch.equal(parts.drift(weights(4, 10)).kappa, clean.drift(weights(4, 10)).kappa)


@pytest.mark.parametrize("seed", range(10))
def test_step_of_a_stream_that_does_not_vary_is_undefined(seed):
    constant, u = torch.randn(1, 1, 5, generator=rng(seed)), torch.randn(40, 3, 5, generator=rng(seed))
    drift = Step.of(constant.expand(40, 3, 5), u).drift(weights(40, 10))
    assert all(getattr(drift, name).isnan().all() for name in MEASURES)


@pytest.mark.parametrize(
    ("kappa", "expected"),
    [
        (0.5, 1.0),
        (0.75, 0.5),
        (1e-9, math.log(2) * 1e9),
        (0.0, None),
        (-0.1, None),
        (1.0, None),
        (1.2, None),
        (math.nan, None),
    ],
)
def test_half_life(kappa, expected):
    assert math.isnan(half_life(kappa)) if expected is None else half_life(kappa) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kappa", "low", "high", "growth", "expected"),
    [
        (0.2, 0.1, 0.3, 0.5, "opposing"),
        (1.2, 0.9, 1.4, 1.5, "opposing"),
        (1.2, 1.1, 1.4, 1.5, "overshooting"),
        (-0.2, -0.3, -0.1, 0.5, "carrying"),
        (0.1, -0.1, 0.3, 0.5, "undecided"),
        (1e-8, 5e-9, 2e-8, 0.5, "undecided"),
        (-1e-8, -2e-8, -5e-9, 0.5, "undecided"),
        (0.1, math.nan, math.nan, 0.5, "undecided"),
        (0.0, 0.0, 0.0, 0.0, "still"),
        (math.nan, math.nan, math.nan, math.nan, "undefined"),
    ],
)
def test_regime(kappa, low, high, growth, expected):
    assert regime(kappa, low, high, growth, rounding=1e-7) == expected
