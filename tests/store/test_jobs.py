"""The life of a job in the record: created, prepared, claimed, recorded, ended; each step guarded, each change told once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update

from core.adapter import AdapterFacts, BaseIdentity
from core.errors import Conflict, FenceLost, NotFound
from core.events import Step, Warned
from core.records import DatasetReport, TokenCounts
from core.spec import JobSpec
from core.states import JobStatus, Reason, RunStatus
from store import events, jobs, outbox, preparation, runs
from store.db import Database
from store.events import START, Place
from store.tables import DEFAULT_PROJECT, AdapterVersion, Dataset, Job, Outbox, Run

SPEC = JobSpec.model_validate({"base_model": "tiny", "data": {"datasets": [{"dataset_id": "ds_aaaaaaaaaaaa"}], "eval_rows": 2}})
COUNTS = TokenCounts(
    dataset_id="ds_aaaaaaaaaaaa", rows=10, tokens=100, trained_tokens=40, truncated_rows=0, rows_without_target=1, longest=20
)
REPORT = DatasetReport(format="alpaca", rows=10, usable_rows=10, error_count=0, warning_count=0, errors=[], warnings=[])


def new_job(database: Database) -> str:
    with database.transaction() as session:
        if session.get(Dataset, "ds_aaaaaaaaaaaa") is None:
            dataset = Dataset(id="ds_aaaaaaaaaaaa", project_id=DEFAULT_PROJECT, name="d", filename="d", bytes=1, sha256="s")
            dataset.status = "uploaded"
            session.add(dataset)
            session.flush()
        job, _ = jobs.create_job(session, DEFAULT_PROJECT, SPEC, dataset_digests={"ds_aaaaaaaaaaaa": "s"}, tokenizer="t")
        return job.id


def prepared_job(database: Database) -> str:
    job_id = new_job(database)
    with database.transaction() as session:
        dataset = preparation.claim_dataset(session, "ds_aaaaaaaaaaaa", boot_id="p", lease_seconds=9)
        if dataset is not None:
            preparation.finish_dataset(session, dataset, REPORT)
        claim = preparation.claim_job(session, job_id, boot_id="p", lease_seconds=9)
        if claim is not None:  # the second job of a test finds its tokens cached
            for missing in claim.missing:
                preparation.record_tokens(session, claim, missing, COUNTS)
            preparation.queue_job(session, claim)
    return job_id


def claim(database: Database, job_id: str) -> runs.Claim:
    with database.transaction() as session:
        taken = runs.claim_run(session, job_id, boot_id="w", worker="host", lease_seconds=60)
    assert taken is not None
    return taken


def statuses(database: Database, job_id: str) -> list[tuple[str, str | None]]:
    with database.transaction() as session:
        found = events.after(session, job_id, START, kinds=("status",))
    return [(event.data["status"], event.data["reason"]) for event in found]


RESULT = runs.Result(
    "f" * 64,
    10,
    AdapterFacts(
        tuning="lora",
        base=BaseIdentity(model="tiny", weights="w"),
        job_id="j",
        attempt=1,
        step=3,
        rank=8,
        template="t",
        eval_loss=1.0,
    ),
)


def test_a_job_goes_from_files_to_result_and_tells_every_change_once(database: Database) -> None:
    job_id = prepared_job(database)
    taken = claim(database, job_id)
    with database.transaction() as session:
        runs.record_events(session, taken, [Warned(seq=2, code="x", message="y")])
    with database.transaction() as session:
        runs.finish_run(session, taken, RESULT, "done")
    assert statuses(database, job_id) == [
        ("validating_files", None),
        ("queued", None),
        ("running", None),
        ("succeeded", "finished"),
    ]
    with database.transaction() as session:
        record = jobs.job_record(session, jobs.find_job(session, DEFAULT_PROJECT, job_id))
        assert session.scalars(select(Outbox.key)).all() == []
    assert record.adapter_version == 1
    assert record.tokens == [COUNTS]
    assert [(run.attempt, run.status) for run in record.runs] == [(1, RunStatus.SUCCEEDED)]


def test_tokens_that_are_cached_let_a_job_skip_the_preparer(database: Database) -> None:
    prepared_job(database)
    job_id = new_job(database)
    assert statuses(database, job_id) == [("queued", None)]


def test_of_many_workers_that_claim_a_job_one_wins(database: Database) -> None:
    job_id = prepared_job(database)

    def attempt(number: int) -> bool:
        with database.transaction() as session:
            return runs.claim_run(session, job_id, boot_id=f"w{number}", worker="h", lease_seconds=60) is not None

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


def test_a_stale_attempt_can_write_nothing(database: Database) -> None:
    job_id = prepared_job(database)
    stale = claim(database, job_id)
    with database.transaction() as session:
        session.execute(update(Job).values(lease_until=Job.created_at))
    with database.transaction() as session:
        assert [job.id for job, _, _ in runs.close_expired(session, grace_seconds=0)] == [job_id]
    fresh = claim(database, job_id)
    assert fresh.attempt == stale.attempt + 1
    for write in (
        lambda session: runs.renew(session, stale, lease_seconds=60),
        lambda session: runs.record_events(session, stale, [Warned(seq=9, code="x", message="y")]),
        lambda session: runs.record_checkpoint(session, stale, step=1, sha256="c", size=1),
        lambda session: runs.finish_run(session, stale, RESULT, "done"),
        lambda session: runs.close_run(session, stale, Reason.CANCELLED, ""),
    ):
        with pytest.raises(FenceLost), database.transaction() as session:
            write(session)
    with database.transaction() as session:
        assert session.scalars(select(AdapterVersion)).all() == []
        assert session.scalars(select(Run.status).order_by(Run.attempt)).all() == [RunStatus.LOST, RunStatus.RUNNING]


def test_a_lost_run_resumes_from_the_newest_checkpoint_and_is_given_up_as_poison_in_the_end(database: Database) -> None:
    job_id = prepared_job(database)
    for lost in range(1, 4):
        taken = claim(database, job_id)
        assert taken.attempt == lost
        assert taken.resume == (None if lost == 1 else runs.ResumePoint(lost - 1, 10 * (lost - 1), f"c{lost - 1}"))
        with database.transaction() as session:
            runs.record_checkpoint(session, taken, step=10 * lost, sha256=f"c{lost}", size=1)
            session.execute(update(Job).values(lease_until=Job.created_at))
        with database.transaction() as session:
            runs.close_expired(session, grace_seconds=0)
    assert statuses(database, job_id)[-1] == ("failed", "poison")


def test_retention_keeps_the_newest_checkpoints_and_names_the_files_of_the_others(database: Database) -> None:
    taken = claim(database, prepared_job(database))
    surplus = []
    for step in (10, 20, 30, 40):
        with database.transaction() as session:
            surplus += runs.record_checkpoint(session, taken, step=step, sha256="c", size=1)
    assert surplus == [runs.checkpoint_key(taken.job_id, 1, 10), runs.checkpoint_key(taken.job_id, 1, 20)]


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_by_its_worker(database: Database) -> None:
    waiting, running = prepared_job(database), prepared_job(database)
    taken = claim(database, running)
    with database.transaction() as session:
        assert jobs.cancel_job(session, DEFAULT_PROJECT, waiting).status == JobStatus.CANCELLED
        assert jobs.cancel_job(session, DEFAULT_PROJECT, running).status == JobStatus.RUNNING
    with database.transaction() as session:
        assert runs.renew(session, taken, lease_seconds=60) is True
        runs.close_run(session, taken, Reason.DRAINED, "stopped")
    assert statuses(database, running)[-1] == ("cancelled", "cancelled")
    with database.transaction() as session, pytest.raises(NotFound):
        jobs.cancel_job(session, "prj_other", running)


def test_cancel_and_finish_race_to_exactly_one_end(database: Database) -> None:
    for _ in range(20):
        taken = claim(database, prepared_job(database))

        def finish(taken: runs.Claim = taken) -> None:
            try:
                with database.transaction() as session:
                    runs.finish_run(session, taken, RESULT, "done")
            except FenceLost:
                pass  # the other side was first, which the assertion below sees

        def cancel(taken: runs.Claim = taken) -> None:
            try:
                with database.transaction() as session:
                    jobs.cancel_job(session, DEFAULT_PROJECT, taken.job_id)
                with database.transaction() as session:
                    runs.close_run(session, taken, Reason.CANCELLED, "")
            except (FenceLost, Conflict):
                pass  # as above

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda act: act(), (finish, cancel)))
        ends = [status for status, _ in statuses(database, taken.job_id) if JobStatus(status).is_terminal]
        assert len(ends) == 1


def test_curves_show_the_highest_attempt_that_reached_a_step(database: Database) -> None:
    job_id = prepared_job(database)

    def step(number: int, seq: int, loss: float) -> Step:
        nothing = dict.fromkeys(("allocated_gib", "reserved_gib", "peak_allocated_gib"))
        speed = dict.fromkeys(("tokens_per_second", "step_seconds", "eta_seconds", "rss_gib"), 1.0)
        rest = dict.fromkeys(("epoch", "learning_rate", "grad_norm"), 1.0) | speed
        return Step(seq=seq, step=number, loss=loss, tokens=1, trained_tokens=1, **nothing, **rest)

    first = claim(database, job_id)
    with database.transaction() as session:
        runs.record_events(session, first, [step(n, n + 1, n) for n in range(1, 5)])
        runs.close_run(session, first, Reason.DRAINED, "")
    second = claim(database, job_id)
    with database.transaction() as session:
        runs.record_events(session, second, [step(3, 2, 30.0)])
        points = events.curves(session, job_id)
        assert [(p.step, p.attempt, p.model_extra["loss"]) for p in points] == [(1, 1, 1), (2, 1, 2), (3, 2, 30), (4, 1, 4)]
        assert [p.step for p in events.curves(session, job_id, after_step=2, limit=1)] == [3]
        assert [p.model_extra["loss"] for p in events.curves(session, job_id, attempt=1)] == [1, 2, 3, 4]
        assert [event.id for event in events.after(session, job_id, Place(1, 5))] == ["1-6", "2-1", "2-2"]


def test_a_bell_is_due_until_it_is_answered(database: Database) -> None:
    bell = outbox.Bell(outbox.RUN_JOB, "job_x")
    with database.transaction() as session:
        outbox.post(session, bell)
        assert outbox.due(session, 60) == [bell]
        outbox.mark_rung(session, [bell])
    with database.transaction() as session:
        assert outbox.due(session, 60) == []
        assert outbox.due(session, -1) == [bell]
        outbox.answer(session, bell)
        assert outbox.due(session, -1) == []
