"""A job's history: appended in batches, read after a place, and as curves.

An event's place is (attempt, seq), on the wire `<attempt>-<seq>`. Both numbers only rise, so every reader can go on from
where it was.
"""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import func, insert, select, tuple_
from sqlalchemy.orm import Session

from core.errors import InvalidInput, Problem
from core.events import StatusChanged, TrainEvent, metrics_of
from core.records import EventRecord, MetricPoint
from store.tables import Event, Job, Metric


class Place(NamedTuple):
    """Where an event stands in a job's history."""

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"


START = Place(0, 0)


def parse_place(text: str) -> Place:
    """`"3-17"` -> Place(3, 17). Raises InvalidInput."""
    attempt, _, seq = text.partition("-")
    if attempt.isdecimal() and seq.isdecimal() and len(text) <= 20 and int(attempt) < 2**31 and int(seq) < 2**31:
        return Place(int(attempt), int(seq))
    raise InvalidInput(
        "The event id can't be read", [Problem("bad-event-id", f"{text[:40]!r} is not of the form <attempt>-<seq>")]
    )


def next_seq(session: Session, job_id: str, attempt: int) -> int:
    """The seq that comes next. Call it only in a transaction that holds the job's row, else two writers may agree."""
    last = session.scalar(select(func.max(Event.seq)).where(Event.job_id == job_id, Event.attempt == attempt))
    return (last or 0) + 1


def append(session: Session, job: Job, attempt: int, events: list[TrainEvent]) -> None:
    """Store numbered events and their curve values. The caller's transaction holds the job's row under its fence."""
    if not events:
        return
    session.execute(
        insert(Event),
        [
            {
                "job_id": job.id,
                "project_id": job.project_id,
                "attempt": attempt,
                "seq": event.seq,
                "kind": event.kind,
                "at": datetime.fromtimestamp(event.at, UTC),
                "data": event.model_dump(mode="json", exclude={"seq", "at", "kind"}),
            }
            for event in events
        ],
    )
    points = [
        {
            "job_id": job.id,
            "project_id": job.project_id,
            "attempt": attempt,
            "step": getattr(event, "step", 0),
            "name": name,
            "value": value,
        }
        for event in events
        for name, value in metrics_of(event).items()
    ]
    if points:
        session.execute(insert(Metric), points)


UNSEEN = 1_000_000
"""Numbers left free when a run is closed by someone else: its worker may have streamed events that Postgres never saw, and
one place must never mean two events."""


def append_status(session: Session, job: Job, change: StatusChanged, *, unseen: int = 0) -> StatusChanged:
    """Store a status change as the next event of the job's present attempt; the caller's transaction made the change.

    `unseen` numbers are left free before it.
    """
    numbered = change.model_copy(update={"seq": next_seq(session, job.id, job.fence) + unseen})
    append(session, job, job.fence, [numbered])
    return numbered


def after(session: Session, job_id: str, place: Place, *, kinds: tuple[str, ...] = (), limit: int = 500) -> list[EventRecord]:
    """Events after a place, oldest first; only of `kinds` where any are named."""
    query = select(Event).where(Event.job_id == job_id, tuple_(Event.attempt, Event.seq) > tuple_(*place))
    if kinds:
        query = query.where(Event.kind.in_(kinds))
    rows = session.scalars(query.order_by(Event.attempt, Event.seq).limit(limit))
    return [EventRecord(id=str(Place(row.attempt, row.seq)), kind=row.kind, at=row.at, data=row.data) for row in rows]


def curves(
    session: Session, job_id: str, *, after_step: int = -1, attempt: int | None = None, limit: int = 1000
) -> list[MetricPoint]:
    """Curve values by step: each from the highest attempt that reached the step, or from one attempt.

    Returns at most `limit` steps, in order. A step's values of one attempt stay together: a later attempt replaces them all.
    """
    reached = (
        select(Metric.step, func.max(Metric.attempt).label("attempt"))
        .where(Metric.job_id == job_id, Metric.step > after_step)
        .group_by(Metric.step)
        .order_by(Metric.step)
        .limit(limit)
    )
    if attempt is not None:
        reached = reached.where(Metric.attempt == attempt)
    top = reached.subquery()
    rows = session.execute(
        select(Metric.step, Metric.attempt, Metric.name, Metric.value)
        .join(top, (Metric.step == top.c.step) & (Metric.attempt == top.c.attempt))
        .where(Metric.job_id == job_id)
        .order_by(Metric.step, Metric.name)
    )
    points: dict[int, dict[str, Any]] = {}
    for step, of_attempt, name, value in rows:
        points.setdefault(step, {"step": step, "attempt": of_attempt})[name] = value
    return [MetricPoint(**point) for point in points.values()]
