"""Frames with made-up numbers, to test what a report makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from surgery.graft import study as graft_study
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.records import manifest as manifests
from surgery.records import tables
from surgery.reversion import files, kappa
from surgery.reversion import part as reversion_part
from surgery.scan import part as scan_part
from surgery.series import chapter
from surgery.series import part as series_part
from surgery.training.ledger import Ledger

SERIES, CALIBRATION, MEASURES, COSTS = chapter.WINDOWS, chapter.NETWORKS, chapter.MEASURES_FILE, chapter.COSTS_FILE
REVERSION = files.LAYERS
SCAN, GROUPS, ENDS = "scan_table.csv", "scan_groups.csv", "anatomy_ends.csv"
GRAFT_FINDINGS = ["Layers 2 to 3 of 6 replaced.", "Graft: as close as that."]
COLUMNS = {SERIES: chapter.NETWORKS_COLUMNS, REVERSION: kappa.COLUMNS}


def with_interval(name: str, value: float, half: float = 0.01) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def series(n_layers: int = 6, max_length: int | None = None, n_prompts: int = 32, **values: float) -> pd.DataFrame:
    """Every window with the same numbers, 0.02 wide, those of ``values`` replaced."""
    numbers = {
        "R": 0.6,
        "O": 0.7,
        "S": 0.65,
        "R_live": 0.65,
        "O_live": 0.75,
        "S_live": 0.7,
        "layernorm_share": 0.05,
        "N": 0.4,
        "R_over_N": 1.5,
        "R_rotated": 0.4,
        "R_over_rotated": 1.5,
        "preference": 1.5,
        "R_shuffled": 0.3,
        "S_matched": 0.4,
        "S_excess": 0.25,
        "loss_parallel_sum": 0.8,
        "loss_parallel_mean": 1.2,
        "kl_parallel_sum": 0.5,
        "kl_parallel_mean": 0.9,
    } | values
    columns = {key: value for name, number in numbers.items() for key, value in with_interval(name, number).items()}
    windows = [
        (start, stop)
        for start in range(n_layers)
        for stop in range(start + 2, n_layers + 1)
        if stop - start <= (max_length or n_layers)
    ]
    return pd.DataFrame([{"start": a, "stop": b, **columns, "n_prompts": n_prompts} for a, b in windows])


def reversion(n_layers: int = 6, n_prompts: int = 32, **values: float | str) -> pd.DataFrame:
    """Every layer with the same numbers, 0.02 wide, those of ``values`` replaced."""
    numbers = {
        "kappa": 0.2,
        "psi": 0.5,
        "growth": 0.9,
        "variance_ratio_next": 1.4,
        "kappa_rotated": 0.0,
        "kappa_token_shuffled": 0.0,
        "kappa_order_shuffled": 0.02,
        "kappa_untrained": -0.01,
        "kappa_excess": 0.2,
        "kappa_excess_untrained": 0.2,
        "kappa_causal_difference": 0.2,
        "kappa_causal_random": 0.1,
        "kappa_causal_principal": 0.3,
        "remaining_difference": 0.8,
        "remaining_random": 0.9,
        "remaining_principal": 0.7,
    }
    words = {"regime": "opposing", "restoring": "yes"}
    words |= {name: value for name, value in values.items() if isinstance(value, str)}
    numbers |= {name: value for name, value in values.items() if not isinstance(value, str)}
    numbers = {f"kappa_excess_{null}": numbers["kappa_excess"] for null in ("rotated", "token_shuffled")} | numbers
    columns = {key: value for name, number in numbers.items() for key, value in with_interval(name, number).items()}
    rows = [{"layer": layer, **columns, "half_life": 3.1, **words, "n_prompts": n_prompts} for layer in range(n_layers)]
    return pd.DataFrame(rows)


def panel(pooled: float = 0.9, within_excess: float = -0.1) -> pd.DataFrame:
    """All layers as one autoregression over depth, without the panels of random walks."""
    row = {"series": "model", "span": "all", "start": 1, "stop": 6, "within": 0.5, "within_walk": 0.6}
    return pd.DataFrame([row | with_interval("pooled", pooled) | with_interval("within_excess", within_excess)])


def measure_reversion(stack: Stack, tokens: Tokens, folder: Path, *_: object, **__: object) -> None:
    """In the place of ``reversion.study.measure``: the file that has to be there."""
    manifest = manifests.manifest(stack, tokens, seed=0)
    tables.write(reversion(stack.n_layers), folder / files.LAYERS, manifest, kappa.COLUMNS)


def replace_measures(n_layers: int, replace: Callable[..., Any], reversion: Callable[..., Any] | None = None) -> None:
    """Measurements of a study that take no time, by ``replace(module, name, value)``; what is written is real."""
    replace(series_part, "windows", lambda *_: series(n_layers))
    replace(series_part, "calibrate", lambda *_: networks())
    replace(series_part, "compare", lambda *_: measures())
    replace(scan_part.scan_study, "measure", lambda *_, **__: None)
    replace(reversion_part.study, "measure", reversion or measure_reversion)


def networks() -> pd.DataFrame:
    """What ``calibrate`` of ``surgery.series.part`` gives for a sound measure."""
    values = {"parallel": 0.0, "mixed 0.25": 0.2, "mixed 0.5": 0.4, "mixed 0.75": 0.7, "serial": 1.0, "random 0": 0.3}
    parts = [series(4, S=value).assign(network=name) for name, value in values.items()]
    return pd.concat([*parts, series(S=0.35).assign(network="this model untrained")], ignore_index=True)


def measures() -> tuple[pd.DataFrame, pd.DataFrame]:
    """What ``compare`` there gives: readings, and what they cost."""
    about = {"S": "series", "T": "series", "rho": "series", "cosine": "not series"}
    values = {"parallel": 0.0, "serial": 1.0, "toy": 0.4}
    table = pd.DataFrame(
        [
            {"measure": name, "about": kind, "network": network, "value": float("nan") if name == "rho" else value}
            for network, value in values.items()
            for name, kind in about.items()
        ]
    )
    costs = {"function": ["series.windows"], "formula": [18.5], "counted": [18.5], "timed": [30.0]}
    return table, pd.DataFrame(costs)


def manifest(name: str = "toy") -> dict:
    """What ``records.manifest.manifest`` gives, without a model."""
    return {
        "model": {"name": name, "revision": None, "n_layers": 6, "d_model": 8, "weights_sha256": "ab" * 32},
        "tokens": {"prompts": 32, "tokens": 320, "sha256": "cd" * 32},
        "wiring": ":",
        "seed": 0,
        "settings": {},
        "versions": {"surgery": "0.1.0", "python": "3.11"},
        "command": "surgery study",
        "time": "2026-01-01T00:00:00+00:00",
    }


def graft_scores(**values: float) -> dict[str, float]:
    """What ``fidelity`` reads of one method, those of ``values`` replaced."""
    numbers = {
        "damage": 0.25,
        "unexplained": 0.5,
        "exact": 0.75,
        "exact_original": 1.0,
        "cross_entropy": 1.5,
        "cross_entropy_original": 1.25,
        "cross_entropy_answers": 0.5,
        "cross_entropy_answers_original": 0.125,
    }
    ends = [with_interval(name, number) for name, number in (numbers | values).items()]
    return {"start": 2.0, "stop": 4.0, "n_prompts": 32.0} | {k: value for one in ends for k, value in one.items()}


def write_graft(folder, seeds: int = 1, findings: list[str] | None = GRAFT_FINDINGS, answers: bool = True) -> dict:
    """Leave what ``surgery graft`` leaves, and return the manifest."""
    runs = [(name, float(seed)) for seed in range(seeds) for name in ("graft", "whole")]
    spent = {
        "parameters": 1e3,
        "steps": 6.0,
        "tokens": 2e4,
        "operations": 3.21e11,
        "operations_with_teacher": 4.32e11,
        "seconds": 16.4,
    }
    rows = [{"method": "skip", "seed": float("nan"), "parameters": 0.0} | graft_scores(damage=0.777)]
    rows += [{"method": name, "seed": seed} | graft_scores(damage=0.111 * (1 + seed)) | spent for name, seed in runs]
    curve = pd.DataFrame(
        [
            {
                "method": name,
                "seed": seed,
                "step": step,
                "tokens": 1e4 * step,
                "operations": 1e11 * step,
                "operations_with_teacher": 1e11 * (1 + step),
            }
            | graft_scores(cross_entropy=2.0 - step / 4)
            for name, seed in runs
            for step in range(3)
        ]
    )
    ledger = Ledger()
    ledger.add("harvest", 16059, 12_300_000_000, 3.0, teacher=True)
    ledger.add("training", 20510, 321_000_000_000, 16.4)
    by_file = {
        graft_study.METHODS: pd.DataFrame(rows),
        graft_study.CURVES: curve,
        graft_study.LEDGER: ledger.frame().assign(method="graft", seed=0),
    }
    about = manifest() | {"settings": {} if findings is None else {"found": findings}}
    for name, table in by_file.items():
        frame = (
            table
            if answers
            else table[[column for column in table if "exact" not in column and "answers" not in column]]
        )
        tables.write(frame, folder / name, about, graft_study.COLUMNS[name])
    return about
