"""A pretended accelerator, on which mistakes of device show without one.

Its tensors live on the CPU and say that they are on ``pretend:0`` or ``pretend:1``. As on GPUs, an operation on tensors
of several devices is an error, apart from single numbers and indices, and so are numpy's view of a tensor and a
generator of the CPU. Operations that would make the processor wait for a GPU are counted in ``waits``.

It takes the place of torch's one device for extensions, before the first backward pass, so it is for a process of its
own: ``python -m support.pretend_device`` tries every public call on it and writes what happened as JSON.
"""

import collections
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils import _device, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "pretend:0"
ON_TWO = (
    *("run with groups", "checks", "frozen", "effects.matrix", "lens.layers", "scan.run", "features.activations"),
    *("hooks.skip, damp and parallel", "hooks.stochastic_depth", "composition.compositions"),
)
_aten = torch.ops.aten
_TRANSFERS = {_aten.copy_, _aten._to_copy}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
_WAITING = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of both devices, which a GPU would refuse."""


class PretendTensor(Tensor):
    """A tensor that says it is on the pretended device; ``inside`` is on the CPU."""

    @staticmethod
    def __new__(cls, inside: Tensor, device: torch.device) -> "PretendTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=device,
        )

    def __init__(self, inside: Tensor, device: torch.device) -> None:
        self.inside = inside

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: "dict | None" = None) -> Any:
        return dispatch(func, args, kwargs or {})


def _without_lists(index: Any) -> Any:
    """An index whose lists are tensors: torch would make them on the device, past every mode."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)


waits: collections.Counter[str] = collections.Counter()  # how often a GPU would have been waited for, by operation


class Pretend(TorchDispatchMode):
    """Context manager: ``device="pretend:0"`` works."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: "dict | None" = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on what is inside pretended tensors, where a GPU could run it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    packet, generator = func.overloadpacket, kwargs.get("generator")
    on_cpu = [tensor for tensor in tensors if tensor.ndim and not isinstance(tensor, PretendTensor)]
    indexed_there = (
        packet in _INDEXING
        and isinstance(args[0], PretendTensor)
        and all(isinstance(value, PretendTensor) or not value.ndim for value in args[2:3])
    )
    several = len({tensor.device for tensor in pretended}) > 1
    if (several or (pretended and on_cpu)) and packet not in _TRANSFERS and not indexed_there:
        raise MixedDevicesError(f"{func} on tensors of both devices: {[(*t.shape, str(t.device)) for t in tensors]}")
    if pretended and generator is not None:
        raise MixedDevicesError(f"{func} with a generator of the CPU")
    target = kwargs.get("device")
    there = bool(pretended) if target is None else torch.device(target).type == "pretend"
    place = pretended[0].device if target is None and pretended else torch.device(target or DEVICE)
    place = place if place.index is not None else torch.device(DEVICE)
    if packet is _aten.copy_:
        there = isinstance(args[0], PretendTensor)
    if there and target is not None and generator is not None:
        raise MixedDevicesError(f"{func} with a generator of the CPU")
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    leaves_device = packet in _TRANSFERS and pretended and not there
    if pretended and (leaves_device or packet in _WAITING or _by_mask(packet, args)):
        waits[str(packet)] += 1
    bare = tree_map(lambda leaf: leaf.inside if isinstance(leaf, PretendTensor) else leaf, (args, kwargs))
    wrapped = {id(tensor.inside): tensor for tensor in pretended}

    def wrap(leaf: Any) -> Any:
        if not there or not isinstance(leaf, Tensor):
            return leaf
        return wrapped.get(id(leaf)) if id(leaf) in wrapped else PretendTensor(leaf, place)

    return tree_map(wrap, func(*bare[0], **bare[1]))


def _by_mask(packet: Any, args: tuple) -> bool:
    return packet in _INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])


class _Module(backend_registration._DummyBackendModule):
    """What torch asks a device for: there are two, and their random numbers are the CPU's."""

    device_count = staticmethod(lambda: 2)

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: None)


