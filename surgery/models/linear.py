"""Whether a linear map is its weight: measures that read ``.weight`` must not miss an adapter around it."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from surgery.models.errors import ModelError
from surgery.models.scopes import is_replaced


def require_plain(module: Any, where: str) -> None:
    """Raise ModelError unless ``module`` computes ``x W + b`` with the ``.weight`` that it shows.

    A LoRA layer, a quantised one or one whose forward was replaced computes something else. ``where`` names it.

    >>> require_plain(nn.Linear(2, 3), "here")
    """
    inner = getattr(module, "original_component", module)
    ordinary = any(type(inner).forward is kind.forward for kind in (nn.Linear, Conv1D))
    if ordinary and not is_replaced(inner):
        return
    raise ModelError(
        f"{where} is a {type(inner).__name__}, which computes something else than its weight says: "
        "merge it into plain linear layers first (for PEFT: merge_and_unload)"
    )
