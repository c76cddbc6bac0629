"""Shapes and types are checked in every public function whose signature names an array, and in no other.

jaxtyping's import hook wraps every function of a package, those inside functions anew at each call, which made the
tests a third longer. The rest of a signature is mypy's to check.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping

_ARRAYS = ("Float[", "Int[", "Bool[", "Stream", "LayerOutput")  # what names an array in this project
_checked = jaxtyping.jaxtyped


def only_where_arrays_are_named() -> None:
    """Make jaxtyping's import hook leave all other functions as they are; before the package is imported."""
    jaxtyping.jaxtyped = _jaxtyped


def _jaxtyped(fn: Any = None, **options: Any) -> Any:
    if fn is None:
        return lambda fn: _jaxtyped(fn, **options)
    return _checked(fn, **options) if _names_arrays(fn) else fn


def _names_arrays(fn: Any) -> bool:
    if isinstance(fn, property):
        return any(_names_arrays(part) for part in (fn.fget, fn.fset) if part is not None)
    plain: Callable[..., Any] = inspect.unwrap(getattr(fn, "__func__", fn))
    private = plain.__name__.startswith("_") or "<locals>" in plain.__qualname__
    return not private and any(name in str(kind) for kind in plain.__annotations__.values() for name in _ARRAYS)
