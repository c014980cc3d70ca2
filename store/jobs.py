"""Jobs as the control plane sees them: create, read, list, cancel. And the one place where a status is written.

`move` applies a transition of `core.states` as `UPDATE ... WHERE status = :from` and writes the status event in the same
transaction, so every change has exactly one event. What a run does to its job is in `store/runs.py`.
"""

from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core.errors import Conflict, NotFound
from core.events import StatusChanged
from core.records import JobRecord, RunRecord, TokenCounts
from core.run import picture_key, token_key
from core.spec import JobSpec, upgrade_spec
from core.states import JOB_TRANSITIONS, JobStatus, Phase, Reason, RunStatus
from store import events, outbox
from store.ids import new_id
from store.tables import Job, JobDataset, PictureCache, Run, TokenCache


def create_job(
    session: Session,
    project_id: str,
    spec: JobSpec,
    *,
    dataset_digests: dict[str, str],
    tokenizer: str,
    processor: str | None = None,
) -> tuple[Job, outbox.Bell]:
    """Insert a job and post its bell. Where all that it reads is cached it is queued, else the preparer gets it first.

    `tokenizer` and `processor` are the digests that the registry holds for its base model.
    """
    keys = {
        ref.dataset_id: token_key(dataset_digests[ref.dataset_id], tokenizer, spec.data, spec.objective)
        for ref in spec.data.datasets
    }
    pictures = {dataset_id: picture_key(dataset_digests[dataset_id], processor, spec.objective) for dataset_id in keys}
    wanted = {(key, dataset_id) for dataset_id, key in (*keys.items(), *pictures.items()) if key is not None}
    cached = set()
    for cache in (TokenCache, PictureCache):
        rows = session.execute(select(cache.key, cache.dataset_id).where(cache.key.in_([key for key, _ in wanted])))
        cached |= {(key, dataset_id) for key, dataset_id in rows}
    ready = wanted <= cached
    status = JobStatus.QUEUED if ready else JobStatus.VALIDATING_FILES
    job = Job(
        id=new_id("job"),
        project_id=project_id,
        spec=spec.model_dump(mode="json"),
        base_model=spec.base_model,
        status=status,
        phase=None if ready else Phase.PREPARING,
        message="",
    )
    session.add(job)
    session.flush()
    session.refresh(job)
    for dataset_id, key in keys.items():
        session.add(
            JobDataset(
                job_id=job.id,
                dataset_id=dataset_id,
                project_id=project_id,
                token_key=key,
                picture_key=pictures[dataset_id],
            )
        )
    session.flush()
    events.append_status(session, job, StatusChanged(status=status))
    bell = outbox.Bell(outbox.RUN_JOB if ready else outbox.PREPARE_JOB, job.id)
    return job, outbox.post(session, bell)


def find_job(session: Session, project_id: str, job_id: str) -> Job:
    """The job. Raises NotFound, the same for one that is not there and one of another project."""
    job = session.scalar(select(Job).where(Job.id == job_id, Job.project_id == project_id))
    if job is None:
        raise NotFound(f"There is no job {job_id}")
    return job


def list_jobs(
    session: Session,
    project_id: str,
    *,
    status: JobStatus | None = None,
    base_model: str | None = None,
    cursor: str | None = None,
    limit: int = 20,
) -> list[Job]:
    """Newest first; `cursor` is the id of the last job of the page before. Returns up to `limit` + 1, to tell of more."""
    query = select(Job).where(Job.project_id == project_id)
    if status is not None:
        query = query.where(Job.status == status)
    if base_model is not None:
        query = query.where(Job.base_model == base_model)
    if cursor is not None:
        last = find_job(session, project_id, cursor)
        query = query.where((Job.created_at < last.created_at) | ((Job.created_at == last.created_at) & (Job.id < last.id)))
    return list(session.scalars(query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)))


