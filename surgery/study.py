"""One study: a model and prompts in; CSV files, manifests, figures and ``report.html`` out. ``surgery study``.

    series       ``series_windows.csv``    how serial every window of layers is          (surgery.series.windows)
    reversion    ``reversion_*.csv``       whether the stream reverts to a mean          (surgery.reversion.study)
    scan         ``scan_table.csv`` ...    which repeated spans help, and does it last   (surgery.scan.study)
    anatomy      ``anatomy_ends.csv`` ...  where the parts of the model begin and end    (surgery.anatomy.study)

With ``series`` comes ``calibration.csv``: the same on networks whose answer is known, and on the model untrained;
``measures.csv``, every other measure of series on all of these; and ``costs.csv``, what each takes.
Each file is written when its measurement is done; what an interruption leaves is whole. The scan asks the bundled model
questions of its own kind, any other (or the bundled one, given a text) every token of the prompts. It goes first, as it
is the one that goes on where it was, and refuses at once a folder that holds a scan of something else.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from surgery import report
from surgery.anatomy import boundaries, convergence, study
from surgery.chapters import MEASURED
from surgery.corpus import bundled, probes
from surgery.corpus.text_files import read_prompts
from surgery.instruments import known_networks
from surgery.models import loading as models
from surgery.models.loading import load
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.records import manifest as provenance
from surgery.records import tables
from surgery.reversion import study as reversion_study
from surgery.scan import study as scan_study
from surgery.series import chapter, side_by_side
from surgery.series import window as series
from surgery.stats.sampling import Sampling

FEWEST = 16  # prompts for the anatomy: half of them place the boundaries, half test them
MODEL_PROMPTS = 64  # prompts for the table of all measures
Say = Callable[[str], Any]


def run(
    names: Sequence[str] = MEASURED,
    model: str = models.REFERENCE,
    text: str | Path | None = None,
    out: str | Path = "results",
    *,
    prompts: int = 256,
    max_tokens: int = 128,
    max_length: int | None = None,
    seed: int = 0,
    say: Say = lambda _: None,
    progress: bool = False,
) -> Path:
    """Measure ``model`` on ``prompts`` prompts and return the path of the report.

    Args:
        names: which measurements, of ``MEASURED``.
        model: what ``surgery.load`` takes.
        text: file of prompts (see ``read_prompts``); None means the bundled model's own problems.
        out: folder for the results, made if need be.
        prompts: how many prompts, the first ones of the file; max_tokens: prompts are cut to this length.
        max_length: longest window of layers, and longest span repeated; None means all.
        say: told, in words, what begins.

    Raises:
        ValueError: unknown name, no prompts to be had, a text file or a model that cannot be used.
        OSError: the folder cannot be written to (found out before anything is measured), or the disk is full.

    >>> import tempfile
    >>> run(["reversion"], "babel", out=tempfile.mkdtemp(), prompts=5).name
    'report.html'
    """
    for name in names:
        if name not in MEASURED:
            raise ValueError(f"there is no measurement {name!r}; there are {', '.join(MEASURED)}")
    folder = tables.folder(out)
    numbered = _prompts(model, text, prompts, seed)
    say(f"opening {model}")
    stack = Stack(load(model))
    tokens = tokenise(stack, numbered, text, max_tokens)
    if "scan" in names:
        asked, metric = _questions(numbered, text, min(max_tokens, stack.n_ctx), seed)
        if len(names) > 1 and len(set(asked.probes)) < scan_study.FEWEST:
            say(f"scan: left out, it needs at least {scan_study.FEWEST} different prompts")
        else:
            say("scan: every repeated span" + (f" of up to {max_length} layers" if max_length else ""))
            scan_study.measure(
                stack, asked, folder, metric=metric, longest=max_length, seed=seed, say=say, progress=progress
            )
    untrained = Stack(models.untrained(stack.model, seed))
    settings: dict[str, Any] = {
        "prompts": prompts,
        "max_tokens": max_tokens,
        "max_length": max_length,
        "text": text and str(text),
    }
    manifest = provenance.manifest(stack, tokens, seed=seed, **settings)
    if "series" in names:
        say(f"series: every window of {'up to ' + str(max_length) if max_length else 'two or more'} layers")
        frame = series.windows(stack, tokens, max_length, sampling=Sampling(seed=seed, progress=progress))
        tables.write(frame, folder / chapter.WINDOWS, manifest, series.COLUMNS)
        say("calibration: the same measure on networks whose answer is known")
        networks = calibrate(untrained, tokens, max_length, seed, progress)
        tables.write(networks, folder / chapter.NETWORKS, manifest, chapter.NETWORKS_COLUMNS)
        say("measures: every other reading of series and parallel, on the same networks")
        table, taken = compare(stack, untrained, tokens, seed)
        tables.write(table, folder / chapter.MEASURES_FILE, manifest, side_by_side.COLUMNS)
        tables.write(taken, folder / chapter.COSTS_FILE, manifest, side_by_side.COST_COLUMNS)
    if "reversion" in names:
        say("reversion: every layer, several layers, directions, coordinates, and the stream displaced")
        reversion_study.measure(stack, tokens, folder, untrained, seed=seed, progress=progress, settings=settings)
    if "anatomy" in names:
        if stack.n_layers < 6 or len(tokens) < FEWEST:
            if len(names) == 1:
                there = f"there are {stack.n_layers} and {len(tokens)}"
                raise ValueError(f"anatomy needs at least 6 layers and {FEWEST} prompts; {there}")
            say(f"anatomy: left out, it needs at least 6 layers and {FEWEST} prompts")
        else:
            say("anatomy: where the parts begin and end, and the ends against the middle")
            own, repeats = text is None, folder / scan_study.SEARCH
            study.measure(
                stack,
                tokens,
                folder,
                _kinds(len(tokens), seed) if own else None,
                utterances=convergence.babel() if own else convergence.parallel(),
                scan=tables.read(repeats) if "scan" in names and repeats.exists() else None,
                metric="loglik" if own else "loss",
                sampling=boundaries.SAMPLING.but(seed=seed),
            )
    say("report")
    return report.build(folder)


def compare(stack: Stack, untrained: Stack, tokens: Tokens, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every measure of ``surgery.series.side_by_side`` on the networks of known answer, the model and the same untrained (these
    from layer 1 on, of at most ``MODEL_PROMPTS`` prompts); and what each function costs."""
    few = Tokens(tokens.ids[:MODEL_PROMPTS], tokens.mask[:MODEL_PROMPTS])
    first = int(stack.n_layers > 2)
    table = pd.concat(
        [
            side_by_side.calibrate(side_by_side.networks(seed=seed), known_networks.tokens(24, 12, seed), seed=seed),
            side_by_side.calibrate({stack.name: stack, chapter.UNTRAINED: untrained}, few, first, seed=seed),
        ],
        ignore_index=True,
    )
    return table, side_by_side.costs(stack, few)


