"""The record: every table of strop, one class each. Postgres is the truth; Redis, queues and processes are hints.

`project_id` stands in every tenant row. Relationships are left out on purpose: what a query needs, it says. JSON columns
hold frozen documents (spec, report, config) that are read through their pydantic class, never queried into.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    func,
    text,
)
from sqlalchemy import UniqueConstraint as Unique
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DEFAULT_PROJECT = "prj_default"


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[str]: JSONB,
        float: Float(53),
    }


def _id() -> Mapped[str]:
    return mapped_column(String(64), primary_key=True)


def _project() -> Mapped[str]:
    return mapped_column(ForeignKey("project.id"), index=True)


def _created() -> Mapped[datetime]:
    return mapped_column(server_default=func.now())


class Project(Base):
    __tablename__ = "project"

    id: Mapped[str] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = _created()


class ApiKey(Base):
    """`hash` is HMAC-SHA-256 of the secret under the pepper; the secret itself is shown once and stored nowhere."""

    __tablename__ = "api_key"

    id: Mapped[str] = _id()
    project_id: Mapped[str] = _project()
    name: Mapped[str]
    hash: Mapped[str]
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = _created()
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Model(Base):
    """A base model the operator registered. Never written over REST."""

    __tablename__ = "model"

    id: Mapped[str] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    architecture: Mapped[str]
    parameters: Mapped[int] = mapped_column(BigInteger)
    context_length: Mapped[int] = mapped_column(Integer)
    weights: Mapped[str]
    tokenizer: Mapped[str]
    processor: Mapped[str | None] = mapped_column(comment="digest of how it takes pictures; null where it takes none")
    has_chat_template: Mapped[bool]
    config: Mapped[dict[str, Any]]
    folder: Mapped[str] = mapped_column(comment="name of its folder under STROP_MODELS")
    allow_remote_code: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    created_at: Mapped[datetime] = _created()


class Dataset(Base):
    __tablename__ = "dataset"

    id: Mapped[str] = _id()
    project_id: Mapped[str] = _project()
    name: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    status: Mapped[str]
    report: Mapped[dict[str, Any] | None]
    owner: Mapped[str | None] = mapped_column(comment="boot id of the preparer that works on it")
    lease_until: Mapped[datetime | None]
    tries: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    created_at: Mapped[datetime] = _created()
    deleted_at: Mapped[datetime | None]


class TokenCache(Base):
    """One dataset as one combination of tokenizer, template and data part of a spec sees it (core.run.token_key)."""

    __tablename__ = "token_cache"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), primary_key=True)
    project_id: Mapped[str] = _project()
    counts: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = _created()


class PictureCache(Base):
    """The pictures of one dataset as one image processor makes them (core.run.picture_key)."""

    __tablename__ = "picture_cache"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), primary_key=True)
    project_id: Mapped[str] = _project()
    created_at: Mapped[datetime] = _created()


class Job(Base):
    """What a user asked for. `fence` is the number of the latest attempt; every write of a run names it."""

    __tablename__ = "job"

    id: Mapped[str] = _id()
    project_id: Mapped[str] = _project()
    spec: Mapped[dict[str, Any]]
    base_model: Mapped[str]
    status: Mapped[str]
    phase: Mapped[str | None]
    reason: Mapped[str | None]
    message: Mapped[str] = mapped_column(server_default="")
    fence: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    owner: Mapped[str | None] = mapped_column(comment="boot id of the worker or preparer that holds the lease")
    lease_until: Mapped[datetime | None]
    lost_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    failed_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    step: Mapped[int | None] = mapped_column(Integer)
    total_steps: Mapped[int | None] = mapped_column(Integer)
    cancel_requested_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = _created()
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    adapter_id: Mapped[str | None] = mapped_column(ForeignKey("adapter.id"))
    adapter_version: Mapped[int | None] = mapped_column(Integer)

    __table_args__ = (
        Index("ix_job_status_lease_until", "status", "lease_until"),
        Index("ix_job_created", "created_at", "id"),
    )


class JobDataset(Base):
    """Which datasets a job reads: a dataset in use is not deleted."""

    __tablename__ = "job_dataset"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), primary_key=True, index=True)
    project_id: Mapped[str] = _project()
    token_key: Mapped[str]
    picture_key: Mapped[str | None] = mapped_column(comment="null for rows without pictures")


class Run(Base):
    """One attempt at a job."""

    __tablename__ = "run"

    id: Mapped[str] = _id()
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"))
    attempt: Mapped[int] = mapped_column(Integer)
    project_id: Mapped[str] = _project()
    status: Mapped[str]
    reason: Mapped[str | None]
    message: Mapped[str] = mapped_column(server_default="")
    worker: Mapped[str]
    boot_id: Mapped[str]
    started_at: Mapped[datetime] = _created()
    ended_at: Mapped[datetime | None]
    resumed_from_step: Mapped[int | None] = mapped_column(Integer)

    __table_args__ = (Unique("job_id", "attempt"),)


class Event(Base):
    """Attempt 0 holds what happened before the first run. (job, attempt) is the run."""

    __tablename__ = "event"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    kind: Mapped[str]
    at: Mapped[datetime]
    data: Mapped[dict[str, Any]]


class Metric(Base):
    __tablename__ = "metric"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    value: Mapped[float]


class Checkpoint(Base):
    """A checkpoint counts once its row stands: files under jobs/<job>/<attempt>/checkpoints/step-<n>, manifest verified."""

    __tablename__ = "checkpoint"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True)
    project_id: Mapped[str] = _project()
    sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = _created()
    deleted_at: Mapped[datetime | None]


class Adapter(Base):
    """A named line of versions."""

    __tablename__ = "adapter"

    id: Mapped[str] = _id()
    project_id: Mapped[str] = _project()
    name: Mapped[str]
    created_at: Mapped[datetime] = _created()

    __table_args__ = (Unique("project_id", "name"),)


class AdapterVersion(Base):
    """An immutable result: files under adapters/<sha256>. One per job at most, which makes publishing an exactly-once effect.

    An imported one has no job.
    """

    __tablename__ = "adapter_version"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapter.id"), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    project_id: Mapped[str] = _project()
    sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("job.id"), unique=True)
    facts: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = _created()


class AdapterAlias(Base):
    """A name within an adapter (`prod`) that points to a version."""

    __tablename__ = "adapter_alias"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapter.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = _project()
    version: Mapped[int] = mapped_column(Integer)
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Endpoint(Base):
    """A live inference endpoint, as it says of itself."""

    __tablename__ = "endpoint"

    boot_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str]
    bases: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    device: Mapped[str]
    started_at: Mapped[datetime] = _created()
    last_seen_at: Mapped[datetime] = _created()


class Deployment(Base):
    """A version that should be served, wherever its base is."""

    __tablename__ = "deployment"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapter.id"), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    project_id: Mapped[str] = _project()
    desired: Mapped[str] = mapped_column(comment="deployed or undeployed")
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Receipt(Base):
    """One check an endpoint made before serving a version, with the numbers it saw."""

    __tablename__ = "receipt"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    project_id: Mapped[str] = _project()
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapter.id"), index=True)
    version: Mapped[int] = mapped_column(Integer)
    endpoint_boot_id: Mapped[str]
    endpoint_name: Mapped[str]
    check: Mapped[str]
    passed: Mapped[bool]
    numbers: Mapped[dict[str, Any]]
    at: Mapped[datetime] = _created()


class WorkerNode(Base):
    """A live Celery worker, as it says of itself: its queue and its memory budget."""

    __tablename__ = "worker_node"

    boot_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str]
    queues: Mapped[list[str]]
    device: Mapped[str]
    budget_gib: Mapped[float | None]
    started_at: Mapped[datetime] = _created()
    last_seen_at: Mapped[datetime] = _created()


class MeasuredPeak(Base):
    """The most memory that a finished run held, beside its plan. The operator's, as models are: it refines everyone's plans."""

    __tablename__ = "measured_peak"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    device: Mapped[str]
    base_model: Mapped[str]
    method: Mapped[str]
    planned_gib: Mapped[float]
    measured_gib: Mapped[float]
    ratio: Mapped[float] = mapped_column(comment="core.plan.refine.ratio_of")
    at: Mapped[datetime] = _created()

    __table_args__ = (Index("ix_measured_peak_kind", "device", "base_model", "method", "at"),)


class Outbox(Base):
    """Bells to ring: posted in the transaction that makes the work, removed by the claim that answers it."""

    __tablename__ = "outbox"

    task: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    queue: Mapped[str]
    created_at: Mapped[datetime] = _created()
    sent_at: Mapped[datetime | None]
    tries: Mapped[int] = mapped_column(Integer, server_default=text("0"))


class Idempotency(Base):
    __tablename__ = "idempotency"

    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_digest: Mapped[str]
    status: Mapped[int] = mapped_column(Integer)
    response: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = _created()


class Audit(Base):
    """Who did what, written in the transaction that did it. A trigger refuses updates and deletes."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    project_id: Mapped[str] = _project()
    api_key_id: Mapped[str | None]
    action: Mapped[str]
    object_id: Mapped[str]
    detail: Mapped[dict[str, Any]]
    at: Mapped[datetime] = _created()
