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

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from surgery import disk
from surgery.instruments.coordinates import COORDINATES
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.memory import Memory
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.page.drawing import png
from surgery.records import manifest, tables
from surgery.reversion import cloud, directions, draw, files, kappa, returns, trajectories
from surgery.stats.bootstrap import RESAMPLES
from surgery.stats.sampling import Sampling

FOLLOWED = 8  # layers from which displacements are followed
DRAWS = 4  # random orders, walks and displaced tokens


def measure(
    stack: Stack,
    tokens: Tokens,
    folder: Path,
    untrained: Stack | None = None,
    *,
    boundaries: tuple[int, int] | None = None,
    coordinates: Sequence[str] = COORDINATES,
    followed: int = FOLLOWED,
    draws: int = DRAWS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    batch_size: int = Sampling().batch_size,
    progress: bool = False,
    settings: dict[str, Any] | None = None,
    figures: bool = True,
) -> dict[str, pd.DataFrame]:
    """Measure everything that this project can say about mean reversion in a model, written file by file to ``folder``.

    Args:
        untrained: the same architecture with fresh weights, a control; None leaves it out.
        boundaries: those of the middle (thirds, if not given).
        coordinates: in which kappa is measured, besides ``raw``.
        followed: from how many layers displacements are followed; 0 leaves them out.
        draws: random orders of the layers, random walks, and displaced tokens of a prompt (one where followed).
        resamples: bootstrap resamples over prompts.
        settings: what else goes into the manifests.
        figures: draw them; without, only tables are written, for ``surgery.report`` to draw.

    Returns the tables by file name. Raises ValueError for unknown coordinates or a negative ``followed``, and as the
    measures do. Cost: ``cost``. Memory: up to ``memory.LIMIT`` bytes of updates, so that every walk through the layers
    is made once, and as the measures.
    """
    if unknown := [name for name in coordinates if name not in COORDINATES]:
        raise ValueError(f"there are no coordinates {unknown[0]!r}; there are {', '.join(COORDINATES)}")
    if followed < 0:
        raise ValueError(f"followed is a number of layers, 0 or more, got {followed}")
    sampling = Sampling(seed=seed, batch_size=batch_size, progress=progress, resamples=resamples)
    about = manifest.manifest(stack, tokens, seed=seed, **(settings or {}))
    written: dict[str, pd.DataFrame] = {}

    def write(name: str, frame: pd.DataFrame) -> None:
        written[name] = frame
        tables.write(frame, folder / name, about, files.COLUMNS[name])

    ensemble = Ensemble.of(stack, tokens, sampling).remembering(Memory())
    layers = kappa.layers(stack, ensemble, draws=draws, untrained=untrained, sampling=sampling)
    write(files.LAYERS, layers)
    others = [name for name in COORDINATES[1:] if name in coordinates]
    write(files.COORDINATES, _in_every_coordinate(stack, ensemble, untrained, layers, others, draws, sampling))
    moments = trajectories.measure(stack, ensemble, draws=draws, untrained=untrained, sampling=sampling)
    write(files.WINDOWS, trajectories.windows(moments))
    panel = trajectories.panel(moments, boundaries)
    if len(panel):
        own = panel["series"] == "model"
        panel["cross_correlation"] = np.nan
        panel.loc[own, "cross_correlation"] = [
            trajectories.cross_correlation(stack, ensemble, start, stop, sampling=sampling)
            for start, stop in panel.loc[own, ["start", "stop"]].itertuples(index=False)
        ]
        write(files.PANEL, panel)
    write(files.ENDS, trajectories.ends(moments, boundaries))
    write(files.DIRECTIONS, directions.layers(stack, ensemble, draws=draws, sampling=sampling))
    if followed:
        moved = _spread(stack.n_layers, followed)
        write(files.RETURNS, returns.curves(stack, ensemble, moved, draws=1, sampling=sampling))
    every_token = int(tokens.ensemble().any(1).sum()) < 3 * stack.d_model
    if stack.n_layers > 2 and int(ensemble.mask.sum()) > 2:
        noise = cloud.fit(stack, ensemble, untrained=untrained, every_token=every_token, sampling=sampling)
        write(files.NOISE, noise)
    if stack.n_layers > 1:
        write(files.NORMS, cloud.growth(stack, ensemble, sampling=sampling))
    if figures:
        disk.save({folder / f"{name}.png": png(figure) for name, figure in draw.figures(written).items()})
    return written


def cost(
    n_layers: int,
    pos: int,
    *,
    untrained: bool = True,
    coordinates: Sequence[str] = COORDINATES,
    followed: int = FOLLOWED,
    draws: int = DRAWS,
    together: bool = True,
    reverting: float = 4.0,
) -> float:
    """Return what ``measure`` costs in F, for prompts of ``pos`` tokens and while updates fit into the memory.

    ``together``: the model takes many moved tokens at once (``surgery.instruments.branches``). ``reverting`` is the
    mean number of directions of a layer that revert by regression, at most 16, which only a measurement tells.

    >>> round(cost(12, 64)), round(cost(30, 64, followed=4, draws=2)), round(cost(30, 64, together=False))
    (38, 24, 63)
    """
    walks = 2 + draws + untrained + ("logits" in coordinates) * (1 + untrained)  # massive tokens, and the model's own
    moved = 1 + 2 * ((1 + 3 * draws / pos) if together else 3 * draws)
    along = min(reverting, 1 + reverting / pos) if together else reverting
    following = 1 + 6 * sum(1 - layer / n_layers for layer in _spread(n_layers, followed)) if followed else 0
    return walks + moved + along + following


def _spread(n_layers: int, count: int) -> list[int]:
    """Return ``count`` layers (fewer if there are fewer) from layer 1 to the last.

    >>> _spread(12, 4), _spread(3, 8)
    ([1, 4, 8, 11], [1, 2])
    """
    return sorted({*np.linspace(min(1, n_layers - 1), n_layers - 1, count).round().astype(int).tolist()})


def _in_every_coordinate(
    stack: Stack,
    tokens: Ensemble,
    untrained: Stack | None,
    raw: pd.DataFrame,
    others: Sequence[str],
    draws: int,
    sampling: Sampling,
) -> pd.DataFrame:
    """Measure the layers in ``others`` of the coordinates, and put ``raw`` first, without its displacements."""
    displaced = ("kappa_causal", "remaining", "restoring")
    slopes = [str(name) for name in raw if not str(name).startswith(displaced)]
    frames = [raw[slopes].assign(coordinates="raw")]
    settings: dict[str, Any] = {"draws": draws, "untrained": untrained, "causal": False, "sampling": sampling}
    for name in others if raw["kappa"].notna().any() else ():  # what does not vary has no other coordinates
        try:
            frame = kappa.layers(stack, tokens, coordinates=name, **settings)
        except ValueError:  # a head that caps its logits has no such coordinates
            if name != "logits":
                raise
            continue
        frames.append(frame.assign(coordinates=name))
    return pd.concat(frames, ignore_index=True)
