"""A folder with a table of every chapter, made up, so that a whole page can be built in seconds."""

from pathlib import Path
from typing import Any

import pandas as pd

from support import made_up, made_up_anatomy
from support.made_up import with_interval
from support.made_up_walks import on_and_off, planted
from surgery.anatomy import files as anatomy_files
from surgery.compiler import files as compiler_files
from surgery.compiler import frontier
from surgery.graft import walk_study
from surgery.records import tables
from surgery.scan import study as scan_study
from surgery.scan.worth import CONTROLS_COLUMNS
from surgery.series import side_by_side
from surgery.stats import comparisons

BASELINE: dict[str, Any] = {
    "measure": "exact",
    "value": 0.8,
    "chance": 0.1,
    "above": 0.7,
    "low": 0.6,
    "high": 0.8,
    "prompts": 256,
    "units": 128,
    "metric": "loglik",
    "scored": -1.2,
    "not_finite": 0,
}
SETTINGS: dict[str, Any] = {
    "metric": "loglik",
    "luck": {"wirings": 15, "prompts": 128, "worse": 0, "mean": 0.1, "high": 0.2},
    "baseline": BASELINE,
    "effort": None,
}
COMPILE_SETTINGS = {"allow": 0.05, "metric": "loss", "refused": ""}


def compared(wiring: str, gain: float) -> dict[str, Any]:
    """A row of ``comparisons.COLUMNS``."""
    numbers = {"p": 0.2, "p_max": 0.3, "q": 0.3, "n_prompts": 128, "n_not_finite": 0, "n_units": 128}
    return {"wiring": wiring} | with_interval("gain", gain, 0.05) | numbers


def winners(*verdicts: str) -> pd.DataFrame:
    """The largest gains of a scan, the first the largest, with what became of them."""
    rows = []
    for place, verdict in enumerate(verdicts):
        gain = 0.4 - 0.05 * place
        row: dict[str, Any] = {"wiring": f":{place + 2} {place}:", "survived": 0.5, "verdict": verdict}
        for half, share in (("search", 1.0), ("validation", 0.5)):
            numbers = compared("", gain * share)
            row |= {f"{name}_{half}": numbers[name] for name in numbers if name != "wiring"}
        row |= {"survived_low": 0.3, "survived_high": 0.7, "temperature": 0.01, "by_temperature": 0.05, "p_beyond": 0.2}
        rows.append(row | with_interval("answers", 0.02) | with_interval("beyond", gain / 3))
    return pd.DataFrame(rows, columns=[*rows[0]] if rows else [*scan_study.WINNERS_COLUMNS])


def scan(*verdicts: str) -> dict[str, pd.DataFrame]:
    """The tables of a scan of repeats on 6 layers."""
    spans = [(start, stop) for start in range(6) for stop in range(start + 1, 7)]
    table = pd.DataFrame([compared(f":{stop} {start}:", 0.3 - 0.1 * (stop - start)) for start, stop in spans])
    best = winners(*verdicts)
    groups = [compared(name, 0.1 * place) | {"group": f"k={place}"} for name in best["wiring"] for place in range(3)]
    return {
        scan_study.TABLE: table,
        scan_study.WINNERS: best,
        scan_study.GROUPS: pd.DataFrame(groups),
        scan_study.CONTROLS: pd.DataFrame(columns=list(CONTROLS_COLUMNS)),
    }


def compiled(cost: float = 0.01) -> pd.DataFrame:
    """A frontier of 6 layers: ``cost`` a layer side by side, twice that left out, and one rival that is far worse."""
    rows = [("side by side", saved, cost * saved) for saved in range(4)]
    rows += [("left out", saved, 2 * cost * saved) for saved in range(4)]
    rows += [("random pairs", saved, 3 * cost * saved) for saved in range(1, 4)]
    rows += [(frontier.LINEAR, saved, 60 * cost * saved) for saved in range(1, 4)]
    return pd.DataFrame(
        [
            {
                "family": family,
                "depth": 6 - saved,
                "wiring": ":"
                if not saved
                else " ".join(f"{{*{2 * i}:{2 * i + 2}}}" for i in range(saved)) + f" {2 * saved}:",
                "cost_search": lost,
                "sublayers": 2 * (6 - saved),
                "saved": saved,
                "n_prompts": 64,
            }
            | with_interval("cost", lost, 0.002 if saved else 0.0)
            for family, saved, lost in rows
        ]
    )


def anatomy() -> dict[str, pd.DataFrame]:
    """The tables of three parts that are there."""
    named = made_up_anatomy.tables()
    return {file: named[name] for file, name in anatomy_files.NAMES.items() if file != anatomy_files.CONVERGENCE}


def series_of_depth() -> pd.DataFrame:
    """Windows that are the more serial, the later they begin."""
    frame = made_up.series()
    return frame.assign(**{f"S{end}": frame[f"S{end}"] + frame["start"] / 15 for end in ("", "_low", "_high")})


def write_every_chapter(folder: Path) -> Path:
    """Leave the files of every chapter of a made-up model in a folder."""
    series, about = made_up.COLUMNS[made_up.SERIES], made_up.manifest()
    readings, costs = made_up.measures()
    reversion = made_up.reversion()
    for end in ("", "_low", "_high"):  # the last layer is far from the others
        reversion.loc[5, f"kappa{end}"] *= 100
    files = [
        (made_up.SERIES, series_of_depth(), about, series),
        (made_up.CALIBRATION, made_up.networks(), about, series),
        (made_up.REVERSION, reversion, about, made_up.COLUMNS[made_up.REVERSION]),
        (made_up.MEASURES, readings, about, side_by_side.COLUMNS),
        (made_up.COSTS, costs, about, side_by_side.COST_COLUMNS),
        (compiler_files.FRONTIER, compiled(), about | {"settings": COMPILE_SETTINGS}, frontier.COLUMNS),
    ]
    files += [(name, frame, about, anatomy_files.COLUMNS[name]) for name, frame in anatomy().items()]
    of_scan = about | {"settings": SETTINGS}
    columns = {name: comparisons.COLUMNS for name in (scan_study.TABLE, scan_study.GROUPS)}
    columns |= {scan_study.WINNERS: scan_study.WINNERS_COLUMNS, scan_study.CONTROLS: CONTROLS_COLUMNS}
    verdicts = ("undecided", "vanished", "as a temperature", "undecided")
    files += [(name, frame, of_scan, columns[name]) for name, frame in scan(*verdicts).items()]
    walks = {walk_study.METHODS: planted(relabelled=0.1, more_real=0.05), walk_study.MANIFOLD: on_and_off()}
    files += [(name, frame, about, walk_study.COLUMNS[name]) for name, frame in walks.items()]
    for name, frame, manifest, meanings in files:
        tables.write(frame, folder / name, manifest, meanings)
    made_up.write_graft(folder)
    return folder
