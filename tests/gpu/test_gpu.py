"""On a real GPU: what the CPU gives, in half precision too, and with layers that wait outside it. ``make test-gpu``."""

import pytest
import torch

import surgery
from support import untouched
from support.pretend_device import difference
from support.scans import ODD, PROBES
from surgery import Stack, scan, wiring
from surgery.corpus.probes import Probe, ProbeSet
from surgery.models import offload

pytestmark = pytest.mark.gpu
WIRINGS = [*wiring.every_repeat(4), *ODD]


@pytest.fixture(scope="module")
def on_gpu(model_folder):
    return lambda name, **options: Stack(surgery.load(model_folder(name), device="cuda", **options))


@pytest.mark.parametrize("call", untouched.CALLS)
def test_a_call_gives_what_it_gives_on_the_cpu(opened, on_gpu, tmp_path, call):
    expected, actual = (
        untouched.CALLS[call](stack, untouched.tokens(), tmp_path / str(i))
        for i, stack in enumerate((opened("llama"), on_gpu("llama")))
    )
    assert difference(expected, actual) < 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_scan_gives_what_it_gives_on_the_cpu(opened, on_gpu, name):
    stacks = (opened(name), on_gpu(name))
    expected, actual = (scan.run(stack, WIRINGS, PROBES, metrics=["loglik", "kl"]) for stack in stacks)
    assert difference(expected, actual) < 1e-4


def test_a_scan_in_half_precision(opened, on_gpu):
    expected = scan.run(opened("llama"), WIRINGS, PROBES, metrics=["loglik"])
    actual = scan.run(on_gpu("llama"), WIRINGS, PROBES, metrics=["loglik"], precision="bf16")
    assert 0 < difference(expected, actual) < 0.05


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_layers_outside_the_gpu_change_nothing(on_gpu, name):
    stack = on_gpu(name, offload=True)
    assert scan.run(stack, WIRINGS, PROBES).equals(scan.run(on_gpu(name), WIRINGS, PROBES))
    assert max(offload.of(stack.model).loads.values()) < len(WIRINGS)


@pytest.mark.parametrize("call", ["checks", "frozen", "effects.matrix", "ablation.damage", "lens.layers", "harvest"])
def test_measures_find_weights_that_wait_outside(opened, on_gpu, tmp_path, call):
    expected, actual = (
        untouched.CALLS[call](stack, untouched.tokens(), tmp_path / str(i))
        for i, stack in enumerate((opened("llama"), on_gpu("llama", offload=True)))
    )
    assert difference(expected, actual) < 1e-3


def test_a_model_needs_less_of_the_gpu_with_its_layers_outside():
    two = ProbeSet("two", (Probe("p3 >other", "o3"), Probe("p3 pf1 >plain", "p4")))

    def most(**options):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scan.run(Stack(surgery.load("babel", device="cuda", **options)), [":8 4:"], two, memory=2**20)
        return torch.cuda.max_memory_allocated() - before

    assert most(offload=True) < most() / 2


def test_a_model_over_several_gpus(opened, model_folder):
    if torch.cuda.device_count() < 2:
        pytest.skip("this needs two GPUs")
    stack = Stack(surgery.load(model_folder("llama"), device_map="balanced"))
    assert len({weight.device for weight in stack.model.parameters()}) > 1
    assert difference(scan.run(opened("llama"), WIRINGS, PROBES), scan.run(stack, WIRINGS, PROBES)) < 1e-4
