r"""Many wirings on many prompts, exactly, at the cost of few: ``scan.run(stack, wirings, probes)``.

Wirings become one graph in which no layer runs twice on the same stream (``surgery.scan.schedule``); streams that wait for
the same layer ride through it as one batch; a stream is forgotten when nothing needs it. What is left is the floor:
the layer executions that remain, times what a layer costs at that batch. Sharing beginnings alone can at most halve a
scan of repeated spans (after the jump every path is its own); the batches are what makes small inputs fast. Probes that
are too many for the memory are scanned in portions.

Rows are appended to ``<out>.part`` as wirings finish, flushed to the disk, and become the file ``out`` when all are
there. Killed at any moment, the same command goes on; another model, probe set or metric is refused, not mixed in.

========  ==========================================================================  ========================
metric    value, per probe                                                            better
========  ==========================================================================  ========================
loglik    sum of the log-probabilities of the answer's tokens, nats                   higher
exact     1 if every token of the answer is the first choice (greedy), else 0         higher
credit    the share of the answer whose tokens are the first choice                   higher
loss      mean over the scored tokens of -log p, nats                                 lower
kl        mean over the scored tokens of KL(unmodified || wiring), nats               0 is the unmodified model
choice    1 if the right choice has the highest loglik (probes with choices), else 0  higher
========  ==========================================================================  ========================

Compare with the unmodified model (column ``baseline``) by ``surgery.stats.comparisons``, which knows that the best of
thousands is lucky. Prior art runs the whole model per configuration: D. Ng (RYS), alainnothere (llm-circuit-finder).
"""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import psutil
import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from surgery.corpus.probes import Encoded, ProbeSet
from surgery.instruments.readout import log_probabilities, portions
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.records import manifest as provenance
from surgery.records import tables
from surgery.scan import schedule
from surgery.wiring.steps import Layer, Scaled, Step, executions
from surgery.wiring.value import Wiring

if TYPE_CHECKING:
    from surgery.scan.cluster import Cluster, Pool

METRICS = ("loglik", "exact", "credit", "loss", "kl", "choice")
KEY = ["wiring", "prompt", "metric"]
COLUMNS = {
    "wiring": "the order in which the layers ran",
    "prompt": "index of the probe in its set",
    "group": "group of the probe",
    "metric": "what was measured: loglik, exact, credit, loss, kl or choice",
    "value": "its value on this probe under this wiring",
    "baseline": "its value on this probe in the unmodified model",
}

_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 32768}  # in one call of a layer: more is no faster (a CPU's caches are full)


@dataclass(frozen=True)
class Plan:
    """What a scan will cost, told beforehand. ``executions`` are layers run on the whole probe set, which is gone
    through in ``portions``, each in ``parts`` of the wirings."""

    wirings: int
    portions: int
    parts: tuple[tuple[int, ...], ...]
    group: int
    order: schedule.Order
    executions_naive: float
    executions_shared: float
    calls: int
    peak_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.wirings} wirings: {self.executions_shared:,.0f} layer executions instead of "
            f"{self.executions_naive:,.0f}, in {self.calls:,} calls"
            + (f" and {self.portions} portions of the probes" if self.portions > 1 else "")
            + f"; at most {self.peak_bytes / 2**20:,.0f} MiB at once, about {self.seconds:,.0f} s"
        )


def plan(
    stack: Stack, wirings: Iterable["Wiring | str"], probes: "ProbeSet | Tokens", memory: int | None = None
) -> Plan:
    """How a scan would run and what it would cost: executions, calls, memory, time (from a layer timed on the spot).

    ``memory`` in bytes bounds the streams held and the working memory of a layer; by default half of what is free.

    >>> from surgery.instruments import known_networks
    >>> tokens = Tokens.of(known_networks.tokens(2, 8))
    >>> plan(Stack(known_networks.random_network()), [":", ":2 1:"], tokens).executions_shared
    11.0
    """
    portions = (
        [probes] if isinstance(probes, Tokens) else [p.tokens for p in _portions(stack, probes.encode(stack), memory)]
    )
    one = _plan(stack, _distinct(stack, wirings), stack.context(portions[0].to(stack.device)), memory)
    count = len(portions)
    return replace(one, portions=count, calls=count * one.calls, seconds=count * one.seconds)


