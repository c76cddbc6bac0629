"""Pieces of a long measurement, each kept on the disk when it is ready, so that a killed measurement goes on.

>>> import tempfile, torch
>>> folder = Path(tempfile.mkdtemp()) / "windows.parts"
>>> kept = Kept(folder, {"seed": 0})
>>> kept.get("first", lambda: {"sums": torch.ones(2)})["sums"].tolist()
[1.0, 1.0]
>>> Kept(folder, {"seed": 0}).get("first", lambda: {"sums": torch.zeros(2)})["sums"].tolist()
[1.0, 1.0]
>>> Kept(folder, {"seed": 1}).get("first", lambda: {"sums": torch.zeros(2)})["sums"].tolist()
[0.0, 0.0]
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery import disk
from surgery.records import checked


class Kept:
    """Named pieces in a folder of their own, of one measurement: ``identity`` is whatever the pieces depend on.

    A piece of another identity, or one that is damaged, is made again. Raises OSError where the folder cannot be
    written to.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))

    def get(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The piece of that name: from the disk if it is there, else computed and kept."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                tensors, identity = checked.unpack(path)
            except ValueError:
                identity = None
            if identity == self._identity:
                return tensors
        tensors = compute()
        disk.folder(self.folder)
        disk.save({path: checked.pack(tensors, self._identity)})
        return tensors
