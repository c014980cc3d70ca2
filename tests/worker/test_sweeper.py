"""The sweeper: one effective, from the record alone, through a database that goes away."""

from collections.abc import Iterator

import pytest
from sqlalchemy import func, select, text, update

from core.states import JobStatus, Reason
from store import outbox, runs
from store.tables import DEFAULT_PROJECT, Idempotency, Job, Outbox, WorkerNode
from tests.conftest import RedisServer
from tests.worker.service import Service, run_as_admin, wait
from worker.context import Context
from worker.sweeper import Sweeper


@pytest.fixture
def context(service: Service) -> Iterator[Context]:
    with service.context() as context:
        yield context


@pytest.fixture
def sweeper(context: Context) -> Iterator[Sweeper]:
    made = Sweeper(context.settings, context.database, context.live, context.doorbell)
    made.start()
    yield made
    made.stop()


def test_of_two_sweepers_one_is_effective_and_the_other_takes_over(context: Context) -> None:
    first, second = (Sweeper(context.settings, context.database, context.live, context.doorbell) for _ in range(2))
    assert (first.sweep(), second.sweep(), first.sweep()) == (True, False, True)
    first._let_go()
    assert second.sweep()
    assert not first.sweep()
    first._let_go()
    second._let_go()


def test_an_expired_run_is_closed_and_its_bell_rung(service: Service, context: Context, sweeper: Sweeper) -> None:
    job_id = service.job()
    with service.database.transaction() as session:
        runs.claim_run(session, job_id, boot_id="dead", worker="dead", lease_seconds=0)
    service.wait_job(job_id, JobStatus.QUEUED)
    assert service.read_job(job_id).reason == Reason.LOST
    wait(lambda: not context.doorbell.is_idle("gpu"), 20)


def test_a_database_that_has_just_started_ends_no_run(service: Service) -> None:
    job_id = service.job()
    with service.database.transaction() as session:
        runs.claim_run(session, job_id, boot_id="b", worker="w", lease_seconds=0)
        uptime = session.scalar(select(func.extract("epoch", func.now() - text("pg_postmaster_start_time()"))))
    with service.database.transaction() as session:
        assert runs.close_expired(session, grace_seconds=float(uptime) + 600) == []
    with service.database.transaction() as session:
        assert [job.id for job, _, _ in runs.close_expired(session)] == [job_id]


def test_bells_and_work_are_brought_into_step(service: Service, sweeper: Sweeper) -> None:
    waits, done = service.job(), service.job()
    service.cancel(done)
    with service.database.transaction() as session:
        outbox.answer(session, outbox.Bell(outbox.RUN_JOB, waits))
        outbox.post(session, outbox.Bell(outbox.RUN_JOB, done))
        outbox.post(session, outbox.Bell(outbox.VALIDATE_DATASET, "ds_nosuchdataset"))
    wait(lambda: {bell.key for bell in service.bells()} == {waits}, 20)


def test_a_sweep_goes_on_after_the_database_and_the_broker_were_away(
    service: Service, context: Context, sweeper: Sweeper, postgres_url: str, redis_server: RedisServer
) -> None:
    name = service.settings.database_url.rsplit("/", 1)[1].split("?")[0]
    redis_server.kill()
    for _ in range(3):
        run_as_admin(postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    redis_server.start()
    job_id = service.job()
    wait(lambda: not context.doorbell.is_idle("gpu"), 30)
    with service.database.transaction() as session:
        assert session.scalars(select(Outbox.key)).all() == [job_id]


def test_silent_nodes_and_old_idempotency_keys_are_forgotten(service: Service, context: Context) -> None:
    old = func.now() - text("interval '25 hours'")
    key = {"project_id": DEFAULT_PROJECT, "request_digest": "d", "status": 201, "response": {}}
    with service.database.transaction() as session:
        for name in ("fresh", "stale"):
            session.add(Idempotency(key=name, **key))
            session.add(WorkerNode(boot_id=name, name=name, queues=["gpu"], device="cpu"))
        session.flush()
        session.execute(update(Idempotency).where(Idempotency.key == "stale").values(created_at=old))
        session.execute(update(WorkerNode).where(WorkerNode.boot_id == "stale").values(last_seen_at=old))
    sweeper = Sweeper(context.settings, context.database, context.live, context.doorbell)
    assert sweeper.sweep()
    sweeper._let_go()
    with service.database.transaction() as session:
        assert session.scalars(select(Idempotency.key)).all() == ["fresh"]
        assert session.scalars(select(WorkerNode.boot_id)).all() == ["fresh"]


def test_a_job_taken_in_the_meantime_is_not_closed(service: Service, context: Context) -> None:
    job_id = service.job()
    with service.database.transaction() as session:
        runs.claim_run(session, job_id, boot_id="alive", worker="w", lease_seconds=60)
    sweeper = Sweeper(context.settings, context.database, context.live, context.doorbell)
    assert sweeper.sweep()
    sweeper._let_go()
    with service.database.transaction() as session:
        assert session.scalar(select(Job.status).where(Job.id == job_id)) == JobStatus.RUNNING
