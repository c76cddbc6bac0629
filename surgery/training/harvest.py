"""Harvest: run a corpus through the first layers of a model once, and store what enters a span and what leaves it.

Control: a plain forward pass of the whole model on the same batches, which takes longer (``benchmarks/harvest.py``),
as the layers behind the span and the head do not run here.

>>> import tempfile
>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.mixed_network(0.5))
>>> latents = harvest(stack, Tokens.of(known_networks.tokens(6, 8)), 1, 3, tempfile.mkdtemp(), shard_tokens=16)
>>> latents.n_tokens, len(latents.shards), latents.batch([5, 0]).x_start.shape == (2, 8, stack.d_model)
(48, 3, True)
"""

import importlib.metadata
import itertools
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import surgery
from surgery import disk, memory
from surgery.models.engine import Stream
from surgery.models.identity import differences, identity, refuse_hooks
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.progress import task
from surgery.records import checked
from surgery.records.manifest import PACKAGES, tokens_hash
from surgery.training.activations import (
    DTYPES,
    FORMAT,
    MANIFEST,
    Latents,
    Shard,
    open_latents,
    pad_right,
    read_manifest,
    sha256_of,
    shard_damage,
    shard_header,
    size_in_bytes,
)

# Entries of the manifest that must be the same for a harvest to go on in a folder, and their names in messages
_FIXED = {
    "identity": "model",
    "corpus_sha256": "corpus",
    "start": "start",
    "stop": "stop",
    "dtype": "dtype",
    "shard_tokens": "shard_tokens",
}


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
    """Store what enters layer ``start`` and what enters layer ``stop``, for every real token of ``corpus``, in ``out``.

    If the folder holds a part of the same harvest, this goes on after the last whole shard, makes lost or damaged
    shards anew and leaves whole ones alone; with the same ``batch_size`` the files come out the same, byte for byte,
    however often it was interrupted. ``shard_tokens`` is the most tokens that a shard holds (a longer prompt has one of
    its own). Within a shard prompts of similar length share a batch. ``say`` gets the size before anything runs.
    ``start = 0`` or ``stop = L`` leaves one end to be trained along; not both. Where the memory is too small for a
    batch, the rest of a shard goes on in smaller ones, and a warning says so; its numbers may differ by rounding.

    Cost: ``stop / L`` F without the head, hashing the weights, and hashing shards that are there. Memory: one batch.

    Raises:
        ValueError: an empty span, one outside the model or all of it; prompts without tokens or too long for the
            model; a folder with latents of something else; activations that are not finite or too large for ``dtype``
            (float16 ends at 65504: take ``dtype=torch.bfloat16``); hooks on the model.
        OSError: the folder cannot be written to, or the disk has no room for it all; or it is not whole, and another
            process is writing to it.
    """
    corpus = Tokens.of(corpus)
    lengths = corpus.mask.sum(1).cpu()
    _check(stack, lengths, start, stop, dtype, batch_size, shard_tokens)
    refuse_hooks(stack, "a harvest")
    plan = _planned(lengths.tolist(), shard_tokens)
    head: dict[str, Any] = {
        "format": FORMAT,
        "model": stack.name,
        "identity": identity(stack),
        "corpus_sha256": tokens_hash(corpus),
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
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }
    with ExitStack() as holding:
        held: disk.HeldError | None = None
        try:
            folder = holding.enter_context(disk.held(out))
        except disk.HeldError as error:  # by another process of the same training, which needs only what is whole
            folder, held = Path(out), error
        shards = _standing(folder, head)
        missing = {file: prompts for file, prompts in plan.items() if file not in shards}
        if missing and held is not None:
            raise held
        n_tokens = sum(int(lengths[prompts].sum()) for prompts in missing.values())
        _announce(folder, head, n_tokens, len(plan), missing, say)
        with task("latents", n_tokens, progress) as advance:
            for file, prompts in missing.items():
                flat = corpus.ids[prompts][corpus.mask[prompts]].cpu()
                began = time.perf_counter()
                shard = _make_shard(
                    stack,
                    flat,
                    lengths[prompts],
                    (start, stop),
                    folder / file,
                    dtype,
                    batch_size,
                    advance,
                )
                shards[file] = replace(shard, seconds=time.perf_counter() - began)
                entries = [asdict(shards[name]) for name in plan if name in shards]
                manifest = checked.sealed(head | {"shards": entries})
                disk.save({folder / MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()})
    return open_latents(folder)