def _kinds(count: int, seed: int) -> list[str]:
    """Of the bundled model's own problems: those that only translate, and those that compose less and more."""
    steps = [problem.k for problem in bundled.problems(count, seed)]
    return ["k=0" if k == 0 else "k=1, 2" if k < 3 else "k=3, 4" for k in steps]


def calibrate(
    untrained: Stack, tokens: Tokens, max_length: int | None = None, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """``series.windows`` of networks with a known answer, and of the model untrained; ``network`` says which.

    The constructed ones normalise (RMS), so that their S_live shows what normalisation alone adds.
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
        name: series.windows(Stack(network), inputs, damage=False, sampling=Sampling(seed=seed))
        for name, network in networks.items()
    }
    parts[chapter.UNTRAINED] = series.windows(
        untrained, tokens, max_length, damage=False, sampling=Sampling(seed=seed, progress=progress)
    )
    return pd.concat([part.assign(network=name) for name, part in parts.items()], ignore_index=True)


def tokenise(stack: Stack, prompts: Sequence[tuple[int, str]], text: str | Path | None, max_tokens: int) -> Tokens:
    """The prompts as tokens; one that cannot be used is a ``ValueError`` that names its line."""
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
    if model not in models.BUNDLED:
        raise ValueError(
            f"{model} brings no prompts of its own; give a text file with --text FILE, one prompt per line"
        )
    return list(enumerate(bundled.prompts(count, seed), start=1))


def _questions(
    prompts: Sequence[tuple[int, str]], text: str | Path | None, max_tokens: int, seed: int
) -> tuple[probes.ProbeSet, str]:
    """What a scan asks, and the metric: problems of the bundled model by number of steps, else the prompts as text."""
    if text is None:
        return probes.named("babel", len(prompts), seed), "loglik"
    return probes.text([prompt for _, prompt in prompts], max_tokens=max_tokens), "loss"
