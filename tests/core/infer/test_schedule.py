"""Who gets a turn: fairness between adapters, bounds of a step, stepping back where memory runs out."""

import random
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from core.infer.runner import PAGE, Context, Runner
from core.infer.schedule import FairQueue, Scheduler
from core.models.load import load_base


@dataclass
class Asked:
    group: Hashable
    context: Context = field(default_factory=lambda: Context([1], None, [b"root"]))
    cost: int = 100
    is_cancelled: bool = False
    is_running: bool = False


def asked(group: Hashable, tokens: int, seed: int = 0) -> Asked:
    ids = random.Random(seed).choices(range(3, 500), k=tokens)
    return Asked(group, Context(ids, None, [str(group).encode()]))


@pytest.fixture
def runner(tiny_model: Path) -> Runner:
    """Room for 20 pages."""
    base = load_base(tiny_model, name="t", weights="w", quantization="none", precision="fp32", device=torch.device("cpu"))
    return Runner(base.model, kv_tokens=20 * PAGE)


def test_a_crowd_at_one_adapter_delays_another_by_one_request() -> None:
    queue: FairQueue[Asked] = FairQueue()
    for _ in range(50):
        queue.push(Asked("crowded"))
    order = []
    for number in range(10):
        if number == 3:
            queue.push(Asked("quiet"))
        assert queue.first() is not None
        order.append(queue.pop().group)
    assert order.index("quiet") <= 4


def test_equal_demand_is_served_in_turns_and_costly_requests_less_often() -> None:
    queue: FairQueue[Asked] = FairQueue()
    for _ in range(30):
        for group, cost in (("small", 100), ("large", 300), ("other", 100)):
            queue.push(Asked(group, cost=cost))
    order = []
    for _ in range(28):
        queue.first()
        order.append(queue.pop().group)
    assert (order.count("small"), order.count("other"), order.count("large")) == (12, 12, 4)


def test_cancelled_requests_leave_the_queue_unseen() -> None:
    queue: FairQueue[Asked] = FairQueue()
    gone, stays = Asked("a", is_cancelled=True), Asked("a")
    queue.push(gone)
    queue.push(stays)
    assert queue.first() is stays
    assert queue.pop() is stays
    assert queue.first() is None


def test_a_step_keeps_its_bounds_and_answers_come_before_prompts(runner: Runner) -> None:
    schedule: Scheduler[Asked] = Scheduler(runner, running=3, tokens=20)
    requests = [asked("a", 30), asked("b", 8, seed=1), asked("a", 5, seed=2), asked("b", 5, seed=3)]
    for request in requests:
        schedule.waiting.push(request)
    first = {request.group: share[1] for request, share in schedule.shares()}
    assert first == {"a": 20}, "a prompt is read in pieces"
    requests[0].context.computed = 20
    counts = {id(request): share[1] for request, share in schedule.shares()}
    assert counts == {id(requests[0]): 10, id(requests[1]): 8, id(requests[2]): 2}
    assert not requests[3].is_running, "three run at once"
    requests[0].context.computed, requests[0].context.ids = 30, [*requests[0].context.ids, 9]
    requests[1].context.computed = 8
    requests[1].context.ids.append(9)
    requests[2].context.computed = 2
    assert sorted(share[1] for _, share in schedule.shares()) == [1, 1, 3]


def test_the_youngest_steps_back_where_memory_runs_out_and_returns_first(runner: Runner) -> None:
    schedule: Scheduler[Asked] = Scheduler(runner, running=8, tokens=1000)
    old, young, late = asked("a", 9 * PAGE), asked("b", 9 * PAGE, seed=1), asked("c", 9 * PAGE, seed=2)
    for request in (old, young, late):
        schedule.waiting.push(request)
    assert [request for request, _ in schedule.shares()] == [old, young]
    for request in (old, young):
        request.context.computed = 9 * PAGE
    # Each has one page left of the twenty; the old one now needs a second.
    old.context.ids += [5] * (PAGE + 1)
    young.context.ids.append(5)
    taken = [request for request, _ in schedule.shares()]
    assert taken == [old]
    assert young.context.pages == []
    assert young.context.computed == 0
    schedule.leave(old)
    returned = [request for request, _ in schedule.shares()]
    assert young in returned
    assert runner.pages.available == 20 - len(young.context.pages) - len(late.context.pages)


def test_nothing_is_held_once_everybody_has_left(runner: Runner) -> None:
    schedule: Scheduler[Asked] = Scheduler(runner, running=8, tokens=64)
    requests = [asked(number % 3, 40, seed=number) for number in range(7)]
    for request in requests:
        schedule.waiting.push(request)
    schedule.shares()
    for request in requests:
        request.is_cancelled = True
    assert schedule.shares() == []
    assert schedule.running == []
    assert runner.pages.available == 20
