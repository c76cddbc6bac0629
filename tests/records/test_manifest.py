"""Hashes that are the same for the same thing and different for another, and a manifest that is complete."""

import json

import torch

from support import fixtures
from surgery import Stack
from surgery.models.tokens import Tokens
from surgery.models.weights_hash import weights_sha256
from surgery.records import manifest as provenance


def ids() -> torch.Tensor:
    return torch.randint(4, 90, (3, 5), generator=torch.Generator().manual_seed(0))


def test_equal_weights_have_equal_hashes_and_one_changed_number_another():
    once, again = fixtures.native(seed=0), fixtures.native(seed=0)
    assert weights_sha256(once) == weights_sha256(again)
    with torch.no_grad():
        next(again.parameters()).view(-1)[0] += 1e-6
    assert weights_sha256(once) != weights_sha256(again)


def test_weights_of_another_type_have_another_hash():
    half = torch.nn.Linear(2, 2).to(torch.bfloat16)
    assert weights_sha256(half) != weights_sha256(half.float())


def test_scalars_and_transposed_weights_are_hashed():
    module = torch.nn.Module()
    module.scale = torch.nn.Parameter(torch.tensor(2.0))
    module.weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    assert len(weights_sha256(module)) == 64


def test_padding_does_not_change_the_hash_of_tokens():
    tokens = Tokens.of(ids())
    hashes = {provenance.tokens_hash(tokens.pad(2, side)) for side in ("left", "right")}
    assert hashes == {provenance.tokens_hash(tokens)}
    assert provenance.tokens_hash(tokens[:2]) != provenance.tokens_hash(tokens)


def test_a_manifest_says_everything_and_is_plain_json(monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["surgery", "study"])
    stack, tokens = Stack(fixtures.native()), Tokens.of(ids())
    manifest = provenance.manifest(stack, tokens, seed=7, wiring=":2 2:", max_length=3)
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["model"]["n_layers"] == fixtures.N_LAYERS
    assert manifest["model"]["weights_sha256"] == stack.sha256
    assert manifest["tokens"] == {"prompts": 3, "tokens": 15, "sha256": provenance.tokens_hash(tokens)}
    assert (manifest["seed"], manifest["wiring"], manifest["settings"]) == (7, ":2 2:", {"max_length": 3})
    assert {"surgery", "python", "torch", "transformers", "transformer-lens"} <= set(manifest["versions"])
    assert manifest["command"] == "surgery study"
    assert manifest["time"].endswith("+00:00")
