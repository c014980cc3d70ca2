"""Faults injected into the whole service: workers killed, bells lost, Redis wiped. Nothing is lost, nothing happens twice."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from sqlalchemy import func, select

from standalone.stack import Stack
from store.db import Database
from store.tables import AdapterVersion, Outbox
from tests.e2e.conftest import tiny_spec
from tests.e2e.service import Service

LONG = {"kind": "linear", "epochs": 30}  # 300 steps: some seconds


@pytest.fixture
def record(stack: Stack) -> Iterator[Database]:
    record = Database(stack.database_url)
    yield record
    record.close()


def until(true: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (seen := true()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)
    return seen


def worker_with_a_child(stack: Stack) -> str:
    """The name of the training worker that runs a child right now."""

    def look() -> str | None:
        for name, process in stack.processes.items():
            if name.startswith("worker") and process.is_running:
                for child in psutil.Process(process.pid).children(recursive=True):
                    if "core.train" in child.cmdline():
                        return name
        return None

    return str(until(look, "a worker to run a child"))


def published(record: Database, job_id: str) -> int:
    with record.transaction() as session:
        query = select(func.count()).select_from(AdapterVersion).where(AdapterVersion.job_id == job_id)
        return session.scalar(query) or 0


def redis_client(stack: Stack) -> "redis.Redis":
    assert stack.redis is not None
    return redis.Redis.from_url(stack.redis_url, password=stack.redis.password_file.read_text().strip())


def test_another_worker_resumes_what_a_killed_one_left(stack: Stack, service: Service, dataset_id: str, record: Database) -> None:
    spec = tiny_spec(dataset_id, schedule=LONG, checkpoints={"every_steps": 20})
    unbroken = service.ended_job(service.submit(spec)["id"])
    extra = stack.start_extra_worker()
    try:
        job_id = service.submit(spec)["id"]
        until(lambda: any(kept["step"] >= 40 for kept in service.checkpoints(job_id)), "a checkpoint to be kept")
        killed = worker_with_a_child(stack)
        stack.kill(killed)
        resumed = service.ended_job(job_id)
        assert [(run["attempt"], run["status"]) for run in resumed["runs"]] == [(1, "lost"), (2, "succeeded")]
        assert resumed["status"] == "succeeded"
        assert resumed["runs"][1]["resumed_from_step"] >= 40
        assert published(record, job_id) == 1
        expected, seen = service.losses(unbroken["id"]), service.losses(job_id)
        assert seen == expected  # before the kill, at the seam and after it, to the last bit
    finally:
        for name in ("worker", extra):
            if not stack.processes[name].is_running:
                stack.restart(name)


def test_a_bell_lost_while_the_only_worker_is_busy_is_rung_again(
    stack: Stack, service: Service, dataset_id: str, record: Database
) -> None:
    workers = [name for name in stack.processes if name.startswith("worker")]
    for name in workers[1:]:
        stack.processes[name].stop()
    try:
        busy = service.submit(tiny_spec(dataset_id, schedule={"kind": "linear", "epochs": 100}))["id"]
        service.job_at_step(busy, 1)
        waiting = service.submit(tiny_spec(dataset_id, schedule={"kind": "constant", "max_steps": 1}))["id"]
        until(lambda: service.job(waiting)["status"] == "queued", "the tokens")
        with redis_client(stack) as client:
            client.flushall()

        def rung_again() -> bool:
            with record.transaction() as session:
                return (session.scalar(select(Outbox.tries).where(Outbox.key == waiting)) or 0) >= 2

        until(rung_again, "the sweeper to ring again")
        assert service.job(busy)["status"] == "running", "the worker was to be busy all the while"
        assert service.ended_job(waiting)["status"] == "succeeded"
        assert service.ended_job(busy)["status"] == "succeeded"
    finally:
        for name in workers[1:]:
            stack.restart(name)


def test_a_job_survives_the_loss_of_all_of_redis_between_submit_and_claim(
    stack: Stack, service: Service, dataset_id: str
) -> None:
    workers = [name for name in stack.processes if name.startswith("worker")]
    for name in workers:
        stack.processes[name].stop()
    job_id = service.submit(tiny_spec(dataset_id, schedule={"kind": "constant", "max_steps": 3}))["id"]
    until(lambda: service.job(job_id)["status"] == "queued", "the tokens")
    assert stack.redis is not None
    stack.kill("redis")
    for entry in Path(stack.home / "redis").iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    stack.redis.start()
    for name in workers:
        stack.processes[name].start()
    stack.wait_until_ready()
    ended = service.ended_job(job_id)
    assert ended["status"] == "succeeded"
    assert [metric["step"] for metric in service.metrics(job_id) if "loss" in metric] == [1, 2, 3]


def test_a_running_job_is_cancelled_and_leaves_no_child(stack: Stack, service: Service, dataset_id: str) -> None:
    job_id = service.submit(tiny_spec(dataset_id, schedule={"kind": "linear", "epochs": 500}))["id"]
    service.job_at_step(job_id, 1)
    assert service.api.post(f"/jobs/{job_id}/cancel").status_code == 200
    ended = service.ended_job(job_id)
    assert (ended["status"], ended["reason"]) == ("cancelled", "cancelled")

    def children() -> list[psutil.Process]:
        workers = [p.pid for name, p in stack.processes.items() if name.startswith("worker")]
        found = [child for pid in workers for child in psutil.Process(pid).children(recursive=True)]
        return [child for child in found if "core.train" in child.cmdline()]

    until(lambda: not children(), "the child to be gone")


def test_a_drained_worker_hands_its_job_on(stack: Stack, service: Service, dataset_id: str) -> None:
    spec = tiny_spec(dataset_id, schedule=LONG, checkpoints={"every_steps": None})
    unbroken = service.ended_job(service.submit(spec)["id"])
    job_id = service.submit(spec)["id"]
    service.job_at_step(job_id, 20)
    stack.restart(worker_with_a_child(stack))
    ended = service.ended_job(job_id)
    assert [run["status"] for run in ended["runs"]] == ["drained", "succeeded"]
    assert ended["runs"][1]["resumed_from_step"] >= 20
    assert service.losses(job_id) == service.losses(unbroken["id"])
