"""The scan against every wiring run alone, through every way of being cut into parts, killed and resumed."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import surgery
from support import fixtures
from support.places import TESTS
from support.scans import KILLED, PROBES, all_wirings, same
from surgery import Stack, Wiring, scan, wiring
from surgery.corpus.probes import Probe, ProbeSet
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.records import tables
from surgery.scan import scanning

EVERY = (*fixtures.ARCHITECTURES, *fixtures.NATIVE)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("memory", [None, 300_000], ids=["whole", "in parts"])
def test_every_family_equals_running_each_wiring_alone(load, name, memory):
    stack = Stack(load(name))
    given = all_wirings(4, sublayers=name != "native-attention-only")
    tokens = Tokens.of(torch.randint(4, fixtures.N_VOCAB, (3, 7), generator=torch.Generator().manual_seed(0)))
    tokens = tokens.pad(2, "left")
    context, found = stack.context(tokens), {}
    scan.execute(stack, given, tokens, lambda index, x: found.update({index: x}), memory)
    assert sorted(found) == list(range(len(given)))
    for index, x in found.items():
        alone = stack.execute(given[index], context.x0, context)[tokens.mask]
        assert (x[tokens.mask] - alone).abs().max() <= 1e-5 * alone.abs().max(), str(given[index])


def by_hand(stack: Stack, one: Wiring, probe: Probe) -> dict[str, float]:
    """The metrics of one probe from the full logits of one unpadded run."""
    ids = stack.tokens([f"{probe.prompt} {probe.answer}"]).ids
    count = len(probe.answer.split())
    log_p, clean = (stack.run(ids, w)[0, -count - 1 : -1].log_softmax(-1) for w in (one, ":"))
    targets = ids[0, -count:]
    picked = log_p.gather(1, targets[:, None])
    return {
        "loglik": float(picked.sum()),
        "exact": float((log_p.argmax(1) == targets).all()),
        "credit": float(
            (log_p.argmax(1) == targets).float() @ torch.tensor([float(len(w)) for w in probe.answer.split()])
        )
        / len("".join(probe.answer.split())),
        "loss": -float(picked.mean()),
        "kl": float((clean.exp() * (clean - log_p)).sum(1).mean()),
    }


def test_metrics_by_hand(load):
    stack = Stack(load("llama"))
    given = [":", ":2 1:", ":1 {1|2} 3:"]
    frame = scan.run(stack, given, PROBES, metrics=("loglik", "exact", "credit", "loss", "kl"))
    assert list(frame.columns) == ["wiring", "prompt", "group", "metric", "value", "baseline"]
    assert len(frame) == len(given) * len(PROBES.probes) * 5
    for text in given:
        for index, probe in enumerate(PROBES.probes):
            expected, clean = (by_hand(stack, stack.wiring(w), probe) for w in (text, ":"))
            rows = frame[(frame.wiring == str(stack.wiring(text))) & (frame.prompt == index)].set_index("metric")
            assert (rows.group == probe.group).all()
            for metric, value in expected.items():
                assert rows.value[metric] == pytest.approx(value, abs=2e-5), (text, metric)
                assert rows.baseline[metric] == pytest.approx(clean[metric], abs=2e-5), (text, metric)


def test_choices(load):
    stack = Stack(load("gpt2"))
    probes = ProbeSet("choose", tuple(Probe(f"w{i} w5", f"w{i}", choices=(f"w{i}", "w7 w8", "w20")) for i in range(4)))
    frame = scan.run(stack, [":", ":1 2:"], probes, metrics=("choice", "loglik"))
    for row in frame[frame.metric == "choice"].itertuples():
        loglik = [
            by_hand(stack, stack.wiring(row.wiring), Probe(f"w{row.prompt} w5", choice))["loglik"]
            for choice in (f"w{row.prompt}", "w7 w8", "w20")
        ]
        assert row.value == float(np.argmax(loglik) == 0)
    with pytest.raises(ValueError, match="needs probes with choices"):
        scan.run(stack, [":"], PROBES, metrics=("choice",))


def test_an_unknown_metric_is_refused(load):
    with pytest.raises(ValueError, match="no metric 'accuracy'; there are loglik"):
        scan.run(Stack(load("gpt2")), [":"], PROBES, metrics=("accuracy",))


def test_the_plan_counts_what_will_run_and_bounds_memory(load, monkeypatch):
    stack = Stack(load("llama"))
    given, tokens = list(wiring.every_repeat(4)), PROBES.encode(stack).tokens
    for memory in (10_000_000, 300_000):
        scheme = scan.plan(stack, given, tokens, memory)
        assert scheme.executions_naive == 60
        assert scheme.peak_bytes <= memory
        assert scheme.seconds > 0
        counted, execute = [0, 0], stack.execute

        def count(one, x, context, counted=counted, execute=execute):
            counted[0] += len(x) / len(tokens)
            counted[1] += 1
            return execute(one, x, context)

        monkeypatch.setattr(stack, "execute", count)
        scan.execute(stack, given, tokens, lambda index, x: None, memory)
        monkeypatch.undo()
        assert counted == [scheme.executions_shared, scheme.calls]
    assert scan.plan(stack, given, tokens).executions_shared == 34
    assert "10 wirings: 34 layer executions instead of 60" in str(scan.plan(stack, given, tokens))


def test_probes_too_many_for_the_memory_are_scanned_in_portions(load, tmp_path, monkeypatch):
    stack, given, out = Stack(load("llama")), list(wiring.every_repeat(4)), tmp_path / "scan.csv"
    expected = scan.run(stack, given, PROBES)
    assert scan.plan(stack, given, PROBES, 60_000).portions > 2
    assert "portions of the probes" in str(scan.plan(stack, given, PROBES, 60_000))
    assert same(scan.run(stack, given, PROBES, memory=60_000), expected)
    with monkeypatch.context() as patch:  # stopped, and continued with another memory: other portions
        patch.setattr(scanning._Table, "close", lambda *args: None)
        scan.run(stack, given[:5], PROBES, out, memory=60_000)
    assert same(scan.run(stack, given, PROBES, out, memory=90_000), expected)
    assert same(scan.run(stack, given, PROBES, out), expected)


def test_streams_are_forgotten(load):
    """Of a scan cut into parts no more streams live at once than the plan says."""
    stack = Stack(load("llama"))
    given, tokens = list(wiring.every_repeat(4)), PROBES.encode(stack).tokens
    alive: list[int] = []
    size = tokens.ids.numel() * stack.d_model

    def look(index, x):
        import gc

        gc.collect()
        storages = {t.untyped_storage().data_ptr() for t in gc.get_objects() if _is_stream(t, size)}
        alive.append(len(storages))

    scan.execute(stack, given, tokens, look, 10_000_000)
    assert max(alive) <= 30


def _is_stream(candidate, size):
    try:
        return isinstance(candidate, torch.Tensor) and candidate.ndim == 3 and candidate.numel() % size == 0
    except ReferenceError:
        return False


def test_a_file_is_filled_finished_and_read_again(load, tmp_path, monkeypatch):
    stack, out = Stack(load("llama")), tmp_path / "scan.csv"
    given = list(wiring.every_repeat(4))
    expected = scan.run(stack, given, PROBES)
    frame = scan.run(stack, given, PROBES, out)
    assert same(frame, expected)
    assert same(tables.read(out), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.csv", "scan.manifest.json"]
    manifest = tables.read_manifest(out)
    assert manifest["scan"]["choice of metrics"] == "loglik exact"
    assert set(manifest["columns"]) == set(frame.columns)
    monkeypatch.setattr(stack, "execute", lambda *args: pytest.fail("ran a wiring that was there already"))
    assert same(scan.run(stack, given, PROBES, out), expected)


def test_more_wirings_are_added_to_a_file(load, tmp_path):
    stack, out = Stack(load("llama")), tmp_path / "scan.csv"
    scan.run(stack, list(wiring.every_skip(4)), PROBES, out)
    frame = scan.run(stack, [*wiring.every_skip(4), *wiring.every_swap(4)], PROBES, out)
    assert same(frame, scan.run(stack, [*wiring.every_skip(4), *wiring.every_swap(4)], PROBES))


@pytest.mark.parametrize("cut", [0, 10, 60, 300, 1500, 2500, 3000])
def test_a_file_cut_off_anywhere_is_continued(load, tmp_path, cut, monkeypatch):
    """What a kill leaves: the beginning of the rows, torn at any byte."""
    stack, out = Stack(load("llama")), tmp_path / "scan.csv"
    given = list(wiring.every_repeat(4))
    expected = scan.run(stack, given, PROBES)
    with monkeypatch.context() as patch:
        patch.setattr(scanning._Table, "close", lambda *args: None)
        scan.run(stack, given, PROBES, out)
    part = tmp_path / "scan.csv.part"
    content = part.read_bytes()
    assert len(content) > cut
    part.write_bytes(content[:cut])
    assert same(scan.run(stack, given, PROBES, out), expected)
    assert same(tables.read(out), expected)
    assert not part.exists()


@pytest.mark.parametrize("change", ["model", "probes", "metrics"])
def test_another_model_probe_set_or_metric_is_refused(load, tmp_path, change):
    stack, out, given = Stack(load("llama")), tmp_path / "scan.csv", [":", ":1 2:"]
    scan.run(stack, given, PROBES, out)
    before = out.read_bytes()
    other = Stack(surgery.models.untrained(stack.model)) if change == "model" else stack
    probes = ProbeSet("words", PROBES.probes[:4]) if change == "probes" else PROBES
    metrics = ("loss",) if change == "metrics" else ("loglik", "exact")
    with pytest.raises(ValueError, match="holds a scan with another"):
        scan.run(other, given, probes, out, metrics=metrics)
    assert out.read_bytes() == before


def test_killed_at_random_moments_and_continued(model_folder, load, tmp_path):
    """SIGKILL after 1, 4 and 8 wirings; the same command then ends with the table of an uninterrupted run."""
    out = tmp_path / "scan.csv"
    code = KILLED.format(tests=str(TESTS), model=str(model_folder("llama")), out=str(out))
    for wirings_done in (1, 4, 8):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if int(line) >= wirings_done:
                time.sleep(0.01 * wirings_done)
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        process.stdout.close()
        assert not out.exists()
        lines = (tmp_path / "scan.csv.part").read_bytes().split(b"\n")
        assert len(lines) - 2 >= wirings_done
        assert len({json.loads(line)[0][0] for line in lines[1:-1]}) == len(lines) - 2
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    stack = Stack(load("llama"))
    assert same(tables.read(out), scan.run(stack, list(wiring.every_repeat(4)), PROBES))


def test_stories_repeats_equal_independent_numbers(stories):
    """Losses of every span run twice, computed elsewhere from the plain Hugging Face model."""
    expected = json.loads((stories / "expected.json").read_text())
    lines = (stories.parents[1] / "text" / "tinystories_100.jsonl").read_text().splitlines()
    stack = Stack(surgery.load(stories))
    tokens = stack.tokens([json.loads(line)["text"] for line in lines], max_length=256, prepend_bos=True)
    spans = [tuple(map(int, span.split(","))) for span in expected["repeat_block_i_j"]]
    found: dict[int, float] = {}

    def measure(index, x):
        log_p = stack.readout(x[:, :-1]).log_softmax(-1)
        each = -log_p.gather(2, tokens.ids[:, 1:, None])[..., 0]
        found[index] = float(each.double()[tokens.mask[:, 1:]].mean())

    scan.execute(stack, [Wiring.from_rys(span, 5) for span in spans], tokens, measure)
    for index, span in enumerate(expected["repeat_block_i_j"]):
        assert found[index] == pytest.approx(expected["repeat_block_i_j"][span], abs=1e-4), span


def test_calibration_networks_scan_as_they_are():
    """In the parallel network every order of layers is the same function; a repeated layer adds its update again."""
    stack = Stack(known_networks.parallel_network(n_layers=4))
    context, finals = stack.context(known_networks.tokens(4, 6)), {}
    given = [*wiring.every_swap(4), *wiring.every_reverse(4)]
    scan.execute(stack, given, known_networks.tokens(4, 6), lambda index, x: finals.update({index: x}))
    clean = stack.stream(context)[-1]
    assert all(torch.allclose(x, clean, atol=1e-5) for x in finals.values())
