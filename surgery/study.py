"""Run one study: a model and prompts in; CSV files, manifests, figures and ``report.html`` out. ``surgery study``.

    series       ``series_windows.csv``    how serial every window of layers is          (surgery.series.windows)
    reversion    ``reversion_*.csv``       whether the stream reverts to a mean          (surgery.reversion.study)
    scan         ``scan_table.csv`` ...    which repeated spans help, and does it last   (surgery.scan.study)
    anatomy      ``anatomy_ends.csv`` ...  where the parts of the model begin and end    (surgery.anatomy.study)

With ``series`` come ``calibration.csv``, the same on networks whose answer is known and on the model untrained;
``measures.csv``, every other measure of series on all of these; and ``costs.csv``, what each of them costs.
Each file is written when its measurement is done, so an interruption leaves only whole files. The scan asks the bundled
model questions of its own kind; any other model, or the bundled one when a text is given, it asks every token of the
prompts. It goes first because it is the one that can be resumed, and refuses at once a folder with a scan of something
else.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from surgery import disk, report
from surgery.anatomy import boundaries, convergence
from surgery.anatomy import study as anatomy_study
from surgery.chapters import MEASURED
from surgery.corpus import bundled, probes
from surgery.corpus.text_files import read_prompts
from surgery.instruments import known_networks
from surgery.models.loading import BUNDLED, REFERENCE, load, untrained
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.records import manifest, tables
from surgery.reversion import study as reversion_study
from surgery.scan import study as scan_study
from surgery.series import chapter, side_by_side, window
from surgery.stats.sampling import Sampling

FEWEST = 16  # prompts for the anatomy: half of them to place the boundaries, half to test them
MODEL_PROMPTS = 64  # prompts of the model for the table of all measures
Say = Callable[[str], Any]


def run(
    names: Sequence[str] = MEASURED,
    model: str = REFERENCE,
    text: str | Path | None = None,
    out: str | Path = "results",
    *,
    prompts: int = 256,
    max_tokens: int = 128,
    max_length: int | None = None,
    batch_size: int = Sampling().batch_size,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    say: Say = lambda _: None,
    progress: bool = False,
) -> Path:
    """Measure ``model`` on ``prompts`` prompts and return the path of the report.

    Args:
        names: which measurements, of ``MEASURED``.
        model: what ``surgery.load`` takes.
        text: a file of prompts (see ``read_prompts``); None means the bundled model's own problems.
        out: the folder for the results, made if it is missing.
        prompts: how many prompts, the first ones of the file.
        max_tokens: prompts are cut to this many tokens.
        max_length: the longest window of layers, and the longest span repeated; None means all.
        batch_size: prompts run at once.
        device, dtype: as for ``surgery.load``.
        seed: of everything drawn.
        say: called with a line of words whenever a part of the study begins.
        progress: draw progress bars on standard error.

    Raises:
        ValueError: a name is unknown, there are no prompts, or the text file or the model cannot be used.
        OSError: the folder cannot be written to (noticed before anything is measured), or the disk is full.

    >>> run(["sequel"])
    Traceback (most recent call last):
    ValueError: there is no measurement 'sequel'; there are series, reversion, scan, anatomy
    """
    for name in names:
        if name not in MEASURED:
            raise ValueError(f"there is no measurement {name!r}; there are {', '.join(MEASURED)}")
    with disk.held(out) as folder:
        numbered = _prompts(model, text, prompts, seed)
        say(f"opening {model}")
        stack = Stack(load(model, device=device, dtype=dtype))
        tokens = tokenise(stack, numbered, text, max_tokens)
        if "scan" in names:
            questions, metric = _questions(numbered, text, min(max_tokens, stack.n_ctx), seed)
            if len(names) > 1 and len(set(questions.probes)) < scan_study.FEWEST:
                say(f"scan: left out, it needs at least {scan_study.FEWEST} different prompts")
            else:
                say("scan: every repeated span" + (f" of up to {max_length} layers" if max_length else ""))
                scan_study.measure(
                    stack,
                    questions,
                    folder,
                    metric=metric,
                    longest=max_length,
                    seed=seed,
                    batch_size=batch_size,
                    say=say,
                    progress=progress,
                )
        fresh = Stack(untrained(stack.model, seed))
        settings: dict[str, Any] = {
            "prompts": prompts,
            "max_tokens": max_tokens,
            "max_length": max_length,
            "text": text and str(text),
        }
        about = manifest.manifest(stack, tokens, seed=seed, **settings)
        if "series" in names:
            say(f"series: every window of {'up to ' + str(max_length) if max_length else 'two or more'} layers")
            frame = window.windows(
                stack,
                tokens,
                max_length,
                untrained=fresh,
                sampling=Sampling(seed=seed, batch_size=batch_size, progress=progress),
            )
            tables.write(frame, folder / chapter.WINDOWS, about, window.COLUMNS)
            say("calibration: the same measure on networks whose answer is known")
            networks = calibrate(fresh, tokens, max_length, seed, progress)
            tables.write(networks, folder / chapter.NETWORKS, about, chapter.NETWORKS_COLUMNS)
            say("measures: every other measure of series and parallel, on the same networks")
            measures, costs = compare(stack, fresh, tokens, seed)
            tables.write(measures, folder / chapter.MEASURES_FILE, about, side_by_side.COLUMNS)
            tables.write(costs, folder / chapter.COSTS_FILE, about, side_by_side.COST_COLUMNS)
        if "reversion" in names:
            say("reversion: every layer, several layers, directions, coordinates, and the stream displaced")
            reversion_study.measure(
                stack,
                tokens,
                folder,
                fresh,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
                settings=settings,
                figures=False,
            )
        if "anatomy" in names:
            if stack.n_layers < 6 or len(tokens) < FEWEST:
                if len(names) == 1:
                    raise ValueError(
                        f"anatomy needs at least 6 layers and {FEWEST} prompts; there are {stack.n_layers} and "
                        f"{len(tokens)}"
                    )
                say(f"anatomy: left out, it needs at least 6 layers and {FEWEST} prompts")
            else:
                say("anatomy: where the parts begin and end, and the ends against the middle")
                own, repeats = text is None, folder / scan_study.SEARCH
                try:
                    anatomy_study.measure(
                        stack,
                        tokens,
                        folder,
                        _kinds(len(tokens), seed) if own else None,
                        utterances=convergence.babel() if own else convergence.parallel(),
                        scan=tables.read(repeats) if "scan" in names and repeats.exists() else None,
                        metric="loglik" if own else "loss",
                        sampling=boundaries.SAMPLING.but(seed=seed, batch_size=batch_size),
                        figures=False,
                    )
                except boundaries.UndefinedError as error:
                    if len(names) == 1:
                        raise
                    say(f"anatomy: left out, {error}")
        say("report")
        return report.build(folder)


def compare(stack: Stack, fresh: Stack, tokens: Tokens, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every measure of ``surgery.series.side_by_side``, and what each function costs.

    The measures are taken on the networks whose answer is known, and on the model and ``fresh``, the same model
    untrained: these from layer 1 on, and on at most ``MODEL_PROMPTS`` prompts.
    """
    few = Tokens(tokens.ids[:MODEL_PROMPTS], tokens.mask[:MODEL_PROMPTS])
    first = int(stack.n_layers > 2)
    costs: list[dict[str, Any]] = []
    constructed = side_by_side.networks(seed=seed)
    table = pd.concat(
        [
            side_by_side.calibrate(constructed, known_networks.tokens(24, 12, seed), seed=seed),
            side_by_side.calibrate({stack.name: stack, chapter.UNTRAINED: fresh}, few, first, seed=seed, costs=costs),
        ],
        ignore_index=True,
    )
    return table, pd.DataFrame(costs, columns=list(side_by_side.COST_COLUMNS))


