"""Tasks of the EleutherAI evaluation harness on any model that surgery can open.

    harness.tasks(model, ["lambada_openai"], limit=200)                 with: pip install -e ".[eval]"

The harness calls the model inside the bridge, so hooks fire (``with model.hooks(...): harness.tasks(model, ...)``
measures the intervention), and a model taped together (``surgery.rebuild.tape.together``) is measured as taped.

Without network, and for questions of your own, a task is a YAML file beside its data. In a folder ``mine``:

    task: capitals                                                      mine/capitals.yaml
    dataset_path: json
    dataset_kwargs: {data_files: {test: /where/mine/capitals.jsonl}}    or relative to where Python runs
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"                                         the index of the right choice

and ``harness.tasks(model, ["capitals"], include="mine")``. Task files can name Python functions, which then run: take
only those that you trust. The standard errors are those of one model; the difference
of two models on the same questions is usually known better than they suggest. Control: the unmodified model.
"""

import contextlib
import copy
import difflib
import importlib
import io
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens import TransformerBridge

from surgery.models import twin

INSTALL = 'pip install -e ".[eval]"'


def tasks(
    model: TransformerBridge,
    names: Sequence[str],
    include: "str | Path | None" = None,
    limit: int | None = None,
    *,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Evaluate a model on tasks of the harness: a row per task and metric, with columns task, metric, value, stderr.

    A metric that the harness takes after a filter is called ``metric (filter)``; a standard error not given is NaN.

    Args:
        model: any that ``surgery.load`` gives.
        names: tasks, groups or tags that the harness knows, or YAML files.
        include: a folder with tasks of your own.
        limit: use only the first so many questions of each task.
        shots: worked examples before each question; None leaves it to the task.
        batch_size: sequences run at once.
        seed: draws the worked examples; the caller's random generators are left as they were.
        progress: show the harness's progress bars on standard error.

    Raises:
        ValueError: the harness is not installed, the model has no tokenizer or is not a Hugging Face model inside,
            there is no such task or folder, or a task's data cannot be had.

    Cost: a full forward per question and choice.
    """
    try:
        harness, models, registry = (
            importlib.import_module(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
        )
    except ImportError as error:
        raise ValueError(f"the evaluation harness is not installed ({error}): {INSTALL}") from error
    inside, tokenizer = model.original_model, twin.tokenizer(model)
    if tokenizer is None or not hasattr(inside, "config"):
        raise ValueError(
            f"{model.cfg.model_name} is not a Hugging Face model with a tokenizer, which the harness needs"
        )
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"there is no folder {include} with tasks")
    names = [str(name) for name in names]
    if not names:
        raise ValueError("name at least one task")
    with _undisturbed(seed, progress):
        own = None if include is None else str(include)
        known = registry.TaskManager(include_path=own, include_defaults=False)
        if not set(names) <= set(known.all_subtasks):
            known = registry.TaskManager(include_path=own)  # reads the thousands of tasks that it brings: some seconds
        for name in names:
            _require(name, known.all_tasks)
        try:
            loaded = known.load(names)
        except OSError as error:
            raise ValueError(f"the data of {', '.join(names)} cannot be had: {error}") from error
        for task in loaded["tasks"].values():
            usual = task.get_config("num_fewshot")
            if usual is None or (shots is not None and usual != 0):  # a task that says 0 means it
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=seed)
        # a copy: the harness gives a tokenizer without padding one of its own
        wrapped = models.HFLM(
            pretrained=inside, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, trust_remote_code=False
        )
        evaluation = harness.evaluate(wrapped, loaded, limit=limit, log_samples=False)
    return pd.DataFrame(_rows(evaluation["results"]), columns=["task", "metric", "value", "stderr"])


def _require(task: str, names: Sequence[str]) -> None:
    if task in names or Path(task).is_file():
        return
    close = difflib.get_close_matches(task, names, 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; give a folder with tasks of your own as include"
    raise ValueError(f"the harness knows no task {task!r}{hint}")


def _rows(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")  # the filter of the answers, or "none"
            if not filtered or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            yield task, name, float(value), float("nan") if isinstance(error, str | None) else float(error)


@contextlib.contextmanager
def _undisturbed(seed: int, progress: bool) -> Iterator[None]:
    """Seed the random generators and restore them; no log and, without ``progress``, no bars on standard error."""
    log = logging.getLogger("lm_eval")
    level, states = log.level, (random.getstate(), np.random.get_state())
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(), contextlib.ExitStack() as quiet:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            if not progress:
                quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        log.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
