r"""Stored activations: what enters a span of layers and what leaves it, for every token of a corpus.

A new middle is trained on pairs ``(x_start, x_stop)``: the stream entering layer ``start`` and the stream entering
layer ``stop`` of the original model. The layers before and behind never change, so these pairs never change either, and
are computed only once, for ``stop / L`` F, rather than in every epoch (the teacher's cost belongs in any account of
what the training saved). Whole prompts are stored, real tokens only:

    latents.json               format, model and its identity, sha256 of the corpus, span, sizes, versions;
                               file, prompts, tokens, bytes and sha256 of every shard
    latents-00000.safetensors  lengths int32 [prompt], tokens int32 [token], x_start and x_stop [token, d_model]
    latents-00001.safetensors  the prompts that follow; the corpus's order throughout

``size_in_bytes`` says beforehand how much that is: at d_model 768 in float16, 3 kB a token. Every shard appears whole
or not at all, so the same call goes on with a harvest (``surgery.training.harvest``) that was interrupted or lost one.

The target of training is the update ``u = x_stop - x_start``: the identity already explains most of the variance of
``x_stop`` itself. ``Latents.moments`` has what the baselines need (mean update, best linear map).
Half precision rounds x by 5e-4 of its size (bfloat16: 4e-3), the update by that over ``|u| / |x|``.
"""

import hashlib
import itertools
import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from surgery import disk
from surgery.models.identity import differences, identity
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.outside import content, lacks, read_json, shown
from surgery.records import checked
from surgery.stats.scatter import Scatter
from surgery.training.ledger import Counter, Ledger
from surgery.training.loop import Schedule

MANIFEST, FORMAT = "latents.json", "surgery latents 2"
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # as safetensors calls them
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_LONGEST_MANIFEST = 2**24  # bytes: as many as 70,000 shards take
SHAPE: dict[str, Any] = {  # of a manifest
    **dict.fromkeys(("model", "corpus_sha256", "dtype"), str),
    **dict.fromkeys(("start", "stop", "d_model", "n_prompts"), int),
    "identity": dict,
    "shards": list,
}
SHARD = {"file": str, "prompts": int, "tokens": int, "bytes": int, "sha256": str, "seconds": float}
_ROWS = 4096  # tokens that moments hold in float64 at a time
_PIECE = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Shard:
    """One file: its numbers of prompts and tokens, its size and its hash."""

    file: str
    prompts: int
    tokens: int
    bytes: int
    sha256: str
    seconds: float = 0.0  # wall time of its making


@dataclass(frozen=True)
class Pairs:
    """The activations of a batch of prompts, padded on the right to the longest; the streams are 0 at padding."""

    tokens: Tokens
    x_start: Float[Tensor, "prompt pos d_model"]
    x_stop: Float[Tensor, "prompt pos d_model"]


@dataclass(frozen=True)
class Batch:
    """Pairs, and the teacher's logits where they are needed: what ``training.loop`` trains on."""

    pairs: Pairs
    logits: Float[Tensor, "prompt pos d_vocab"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pairs.tokens.ids.shape)

    @property
    def n_tokens(self) -> int:
        return int(self.pairs.tokens.mask.sum())


@dataclass(frozen=True)
class Moments:
    """First and second moments of ``x = x_start`` and ``u = x_stop - x_start`` over tokens, ``c(a) = a - E a``."""

    count: int
    mean_x: Float[Tensor, " d_model"]
    mean_u: Float[Tensor, " d_model"]
    xx: Float[Tensor, "d_model d_model"]  # E c(x) c(x)^T
    xu: Float[Tensor, "d_model d_model"]  # E c(x) c(u)^T: rows are x
    uu: Float[Tensor, "d_model d_model"]  # E c(u) c(u)^T


