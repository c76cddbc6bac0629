"""One thing about the model, the text or the libraries changes; every command that goes on with files must notice."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation

import surgery
from support import fixtures
from support.attacks import Attack
from support.scans import PROBES
from surgery import Stack, graft
from surgery.graft.grafting import Schedule
from surgery.models import identity, plain
from surgery.scan import halving, scanning, search
from surgery.training import activations, harvest

TEXTS = [f"w{i} w{i + 1} w{2 * i} w{i + 3} w{i}" for i in range(8)]
SHORT = Schedule(steps=1, batch=4, every=1)


# --- what goes on with files -----------------------------------------------------------------------------------------


def scan(stack: Stack, folder: Path) -> None:
    scanning.run(stack, [":2 1:", ":1 2:"], PROBES, folder / "scan.csv", metrics=("loglik",))


def searched(stack: Stack, folder: Path) -> None:
    halving.search(stack, [":2 1:", ":3 1:", ":1 2:"], PROBES, 1.0, folder)


def beam(stack: Stack, folder: Path) -> None:
    search.beam(stack, PROBES, width=1, depth=1, spans=[(1, 2)], out=folder)


def harvested(stack: Stack, folder: Path) -> None:
    harvest.harvest(stack, stack.tokens(TEXTS), 1, 3, folder / "latents")


def train(stack: Stack, folder: Path) -> None:
    pairs = activations.open_latents(folder / "latents")
    graft.train(stack, pairs, stack.tokens(TEXTS[:4]), folder / "run", depth=1, schedule=SHORT)


COMMANDS: dict[str, Callable[[Stack, Path], None]] = {
    "scan": scan,
    "search in rounds": searched,
    "beam": beam,
    "harvest": harvested,
    "graft": train,
}


# --- what changes ----------------------------------------------------------------------------------------------------


def in_file(name: str, change: Callable[[dict], None]) -> Callable[[Path], Stack]:
    def changed(model: Path) -> Stack:
        content = json.loads((model / name).read_text())
        change(content)
        (model / name).write_text(json.dumps(content))
        return Stack(surgery.load(model))

    return changed


def in_memory(change: Callable[[Stack], object]) -> Callable[[Path], Stack]:
    def changed(model: Path) -> Stack:
        stack = Stack(surgery.load(model))
        change(stack)
        return stack

    return changed


def exchange_words(content: dict) -> None:
    words = content["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]


def layer(stack: Stack) -> nn.Module:
    return plain(stack.model).model.layers[1]


def edit(stack: Stack) -> None:
    with torch.no_grad():
        layer(stack).mlp.up_proj.weight[0, 0] += 0.5


def edit_data(stack: Stack) -> None:
    weight = plain(stack.model).model.embed_tokens.weight
    weight.data[[3, 4]] = weight.data[[4, 3]]  # which autograd does not count


def replace_forward(stack: Stack) -> None:
    norm = layer(stack).input_layernorm
    forward = norm.forward
    norm.forward = lambda x: 1.1 * forward(x)


def rotary(stack: Stack) -> None:
    plain(stack.model).model.rotary_emb.inv_freq.mul_(0.5)


CHANGES: dict[str, Callable[[Path], Stack]] = {
    "epsilon in config.json": in_file("config.json", lambda c: c.update(rms_norm_eps=0.1)),
    "rope_theta in config.json": in_file("config.json", lambda c: c["rope_parameters"].update(rope_theta=100.0)),
    "activation in config.json": in_file("config.json", lambda c: c.update(hidden_act="relu")),
    "two words of the tokenizer": in_file("tokenizer.json", exchange_words),
    "a weight": in_memory(edit),
    "two rows through .data": in_memory(edit_data),
    "a rotary buffer": in_memory(rotary),
    "an epsilon in memory": in_memory(lambda s: setattr(layer(s).input_layernorm, "variance_epsilon", 0.1)),
    "an activation in memory": in_memory(lambda s: setattr(layer(s).mlp, "act_fn", GELUActivation())),
    "a forward method": in_memory(replace_forward),
    "a hook on the bridge": in_memory(lambda s: s.model.blocks[1].hook_out.add_hook(lambda x, hook: x + 1)),
    "a hook on the plain model": in_memory(lambda s: layer(s).register_forward_hook(lambda m, a, out: out)),
    "double precision": lambda model: Stack(surgery.load(model, dtype=torch.float64)),
    "untrained weights": lambda model: Stack(surgery.models.untrained(surgery.load(model))),
}
LIBRARIES = ("surgery", *identity.PACKAGES)
IRRELEVANT = {("harvest", "two words of the tokenizer"), ("graft", "two words of the tokenizer")}  # given as ids


def one_thing_changed(count: int, folder: Path) -> Iterator[str | None]:
    """Every command with every change; a small ``count`` takes them in turn."""
    base, usual = folder / "base", Stack(surgery.load(fixtures.save("llama", folder / "model")))
    for command in COMMANDS.values():
        command(usual, base)
    pairs = itertools.islice(itertools.cycle(itertools.product(CHANGES, COMMANDS)), 0, None, max(1, 69 // count))
    for number, (change, name) in enumerate(itertools.islice(pairs, count)):
        place = folder / str(number)
        shutil.copytree(base, place / "out")
        shutil.copytree(folder / "model", place / "model")
        stack = CHANGES[change](place / "model")
        yield told(name, change, stack, place / "out")
        shutil.rmtree(place)


def told(name: str, change: str, stack: Stack, out: Path) -> str | None:
    """None if the command refuses to go on in ``out``, in one sentence."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    try:
        COMMANDS[name](stack, out)
    except ValueError as error:
        if "\n" in str(error):
            return f"{name}, {change}: several lines: {error}"
        after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        return None if after == before else f"{name}, {change}: refused, but files changed"
    return None if (name, change) in IRRELEVANT else f"{name} went on with {change}"


