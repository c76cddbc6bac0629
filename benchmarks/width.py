"""Do wider and deeper models give the same logits? The largest difference by architecture, part and precision.

    python benchmarks/width.py          # 18 small random models in float32 and float64, two minutes

Layers 1 and 2 of 4 with everything doubled, one part at a time. Norms and softmaxes of many models go by way of float32
whatever their weights are; in the rows of float64 they are held in double precision throughout.
"""

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from transformers.utils import logging

import surgery
from surgery.rebuild import width

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support import fixtures  # the architecture matrix


def main() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    frames = []
    with tempfile.TemporaryDirectory() as folder:
        for name in fixtures.ARCHITECTURES:
            path = fixtures.save(name, Path(folder) / name)
            for dtype, mode in ((torch.float32, nullcontext()), (torch.float64, fixtures.ThroughoutDouble())):
                with mode:
                    frames.append(width.exactness({name: surgery.load(path, dtype=dtype)}))
    frames += [width.exactness({name: fixtures.native(name)}) for name in fixtures.NATIVE]
    frame = pd.concat(frames, ignore_index=True)
    shown = frame.assign(difference=frame["difference"].map("{:.0e}".format).where(frame["refused"] == "", "refused"))
    print(shown.pivot(index="architecture", columns=["precision", "part"], values="difference").to_string())
    for sentence in dict.fromkeys(frame["refused"][frame["refused"] != ""]):
        print(f"\n{sentence}")


if __name__ == "__main__":
    main()
