"""Real Celery workers with children that obey a script: lost bells, lost workers, drains, forged messages."""

import os
import signal
import time
from pathlib import Path

import pytest
import redis
from sqlalchemy import select

from core.states import MAX_LOST, JobStatus, Reason, RunStatus
from store import nodes, outbox
from store.stream import stream_key
from store.tables import WorkerNode
from tests.conftest import RedisServer
from tests.worker.service import TRAIN_FAST, Service, is_alive, wait

SLOW = [["pid"], ["train", 1000, 2, 0.1]]


def test_a_bell_makes_a_worker_run_the_job(service: Service) -> None:
    with service.worker("gpu") as worker:
        job_id = service.job()
        service.ring(job_id)
        service.wait_job(job_id, JobStatus.SUCCEEDED)
        with service.database.transaction() as session:
            [node] = nodes.live_nodes(session)
        assert (node.queues, node.device) == (["gpu"], "cpu" if not Path("/proc/driver/nvidia").exists() else "cuda")
        assert worker.stop() == 0
    with service.database.transaction() as session:
        assert session.scalars(select(WorkerNode)).all() == []


def test_doubled_and_forged_bells_change_nothing(service: Service) -> None:
    done = service.job()
    cancelled = service.job()
    service.cancel(cancelled)
    with service.worker("gpu") as worker:
        for _ in range(3):
            service.ring(done)
        service.ring(cancelled)
        service.ring("job_nosuchjobatall")
        forged = [
            ["job_NoSuch"],
            [17],
            [None],
            [{"job": done}],
            ["ds_'; DROP TABLE job"],
            [],
            [done, done],
            ["x" * 99_999],
        ]
        app = service.doorbell._app
        for args in forged:
            app.send_task(outbox.RUN_JOB, args=args, queue="gpu")
        app.send_task(outbox.RUN_JOB, args=[], kwargs={"job_id": done}, queue="gpu")
        app.send_task("os.system", args=["true"], queue="gpu")
        last = service.job()
        service.ring(last)
        service.wait_job(last, JobStatus.SUCCEEDED)
        assert worker.process.poll() is None
        assert worker.text().count("not a bell of ours") == len(forged) + 1
    assert [run.attempt for run in service.read_runs(done)] == [1]
    assert service.versions(done) == 1
    assert service.statuses(cancelled)[-1] == ("cancelled", "cancelled")
    assert service.read_runs(cancelled) == []


def test_no_celery_process_maps_libtorch(service: Service) -> None:
    with service.worker("gpu", app="worker.app") as gpu, service.worker("prepare", app="worker.app") as prepare:
        pids = gpu.processes() + prepare.processes()
        assert len(pids) >= 4
        mapped = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in pids}
    assert all("libpython" in maps or "python" in maps for maps in mapped.values())
    assert [pid for pid, maps in mapped.items() if "torch" in maps] == []


def test_a_worker_killed_in_mid_run_is_replaced_and_the_result_is_one(service: Service) -> None:
    job_id = service.job([["train", 8, 2, 0.05]], attempt_1=SLOW)
    with service.worker("gpu") as first:
        service.ring(job_id)
        service.wait_event(job_id, "step", step=5)
        child = int(service.wait_event(job_id, "warning", code="pid").data["message"])
        first.kill()
        wait(lambda: not is_alive(child), 10)
    with service.worker("gpu"):
        service.wait_job(job_id, JobStatus.SUCCEEDED)
    lost, finished = service.read_runs(job_id)
    assert (lost.status, lost.reason) == (RunStatus.LOST, Reason.LOST)
    assert finished.status == RunStatus.SUCCEEDED
    assert finished.resumed_from_step is not None
    assert finished.resumed_from_step >= 4
    assert service.versions(job_id) == 1
    started = service.history(job_id, "started")
    assert started[-1].data["first_step"] == finished.resumed_from_step + 1
    assert [status for status, _ in service.statuses(job_id)] == ["queued", "running", "queued", "running", "succeeded"]


def test_a_pool_process_killed_in_mid_run_takes_its_child_along(service: Service) -> None:
    job_id = service.job(TRAIN_FAST, attempt_1=SLOW)
    with service.worker("gpu") as worker:
        service.ring(job_id)
        child = int(service.wait_event(job_id, "warning", code="pid").data["message"])
        [pool] = [pid for pid in worker.processes()[1:] if pid != child and _is_pool(pid)]
        os.kill(pool, signal.SIGKILL)
        wait(lambda: not is_alive(child), 10)
        service.wait_job(job_id, JobStatus.SUCCEEDED)
    assert [run.status for run in service.read_runs(job_id)] == [RunStatus.LOST, RunStatus.SUCCEEDED]


def test_a_child_killed_in_mid_run_costs_one_more_attempt(service: Service) -> None:
    job_id = service.job([["train", 8, 2, 0]], attempt_1=SLOW)
    with service.worker("gpu"):
        service.ring(job_id)
        service.wait_event(job_id, "checkpoint", step=2)
        os.kill(int(service.wait_event(job_id, "warning", code="pid").data["message"]), signal.SIGKILL)
        service.wait_job(job_id, JobStatus.SUCCEEDED)
    failed, finished = service.read_runs(job_id)
    assert (failed.status, failed.reason) == (RunStatus.FAILED, Reason.INTERNAL_ERROR)
    assert "SIGKILL" in failed.message
    assert finished.resumed_from_step is not None