def other_versions(count: int, folder: Path) -> Iterator[str | None]:
    """Every command after each library got another version."""
    stack = Stack(surgery.load(fixtures.save("llama", folder / "model")))
    for command in COMMANDS.values():
        command(stack, folder / "out")
    usual = identity.versions
    for library, name in itertools.islice(itertools.product(LIBRARIES, COMMANDS), count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(identity, "versions", lambda library=library: usual() | {library: "0.0.1"})
            yield told(name, f"another version of {library}", stack, folder / "out")


def the_same_again(count: int, folder: Path) -> Iterator[str | None]:
    """Nothing changed but what does not matter: every command goes on."""
    model = fixtures.save("llama", folder / "model")
    stack = Stack(surgery.load(model))
    for command in COMMANDS.values():
        command(stack, folder / "out")
    for (name, command), _ in zip(itertools.cycle(COMMANDS.items()), range(count)):
        again = Stack(surgery.load(model))
        again.run(torch.arange(20).reshape(1, -1) % again.d_vocab)
        plain(again.model).train()
        try:
            command(again, folder / "out")
        except ValueError as error:
            yield f"{name}: {error}"
        else:
            yield None


def removed_checkpoint(count: int, folder: Path) -> Iterator[str | None]:
    """Only the checkpoint of a training is removed, and it is made again with another seed: no old model stays."""
    stack = Stack(surgery.load(fixtures.save("llama", folder / "model")))
    harvested(stack, folder)
    pairs, heldout = activations.open_latents(folder / "latents"), stack.tokens(TEXTS[:4])
    for seed in range(count):
        schedule = Schedule(steps=1, batch=4, every=1, seed=seed)
        grown = graft.train(stack, pairs, heldout, folder / "run", depth=1, schedule=schedule)
        kept = Stack(surgery.load(folder / "run" / "model"))
        yield None if kept.sha256 == grown.stack.sha256 else f"seed {seed}: the model is another than the graft"
        (folder / "run" / "checkpoint.safetensors").unlink()


ATTACKS = [
    Attack("A command goes on after one thing changed", one_thing_changed, 7, 70, "config, words, hooks, buffers"),
    Attack("A command goes on with another version of a library", other_versions, 3, 20),
    Attack("A command goes on where nothing changed", the_same_again, 3, 50),
    Attack("The checkpoint alone of a training is removed", removed_checkpoint, 2, 10),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_nothing_fails(attack, tmp_path):
    attack.hold(tmp_path)
