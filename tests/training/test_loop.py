"""Training of a part of a network: exact resumption, frozen weights, early stopping, and what goes wrong."""

import errno
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from surgery import disk, memory, training
from surgery.records import tables
from surgery.training.ledger import Ledger
from surgery.training.loop import Schedule


@dataclass
class Batch:
    x: torch.Tensor

    @property
    def shape(self):
        return tuple(self.x.shape)

    @property
    def n_tokens(self):
        return len(self.x)


class Student(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.frozen, self.trained = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch):
        error = (self.trained(self.frozen(batch.x)) - 3 * batch.x).pow(2).sum()
        return error[None], torch.tensor([float(batch.x.numel())])


class Regression:
    """Learn 3 x through a frozen layer."""

    factors, n_prompts, watched, divisible = (1.0,), 20, "error", True

    def __init__(self, seed=0):
        self.student = Student(seed)
        self.matrices, self.others = [self.student.trained.weight], [self.student.trained.bias]
        self.data = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
        self.taken = []

    def batch(self, prompts):
        self.taken.append(prompts)
        return Batch(self.data[prompts])

    def with_teacher(self, batch):
        return batch

    def evaluate(self):
        with torch.no_grad():
            return {"error": float(self.student(Batch(self.data))[0]) / self.data.numel()}


SCHEDULE = Schedule(steps=12, batch=8, every=4, learning_rate=0.05, warmup=2)
COLUMNS = {"error": "of the regression"}


def fit(task, folder, schedule=SCHEDULE, **options):
    return training.fit(task, schedule, folder, columns=COLUMNS, **options)


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.student.parameters()])


class Small(Student):
    """There is memory for the gradients of three prompts."""

    largest = 0

    def forward(self, batch):
        if len(batch.x) > 3 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.largest = max(self.largest, len(batch.x))
        return super().forward(batch)


def test_a_batch_too_large_for_the_memory_is_divided_and_the_weights_are_the_same(tmp_path):
    whole, divided = Regression(), Regression()
    divided.student.__class__ = Small
    curve = fit(whole, tmp_path / "whole").curve
    with pytest.warns(memory.LowMemoryWarning) as told:
        again = fit(divided, tmp_path / "divided").curve
    assert [str(warning.message)[:41] for warning in told] == [
        "not enough memory for 8 prompts at once: ",
        "not enough memory for 4 prompts at once: ",
    ], "once for all steps"
    assert torch.allclose(weights(divided), weights(whole), atol=1e-6)
    assert not torch.equal(weights(divided), weights(Regression()))
    assert np.allclose(
        again[["loss", "error", "tokens"]], curve[["loss", "error", "tokens"]], atol=1e-6, equal_nan=True
    )
    assert (again["operations"].iloc[1:] > curve["operations"].iloc[1:]).all(), "the forward passes that came twice"


def test_a_batch_that_cannot_be_divided_ends_the_training(tmp_path):
    task = Regression()
    task.student.__class__, task.divisible = Small, False
    with pytest.raises(torch.OutOfMemoryError):
        fit(task, tmp_path)


def test_it_learns_and_writes_its_curve(tmp_path):
    task = Regression()
    done = fit(task, tmp_path, replace(SCHEDULE, steps=200, every=50))
    assert (np.diff(done.curve["error"]) < 0).all()
    assert done.curve["error"].iloc[-1] < 0.6 * done.curve["error"].iloc[0]
    written = tables.read(tmp_path / "curve.csv")
    pd.testing.assert_frame_equal(written, done.curve, check_dtype=False)
    assert written["step"].tolist() == [0, 50, 100, 150, 200]
    assert written["tokens"].tolist() == [0, 400, 800, 1200, 1600]
    assert (np.diff(written["operations"]) > 0).all()
    assert done.ledger.frame()["tokens"].tolist() == [1600]
    assert tables.read_manifest(tmp_path / "curve.csv")["run"]["schedule"]["steps"] == 200


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    whole = Regression()
    curve = fit(whole, tmp_path / "whole").curve
    broken = Regression()
    looks = iter(range(9))

    def look(found=broken.evaluate):
        if next(looks) == 2:
            raise KeyboardInterrupt
        return found()

    broken.evaluate = look
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tmp_path / "part")
    resumed = Regression()
    again = fit(resumed, tmp_path / "part")
    assert torch.equal(weights(resumed), weights(whole))
    assert len(resumed.taken) == 12 - 4  # the first four steps were not made again
    same = [name for name in curve if name != "seconds"]
    pd.testing.assert_frame_equal(again.curve[same], curve[same])
    finished = Regression()
    fit(finished, tmp_path / "part")
    assert finished.taken == []  # nothing left to do, the result all the same
    assert torch.equal(weights(finished), weights(whole))


