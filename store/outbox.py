"""Bells that must still be answered: posted in the transaction that makes work, removed by the claim that takes it.

A bell is (task, key); the key is one id and all that ever travels through the broker. After the commit it is rung by
`store.queue`; one that stays unanswered for `bell_seconds`, for whatever reason, is rung again by a sweeper. So a message
may be lost, doubled, late or forged, and nothing happens to the work.
"""

from dataclasses import dataclass

from sqlalchemy import delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.states import DatasetStatus, JobStatus
from store.tables import Dataset, Job, Outbox

RUN_JOB = "run_job"
PREPARE_JOB = "prepare_job"
VALIDATE_DATASET = "validate_dataset"
QUEUES = {RUN_JOB: "gpu", PREPARE_JOB: "prepare", VALIDATE_DATASET: "prepare"}


@dataclass(frozen=True)
class Bell:
    """Work of kind `task` (a Celery task's name) waits in the record under the id `key`."""

    task: str
    key: str

    @property
    def queue(self) -> str:
        return QUEUES[self.task]


def post(session: Session, bell: Bell) -> Bell:
    """Post a bell, or make a posted one due at once. Ring it after the commit."""
    row = insert(Outbox).values(task=bell.task, key=bell.key, queue=bell.queue)
    session.execute(row.on_conflict_do_update(index_elements=["task", "key"], set_={"sent_at": None}))
    return bell


def answer(session: Session, bell: Bell) -> None:
    """The work is taken, or no longer wanted."""
    session.execute(delete(Outbox).where(Outbox.task == bell.task, Outbox.key == bell.key))


def mark_rung(session: Session, bells: list[Bell]) -> None:
    for bell in bells:
        session.execute(
            update(Outbox)
            .where(Outbox.task == bell.task, Outbox.key == bell.key)
            .values(sent_at=func.now(), tries=Outbox.tries + 1)
        )


def due(session: Session, bell_seconds: float, limit: int = 500) -> list[Bell]:
    """Bells never sent, or sent and unanswered for `bell_seconds`, by the database's clock."""
    overdue = Outbox.sent_at < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, bell_seconds)
    rows = session.scalars(select(Outbox).where(Outbox.sent_at.is_(None) | overdue).order_by(Outbox.created_at).limit(limit))
    return [Bell(row.task, row.key) for row in rows]


def mend(session: Session) -> int:
    """Make bells and waiting work agree: drop bells whose work no longer waits, post those of work that has none.

    Every transaction that makes or takes work keeps them in step; this catches what a restored backup, a deleted dataset or
    a hand at the database left behind. Returns the number of bells posted.
    """
    posted = 0
    for task, waiting in {
        RUN_JOB: select(Job.id).where(Job.status == JobStatus.QUEUED),
        PREPARE_JOB: select(Job.id).where(Job.status == JobStatus.VALIDATING_FILES),
        VALIDATE_DATASET: select(Dataset.id).where(Dataset.status == DatasetStatus.UPLOADED, Dataset.deleted_at.is_(None)),
    }.items():
        session.execute(delete(Outbox).where(Outbox.task == task, Outbox.key.not_in(waiting)))
        ids = waiting.subquery()
        rows = select(literal(task), ids.c.id, literal(QUEUES[task]))
        added = insert(Outbox).from_select(["task", "key", "queue"], rows).on_conflict_do_nothing()
        posted += session.execute(added).rowcount  # type: ignore[attr-defined]
    return posted
