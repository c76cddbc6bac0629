"""The atlas: what every simple rewiring does to real models, measured once, so that nobody has to measure it again.

    <model>_items.parquet   a row per wiring and text: loss with the wiring and without it
    <model>_wirings.csv     a row per wiring and kind of text: mean change of the loss with interval and p
    <model>_windows.csv     a row per window of layers and kind of text: S, preference, and their nulls

Wirings are every span repeated, skipped and run in parallel, and every two layers swapped. Every CSV file has a
manifest beside it: which weights, texts and versions, and how exactly the model was opened. ``studies/atlas.py`` makes
one with ``rewired``; ``read`` reads the bundled one, or yours.

>>> wirings = read("babel")
>>> wirings[wirings["family"] == "swap"].nlargest(1, "loss")["wiring"].item()
'8 1:8 0 9:'
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from surgery import disk
from surgery.corpus.probes import Encoded
from surgery.models.stack import Stack
from surgery.records import tables
from surgery.scan import scanning
from surgery.stats import comparisons
from surgery.wiring import families

FAMILIES = ("repeat", "skip", "parallel", "swap")

ITEMS: dict[str, str] = {
    "kind": "kind of text: manual (Python's, English), sentences (parallel, 8 languages), babel (k = 0 to 4)",
    "family": "what was done: repeat, skip, parallel, swap",
    "start": "first layer of the span, or the first of the two swapped",
    "stop": "layer behind the span, or behind the second of the two swapped",
    "wiring": "order in which the layers run",
    "item": "number of the text, from 0",
    "loss": "mean loss of the text with the wiring (nats per token); of the answer, where kind is babel",
    "baseline": "the same of the model as it is",
}
_OF_WIRING = ["kind", "family", "start", "stop", "wiring"]
WIRINGS: dict[str, str] = {name: ITEMS[name] for name in _OF_WIRING} | {
    "loss": "loss added by the wiring, a mean over texts (nats per token)",
    "loss_low": "lower end of its 95 % interval over texts",
    "loss_high": "upper end of its 95 % interval",
    "p": "of a loss that differs from 0",
    "p_max": "the same family-wise: over all wirings run in parallel, or all others, on this kind of text",
    "n_prompts": "texts",
}
FOLDER, TEXT = "atlas", "text"


def models(folder: "str | Path | None" = None) -> list[str]:
    """The models that an atlas has; by default the bundled atlas."""
    return sorted(path.name.removesuffix("_wirings.csv") for path in _folder(folder).glob("*_wirings.csv"))


def read(
    model: "str | None" = None,
    rows: str = "wirings",
    folder: "str | Path | None" = None,
) -> pd.DataFrame:
    """Read the atlas: of one model, or of all with a column ``model``.

    Args:
        model: one of ``models()``; None for all.
        rows: ``wirings``, ``items`` (per text) or ``windows``.
        folder: of another atlas, that ``studies/atlas.py`` made.

    Raises:
        ValueError: there is no such model or table, or a file was changed since it was written.
    """
    place = _folder(folder)
    if rows not in ("wirings", "items", "windows"):
        raise ValueError(f"an atlas has wirings, items and windows, no {rows!r}")
    names = models(folder) if model is None else [model]
    if model is not None and model not in models(folder):
        raise ValueError(f"{place} has no {model!r}; it has {', '.join(models(folder)) or 'nothing'}")
    frames = []
    for name in names:
        if rows == "items":
            frame = pd.read_parquet(place / f"{name}_items.parquet").astype({"kind": str, "family": str})
        else:
            frame = tables.read(place / f"{name}_{rows}.csv")
        frames.append(frame if model else frame.assign(model=name))
    return pd.concat(frames, ignore_index=True)


def manifest(model: str, folder: "str | Path | None" = None) -> dict[str, Any]:
    """Where the numbers of a model come from: weights, texts, versions, exactness, time and memory."""
    return tables.read_manifest(_folder(folder) / f"{model}_wirings.csv")


def rewired(
    stack: Stack, asked: Encoded, out: "str | Path | None" = None, chosen: Sequence[str] = FAMILIES, **options: Any
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run every wiring of the ``chosen`` families on every text: rows of ``ITEMS`` and ``WIRINGS``, less the kind.

    A wiring of several families is in each. ``out`` and ``options`` are those of ``scan.run``; with ``out`` it goes on
    after a kill. The loss is that of all tokens of running text, or of the answers of questions. Cost: ``scan.plan``.

    >>> import surgery
    >>> stack = surgery.Stack(surgery.load("babel"))
    >>> items, _ = rewired(stack, surgery.corpus.probes.named("babel", 4).encode(stack), chosen=["swap"])
    >>> len(items)
    264
    """
    listed = pd.DataFrame(
        [
            {"family": family, "start": start, "stop": stop, "wiring": str(wiring)}
            for family in chosen
            for (start, stop), wiring in families.spans(family, stack.n_layers)
        ]
    )
    metric, sign = ("loss", 1) if asked.name == TEXT else ("loglik", -1)
    rows = scanning.run(stack, listed["wiring"].unique(), asked, out, metrics=(metric,), **options)
    table = comparisons.table(rows, metric)
    changed = pd.DataFrame(
        {
            "wiring": table["wiring"],
            "loss": -table["gain"],
            "loss_low": -table["gain_high"],
            "loss_high": -table["gain_low"],
            **{column: table[column] for column in ("p", "p_max", "n_prompts")},
        }
    )
    values = pd.DataFrame({"wiring": rows["wiring"], "item": rows["prompt"]})
    values = values.assign(loss=sign * rows["value"], baseline=sign * rows["baseline"])
    return listed.merge(values, on="wiring"), listed.merge(changed, on="wiring")


def damages(items: pd.DataFrame, family: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """What a family of wirings adds to the loss of each text [item, span], and the spans (of swaps the two layers).

    >>> by_span, spans = damages(read("babel", "items"), "swap")
    >>> by_span.shape[1], spans[0]
    (66, (0, 1))
    """
    rows = items[items["family"] == family]
    rows = rows.assign(added=rows["loss"].astype(float) - rows["baseline"].astype(float))
    wide = rows.pivot(index="item", columns=["start", "stop"], values="added").sort_index(axis=1)
    starts, stops = (wide.columns.get_level_values(name).astype(int).tolist() for name in ("start", "stop"))
    return wide.to_numpy(), [(start, stop - (family == "swap")) for start, stop in zip(starts, stops)]


def write(
    folder: "str | Path",
    model: str,
    items: pd.DataFrame,
    wirings: pd.DataFrame,
    windows: pd.DataFrame,
    source: Mapping[str, Any],
    windows_columns: Mapping[str, str],
) -> None:
    """Write the three files of a model. Raises ValueError for a column without a meaning, OSError for a full disk."""
    place = disk.folder(folder)
    whole = items[list(ITEMS)].astype({"loss": "float32", "baseline": "float32", "item": "int16"})
    whole = whole.astype({"start": "int16", "stop": "int16", "kind": "category", "family": "category"})
    disk.save({place / f"{model}_items.parquet": whole.to_parquet(index=False, compression="zstd")})
    tables.write(wirings[list(WIRINGS)], place / f"{model}_wirings.csv", source, WIRINGS)
    tables.write(windows, place / f"{model}_windows.csv", source, windows_columns)


def _folder(folder: "str | Path | None") -> Path:
    if folder is not None:
        return Path(folder)
    from surgery.models.loading import bundled_file

    return bundled_file(f"{FOLDER}/README.md").parent
