"""Charts that can be touched: hover shows the whole row, a click copies a wiring's notation. ``surgery.plot(frame)``.

One way to draw for each kind of table, told by its columns:

=====================  =============================================================================================
``start``, ``stop``    windows or spans of layers as cells, first layer across, last layer up
``layer``              by layer, with the interval shaded, and the interval of a null where there is one
``saved``              cost over layers saved, a line for each family
``wiring``             wirings from the largest to the smallest, with their intervals
any other              the first column of words down, the first measure with an interval across
=====================  =============================================================================================

The charts are Altair's (Vega-Lite, Satyanarayan et al. 2017), so they can be changed further, shown in a notebook, or
saved: ``chart.save("figure.svg")``. They set no colour of text or paper: light and dark are the page's business.

>>> import pandas as pd
>>> plot(pd.DataFrame({"layer": [0, 1], "kappa": [0.1, 0.2], "kappa_low": [0.0, 0.1], "kappa_high": [0.2, 0.3]}))
alt.LayerChart(...)
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from surgery.outside import shown
from surgery.page.drawing import ACCENT, BLUE, COLOURS, GREY, linear_up_to

MOST = 30  # wirings in one chart
NULLS = ("rotated", "matched", "untrained")  # beside a measure: the column ``<measure>_<null>``
BETWEEN_0_AND_1 = {"S", "R", "O", "S_matched", "S_live"}
WORDS = "\u00a0"


def plot(frame: pd.DataFrame, measure: str | None = None, *, title: str = "", told: str = "") -> Any:
    """Draw a table of ours: an Altair chart.

    Args:
        frame: what a measure of ``surgery`` returns, or ``surgery.records.tables.read``.
        measure: the column to draw; by default the first that has an interval.
        title: above the chart.
        told: what it shows, for readers who cannot see it; by default the measure's meaning, where the frame has it.

    Raises ValueError, naming what there is, for a table without a number or without that column.

    >>> import surgery
    >>> frame = pd.DataFrame({"wiring": [":", ":3 2:"], "gain": [0.0, 0.1]})
    >>> surgery.plot(frame, "gain").to_dict()["layer"][0]["encoding"]["x"]["field"]
    'gain'
    """
    frame = frame.rename(columns=_field)
    numbers = [str(name) for name in frame.select_dtypes("number")]
    measure = _field(measure) if measure else default(frame)
    if measure is None or measure not in numbers or frame.empty:
        asked = f"no numbers in {measure!r}" if measure else "no numbers"
        raise ValueError(f"there are {asked} to draw; this table has {len(frame)} rows and {', '.join(numbers) or '-'}")
    columns = set(frame)
    if {"start", "stop"} <= columns and not frame.duplicated(["start", "stop"]).any():
        chart, by = _windows(frame, measure), "window of layers"
    elif "layer" in columns and frame["layer"].is_unique:
        chart, by = _by_layer(frame, measure), "layer"
    elif {"saved", "family"} <= columns:
        chart, by = _frontier(frame, measure), "number of layers saved"
    else:
        chart, by = _list(frame, measure), "row"
    meaning = frame.attrs.get("columns", {}).get(measure, measure)
    named = {"title": title} if title else {}
    return chart.properties(description=f"{told or f'{meaning}, by {by}'}. {_range(frame, measure)}", **named)


def default(frame: pd.DataFrame) -> str | None:
    """The measure to draw where none is named: the first with an interval, else the first number that is no index."""
    numbers = [str(name) for name in frame.select_dtypes("number")]
    preferred = [name for name in ("S", "kappa_excess", "gain_validation", "cost", "gain") if name in numbers]
    interval = [name for name in numbers if f"{name}_low" in numbers]
    indices = ("start", "stop", "layer", "depth", "saved", "seed", "prompt", "n_prompts")
    others = [name for name in numbers if name not in indices and not name.endswith(("_low", "_high"))]
    return next(iter([*preferred, *interval, *others]), None)


def embedded(chart: Any, width: "int | str" = "container") -> dict[str, Any]:
    """The chart as a page embeds it: as wide as there is room, without the data that no mark or tooltip needs."""
    sized = chart.properties(
        width=width, background="transparent", autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
    )
    return {name: part for name, part in sized.to_dict().items() if name != "$schema"}  # an address, for editors


def _windows(frame: pd.DataFrame, measure: str) -> Any:
    rows = _rows(frame, measure, ["start", "stop"]).assign(
        window=[f"{start}:{stop}" for start, stop in zip(frame["start"], frame["stop"])],
        last=frame["stop"] - 1,
    )
    if measure in BETWEEN_0_AND_1:
        scale = alt.Scale(scheme="viridis", domain=[0, 1], clamp=True)
    elif (frame[measure].dropna() < 0).any():
        reach = _reach(frame[measure])
        scale = alt.Scale(scheme="purpleorange", domain=[-reach, reach], domainMid=0, clamp=True)
    else:
        scale = alt.Scale(scheme="viridis", domain=[0, _reach(frame[measure])], clamp=True)
    layers = int(frame["stop"].max())
    axis = alt.Axis(values=list(range(0, layers, max(1, layers // 12))), labelAngle=0)
    return (
        _chart(rows)
        .mark_rect()
        .encode(
            x=alt.X("start:O", title="first layer", axis=axis),
            y=alt.Y("last:O", title="last layer", sort="descending", axis=axis),
            color=alt.Color(f"{measure}:Q", scale=scale, title=measure),
            tooltip=_tooltips(rows, ["window"], measure),
        )
        .properties(height=min(420, max(180, 18 * layers)))
    )


def _by_layer(frame: pd.DataFrame, measure: str) -> Any:
    rows = _rows(frame, measure, ["layer"])
    scale = _scale(frame, measure)
    base = _chart(rows).encode(x=alt.X("layer:Q", axis=_whole(frame["layer"]), title="layer"))
    parts = []
    for null in (f"{measure}_{name}" for name in NULLS):
        if f"{null}_low" in rows:
            parts.append(
                base.mark_area(opacity=0.3, color=GREY).encode(y=alt.Y(f"{null}_low:Q", scale=scale), y2=f"{null}_high")
            )
    if f"{measure}_low" in rows:
        parts.append(
            base.mark_area(opacity=0.25, color=ACCENT).encode(
                y=alt.Y(f"{measure}_low:Q", scale=scale), y2=f"{measure}_high"
            )
        )
    across = base.encode(
        y=alt.Y(f"{measure}:Q", scale=scale, title=measure), tooltip=_tooltips(rows, ["layer"], measure)
    )
    parts += [across.mark_line(color=ACCENT), across.mark_point(color=ACCENT, filled=True, size=50, opacity=1)]
    return alt.layer(_zero("y"), *parts).properties(height=260)


def _frontier(frame: pd.DataFrame, measure: str) -> Any:
    rows = _rows(frame[frame["saved"] > 0], measure, ["saved", "family", "wiring"])
    colour = alt.Color(
        "family:N",
        scale=alt.Scale(range=list(COLOURS)),
        legend=alt.Legend(orient="bottom", columns=3, title=None),
    )
    base = _chart(rows).encode(
        x=alt.X("saved:Q", axis=_whole(rows["saved"]), title="layers in a row saved"),
        y=alt.Y(f"{measure}:Q", scale=alt.Scale(type="symlog", constant=0.05), title=f"{measure}"),
        color=colour,
        tooltip=_tooltips(rows, ["family", "saved", "wiring"], measure),
    )
    lines = base.mark_line(opacity=0.6).encode(y=alt.Y(f"mean({measure}):Q"), tooltip=alt.value(None))
    parts = [lines]
    if f"{measure}_low" in rows:
        parts.append(base.mark_rule().encode(y=alt.Y(f"{measure}_low:Q", title=measure), y2=f"{measure}_high"))
    return alt.layer(_zero("y"), *parts, base.mark_point(filled=True, size=60, opacity=1)).properties(height=300)


def _list(frame: pd.DataFrame, measure: str) -> Any:
    words = [str(name) for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    name = "wiring" if "wiring" in words else words[0] if words else "row"
    rows = _rows(frame, measure, words)
    if not words:
        rows["row"] = [str(index) for index in frame.index]
    rows = rows.dropna(subset=[measure])
    if name == "wiring":
        rows = rows.sort_values(measure, ascending=False)
    elif words:
        rows[name] = [f"{row}{WORDS * count}" for row, count in zip(rows[name], rows.groupby(name).cumcount())]
    rows = rows.head(MOST)
    label = alt.Y(f"{name}:N", sort=None, title=None, axis=alt.Axis(labelLimit=190))
    told = [word for word in words if word != name][:3]
    colour: Any = alt.value(BLUE)
    if "verdict" in rows:
        colour = alt.Color(
            "verdict:N", scale=alt.Scale(range=list(COLOURS)), legend=alt.Legend(orient="bottom", columns=3, title=None)
        )
    base = _chart(rows).encode(y=label, color=colour, tooltip=_tooltips(rows, [name, *told], measure))
    scale = _scale(frame, measure)
    parts = []
    if f"{measure}_low" in rows:
        parts.append(
            base.mark_rule().encode(x=alt.X(f"{measure}_low:Q", scale=scale, title=measure), x2=f"{measure}_high")
        )
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X(f"{measure}:Q", scale=scale, title=measure, axis=alt.Axis(tickCount=6))
    )
    return alt.layer(*parts, dots, _zero("x")).properties(height=18 * max(1, rows[name].nunique()))


def _whole(column: pd.Series) -> Any:
    """An axis of at most a dozen whole numbers: half layers are not marked."""
    low, high = int(column.min()), int(column.max())
    return alt.Axis(values=list(range(low, high + 1, max(1, -(-(high - low) // 12)))), format="d")


def _zero(axis: str) -> Any:
    """A thin line at 0."""
    return alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(color=GREY, strokeWidth=1).encode(**{axis: "zero:Q"})


def _chart(rows: pd.DataFrame) -> Any:
    cells = [{str(key): _value(cell) for key, cell in row.items()} for row in rows.to_dict("records")]
    return alt.Chart(alt.InlineData(cells))


def _value(cell: Any) -> Any:
    """A cell as JSON has it, and text from outside as it can be shown."""
    if isinstance(cell, str):
        return shown(cell, 60)
    if pd.isna(cell) or math.isinf(cell):
        return None
    return bool(cell) if isinstance(cell, (bool, np.bool_)) else int(cell) if float(cell).is_integer() else float(cell)


def _rows(frame: pd.DataFrame, measure: str, keys: Sequence[str]) -> pd.DataFrame:
    """The columns that are drawn or told: the keys, the measure with its nulls, and every other measure's own value."""
    nulls = [f"{measure}_{null}" for null in NULLS]
    ends = [f"{name}_{end}" for name in (measure, *nulls) for end in ("low", "high")]
    others = [str(name) for name in frame if not str(name).endswith(("_low", "_high"))][:14]
    wanted = dict.fromkeys([*keys, measure, *nulls, *ends, *others])
    return frame[[name for name in wanted if name in frame]].copy()


