"""What a model is, as far as results depend on it: an interrupted run goes on with the very same model or not at all.

Two models are the same if they have the same parameters, buffers, configuration and modules (classes and settings such
as an epsilon), if they give the same logits to two fixed prompts, and if the libraries that run them have the same
versions. The last two catch what is written nowhere: a forward method that was replaced, another kernel.

>>> from surgery.instruments import known_networks
>>> first, again = (known_networks.parallel_network(seed=seed) for seed in (0, 0))
>>> differences(identity(Stack(first)), identity(Stack(again)))
[]
>>> [text.split()[0] for text in differences(identity(Stack(first)), identity(Stack(first)) | {"weights": "another"})]
['weights']
"""

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

import surgery
from surgery.models.proof import probe
from surgery.models.stack import Stack
from surgery.models.weights_hash import tensors_sha256, weights_sha256

PACKAGES = ("torch", "transformers", "transformer-lens")
_NUMBERS = 6  # that stand for the logits of the two prompts
# Settings that change nothing that is computed, or that change while it is.
_ELSEWHERE = {"transformers_version", "torch_dtype", "dtype", "architectures", "auto_map", "name_or_path"}
_PASSING = {"training", "name_or_path", "gradient_checkpointing", "max_seq_len_cached"}


def identity(stack: Stack) -> dict[str, Any]:
    """Everything about a model that its results depend on, ready for JSON and for ``differences``.

    Cost: hashing all weights, once for each edition of them, and 1 F on two short prompts.
    """
    logits = _logits(stack)  # first: a rotary table that grew with a long prompt is its usual self again
    inside = stack.fastest_engine.module
    return {"weights": stack.sha256, **_rest(inside), "logits": logits, "versions": versions()}


def digest(stack: Stack) -> str:
    """One sha256 for a model and for whether hooks listen; rounding and versions do not touch it. Cost: as above."""
    exact = {name: part for name, part in identity(stack).items() if name not in ("logits", "versions")}
    return hashlib.sha256(json.dumps(exact | {"hooks": stack.hooks_listen()}, sort_keys=True).encode()).hexdigest()


def of_module(module: nn.Module) -> dict[str, Any]:
    """The same of a module that is no Stack's, without logits."""
    return {"weights": weights_sha256(module), **_rest(module), "versions": versions()}


def versions() -> dict[str, str]:
    """The versions of what computes results, without the build (``+cpu``), which a run may change."""
    return {"surgery": surgery.__version__} | {
        package: importlib.metadata.version(package).split("+")[0] for package in PACKAGES
    }


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Name whatever differs between two identities, or any two values that went through JSON, each in words.

    Two of ``{"values": [...], "within": size}`` are equal if no value differs by more than that.
    """
    now = now if isinstance(now, str) else json.loads(json.dumps(now, default=str))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.keys() >= {"values", "within"} <= now.keys():
            return [] if _close(before, now) else [f"{name}"]
        keys = [*before, *(key for key in now if key not in before)]
        inside = [differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key)) for key in keys]
        return [difference for part in inside for difference in part]
    return [] if before == now else [f"{name} {_short(before)} (now {_short(now)})"]


def refuse_hooks(stack: Stack, what: str) -> None:
    """Raise ValueError if hooks are attached to the model: ``what`` could not tell results with and without them."""
    if stack.hooks_listen():
        raise ValueError(
            f"hooks are attached to {stack.name}, and {what} would mix results with them and without them: "
            "take the hooks off, or measure without a file"
        )


def _rest(module: nn.Module) -> dict[str, Any]:
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return {"buffers": tensors_sha256(buffers), "modules": _modules(module), "config": _config(module)}


def _modules(module: nn.Module) -> str:
    """sha256 over the class of every module inside, and over its settings: plain values and functions."""
    hashed = hashlib.sha256()
    for name, part in module.named_modules():
        settings = {key: text for key, value in vars(part).items() if (text := _setting(key, value)) is not None}
        hashed.update(f"{name} {type(part).__module__}.{type(part).__qualname__} {sorted(settings.items())}\n".encode())
    return hashed.hexdigest()


def _setting(key: str, value: Any) -> str | None:
    """A setting of a module as text; None for what is none."""
    if key.startswith("_") or key in _PASSING:
        return None
    if isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple) and all(isinstance(entry, bool | int | float | str) for entry in value):
        return repr(list(value))
    return value.__qualname__ if inspect.isroutine(value) else None


def _config(module: nn.Module) -> dict[str, Any]:
    """The configuration, without names and with nothing that says how it was loaded."""
    configs: list[Any] = [part.config for part in module.modules() if hasattr(part, "config")]
    config = configs[0] if configs else None
    entries = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(getattr(config, "__dict__", {}))
    kept = {key: value for key, value in entries.items() if key not in _ELSEWHERE and not key.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(kept, sort_keys=True, default=lambda value: type(value).__name__))
    return plain


def _logits(stack: Stack) -> dict[str, Any]:
    """A few weighted sums of the logits that follow two fixed prompts."""
    logits = stack.run(probe(stack), positions=slice(-1, None)).double().cpu().flatten()
    waves = torch.arange(1, len(logits) + 1, dtype=torch.float64)
    sums = [float((logits * torch.cos((n + 0.5) * waves)).sum() / len(logits) ** 0.5) for n in range(_NUMBERS)]
    return {"values": sums, "within": 10 * stack.tolerance * max(1.0, float(logits.abs().max()))}


def _close(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    first, second = (torch.tensor(part["values"], dtype=torch.float64) for part in (before, now))
    return first.shape == second.shape and float((first - second).abs().max()) <= float(now["within"])


def _short(value: Any) -> str:
    if value is None or isinstance(value, Mapping):
        return "none" if value is None else "another"
    text = value if isinstance(value, str) else json.dumps(value)
    hexadecimal = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:8] if hexadecimal else f"{text[:40]}{'...' if len(text) > 40 else ''}"
