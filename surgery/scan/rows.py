"""The table of a scan while it runs and when it is done: rows that survive a kill.

Rows are appended to ``<out>.part`` as wirings finish and flushed to the disk; they become the file ``out`` when all are
there. Killed at any moment, the same scan goes on; rows of another model, probe set or choice of metrics are refused,
not mixed in.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from surgery import disk
from surgery.corpus.probes import Encoded
from surgery.models import identity as models
from surgery.models.stack import Stack
from surgery.records import tables
from surgery.records.manifest import manifest, tokens_hash
from surgery.wiring.value import Wiring

KEY = ["wiring", "prompt", "metric"]
COLUMNS: dict[str, str] = {
    "wiring": "the order in which the layers ran",
    "prompt": "index of the probe in its set",
    "group": "group of the probe",
    "metric": "what was measured: loglik, exact, credit, loss, kl or choice",
    "value": "its value on this probe under this wiring",
    "baseline": "its value on this probe in the unmodified model",
}


def identity(stack: Stack, encoded: Encoded, metrics: Sequence[str]) -> dict[str, Any]:
    """What must be the same for a scan to go on in a file that is there. Raises ValueError while hooks listen."""
    models.refuse_hooks(stack, "a scan that can be resumed")
    scored = [row.nonzero().flatten().tolist() for row in encoded.scored.cpu()]
    return {
        "model": models.identity(stack),
        "probe set": f"{encoded.name} {encoded.sha256[:16]}",
        "tokens": tokens_hash(encoded.tokens),  # the tokenizer may be another
        "scored": hashlib.sha256(json.dumps([scored, encoded.probe, encoded.choice]).encode()).hexdigest(),
        "metrics": " ".join(metrics),
    }


class ResumableTable:
    """Blocks of rows, one per wiring and portion, in memory and, with ``out``, on disk; half a block is cut off again.

    Raises ValueError if ``out`` holds a scan of another ``identity``, OSError where it cannot be written.
    """

    def __init__(self, out: "str | Path | None", identity: dict[str, Any]) -> None:
        self.path = None if out is None else Path(out)
        self.identity = identity
        self.blocks: dict[str, list[pd.DataFrame]] = {}  # by wiring
        self.prompts: dict[str, set[int]] = {}
        if self.path is None:
            return
        disk.folder(self.path.parent)
        self.part = self.path.with_name(self.path.name + ".part")
        if self.path.exists():
            self._take_over(tables.read(self.path), tables.read_manifest(self.path))
        if self.part.exists():
            self._resume()
        else:
            self._begin()

    def has(self, wiring: Wiring, prompts: range) -> bool:
        """Whether a wiring's rows are there for all of these probes; the rows of a probe come all at once."""
        return self.prompts.get(str(wiring), set()).issuperset(prompts)

    def append(self, rows: pd.DataFrame) -> None:
        """Keep the rows of a wiring, but for probes whose rows are there, in memory and on disk."""
        rows = self._keep(rows)
        if self.path is not None and len(rows):
            block = [list(row) for row in rows.itertuples(index=False)]
            self._write(json.dumps(block, default=float).encode() + b"\n", "ab")

    def frame(self, wirings: Iterable[Wiring], unmodified: Wiring, metrics: Sequence[str]) -> pd.DataFrame:
        """The rows of ``wirings`` with their ``baseline``, ordered as if all probes had been one portion."""
        ordered = {text: _in_order(blocks, metrics) for text, blocks in self.blocks.items()}
        frame = pd.concat([ordered[str(wiring)] for wiring in wirings], ignore_index=True)
        reference = ordered[str(unmodified)].set_index(["prompt", "metric"])["value"]
        frame["baseline"] = reference.loc[pd.MultiIndex.from_frame(frame[["prompt", "metric"]])].to_numpy()
        return frame

    def close(self, frame: pd.DataFrame, stack: Stack, encoded: Encoded) -> None:
        """Write the whole ``frame`` to ``out`` with its manifest, and remove the part; nothing without ``out``."""
        if self.path is None:
            return
        provenance = manifest(stack, encoded.tokens, seed=0, probes=encoded.sha256) | {"scan": self.identity}
        tables.write(frame, self.path, provenance, COLUMNS)
        self.part.unlink(missing_ok=True)

    def _keep(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Keep in memory, and return, the rows for probes that have none yet."""
        wiring = str(rows["wiring"].iloc[0])
        known = self.prompts.setdefault(wiring, set())
        rows = rows[~rows["prompt"].isin(known)]
        if len(rows):
            self.blocks.setdefault(wiring, []).append(rows)
            known.update(rows["prompt"])
        return rows

    def _begin(self) -> None:
        self._write(json.dumps(self.identity).encode() + b"\n", "wb")

    def _write(self, content: bytes, mode: str) -> None:
        try:
            with open(self.part, mode) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {self.part}: {disk.reason(error)}; rows before this one are kept") from error

    def _resume(self) -> None:
        """Take over the whole blocks of the part, and cut off what a kill left of another."""
        content = self.part.read_bytes()
        lines = content.split(b"\n")
        whole = content.rfind(b"\n") + 1
        try:
            self._compare(json.loads(lines[0]), self.part)
        except json.JSONDecodeError:
            whole = 0  # killed while the first line was written
        if whole == 0:
            self._begin()
            return
        for line in lines[1:-1]:
            self._keep(pd.DataFrame(json.loads(line), columns=["wiring", "prompt", "group", "metric", "value"]))
        with open(self.part, "r+b") as file:
            file.truncate(whole)

    def _take_over(self, frame: pd.DataFrame, provenance: dict) -> None:
        """Keep the rows of a scan that was done, and those of the unmodified model, which are its baseline."""
        assert self.path is not None
        self._compare(provenance.get("scan", {}), self.path)
        frame["group"] = frame["group"].fillna("")
        for _, rows in frame.groupby("wiring", sort=False):
            self._keep(rows.drop(columns="baseline").reset_index(drop=True))
        first = next(rows for _, rows in frame.groupby("wiring", sort=False))
        self._keep(first.assign(wiring=":", value=first["baseline"]).drop(columns="baseline").reset_index(drop=True))

    def _compare(self, identity: dict[str, Any], path: Path) -> None:
        if others := models.differences(identity, self.identity):
            raise ValueError(
                f"{path} holds another scan, with {', '.join(others[:3])}{' and more' * (len(others) > 3)}; choose "
                "another file, or remove it to begin again"
            )


def _in_order(blocks: list[pd.DataFrame], metrics: Sequence[str]) -> pd.DataFrame:
    """The rows of one wiring by metric and probe, whatever portions they came in."""
    rows = pd.concat(blocks, ignore_index=True)
    place = rows["metric"].map(list(metrics).index)
    return rows.iloc[np.lexsort((rows["prompt"], place))].reset_index(drop=True)