def _tooltips(rows: pd.DataFrame, first: Sequence[str], measure: str) -> list[Any]:
    names = dict.fromkeys([*first, measure, f"{measure}_low", f"{measure}_high", *map(str, rows)])
    hidden = {"start", "stop", "last"} if "window" in first else set[str]()
    return [_tooltip(name, rows[name]) for name in names if name in rows and name not in hidden]


def _tooltip(name: str, column: pd.Series) -> Any:
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return alt.Tooltip(f"{name}:N")
    whole = pd.api.types.is_integer_dtype(column)
    return alt.Tooltip(f"{name}:Q", format="d" if whole else ".3~g")


def _scale(frame: pd.DataFrame, measure: str) -> Any:
    """Linear; where a few values are far beyond the others, linear near 0 and logarithmic beyond: none squashes all."""
    if linear := linear_up_to(frame[measure]):
        return alt.Scale(type="symlog", constant=linear)
    return alt.Scale(zero=False)


def _reach(column: pd.Series) -> float:
    """Where the colours end: the largest of all but the most extreme twentieth."""
    sizes = _finite(column).abs()
    return float(sizes.quantile(0.95)) or 1.0 if len(sizes) else 1.0


def _finite(column: pd.Series) -> pd.Series:
    return column[np.isfinite(column.astype(float))]


def _range(frame: pd.DataFrame, measure: str) -> str:
    """The smallest and largest value, for readers who cannot see a chart."""
    frame = frame.reset_index(drop=True)
    values = _finite(frame[measure])
    if values.empty:
        return "Undefined everywhere"
    places = (int(values.argmin()), int(values.argmax()))
    ends = [f"{values.iloc[at]:.3g}{_place(frame.loc[values.index[at]])}" for at in places]
    return f"From {ends[0]} to {ends[1]}"


def _place(row: pd.Series) -> str:
    if {"start", "stop"} <= set(row.index):
        return f" (layers {row['start']:g} to {row['stop'] - 1:g})"
    return f" (layer {row['layer']:g})" if "layer" in row.index else ""


def _field(name: object) -> str:
    """The name of a column as Vega reads it: a point or bracket would lead into an object."""
    return re.sub(r"[.\[\]:\\'\"]", "_", str(name))


def copied(chart: Any) -> str:
    """The column of a chart that a click copies: the wiring, or the window's; empty if it has neither."""
    text = str(chart.to_dict())
    return next((name for name in ("wiring", "window") if f"'{name}'" in text), "")
