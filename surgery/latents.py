r"""What enters a span of layers and what leaves it, for every token of a corpus, computed once and kept on the disk.

A new middle is trained on pairs ``(x_start, x_stop)``: the stream entering layer ``start`` and the stream entering
layer ``stop`` of the original model. The layers before and behind never change, so these pairs never change either;
computing them once costs ``stop / L`` F, computing them in every epoch that many times more (the teacher's cost belongs
in any account of what the training saved). Kept are whole prompts, real tokens only:

    latents.json               format, model and sha256 of its weights, sha256 of the corpus, span, sizes, versions;
                               file, prompts, tokens, bytes and sha256 of every shard
    latents-00000.safetensors  lengths int32 [prompt], tokens int32 [token], x_start and x_stop [token, d_model]
    latents-00001.safetensors  the prompts that follow; the corpus's order throughout

``size`` says beforehand how much that is: at d_model 768 in float16, 3 kB a token. Every shard appears whole or not at
all, so a harvest that was interrupted, or one whose shard was lost, goes on by the same call.

What is to be predicted is the update ``u = x_stop - x_start``: on ``x_stop`` itself the identity already explains most
of the variance. ``Latents.moments`` has what the baselines need (mean update, best linear map).
Half precision rounds x by 5e-4 of its size (bfloat16: 4e-3), the update by that over ``|u| / |x|``.

>>> import tempfile
>>> from surgery import Stack, calibration
>>> stack = Stack(calibration.mixed_network(0.5))
>>> latents = harvest(stack, Tokens.of(calibration.tokens(6, 8)), 1, 3, tempfile.mkdtemp(), shard_tokens=16)
>>> latents.n_tokens, len(latents.shards), latents.batch([5, 0]).x_start.shape == (2, 8, stack.d_model)
(48, 3, True)
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import operator
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float, Int, UInt8
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import surgery
from surgery import frames, provenance
from surgery.engine import Stream
from surgery.stack import Stack
from surgery.tokens import Tokens

MANIFEST, FORMAT = "latents.json", "surgery latents 1"
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # as safetensors calls them
# What must be the same for a harvest to go on in a folder, and what it is called.
_FIXED = {
    "weights_sha256": "weights",
    "corpus_sha256": "corpus",
    "start": "start",
    "stop": "stop",
    "dtype": "dtype",
    "shard_tokens": "shard_tokens",
}
_ROWS = 4096  # tokens that moments hold in float64 at a time
_PIECE = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Shard:
    """One file: how many prompts and tokens it holds, and what it must look like."""

    file: str
    prompts: int
    tokens: int
    bytes: int
    sha256: str
    seconds: float = 0.0  # wall time of its making


@dataclass(frozen=True)
class Pairs:
    """Some prompts, padded on the right to the longest; the streams are 0 at padding."""

    tokens: Tokens
    x_start: Float[Tensor, "prompt pos d_model"]
    x_stop: Float[Tensor, "prompt pos d_model"]


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
    """An opened folder. Nothing of it is in memory but the prompts' lengths: files are mapped on first use."""

    folder: Path
    start: int
    stop: int
    dtype: torch.dtype
    d_model: int
    lengths: Int[Tensor, " prompt"]
    shards: tuple[Shard, ...]
    source: Mapping[str, str]  # model, weights_sha256, corpus_sha256
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

    def batch(self, prompts: Sequence[int]) -> Pairs:
        """These prompts, in this order, in float32. Reads only them.

        Raises ``ValueError`` for no prompt, or one that is not there.
        """
        spans = self._spans(prompts)
        if not spans:
            raise ValueError("there is no prompt in this batch; name at least one")
        ids, x_start, x_stop = (
            pad_sequence([self._tensors(shard)[name][rows] for shard, rows in spans], batch_first=True)
            for name in ("tokens", "x_start", "x_stop")
        )
        return Pairs(_padded(ids.long(), self.lengths[list(prompts)]), x_start.float(), x_stop.float())

    def moments(self, prompts: Sequence[int] | None = None, *, skip_first: bool = True) -> Moments:
        """Moments over the tokens of these prompts (all if None), each prompt's first left out unless asked.

        One pass in float64; what the chunks have is put together as Chan, Golub and LeVeque (1983) do, so that a mean
        much larger than the spread costs no digits. Memory: 4 d_model^2 numbers. Cost: 4 d_model^2 multiplications a
        token.

        Raises ``ValueError`` if there are fewer than two tokens.
        """
        spans = self._spans(sorted(range(self.n_prompts) if prompts is None else prompts))
        count, d = 0, self.d_model
        mean, scatter = (torch.zeros(shape, dtype=torch.float64) for shape in ((2 * d,), (2 * d, 2 * d)))
        for shard, some in itertools.groupby(spans, key=operator.itemgetter(0)):
            tensors = self._tensors(shard)
            chosen = torch.cat([torch.arange(rows.start + skip_first, rows.stop) for _, rows in some])
            for chunk in chosen.split(_ROWS) if len(chosen) else ():
                x = tensors["x_start"][chunk].double()
                both = torch.cat([x, tensors["x_stop"][chunk].double() - x], 1)
                new, share = both.mean(0) - mean, len(chunk) / (count + len(chunk))
                centred = both - both.mean(0)
                scatter += centred.T @ centred + torch.outer(new, new) * (count * share)
                mean += new * share
                count += len(chunk)
        if count < 2:
            raise ValueError(f"moments need at least two tokens, these prompts have {count}; take more prompts")
        scatter /= count
        return Moments(count, mean[:d], mean[d:], scatter[:d, :d], scatter[:d, d:], scatter[d:, d:])

    def verify(self) -> None:
        """Read every shard and compare its sha256. Raises ``ValueError`` naming the first that was changed."""
        for shard in self.shards:
            _refuse(self.folder, shard, _damage(self.folder, shard, self.d_model, self.dtype, thorough=True))

    def _spans(self, prompts: Sequence[int]) -> list[tuple[int, slice]]:
        """For each prompt the shard that holds it, and its rows there."""
        if wrong := [prompt for prompt in prompts if not 0 <= prompt < self.n_prompts]:
            raise ValueError(f"there is no prompt {wrong[0]} in {self.folder}: it has 0 to {self.n_prompts - 1}")
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
        """A shard's tensors, mapped when first asked for: only the rows that are indexed are read."""
        if shard not in self._mapped:
            path = self.folder / self.shards[shard].file
            try:
                with safe_open(path, "pt") as file:
                    self._mapped[shard] = {name: file.get_tensor(name) for name in ("tokens", "x_start", "x_stop")}
            except OSError as error:
                raise ValueError(f"cannot read {path}: {frames.reason(error)}; call harvest again as before") from error
        return self._mapped[shard]