def execute(
    stack: Stack,
    wirings: Iterable["Wiring | str"],
    tokens: "Tokens | Tensor",
    consume: "Callable[[int, Float[Tensor, 'batch pos d_model']], None]",
    memory: int | None = None,
) -> None:
    """The stream that leaves every wiring, handed to ``consume(index, x)`` as it is ready, in no particular order."""
    given = [stack.wiring(wiring) for wiring in wirings]
    context = stack.context(Tokens.of(tokens).to(stack.device))
    scheme = _plan(stack, given, context, memory, timed=False)
    for part in scheme.parts:

        def finish(ends: list[int], x: Tensor, part: tuple[int, ...] = part) -> None:
            for index in ends:
                consume(part[index], x)

        _execute(stack, [given[i] for i in part], context, scheme, finish)


def run(
    stack: Stack,
    wirings: Iterable["Wiring | str"],
    probes: ProbeSet,
    out: "str | Path | None" = None,
    *,
    metrics: Sequence[str] = ("loglik", "exact"),
    memory: int | None = None,
    progress: bool = False,
    cluster: "Cluster | Pool | str | int | None" = None,
) -> pd.DataFrame:
    """One row per wiring, probe and metric: wiring, prompt, group, metric, value, baseline.

    ``out`` is a CSV file to fill, with a manifest beside it; without it nothing is kept if the scan is interrupted.
    Equal wirings are run once. Values equal those of each wiring run alone within 1e-5 relative. Cost: see ``plan``.
    ``cluster`` runs the same scan on a Ray cluster: a number of workers on this machine, ``"local"``, ``"auto"``, an
    address, or more exactly a ``surgery.scan.cluster.Cluster``; ``memory`` is then that of each worker.

    Raises ValueError for an unknown metric, for ``choice`` on probes without choices, and if ``out`` holds a scan of
    another model, probe set or choice of metrics.

    >>> from surgery.instruments import known_networks
    >>> from surgery.corpus import probes
    >>> network = known_networks.random_network()
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    encoded = probes.encode(stack)
    if "choice" in metrics and max(encoded.choice) == 0:
        raise ValueError("the metric 'choice' needs probes with choices, and these have none")
    given = _distinct(stack, wirings)
    identity = Wiring.of(stack.n_layers)
    table = _Table(out, _identity_of(stack, encoded, probes, metrics))
    portions = _portions(stack, encoded, memory)
    with Progress(disable=not progress, transient=True) as bar, ExitStack() as workers:
        task = bar.add_task("wirings", total=len(portions) * len(given))
        pool, first = None, 0
        for portion in portions:
            scorer = Scorer(stack, portion, metrics, first)
            first += len(portion.groups)
            if not table.has(identity, scorer):
                table.append(scorer.rows(identity, stack.execute(identity, scorer.context.x0, scorer.context)))
            missing = [wiring for wiring in given if not table.has(wiring, scorer)]
            bar.advance(task, len(given) - len(missing))

            def accept(rows: pd.DataFrame) -> None:
                table.append(rows)
                bar.advance(task)

            if cluster is None or not missing:
                measure(scorer, missing, memory, accept)
                continue
            if pool is None:
                from surgery.scan.cluster import joined

                pool = workers.enter_context(joined(cluster))
            pool.measure(scorer, missing, memory, accept)
    found = {text: _in_order(rows, metrics) for text, rows in table.found.items()}
    baseline = found[str(identity)]
    frame = pd.concat([found[str(wiring)] for wiring in given], ignore_index=True)
    reference = baseline.set_index(["prompt", "metric"])["value"]
    frame["baseline"] = reference.loc[pd.MultiIndex.from_frame(frame[["prompt", "metric"]])].to_numpy()
    if out is not None:
        table.close(frame, stack, encoded)
    return frame


def _in_order(portions: list[pd.DataFrame], metrics: Sequence[str]) -> pd.DataFrame:
    """The rows of all portions as if there had been one."""
    rows = pd.concat(portions, ignore_index=True)
    order = rows["metric"].map(list(metrics).index)
    return rows.iloc[np.lexsort((rows["prompt"], order))].reset_index(drop=True)


def measure(
    scorer: "Scorer", wirings: Sequence[Wiring], memory: int | None, accept: Callable[[pd.DataFrame], None]
) -> None:
    """Run the wirings here; the rows of each are handed to ``accept`` as it ends."""
    scheme = _plan(scorer.stack, wirings, scorer.context, memory, timed=False)
    for part in scheme.parts:
        chosen = [wirings[i] for i in part]

        def finish(ends: list[int], x: Tensor, chosen: list[Wiring] = chosen) -> None:
            for index in ends:
                accept(scorer.rows(chosen[index], x))

        _execute(scorer.stack, chosen, scorer.context, scheme, finish)


class Scorer:
    """The metrics of a final stream, per probe; ``first`` is the number of a portion's first probe in its set."""

    def __init__(self, stack: Stack, encoded: Encoded, metrics: Sequence[str], first: int = 0) -> None:
        self.stack, self.encoded, self.metrics, self.first = stack, encoded, tuple(metrics), first
        self.context = stack.context(encoded.tokens.to(stack.device))
        scored = encoded.scored.to(stack.device)
        self.before = torch.zeros_like(scored)
        self.before[:, :-1] = scored[:, 1:]  # the position that predicts a token is the one before it
        self.targets = encoded.tokens.ids.to(stack.device)[scored]
        self.row = scored.nonzero()[:, 0]
        share = scored.float() / scored.sum(1, keepdim=True) if encoded.credit is None else encoded.credit
        self.credit = share.to(stack.device)[scored].double().cpu()
        self.clean: Tensor | None = None
        if "kl" in self.metrics:
            self.clean = stack.stream(self.context)[-1][self.before]

    def rows(self, wiring: Wiring, x: Float[Tensor, "batch pos d_model"]) -> pd.DataFrame:
        n_rows, n_probes = len(self.encoded.probe), len(self.encoded.groups)
        loglik = torch.zeros(n_rows, dtype=torch.float64)
        wrong, credit, divergence, count = (torch.zeros_like(loglik) for _ in range(4))
        final = x[self.before]
        for some in portions(self.stack, final):
            log_p = log_probabilities(self.stack, final[some])
            row, target = self.row[some].cpu(), self.targets[some]
            loglik.index_add_(0, row, log_p.gather(1, target.unsqueeze(1)).squeeze(1).double().cpu())
            missed = (log_p.argmax(1) != target).double().cpu()
            wrong.index_add_(0, row, missed)
            credit.index_add_(0, row, (1 - missed) * self.credit[some.cpu()])
            count.index_add_(0, row, torch.ones(len(row), dtype=torch.float64))
            if self.clean is not None:
                clean = log_probabilities(self.stack, self.clean[some])
                divergence.index_add_(0, row, (clean.exp() * (clean - log_p)).sum(1).double().cpu())
        probe, choice = np.array(self.encoded.probe), np.array(self.encoded.choice)
        right = choice == 0
        values = {
            "loglik": loglik.numpy()[right],
            "exact": (wrong == 0).double().numpy()[right],
            "credit": credit.numpy()[right],
            "loss": (-loglik / count).numpy()[right],
            "kl": (divergence / count).numpy()[right],
        }
        if "choice" in self.metrics:
            best = pd.DataFrame({"probe": probe, "choice": choice, "loglik": loglik.numpy()})
            best = best.sort_values(["probe", "loglik", "choice"], ascending=[True, False, False])
            values["choice"] = (best.groupby("probe")["choice"].first() == 0).to_numpy(dtype=float)
        columns = {
            "wiring": str(wiring),
            "prompt": np.tile(np.arange(self.first, self.first + n_probes), len(self.metrics)),
            "group": list(self.encoded.groups) * len(self.metrics),
            "metric": np.repeat(self.metrics, n_probes),
            "value": np.concatenate([values[metric] for metric in self.metrics]),
        }
        return pd.DataFrame(columns)


