"""Runs: claim, renew, record, close. Every write names the fence; a write that touches no row raises FenceLost.

A claim is one conditional UPDATE queued -> running that raises the fence (= attempt number), sets the lease by the
database's clock and inserts the run. A worker that lost its lease can only find out; it can't do harm.
"""

import logging
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import ColumnElement, DateTime, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.adapter import AdapterFacts
from core.errors import FenceLost
from core.events import PhaseChanged, Started, StatusChanged, Step, TrainEvent
from core.spec import JobSpec, upgrade_spec
from core.states import MAX_LOST, JobStatus, Reason, Retry, RunStatus
from store import events, jobs, outbox, plans
from store.adapters import add_version
from store.ids import new_id
from store.tables import Checkpoint, Job, Run, WorkerNode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """The right to run a job, as long as the lease is renewed."""

    job_id: str
    project_id: str
    attempt: int
    boot_id: str
    spec: JobSpec
    resume: "ResumePoint | None"
    began: StatusChanged


@dataclass(frozen=True)
class ResumePoint:
    """The newest checkpoint of earlier attempts."""

    attempt: int
    step: int
    sha256: str


@dataclass(frozen=True)
class Result:
    """A verified adapter folder that already lies at adapters/<sha256> in the storage."""

    sha256: str
    bytes: int
    facts: AdapterFacts


def checkpoint_key(job_id: str, attempt: int, step: int) -> str:
    """Where a checkpoint lies in the storage."""
    return str(PurePosixPath("jobs", job_id, str(attempt), "checkpoints", f"step-{step}"))


def claim_run(session: Session, job_id: str, *, boot_id: str, worker: str, lease_seconds: float) -> Claim | None:
    """Take a queued job. None when there is nothing to take (done, taken, cancelled or never there), or not for this worker.

    A job that is too large for the budget the worker registered is left to others; its bell stands.
    """
    if not _fits(session, job_id, boot_id):
        return None
    taken = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.QUEUED)
        .values(
            fence=Job.fence + 1,
            owner=boot_id,
            lease_until=_lease(lease_seconds),
            started_at=func.coalesce(Job.started_at, func.now()),
        )
    )
    if taken.rowcount != 1:  # type: ignore[attr-defined]
        return None
    job = session.scalars(select(Job).where(Job.id == job_id)).one()
    resume = _newest_checkpoint(session, job_id)
    session.add(
        Run(
            id=new_id("run"),
            job_id=job.id,
            attempt=job.fence,
            project_id=job.project_id,
            status=RunStatus.RUNNING,
            worker=worker,
            boot_id=boot_id,
            resumed_from_step=None if resume is None else resume.step,
        )
    )
    session.flush()
    began = jobs.move(session, job, JobStatus.RUNNING)
    outbox.answer(session, outbox.Bell(outbox.RUN_JOB, job_id))
    return Claim(job.id, job.project_id, job.fence, boot_id, upgrade_spec(job.spec), resume, began)


def renew(session: Session, claim: Claim, *, lease_seconds: float) -> bool:
    """Renew the lease. True when someone asked for the job's cancellation. Raises FenceLost."""
    asked = session.execute(
        update(Job)
        .where(*_owned(claim))
        .values(lease_until=_lease(lease_seconds))
        .returning(Job.cancel_requested_at.is_not(None))
    ).scalar_one_or_none()
    if asked is None:
        raise FenceLost(f"{claim.job_id}: attempt {claim.attempt} no longer owns the job")
    return bool(asked)


def record_events(session: Session, claim: Claim, batch: list[TrainEvent]) -> None:
    """Store a batch of numbered events and bring the job's step and phase up to date. Raises FenceLost."""
    job = _lock(session, claim)
    events.append(session, job, claim.attempt, batch)
    for event in batch:
        if isinstance(event, Step):
            job.step = event.step
        elif isinstance(event, PhaseChanged):
            job.phase = event.phase
        elif isinstance(event, Started):
            job.total_steps = event.total_steps
    session.flush()


def record_checkpoint(session: Session, claim: Claim, *, step: int, sha256: str, size: int) -> list[str]:
    """A checkpoint lies verified in the storage: from now on a later attempt resumes from it.

    Returns storage keys of older checkpoints that `checkpoints.keep` no longer covers, to be deleted after the commit.
    May be called again for the same step, when it is not known whether the first call was committed.
    """
    job = _lock(session, claim)
    facts = {"project_id": job.project_id, "sha256": sha256, "bytes": size}
    row = insert(Checkpoint).values(job_id=job.id, attempt=claim.attempt, step=step, **facts)
    session.execute(row.on_conflict_do_nothing())
    standing = list(
        session.scalars(
            select(Checkpoint)
            .where(Checkpoint.job_id == job.id, Checkpoint.deleted_at.is_(None))
            .order_by(Checkpoint.step.desc(), Checkpoint.attempt.desc())
        )
    )
    surplus = standing[claim.spec.checkpoints.keep :]
    for old in surplus:
        old.deleted_at = session.scalar(select(func.now()))
    session.flush()
    return [checkpoint_key(old.job_id, old.attempt, old.step) for old in surplus]