def size(n_tokens: int, d_model: int, dtype: torch.dtype) -> int:
    """Bytes that the latents of so many tokens take (besides some hundred a shard and 4 a prompt).

    >>> size(10_000_000, 768, torch.float16) / 1e9
    30.76
    """
    return n_tokens * (2 * d_model * dtype.itemsize + 4)


def harvest(
    stack: Stack,
    corpus: Tokens | Tensor,
    start: int,
    stop: int,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 64,
    shard_tokens: int = 1 << 20,
    say: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Latents:
    """Keep what enters layer ``start`` and what enters layer ``stop``, for every real token of ``corpus``, in ``out``.

    Goes on after the last whole shard if the folder holds a part of the same harvest, makes lost or damaged shards anew
    and leaves whole ones alone; with the same ``batch_size`` the files come out the same, byte for byte, however often
    it was interrupted. ``shard_tokens`` is the most tokens a shard holds (a longer prompt has one of its own). Within a
    shard prompts of similar length share a batch. ``say`` is told the size before anything runs. ``start = 0`` or
    ``stop = L`` leaves one end to be trained along; not both.

    Cost: stop / L F without the head; hashing the weights and, of shards that are there, everything. Memory: one batch.

    Raises:
        ValueError: an empty span, one outside the model or all of it; prompts without tokens or too long for the
            model; a folder with latents of something else; activations that are not finite or too large for ``dtype``
            (float16 ends at 65504: take ``dtype=torch.bfloat16``).
        OSError: the folder cannot be written to, or the disk has no room for it all.
    """
    corpus = Tokens.of(corpus)
    lengths = corpus.mask.sum(1).cpu()
    _check(stack, lengths, start, stop, dtype, batch_size, shard_tokens)
    plan = _planned(lengths.tolist(), shard_tokens)
    head: dict[str, Any] = {
        "format": FORMAT,
        "model": stack.name,
        "weights_sha256": provenance.weights_hash(stack.model),
        "corpus_sha256": provenance.tokens_hash(corpus),
        "start": start,
        "stop": stop,
        "dtype": str(dtype).removeprefix("torch."),
        "d_model": stack.d_model,
        "n_prompts": len(corpus),
        "n_tokens": int(lengths.sum()),
        "shard_tokens": shard_tokens,
        "versions": {
            "surgery": surgery.__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in provenance.PACKAGES},
        },
    }
    folder = frames.folder(out)
    _sweep(folder)
    shards = _standing(folder, head)
    missing = {file: prompts for file, prompts in plan.items() if file not in shards}
    _announce(folder, head, sum(int(lengths[prompts].sum()) for prompts in missing.values()), len(plan), missing, say)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("latents", total=sum(int(lengths[prompts].sum()) for prompts in missing.values()))
        for file, prompts in missing.items():
            flat = corpus.ids[prompts][corpus.mask[prompts]].cpu()
            began = time.perf_counter()
            made = _make(
                stack, flat, lengths[prompts], (start, stop), folder / file, dtype, batch_size,
                lambda done: bar.advance(task, done),
            )  # fmt: skip
            shards[file] = replace(made, seconds=time.perf_counter() - began)
            entries = [asdict(shards[name]) for name in plan if name in shards]
            frames.save({folder / MANIFEST: (json.dumps(head | {"shards": entries}, indent=1) + "\n").encode()})
    return opened(folder)