def test_every_epoch_takes_every_prompt_once_in_an_order_of_its_own():
    schedule = Schedule(batch=8, seed=3)
    taken = np.concatenate([schedule.prompts(step, 20) for step in range(5)])
    first, second = taken[:20], taken[20:40]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()
    assert Schedule(batch=8, seed=4).prompts(0, 20).tolist() != first[:8].tolist()


def test_frozen_weights_stay_and_get_their_gradients_back(tmp_path):
    task = Regression()
    task.student.frozen.bias.requires_grad_(False)
    before = task.student.frozen.weight.detach().clone()
    fit(task, tmp_path)
    assert torch.equal(task.student.frozen.weight, before)
    assert [p.requires_grad for p in task.student.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in task.student.parameters())


def test_a_frozen_weight_that_moves_is_told(tmp_path):
    task = Regression()
    look = task.evaluate

    def meddling():
        task.student.frozen.weight.data += 1e-3
        return look()

    task.evaluate = meddling
    with pytest.raises(ValueError, match="stay frozen have changed"):
        fit(task, tmp_path)


def test_early_stopping_goes_back_to_the_best(tmp_path):
    task = Regression()
    values, seen = iter([5.0, 3.0, 4.0, 4.0, 4.0]), []

    def look():
        seen.append(weights(task))
        return {"error": next(values)}

    task.evaluate = look
    done = fit(task, tmp_path, replace(SCHEDULE, patience=2))
    assert done.stopped_early
    assert done.curve["step"].tolist() == [0, 4, 8, 12]
    assert torch.equal(weights(task), seen[1])
    again = Regression()
    assert fit(again, tmp_path, replace(SCHEDULE, patience=2)).stopped_early
    assert torch.equal(weights(again), seen[1])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    task = Regression()
    task.evaluate = lambda: {"error": 1.0}
    batch = task.batch

    def poisoned(prompts):
        found = batch(prompts)
        return Batch(found.x * float("nan")) if len(task.taken) == 6 else found

    task.batch = poisoned
    with pytest.raises(
        ValueError, match=r"loss is nan at step 5.*checkpoint of step 4 is whole.*learning rate"
    ) as told:
        fit(task, tmp_path)
    assert str(tmp_path / "checkpoint.safetensors") in str(told.value)
    whole, resumed = Regression(), Regression()
    whole.evaluate = resumed.evaluate = task.evaluate
    fit(resumed, tmp_path)
    fit(whole, tmp_path / "whole")
    assert torch.equal(weights(resumed), weights(whole))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    write, asked = disk.save, []

    def full(files):
        asked.append(files)
        if len(asked) == 3:  # the checkpoint of step 4
            raise OSError(f"cannot write {next(iter(files))}: {disk.reason(OSError(errno.ENOSPC, ''))}")
        write(files)

    monkeypatch.setattr(disk, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint.safetensors: there is no space left on the disk"):
        fit(Regression(), tmp_path)
    monkeypatch.undo()
    whole, resumed = Regression(), Regression()
    fit(resumed, tmp_path)
    fit(whole, tmp_path / "whole")
    assert torch.equal(weights(resumed), weights(whole))
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"schedule": replace(SCHEDULE, learning_rate=0.1)},
            r"another run, with schedule.learning_rate .* \(now 0.1\)",
        ),
        ({"identity": {"data": "other"}}, r"another run, with data .* \(now other\)"),
        ({"task": Regression(seed=1)}, "another run, with student.weights"),
    ],
)
def test_a_folder_belongs_to_one_run(changed, said, tmp_path):
    fit(Regression(), tmp_path, identity={"data": "these"})
    options = {"schedule": SCHEDULE, "identity": {"data": "these"}, "task": Regression()} | changed
    with pytest.raises(ValueError, match=said):
        fit(options.pop("task"), tmp_path, **options)


