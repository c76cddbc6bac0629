"""Models of strangers: what would run code or reach elsewhere, configurations that lie, garbled files, no numbers."""

import json
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from support import fixtures, strangers
from support.attacks import Attack
from surgery.models.errors import ModelError

INPUTS = ("closed", "pipe", "terminal")


def opening(open_model: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a model opens as, None if it is refused; and what went wrong if it is neither, or costs too much."""
    cost, model, wrong = strangers.Cost(), None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tokenizer that cannot be used is a warning
        try:
            model = open_model()
        except ModelError as error:
            text = str(error)
            if not text.isprintable() or len(text) > 1500:
                wrong = f"the message is no sentence: {text[:200]!r}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
    return model, wrong or cost.too_much() or None


def warm(folder: Path) -> None:
    """Let libraries import and cache what they need before costs are measured."""
    surgery.Stack(surgery.load(folder))


def folders_with_traps(count: int, folder: Path) -> Iterator[str | None]:
    original = fixtures.save("llama", folder / "original")
    warm(original)
    traps = list(strangers.TRAPS.items())
    for trial in range(count):
        name, (trap, opens) = traps[trial % len(traps)]
        work = folder / str(trial)
        place, away = work / "model", work / strangers.ELSEWHERE
        away.mkdir(parents=True)
        shutil.copytree(original, place)
        trap(place, away)
        answers = INPUTS[trial // len(traps) % 3 - 2]
        with strangers.answering(answers), strangers.watched() as seen:
            model, wrong = opening(lambda place=place: surgery.load(place))
        if (away / "ran").exists() or seen:
            wrong = f"it ran code, or did {seen}"
        elif not wrong and (model is not None) != opens:
            wrong = "it opened" if model is not None else "it was refused"
        elif not wrong and model is not None and model.original_model.config._attn_implementation != "eager":
            wrong = f"its attention is {model.original_model.config._attn_implementation}"
        yield wrong and f"{name} ({answers}): {wrong}"
        shutil.rmtree(work)


LIES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 10**6,
        "vocab_size": 10**9,
        "num_hidden_layers": 10**5,
        "intermediate_size": 10**12,
        "head_dim": 10**9,
        "num_labels": 10**9,
        "num_attention_heads": 10**8,
    },
    "gpt2": {"n_positions": 10**6, "n_layer": 10**5, "n_embd": 10**6, "n_inner": 10**10},
    "gptj": {"n_positions": 10**9, "rotary_dim": 10**9},
    "mixtral": {"num_local_experts": 10**6},
    "qwen3_moe": {"num_experts": 10**6, "max_window_layers": 10**9},
    "gemma3": {"num_hidden_layers": 10**9},
}


def absurd_sizes(count: int, folder: Path) -> Iterator[str | None]:
    lies = [(name, {key: value}) for name, keys in LIES.items() for key, value in keys.items()]
    lies.append(("llama", {"model_type": "gpt_neo", "attention_types": [[["global", "local"], 10**9]]}))
    for trial in range(count):
        name, settings = lies[trial % len(lies)]
        place = folder / name
        if not place.exists():
            warm(fixtures.save(name, place))
        before = (place / "config.json").read_text()
        strangers.change(place, "config.json", **settings)
        model, wrong = opening(lambda place=place: surgery.load(place))
        (place / "config.json").write_text(before)
        yield f"{name} with {settings}: {wrong or 'it opened'}" if wrong or model is not None else None


def fields_of_configurations(count: int, folder: Path) -> Iterator[str | None]:
    draw = Random(0)
    for trial in range(count):
        name = fixtures.ARCHITECTURES[trial % len(fixtures.ARCHITECTURES)]
        place = folder / name
        if not place.exists():
            warm(fixtures.save(name, place))
        before = (place / "config.json").read_text()
        key, value = draw.choice(sorted(json.loads(before))), draw.choice(strangers.VALUES)
        strangers.change(place, "config.json", **{key: value})
        _, wrong = opening(lambda place=place: surgery.Stack(surgery.load(place)))
        (place / "config.json").write_text(before)
        yield wrong and f"{name} with {key}={str(value)[:40]!r}: {wrong}"


def other_weights(count: int, folder: Path) -> Iterator[str | None]:
    """Weights without, with another, or with one more tensor, all refused by name."""
    draw = Random(0)
    place = fixtures.save("llama", folder / "model")
    weights = load_file(place / "model.safetensors")
    warm(place)
    for trial in range(count):
        changed, name = dict(weights), draw.choice(sorted(weights))
        kind = ("lost", "resized", "added", "fewer layers")[trial % 4]
        layers = fixtures.N_LAYERS
        if kind == "lost":
            del changed[name]
        elif kind == "resized":
            changed[name] = torch.cat([changed[name]] * 2)
        elif kind == "added":
            name = draw.choice(("model.layers.4.mlp.up_proj.weight", "lm_head.bias", "x", f"{name}.x"))
            changed[name] = torch.ones(2, 3)
        else:
            layers = draw.randrange(1, fixtures.N_LAYERS)
            name = f"model.layers.{layers}."
        save_file(changed, place / "model.safetensors", metadata={"format": "pt"})
        strangers.change(place, "config.json", num_hidden_layers=layers)
        try:
            surgery.load(place)
            yield f"{kind} {name}: it opened"
        except ModelError as error:
            yield None if name in str(error) else f"{kind} {name}: it is not named in {error}"


GARBLED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


def watched(place: Path, what: str) -> str | None:
    """What went wrong, or was touched outside, when a folder was opened."""
    with strangers.watched() as seen:
        _, wrong = opening(lambda: surgery.load(place))
    return f"{what}: {wrong or seen}" if wrong or seen else None


def garbled_files(count: int, folder: Path) -> Iterator[str | None]:
    draw = Random(0)
    place = fixtures.save("gpt2", folder / "model")
    away = folder / strangers.ELSEWHERE
    away.mkdir()
    strangers.change(
        place, "special_tokens_map.json", bos_token={"content": "<bos>", "lstrip": False}, eos_token="<eos>"
    )
    warm(place)
    for trial in range(count):
        path = place / GARBLED[trial % len(GARBLED)]
        before = path.read_bytes()
        path.write_bytes(strangers.garbled(before, draw))
        yield watched(place, f"{path.name} {trial}")
        path.write_bytes(before)


def garbled_weights(count: int, folder: Path) -> Iterator[str | None]:
    """The header of the weights, the list of their files, and the sizes of layers."""
    draw = Random(0)
    place = folder / "model"
    fixtures.hugging_face("gpt2").save_pretrained(place, max_shard_size="50KB")
    strangers.change(place, "surgery.json", format=1, rows=[{"d_mlp": None}] * fixtures.N_LAYERS)
    shard = sorted(place.glob("*.safetensors"))[0]
    files = [place / "model.safetensors.index.json", place / "surgery.json", shard]
    warm(place)
    for trial in range(count):
        path = files[trial % len(files)]
        before = path.read_bytes()
        if path == shard:
            length = struct.unpack("<Q", before[:8])[0]
            header = strangers.garbled(before[8 : 8 + length], draw)
            said = draw.choice((len(header), len(header), len(header), 0, 2**40, length + 1, 2**64 - 1))
            path.write_bytes(struct.pack("<Q", said) + header + before[8 + length :])
        else:
            path.write_bytes(strangers.garbled(before, draw))
        yield watched(place, f"{path.name} {trial}")
        path.write_bytes(before)


def not_numbers(count: int, folder: Path) -> Iterator[str | None]:
    draw = Random(0)
    models = {name: fixtures.hugging_face(name) for name in ("llama", "gpt2", "mixtral")}
    for _ in range(count):
        model = models[draw.choice(sorted(models))]
        name, weight = draw.choice(list(model.named_parameters()))
        index = [draw.randrange(size) for size in weight.shape]
        before, bad = weight[tuple(index)].item(), draw.choice((float("nan"), float("inf"), float("-inf")))
        with torch.no_grad():
            weight[tuple(index)] = bad
        _, wrong = opening(lambda model=model: surgery.load(model))
        try:
            surgery.load(model)
            wrong = "it opened"
        except ModelError as error:
            if name not in str(error) or str(index) not in str(error):
                wrong = f"it is not named in {error}"
        with torch.no_grad():
            weight[tuple(index)] = before
        yield wrong and f"{bad} in {name} at {index}: {wrong}"


ODD = (
    "[/x]",
    "[bold]x",
    "a\nb",
    "a\x1b[31mb",
    "\ud800",
    "x\x00y",
    "x" * 5000,
    "",
    " ",
    "$x$",
    "é",
    "../x",
    "a b",
    "-x",
)


def odd_names(count: int, folder: Path) -> Iterator[str | None]:
    original = fixtures.save("llama", folder / "original")
    warm(original)
    for trial in range(count):
        name = ODD[trial % len(ODD)]
        try:
            place = shutil.copytree(original, folder / str(trial) / name)
        except (OSError, ValueError):  # no file system takes such a name
            place = folder / str(trial) / "missing"
        _, wrong = opening(lambda place=place: surgery.Stack(surgery.load(place)))
        _, also = opening(lambda name=name: surgery.load(name))
        yield (wrong or also) and f"{name[:20]!r}: {wrong or also}"


ATTACKS = [
    Attack(
        "A folder would run code, fetch, unpickle or read elsewhere",
        folders_with_traps,
        quick=24,
        full=120,
        before="11 of 24",
    ),
    Attack("A configuration has absurd sizes", absurd_sizes, quick=8, full=95, before="6 of 18"),
    Attack("A field of a configuration has any value", fields_of_configurations, quick=5, full=250, before="2 of 120"),
    Attack("A weight is missing, added or resized", other_weights, quick=8, full=200, before="6 of 8"),
    Attack("Settings and tokenizer are garbled", garbled_files, quick=8, full=250),
    Attack("Headers, lists of weights and sizes of layers are garbled", garbled_weights, quick=9, full=400),
    Attack("A weight is not a number", not_numbers, quick=6, full=200, before="6 of 6"),
    Attack("The name of a model is odd", odd_names, quick=6, full=28, before="4 of 14"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_nothing_fails(attack, tmp_path):
    attack.hold(tmp_path)
