"""Clusters, and numbers that are not finite: a Ray that stays, listens or grows; wirings that win by breaking down."""

import itertools
import signal
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import surgery
from support import exact_networks, fixtures
from support.attacks import Attack
from support.processes import Script
from support.scans import PROBES, same, slow_scan
from surgery import Stack, scan, wiring
from surgery.corpus.probes import Probe, ProbeSet
from surgery.scan import halving, own_ray, say, search
from surgery.scan.scanning import NotFiniteWarning
from surgery.stats import comparisons

CODES = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 1, "an error": 1, "nothing": 0}
WAYS = [  # how it ends, how many workers are asked for, whether at any moment while Ray begins
    *[("SIGKILL", 1, False), ("SIGTERM", 1000, False), ("SIGTERM", 1, True), ("SIGINT", 1000, False)],
    *[("SIGKILL", 1, True), ("an error", 1, False), ("nothing", 1000, False), ("SIGINT", 1, True)],
]
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
HOLES = (np.nan, np.inf, -np.inf)


def every_end(count, folder):
    """Scans with a Ray of their own, ended in every way in the midst of rows, or at once, while Ray begins."""
    model, rng = str(fixtures.save("llama", folder / "llama")), np.random.default_rng(0)
    stack, wirings = Stack(surgery.load(model)), list(wiring.every_repeat(4))
    expected = scan.run(stack, wirings, PROBES)
    for number, (way, workers, at_once) in enumerate(itertools.islice(itertools.cycle(WAYS), count)):
        out = folder / f"{number}.csv"
        with tempfile.TemporaryDirectory(dir="/tmp") as place:  # the paths of sockets must be short
            code = slow_scan(model, out, 0.3, workers=workers, most=4 if way == "an error" else 1000)
            process = Script(code, environment={"RAY_TMPDIR": place})
            next(line for line in process.output if line.strip().isdigit() and int(line) >= (1 if at_once else 4))
            if at_once:
                time.sleep(rng.uniform(0, 6))
            parts = _parts(place)
            elsewhere = {at.laddr.ip for part in parts for at in part.net_connections() if at.status == "LISTEN"}
            elsewhere -= {*LOOPBACK}
            replicas = sum(part.cmdline()[0].startswith("ray::Replica") for part in parts)
            if way.startswith("SIG"):
                process.send(getattr(signal, way))
            ended, said = process.wait(), process.errors
            patience = time.monotonic() + 10
            while (left := [*_parts(place), *Path(place).iterdir()]) and time.monotonic() < patience:
                time.sleep(0.1)
        told = f"{way} with {workers} workers{' at once' * at_once}"
        if elsewhere:
            yield f"{told}: it listens on {elsewhere}"
        elif replicas > own_ray.processors():
            yield f"{told}: {replicas} workers run on {own_ray.processors()} processors"
        elif left:
            yield f"{told}: it left {left}"
        elif ended != CODES[way] and not (at_once and ended == -signal.SIGTERM):  # before Ray begins, nothing is ours
            yield f"{told}: it ended with {ended} and {said[-200:]}"
        elif way == "SIGTERM" and ("Traceback" in said or "stack trace" in said.lower()):
            yield f"{told}: it said {said[-300:]}"
        elif not same(scan.run(stack, wirings, PROBES, out), expected):
            yield f"{told}: the rest gave another table"
        else:
            yield None


def _parts(place):
    """The processes that have a file in ``place`` open: those of a Ray, and the one that began it."""
    parts = []
    for process in psutil.process_iter():
        try:
            if any(file.path.startswith(place) for file in process.open_files()):
                parts.append(process)
        except psutil.Error:
            continue
    return parts


def planted(count, folder):
    """Tables of scans with NaN and infinities in random places, of all metrics, with groups and clusters."""
    for number in range(count):
        rng = np.random.default_rng(number)
        wirings, prompts, metric = 8, 24, ("loglik", "loss", "kl", "exact")[number % 4]
        d = rng.normal(rng.uniform(-1, 1, (wirings, 1)), rng.uniform(0.1, 2), (wirings, prompts))
        broken, left_out = rng.choice(wirings, rng.integers(1, 4), replace=False), rng.random(prompts) < 0.1
        holes = np.zeros_like(d, bool)
        for place in broken:
            d[place] += rng.choice([0, 3])  # what is left of it may well gain
            chosen = rng.random(prompts) < rng.choice([0.05, 0.5, 0.95])
            holes[place] = chosen if chosen.any() else np.arange(prompts) == rng.integers(prompts)
        names = [f":{place + 2} 1:" for place in range(wirings)]
        frame = _frame(d, names, metric, holes, left_out, rng)
        lost = {names[place]: int((holes[place] & ~left_out).sum()) for place in broken}
        lost = {name: count for name, count in lost.items() if count}
        yield _problem(frame, metric, lost, prompts - int(left_out.sum()), cluster=[None, "cluster"][number % 2])