def register() -> None:
    """Make the device known to torch."""
    made = torch.tensor  # which copies to the device past every mode

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        return made(data, **options) if device is None else made(data, **options).to(device)

    _device._device_constructors()  # a cache, which must hold ``made``
    torch.tensor = tensor
    backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Module())


def difference(here: Any, there: Any) -> float:
    """The largest difference of two results of a call, as a share of the largest value; 0 for what has no numbers.

    Raises AssertionError where their shapes or words differ, or they are finite in different places.
    """
    if isinstance(here, pd.DataFrame):
        numbers = here.select_dtypes("number").columns
        assert list(here.columns) == list(there.columns)
        assert here.drop(columns=numbers).equals(there.drop(columns=numbers)), "other words"
        return difference(here[numbers].to_numpy(float), there[numbers].to_numpy(float))
    if isinstance(here, Tensor):
        here, there = here.detach().cpu().double().numpy(), there.detach().cpu().double().numpy()
    if isinstance(here, np.ndarray):
        assert here.shape == there.shape, "other shapes"
        assert (np.isfinite(here) == np.isfinite(there)).all(), "finite elsewhere"
        size = np.abs(here[np.isfinite(here)]).max(initial=0)
        return float(np.abs(np.nan_to_num(here - there, posinf=0, neginf=0)).max(initial=0) / max(size, 1e-3))
    if isinstance(here, tuple | list):
        return max((difference(*pair) for pair in zip(here, there, strict=True)), default=0.0)
    return 0.0


def spread(folder: str) -> Any:
    """A Llama of four layers over both devices, as transformers spreads it by ``device_map``."""
    from accelerate import dispatch_model

    from surgery.models import loading

    opened = loading.from_folder(folder, folder, torch.float32)
    ends = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    layers = {f"model.layers.{layer}": f"pretend:{layer // 2}" for layer in range(4)}
    dispatched = dispatch_model(opened.model, dict.fromkeys(ends, DEVICE) | layers)
    return loading.wrap(dispatched, opened.tokenizer, folder)


def compare(here: Any, there: Any, names: "list[str] | None" = None) -> dict[str, Any]:
    """Try every public call (or those named) on a stack and the same one elsewhere.

    Gives for each the largest ``difference`` or the ``error`` that was raised there, and the ``waits``.
    """
    from support import untouched

    results: dict[str, Any] = {}
    for name in names or untouched.CALLS:
        call = untouched.CALLS[name]
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            expected = call(here, untouched.tokens(), Path(first))
            waits.clear()
            try:
                results[name] = {"difference": difference(expected, call(there, untouched.tokens(), Path(second)))}
            except Exception:
                results[name] = {"error": traceback.format_exc()}
            results[name]["waits"] = dict(waits)
    return results


def notices_mistakes() -> bool:
    """Whether what a GPU refuses is refused here."""
    here, there, random = torch.ones(2, 2), torch.ones(2, 2, device=DEVICE), torch.Generator()
    mistakes = (
        lambda: there + here,
        lambda: there + there.to("pretend:1"),
        lambda: here[there.bool()],
        lambda: there.copy_(here) @ here,
        lambda: there.index_add_(0, torch.tensor([0]), there[:1]),
        lambda: torch.rand(2, generator=random, device=DEVICE),
        lambda: there.bernoulli_(generator=random),
        lambda: there.numpy(),
        lambda: np.asarray(there),
    )
    return not any(map(_passes, mistakes)) and all(map(_passes, (lambda: there + 1, lambda: there[here.bool()])))


def _passes(action: Any) -> bool:
    try:
        action()
    except (RuntimeError, TypeError):
        return False
    return True


def main(folder: str, *names: str) -> dict[str, Any]:
    """What ``compare`` gives for the model in a folder on one device, and by ``device_map`` on two."""
    import surgery

    assert notices_mistakes()
    models = surgery.load(folder), surgery.load(folder, device=DEVICE), spread(folder)
    here, one, two = map(surgery.Stack, models)
    results = compare(here, one, list(names))
    return results | {f"{name}, on two": value for name, value in compare(here, two, list(ON_TWO)).items()}


if __name__ == "__main__":
    register()
    with Pretend():
        sys.stdout.write(json.dumps(main(*sys.argv[1:])))
