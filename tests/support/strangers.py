"""Folders that a stranger made. While a model is opened they may not run, fetch, unpickle or read elsewhere."""

import json
import os
import pickle
import pty
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import huggingface_hub
from safetensors.torch import load_file, save_file

ELSEWHERE = "elsewhere"  # the name of a folder that nothing may read
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
_seen: list[list[str]] = []  # innermost last; empty while nobody watches


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _seen:
        return
    if event.startswith(_FORBIDDEN) and event != "socket.__new__":
        _seen[-1].append(event)
        raise OSError(f"{event} is not allowed here")
    if event == "open" and isinstance(arguments[0], str) and f"/{ELSEWHERE}/" in os.path.realpath(arguments[0]):
        _seen[-1].append(f"opened {arguments[0]}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Context manager: what is run, fetched, unpickled or opened elsewhere is listed, and does not happen."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = False  # somebody who is online
    _seen.append([])
    try:
        yield _seen[-1]
    finally:
        _seen.pop()
        huggingface_hub.constants.HF_HUB_OFFLINE = offline


@contextmanager
def answering(how: str) -> Iterator[None]:
    """Context manager: standard input is closed, a pipe that says "y", or a terminal where somebody types "y"."""
    with ExitStack() as undo:
        kept, before = os.dup(0), sys.stdin
        undo.callback(os.close, kept)
        undo.callback(os.dup2, kept, 0)
        undo.callback(setattr, sys, "stdin", before)
        if how == "closed":
            os.close(0)
            sys.stdin = None
        else:
            reading, writing = os.pipe() if how == "pipe" else pty.openpty()[::-1]
            os.write(writing, b"y\n" * 20)
            os.dup2(reading, 0)
            os.close(reading)
            undo.callback(os.close, writing)
            sys.stdin = undo.enter_context(os.fdopen(0, closefd=False))
        yield


class Cost:
    """Seconds of the processor and MiB of memory beyond what the process ever had, since this was made."""

    def __init__(self) -> None:
        self._began, self._had = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def too_much(self, seconds: float = 2, mebibytes: float = 200) -> str:
        """What was exceeded, in words; empty if nothing was."""
        took = time.process_time() - self._began
        grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._had) / 1024
        return f"took {took:.1f} s and {grew:.0f} MiB" if took > seconds or grew > mebibytes else ""