@pytest.mark.parametrize("remap", ["", "SIGQUIT"])
def test_a_worker_asked_to_end_hands_its_run_back_with_a_checkpoint(service: Service, remap: str) -> None:
    job_id = service.job([["train", 1000, 999, 0.05]])
    variables = {"REMAP_SIGTERM": remap} if remap else {}
    with service.worker("gpu", **variables) as worker:
        service.ring(job_id)
        service.wait_event(job_id, "step", step=3)
        worker.process.send_signal(signal.SIGTERM)
        job = service.wait_job(job_id, JobStatus.QUEUED)
        if not remap:
            assert worker.process.wait(30) == 0
    assert job.reason == Reason.DRAINED
    [run] = service.read_runs(job_id)
    assert run.status == RunStatus.DRAINED
    [checkpoint] = service.history(job_id, "checkpoint")
    assert checkpoint.data["step"] >= 3
    assert outbox.Bell(outbox.RUN_JOB, job_id) in service.bells()


def test_a_bell_lost_while_the_only_gpu_worker_is_busy_is_rung_by_the_preparers_sweeper(
    service: Service, redis_server: RedisServer
) -> None:
    busy = service.job([["train", 2000, 1999, 0.05]])
    with service.worker("prepare") as preparer, service.worker("gpu") as gpu:
        service.ring(busy)
        service.wait_event(busy, "step", step=1)
        os.kill(gpu.process.pid, signal.SIGSTOP)  # its own sweeper can't help
        waits = service.job()
        service.ring(waits)
        redis_server.wipe()
        with redis.Redis.from_url(redis_server.url) as client:
            wait(lambda: client.llen("gpu") > 0, 30)
            time.sleep(2 * service.settings.bell_seconds)
            assert client.llen("gpu") == 1, "a bell that waits in the queue is not doubled"
        os.kill(gpu.process.pid, signal.SIGCONT)
        service.cancel(busy)
        service.wait_job(waits, JobStatus.SUCCEEDED)
        assert preparer.process.poll() is None


def test_redis_killed_between_submit_and_claim_loses_no_job(service: Service, redis_server: RedisServer) -> None:
    job_id = service.job()
    with service.worker("gpu"):
        redis_server.kill()
        other = service.job()
        service.ring(other)  # fails, and says so in the log
        redis_server.start()
        service.wait_job(job_id, JobStatus.SUCCEEDED, seconds=60)
        service.wait_job(other, JobStatus.SUCCEEDED, seconds=60)


def test_a_job_that_takes_down_every_worker_is_given_up(service: Service) -> None:
    job_id = service.job([["pid"], ["hang"]])
    for attempt in range(1, MAX_LOST + 1):
        with service.worker("gpu") as worker:
            wait(lambda attempt=attempt: len(_pids(service, job_id)) == attempt, 40)
            worker.kill()
    with service.worker("prepare"):
        job = service.wait_job(job_id, JobStatus.FAILED)
    assert job.reason == Reason.POISON
    assert service.bells() == []


def test_a_running_job_is_cancelled_and_the_worker_takes_the_next(service: Service, redis_server: RedisServer) -> None:
    first, second = service.job(SLOW), service.job()
    with service.worker("gpu"):
        service.ring(first)
        service.wait_event(first, "step", step=1)
        service.ring(second)
        service.cancel(first)
        service.wait_job(first, JobStatus.CANCELLED)
        service.wait_job(second, JobStatus.SUCCEEDED)
    with redis.Redis.from_url(redis_server.url) as client:
        [(_, last)] = client.xrevrange(stream_key(first), count=1)
    assert b'"cancelled"' in last[b"event"]


def test_work_folders_of_dead_workers_are_removed_and_those_of_live_ones_kept(service: Service) -> None:
    job_id = service.job(SLOW)
    folder = service.settings.scratch_folder / "runs"
    with service.worker("gpu") as first:
        service.ring(job_id)
        service.wait_event(job_id, "step", step=1)
        [left] = [boot for boot in folder.iterdir() if (boot / job_id).exists()]
        with service.worker("prepare"):
            assert left.exists()
        first.kill()
        wait(lambda: not any(is_alive(pid) for pid in _pids(service, job_id)), 10)
    with service.worker("prepare") as third:
        assert not left.exists()
        assert third.stop() == 0
    assert not any(boot.name != left.name and (boot / job_id).exists() for boot in folder.iterdir())


def _pids(service: Service, job_id: str) -> list[int]:
    return [int(event.data["message"]) for event in service.history(job_id, "warning") if event.data["code"] == "pid"]


def _is_pool(pid: int) -> bool:
    return b"celery" in Path(f"/proc/{pid}/cmdline").read_bytes() or b"celery" in Path(f"/proc/{pid}/comm").read_bytes()
