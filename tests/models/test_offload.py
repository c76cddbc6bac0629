"""Layers that wait outside the device: the same results, each brought once a sweep, and nothing used while away."""

import copy

import pytest
import torch

import surgery
from support import untouched
from support.pretend_device import difference
from support.scans import ODD, PROBES, SUBLAYERS
from surgery import Stack, scan, tape, wiring
from surgery.models import ModelError, offload, plain
from surgery.scan import execution, schedule

NAMES = ("llama", "gpt2", "gemma2", "mixtral")
WIRINGS = [*wiring.every_repeat(4), *ODD, *SUBLAYERS]


@pytest.fixture
def offloaded(model_folder):
    return lambda name: Stack(surgery.load(model_folder(name), device="cpu", offload=True))


@pytest.fixture
def poisoned(monkeypatch):
    """Weights that are away are not numbers."""
    drop = offload.Offload._drop

    def poison(self, layer):
        drop(self, layer)
        for weight in self._weights[layer]:
            weight.data = torch.full_like(weight, torch.nan)

    monkeypatch.setattr(offload.Offload, "_drop", poison)


@pytest.mark.parametrize(("name", "memory"), [*((name, None) for name in NAMES), ("llama", 200_000)])
def test_a_scan_gives_the_same_numbers(opened, offloaded, poisoned, name, memory):
    expected, stack = scan.run(opened(name), WIRINGS, PROBES, memory=memory), offloaded(name)
    assert scan.run(stack, WIRINGS, PROBES, memory=memory).equals(expected)
    assert stack.has_twin
    assert not stack.hooks_listen()


MEASURES = (
    *("checks", "run with groups", "frozen", "effects.matrix", "ablation.damage", "cloud.fit", "lens.layers"),
    *("similarity.layers", "hooks.skip, damp and parallel", "harvest"),
)


@pytest.mark.parametrize("call", MEASURES)
def test_no_measure_uses_weights_that_are_away(opened, offloaded, poisoned, tmp_path, call):
    expected, actual = (
        untouched.CALLS[call](stack, untouched.tokens(), tmp_path / str(i))
        for i, stack in enumerate((opened("llama"), offloaded("llama")))
    )
    assert difference(expected, actual) == 0


@pytest.mark.parametrize("group", [1, 3, 1000])
def test_every_layer_is_brought_once_a_sweep(offloaded, monkeypatch, group):
    stack, wirings = offloaded("llama"), list(wiring.every_repeat(4))
    tokens = stack.tokens(["w1 w2 w3", "w4 w5 w6"])
    monkeypatch.setitem(execution._TOKENS_AT_ONCE, "cpu", group * tokens.ids.numel())
    brought = offload.of(stack.model).loads
    ends = []
    execution.execute(stack, wirings, tokens, lambda index, x: ends.append(index))
    brought.clear()
    execution.execute(stack, wirings, tokens, lambda index, x: ends.append(index))
    assert sorted(ends) == sorted([*range(len(wirings))] * 2)
    assert brought == dict.fromkeys(range(4), 2)  # up, and up again
    assert schedule.simulate(wirings, group).calls >= 8


def test_which_layers_are_on_the_device(offloaded):
    stack = offloaded("llama")
    there = offload.of(stack.model)
    stack.run("w1 w2 w3", "1:3")
    assert set(there._present) == {2}
    assert set(there._coming) == {2, 3}
    stack.run("w1 w2 w3", "3 2")
    assert set(there._coming) == {2, 1}  # on the way down


def test_weights_away_can_be_read_and_edited(opened, offloaded):
    stack = offloaded("llama")
    assert stack.sha256 == opened("llama").sha256
    before = stack.run("w1 w2 w3")
    for layer in (0, 1, 3):  # on its way, away, there
        with torch.no_grad():
            plain(stack.model).model.layers[layer].mlp.down_proj.weight.mul_(2)
    edited, stack_again = stack.run("w1 w2 w3"), Stack(copy.deepcopy(plain(stack.model)))
    assert not torch.allclose(edited, before)
    stack.run("w1 w2 w3", "0 1")  # the others leave
    assert torch.equal(stack.run("w1 w2 w3"), edited)
    assert torch.equal(stack_again.run(stack.tokens("w1 w2 w3")), edited)


def test_a_wiring_of_offloaded_layers_can_be_made_permanent(offloaded, opened, tmp_path):
    stack = offloaded("llama")
    tape.save(tape.together(stack.model, ":3 1:"), tmp_path / "taped")
    expected = opened("llama").run("w1 w2 w3", ":3 1:")
    assert torch.allclose(Stack(tmp_path / "taped").run("w1 w2 w3"), expected, atol=1e-5)


def test_what_cannot_be(offloaded, model_folder, monkeypatch):
    stack = offloaded("llama")
    context = stack.context("w1 w2 w3")
    with pytest.raises(ModelError, match="gradients need the weights of all of them at once"):
        stack.execute(":", context.x0.clone().requires_grad_(), context, grad=True)
    with pytest.raises(ModelError, match="give it without device and offload"):
        surgery.load(model_folder("llama"), device_map="auto", offload=True)
    with pytest.raises(ValueError, match="load it in bfloat16 instead"):
        scan.run(stack, [":3 1:"], PROBES, precision="bf16")
    there = offload.of(stack.model)

    def full(layer):
        raise torch.OutOfMemoryError("the device is full")

    with monkeypatch.context() as patch:
        patch.setattr(there, "_copies", full)
        with pytest.raises(torch.OutOfMemoryError):
            stack.run("w1 w2 w3", "3 1")
    assert torch.isfinite(stack.run("w1 w2 w3", "3 1")).all()


def test_a_device_map_that_leaves_weights_out_is_refused(model_folder, opened):
    ends = dict.fromkeys(("model.embed_tokens", "model.layers", "model.rotary_emb", "model.norm"), "cpu")
    with pytest.raises(ModelError, match=r"hold only a part of it; load it whole, or by .*offload=True"):
        surgery.load(model_folder("llama"), device_map=ends | {"lm_head": "disk"})
    whole = Stack(surgery.load(model_folder("llama"), device_map="auto"))
    assert torch.equal(whole.run("w1 w2 w3"), opened("llama").run("w1 w2 w3"))


def test_a_model_in_memory_is_not_offloaded(load):
    with pytest.raises(ModelError, match="offload"):
        surgery.load(plain(load("llama")), offload=True)