def opened(folder: str | Path) -> Latents:
    """The latents in a folder. Sizes and headers are compared with the manifest, contents by ``Latents.verify``.

    Raises ``ValueError`` if there are none, if their harvest is not finished, or if a shard is missing or was changed.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    shards = tuple(Shard(**entry) for entry in manifest["shards"])
    d_model, dtype = manifest["d_model"], getattr(torch, manifest["dtype"])
    done = sum(shard.prompts for shard in shards)
    if done < manifest["n_prompts"]:
        raise ValueError(
            f"the harvest in {folder} is not finished: it has {done} of {manifest['n_prompts']} prompts; "
            "call harvest again as before, it goes on from there"
        )
    lengths = []
    for shard in shards:
        _refuse(folder, shard, _damage(folder, shard, d_model, dtype))
        offset = len(_header(shard.prompts, shard.tokens, d_model, dtype))
        lengths.append(np.fromfile(folder / shard.file, "<i4", shard.prompts, offset=offset))
    source = {key: manifest[key] for key in ("model", "weights_sha256", "corpus_sha256")}
    return Latents(
        folder, manifest["start"], manifest["stop"], dtype, d_model,
        torch.from_numpy(np.concatenate(lengths)).long(), shards, source,
    )  # fmt: skip


# --- one shard -------------------------------------------------------------------------------------------------------


def _make(
    stack: Stack,
    ids: Int[Tensor, " token"],
    lengths: Int[Tensor, " prompt"],
    span: tuple[int, int],
    path: Path,
    dtype: torch.dtype,
    batch_size: int,
    advance: Callable[[int], None],
) -> Shard:
    """Run the prompts, longest first (what does not fit into memory shows at once), each to its place in the file."""
    n_prompts, n_tokens, row = len(lengths), len(ids), stack.d_model * dtype.itemsize
    prompts, before = ids.split(lengths.tolist()), (lengths.cumsum(0) - lengths).tolist()
    header = _header(n_prompts, n_tokens, stack.d_model, dtype)
    first = len(header) + 4 * (n_prompts + n_tokens)
    with _whole(path) as file:
        file.write(header + lengths.numpy().astype("<i4").tobytes() + ids.numpy().astype("<i4").tobytes())
        order = lengths.argsort(descending=True, stable=True)
        for some in order.tensor_split(-(-n_prompts // batch_size)):
            batch = _padded(pad_sequence([prompts[i] for i in some], batch_first=True), lengths[some]).to(stack.device)
            for place, x in zip((first, first + n_tokens * row), _streams(stack, batch, *span)):
                layer = span[place > first]
                stored = _stored(stack, x, batch.mask, dtype, layer)
                for i, length, rows in zip(some.tolist(), lengths[some].tolist(), stored):
                    file.seek(place + before[i] * row)
                    file.write(rows[:length])
            advance(int(lengths[some].sum()))
        file.flush()
        sha256 = _hashed(file)
    return Shard(path.name, n_prompts, n_tokens, first + 2 * n_tokens * row, sha256)


def _streams(stack: Stack, batch: Tokens, start: int, stop: int) -> Iterator[Stream]:
    """What enters layer ``start``, then what enters layer ``stop``."""
    context = stack.context(batch)
    x = stack.execute(f":{start}", context.x0, context) if start else context.x0
    yield x
    yield stack.execute(f"{start}:{stop}", x, context)


def _stored(
    stack: Stack, x: Stream, mask: Bool[Tensor, "batch pos"], dtype: torch.dtype, layer: int
) -> UInt8[np.ndarray, "batch pos bytes"]:
    """The stream as it stands in the file; refuses what ``dtype`` cannot hold."""
    kept = x.to(dtype)
    if not kept[mask].isfinite().all():
        largest = float(x[mask].abs().max())
        if np.isfinite(largest):
            raise ValueError(
                f"activations of {stack.name} entering layer {layer} reach {largest:.3g}, {dtype} ends at "
                f"{torch.finfo(dtype).max:.5g}; harvest with dtype=torch.bfloat16 into another folder"
            )
        raise ValueError(
            f"activations of {stack.name} entering layer {layer} are not finite (NaN or infinity), which is the "
            "model's own doing; load it with dtype=torch.float32"
        )
    return kept.cpu().contiguous().view(torch.uint8).numpy()


def _header(n_prompts: int, n_tokens: int, d_model: int, dtype: torch.dtype) -> bytes:
    """How a shard begins: the safetensors header. What has 4 bytes a number comes first, so that all is aligned."""
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


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when all of it is on the disk, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w+b") as file:
            yield file
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {frames.reason(error)}; what was whole before it stays") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _hashed(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


# --- the folder ------------------------------------------------------------------------------------------------------


def _planned(lengths: Sequence[int], shard_tokens: int) -> dict[str, slice]:
    """Which prompts go into which file: as many, in order, as have no more than ``shard_tokens`` tokens."""
    firsts, tokens = [0], 0
    for prompt, length in enumerate(lengths):
        if tokens and tokens + length > shard_tokens:
            firsts.append(prompt)
            tokens = 0
        tokens += length
    spans = itertools.pairwise([*firsts, len(lengths)])
    return {f"latents-{i:05d}.safetensors": slice(*span) for i, span in enumerate(spans)}


def _standing(folder: Path, head: Mapping[str, Any]) -> dict[str, Shard]:
    """The whole shards of this very harvest; refuses a folder that holds another one."""
    if not (folder / MANIFEST).exists():
        return {}
    manifest = _manifest(folder)
    other = [
        f"{word} {str(manifest[key])[:16]} where {str(head[key])[:16]} is asked"
        for key, word in _FIXED.items()
        if manifest[key] != head[key]
    ]
    if other:
        raise ValueError(f"{folder} holds latents with {', '.join(other)}; harvest into another folder")
    shards = [Shard(**entry) for entry in manifest["shards"]]
    dtype = getattr(torch, manifest["dtype"])
    return {
        shard.file: shard
        for shard in shards
        if _damage(folder, shard, manifest["d_model"], dtype, thorough=True) is None
    }


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"there are no latents in {folder} ({frames.reason(error)}); make them by harvest") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a manifest of latents ({error}); harvest into another folder") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a manifest of latents: it does not say {FORMAT!r}; harvest into another folder"
        )
    return manifest


def _damage(folder: Path, shard: Shard, d_model: int, dtype: torch.dtype, *, thorough: bool = False) -> str | None:
    """What is wrong with a shard, in words; its bytes are read only if ``thorough``."""
    header = _header(shard.prompts, shard.tokens, d_model, dtype)
    try:
        with open(folder / shard.file, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != shard.bytes:
                return f"has {found} bytes instead of {shard.bytes}"
            if file.read(len(header)) != header or (thorough and _hashed(file) != shard.sha256):
                return "was changed since it was written"
    except OSError as error:
        return f"cannot be read: {frames.reason(error)}"
    return None


def _refuse(folder: Path, shard: Shard, damage: str | None) -> None:
    if damage is not None:
        raise ValueError(
            f"{folder / shard.file} {damage}; call harvest again as before, only what is damaged is made anew"
        )


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left half written."""
    for partial in folder.glob(".latents*.partial"):
        process = int(partial.name.split(".")[-2])
        if process == os.getpid() or not psutil.pid_exists(process):
            partial.unlink(missing_ok=True)


