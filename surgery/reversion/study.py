"""Whether one model's stream reverts to a mean, as files: ``reversion_*.csv`` and figures. ``surgery study reversion``.

reversion_layers.csv        kappa of every layer, its nulls, and the stream displaced  (surgery.reversion.layers)
reversion_coordinates.csv   the same without displacements, in every coordinate        (surgery.instruments.coordinates)
reversion_windows.csv       several layers at once: kappa, variance ratio              (surgery.reversion.trajectories)
reversion_panel.csv         all layers as one autoregression over depth, and its nulls
reversion_ends.csv          the ends against the middle
reversion_directions.csv    which directions revert, persist or grow                   (surgery.reversion.directions)
reversion_returns.csv       displacements followed through the later layers            (surgery.reversion.returns)
reversion_noise.csv         rotation, stretch and noise that grows with depth          (surgery.reversion.cloud)
reversion_norms.csv         how much longer each layer makes the stream
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from surgery import disk
from surgery.instruments.coordinates import COORDINATES
from surgery.instruments.ensemble import Ensemble
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page.drawing import png
from surgery.records import manifest, tables
from surgery.reversion import cloud, directions, draw, files, kappa, returns, trajectories
from surgery.stats.sampling import Sampling

FOLLOWED = 8  # layers from which displacements are followed


def measure(
    stack: Stack,
    tokens: Tokens,
    folder: Path,
    untrained: Stack | None = None,
    *,
    boundaries: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = Sampling().batch_size,
    progress: bool = False,
    settings: dict[str, Any] | None = None,
    figures: bool = True,
) -> dict[str, pd.DataFrame]:
    """Measure everything that this project can say about mean reversion in a model, written file by file to ``folder``.

    Returns the tables by file name. ``boundaries`` are those of the middle (thirds, if not given); ``settings`` go into
    the manifests; without ``figures`` only tables are written, for ``surgery.report`` to draw. Raises as the measures
    do. Cost: about 115 F and, untrained, 12 F more, in 12 layers.
    """
    sampling = Sampling(seed=seed, batch_size=batch_size, progress=progress)
    about = manifest.manifest(stack, tokens, seed=seed, **(settings or {}))
    written: dict[str, pd.DataFrame] = {}

    def write(name: str, frame: pd.DataFrame) -> None:
        written[name] = frame
        tables.write(frame, folder / name, about, files.COLUMNS[name])

    ensemble = Ensemble.of(stack, tokens, sampling)
    layers = kappa.layers(stack, ensemble, untrained=untrained, sampling=sampling)
    write(files.LAYERS, layers)
    write(files.COORDINATES, _in_every_coordinate(stack, ensemble, untrained, layers, sampling))
    moments = trajectories.measure(stack, ensemble, untrained=untrained, sampling=sampling)
    write(files.WINDOWS, trajectories.windows(moments))
    panel = trajectories.panel(moments, boundaries)
    if len(panel):
        own = panel["series"] == "model"
        panel["cross_correlation"] = np.nan
        panel.loc[own, "cross_correlation"] = [
            trajectories.cross_correlation(stack, ensemble, start, stop, sampling=Sampling(seed=seed))
            for start, stop in panel.loc[own, ["start", "stop"]].itertuples(index=False)
        ]
        write(files.PANEL, panel)
    write(files.ENDS, trajectories.ends(moments, boundaries))
    write(files.DIRECTIONS, directions.layers(stack, ensemble, sampling=sampling))
    followed = np.linspace(min(1, stack.n_layers - 1), stack.n_layers - 1, FOLLOWED).round().astype(int)
    write(files.RETURNS, returns.curves(stack, ensemble, sorted({*followed.tolist()}), draws=1, sampling=sampling))
    every_token = int(tokens.ensemble().any(1).sum()) < 3 * stack.d_model
    if stack.n_layers > 2 and int(ensemble.mask.sum()) > 2:
        noise = cloud.fit(stack, ensemble, untrained=untrained, every_token=every_token, sampling=sampling)
        write(files.NOISE, noise)
    if stack.n_layers > 1:
        write(files.NORMS, cloud.growth(stack, ensemble, sampling=sampling))
    if figures:
        disk.save({folder / f"{name}.png": png(figure) for name, figure in draw.figures(written).items()})
    return written


def _in_every_coordinate(
    stack: Stack, tokens: Ensemble, untrained: Stack | None, raw: pd.DataFrame, sampling: Sampling
) -> pd.DataFrame:
    """Measure the layers in every coordinate but the raw one, and put ``raw`` first, without its displacements."""
    displaced = ("kappa_causal", "remaining", "restoring")
    slopes = [str(name) for name in raw if not str(name).startswith(displaced)]
    frames = [raw[slopes].assign(coordinates="raw")]
    for name in COORDINATES[1:] if raw["kappa"].notna().any() else ():  # what does not vary has no other coordinates
        try:
            frame = kappa.layers(stack, tokens, untrained=untrained, coordinates=name, causal=False, sampling=sampling)
        except ValueError:  # a head that caps its logits has no such coordinates
            if name != "logits":
                raise
            continue
        frames.append(frame.assign(coordinates=name))
    return pd.concat(frames, ignore_index=True)
