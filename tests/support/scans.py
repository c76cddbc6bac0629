"""What the tests of scans share: probes, wirings of every family, how to compare two scans, a scan to kill."""

from pathlib import Path

import numpy as np
import pandas as pd

from support.places import TESTS
from surgery import Wiring, wiring
from surgery.corpus.probes import Probe, ProbeSet
from surgery.scan.rows import KEY

ODD = (":1 {1:3|2} 0.5*(2:4)", "mean{3|:0} 1", "0.5*(:) {1|1}", "2 2 2", ":1 {*1:4} 0.5*{*0:2}")


SUBLAYERS = ("1.attn 2.mlp 3", ":2 2.mlp 2.attn 3:")


PROBES = ProbeSet(
    "words",
    tuple(Probe(f"w{i} w{i + 1} w{2 * i}", f"w{i + 3} w{i}", group=f"g{i % 2}") for i in range(5))
    + tuple(Probe(f"w{i} w9 w8 w7", f"w{i}", group="long") for i in range(3)),
)


def all_wirings(n_layers: int, sublayers: bool = True) -> list[Wiring]:
    families = (wiring.every_repeat, wiring.every_skip, wiring.every_parallel, wiring.every_swap, wiring.every_reverse)
    wirings = [member for family in families for member in family(n_layers)]
    wirings += wiring.every_parallel(n_layers, mean=True)
    return wirings + [Wiring.parse(text, n_layers) for text in (*ODD, *(SUBLAYERS if sublayers else ()))]


def same(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    keys = a[KEY].equals(b[KEY])
    return (
        keys and np.allclose(a["value"], b["value"], atol=1e-6) and np.allclose(a["baseline"], b["baseline"], atol=1e-6)
    )


SLOW_SCAN = """
import sys, time, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from support.scans import PROBES
import surgery
from surgery import scan, wiring
from surgery.scan.rows import ResumableTable
append = ResumableTable.append
def slow(self, rows):
    append(self, rows)
    print(len(self.blocks), flush=True)
    time.sleep({pause})
    if len(self.blocks) > {most}:
        raise RuntimeError("mine")
ResumableTable.append = slow
stack = surgery.Stack(surgery.load({model!r}))
scan.run(stack, list(wiring.every_repeat(4)), PROBES, {out!r}, cluster={workers})
"""


def slow_scan(model: str, out: Path, pause: float, *, workers: int | None = None, most: int = 1000) -> str:
    """A script that scans, says how many wirings are done after each, and fails after more than ``most``."""
    return SLOW_SCAN.format(tests=str(TESTS), model=model, out=str(out), pause=pause, workers=workers, most=most)
