"""Races for a job: whatever order things happen in, one claim, one end, one event that tells it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import select

from core.adapter import AdapterFacts, BaseIdentity
from core.errors import Conflict, FenceLost
from core.spec import JobSpec
from core.states import JobStatus
from store import events, jobs, nodes, runs
from store.db import Database
from store.tables import DEFAULT_PROJECT, AdapterVersion, Dataset, Job, Run, WorkerNode

SPEC = JobSpec.model_validate({"base_model": "tiny", "data": {"datasets": [{"dataset_id": "ds_bbbbbbbbbbbb"}]}})


def queued_job(database: Database) -> str:
    with database.transaction() as session:
        if session.get(Dataset, "ds_bbbbbbbbbbbb") is None:
            facts = {"name": "d", "filename": "d", "bytes": 1, "sha256": "s", "status": "ready"}
            session.add(Dataset(id="ds_bbbbbbbbbbbb", project_id=DEFAULT_PROJECT, **facts))
            session.flush()
        job, _ = jobs.create_job(session, DEFAULT_PROJECT, SPEC, dataset_digests={"ds_bbbbbbbbbbbb": "s"}, tokenizer="t")
        jobs.move(session, job, JobStatus.QUEUED)
        return job.id


def take(database: Database, job_id: str, boot_id: str = "w") -> runs.Claim | None:
    with database.transaction() as session:
        return runs.claim_run(session, job_id, boot_id=boot_id, worker="h", lease_seconds=60)


def result(job_id: str) -> runs.Result:
    base = BaseIdentity(model="tiny", weights="w")
    facts = AdapterFacts(tuning="lora", base=base, job_id=job_id, attempt=1, step=1, rank=8, template="t", eval_loss=None)
    return runs.Result("0" * 64, 1, facts)


def at_once(*acts: Callable[[], object]) -> list[object]:
    """Run acts from one starting shot; an exception is a result."""
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> object:
        barrier.wait()
        try:
            return act()
        except (Conflict, FenceLost) as error:
            return error

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


def test_eight_claims_of_one_job_have_one_winner(database: Database) -> None:
    for _ in range(10):
        job_id = queued_job(database)
        claims = at_once(*(lambda n=n, job_id=job_id: take(database, job_id, f"w{n}") for n in range(8)))
        [winner] = [claim for claim in claims if claim is not None]
        with database.transaction() as session:
            [run] = session.scalars(select(Run).where(Run.job_id == job_id)).all()
        assert (run.boot_id, run.attempt) == (winner.boot_id, 1)


def test_a_hundred_races_of_cancel_and_finish_each_have_one_end(database: Database) -> None:
    ends = []
    for _ in range(100):
        job_id = queued_job(database)
        claim = take(database, job_id)
        assert claim is not None

        def cancel(job_id: str = job_id) -> None:
            with database.transaction() as session:
                jobs.cancel_job(session, DEFAULT_PROJECT, job_id)

        def finish(claim: runs.Claim = claim) -> None:
            with database.transaction() as session:
                asked = runs.renew(session, claim, lease_seconds=60)
                if asked:
                    runs.close_run(session, claim, jobs.Reason.CANCELLED, "")
                else:
                    runs.finish_run(session, claim, result(claim.job_id), "done")

        at_once(cancel, finish)
        with database.transaction() as session:
            job = session.scalars(select(Job).where(Job.id == job_id)).one()
            if job.status == JobStatus.RUNNING:  # asked for just after the worker had looked: it looks again
                raise AssertionError("finish left the job running")
            told = [event.data["status"] for event in events.after(session, job_id, events.START, kinds=("status",))]
            versions = session.scalars(select(AdapterVersion).where(AdapterVersion.job_id == job_id)).all()
        assert [status for status in told if JobStatus(status).is_terminal] == [job.status]
        assert len(versions) == (1 if job.status == JobStatus.SUCCEEDED else 0)
        ends.append(job.status)
    assert set(ends) <= {JobStatus.SUCCEEDED, JobStatus.CANCELLED}


def test_a_checkpoint_recorded_twice_stands_once(database: Database) -> None:
    claim = take(database, queued_job(database))
    assert claim is not None
    for _ in range(2):
        with database.transaction() as session:
            assert runs.record_checkpoint(session, claim, step=1, sha256="c", size=1) == []


def budget_of(node: WorkerNode | None) -> float | None:
    assert node is not None
    return node.budget_gib


def test_the_largest_budget_is_that_of_a_live_gpu_worker(database: Database) -> None:
    with database.transaction() as session:
        assert nodes.largest_node(session) is None
        for name, queue, budget in (("a", "gpu", 20.0), ("b", "gpu", 70.0), ("c", "prepare", 99.0), ("d", "gpu", None)):
            nodes.register(session, boot_id=name, name=name, queues=[queue], device="cuda", budget_gib=budget)
    with database.transaction() as session:
        assert budget_of(nodes.largest_node(session)) == 70.0
        nodes.leave(session, "b")
        assert budget_of(nodes.largest_node(session)) == 20.0
        assert nodes.beat(session, "a")
        assert not nodes.beat(session, "b")
