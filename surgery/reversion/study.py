"""Whether one model's stream reverts to a mean, as files: ``reversion_*.csv`` and figures. ``surgery study reversion``.

reversion_layers.csv        kappa of every layer, its nulls, and the stream displaced      (surgery.reversion.layers)
reversion_coordinates.csv   the same without displacements, in every coordinate            (surgery.instruments.coordinates)
reversion_windows.csv       several layers at once: kappa, variance ratio                  (surgery.reversion.trajectories)
reversion_panel.csv         all layers as one autoregression over depth, and its nulls
reversion_ends.csv          the ends against the middle
reversion_directions.csv    which directions revert, persist or grow                       (surgery.reversion.directions)
reversion_returns.csv       displacements followed through the later layers                (surgery.reversion.returns)
reversion_noise.csv         rotation, stretch and noise that grows with depth              (surgery.reversion.cloud)
reversion_norms.csv         how much longer each layer makes the stream
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from surgery.instruments import coordinates
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page import drawing
from surgery.page.chapters import Sentence, headlines
from surgery.records import manifest as provenance
from surgery.records import tables as frames
from surgery.reversion import cloud, directions, returns, say, trajectories
from surgery.reversion import draw as reversion_figures
from surgery.reversion import kappa as reversion
from surgery.stats.sampling import Sampling

LAYERS, COORDINATES, WINDOWS = "reversion_layers.csv", "reversion_coordinates.csv", "reversion_windows.csv"
PANEL, ENDS, DIRECTIONS = "reversion_panel.csv", "reversion_ends.csv", "reversion_directions.csv"
RETURNS, NOISE, NORMS = "reversion_returns.csv", "reversion_noise.csv", "reversion_norms.csv"
SEEN = {"coordinates": "in which the stream is seen, see surgery.instruments.coordinates"}
COLUMNS: dict[str, dict[str, str]] = {
    LAYERS: reversion.COLUMNS,
    COORDINATES: reversion.COLUMNS | SEEN,
    WINDOWS: trajectories.WINDOWS_COLUMNS,
    PANEL: trajectories.PANEL_COLUMNS,
    ENDS: trajectories.ENDS_COLUMNS,
    DIRECTIONS: directions.COLUMNS,
    RETURNS: returns.COLUMNS,
    NOISE: cloud.COLUMNS,
    NORMS: cloud.COLUMNS,
}
CAPTIONS = {
    "reversion": "kappa with its nulls and interventions, and psi, by layer; the numbers are in " + LAYERS + ".",
    "reversion_coordinates": "kappa by layer in four coordinates, its nulls shaded. Normalised, updates in random "
    "directions revert by arithmetic alone (dashed).",
    "reversion_windows": "Several layers at once: do later layers undo or continue what earlier ones wrote, and how "
    "much of a deviation does the window take back beyond a random walk?",
    "reversion_directions": "Which directions a layer takes back (above the shaded null) and which it carries further "
    "out; below, the eigenvalues of what one layer leaves of a deviation.",
    "reversion_returns": "Displacements of the stream at one token, followed through the later layers.",
}
FOLLOWED = 8  # layers from which displacements are followed


def measure(
    stack: Stack,
    tokens: Tokens,
    folder: Path,
    untrained: Stack | None = None,
    *,
    boundaries: tuple[int, int] | None = None,
    seed: int = 0,
    progress: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, pd.DataFrame]:
    """Everything that this project can say about mean reversion in one model, written file by file to ``folder``.

    ``boundaries`` are those of the middle (thirds, if not given); ``settings`` go into the manifests. Cost: about 115 F
    and, untrained, 12 F more, in 12 layers. Raises as the measures do.
    """
    sampling = Sampling(seed=seed, progress=progress)
    manifest = provenance.manifest(stack, tokens, seed=seed, **(settings or {}))
    tables: dict[str, pd.DataFrame] = {}

    def keep(name: str, frame: pd.DataFrame) -> None:
        tables[name] = frame
        frames.write(frame, folder / name, manifest, COLUMNS[name])

    keep(LAYERS, reversion.layers(stack, tokens, untrained=untrained, sampling=sampling))
    raw = tables[LAYERS]
    seen = [
        raw[[str(name) for name in raw if "causal" not in str(name) and name != "restoring"]].assign(coordinates="raw")
    ]
    for name in coordinates.COORDINATES[1:]:
        try:
            frame = reversion.layers(
                stack, tokens, untrained=untrained, coordinates=name, causal=False, sampling=sampling
            )
        except ValueError:  # a head that caps its logits has no such coordinates
            if name != "logits":
                raise
            continue
        seen.append(frame.assign(coordinates=name))
    keep(COORDINATES, pd.concat(seen, ignore_index=True))
    ways = trajectories.measure(stack, tokens, untrained=untrained, sampling=sampling)
    keep(WINDOWS, trajectories.windows(ways))
    panel = trajectories.panel(ways, boundaries)
    if len(panel):
        own = panel["series"] == "model"
        panel["cross_correlation"] = np.nan
        panel.loc[own, "cross_correlation"] = [
            trajectories.cross_correlation(stack, tokens, start, stop, sampling=Sampling(seed=seed))
            for start, stop in panel.loc[own, ["start", "stop"]].itertuples(index=False)
        ]
        keep(PANEL, panel)
    keep(ENDS, trajectories.ends(ways, boundaries))
    keep(DIRECTIONS, directions.layers(stack, tokens, sampling=sampling))
    moved = np.linspace(min(1, stack.n_layers - 1), stack.n_layers - 1, FOLLOWED).round().astype(int)
    keep(RETURNS, returns.curves(stack, tokens, sorted({*moved.tolist()}), draws=1, sampling=sampling))
    every_token = int(tokens.ensemble().any(1).sum()) < 3 * stack.d_model
    if stack.n_layers > 2 and int(tokens.ensemble().sum() - raw["n_massive"].max()) > 2:
        keep(NOISE, cloud.fit(stack, tokens, untrained=untrained, every_token=every_token, sampling=sampling))
    if stack.n_layers > 1:
        keep(NORMS, cloud.growth(stack, tokens, sampling=sampling))
    frames.save({folder / f"{name}.png": drawing.png(figure) for name, figure in draw(tables).items()})
    return tables


def sentences(tables: Mapping[str, pd.DataFrame]) -> list[Sentence]:
    """What the tables say beyond ``say.by_layer``, the answer last; headlines are the ends and the answer."""
    said: list[Sentence] = []
    for name, tell in (
        (COORDINATES, say.coordinates),
        (WINDOWS, say.windows),
        (PANEL, say.panel),
        (DIRECTIONS, say.directions),
        (RETURNS, say.returns),
        (NOISE, say.noise),
    ):
        if name in tables:
            said += map(Sentence, tell(tables[name]))
    if ENDS in tables:
        said += headlines([say.ends(tables[ENDS].iloc[0])])
    if DIRECTIONS in tables:
        said += headlines([say.answer(tables[LAYERS], tables.get(PANEL), tables[DIRECTIONS])])
    return said


def draw(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """The figures of what ``measure`` wrote, by the name of their file."""
    drawn = {"reversion": reversion_figures.by_layer(tables[LAYERS])}
    for name, picture in (
        (COORDINATES, reversion_figures.coordinates),
        (WINDOWS, reversion_figures.windows),
        (DIRECTIONS, reversion_figures.directions),
        (RETURNS, reversion_figures.returns),
    ):
        if name in tables:
            drawn[name.removesuffix(".csv")] = picture(tables[name])
    return drawn
