"""Scans on a real Ray cluster of two workers: the same rows, though workers or the process that scans are lost."""

import collections
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from support.scans import PROBES, all_wirings, same
from surgery import Stack, scan, wiring
from surgery.models.errors import ModelError
from surgery.records import tables
from surgery.scan import cluster, halving, own_ray, rows, schedule
from surgery.scan.cluster import Cluster

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6391


@pytest.fixture(scope="module")
def pool():
    """Two workers, kept, on a cluster that ``ray start`` began: what ``cluster="auto"`` joins."""
    begin = [RAY, "start", "--head", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    head = subprocess.Popen([*begin, f"--port={PORT}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert any("Ray runtime started" in line for line in head.stdout)
        with cluster.joined(Cluster("auto", workers=2)) as joined:
            yield joined
    finally:
        head.send_signal(signal.SIGTERM)
        head.communicate(timeout=20)


@pytest.fixture
def accepted(monkeypatch):
    """How often each wiring's rows came to the table."""
    counts: collections.Counter[str] = collections.Counter()
    append = rows.ResumableTable.append

    def count(self, block):
        append(self, block)
        counts[block["wiring"].iloc[0]] += 1

    monkeypatch.setattr(rows.ResumableTable, "append", count)
    return counts


@pytest.mark.parametrize(
    ("name", "metrics"), [("llama", ("loglik", "exact", "kl")), ("gpt2", ("loss",)), ("gemma2", ("loglik",))]
)
def test_the_frame_is_that_of_a_scan_without_a_cluster(load, pool, tmp_path, accepted, name, metrics):
    stack, wirings, out = Stack(load(name)), all_wirings(4), tmp_path / "scan.csv"
    expected = scan.run(stack, wirings, PROBES, metrics=metrics)
    accepted.clear()
    frame = scan.run(stack, wirings, PROBES, out, metrics=metrics, cluster=pool)
    assert same(frame, expected)
    assert same(tables.read(out), expected)
    assert set(accepted.values()) == {1}
    assert len(pool.workers) == 2


def test_rounds_of_a_search_run_on_workers(load, pool, tmp_path, accepted):
    stack, spans = Stack(load("llama")), list(wiring.every_repeat(4))
    alone = halving.search(stack, spans, PROBES, 0.6)
    accepted.clear()
    before = pool.sent
    found = halving.search(stack, spans, PROBES, 0.6, tmp_path, cluster=pool)
    pd.testing.assert_frame_equal(found.table, alone.table, rtol=1e-4, atol=1e-6)
    assert found.effort == alone.effort
    assert found.effort.rounds > 1
    assert pool.sent - before >= sum(accepted.values()) - found.effort.rounds  # all but the unmodified model's rows


def test_a_model_edited_in_memory_is_scanned_as_it_is(load, pool):
    model = load("llama")
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.weight.mul_(2)
    stack = Stack(model)
    assert same(scan.run(stack, [":2 1:"], PROBES, cluster=pool), scan.run(stack, [":2 1:"], PROBES))


def test_workers_load_a_named_model_by_themselves(load, pool, model_folder, monkeypatch):
    stack, wirings = Stack(load("mistral")), [":2 1:", ":1 {1|2} 3:"]
    for model, message in (
        ("/nowhere/model", r"a worker on .* cannot open /nowhere/model: there is no folder"),
        (str(model_folder("gpt2")), "its weights are not those of the model that is scanned"),
    ):
        monkeypatch.setattr(pool, "cluster", Cluster("auto", workers=2, model=model))
        with pytest.raises(ModelError, match=message):
            scan.run(stack, wirings, PROBES, cluster=pool)
    here = Cluster("auto", workers=2, model=str(model_folder("mistral")), device_map={"": "cpu"})
    monkeypatch.setattr(pool, "cluster", here)
    assert same(scan.run(stack, wirings, PROBES, cluster=pool), scan.run(stack, wirings, PROBES))
    assert pool._shipped[0] != stack.sha256


def test_models_that_workers_cannot_have(load, pool, monkeypatch):
    stack, wirings = Stack(load("llama")), [":2 1:"]
    with monkeypatch.context() as patch:
        patch.setattr(pool, "cluster", Cluster("auto", workers=1, gpus=1))
        with pytest.raises(ValueError, match="the cluster has GPUs for 0 workers with 1 each"):
            scan.run(stack, wirings, PROBES, cluster=pool)
    stack.model.blocks[0].hook_out.add_hook(lambda x, hook: x)
    with pytest.raises(ModelError, match="hooks are attached"):
        scan.run(stack, wirings, PROBES, cluster=pool)


def test_no_more_workers_than_processors(load, pool, monkeypatch):
    stack, wirings = Stack(load("llama")), all_wirings(4)[:12]
    monkeypatch.setattr(pool, "cluster", Cluster("auto", workers=1000))
    with pytest.warns(UserWarning, match="1000 workers are asked for, and 2 will run: there are 2 processors"):
        frame = scan.run(stack, wirings, PROBES, cluster=pool)
    assert len(pool.workers) == 2
    assert same(frame, scan.run(stack, wirings, PROBES))


def test_no_more_workers_than_fit_into_the_memory(pool, monkeypatch):
    monkeypatch.setattr(pool, "cluster", Cluster("auto", workers=2))
    memory = pool.ray.nodes()[0]["Resources"]["memory"]
    assert pool._count(0, int(memory // 3)) == (2, 1)
    with pytest.warns(UserWarning, match="and 1 will run: there are 2 processors, and memory for 1 models"):
        assert pool._count(0, int(memory // 1.5)) == (1, 1)


def test_a_killed_worker_costs_what_it_had_not_handed_over(load, pool, tmp_path, accepted, monkeypatch):
    stack, wirings, out = Stack(load("llama")), all_wirings(4), tmp_path / "scan.csv"
    expected = scan.run(stack, wirings, PROBES)
    accepted.clear()
    scan.run(stack, [":2 1:"], PROBES, cluster=pool)
    victim = pool.workers[0]
    pid = pool.ray.get(victim.actor.pid.remote())
    owed: list[str] = []
    append = rows.ResumableTable.append
    accepted.clear()

    def kill(self, block):
        append(self, block)
        if not owed and str(block["wiring"].iloc[0]) in victim.pending and len(victim.pending) > 1:
            os.kill(pid, signal.SIGKILL)
            owed.extend(set(victim.pending) - {block["wiring"].iloc[0]})

    monkeypatch.setattr(rows.ResumableTable, "append", kill)
    shards, most = schedule.shards, 12  # so many that more is waiting when it dies
    monkeypatch.setattr(cluster.schedule, "shards", lambda wirings, count: shards(wirings, most))
    before = pool.sent
    assert same(scan.run(stack, wirings, PROBES, out, cluster=pool), expected)
    assert owed
    assert len(pool.workers) in (1, 2)  # one that is idle when the loss is noticed takes over, else another is hired
    assert victim not in pool.workers
    assert set(accepted.values()) == {1}
    # Rows on their way when it died may still have come, and it may have been sent one more shard before it was missed.
    again = pool.sent - before - len(set(expected["wiring"])) + expected["wiring"].eq(":").any()
    assert 0 <= again <= len(owed) + max(map(len, shards(wirings, most)))


def test_interrupted_and_continued(load, pool, tmp_path, accepted, monkeypatch):
    stack, wirings, out = Stack(load("llama")), list(wiring.every_repeat(4)), tmp_path / "scan.csv"
    append = rows.ResumableTable.append

    def interrupt(self, block):
        append(self, block)
        if sum(accepted.values()) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rows.ResumableTable, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scan.run(stack, wirings, PROBES, out, cluster=pool)
    assert pool.workers == []
    frame = scan.run(stack, wirings, PROBES, out)
    assert set(accepted.values()) == {1}
    assert same(frame, scan.run(stack, wirings, PROBES))


@pytest.fixture
def keeping_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGTERM, before)


def terminated(as_ray_does):
    """End by SIGTERM within ``terminable``, after Ray put its handler there, or while it is in force."""
    with own_ray.terminable() as stay_terminable:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(signal.SIGTERM))
        if not as_ray_does:
            stay_terminable()
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("as_ray_does", [False, True])
def test_sigterm_is_what_it_was_before_ray(keeping_sigterm, as_ray_does):
    with pytest.raises(SystemExit) as ended:
        terminated(as_ray_does)
    assert ended.value.code == own_ray.TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) == keeping_sigterm
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("mine"))
    with pytest.raises(SystemExit, match="mine"):
        terminated(as_ray_does)
    with pytest.raises(SystemExit, match="3"), own_ray.terminable():
        sys.exit(3)


def test_without_ray(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'needs Ray, which is not installed .*: pip install -e "\.\[cluster\]"'):
        scan.run(Stack(load("gpt2")), [":2 1:"], PROBES, cluster=2)
    assert len(scan.run(Stack(load("gpt2")), [":2 1:"], PROBES))


def test_bad_requests(monkeypatch):
    with pytest.raises(ValueError, match="at least 1 worker, not 0"):
        Cluster.of(0)
    with pytest.raises(ValueError, match="say which with model"):
        Cluster(device_map="auto")
    monkeypatch.setattr(cluster._ray(), "is_initialized", lambda: False)
    with (
        pytest.raises(OSError, match=r"no Ray cluster at '127.0.0.1:1' .*begin one with ray start"),
        cluster.joined("127.0.0.1:1"),
    ):
        pass


@pytest.mark.parametrize("count", [1, 2, 8, 16, 500])
def test_every_wiring_is_in_one_shard(count):
    wirings = all_wirings(4)
    shards = schedule.shards(wirings, count)
    assert sorted(index for shard in shards for index in shard) == list(range(len(wirings)))
    assert all(shards)
    assert len(shards) <= count


@pytest.mark.parametrize("family", [wiring.every_repeat, wiring.every_skip, wiring.every_swap, wiring.every_parallel])
def test_shards_cost_little_and_about_the_same(family):
    """24 layers, two workers: at most 3 % more than in one piece, none more than a third above the mean."""
    wirings = list(family(24))
    costs = [schedule.simulate([wirings[i] for i in shard]).executions for shard in schedule.shards(wirings, 8)]
    assert len(costs) == 8
    assert sum(costs) <= 1.03 * schedule.simulate(wirings).executions
    assert max(costs) <= 4 / 3 * sum(costs) / len(costs)
