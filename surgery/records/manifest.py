"""The manifest of a file of results: everything needed to get the same numbers again.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.parallel_network())
>>> manifest(stack, Tokens.of(known_networks.tokens()), seed=0)["tokens"]["prompts"]
48
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from typing import Any

import surgery
from surgery.models import identity
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

PACKAGES = ("torch", "transformers", "transformer-lens", "pandas", "numpy")


def manifest(stack: Stack, tokens: Tokens, *, seed: int, wiring: str = ":", **settings: Any) -> dict[str, Any]:
    """Model, weights, tokens, wiring, seed, settings, versions, command and time of a measurement, ready for JSON.

    Hashing the weights reads all of them, once per ``Stack``, and 1 F runs on two short prompts: make one manifest per
    study and pass it to every ``tables.write``.
    """
    config = getattr(stack.model.original_model, "config", None)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "model": {
            "name": stack.name,
            "revision": getattr(config, "_commit_hash", None),
            "architecture": stack.model.cfg.architecture,
            "n_layers": stack.n_layers,
            "d_model": stack.d_model,
            "d_vocab": stack.d_vocab,
            "dtype": str(stack.dtype).removeprefix("torch."),
            "weights_sha256": stack.sha256,
            "identity": identity.digest(stack),
        },
        "tokens": {"prompts": len(tokens), "tokens": int(tokens.mask.sum()), "sha256": tokens_hash(tokens)},
        "wiring": wiring,
        "seed": seed,
        "settings": settings,
        "versions": {"surgery": surgery.__version__, "python": platform.python_version(), **versions},
        "command": shlex.join(sys.orig_argv),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def tokens_hash(tokens: Tokens) -> str:
    """sha256 over the real tokens of every prompt, in order; padding does not count."""
    prompts = [row[real].tolist() for row, real in zip(tokens.ids.cpu(), tokens.mask.cpu(), strict=True)]
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
