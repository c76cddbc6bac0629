"""Whether a linear map is its weight: measures that read ``.weight`` must not miss an adapter around it."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from surgery.models.errors import ModelError
from surgery.models.scopes import is_replaced


def require_plain(module: Any, where: str) -> None:
    """Raise ModelError unless ``module`` computes ``x W + b`` with the ``.weight`` that it shows.

    A LoRA layer, a quantised one or one whose forward was replaced computes something else; one that accelerate
    wraps, to bring the input to its device, does not. ``where`` names it.

    >>> require_plain(nn.Linear(2, 3), "here")
    """
    inner = getattr(module, "original_component", module)
    ordinary = any(type(inner).forward is kind.forward for kind in (nn.Linear, Conv1D))
    if ordinary and (not is_replaced(inner) or _only_moves(inner)):
        return
    raise ModelError(
        f"{where} is a {type(inner).__name__}, which computes something else than its weight says: "
        "merge it into plain linear layers first (for PEFT: merge_and_unload)"
    )


def _only_moves(module: nn.Module) -> bool:
    """Whether the forward of a module is its class', behind what accelerate puts there for several devices."""
    hook, inside = (vars(module).get(name) for name in ("_hf_hook", "_old_forward"))
    ours = getattr(inside, "__func__", None) is type(module).forward
    return ours and type(hook).__name__ == "AlignDevicesHook" and type(hook).__module__ == "accelerate.hooks"