def _frame(d, names, metric, holes, left_out, rng):
    """Rows of a scan with the gains ``d``; numbers of every kind that is not finite in the ``holes``."""
    sign = -1 if metric in comparisons.LESS_IS_BETTER else 1
    wirings, prompts = d.shape
    baseline = np.where(left_out, rng.choice(HOLES, prompts), rng.normal(-3, 1, prompts))
    values = np.where(holes, rng.choice(HOLES, d.shape), np.nan_to_num(baseline, posinf=0, neginf=0) + sign * d)
    values = np.where(left_out & (rng.random(d.shape) < 0.5), rng.choice(HOLES, d.shape), values)
    return pd.DataFrame(
        {
            "wiring": np.repeat(names, prompts),
            "prompt": np.tile(np.arange(prompts), wirings),
            "group": np.tile(np.arange(prompts) // 8, wirings).astype(str),
            "cluster": np.tile(np.arange(prompts) // 2, wirings),
            "metric": metric,
            "value": values.ravel(),
            "baseline": np.tile(baseline, wirings),
        }
    )


def _problem(frame, metric, lost, prompts, cluster):
    """What went wrong where the wirings ``lost`` are not finite on so many of the ``prompts`` that can be compared."""
    options = {"resamples": 50, "cluster": cluster}
    table = comparisons.table(frame, metric, **options).set_index("wiring")
    whole = table.index.difference(list(lost))
    if len(lost) and len(whole) and table.loc[list(lost), "gain"].max() >= table.loc[whole, "gain"].min():
        return f"{lost} are not below {table['gain'].to_dict()}"
    if len(lost) and (table.loc[list(lost), ["p", "p_max", "q"]] != 1).any(axis=None):
        return f"something is claimed of {lost}"
    if (table["n_prompts"] != prompts).any() or table["n_not_finite"].to_dict() != dict.fromkeys(table.index, 0) | lost:
        return f"counted {table[['n_prompts', 'n_not_finite']]}, not {lost} of {prompts}"
    alone = comparisons.table(frame[frame["wiring"].isin(whole)], metric, **options).set_index("wiring")
    if len(whole) and not np.allclose(alone.loc[whole, "p_max"], table.loc[whole, "p_max"]):
        return f"{lost} changed what is said of others"
    by_group = comparisons.table(frame, metric, by_group=True, **options)
    sums = by_group.groupby("wiring", sort=False)["n_not_finite"].sum()
    if (
        not (sums.loc[table.index] == table["n_not_finite"]).all()
        or np.isneginf(by_group["gain"]).sum() != (by_group["n_not_finite"] > 0).sum()
    ):
        return "the groups say something else"
    winners = comparisons.winners(frame, frame.copy(), metric, top=len(table), **options)
    verdicts = winners.set_index("wiring")["verdict"]
    if (
        winners["wiring"].tail(len(lost)).isin(list(lost)).sum() < len(lost)
        or (verdicts[list(lost)] != "no gain").any()
    ):
        return f"{lost} among the winners: {verdicts.to_dict()}"
    luck = comparisons.expected_best(frame, metric, **options)
    said = " ".join(say.search(table.reset_index(), luck, metric))
    if any(f"{name} on {count} of {prompts}" not in said for name, count in lost.items()):
        return f"{lost} are not told: {said}"
    return None


def overflows(count, folder):
    """A network without norms: where a layer runs twice, the attention after it overflows on prompts of loud words."""
    for number in range(count):
        rng, generator = np.random.default_rng(number), exact_networks.rng(number)
        layer, loud = int(rng.integers(3)), rng.random(fixtures.N_VOCAB) < rng.choice([0.05, 0.4, 0.9])
        loud[10], loud[11] = True, False
        embedding = torch.randn(fixtures.N_VOCAB, 16, generator=generator)
        embedding = embedding * torch.tensor(np.where(loud, 1e4, 1.0))[:, None]
        maps = [torch.randn(16, 16, generator=generator) * 0.1 for _ in range(4)]
        maps[layer] = 1e76 * torch.eye(16, dtype=torch.float64)
        model = exact_networks.network(maps, embedding.double())
        with torch.no_grad():
            exact_networks.parameters(model)["head.weight"].mul_(1e-76)
        model.tokenizer = fixtures.tokenizer()
        stack = Stack(model)
        words = [10, 11, *rng.choice(fixtures.N_VOCAB - 4, 10)]
        probes = ProbeSet("words", tuple(Probe(f"w5 w{word}", f"w{rng.integers(90)}") for word in words))
        yield _overflow(stack, probes, layer)


def _overflow(stack, probes, layer):
    """What went wrong where a wiring that runs ``layer`` twice overflows on some of the probes."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        frame = scan.run(stack, wiring.every_repeat(4), probes, metrics=("loglik", "exact", "kl"))
    twice = set(frame.loc[~np.isfinite(frame["value"]), "wiring"])  # a score of -inf is masked, and no overflow
    if bool(twice) != any(issubclass(one.category, NotFiniteWarning) for one in told):
        return f"{twice} are not finite, and {len(told)} warnings say so"
    if any(stack.wiring(text).layers.count(layer) < 2 for text in twice):
        return f"{twice} are not finite though the layer runs once"
    for metric in ("loglik", "exact", "kl"):
        table = comparisons.table(frame, metric, resamples=50).set_index("wiring")
        broken = set(table.index[table["n_not_finite"] > 0])
        if broken != twice:
            return f"{metric} of {broken} is not finite, not of {twice}"
        if not np.isneginf(table.loc[list(broken), "gain"]).all():
            return f"{metric} of a broken wiring gains"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotFiniteWarning)
        found = search.beam(stack, probes, width=3, depth=2)
        table = halving.search(stack, wiring.every_repeat(4), probes, share=0.7).table.set_index("wiring")
    if not found.loc[found["level"] == 1, "wiring"].tail(len(twice)).isin(twice).all():
        return "the beam ranks a broken wiring above a whole one"
    measured = table[table["n_prompts"] > 0]
    if np.isnan(table["gain"]).any() or measured.loc[measured.index.isin(twice), "gain"].max() > -np.inf:
        return f"the search in rounds ranks a broken wiring: {table}"
    return None


ATTACKS = [
    Attack("A scan with a Ray of its own ends, in every way and at any moment", every_end, 1, 8, "all: every address"),
    Attack("Tables with NaN and infinities planted in them", planted, 8, 200, "100 of 100"),
    Attack("A layer overflows where it runs twice", overflows, 2, 30),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_nothing_fails(attack, tmp_path):
    attack.hold(tmp_path)
