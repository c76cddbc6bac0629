"""Scans on more than one machine: ``scan.run(stack, wirings, probes, out, cluster=...)`` on a Ray cluster.

    cluster=4                                  four workers on this machine: a Ray of its own, which no other machine
                                               can reach (``surgery.scan.own_ray``), shut down again
    cluster="auto"                             the cluster that ``ray start`` began here
    cluster="head:6379", "ray://head:10001"    the cluster at that address
    cluster=Cluster("auto", workers=8, gpus=2, model="org/name", device_map="auto")

Every worker is a process with a replica of the model. The wirings are cut into about four shards per worker, whose
members share their beginnings (``surgery.scan.schedule.shards``); a worker that is free takes the next. Rows come back
as wirings finish and go into the one resumable table of the process that called ``scan.run``: workers keep nothing. A
worker that is lost costs the rows it had not handed over; its wirings are given out again, and a new worker takes its
place.

The machines need this package and the same versions of Python and Ray, but no shared disk: by default the weights
travel, once per machine, through Ray's object store. Where they are too large for that, ``model`` names what every
worker can load by itself, and ``device_map`` is what transformers then gets (a worker was tried with one device only).
Either way a worker whose weights are not those of the stack is refused.
"""

import importlib
import io
import logging
import math
import os
import platform
import queue
import socket
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from surgery.models import loading
from surgery.models.errors import ModelError
from surgery.models.half_precision import layers_of
from surgery.models.stack import Stack
from surgery.scan import execution, own_ray, schedule
from surgery.scan.scores import Scorer
from surgery.wiring.value import Wiring

INSTALL = 'pip install -e ".[cluster]"'
SHARDS = 4  # per worker: with fewer, workers idle at the end; with more, common beginnings run more often
_LOCAL = "local"


@dataclass(frozen=True)
class Cluster:
    """Where a scan runs.

    Attributes:
        address: ``"local"`` (a Ray started for it), ``"auto"``, ``"host:port"`` or ``"ray://host:port"``. A process
            that is connected to a Ray already uses that one and leaves it as it is. What ``ray start`` begins listens
            on every address of its machine, and so does this process once it has joined it.
        workers: by default as many as the GPUs allow; without GPUs, one for four processors. At most one a processor,
            and no more than the weights fit into the memory: whoever asks for more is warned and gets that many.
        gpus: of each worker; by default one if the stack is on a GPU, else none.
        model: what each worker loads by itself; by default the weights are sent.
        device_map: how that model lies on a worker's GPUs.
    """

    address: str = _LOCAL
    workers: int | None = None
    gpus: int | None = None
    model: str | None = None
    device_map: "str | dict[str, Any] | None" = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"a scan needs at least 1 worker, not {self.workers}")
        if self.device_map is not None and self.model is None:
            raise ValueError("device_map is for a model that workers load by themselves: say which with model=...")

    @classmethod
    def of(cls, cluster: "Cluster | str | int") -> "Cluster":
        """The cluster of a number of workers on this machine, or at an address.

        >>> Cluster.of(2) == Local(workers=2), Cluster.of("auto").address
        (True, 'auto')
        """
        if isinstance(cluster, Cluster):
            return cluster
        return cls(workers=cluster) if isinstance(cluster, int) else cls(cluster)


Local = partial(Cluster, _LOCAL)


@contextmanager
def joined(cluster: "Cluster | Pool | str | int") -> "Iterator[Pool]":
    """Workers that load the model only once for several scans: ``with joined(4) as pool: scan.run(..., cluster=pool)``.

    Raises ValueError where Ray is not installed, OSError where no cluster answers.
    """
    if isinstance(cluster, Pool):
        yield cluster
        return
    cluster = Cluster.of(cluster)
    ray = _ray()
    with nullcontext() if ray.is_initialized() else _connected(ray, cluster):
        pool = Pool(ray, cluster)
        try:
            yield pool
        finally:
            pool.dismiss()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the new way, without a warning about the old
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(f"a scan on a cluster needs Ray, which is not installed ({error}): {INSTALL}") from error


