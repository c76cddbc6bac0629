"""What ``surgery.load`` keeps beside a bridge, and whether either was touched since.

The bridge is TransformerLens' wrapper, where hooks fire; the *plain twin* is the Hugging Face model on the same
weights. Nobody can have edited either when they are made, so they must agree then. Later a user may hook, edit or
replace parts of one of them: a ``Snapshot`` tells, without running anything.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import is_not
from typing import Any

from torch import nn
from transformer_lens import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.models.scopes import Scope

_LIBRARIES = ("transformers.", "accelerate.", "transformer_lens.model_bridge.", "surgery.models.offload")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Snapshot:
    """The modules, parameters and hooks of a module as they were at one moment.

    Args:
        module: a bridge or a Hugging Face model.
        birth: an earlier snapshot of it; only the hooks that were there then do not count as listening.

    Hooks that libraries attach for themselves when a model first runs do not count (TransformerLens' blocks and
    transformers' record of hidden states do so).
    """

    def __init__(self, module: nn.Module, birth: "Snapshot | None" = None) -> None:
        wrapped = getattr(module, "original_model", None)  # a bridge does not register the model that it wraps
        both = [*module.modules(), *(() if wrapped is None else wrapped.modules())]
        modules = list(dict.fromkeys(both))
        self._inside = modules[1:]  # not the module itself, which must be free to go while this is kept beside it
        self._own_dicts = [part for one in modules for part in (one._modules, one._parameters) if part]  # noqa: SLF001
        self._parts = list(chain.from_iterable(part.values() for part in self._own_dicts))
        self.weights = list(module.parameters())
        self._versions = [weight._version for weight in self.weights]  # noqa: SLF001 (no other name)
        before = {} if birth is None else {id(hooks): expected for hooks, expected in birth.hooks}
        found = [getattr(one, kind) for one in modules for kind in _HOOKS]
        self.hooks: list[tuple[dict[int, Any], list[Any]]] = [
            (hooks, before.get(id(hooks), _heard(hooks))) for hooks in found
        ]
        self._silent = tuple(hooks for hooks, expected in self.hooks if not expected)
        self._resident = [(hooks, expected) for hooks, expected in self.hooks if expected]
        self._root_hooks = [getattr(module, kind) for kind in _HOOKS]

    def replaced(self) -> bool:
        """Whether a module or parameter was exchanged, added or removed since."""
        now = chain.from_iterable(part.values() for part in self._own_dicts)
        return sum(map(len, self._own_dicts)) != len(self._parts) or any(map(is_not, now, self._parts))

    def touched(self, besides: "Snapshot | None" = None) -> bool:
        """Whether something was replaced or a weight edited in place since; weights that ``besides`` has do not count.

        Edits through ``.data`` escape autograd's version counters, and so this.
        """
        return self.replaced() or self.edited(besides)

    def edited(self, besides: "Snapshot | None" = None) -> bool:
        """Whether a weight was edited in place since; as for ``touched``."""
        shared = set() if besides is None else set(map(id, besides.weights))
        pairs = zip(self.weights, self._versions)
        return any(w._version != v and id(w) not in shared for w, v in pairs)  # noqa: SLF001

    def has_weights_besides(self, beside: "Snapshot") -> bool:
        """Whether there are weights that ``beside`` does not share, so that an edit can reach one side only."""
        return not set(map(id, self.weights)) <= set(map(id, beside.weights))

    def listening(self) -> bool:
        """Whether hooks were attached, removed or exchanged since."""
        if any(self._silent):
            new = [(hooks, _heard(hooks)) for hooks in self._silent if hooks]
            if any(not _from_library(hook) for _, heard in new for hook in heard):
                return True
            self._resident += [(hooks, heard) for hooks, heard in new if heard]
            self._silent = tuple(hooks for hooks in self._silent if not _heard(hooks))
        return any(_heard(hooks) != expected for hooks, expected in self._resident)

    def root_listens(self) -> bool:
        """Whether a hook is attached to the module itself, rather than to one inside it."""
        return any(not _from_library(hook) for hooks in self._root_hooks for hook in _heard(hooks))

    def training(self) -> list[nn.Module]:
        """The modules inside that are in training mode."""
        return [module for module in self._inside if module.training]


def _from_library(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_LIBRARIES)


def silence(opened: Scope, snapshots: Iterable[Snapshot]) -> None:
    """Until the scope closes, its caller hears only the hooks that were there at the time of each snapshot."""
    for snapshot in snapshots:
        for hooks, before in snapshot.hooks:
            if (heard := _heard(hooks)) != before:
                kept = (*before, *filter(_from_library, heard))
                for key, hook in list(hooks.items()):
                    if not any(hook is other for other in kept):
                        muted = _Muted(hook, opened)
                        opened.undoing(partial(_unmute, hooks, key, muted))
                        hooks[key] = muted


class _Muted:
    """A hook in whose place nothing happens for the caller of a scope; for all others it is the hook."""

    def __init__(self, hook: Any, opened: Scope) -> None:
        self.hook, self.opened = hook, opened

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.opened.acts() else self.hook(*args, **kwargs)


def _unmute(hooks: dict[int, Any], key: int, muted: _Muted) -> None:
    if hooks.get(key) is muted:  # else the user has removed the hook meanwhile
        hooks[key] = muted.hook


def _heard(hooks: dict[int, Any]) -> list[Any]:
    """The hooks that run for the caller, as they were attached."""
    if not hooks:
        return []
    attached = [hook for hook in hooks.values() if not (isinstance(hook, _Muted) and hook.opened.acts())]
    return [hook.hook if isinstance(hook, _Muted) else hook for hook in attached]


@dataclass(frozen=True)
class Twin:
    """The plain twin of a bridge, the user's tokenizer, and both models as they were made."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    given: PreTrainedTokenizerBase | None  # what the bridge got: the same, or a copy with a token to pad with
    bridge_at_birth: Snapshot
    at_birth: Snapshot


_twins: "weakref.WeakKeyDictionary[TransformerBridge, Twin]" = weakref.WeakKeyDictionary()


def keep(model: TransformerBridge, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Remember ``module`` as the plain twin of ``model``, which was just made."""
    _twins[model] = Twin(module, tokenizer, model.tokenizer, Snapshot(model), Snapshot(module))


def twin_of(model: TransformerBridge) -> Twin | None:
    """What was kept beside a bridge; None for one that ``surgery.load`` did not make."""
    return _twins.get(model)


def shared(model: TransformerBridge) -> nn.Module:
    """The module that bridges around one Hugging Face model share: that model, else what the bridge wraps."""
    twin = _twins.get(model)
    return model.original_model if twin is None else twin.module


def tokenizer(model: TransformerBridge) -> PreTrainedTokenizerBase | None:
    """The user's tokenizer of a bridge, as it was given; one that was set on the bridge since takes its place."""
    twin = _twins.get(model)
    return model.tokenizer if twin is None or model.tokenizer is not twin.given else twin.tokenizer


def plain(model: TransformerBridge) -> PreTrainedModel | None:
    """The unwrapped Hugging Face model behind a bridge that ``load`` returned; None for any other bridge.

    It is fast, can be trained and saved, and shares its parameters with the bridge.
    """
    twin = _twins.get(model)
    return None if twin is None else twin.module
