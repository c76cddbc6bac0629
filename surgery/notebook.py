"""What a notebook shows: matplotlib's figures as pictures without a magic command, and small tables of text.

>>> table("2 < 3", [{"prompt": "<b>", "answer": 4}]).splitlines()[0]
'<p>2 &lt; 3</p>'
"""

import html
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def show_figures() -> None:
    """Under IPython, show a ``matplotlib.figure.Figure`` at the end of a cell, also if ``pyplot`` did not make it.

    Imports nothing for it. Where ``pyplot`` or ``%matplotlib`` says how figures show, that holds.
    """
    if (ipython := sys.modules.get("IPython")) is None or (shell := ipython.get_ipython()) is None:
        return
    formatter = shell.display_formatter.formatters["image/png"]
    if "matplotlib.figure.Figure" not in formatter:
        formatter.for_type_by_name("matplotlib.figure", "Figure", picture)


def picture(figure: Any) -> bytes:
    """The bytes of a figure's PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor="white")
    return buffer.getvalue()


def table(caption: str, rows: Sequence[Mapping[Any, Any]]) -> str:
    """HTML of a line and a table below it, in which every text is text."""
    import pandas as pd

    return f"<p>{html.escape(caption)}</p>\n{pd.DataFrame(rows).to_html(index=False, border=0)}"
