"""A package of a user's own that adds to surgery by entry points: a folder for ``sys.path``, as pip would leave it."""

from pathlib import Path

ENTRIES = """
[surgery.families]
ends = ends_package:ends
broken = no_such_package:family

[surgery.probes]
weekdays = ends_package:weekdays

[surgery.measures]
sizes = ends_package:SIZES
"""
MODULE = '''
import pandas as pd

from surgery import Wiring
from surgery.corpus.probes import Probe
from surgery.planning import own


def ends(n_layers):
    """Leave out one of the two ends."""
    return [Wiring.of(n_layers).skip(0), Wiring.of(n_layers).skip(n_layers - 1)]


def weekdays(count, seed):
    return [Probe(f"w{i} w{(i + seed) % 7} w{i + 2}", f"w{i + 3}", group=f"g{i % 2}") for i in range(count)]


def measure_sizes(stack, tokens, *, sampling):
    """How large the stream is that enters each layer.

    Root mean square over all tokens."""
    stream = stack.stream(tokens)[:-1].double()
    return pd.DataFrame({"layer": range(len(stream)), "size": [float(x.square().mean().sqrt()) for x in stream]})


SIZES = own.measure("sizes", measure_sizes, {"layer": "its index", "size": "root mean square"}, "How large is it?")
'''


def write(folder: Path, entries: str = ENTRIES, module: str = MODULE, name: str = "ends_package") -> Path:
    """Write the package to a folder and return it."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\nSummary: What I measure\n")
    (info / "entry_points.txt").write_text(entries)
    (folder / f"{name}.py").write_text(module)
    return folder
