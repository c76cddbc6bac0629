"""Tables of walks whose answer was planted."""

import numpy as np
import pandas as pd


def planted(noise: float = 0.002, seeds: int = 4, **gains: float) -> pd.DataFrame:
    """Unexplained shares: ``gains`` below what the real pairs leave, with noise that differs between methods."""
    rows = []
    for amount in (1000.0, 10_000.0):
        for seed in range(seeds):
            for place, name in enumerate(NAMES):
                gain = gains.get(name.split(", ")[-1].replace(" ", "_"), 0.0)
                luck = 0.1 * seed + noise * np.sin(2.4 * (seed + 1) * (place + 1))  # that of the seed all have alike
                missed = 0.6 + luck - gain
                rows.append(
                    {
                        "method": name,
                        "seed": float(seed),
                        "unexplained": missed,
                        "cross_entropy": missed / 2,
                        "cross_entropy_original": 0.1,
                        "damage": missed / 3,
                        "steps": 4.0,
                        "operations_with_teacher": 1e9,
                        "real_tokens": amount,
                        "harvested": amount * (2 if name == "more real" else 1),
                    }
                )
    return pd.DataFrame(rows)


def on_and_off() -> pd.DataFrame:
    far = {"moved": 0.4, "nearest": 3.0, "mahalanobis": 2.0, "beyond_real": 0.4}
    return pd.DataFrame(
        [
            {"kind": "real", "control": False, "n_prompts": 250} | moved(),
            {"kind": "near", "control": False, "n_prompts": 250} | moved(moved=0.4, nearest=1.005),
            {"kind": "near", "control": True, "n_prompts": 250} | moved(**far),
            {"kind": "off", "control": False, "n_prompts": 250} | moved(moved=0.4, nearest=3.0, entropy=1.2),
            {"kind": "off", "control": True, "n_prompts": 250} | moved(**far),
            {"kind": "shrunk", "control": False, "n_prompts": 250} | moved(moved=0.4, mahalanobis=0.5),
            {"kind": "shrunk", "control": True, "n_prompts": 250} | moved(moved=0.4),
        ]
    )


NAMES = ["real", "stationary, relabelled", "stationary, unrelabelled", "longer", "more real"]


AT_REST = {"mahalanobis": 1.0, "beyond_real": 0.05, "nearest": 1.0, "entropy": 1.0, "loss": 1.0}


def moved(half: float = 0.004, **values: float) -> dict[str, float]:
    usual = {
        "moved": 0.0,
        "mahalanobis": 1.0,
        "beyond_real": 0.05,
        "beyond_chi_squared": 0.1,
        "nearest": 1.0,
        "entropy": 1.0,
        "loss": 1.0,
    } | values
    usual |= {f"{name}_change": usual[name] - at_rest for name, at_rest in AT_REST.items()}
    ends = {"": 0.0, "_low": -half, "_high": half}
    return {f"{name}{end}": value + add for name, value in usual.items() for end, add in ends.items()}