class _Table:
    """Rows that survive a kill: blocks, one per wiring and portion, appended to a file and flushed; half a block is cut
    off again."""

    def __init__(self, out: "str | Path | None", identity: dict[str, str]) -> None:
        self.path = None if out is None else Path(out)
        self.identity = identity
        self.found: dict[str, list[pd.DataFrame]] = {}
        self.prompts: dict[str, set[int]] = {}
        if self.path is None:
            return
        tables.folder(self.path.parent)
        self.part = self.path.with_name(self.path.name + ".part")
        if self.path.exists():
            self._accept(tables.read(self.path), tables.read_manifest(self.path))
        if self.part.exists():
            self._resume()
        else:
            self._write(json.dumps(self.identity).encode() + b"\n", "wb")

    def has(self, wiring: Wiring, scorer: Scorer) -> bool:
        """Whether the rows of a wiring are there for every probe of a portion; a probe's rows come all at once."""
        probes = range(scorer.first, scorer.first + len(scorer.encoded.groups))
        return self.prompts.get(str(wiring), set()).issuperset(probes)

    def append(self, rows: pd.DataFrame) -> None:
        """Keep the rows of a wiring for probes that it has none for, in memory and on disk."""
        rows = self._book(rows)
        if self.path is not None and len(rows):
            block = [list(row) for row in rows.itertuples(index=False)]
            self._write(json.dumps(block, default=float).encode() + b"\n", "ab")

    def _book(self, rows: pd.DataFrame) -> pd.DataFrame:
        wiring = str(rows["wiring"].iloc[0])
        known = self.prompts.setdefault(wiring, set())
        rows = rows[~rows["prompt"].isin(known)]
        if len(rows):
            self.found.setdefault(wiring, []).append(rows)
            known.update(rows["prompt"])
        return rows

    def close(self, frame: pd.DataFrame, stack: Stack, encoded: Encoded) -> None:
        """All rows are there: the file gets its name, the part is removed."""
        assert self.path is not None
        manifest = provenance.manifest(stack, encoded.tokens, seed=0, probes=encoded.sha256) | {"scan": self.identity}
        tables.write(frame, self.path, manifest, COLUMNS)
        self.part.unlink(missing_ok=True)

    def _write(self, content: bytes, mode: str) -> None:
        try:
            with open(self.part, mode) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {self.part}: {tables.reason(error)}; rows before this one are kept") from error

    def _resume(self) -> None:
        content = self.part.read_bytes()
        lines = content.split(b"\n")
        whole = content.rfind(b"\n") + 1
        try:
            self._compare(json.loads(lines[0]), self.part)
        except json.JSONDecodeError:
            whole = 0  # killed while the first line was written
        if whole == 0:
            self._write(json.dumps(self.identity).encode() + b"\n", "wb")
            return
        for line in lines[1:-1]:
            rows = pd.DataFrame(json.loads(line), columns=["wiring", "prompt", "group", "metric", "value"])
            self._book(rows)
        with open(self.part, "r+b") as file:
            file.truncate(whole)

    def _accept(self, frame: pd.DataFrame, manifest: dict) -> None:
        assert self.path is not None
        self._compare(manifest.get("scan", {}), self.path)
        frame["group"] = frame["group"].fillna("")
        for _, rows in frame.groupby("wiring", sort=False):
            self._book(rows.drop(columns="baseline").reset_index(drop=True))
        clean = next(rows for _, rows in frame.groupby("wiring", sort=False))
        self._book(clean.assign(wiring=":", value=clean["baseline"]).drop(columns="baseline").reset_index(drop=True))

    def _compare(self, identity: dict[str, str], path: Path) -> None:
        for key, value in self.identity.items():
            if identity.get(key) != value:
                raise ValueError(
                    f"{path} holds a scan with another {key} ({identity.get(key)}, now {value}); "
                    "choose another file or remove it"
                )