def discard_checkpoint(session: Session, claim: Claim, point: ResumePoint) -> ResumePoint | None:
    """A checkpoint did not verify: never offer it again, and say which one to try instead."""
    _lock(session, claim)
    session.execute(
        update(Checkpoint)
        .where(Checkpoint.job_id == claim.job_id, Checkpoint.attempt == point.attempt, Checkpoint.step == point.step)
        .values(deleted_at=func.now())
    )
    other = _newest_checkpoint(session, claim.job_id)
    session.execute(
        update(Run)
        .where(Run.job_id == claim.job_id, Run.attempt == claim.attempt)
        .values(resumed_from_step=None if other is None else other.step)
    )
    return other


def finish_run(session: Session, claim: Claim, result: Result, message: str) -> StatusChanged:
    """Publish: run, adapter version and job in one transaction under the fence, so exactly once. Raises FenceLost."""
    job = _lock(session, claim)
    name = claim.spec.adapter_name or job.id.replace("_", "-")
    version = add_version(
        session, job.project_id, name, job_id=job.id, sha256=result.sha256, size=result.bytes, facts=result.facts
    )
    reason = Reason.FINISHED
    _end_run(session, claim.job_id, claim.attempt, reason.facts.run, reason, message)
    node = session.get(WorkerNode, claim.boot_id)
    plans.record_peak(session, job.id, claim.attempt, claim.spec, jobs.job_tokens(session, job.id), node)
    return jobs.move(
        session,
        job,
        JobStatus.SUCCEEDED,
        reason=reason,
        message=message,
        adapter_id=version.adapter_id,
        adapter_version=version.version,
    )


def close_run(session: Session, claim: Claim, reason: Reason, message: str) -> tuple[StatusChanged, outbox.Bell | None]:
    """End a run that has no result. The reason decides whether another attempt follows (a bell) or the job ends with it."""
    return _close(session, _lock(session, claim), reason, message)


def close_expired(session: Session, *, grace_seconds: float = 0.0) -> list[tuple[Job, StatusChanged, outbox.Bell | None]]:
    """Sweeper: end every run whose lease ran out. A database that started less than `grace_seconds` ago closes nothing: while
    it was away nobody could renew, and its restart must not end every healthy run at once."""
    started = func.pg_postmaster_start_time(type_=DateTime(timezone=True))
    expired = session.scalars(
        select(Job)
        .where(
            Job.status == JobStatus.RUNNING,
            Job.lease_until < func.now(),
            func.now() > started + func.make_interval(0, 0, 0, 0, 0, 0, grace_seconds),
        )
        .with_for_update(skip_locked=True)
        .limit(100)
    ).all()
    closed = []
    for job in expired:
        change, bell = _close(session, job, Reason.LOST, Reason.LOST.facts.sentence, unseen=events.UNSEEN)
        closed.append((job, change, bell))
    return closed


def _close(
    session: Session, job: Job, reason: Reason, message: str, *, unseen: int = 0
) -> tuple[StatusChanged, outbox.Bell | None]:
    if job.cancel_requested_at is not None:  # asked for while it ended in another way: no new attempt
        reason, message = Reason.CANCELLED, Reason.CANCELLED.facts.sentence
    if reason is Reason.LOST:
        job.lost_count += 1
        if job.lost_count >= MAX_LOST:
            reason, message = Reason.POISON, Reason.POISON.facts.sentence
    elif reason.facts.retry is Retry.ONCE:
        job.failed_count += 1
    session.flush()
    _end_run(session, job.id, job.fence, reason.facts.run, reason, message)
    again = {
        Retry.NEVER: False,
        Retry.ALWAYS: True,
        Retry.INFRASTRUCTURE: True,
        Retry.ONCE: job.failed_count <= 1,
    }[reason.facts.retry]
    if not again:
        return jobs.move(session, job, reason.facts.job, reason=reason, message=message, unseen=unseen), None
    change = jobs.move(session, job, JobStatus.QUEUED, reason=reason, message=message, unseen=unseen, phase=None)
    return change, outbox.post(session, outbox.Bell(outbox.RUN_JOB, job.id))


def _end_run(session: Session, job_id: str, attempt: int, status: RunStatus, reason: Reason, message: str) -> None:
    session.execute(
        update(Run)
        .where(Run.job_id == job_id, Run.attempt == attempt)
        .values(status=status, reason=reason, message=message, ended_at=func.now())
    )


def _fits(session: Session, job_id: str, boot_id: str) -> bool:
    node = session.get(WorkerNode, boot_id)
    job = session.scalar(select(Job).where(Job.id == job_id, Job.status == JobStatus.QUEUED))
    if node is None or job is None:
        return True
    too_large = plans.why_too_large(session, upgrade_spec(job.spec), jobs.job_tokens(session, job_id), node)
    if too_large is not None:
        log.info("%s is left to other workers: %s", job_id, too_large)
    return too_large is None


def _newest_checkpoint(session: Session, job_id: str) -> ResumePoint | None:
    row = session.scalar(
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        .order_by(Checkpoint.step.desc(), Checkpoint.attempt.desc())
        .limit(1)
    )
    return None if row is None else ResumePoint(row.attempt, row.step, row.sha256)


def _lock(session: Session, claim: Claim) -> Job:
    job = session.scalar(select(Job).where(*_owned(claim)).with_for_update())
    if job is None:
        raise FenceLost(f"{claim.job_id}: attempt {claim.attempt} no longer owns the job")
    return job


def _owned(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (Job.id == claim.job_id, Job.fence == claim.attempt, Job.status == JobStatus.RUNNING)


def _lease(seconds: float) -> ColumnElement[Any]:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
