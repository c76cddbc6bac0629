"""Shapes and types are checked in every public function whose signature names an array, and in no other.

jaxtyping's import hook wraps every function of a package, those inside functions anew at each call, which made the
tests a third longer. The rest of a signature is mypy's to check. Arguments are checked together with what is returned,
or when the function fails: jaxtyping checks them before the call, and once more with what is returned.
"""

import functools
import inspect
import types
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
    if not _names_arrays(fn):
        return fn
    return _checked_once(fn, **options) if inspect.isfunction(fn) else _checked(fn, **options)


def _checked_once(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    signature = inspect.signature(fn)
    result = inspect.Parameter("returned", inspect.Parameter.KEYWORD_ONLY, annotation=signature.return_annotation)
    own = list(signature.parameters.values())
    rest = [own.pop()] if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    before = _checked(_nothing(fn, [*own, *rest]), **options)
    after = _checked(_nothing(fn, [*own, result, *rest]), **options)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            returned = fn(*args, **kwargs)
        except Exception:
            before(*args, **kwargs)
            raise
        after(*args, returned=returned, **kwargs)
        return returned

    return wrapped


def _nothing(like: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """A function in the place of ``like`` with these parameters, which does nothing."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    again: Any = types.FunctionType(nothing.__code__, like.__globals__, like.__name__)  # where annotations are read
    again.__module__, again.__qualname__ = like.__module__, like.__qualname__
    again.__signature__ = inspect.Signature(parameters)
    return again


def _names_arrays(fn: Any) -> bool:
    if isinstance(fn, property):
        return any(_names_arrays(part) for part in (fn.fget, fn.fset) if part is not None)
    plain: Callable[..., Any] = inspect.unwrap(getattr(fn, "__func__", fn))
    private = plain.__name__.startswith("_") or "<locals>" in plain.__qualname__
    return not private and any(name in str(kind) for kind in plain.__annotations__.values() for name in _ARRAYS)
