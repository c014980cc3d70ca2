"""What the preparer does to the record: take an upload or a job in `validating_files`, and hand back what it found.

The work is repeatable (its result depends on content alone), so a lease without a fence is enough: a second preparer that
starts after the first one's lease ran out makes the same files, and the last write finds the state it expects or nothing.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.events import StatusChanged
from core.records import DatasetReport, TokenCounts
from core.spec import JobSpec, upgrade_spec
from core.states import DatasetStatus, JobStatus, Phase, Reason
from store import jobs, nodes, outbox, plans
from store.tables import Dataset, Job, JobDataset, PictureCache, TokenCache

MAX_TRIES = 3
"""An upload that took down its preparer so often is failed: it would take down the next one too."""


@dataclass(frozen=True)
class DatasetClaim:
    dataset_id: str
    project_id: str
    filename: str
    boot_id: str
    tries: int


@dataclass(frozen=True)
class MissingCache:
    """A token or picture cache that a job needs and nobody has made yet."""

    kind: Literal["tokens", "pictures"]
    dataset_id: str
    dataset_sha256: str
    key: str


@dataclass(frozen=True)
class JobClaim:
    job_id: str
    project_id: str
    spec: JobSpec
    boot_id: str
    missing: list[MissingCache]


def claim_dataset(session: Session, dataset_id: str, *, boot_id: str, lease_seconds: float) -> DatasetClaim | None:
    """Take an upload that nobody validates right now; None otherwise."""
    row = session.execute(
        update(Dataset)
        .where(
            Dataset.id == dataset_id,
            Dataset.status == DatasetStatus.UPLOADED,
            Dataset.deleted_at.is_(None),
            _free(Dataset),
        )
        .values(owner=boot_id, lease_until=_lease(lease_seconds), tries=Dataset.tries + 1)
        .returning(Dataset.project_id, Dataset.filename, Dataset.tries)
    ).one_or_none()
    return None if row is None else DatasetClaim(dataset_id, row.project_id, row.filename, boot_id, row.tries)


def finish_dataset(session: Session, claim: DatasetClaim, report: DatasetReport) -> list[outbox.Bell]:
    """Store the report: ready, or failed when no row can be used. Returns the bells of jobs that waited for it."""
    status = DatasetStatus.READY if report.usable_rows else DatasetStatus.FAILED
    done = session.execute(
        update(Dataset)
        .where(Dataset.id == claim.dataset_id, Dataset.status == DatasetStatus.UPLOADED)
        .values(status=status, report=report.model_dump(mode="json"), owner=None, lease_until=None)
    )
    outbox.answer(session, outbox.Bell(outbox.VALIDATE_DATASET, claim.dataset_id))
    if done.rowcount != 1:  # type: ignore[attr-defined]
        return []
    waiting = session.scalars(
        select(Job.id)
        .join(JobDataset, JobDataset.job_id == Job.id)
        .where(JobDataset.dataset_id == claim.dataset_id, Job.status == JobStatus.VALIDATING_FILES)
    )
    return [outbox.post(session, outbox.Bell(outbox.PREPARE_JOB, job_id)) for job_id in waiting]


def claim_job(session: Session, job_id: str, *, boot_id: str, lease_seconds: float) -> JobClaim | StatusChanged | None:
    """Take a job whose tokens are to be made. None while a dataset of it is not validated yet (its end rings again), or
    when there is nothing to do. The status change of a job that failed here, for a dataset of it has no usable row, or rows of
    another kind than the objective trains on."""
    taken = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.VALIDATING_FILES, _free(Job))
        .values(owner=boot_id, lease_until=_lease(lease_seconds), phase=Phase.PREPARING)
        .returning(Job.project_id, Job.spec)
    ).one_or_none()
    if taken is None:
        return None
    needs = session.execute(
        select(
            JobDataset.dataset_id,
            JobDataset.token_key,
            JobDataset.picture_key,
            Dataset.sha256,
            Dataset.status,
            Dataset.report,
            TokenCache.key.label("tokens"),
            PictureCache.key.label("pictures"),
        )
        .join(Dataset, Dataset.id == JobDataset.dataset_id)
        .join(
            TokenCache,
            (TokenCache.key == JobDataset.token_key) & (TokenCache.dataset_id == JobDataset.dataset_id),
            isouter=True,
        )
        .join(
            PictureCache,
            (PictureCache.key == JobDataset.picture_key) & (PictureCache.dataset_id == JobDataset.dataset_id),
            isouter=True,
        )
        .where(JobDataset.job_id == job_id)
        .order_by(JobDataset.dataset_id)
    ).all()
    if any(need.status == DatasetStatus.UPLOADED for need in needs):
        _release(session, Job, job_id)
        return None
    failed = [need.dataset_id for need in needs if need.status == DatasetStatus.FAILED]
    if failed:
        return fail_job(session, job_id, Reason.BAD_DATA, f"No usable rows in {', '.join(failed)}: see the dataset's report.")
    spec = upgrade_spec(taken.spec)
    reports = [(need.dataset_id, DatasetReport.model_validate(need.report)) for need in needs if need.report is not None]
    wrong = [why for dataset_id, report in reports if (why := report.wrong_kind(dataset_id, spec.objective))]
    if wrong:  # submit refuses these; a dataset that was not validated yet could be of any kind
        return fail_job(session, job_id, Reason.BAD_DATA, "; ".join(wrong))
    missing = [MissingCache("tokens", need.dataset_id, need.sha256, need.token_key) for need in needs if need.tokens is None]
    missing += [
        MissingCache("pictures", need.dataset_id, need.sha256, need.picture_key)
        for need in needs
        if need.picture_key is not None and need.pictures is None
    ]
    return JobClaim(job_id, taken.project_id, spec, boot_id, missing)


def renew_job(session: Session, claim: JobClaim, *, lease_seconds: float) -> bool:
    """Renew the lease. False when the job is no longer this preparer's: cancelled, or taken over."""
    return _renew(session, Job, claim.job_id, claim.boot_id, lease_seconds)


