"""One hash for the weights of a model, the same whether they are in memory, wrapped, or saved and opened again."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WRAPPER = "._original_component"  # what TransformerLens inserts into the names of parameters that it wraps


def unwrapped(name: str) -> str:
    """The name of a parameter in the model itself, whether it is wrapped or not."""
    return name.replace(_WRAPPER, "")


def weights_sha256(model: nn.Module) -> str:
    """sha256 of all parameters, as of ``tensors_sha256``.

    Parameters that several modules share count under every name, as they do after saving and opening again.
    """
    return tensors_sha256(dict(model.named_parameters(remove_duplicate=False)))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, sorted by name."""
    digest = hashlib.sha256()
    named = {unwrapped(name): value for name, value in tensors.items()}
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def edition(tensors: Iterable[Tensor]) -> bytes:
    """A digest that any edit changes, also one through ``.data`` that autograd does not count, in a tenth of the time.

    It sums the bits of every row and of every column, so it notices what was exchanged too.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_WHOLE_NUMBERS[tensor.element_size()])
        table = bits.reshape(-1, bits.shape[-1] if bits.ndim > 1 else 1)
        for sums in (table.sum(1, dtype=table.dtype), table.sum(0, dtype=table.dtype)):
            digest.update(sums.cpu().numpy().data)
    return digest.digest()
