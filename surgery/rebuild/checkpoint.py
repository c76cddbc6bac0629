"""A taped model as a Hugging Face checkpoint: a folder that appears whole or not at all."""

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery
from surgery.models.errors import ModelError
from surgery.models.loading import load, plain, quiet
from surgery.records.tables import reason
from surgery.wiring.value import Wiring


def write(
    hugging_face: PreTrainedModel,
    layers: str,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Mapping[str, str],
    folder: Path,
    max_shard_size: int | str,
    check: Callable[[PreTrainedModel], None] | None,
) -> Path:
    """Write a model some of whose ``layers`` (the name of their list) are on the same weights, with files of text.

    Everything is written into a folder beside, opened again for ``check``, and renamed; whatever goes wrong or
    interrupts, the folder beside is removed and nothing else was touched.
    """
    _refuse_full(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with quiet():
            _untied(hugging_face, layers).save_pretrained(partial, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        if check is not None:
            check(_opened(partial, hugging_face))
        for path in filter(Path.is_file, partial.rglob("*")):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        _refuse_full(folder)
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"cannot write {folder}: {reason(error)}") from error
    except SafetensorError as error:
        raise OSError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def card(name: str, wiring: Wiring, base: str, taped: str) -> str:
    """The model card: what was taped, from what, and how to do it again; ``base`` and ``taped`` are ``Stack.sha256``."""
    depth = len(wiring.layers)
    return f"""---
base_model: {name}
library_name: transformers
pipeline_tag: text-generation
tags: [layer-surgery, passthrough]
---

# {name}, layers `{wiring}`

The {wiring.n_layers} layers of `{name}` in another order, {depth} in all; no weight was trained or changed.

| | |
|---|---|
| wiring | `{wiring}` (Python's slices over layers, one after another) |
| layers, in order | {", ".join(map(str, wiring.layers))} |
| base model | `{name}`, {wiring.n_layers} layers |
| weights of the base model | sha256 `{base}` |
| weights of this model | sha256 `{taped}` |
| made with | surgery {surgery.__version__} |

Make it again (`mergekit.yaml` says the same to mergekit):

```python
import surgery
from surgery import tape

tape.save(tape.together(surgery.load({name!r}), "{wiring}"), "folder")
```

Open it:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("folder")
```
"""


def layered_card(name: str, own: Sequence[Sequence[int | None]], sha256: str) -> str:
    """The card of a model built of other layers: MLP width, heads and stream of each, None as configured; how to open
    it."""
    sized = any(any(size) for size in own)
    cells = [[str(i), *(str(n or "config") for n in size[:3])] for i, size in enumerate(own)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    how = 'import surgery\n\nmodel = surgery.load("folder")'
    if not sized:
        how = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("folder")'
    only = "Its layers have sizes of their own, which `surgery.json` says: only `surgery.load` opens this folder."
    return f"""---
library_name: {"surgery" if sized else "transformers"}
pipeline_tag: text-generation
tags: [layer-surgery]
---

# {name}

{len(own)} layers, made with surgery {surgery.__version__}. {only if sized else "A plain Hugging Face checkpoint."}
Weights: sha256 `{sha256}`.

```python
{how}
```
""" + (f"\n| layer | MLP width | heads | stream |\n|---|---|---|---|\n{table}\n" if sized else "")


def _refuse_full(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder: nothing was overwritten; choose another one"
        )


def _untied(hugging_face: PreTrainedModel, layers: str) -> PreTrainedModel:
    """The model with every repetition of a layer on weights of its own; everything else is shared with the model."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*hugging_face.parameters(), *hugging_face.buffers())}
    again = copy.deepcopy(hugging_face, memo)
    row = again.get_submodule(layers)
    assert isinstance(row, nn.ModuleList)
    seen: set[int] = set()
    for i, layer in enumerate(row):
        first = next(layer.parameters())
        if id(first) in seen:
            row[i] = copy.deepcopy(layer)
        seen.add(id(first))
    return again


def _opened(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no tokenizer is no news
        try:
            opened = plain(load(folder, device=like.device, dtype=like.dtype))
        except ModelError as error:
            found = str(error).replace(str(folder), "the checkpoint")
            raise ModelError(
                "a plain checkpoint cannot express this order of layers: a rule of the model's configuration, not a "
                f"list, says what the layer at each place is. Save the base model and the wiring instead ({found})"
            ) from error
    assert opened is not None
    return opened
