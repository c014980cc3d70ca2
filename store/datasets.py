"""Datasets as the control plane sees them: create, read, list, delete. What the preparer does is in `store/preparation.py`.

Files lie in the storage before the row stands and go after it is marked deleted, so a row never points at nothing.
"""

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from core.errors import Conflict, NotFound, Problem
from core.records import DatasetRecord, DatasetReport
from core.states import TERMINAL, DatasetStatus
from store import outbox
from store.tables import Dataset, Job, JobDataset


def create_dataset(
    session: Session, project_id: str, dataset_id: str, *, name: str, filename: str, size: int, sha256: str
) -> tuple[Dataset, outbox.Bell]:
    """Insert a dataset whose bytes already lie in the storage, and post the bell that has it validated."""
    dataset = Dataset(
        id=dataset_id,
        project_id=project_id,
        name=name,
        filename=filename,
        bytes=size,
        sha256=sha256,
        status=DatasetStatus.UPLOADED,
    )
    session.add(dataset)
    session.flush()
    session.refresh(dataset)
    return dataset, outbox.post(session, outbox.Bell(outbox.VALIDATE_DATASET, dataset_id))


def find_dataset(session: Session, project_id: str, dataset_id: str) -> Dataset:
    """The dataset. Raises NotFound, the same for one that is not there, deleted, or of another project."""
    dataset = session.scalar(select(Dataset).where(*_theirs(project_id), Dataset.id == dataset_id))
    if dataset is None:
        raise NotFound(f"There is no dataset {dataset_id}")
    return dataset


def hold_datasets(session: Session, project_id: str, dataset_ids: list[str]) -> dict[str, Dataset]:
    """Those of the datasets that exist, kept from being deleted until the transaction ends."""
    query = select(Dataset).where(*_theirs(project_id), Dataset.id.in_(dataset_ids)).order_by(Dataset.id)
    return {dataset.id: dataset for dataset in session.scalars(query.with_for_update(read=True))}


def list_datasets(session: Session, project_id: str, *, cursor: str | None = None, limit: int = 20) -> list[Dataset]:
    """Newest first; `cursor` is the id of the last dataset of the page before. Returns up to `limit` + 1, to tell of more."""
    query = select(Dataset).where(*_theirs(project_id))
    if cursor is not None:
        # A dataset deleted since its page was read still marks a place.
        last = session.scalar(select(Dataset).where(Dataset.project_id == project_id, Dataset.id == cursor))
        if last is None:
            raise NotFound(f"There is no dataset {cursor}")
        query = query.where(
            (Dataset.created_at < last.created_at) | ((Dataset.created_at == last.created_at) & (Dataset.id < last.id))
        )
    return list(session.scalars(query.order_by(Dataset.created_at.desc(), Dataset.id.desc()).limit(limit + 1)))


def delete_dataset(session: Session, project_id: str, dataset_id: str) -> None:
    """Mark a dataset deleted; its files are the caller's to remove after the commit. Raises NotFound, and Conflict while a
    job that has not ended reads it."""
    query = select(Dataset).where(*_theirs(project_id), Dataset.id == dataset_id)
    dataset = session.scalar(query.with_for_update())
    if dataset is None:
        raise NotFound(f"There is no dataset {dataset_id}")
    users = session.scalars(
        select(Job.id)
        .join(JobDataset, JobDataset.job_id == Job.id)
        .where(JobDataset.dataset_id == dataset_id, Job.status.not_in(TERMINAL))
        .order_by(Job.id)
    ).all()
    if users:
        raise Conflict("Jobs that have not ended read this dataset", [Problem("dataset-in-use", job_id) for job_id in users])
    dataset.deleted_at = session.scalar(select(func.now()))
    dataset.owner = dataset.lease_until = None  # a preparer that works on it loses its lease and stops
    if dataset.status == DatasetStatus.UPLOADED:
        dataset.status = DatasetStatus.FAILED
    session.flush()
    outbox.answer(session, outbox.Bell(outbox.VALIDATE_DATASET, dataset_id))


def dataset_record(dataset: Dataset) -> DatasetRecord:
    return DatasetRecord(
        id=dataset.id,
        name=dataset.name,
        filename=dataset.filename,
        status=DatasetStatus(dataset.status),
        bytes=dataset.bytes,
        sha256=dataset.sha256,
        created_at=dataset.created_at,
        report=None if dataset.report is None else DatasetReport.model_validate(dataset.report),
    )


def _theirs(project_id: str) -> tuple[ColumnElement[bool], ...]:
    return Dataset.project_id == project_id, Dataset.deleted_at.is_(None)