class Evil:
    """Unpickled, it writes the file ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def change(folder: Path, file: str, **settings: Any) -> None:
    """Change settings in a JSON file, which is made if it is missing."""
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **settings}))


def _code(folder: Path, away: Path) -> None:
    (folder / "custom_generate").mkdir(exist_ok=True)
    code = f"import os\nos.mkdir({str(away / 'ran')!r})\n"
    for file in ("modeling_x", "configuration_x", "tokenization_x", "custom_generate/generate", "sitecustomize"):
        (folder / f"{file}.py").write_text(code)
    (folder / "requirements.txt").write_text("no-such-package")


def _auto_map(folder: Path, upstream: str = "") -> None:
    models = {kind: f"{upstream}{file}.X" for kind, file in _AUTO.items()}
    change(folder, "config.json", auto_map=models)
    change(folder, "generation_config.json", auto_map=models, custom_generate=f"{upstream}custom_generate")
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{upstream}tokenization_x.X"]})


_AUTO = {"AutoConfig": "configuration_x", "AutoModelForCausalLM": "modeling_x", "AutoModel": "modeling_x"}


def _known_class(folder: Path, away: Path) -> None:
    _code(folder, away)
    _auto_map(folder)


def _unknown_class(folder: Path, away: Path) -> None:
    _known_class(folder, away)
    change(folder, "config.json", model_type="x", architectures=["X"])


def _code_on_the_hub(folder: Path, away: Path) -> None:
    _auto_map(folder, "stranger/repository--")


def _tokenizer_class(folder: Path, away: Path) -> None:
    _code(folder, away)
    change(folder, "tokenizer_config.json", auto_map=["tokenization_x.X", "tokenization_x.X"], trust_remote_code=True)


def _kernels(folder: Path, away: Path) -> None:
    keys = ("attn_implementation", "experts_implementation")
    names = [name for key in keys for name in (key, f"_{key}", f"_{key}_internal")]
    change(folder, "config.json", **dict.fromkeys(names, "stranger/kernel@main"), use_kernels=True)


def _adapter(folder: Path, away: Path) -> None:
    change(folder, "adapter_config.json", base_model_name_or_path="stranger/base", peft_type="LORA")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(away / "ran")))


def _base_elsewhere(folder: Path, away: Path) -> None:
    _adapter(folder, away)
    (folder / "config.json").unlink()


def _pickles(folder: Path, away: Path) -> None:
    for file in ("pytorch_model.bin", "training_args.bin", ".metadata", "tokenizer.pkl", "model.pt"):
        (folder / file).write_bytes(pickle.dumps(Evil(away / "ran")))
    save_file(load_file(folder / "model.safetensors"), folder / "shard-00001-model-00001-of-00001.safetensors")


def _only_pickles(folder: Path, away: Path) -> None:
    _pickles(folder, away)
    (folder / "model.safetensors").unlink()
    (folder / "shard-00001-model-00001-of-00001.safetensors").unlink()


def _weights_at(path: str) -> Callable[[Path, Path], None]:
    def trap(folder: Path, away: Path) -> None:
        names = dict.fromkeys(load_file(folder / "model.safetensors"), path.format(away=away))
        (folder / "model.safetensors").rename(away / "model.safetensors")
        change(folder, "model.safetensors.index.json", metadata={}, weight_map=names)

    return trap


def _linked(file: str) -> Callable[[Path, Path], None]:
    def trap(folder: Path, away: Path) -> None:
        (folder / file).rename(away / file)
        (folder / file).symlink_to(away / file)

    return trap


def _explicit_weights(folder: Path, away: Path) -> None:
    change(folder, "config.json", transformers_weights="../elsewhere/model.safetensors")


def _pipe_as_config(folder: Path, away: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _device_as_config(folder: Path, away: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def _tokenizer_paths(folder: Path, away: Path) -> None:
    (away / "vocab.json").write_text('{"secret": 0}')
    (away / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    keys = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "gguf_file", "chat_template_file")
    paths = dict.fromkeys(keys, str(away / "vocab.json"))
    versioned = ["tokenizer.4.0.0.json", "../elsewhere/tokenizer.json", "tokenizer.0.1/../../elsewhere/tokenizer.json"]
    change(folder, "tokenizer_config.json", **paths, fast_tokenizer_files=versioned, init_inputs=[str(away)])
    change(folder, "config.json", gguf_file=paths["vocab_file"], tokenizer_file=paths["vocab_file"])


def _only_paths(folder: Path, away: Path) -> None:
    _tokenizer_paths(folder, away)
    (folder / "tokenizer.json").unlink()


def _quantised(folder: Path, away: Path) -> None:
    change(folder, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def _types(folder: Path, away: Path) -> None:
    change(folder, "config.json", dtype="load", torch_dtype="hub")


def _plans(folder: Path, away: Path) -> None:
    plans = {"tp_plan": "auto", "base_model_tp_plan": {"x": "colwise"}, "device_map": "auto", "tp_size": 2}
    change(folder, "config.json", **plans, fusion_config={"x": True}, kernel_config={"x": "stranger/kernel"})


def _methods(folder: Path, away: Path) -> None:
    names = ("to_dict", "to_diff_dict", "get_text_config", "save_pretrained", "to_json_string", "__class__", "validate")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        change(folder, file, **dict.fromkeys(names, "x"), __dict__={"x": 1})


def _name(folder: Path, away: Path) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        change(folder, file, _name_or_path="stranger/base", name_or_path=str(away), _commit_hash="0" * 40)


# Traps, and whether the model opens all the same.
TRAPS: dict[str, tuple[Callable[[Path, Path], None], bool]] = {
    "code for a known class": (_known_class, True),
    "code for an unknown class": (_unknown_class, False),
    "code on the hub": (_code_on_the_hub, True),
    "code for the tokenizer": (_tokenizer_class, True),
    "kernels on the hub": (_kernels, True),
    "an adapter": (_adapter, False),
    "an adapter of a base elsewhere": (_base_elsewhere, False),
    "pickles beside the weights": (_pickles, True),
    "pickles for weights": (_only_pickles, False),
    "weights above the folder": (_weights_at("../elsewhere/model.safetensors"), False),
    "weights at a path": (_weights_at("{away}/model.safetensors"), False),
    "weights as a link": (_linked("model.safetensors"), False),
    "config as a link": (_linked("config.json"), False),
    "tokenizer as a link": (_linked("tokenizer.json"), False),
    "weights named in the config": (_explicit_weights, True),
    "a pipe as config": (_pipe_as_config, False),
    "a device as config": (_device_as_config, False),
    "paths of the tokenizer": (_tokenizer_paths, True),
    "a tokenizer only elsewhere": (_only_paths, True),
    "quantised": (_quantised, False),
    "functions as types": (_types, True),
    "plans for several devices": (_plans, True),
    "words for methods": (_methods, True),
    "another name": (_name, True),
}

DEEP = "[" * 100_000
VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 10**5, 10**6, 10**9, 2**31, 2**63, 2**70, -(2**40), 10**400),
    *(1.5, -0.5, 0.0, 1e308, float("nan"), float("inf"), True, False, None),
    *("", "x", "eager", "[/x]", "\ud800", "\x00", "a\nb", "1", "x" * 100_000, "../x", "stranger/x"),
    *([], [1], [[[1]]], [0] * 1000, ["x"], {}, {"a": 1}, {"rope_type": "x"}, {"0": {}}, [[["global", "local"], 10**9]]),
)


def garbled(text: bytes, draw: Random) -> bytes:
    """A JSON text with something wrong in it: a value, a key, a byte, a part missing, or far too deep."""
    kind = draw.randrange(6)
    if kind == 0:
        place = draw.randrange(len(text))
        return text[:place] + bytes([draw.randrange(256)]) + text[place + draw.randrange(3) :]
    if kind == 1:
        return text[: draw.randrange(len(text))] + text[draw.randrange(len(text)) :]
    value = json.loads(text)
    path: list[tuple[Any, Any]] = []
    inside = value
    while isinstance(inside, dict | list) and inside and (not path or draw.random() < 0.7):
        key = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        path.append((inside, key))
        inside = inside[key]
    if not path:
        return text[:-1]
    holder, key = path[-1]
    if kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(holder, dict):
        holder[draw.choice(("x", "to_dict", "[/x]", "\ud800", "", "9" * 50))] = holder.pop(key)
    elif kind == 4 and draw.random() < 0.1:
        return json.dumps(value).encode()[:-1] + b', "x": ' + DEEP.encode()
    else:
        holder[key] = draw.choice(VALUES)
    return json.dumps(value).encode()
