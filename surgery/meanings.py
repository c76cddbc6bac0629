"""What the columns of a table mean, carried by the table itself: ``frame.attrs["columns"]``, a text for each column.

Every public measure that documents its ``COLUMNS`` gives them to the frame that it returns, and
``surgery.records.tables.read`` those of the file's manifest. pandas keeps ``attrs`` when rows or columns are chosen,
sorted or copied, and drops them where frames with other ``attrs`` are joined.

>>> @with_meanings({"layer": "index of the layer", "gain": "logits won, in nats"})
... def measure():
...     return pd.DataFrame({"layer": [0, 1], "note": ["", "last"]})
>>> measure().tail(1).attrs
{'columns': {'layer': 'index of the layer'}}
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import pandas as pd

Parameters = ParamSpec("Parameters")


class Meanings(dict[str, str]):
    """A dict that all copies of a table share: pandas copies ``attrs`` in depth whenever a column is read."""

    def __deepcopy__(self, memo: Any) -> "Meanings":
        return self


def put(frame: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """The frame itself, with the meaning of each of its columns that ``columns``, or else the frame so far, knows."""
    known = {**frame.attrs.get("columns", {}), **columns}
    frame.attrs["columns"] = Meanings({name: known[name] for name in map(str, frame) if name in known})
    return frame


def with_meanings(
    columns: Mapping[str, str],
) -> Callable[[Callable[Parameters, pd.DataFrame]], Callable[Parameters, pd.DataFrame]]:
    """Decorate a measure so that the frame it returns carries the meanings of its columns."""

    def decorate(measure: Callable[Parameters, pd.DataFrame]) -> Callable[Parameters, pd.DataFrame]:
        @functools.wraps(measure)
        def measured(*args: Parameters.args, **kwargs: Parameters.kwargs) -> pd.DataFrame:
            return put(measure(*args, **kwargs), columns)

        return measured

    return decorate
