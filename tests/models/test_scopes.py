"""Stand-ins act for their caller alone, and what a scope changes it undoes on every way out."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

from surgery import Stack
from surgery.models import turns
from surgery.models.scopes import CALL, FORWARD, ForAll, Scope, is_replaced, own, scope, within


def elsewhere(call):
    """What ``call`` gives in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(30)
    return results[0]


@pytest.mark.parametrize("name", [FORWARD, CALL])
def test_stand_ins_act_in_their_own_thread_and_leave_what_was_there(name):
    module = nn.Identity()
    vars(module)[name] = before = lambda x: x + 1
    with scope() as opened:
        opened.replace(module, name, lambda x: 10 * x)
        assert module(1) == 10
        assert elsewhere(lambda: module(1)) == 2
        assert own(module, name) is before
    assert vars(module)[name] is before
    assert module(1) == 2


def test_stand_ins_of_several_threads_share_a_module_and_may_leave_in_any_order():
    module = nn.Identity()
    first = scope()
    first.__enter__().replace(module, FORWARD, lambda x: 10)

    def second():
        other = scope()
        other.__enter__().replace(module, FORWARD, lambda x: 20)
        return other, module(1)

    other, given = elsewhere(second)
    assert (given, module(1)) == (20, 10)
    first.__exit__(None, None, None)
    assert (module(1), "forward" in vars(module)) == (1, True)
    other.__exit__(None, None, None)  # in another thread than it was opened in
    assert "forward" not in vars(module)


def test_around_and_replace_add_up_in_order():
    module = nn.Identity()
    with scope() as outer:
        outer.around(module, CALL, lambda inner, x: inner(x) + 1)
        with scope() as inside:
            inside.around(module, CALL, lambda inner, x: 10 * inner(x))
            assert module(1) == 20
        assert module(1) == 2


def test_an_asyncio_task_does_not_see_the_stand_ins_of_another():
    module, seen = nn.Identity(), []

    async def replaced():
        with scope() as opened:
            opened.replace(module, FORWARD, lambda x: 10)
            await asyncio.sleep(0.01)
            seen.append(module(1))
            seen.append(await asyncio.to_thread(module, 1))  # on its behalf

    async def plain():
        await asyncio.sleep(0.005)
        seen.append(module(1))

    async def both():
        await asyncio.gather(replaced(), plain())

    asyncio.run(both())
    assert seen == [1, 10, 10]


def test_a_copy_of_a_module_made_inside_computes_what_the_module_does():
    module = nn.Linear(2, 2)
    x, expected = torch.ones(1, 2), module(torch.ones(1, 2))
    with scope() as opened:
        opened.replace(module, FORWARD, lambda x: 0 * x)
        opened.replace(module, CALL, lambda x: 0 * x)
        copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
        assert is_replaced(module) is False
    assert all(torch.equal(copied(x), expected) for copied in copies)


def test_what_an_interrupted_undoing_left_is_undone_with_the_scope_around_it():
    undone = []

    def undo():
        undone.append(1)
        if len(undone) <= 2:
            raise KeyboardInterrupt

    def inside(opened):
        opened.undoing(undo)

    def body(_):
        with pytest.raises(KeyboardInterrupt):
            within(inside)
        assert len(undone) == 2  # closed twice, interrupted twice

    within(body)
    assert len(undone) == 3


def test_or_when_the_model_is_next_used():
    module, undone = nn.Identity(), []

    def undo():
        undone.append(1)
        if len(undone) <= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turns.take(module, lambda opened: opened.undoing(undo))
    assert turns.take(module, lambda _: len(undone)) == 3


def test_a_scope_that_nobody_closed_ends_with_its_context_manager():
    module = nn.Identity()

    def generator():
        with scope() as opened:
            opened.replace(module, FORWARD, lambda x: 10)
            yield module(1)

    running = generator()
    assert next(running) == 10
    del running
    gc.collect()
    assert "forward" not in vars(module)


def test_a_setting_of_the_process_comes_back_with_the_last_scope_that_wants_it():
    settings = {"mode": "loud"}
    quiet = ForAll(lambda: settings["mode"], lambda mode: settings.update(mode=mode), "quiet")
    first, second = Scope(), contextvars.Context().run(Scope)
    quiet.until_closed(first)
    quiet.until_closed(second)
    first.close()
    assert settings["mode"] == "quiet"
    second.close()
    assert settings["mode"] == "loud"


def test_a_second_thread_waits_its_turn(opened):
    stack, inside, order = opened("llama"), threading.Event(), []
    ids = torch.tensor([[5, 6, 7]])

    def slow(layer, before, after):
        if layer.index == 0:
            inside.set()
            order.append("in the first")
            other.join(0.2)  # it waits for this thread
            order.append("still in the first")

    other = threading.Thread(target=lambda: inside.wait(30) and (stack.run(ids), order.append("the second")))
    other.start()
    stack.run(ids, tap=slow)
    other.join(30)
    assert order == ["in the first", "still in the first", "the second"]


def test_frozen_can_be_nested_and_holds_nobody_up(opened):
    stack = opened("gpt2")
    one, two = stack.context(torch.tensor([[5, 6, 7]])), stack.context(torch.tensor([[8, 9, 7, 6]]))
    with stack.frozen(two):
        alone = stack.execute(":", 2 * two.x0, two)
    with stack.frozen(one):
        with stack.frozen(two):
            assert torch.equal(stack.execute(":", 2 * two.x0, two), alone)
        with pytest.raises(ValueError, match="frozen norms belong to a batch of shape"):
            stack.execute(":", two.x0, two)
        expected = elsewhere(lambda: stack.execute(":", 2 * two.x0, two))  # neither frozen nor kept waiting
    assert torch.equal(stack.execute(":", 2 * two.x0, two), expected)
    assert not torch.equal(alone, expected)


def test_a_stack_copied_inside_frozen_is_live(opened):
    stack = opened("llama")
    ids = torch.tensor([[5, 6, 7]])
    expected = stack.run(ids)
    with stack.frozen(stack.context(torch.tensor([[8, 9]]))):
        again = copy.deepcopy(stack)
    assert isinstance(again, Stack)
    assert torch.equal(again.run(ids), expected)
