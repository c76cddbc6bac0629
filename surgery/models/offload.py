"""Layers that wait outside the device: for models that are larger than its memory.

    stack = surgery.Stack(surgery.load("folder", device="cuda", offload=True))

Embedding, head, norms and biases stay on the device. The matrices of a layer are in the memory of the machine, where
``load`` maps them from their safetensors files as long as their number format is that of the files, so that the machine
need not hold all of them either. They are brought to the device when the layer is entered and dropped when another one
is. Meanwhile a thread brings the layer that probably comes next, on a CUDA stream of its own and through pinned memory.

What runs many streams through one layer before it goes on to the next pays least: a scan brings every layer once a
sweep (``surgery.scan.schedule``), a forward pass of a batch brings each once. Results are those of the same model
without offload, exactly. Gradients are refused: the backward pass would need the weights of all layers again.

Device memory: embedding and head, two layers (the one that runs and the one after), and what the measure itself needs.
On a CPU there is nothing to gain, since files are mapped there anyway.
"""

import collections
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import TransformerBridge

from surgery.models import twin
from surgery.models.errors import ModelError
from surgery.models.transfers import send


class Offload:
    """The matrices of a model's layers, of which the device holds those of two layers.

    Attributes:
        device: where the layers run.
        loads: how often each layer was brought there.
    """

    def __init__(self, model: TransformerBridge, device: torch.device) -> None:
        plain = twin.plain(model)
        self.device, self.loads = device, collections.Counter[int]()
        self._weights: list[list[nn.Parameter]] = []
        for index, block in enumerate(model.blocks):
            layers = [block] if plain is None else [block, plain.get_submodule(block.name)]
            both = dict.fromkeys(weight for layer in layers for weight in layer.parameters() if weight.ndim > 1)
            self._weights.append(list(both))
            for layer in layers:
                layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
        self._home = {weight: weight.data for weights in self._weights for weight in weights}
        self._entered = -1
        self._coming: dict[int, Future[tuple[list[Tensor], Any]]] = {}
        self._present: set[int] = set()
        self._versions: dict[int, list[int]] = {}  # of the weights of a layer when it was last sent for
        self._thread = ThreadPoolExecutor(1, "offload")
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for side in (model.original_model, *(() if plain is None else (plain,))):
            for tensor in (*side.parameters(), *side.buffers()):
                tensor.requires_grad_(False)
                if tensor not in self._home:
                    tensor.data = tensor.data.to(device)
        model.cfg.device = str(device)

    def enter(self, layer: int) -> None:
        """Have ``layer`` on the device and no other, but for the one that is expected after it, which is on its way.

        Layers run upwards or downwards one by one, so the next one lies in the direction of the last step.
        """
        if layer == self._entered:
            return
        downwards = layer == self._entered - 1
        self._entered = -1  # until it is there
        expected = (layer + (-1 if downwards else 1)) % len(self._weights)
        self._begin(layer)
        self._arrive(layer)
        self._entered = layer
        for other in set(self._coming) - {layer, expected}:
            self._drop(other)
        self._begin(expected)

    def _hook(self, layer: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if torch.is_grad_enabled() and x.requires_grad:
                raise ModelError(
                    "the layers of this model are offloaded, and gradients need the weights of all of them at once: "
                    "load it without offload, or over several GPUs with device_map"
                )
            self.enter(layer)

        return enter

    def _begin(self, layer: int) -> None:
        if layer not in self._coming:
            self.loads[layer] += 1
            self._versions[layer] = self._now(layer)
            self._coming[layer] = self._thread.submit(self._copies, layer)

    def _copies(self, layer: int) -> tuple[list[Tensor], Any]:
        """The weights of a layer on the device, and the event after which they are there."""
        homes = [self._home[weight] for weight in self._weights[layer]]
        if self._side_stream is None:
            return [home.to(self.device, copy=True) for home in homes], None
        with torch.cuda.stream(self._side_stream):
            copies = [send(home, self.device) for home in homes]
            return copies, self._side_stream.record_event()

    def _arrive(self, layer: int) -> None:
        if layer in self._present:
            return
        if self._now(layer) != self._versions[layer]:  # the user edited it on its way
            del self._coming[layer]
            self._begin(layer)
        try:
            copies, event = self._coming[layer].result()
        except BaseException:  # such as a device without room: it may have some the next time
            del self._coming[layer]
            raise
        if event is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(event)
            for copy in copies:
                copy.record_stream(here)  # its memory is taken again only after what runs here
        for weight, copy in zip(self._weights[layer], copies, strict=True):
            weight.data = copy
        self._present.add(layer)

    def _drop(self, layer: int) -> None:
        del self._coming[layer]
        if layer not in self._present:
            return
        self._present.remove(layer)
        edited = self._now(layer) != self._versions[layer]
        for weight in self._weights[layer]:
            if edited:
                self._home[weight].copy_(weight.data)
            weight.data = self._home[weight]

    def _now(self, layer: int) -> list[int]:
        """How often each weight of a layer was edited in place."""
        return [weight._version for weight in self._weights[layer]]  # noqa: SLF001 (no other name)


_offloads: "weakref.WeakKeyDictionary[TransformerBridge, Offload]" = weakref.WeakKeyDictionary()


def of(model: TransformerBridge) -> Offload | None:
    """What brings the layers of a model to its device; None where all its weights are there."""
    return _offloads.get(model)


def begin(model: TransformerBridge, device: torch.device) -> None:
    """Keep the layers' matrices of a fresh ``model`` where they are, and put everything else on ``device``."""
    _offloads[model] = Offload(model, device)
