"""Networks whose parts are known: layers of one kind up to a boundary, of another behind it; and tables made up."""

import pandas as pd
import torch

from support.exact_networks import parameters
from support.made_up import with_interval
from surgery.instruments import known_networks


@torch.no_grad()
def three_parts(shares, gains=None, width=6, seed=0):
    """A mixed network of one share per layer, whose layer ``l`` writes ``gains[l]`` times what it would."""
    model = known_networks.mixed_network(shares, len(shares), width, seed=seed, dtype=torch.float64)
    for layer, gain in enumerate(gains or []):
        parameters(model)[f"layers.{layer}.mlp.fc_out.weight"][:] *= gain
    return model


def ends(
    D: float = -0.2,
    of_ratio: float = -0.3,
    p_windows: float = 0.01,
    first: float | None = None,
    last: float | None = None,
) -> pd.DataFrame:
    """The ends against the middle on all prompts; both ends differ by D if not said otherwise."""
    row = {"kind": "all", "boundary_in": 4, "boundary_out": 9, "length": 2, "n_prompts": 16, "p_windows": p_windows}
    row |= (
        with_interval("D", D)
        | with_interval("D_over_rotated", of_ratio)
        | {"p_rotated": p_windows, "token_share": 0.01, "n_tokens": 500}
    )
    row |= with_interval("D_in", D if first is None else first) | with_interval("D_out", D if last is None else last)
    return pd.DataFrame([row | {"verdict": "supported: ..."}])


def by_kind(D: float = 0.2, p: float = 0.01) -> pd.DataFrame:
    """D on prompts of kind b minus D on those of kind a."""
    return pd.DataFrame([{"kind": "b", "other": "a", "p": p} | with_interval("D", D)])


def tables() -> dict[str, pd.DataFrame]:
    """Boundaries before layers 4 and 9 of 12 as ``Anatomy.tables`` has them, but for convergence."""
    boundaries = [("in", 4, 0.8), ("in", 5, 0.2), ("out", 9, 1.0)]
    detectors = [
        {"detector": name, "boundary": boundary, "layer": layer, "layer_low": layer - 1, "layer_high": layer + 1}
        for name in ("all features", "kappa")
        for boundary, layer in (("in", 4.0), ("out", 9.0))
    ]
    agreement = [
        {"boundary": "in", "earliest": 4, "latest": 5, "sd": 0.4, "p_drift": 0.01},
        {"boundary": "out", "earliest": 3, "latest": 10, "sd": 3.0, "p_drift": 0.9},
    ]
    return {
        "boundaries": pd.DataFrame(boundaries, columns=["boundary", "layer", "probability"]),
        "segments": pd.DataFrame(
            {"breaks": [0, 1, 2], "evidence": "growth", "gain": [0.0, 0.5, 0.7], "p_drift": 0.01, "gain_drift": 0.4}
        ).assign(power=0.9),
        "detectors": pd.DataFrame(detectors),
        "agreement": pd.DataFrame(agreement).assign(n_detectors=5, sd_drift=2.0),
        "ends": ends(),
        "by_kind": by_kind(),
    }
