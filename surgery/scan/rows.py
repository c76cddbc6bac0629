"""The table of a scan while it runs and when it is done: rows that survive a kill.

Rows are appended to ``<out>.part`` as wirings finish and flushed to the disk; they become the file ``out`` when all are
there. Killed at any moment, the same scan goes on; rows of another model, probe set or choice of metrics are refused,
not mixed in. Every line ends with a checksum of itself and of the first: one that was damaged is told and measured
again. One process at a time writes: a second one is refused.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from surgery import disk
from surgery.corpus.probes import Encoded
from surgery.meanings import with_meanings
from surgery.models import identity as models
from surgery.models.half_precision import named
from surgery.models.stack import Stack
from surgery.records import checked, tables
from surgery.records.manifest import manifest, tokens_hash
from surgery.scan.metrics import Metric, name_of
from surgery.scan.metrics import identity as of_metric
from surgery.wiring.value import Wiring

FORMAT = "surgery rows 2"  # of a part: every line has a checksum
PART = ".part"  # behind the name of a file that is not finished
_DIGITS = 16  # of a checksum
KEY = ["wiring", "prompt", "metric"]
COLUMNS: dict[str, str] = {
    "wiring": "the order in which the layers ran",
    "prompt": "index of the probe in its set",
    "group": "group of the probe",
    "metric": "what was measured: loglik, exact, credit, loss, kl or choice, or the name of a function of the user's",
    "value": "its value on this probe under this wiring",
    "baseline": "its value on this probe in the unmodified model",
}


def identity(stack: Stack, encoded: Encoded, metrics: Sequence[Metric], precision: str = "float32") -> dict[str, Any]:
    """What must be the same for a scan to go on in a file that is there. Raises ValueError while hooks listen."""
    models.refuse_hooks(stack, "a scan that can be resumed")
    scored = [row.nonzero().flatten().tolist() for row in encoded.scored.cpu()]
    return {
        "model": models.identity(stack),
        "probe set": f"{encoded.name} {encoded.sha256[:16]}",
        "tokens": tokens_hash(encoded.tokens),  # the tokenizer may be another
        "scored": hashlib.sha256(json.dumps([scored, encoded.probe, encoded.choice]).encode()).hexdigest(),
        "metrics": " ".join(map(of_metric, metrics)),
        "precision": named(stack, precision),
    }


@with_meanings(COLUMNS)
def read_part(out: "str | Path") -> pd.DataFrame:
    """The rows that a scan into the file ``out`` has so far, with the columns of the file that it will be.

    Any process may ask at any moment, also when the scan was killed; rows that are being written, or are damaged, are
    left out. ``read_part("results/scan/scan_search.csv").to_csv("so_far.csv", index=False)`` makes a file of them.

    Raises ValueError if ``out`` has no rows, OSError if they cannot be read.
    """
    out = Path(str(out).removesuffix(PART))
    try:
        first, *lines = disk.content_of(out.with_name(out.name + PART)).split(b"\n")
    except FileNotFoundError:  # it is done, or nobody has begun
        if not out.exists():
            raise ValueError(f"there is no scan in {out}: neither it nor {out.name}{PART} exists") from None
        return tables.read(out)
    try:
        seal = str(json.loads(first)[checked.CHECKSUM])
    except (ValueError, KeyError, TypeError):
        seal = ""
    blocks = [_block(line) for line in lines if _holds(seal, line)]
    if not blocks:
        raise ValueError(f"the scan into {out} has no rows yet; ask again in a while")
    rows = pd.concat(blocks, ignore_index=True)
    reference = rows[rows["wiring"] == ":"].drop_duplicates(["prompt", "metric"])
    reference = reference[["prompt", "metric", "value"]].rename(columns={"value": "baseline"})
    return rows.merge(reference, on=["prompt", "metric"], how="left")


class ResumableTable:
    """Blocks of rows, one per wiring and portion, in memory and, with ``out``, on disk; half a block is cut off again.

    A context manager: it holds ``out`` until the end, so that nobody else writes there.

    Raises ValueError if ``out`` holds a scan of another ``identity``; OSError where it cannot be written, is a link, or
    is held by somebody else.
    """

    def __init__(self, out: "str | Path | None", identity: dict[str, Any]) -> None:
        self.path = None if out is None else Path(out)
        self.identity = identity
        self.blocks: dict[str, list[pd.DataFrame]] = {}  # by wiring
        self.prompts: dict[str, set[int]] = {}
        self._holding = ExitStack()

    def __enter__(self) -> "ResumableTable":
        if self.path is not None:
            disk.folder(self.path.parent)
            self.part = self.path.with_name(self.path.name + PART)
            with ExitStack() as holding:
                holding.enter_context(disk.held_file(self.path))
                self._go_on()
                self._holding = holding.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._holding.close()

    def _go_on(self) -> None:
        """Keep the rows that are there."""
        assert self.path is not None
        if self.path.exists():
            try:
                done = tables.read(self.path), tables.read_manifest(self.path)
            except ValueError:
                if not self._closing_was_interrupted():
                    raise
            else:
                self._take_over(*done)
        if os.path.lexists(self.part):
            self._resume()
        else:
            self._begin()

    def _closing_was_interrupted(self) -> bool:
        """Whether the manifest of ``out`` is of this scan, and its rows are still in the part: ``out`` is old."""
        assert self.path is not None
        try:
            return self.part.exists() and not models.differences(
                tables.read_manifest(self.path).get("scan"), self.identity
            )
        except ValueError:
            return False

    def has(self, wiring: Wiring, prompts: Iterable[int]) -> bool:
        """Whether a wiring's rows are there for all of these probes; the rows of a probe come all at once."""
        return self.prompts.get(str(wiring), set()).issuperset(prompts)

    def done(self, wiring: "Wiring | str", prompts: Iterable[int]) -> int:
        """On how many of these probes they are there."""
        return len(self.prompts.get(str(wiring), set()).intersection(prompts))

    def append(self, rows: pd.DataFrame) -> None:
        """Keep the rows of a wiring, but for probes whose rows are there, in memory and on disk."""
        rows = self._keep(rows)
        if self.path is not None and len(rows):
            block = [list(row) for row in rows.itertuples(index=False)]
            self._write(_line(self._seal, json.dumps(block, default=float)) + b"\n")

    @with_meanings(COLUMNS)
    def frame(self, wirings: Iterable[Wiring], unmodified: Wiring, metrics: Sequence[Metric]) -> pd.DataFrame:
        """The rows of ``wirings`` with their ``baseline``, ordered as if all probes had been one portion."""
        names = [name_of(metric) for metric in metrics]
        ordered = {text: _in_order(blocks, names) for text, blocks in self.blocks.items()}
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
        try:
            self.part.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(f"cannot remove {self.part}: {disk.reason(error)}; {self.path.name} is whole") from error

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
        header = checked.sealed(self.identity | {"format": FORMAT})
        self._seal = header[checked.CHECKSUM]
        self._write(json.dumps(header).encode() + b"\n", keep=0)

    def _write(self, content: bytes, keep: int | None = None) -> None:
        try:
            disk.append(self.part, content, keep=keep)
        except OSError as error:
            raise OSError(f"cannot write {self.part}: {disk.reason(error)}; rows before this one are kept") from error

    def _resume(self) -> None:
        """Take over the whole blocks of the part, and cut off what a kill left of another."""
        try:
            content = disk.content_of(self.part)
        except OSError as error:
            raise OSError(f"cannot read {self.part}: {disk.reason(error)}; remove it to begin again") from error
        first, *lines = content.split(b"\n")
        if not lines and b'{"'.startswith(first[:2]):  # killed while the first line was written
            self._begin()
            return
        self._seal = self._checked(first)
        lines.pop()  # what a kill left of another
        whole = [line for line in lines if _holds(self._seal, line)]
        for line in whole:
            self._keep(_block(line))
        if damaged := len(lines) - len(whole):
            place = next(i for i, line in enumerate(lines, start=2) if not _holds(self._seal, line))
            warnings.warn(
                f"{self.part} was damaged in {damaged} of its {len(lines) + 1} lines (the first is line {place}): what "
                "they held is measured again",
                stacklevel=5,
            )
        same = [first, *(ours for ours, _ in takewhile(lambda both: both[0] == both[1], zip(whole, lines)))]
        self._write(b"".join(line + b"\n" for line in whole[len(same) - 1 :]), keep=sum(len(line) + 1 for line in same))

    def _checked(self, first: bytes) -> str:
        """The checksum in the first line of a part. Raises ValueError unless it is whole and of this scan."""
        try:
            header = json.loads(first)
        except ValueError:
            header = None
        if not isinstance(header, dict) or not checked.intact(header):
            raise ValueError(f"line 1 of {self.part} is damaged, or it is no part of a scan: remove it to begin again")
        self._compare(
            {name: value for name, value in header.items() if name not in (checked.CHECKSUM, "format")}, self.part
        )
        if checked.CHECKSUM not in header:
            raise ValueError(
                f"{self.part} has no checksums, as in earlier versions, and cannot be trusted: remove it to begin again"
            )
        return str(header[checked.CHECKSUM])

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
        if "precision" not in identity and self.identity["precision"] != "bf16":  # there was no other
            identity = identity | {"precision": self.identity["precision"]}
        if others := models.differences(identity, self.identity):
            raise ValueError(
                f"{path} holds another scan, with {', '.join(others[:3])}{' and more' * (len(others) > 3)}; choose "
                "another file, or remove it to begin again"
            )


def _line(seal: str, block: str) -> bytes:
    """A block of rows, itself JSON, with a checksum of it and of the first line, ``seal``, as its last element."""
    checksum = hashlib.sha256(f"{seal}{block}".encode()).hexdigest()[:_DIGITS]
    return f'{block[:-1]}, "{checksum}"]'.encode()


def _holds(seal: str, line: bytes) -> bool:
    """Whether a line is whole, and of the scan whose first line has this checksum."""
    block = line[: -len(b', ""]') - _DIGITS] + b"]"
    try:
        return _line(seal, block.decode()) == line
    except UnicodeDecodeError:
        return False


def _block(line: bytes) -> pd.DataFrame:
    """The rows in a whole line."""
    return pd.DataFrame(json.loads(line)[:-1], columns=[name for name in COLUMNS if name != "baseline"])


def _in_order(blocks: list[pd.DataFrame], metrics: Sequence[str]) -> pd.DataFrame:
    """The rows of one wiring by metric and probe, whatever portions they came in."""
    rows = pd.concat(blocks, ignore_index=True)
    place = rows["metric"].map(list(metrics).index)
    return rows.iloc[np.lexsort((rows["prompt"], place))].reset_index(drop=True)
