"""Write a model as a Hugging Face checkpoint: a folder that appears whole or not at all."""

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery
from surgery import disk
from surgery.models.errors import ModelError
from surgery.models.layer_sizes import CONFIGURED, Size
from surgery.models.loading import load, plain, quiet
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
    """Write a model, its tokenizer and files of text into ``folder``, and return the folder.

    Everything is written into a temporary folder beside it, loaded again for ``check``, and renamed. Whatever fails or
    interrupts, the temporary folder is removed and nothing else was touched.

    Args:
        layers: the name of the model's list of layers, of which several may share their weights.
        texts: further files, by name.
        check: called with the model as loaded again; it raises if that is not the same. None loads nothing.

    Raises:
        FileExistsError: ``folder`` exists and is not an empty folder.
        OSError: it cannot be written.
        ModelError: the checkpoint cannot be loaded again.
    """
    disk.require_empty(folder)
    try:
        with disk.workshop(folder) as whole:
            with quiet():
                untied = _untied(hugging_face, layers)
                _without_code(untied, untied.config, untied.config.get_text_config()).save_pretrained(
                    whole, max_shard_size=max_shard_size
                )
                if tokenizer is not None:
                    _without_code(copy.deepcopy(tokenizer)).save_pretrained(whole)
            for name, text in texts.items():
                (whole / name).write_text(text, encoding="utf-8")
            if check is not None:
                check(_reopened(whole, hugging_face))
            for path in filter(Path.is_file, whole.rglob("*")):
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            disk.require_empty(folder)
            if folder.is_dir():
                folder.rmdir()
            os.replace(whole, folder)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"cannot write {folder}: {disk.reason(error)}") from error
    except SafetensorError as error:
        raise OSError(f"cannot write {folder}: {error}") from error
    return folder


def card(name: str, wiring: Wiring, base: str, taped: str) -> str:
    """The card of a taped model: what it was made from, and how to make it again.

    ``base`` and ``taped`` are the ``Stack.sha256`` of the two models.
    """
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


def layered_card(name: str, sizes: Sequence[Size], sha256: str) -> str:
    """The card of a model with layers of other sizes: the sizes of each, and how to open it."""
    sized = any(size != CONFIGURED for size in sizes)
    cells = [[str(i), *(str(n or "config") for n in size[:3]), str(size.branches)] for i, size in enumerate(sizes)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    code = 'import surgery\n\nmodel = surgery.load("folder")'
    if not sized:
        code = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("folder")'
    only = "Its layers have sizes of their own, which `surgery.json` lists: only `surgery.load` opens this folder."
    return f"""---
library_name: {"surgery" if sized else "transformers"}
pipeline_tag: text-generation
tags: [layer-surgery]
---

# {name}

{len(sizes)} layers, made with surgery {surgery.__version__}. {only if sized else "A plain Hugging Face checkpoint."}
Weights: sha256 `{sha256}`.

```python
{code}
```
""" + (f"\n| layer | MLP width | heads | stream | branches |\n|---|---|---|---|---|\n{table}\n" if sized else "")


def _without_code(saved: Any, *configs: Any) -> Any:
    """``saved`` (a copy) without what would save the code of its class along, or name code to run when opened."""
    saved._auto_class = None  # noqa: SLF001 (transformers has no other name)
    for settings in (*map(vars, configs), vars(saved).get("init_kwargs", {})):
        settings.pop("auto_map", None)
    return saved


def _untied(hugging_face: PreTrainedModel, layers: str) -> PreTrainedModel:
    """A copy in which every repetition of a layer has weights of its own; everything else is shared with the model."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*hugging_face.parameters(), *hugging_face.buffers())}
    untied = copy.deepcopy(hugging_face, memo)
    modules = untied.get_submodule(layers)
    assert isinstance(modules, nn.ModuleList)
    seen: set[int] = set()
    for i, layer in enumerate(modules):
        first = next(layer.parameters())
        if id(first) in seen:
            modules[i] = copy.deepcopy(layer)
        seen.add(id(first))
    return untied


def _reopened(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no tokenizer is known
        try:
            opened = plain(load(folder, device=like.device, dtype=like.dtype))
        except ModelError as error:
            reported = str(error).replace(str(folder), "the checkpoint")
            raise ModelError(
                "a plain checkpoint cannot express this order of layers: a rule of the model's configuration, not a "
                f"list, says what the layer at each place is. Save the base model and the wiring instead ({reported})"
            ) from error
    assert opened is not None
    return opened