def _kinds(count: int, seed: int) -> list[str]:
    """The kinds of the bundled model's problems: those that only translate, that compose a little, or a lot."""
    steps = [problem.k for problem in bundled.problems(count, seed)]
    return ["k=0" if k == 0 else "k=1, 2" if k < 3 else "k=3, 4" for k in steps]


def calibrate(
    fresh: Stack, tokens: Tokens, max_length: int | None = None, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """``series.windows`` of networks with a known answer and of ``fresh``, the model untrained; ``network`` names them.

    The constructed networks normalise (RMS), so that their S_live shows what normalisation alone adds.
    """
    exact: dict[str, Any] = {"norm": "RMS", "dtype": torch.float64, "seed": seed}
    networks = {
        "parallel": known_networks.parallel_network(**exact),
        **{f"mixed {share}": known_networks.mixed_network(share, **exact) for share in (0.25, 0.5, 0.75)},
        "serial": known_networks.serial_network(**exact),
        "linear": known_networks.linear_network(seed=seed),
        **{f"random {i}": known_networks.random_network(seed=seed + i) for i in range(3)},
    }
    inputs = Tokens.of(known_networks.tokens(seed=seed))
    parts = {
        name: window.windows(Stack(network), inputs, damage=False, sampling=Sampling(seed=seed))
        for name, network in networks.items()
    }
    parts[chapter.UNTRAINED] = window.windows(
        fresh, tokens, max_length, damage=False, sampling=Sampling(seed=seed, progress=progress)
    )
    return pd.concat([part.assign(network=name) for name, part in parts.items()], ignore_index=True)


def tokenise(stack: Stack, prompts: Sequence[tuple[int, str]], text: str | Path | None, max_tokens: int) -> Tokens:
    """Tokenize numbered prompts. Raises ``ValueError``, naming its line, for one that cannot be used."""
    longest = min(max_tokens, stack.n_ctx)
    for line, prompt in prompts:
        try:
            stack.tokens([prompt], longest)
        except ValueError as error:
            where = f"{text}, line {line}: " if text else ""
            raise ValueError(where + str(error).replace("prompt 1", "the prompt", 1)) from error
    return stack.tokens([prompt for _, prompt in prompts], longest)


def _prompts(model: str, text: str | Path | None, count: int, seed: int) -> list[tuple[int, str]]:
    if text is not None:
        return read_prompts(text, count)
    if model not in BUNDLED:
        raise ValueError(
            f"{model} brings no prompts of its own; give a text file with --text FILE, one prompt per line"
        )
    return list(enumerate(bundled.prompts(count, seed), start=1))


def _questions(
    prompts: Sequence[tuple[int, str]], text: str | Path | None, max_tokens: int, seed: int
) -> tuple[probes.ProbeSet, str]:
    """The questions and the metric of the scan: the bundled model's own problems, or the prompts as text."""
    if text is None:
        return probes.named("babel", len(prompts), seed), "loglik"
    return probes.text([prompt for _, prompt in prompts], max_tokens=max_tokens), "loss"