def _announce(
    folder: Path,
    head: Mapping[str, Any],
    n_tokens: int,
    n_shards: int,
    missing: Mapping[str, slice],
    say: Callable[[str], None] | None,
) -> None:
    """Say how much is to be written, and refuse if there is no room for it."""
    dtype = getattr(torch, head["dtype"])
    prompts = sum(span.stop - span.start for span in missing.values())
    needed = size(n_tokens, head["d_model"], dtype) + 4 * prompts + 1024 * len(missing)
    if say is not None:
        say(
            f"{n_tokens:,} tokens of {prompts:,} prompts, {needed:,} bytes ({needed / 1e9:.3g} GB) in {len(missing)} "
            f"of {n_shards} shards"
        )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the latents need {needed / 1e9:.3g} GB and {folder} has {free / 1e9:.3g} GB free; choose another folder, "
            "fewer prompts or a narrower dtype"
        )


def _padded(ids: Int[Tensor, "prompt pos"], lengths: Int[Tensor, " prompt"]) -> Tokens:
    """Prompts that begin at position 0 and are padded behind."""
    return Tokens(ids, torch.arange(ids.shape[1]) < lengths.unsqueeze(1))


def _check(
    stack: Stack,
    lengths: Int[Tensor, " prompt"],
    start: int,
    stop: int,
    dtype: torch.dtype,
    batch_size: int,
    shard_tokens: int,
) -> None:
    L = stack.n_layers
    if not 0 <= start < stop <= L:
        raise ValueError(
            f"there are no layers [{start}, {stop}) in {stack.name}: it needs 0 <= start < stop <= {L}, for example "
            f"start={L // 3}, stop={max(L // 3 + 1, 2 * L // 3)}"
        )
    if (start, stop) == (0, L):
        raise ValueError(
            f"[0, {L}) is all of {stack.name}, nothing of it would stay fixed; take start >= 1 or stop <= {L - 1}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"latents are kept in torch.float16, torch.bfloat16 or torch.float32, not in {dtype}")
    for name, count in (("batch_size", batch_size), ("shard_tokens", shard_tokens)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not len(lengths):
        raise ValueError("there is no prompt in this corpus; give at least one")
    if int(lengths.min()) < 1:
        raise ValueError(f"prompt {int(lengths.argmin())} has no token; leave it out")
    if int(lengths.max()) > stack.n_ctx:
        raise ValueError(
            f"prompt {int(lengths.argmax())} has {int(lengths.max())} tokens, {stack.name} reads {stack.n_ctx}; cut it"
        )
