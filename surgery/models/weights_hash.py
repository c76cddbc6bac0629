"""One hash for the weights of a model, the same whether they are in memory, wrapped, or saved and opened again."""

import hashlib

import torch
from torch import nn

_WRAPPER = "._original_component"  # what TransformerLens inserts into the names of parameters that it wraps


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters, sorted by name.

    Parameters that several modules share count under every name, as they do after saving and opening again.
    """
    digest = hashlib.sha256()
    named = {name.replace(_WRAPPER, ""): value for name, value in model.named_parameters(remove_duplicate=False)}
    for name, parameter in sorted(named.items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