def test_a_broken_checkpoint_is_told(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        fit(Regression(), tmp_path)


def test_what_cannot_be_is_told(tmp_path):
    with pytest.raises(ValueError, match="a batch of 32 prompts needs as many, there are 20: give more"):
        fit(Regression(), tmp_path, replace(SCHEDULE, batch=32))
    for wrong, said in (
        ({"steps": 0}, "steps must be positive"),
        ({"patience": 0}, "patience is a number of evaluations"),
        ({"precision": "int8"}, "precision is no, bf16 or fp16"),
    ):
        with pytest.raises(ValueError, match=said):
            Schedule(**wrong)


def test_what_was_spent_before_is_in_the_ledger_but_not_in_the_student_s_operations(tmp_path):
    spent = Ledger()
    spent.add("harvest", 100, 10_000, 1.0, teacher=True)
    done = fit(Regression(), tmp_path, spent=spent)
    assert done.curve["operations"].iloc[0] == 0
    assert (done.curve["operations_with_teacher"] - done.curve["operations"] == 10_000).all()
    assert spent.operations(teacher=True) == 10_000  # the one given is untouched


def test_the_rate_warms_up_and_falls_to_its_final_share():
    schedule = Schedule(steps=100, warmup=10, learning_rate=1.0, final_share=0.1)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=1e-2)
    assert max(rates) == max(rates[8:12])
    assert rates[-1] == pytest.approx(0.1)
    assert all(np.diff(rates[12:]) < 0)


class TwoTerms(Regression):
    """The same with the size of the output as a second term, of other weight, under other factors."""

    factors = (0.7, 3.0)

    def __init__(self):
        super().__init__()
        self.student.register_forward_hook(self._second)

    def evaluate(self):
        return {"error": 1.0}

    @staticmethod
    def _second(student, args, found):
        size = student.trained(student.frozen(args[0].x)).abs().sum()
        return torch.stack([found[0][0], size]), torch.tensor([float(found[1]), float(args[0].n_tokens)])


class AsTwo:
    """One process that believes in another, whose share of every sum is the same as its own."""

    num_processes, process_index = 2, 0

    def __init__(self):
        self.one = training.accelerator_for(torch.device("cpu"))

    def __getattr__(self, name):
        return getattr(self.one, name)

    def reduce(self, sums, how):
        return 2 * sums


@pytest.mark.parametrize("processes", [1, 2])
def test_the_gradient_is_that_of_the_sum_of_the_terms_means(processes, tmp_path):
    task, seen = TwoTerms(), []
    trained = task.matrices + task.others
    for parameter in trained:  # before clipping and Muon, which hide how large it is
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append((p, p.grad.clone())))
    once = replace(SCHEDULE, steps=1, clip=1e9)
    done = fit(task, tmp_path, once, accelerator=AsTwo() if processes == 2 else None)
    by_hand, x = Student(), task.data[task.taken[0]]
    assert len(x) == 8 // processes
    output = by_hand.trained(by_hand.frozen(x))
    loss = 0.7 * (output - 3 * x).pow(2).mean() + 3.0 * output.abs().sum(1).mean()
    loss.backward()
    assert len(seen) == 2
    for own, wanted in zip(trained, by_hand.trained.parameters(), strict=True):
        torch.testing.assert_close(next(gradient for p, gradient in seen if p is own), wanted.grad)
    assert done.curve["loss"].iloc[-1] == pytest.approx(loss.item())


def test_half_precision_computes_otherwise_and_learns(tmp_path):
    exact, half = Regression(), Regression()
    fit(exact, tmp_path / "no")
    done = fit(half, tmp_path / "bf16", replace(SCHEDULE, precision="bf16"))
    assert not torch.equal(weights(exact), weights(half))
    assert torch.allclose(weights(exact), weights(half), atol=0.05)
    assert done.curve["error"].iloc[-1] < done.curve["error"].iloc[0]
