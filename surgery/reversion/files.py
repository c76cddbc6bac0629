"""The tables that a study of mean reversion leaves in a folder: file names, meaning of columns, captions of figures."""

from surgery.reversion import cloud, directions, kappa, returns, trajectories

LAYERS, COORDINATES, WINDOWS = "reversion_layers.csv", "reversion_coordinates.csv", "reversion_windows.csv"
PANEL, ENDS, DIRECTIONS = "reversion_panel.csv", "reversion_ends.csv", "reversion_directions.csv"
RETURNS, NOISE, NORMS = "reversion_returns.csv", "reversion_noise.csv", "reversion_norms.csv"
_COORDINATES = {"coordinates": "in which the stream is seen, see surgery.instruments.coordinates"}
COLUMNS: dict[str, dict[str, str]] = {
    LAYERS: kappa.COLUMNS,
    COORDINATES: kappa.COLUMNS | _COORDINATES,
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