@dataclass(frozen=True, eq=False)
class Latents:
    """Stored activations, from ``open_latents``. Only prompts' lengths are in memory: files are mapped when used."""

    folder: Path
    start: int
    stop: int
    dtype: torch.dtype
    d_model: int
    lengths: Int[Tensor, " prompt"]
    shards: tuple[Shard, ...]
    source: Mapping[str, Any]  # model, identity, corpus_sha256
    _mapped: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def n_prompts(self) -> int:
        return len(self.lengths)

    @cached_property
    def n_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def seconds(self) -> float:
        """Wall time of the harvest."""
        return sum(shard.seconds for shard in self.shards)

    def ledger(self, teacher: Stack, schedule: Schedule | None = None) -> Ledger:
        """What these activations cost: the operations of one batch, scaled to all tokens. A subclass may add what
        training by ``schedule`` costs the teacher. Cost: less than 1 F."""
        sample = self.batch(range(min(64, self.n_prompts))).tokens.to(teacher.device)
        context = teacher.context(sample)
        _, operations = Counter()("harvest", lambda: teacher.execute(f":{self.stop}", context.x0, context))
        ledger, share = Ledger(), self.n_tokens / int(sample.mask.sum())
        ledger.add("harvest", self.n_tokens, round(operations * share), self.seconds, teacher=True)
        return ledger

    def batch(self, prompts: Sequence[int]) -> Pairs:
        """Read these prompts, and only them, in this order, in float32.

        Raises ``ValueError`` for no prompt, or one that is not there.
        """
        spans = self._spans(prompts)
        if not spans:
            raise ValueError("there is no prompt in this batch; name at least one")
        ids, x_start, x_stop = (
            pad_sequence([self._tensors(shard)[name][rows] for shard, rows in spans], batch_first=True)
            for name in ("tokens", "x_start", "x_stop")
        )
        return Pairs(pad_right(ids.long(), self.lengths[list(prompts)]), x_start.float(), x_stop.float())

    def moments(self, prompts: Sequence[int] | None = None, *, skip_first: bool = True) -> Moments:
        """Moments over the tokens of these prompts (default: all), without each prompt's first if ``skip_first``.

        This is one pass in float64 (``stats.scatter.Scatter``). Memory: 16 d_model^2 numbers. Cost: 4 d_model^2
        products a token.

        Raises ``ValueError`` if there are fewer than two tokens.
        """
        spans = self._spans(sorted(range(self.n_prompts) if prompts is None else prompts))
        d, scatter = self.d_model, Scatter()
        for shard, of_shard in itertools.groupby(spans, key=operator.itemgetter(0)):
            tensors = self._tensors(shard)
            tokens = torch.cat([torch.arange(rows.start + skip_first, rows.stop) for _, rows in of_shard])
            for chunk in tokens.split(_ROWS) if len(tokens) else ():
                x = tensors["x_start"][chunk].double()
                scatter.add(torch.cat([x, tensors["x_stop"][chunk].double() - x], 1))
        if scatter.count < 2:
            raise ValueError(f"moments need at least two tokens, these prompts have {scatter.count}; take more prompts")
        mean, both = scatter.mean, scatter.covariance
        return Moments(scatter.count, mean[:d], mean[d:], both[:d, :d], both[:d, d:], both[d:, d:])

    def require(self, teacher: Stack) -> None:
        """Raise ValueError unless these are activations of ``teacher`` as it is now. Cost: that of its identity."""
        if others := differences(self.source["identity"], identity(teacher)):
            raise ValueError(
                f"the activations in {self.folder} are not of {teacher.name} as it is now, but with "
                f"{', '.join(others)}: harvest them again"
            )

    def verify(self) -> None:
        """Read every shard and compare its sha256. Raises ``ValueError`` that names the first changed one."""
        for shard in self.shards:
            refuse_damaged(
                self.folder, shard, shard_damage(self.folder, shard, self.d_model, self.dtype, thorough=True)
            )

    def _spans(self, prompts: Sequence[int]) -> list[tuple[int, slice]]:
        """For each prompt the shard that holds it, and its rows there."""
        if missing := [prompt for prompt in prompts if not 0 <= prompt < self.n_prompts]:
            raise ValueError(f"there is no prompt {missing[0]} in {self.folder}: it has 0 to {self.n_prompts - 1}")
        chosen = np.array(prompts, dtype=np.int64)
        prompts_before, tokens_before, ends = self._index
        shards = np.searchsorted(prompts_before, chosen, side="right") - 1
        last = ends[chosen] - tokens_before[shards]
        first = last - self.lengths.numpy()[chosen]
        return list(zip(shards.tolist(), map(slice, first.tolist(), last.tolist())))

    @cached_property
    def _index(self) -> tuple[Int[np.ndarray, " shard"], Int[np.ndarray, " shard"], Int[np.ndarray, " prompt"]]:
        """Prompts before each shard, tokens before each shard, tokens up to the end of each prompt."""
        prompts, tokens = (np.array([getattr(s, name) for s in self.shards]) for name in ("prompts", "tokens"))
        return prompts.cumsum() - prompts, tokens.cumsum() - tokens, self.lengths.numpy().cumsum()

    def _tensors(self, shard: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped on first use: only the rows that are indexed are read."""
        if shard not in self._mapped:
            path = self.folder / self.shards[shard].file
            try:
                with safe_open(path, "pt") as file:
                    self._mapped[shard] = {name: file.get_tensor(name) for name in ("tokens", "x_start", "x_stop")}
            except OSError as error:
                raise ValueError(f"cannot read {path}: {disk.reason(error)}; call harvest again as before") from error
        return self._mapped[shard]


def size_in_bytes(n_tokens: int, d_model: int, dtype: torch.dtype) -> int:
    """Bytes that the latents of ``n_tokens`` take, besides some hundred per shard and 4 per prompt.

    >>> size_in_bytes(10_000_000, 768, torch.float16) / 1e9
    30.76
    """
    return n_tokens * (2 * d_model * dtype.itemsize + 4)


def open_latents(folder: str | Path) -> Latents:
    """Open the latents in a folder; sizes and headers must match the manifest (``Latents.verify`` checks the contents).

    Raises ``ValueError`` if there are none, if their harvest is not finished, or if a shard is missing or was changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    shards = tuple(Shard(**entry) for entry in manifest["shards"])
    d_model, dtype = manifest["d_model"], _BY_NAME[manifest["dtype"]]
    finished = sum(shard.prompts for shard in shards)
    if finished > manifest["n_prompts"]:
        raise ValueError(
            f"{folder / MANIFEST} has {finished} of {manifest['n_prompts']} prompts; harvest into another folder"
        )
    if finished < manifest["n_prompts"]:
        raise ValueError(
            f"the harvest in {folder} is not finished: it has {finished} of {manifest['n_prompts']} prompts; "
            "call harvest again as before, it goes on from there"
        )
    lengths = []
    for shard in shards:
        refuse_damaged(folder, shard, shard_damage(folder, shard, d_model, dtype))
        offset = len(shard_header(shard.prompts, shard.tokens, d_model, dtype))
        lengths.append(np.fromfile(folder / shard.file, "<i4", shard.prompts, offset=offset))
        if lengths[-1].min(initial=1) < 1 or lengths[-1].sum(dtype="int64") != shard.tokens:
            refuse_damaged(folder, shard, "has prompts of other lengths than its tokens")
    source = {key: manifest[key] for key in ("model", "identity", "corpus_sha256")}
    return Latents(
        folder,
        manifest["start"],
        manifest["stop"],
        dtype,
        d_model,
        torch.from_numpy(np.concatenate(lengths)).long(),
        shards,
        source,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the latents in a folder. Raises ``ValueError`` if there is none, or it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = read_json(content(path, _LONGEST_MANIFEST))
        problem = _misdescribed(manifest)
    except OSError as error:
        raise ValueError(f"there are no latents in {folder} ({disk.reason(error)}); make them by harvest") from error
    except ValueError as error:
        problem = f"it {error}"
    if problem:
        raise ValueError(f"{path} is not a manifest of latents: {problem}; remove it, or harvest into another folder")
    return dict(manifest)


def _misdescribed(manifest: Any) -> str | None:
    """What is wrong with a manifest of latents, if anything."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"it does not say {FORMAT!r}"
    if problem := next(lacks(manifest, SHAPE), None):
        return problem
    if not checked.intact(manifest):
        return "it was changed since it was written"
    least = min(manifest["d_model"], manifest["n_prompts"], manifest["start"] + 1, manifest["stop"] - manifest["start"])
    if least < 1 or manifest["dtype"] not in _BY_NAME:
        return "its dtype, span or sizes are none that are stored"
    for entry in manifest["shards"]:
        if problem := next(lacks(entry, SHARD, "shard"), None):
            return problem
        if set(entry) - set(SHARD) or not re.fullmatch(r"[\w-]+\.safetensors", entry["file"], re.ASCII):
            return f"{shown(entry['file'])} is described in another way than a shard is"
        if min(entry["prompts"], entry["tokens"], entry["bytes"]) < 1:
            return f"{shown(entry['file'])} holds nothing"
    return None


def shard_damage(folder: Path, shard: Shard, d_model: int, dtype: torch.dtype, *, thorough: bool = False) -> str | None:
    """What is wrong with a shard, in words, or None; all of its bytes are read only if ``thorough``."""
    header = shard_header(shard.prompts, shard.tokens, d_model, dtype)
    try:
        with open(folder / shard.file, "rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            expected = len(header) + 4 * shard.prompts + size_in_bytes(shard.tokens, d_model, dtype)
            if not n_bytes == shard.bytes == expected:
                return f"has {n_bytes} bytes instead of {expected}"
            if file.read(len(header)) != header or (thorough and sha256_of(file) != shard.sha256):
                return "was changed since it was written"
    except OSError as error:
        return f"cannot be read: {disk.reason(error)}"
    return None


def refuse_damaged(folder: Path, shard: Shard, damage: str | None) -> None:
    """Raise ``ValueError`` if there is damage."""
    if damage is not None:
        raise ValueError(
            f"{folder / shard.file} {damage}; call harvest again as before, only what is damaged is made anew"
        )


def shard_header(n_prompts: int, n_tokens: int, d_model: int, dtype: torch.dtype) -> bytes:
    """The safetensors header that a shard begins with. Numbers of 4 bytes come first, so that everything is aligned."""
    x = (DTYPES[dtype], [n_tokens, d_model], n_tokens * d_model * dtype.itemsize)
    tensors = {
        "lengths": ("I32", [n_prompts], 4 * n_prompts),
        "tokens": ("I32", [n_tokens], 4 * n_tokens),
        "x_start": x,
        "x_stop": x,
    }
    ends = list(itertools.accumulate(length for _, _, length in tensors.values()))
    described = {
        name: {"dtype": kind, "shape": shape, "data_offsets": [end - length, end]}
        for (name, (kind, shape, length)), end in zip(tensors.items(), ends)
    }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def sha256_of(file: BinaryIO) -> str:
    """sha256 of all bytes of an open file."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def pad_right(ids: Int[Tensor, "prompt pos"], lengths: Int[Tensor, " prompt"]) -> Tokens:
    """Prompts of these lengths, which begin at position 0 and are padded behind."""
    return Tokens(ids, torch.arange(ids.shape[1]) < lengths.unsqueeze(1))