def renew_dataset(session: Session, claim: DatasetClaim, *, lease_seconds: float) -> bool:
    """Renew the lease. False when the dataset is no longer this preparer's: deleted, or taken over."""
    return _renew(session, Dataset, claim.dataset_id, claim.boot_id, lease_seconds)


def release_job(session: Session, claim: JobClaim) -> None:
    """Give a job back unfinished; its bell still stands."""
    if renew_job(session, claim, lease_seconds=0):
        _release(session, Job, claim.job_id)


def release_dataset(session: Session, claim: DatasetClaim, *, counted: bool) -> None:
    """Give an upload back unfinished; its bell still stands. The try counts where the upload may be to blame."""
    if renew_dataset(session, claim, lease_seconds=0):
        _release(session, Dataset, claim.dataset_id)
        if not counted:
            session.execute(update(Dataset).where(Dataset.id == claim.dataset_id).values(tries=Dataset.tries - 1))


def record_tokens(session: Session, claim: JobClaim, missing: MissingCache, counts: TokenCounts) -> None:
    """A token cache lies closed in the storage."""
    row = insert(TokenCache).values(
        key=missing.key,
        dataset_id=missing.dataset_id,
        project_id=claim.project_id,
        counts=counts.model_dump(mode="json"),
    )
    session.execute(row.on_conflict_do_nothing())


def record_pictures(session: Session, claim: JobClaim, missing: MissingCache) -> None:
    """A picture cache lies closed in the storage."""
    row = insert(PictureCache).values(key=missing.key, dataset_id=missing.dataset_id, project_id=claim.project_id)
    session.execute(row.on_conflict_do_nothing())


def queue_job(session: Session, claim: JobClaim) -> tuple[StatusChanged, outbox.Bell | None] | None:
    """All tokens stand: on to the GPU queue, or fail when none of them is trained on or no live worker has the memory.

    None when the job is gone.
    """
    job = session.scalar(select(Job).where(Job.id == claim.job_id, Job.status == JobStatus.VALIDATING_FILES).with_for_update())
    if job is None:
        return None
    counts = jobs.job_tokens(session, job.id)
    outbox.answer(session, outbox.Bell(outbox.PREPARE_JOB, job.id))
    problem = _unusable(counts, claim.spec)
    if problem is not None:
        return jobs.move(session, job, JobStatus.FAILED, reason=problem[0], message=problem[1]), None
    too_large = plans.why_too_large(session, claim.spec, counts, nodes.largest_node(session))
    if too_large is not None:
        return jobs.move(
            session, job, JobStatus.FAILED, reason=Reason.BAD_SPEC, message=f"The job fits no worker: {too_large}"
        ), None
    change = jobs.move(session, job, JobStatus.QUEUED, phase=None)
    return change, outbox.post(session, outbox.Bell(outbox.RUN_JOB, job.id))


def fail_job(session: Session, job_id: str, reason: Reason, message: str) -> StatusChanged | None:
    """End a job before any run. None when it is no longer in `validating_files`."""
    job = session.scalar(select(Job).where(Job.id == job_id, Job.status == JobStatus.VALIDATING_FILES).with_for_update())
    if job is None:
        return None
    outbox.answer(session, outbox.Bell(outbox.PREPARE_JOB, job_id))
    return jobs.move(session, job, JobStatus.FAILED, reason=reason, message=message)


def _unusable(counts: list[TokenCounts], spec: JobSpec) -> tuple[Reason, str] | None:
    usable = sum(c.examples for c in counts)
    if sum(c.trained_tokens for c in counts) == 0:
        return Reason.NO_TRAINABLE_TOKENS, Reason.NO_TRAINABLE_TOKENS.facts.sentence
    if usable <= spec.data.eval_rows:
        return Reason.BAD_DATA, f"data.eval_rows holds out {spec.data.eval_rows} rows, and only {usable} can be used."
    return None


def _release(session: Session, table: type[Job] | type[Dataset], row_id: str) -> None:
    session.execute(update(table).where(table.id == row_id).values(owner=None, lease_until=None))


def _renew(session: Session, table: type[Job] | type[Dataset], row_id: str, boot_id: str, lease_seconds: float) -> bool:
    waits = JobStatus.VALIDATING_FILES if table is Job else DatasetStatus.UPLOADED
    renewed = session.execute(
        update(table)
        .where(table.id == row_id, table.owner == boot_id, table.status == waits)
        .values(lease_until=_lease(lease_seconds))
    )
    return bool(renewed.rowcount == 1)  # type: ignore[attr-defined]


def _free(table: type[Job] | type[Dataset]) -> Any:
    return table.lease_until.is_(None) | (table.lease_until < func.now())


def _lease(seconds: float) -> Any:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