@contextmanager
def _connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with own_ray.terminable() as stay_terminable, ExitStack() as end:
        try:
            if cluster.address == _LOCAL:
                processors = own_ray.processors()
                count = min(cluster.workers or processors, processors)
                end.enter_context(own_ray.begun(ray, num_cpus=count, **options))
            else:
                host, _, port = cluster.address.removeprefix("ray://").rpartition(":")
                if host:
                    socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself tries for many minutes
                end.callback(ray.shutdown)
                ray.init(cluster.address, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(
                f"no Ray cluster at {cluster.address!r} ({_line(error)}): begin one with ray start --head, "
                f"or run on this machine alone with {_LOCAL!r}"
            ) from error
        stay_terminable()
        yield


@dataclass(frozen=True)
class _Source:
    """What a replica is made from: the name of a model to load, or ``shipped`` weights in the object store."""

    name: str
    sha256: str  # of the weights
    dtype: torch.dtype
    device_map: "str | dict[str, Any] | None" = None
    shipped: Any = None

    def load(self, device: str) -> Stack:
        if self.shipped is not None:
            model, tokenizer = _unpack(_ray().get(self.shipped), device)
            stack = Stack(loading.load(model, tokenizer=tokenizer))
        elif self.device_map is not None:
            stack = Stack(_spread(self.name, self.dtype, self.device_map))
        else:
            stack = Stack(loading.load(self.name, device=device, dtype=self.dtype))
        if stack.sha256 != self.sha256:
            raise ModelError("its weights are not those of the model that is scanned")
        return stack


class Replica:
    """A worker process: a model, and a thread that measures while rows are fetched."""

    def __init__(self) -> None:
        self.stack: Stack | None = None
        self.sha256 = self.precision = ""

    def pid(self) -> int:
        return os.getpid()

    def open(
        self, source: _Source, probes: bytes, device: str, neighbours: int, memory: int | None
    ) -> tuple[list[pd.DataFrame], str]:
        """Get ready for a scan. Like ``rows`` this returns rows (none here) and what went wrong, if anything did.

        ``probes`` are packed: what is asked, the metrics, the precision; ``neighbours`` share the machine.
        """
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
        try:
            if self.stack is None or self.sha256 != source.sha256:
                self.stack, self.sha256, self.precision = source.load(device), source.sha256, ""
            encoded, metrics, precision = _unpack(probes, str(self.stack.device))
            if self.precision != precision:
                self.layers, self.precision = layers_of(self.stack, precision), precision
            self.scorer = Scorer(self.stack, encoded, metrics, self.layers)
            sharing = neighbours if self.stack.device.type == "cpu" else 1
            self.memory = execution.free_memory(self.stack) // 2 // sharing if memory is None else memory
        except Exception as error:  # whatever a model, its files or its classes may raise
            return [], f"a worker on {platform.node()} cannot open {source.name}: {_line(error)}"
        return [], ""

    def rows(self, wirings: list[Wiring] | None = None) -> tuple[list[pd.DataFrame], str]:
        """Start measuring ``wirings``, if given; then wait for rows, and return those that are ready."""
        if wirings is not None:
            self.ready: queue.SimpleQueue[pd.DataFrame | str] = queue.SimpleQueue()
            threading.Thread(target=self._measure, args=(wirings, self.ready.put), daemon=True).start()
        results = [self.ready.get()]
        while not self.ready.empty():
            results.append(self.ready.get())
        problems = [result for result in results if isinstance(result, str)]
        return [result for result in results if not isinstance(result, str)], "".join(problems)

    def _measure(self, wirings: list[Wiring], put: Callable[["pd.DataFrame | str"], None]) -> None:
        try:
            execution.measure(self.scorer, wirings, self.memory, put)
        except Exception as error:
            put(f"a worker on {platform.node()} failed: {_line(error)}")


@dataclass(eq=False)
class _Worker:
    """A replica as the pool sees it: the actor, and the wirings whose rows it has not handed over yet."""

    actor: Any
    pending: dict[str, Wiring] = field(default_factory=dict)


class Pool:
    """Workers that stay, with their models, from one scan to the next; made by ``joined``."""

    def __init__(self, ray: Any, cluster: Cluster) -> None:
        self.ray, self.cluster = ray, cluster
        self.workers: list[_Worker] = []
        self.sent = 0  # wirings given out, counting those given out again
        self._shipped: tuple[str, Any] = ("", None)

    def measure(
        self,
        scorer: Scorer,
        wirings: Sequence[Wiring],
        memory: int | None,
        accept: Callable[[pd.DataFrame], None],
    ) -> None:
        """Run the wirings on the workers, and hand the rows of each to ``accept`` once: ``surgery.scan.measure``.

        Raises:
            ModelError: the workers cannot open the model, or hooks are attached to it, which they would not have.
            ValueError: the cluster has too few GPUs.
            OSError: one worker after another was lost.
        """
        try:
            self._measure(scorer, wirings, memory, accept)
        except BaseException:
            if any(worker.pending for worker in self.workers):
                self.dismiss()  # they are still working
            raise

    def dismiss(self) -> None:
        """Stop all workers."""
        for worker in self.workers:
            self.ray.kill(worker.actor)
        self.workers.clear()

    def _measure(
        self,
        scorer: Scorer,
        wirings: Sequence[Wiring],
        memory: int | None,
        accept: Callable[[pd.DataFrame], None],
    ) -> None:
        gpus = int(scorer.stack.device.type == "cuda") if self.cluster.gpus is None else self.cluster.gpus
        count, nodes = self._count(gpus, _size(scorer.stack))
        waiting = deque([wirings[i] for i in shard] for shard in schedule.shards(wirings, SHARDS * count))
        count = min(count, len(waiting))
        source = self._source(scorer.stack)
        probes = self.ray.put(_pack((scorer.encoded, scorer.metrics, scorer.precision)))
        # No processors are reserved: what else runs on the cluster cannot keep a worker from starting.
        replica = self.ray.remote(num_cpus=0, num_gpus=gpus, scheduling_strategy="SPREAD")(Replica)
        promises: dict[Any, _Worker] = {}
        lost = 0

        def prepare(worker: _Worker) -> None:
            device, neighbours = "cuda" if gpus else "cpu", math.ceil(count / nodes)
            promises[worker.actor.open.remote(source, probes, device, neighbours, memory)] = worker

        def hire() -> None:
            self.workers.append(_Worker(replica.remote()))
            prepare(self.workers[-1])

        def ask(worker: _Worker) -> None:
            if worker.pending:
                promises[worker.actor.rows.remote()] = worker
            elif waiting:
                shard = waiting.popleft()
                worker.pending = {str(wiring): wiring for wiring in shard}
                self.sent += len(shard)
                promises[worker.actor.rows.remote(shard)] = worker

        for worker in self.workers:
            prepare(worker)
        while len(self.workers) < count:
            hire()
        while waiting or any(worker.pending for worker in self.workers):
            promise = self.ray.wait(list(promises))[0][0]
            worker = promises.pop(promise)
            try:
                rows, problem = self.ray.get(promise)
            except self.ray.exceptions.RayTaskError:
                raise
            except self.ray.exceptions.RayError as error:
                lost += 1
                if lost > 2 * count:  # a machine may take all of its workers along, but then others give rows
                    raise OSError(
                        f"{lost} workers were lost without a row between them (the last: {_line(error)}); "
                        "all rows so far are kept: try fewer workers, or less memory for each"
                    ) from error
                self._drop(worker)
                if worker.pending:
                    waiting.appendleft(list(worker.pending.values()))
                idle = [candidate for candidate in self.workers if candidate not in promises.values()]
                if waiting and idle:
                    ask(idle[0])
                elif waiting:
                    hire()
                continue
            for block in rows:
                accept(block)
                del worker.pending[str(block["wiring"].iloc[0])]
                lost = 0
            if problem:
                raise ModelError(problem)
            ask(worker)

    def _drop(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        self.ray.kill(worker.actor)  # it may only be out of reach: no more rows are taken from it

    def _count(self, gpus: int, size: int) -> tuple[int, int]:
        """The number of workers, and of machines; ``size`` is that of the weights in bytes."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if gpus:
            possible = sum(int(node.get("GPU", 0)) // gpus for node in nodes)
            count = self.cluster.workers or possible
            if not 0 < count <= possible:
                raise ValueError(
                    f"the cluster has GPUs for {possible} workers with {gpus} each, {max(1, count)} are asked for; "
                    "ask for fewer workers or GPUs, or gpus=0 for none"
                )
            return count, len(nodes)
        processors = [int(node.get("CPU", 1)) for node in nodes]
        room = [int(node.get("memory", size * each) // max(size, 1)) for node, each in zip(nodes, processors)]
        most = sum(max(1, min(each, fit)) for each, fit in zip(processors, room))
        asked = self.cluster.workers or sum(max(1, each // 4) for each in processors)
        if self.cluster.workers is not None and asked > most:
            warnings.warn(
                f"{asked} workers are asked for, and {most} will run: there are {sum(processors)} processors, and "
                f"memory for {sum(room)} models",
                stacklevel=2,
            )
        return min(asked, most), len(nodes)

    def _source(self, stack: Stack) -> _Source:
        if stack.hooks_listen():
            raise ModelError(
                f"hooks are attached to {stack.name}, and workers would not have them; "
                "take them off, or scan without a cluster"
            )
        cluster = self.cluster
        source = _Source(cluster.model or stack.name, stack.sha256, stack.dtype, cluster.device_map)
        if cluster.model is not None:
            return source
        if self._shipped[0] != stack.sha256:
            plain = loading.plain(stack.model) if stack.has_twin else None
            try:
                packed = _pack((plain or stack.model, stack.tokenizer))
            except Exception as error:  # anything may be inside a model
                raise ModelError(
                    f"{stack.name} cannot be sent to workers ({_line(error)}): "
                    'save it where they can load it, and name that: Cluster(model="folder")'
                ) from error
            self._shipped = stack.sha256, self.ray.put(packed)
        return replace(source, shipped=self._shipped[1])


def _spread(name: str, dtype: torch.dtype, device_map: "str | dict[str, Any]") -> Any:
    """A model spread over several devices by accelerate."""
    opened = loading.from_folder(loading.place_of(name), name, dtype, device_map=device_map)
    return loading.wrap(opened.model, opened.tokenizer, name)


def _size(stack: Stack) -> int:
    """Bytes of the weights of a model."""
    return sum(weight.numel() * weight.element_size() for weight in stack.model.parameters())


def _pack(value: Any) -> bytes:
    """Bytes whose tensors can be unpacked on another device."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=importlib.import_module("ray.cloudpickle"))
    return buffer.getvalue()


def _unpack(packed: bytes, device: str) -> Any:
    return torch.load(io.BytesIO(packed), map_location=device, weights_only=False)


def _line(error: BaseException) -> str:
    """The last line of an error, which says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