def _make_shard(
    stack: Stack,
    ids: Int[Tensor, " token"],
    lengths: Int[Tensor, " prompt"],
    span: tuple[int, int],
    path: Path,
    dtype: torch.dtype,
    batch_size: int,
    advance: Callable[[int], None],
) -> Shard:
    """Run the prompts, the longest first (so that too large a batch shows at once), each to its place in the file."""
    n_prompts, n_tokens, row = len(lengths), len(ids), stack.d_model * dtype.itemsize
    prompts, before = ids.split(lengths.tolist()), (lengths.cumsum(0) - lengths).tolist()
    header = shard_header(n_prompts, n_tokens, stack.d_model, dtype)
    first = len(header) + 4 * (n_prompts + n_tokens)
    with disk.writing(path) as file:
        file.write(header + lengths.numpy().astype("<i4").tobytes() + ids.numpy().astype("<i4").tobytes())
        order = lengths.argsort(descending=True, stable=True)

        def store(begin: int, end: int) -> None:
            numbers = order[begin:end]
            ids_of_batch = pad_sequence([prompts[i] for i in numbers], batch_first=True)
            batch = pad_right(ids_of_batch, lengths[numbers]).to(stack.device)
            for place, x in zip((first, first + n_tokens * row), _streams(stack, batch, *span)):
                layer = span[place > first]
                stored = _stored(stack, x, batch.mask, dtype, layer)
                for i, length, rows in zip(numbers.tolist(), lengths[numbers].tolist(), stored):
                    file.seek(place + before[i] * row)
                    file.write(rows[:length])
            advance(int(lengths[numbers].sum()))

        even = -(-n_prompts // -(-n_prompts // batch_size))
        memory.pieces(n_prompts, even, store)
        sha256 = sha256_of(file)
    return Shard(path.name, n_prompts, n_tokens, first + 2 * n_tokens * row, sha256)


def _streams(stack: Stack, batch: Tokens, start: int, stop: int) -> Iterator[Stream]:
    """Yield what enters layer ``start``, then what enters layer ``stop``."""
    context = stack.context(batch)
    x = stack.execute(f":{start}", context.x0, context) if start else context.x0
    yield x
    yield stack.execute(f"{start}:{stop}", x, context)


def _stored(
    stack: Stack, x: Stream, mask: Bool[Tensor, "batch pos"], dtype: torch.dtype, layer: int
) -> UInt8[np.ndarray, "batch pos bytes"]:
    """The bytes of a stream as they stand in the file. Raises ValueError for numbers that ``dtype`` cannot hold."""
    rounded = x.to(dtype)
    if not rounded[mask].isfinite().all():
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
    return rounded.cpu().contiguous().view(torch.uint8).numpy()


def _planned(lengths: Sequence[int], shard_tokens: int) -> dict[str, slice]:
    """The prompts of each file: in order, as many as have no more than ``shard_tokens`` tokens together."""
    firsts, tokens = [0], 0
    for prompt, length in enumerate(lengths):
        if tokens and tokens + length > shard_tokens:
            firsts.append(prompt)
            tokens = 0
        tokens += length
    spans = itertools.pairwise([*firsts, len(lengths)])
    return {f"latents-{i:05d}.safetensors": slice(*span) for i, span in enumerate(spans)}


def _standing(folder: Path, head: Mapping[str, Any]) -> dict[str, Shard]:
    """The whole shards of this harvest in the folder. Raises ValueError if the folder holds another harvest."""
    if not (folder / MANIFEST).exists():
        return {}
    manifest = read_manifest(folder)
    if others := [other for key, word in _FIXED.items() for other in differences(manifest[key], head[key], word)]:
        raise ValueError(f"{folder} holds latents with {', '.join(others)}; harvest into another folder")
    shards = [Shard(**entry) for entry in manifest["shards"]]
    dtype = getattr(torch, manifest["dtype"])
    return {
        shard.file: shard
        for shard in shards
        if shard_damage(folder, shard, manifest["d_model"], dtype, thorough=True) is None
    }


def _announce(
    folder: Path,
    head: Mapping[str, Any],
    n_tokens: int,
    n_shards: int,
    missing: Mapping[str, slice],
    say: Callable[[str], None] | None,
) -> None:
    """Say how much is to be written. Raises OSError if there is no room for it."""
    dtype = getattr(torch, head["dtype"])
    prompts = sum(span.stop - span.start for span in missing.values())
    needed = size_in_bytes(n_tokens, head["d_model"], dtype) + 4 * prompts + 1024 * len(missing)
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
        raise ValueError(f"latents are stored in torch.float16, torch.bfloat16 or torch.float32, not in {dtype}")
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