def cancel_job(session: Session, project_id: str, job_id: str) -> Job:
    """Ask for the end of a job. One that waits is cancelled here and now; a running one by its worker, within a heartbeat.

    Asking twice is no error. Raises Conflict for a job that has already ended otherwise.
    """
    find_job(session, project_id, job_id)
    job = session.scalars(select(Job).where(Job.id == job_id).with_for_update()).one()
    status = JobStatus(job.status)
    if status is JobStatus.CANCELLED:
        return job
    if status.is_terminal:
        raise Conflict(f"The job has already {status}")
    if job.cancel_requested_at is None:
        job.cancel_requested_at = session.scalar(select(func.now()))
        session.flush()
    if status is not JobStatus.RUNNING:
        outbox.answer(session, outbox.Bell(outbox.RUN_JOB, job_id))
        outbox.answer(session, outbox.Bell(outbox.PREPARE_JOB, job_id))
        move(session, job, JobStatus.CANCELLED, reason=Reason.CANCELLED, message=Reason.CANCELLED.facts.sentence)
    return job


def move(
    session: Session,
    job: Job,
    to: JobStatus,
    *,
    reason: Reason | None = None,
    message: str = "",
    unseen: int = 0,
    **columns: Any,
) -> StatusChanged:
    """Change a job's status; the only code that does. Raises Conflict when the job is no longer where `job` says.

    `columns` change with it; `unseen` is that of `events.append_status`.
    """
    came_from = JobStatus(job.status)
    if to not in JOB_TRANSITIONS[came_from]:
        raise Conflict(f"A job can't go from {came_from} to {to}")
    if to.is_terminal:
        columns |= {"ended_at": func.now(), "phase": None}
    if to is not JobStatus.RUNNING:
        columns |= {"lease_until": None, "owner": None}
    moved = session.execute(
        update(Job)
        .where(Job.id == job.id, Job.status == came_from, Job.fence == job.fence)
        .values(status=to, reason=reason, message=message, **columns)
    )
    if moved.rowcount != 1:  # type: ignore[attr-defined]
        raise Conflict(f"The job is no longer {came_from}")
    session.refresh(job)
    change = StatusChanged(status=to, reason=reason, message=message)
    return events.append_status(session, job, change, unseen=unseen)


def job_record(session: Session, job: Job) -> JobRecord:
    """The job as the API answers it, with its runs and token counts."""
    runs = session.scalars(select(Run).where(Run.job_id == job.id).order_by(Run.attempt))
    return JobRecord(
        id=job.id,
        status=JobStatus(job.status),
        phase=None if job.phase is None else Phase(job.phase),
        reason=None if job.reason is None else Reason(job.reason),
        message=job.message,
        spec=upgrade_spec(job.spec),
        tokens=job_tokens(session, job.id),
        step=job.step,
        total_steps=job.total_steps,
        cancel_requested_at=job.cancel_requested_at,
        created_at=job.created_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        adapter_id=job.adapter_id,
        adapter_version=job.adapter_version,
        runs=[_run_record(run) for run in runs],
    )


def job_tokens(session: Session, job_id: str) -> list[TokenCounts]:
    """Counts of the token caches a job reads; empty until all of them stand."""
    rows = session.execute(
        select(JobDataset.dataset_id, TokenCache.counts)
        .join(
            TokenCache,
            (TokenCache.key == JobDataset.token_key) & (TokenCache.dataset_id == JobDataset.dataset_id),
            isouter=True,
        )
        .where(JobDataset.job_id == job_id)
        .order_by(JobDataset.dataset_id)
    ).all()
    if any(counts is None for _, counts in rows):
        return []
    return [TokenCounts.model_validate(counts) for _, counts in rows]


def _run_record(run: Run) -> RunRecord:
    return RunRecord(
        id=run.id,
        attempt=run.attempt,
        status=RunStatus(run.status),
        reason=None if run.reason is None else Reason(run.reason),
        message=run.message,
        worker=run.worker,
        started_at=run.started_at,
        ended_at=run.ended_at,
        resumed_from_step=run.resumed_from_step,
    )
