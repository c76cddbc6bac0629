"""One number for the weights of a model, the same wherever they are met: in memory, wrapped, saved and opened again."""

import hashlib

import torch
from torch import nn

_WRAPPER = "._original_component"  # what TransformerLens puts into the names of parameters that it wraps


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters, in the order of their names.

    Parameters that several modules share count under every name, as they do once they were saved and opened again.
    """
    digest = hashlib.sha256()
    named = {name.replace(_WRAPPER, ""): value for name, value in model.named_parameters(remove_duplicate=False)}
    for name, parameter in sorted(named.items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