def _identity_of(stack: Stack, encoded: Encoded, probes: ProbeSet, metrics: Sequence[str]) -> dict[str, str]:
    return {
        "model": stack.sha256[:16],
        "probe set": f"{probes.name} {encoded.sha256[:16]}",
        "choice of metrics": " ".join(metrics),
    }


def _distinct(stack: Stack, wirings: Iterable["Wiring | str"]) -> list[Wiring]:
    return list(dict.fromkeys(stack.wiring(wiring) for wiring in wirings))


def _plan(stack: Stack, wirings: Sequence[Wiring], context: Context, memory: int | None, timed: bool = True) -> Plan:
    tokens = context.tokens.ids.numel()
    stream = context.x0.numel() * context.x0.element_size()
    memory = free_memory(stack) // 2 if memory is None else memory
    working = _inside(stack) * tokens * context.x0.element_size()
    group = max(1, min(_TOKENS_AT_ONCE.get(stack.device.type, 8192) // tokens, memory // 4 // working))
    alive = max(2, (memory - group * working) // stream - group)

    def simulated(order: schedule.Order) -> tuple[list[tuple[int, ...]], list[schedule.Cost], schedule.Order]:
        parts = [tuple(part) for part in schedule.split(wirings, alive, group, order)] if wirings else []
        return parts, [schedule.simulate([wirings[i] for i in part], group, order) for part in parts], order

    orders: tuple[schedule.Order, ...] = ("up", "alternating") if group > 1 else ("deep",)
    parts, chosen, order = min(map(simulated, orders), key=lambda found: sum(cost.calls for cost in found[1]))
    executed = float(sum(cost.executions for cost in chosen))
    most = max((cost.alive for cost in chosen), default=0)
    return Plan(
        wirings=len(wirings),
        portions=1,
        parts=tuple(parts),
        group=group,
        order=order,
        executions_naive=float(schedule.naive_executions(wirings)),
        executions_shared=executed,
        calls=sum(cost.calls for cost in chosen),
        peak_bytes=(most + group) * stream + group * working,
        seconds=executed * _seconds(stack, context, group) if timed else float("nan"),
    )


def _inside(stack: Stack) -> int:
    """Numbers a token that a running layer needs beside the streams: its input and output, normed copies, queries, keys
    and values, the MLP's inside, and about as much again that the allocator holds between them (measured)."""
    return 14 * stack.d_model + 6 * int(getattr(stack.model.cfg, "d_mlp", None) or 4 * stack.d_model)


def _portions(stack: Stack, encoded: Encoded, memory: int | None) -> list[Encoded]:
    """The probes in even portions of which one layer and one stream for every layer fit into the memory."""
    memory = free_memory(stack) // 2 if memory is None else memory
    n_probes, size = len(encoded.groups), torch.finfo(stack.dtype).bits // 8
    needed = (_inside(stack) + (stack.n_layers + 2) * stack.d_model) * size * encoded.tokens.ids.numel()
    edges = np.linspace(0, n_probes, min(n_probes, math.ceil(needed / max(memory, 1))) + 1).round().astype(int)
    return [encoded.portion(int(first), int(stop)) for first, stop in itertools.pairwise(edges)]


def _seconds(stack: Stack, context: Context, group: int) -> float:
    """One layer on one stream, in a batch of ``group``: the best of three."""
    many = _repeated(stack, context, group)
    x = context.x0.repeat(group, 1, 1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        stack.execute("0", x, many)
        times.append(time.perf_counter() - start)
    return min(times) / group


def free_memory(stack: Stack) -> int:
    if stack.device.type == "cuda":
        return int(torch.cuda.mem_get_info(stack.device)[0])
    return int(psutil.virtual_memory().available)


def _repeated(stack: Stack, context: Context, count: int) -> Context:
    """The call context of ``count`` copies of a batch, without their embeddings."""
    tokens = context.tokens
    many = stack.context(Tokens(tokens.ids.repeat(count, 1), tokens.mask.repeat(count, 1)))
    return replace(many, recording=replace(many.recording, x0=context.x0))


def _execute(
    stack: Stack,
    wirings: Sequence[Wiring],
    context: Context,
    scheme: Plan,
    finish: Callable[[list[int], Tensor], None],
) -> None:
    size = len(context.x0)
    contexts: dict[int, Context] = {1: context}
    single = {step: Wiring(stack.n_layers, (step,)) for step in _layers(wirings)}

    def layer(step: Layer, streams: list[Tensor], kept: list[bool]) -> list[Tensor]:
        count = len(streams)
        if count not in contexts:
            contexts[count] = _repeated(stack, context, count)
        x = stack.execute(single[step], torch.cat(streams) if count > 1 else streams[0], contexts[count])
        if count != scheme.group and count > 1:
            del contexts[count]  # full groups recur, others hardly
        # what is kept longer than its neighbours must not hold their memory
        return [y.clone() if keep and count > 1 else y for y, keep in zip(x.split(size), kept, strict=True)]

    def combine(step: Step, x: Tensor, ends: list[Tensor]) -> Tensor:
        if isinstance(step, Scaled):
            return x + step.factor * (ends[0] - x)
        assert not isinstance(step, Layer)
        return sum(ends[1:], ends[0]) / len(ends) if step.mean else x + sum(end - x for end in ends)

    graph = schedule.Graph(wirings)
    graph.run(context.x0, layer, combine, finish, scheme.group, scheme.order)


def _layers(wirings: Sequence[Wiring]) -> set[Layer]:
    return set(itertools.chain.from_iterable(executions(wiring.steps) for wiring in wirings))
