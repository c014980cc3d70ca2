"""Live workers as they say of themselves: registered at start, seen again with every beat, forgotten when silent.

A row here is information for people and plans. Who owns a job is decided by the job's own lease alone.
"""

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from store.tables import Endpoint, WorkerNode

LIVE_SECONDS = 45.0
"""A node silent for longer is not planned with."""
_FORGET_SECONDS = 600.0


def register(session: Session, *, boot_id: str, name: str, queues: list[str], device: str, budget_gib: float | None) -> None:
    """Write a worker's row. `device` is the GPU's name, or cpu; `budget_gib` is the GPU memory a run may plan with."""
    facts = {"name": name, "queues": queues, "device": device, "budget_gib": budget_gib}
    row = insert(WorkerNode).values(boot_id=boot_id, **facts)
    session.execute(row.on_conflict_do_update(index_elements=["boot_id"], set_=facts | {"last_seen_at": func.now()}))


def beat(session: Session, boot_id: str) -> bool:
    """Still here. False when the row is gone (pruned while the worker could not reach the database): register again."""
    seen = session.execute(update(WorkerNode).where(WorkerNode.boot_id == boot_id).values(last_seen_at=func.now()))
    return bool(seen.rowcount == 1)  # type: ignore[attr-defined]


def leave(session: Session, boot_id: str) -> None:
    """The worker ends in good order."""
    session.execute(delete(WorkerNode).where(WorkerNode.boot_id == boot_id))


def prune(session: Session) -> None:
    """Forget workers and endpoints that were not seen for ten minutes."""
    silent = func.now() - _seconds(_FORGET_SECONDS)
    session.execute(delete(WorkerNode).where(WorkerNode.last_seen_at < silent))
    session.execute(delete(Endpoint).where(Endpoint.last_seen_at < silent))


def live_nodes(session: Session) -> list[WorkerNode]:
    """Workers seen in the last 45 seconds, by name."""
    live = WorkerNode.last_seen_at > func.now() - _seconds(LIVE_SECONDS)
    return list(session.scalars(select(WorkerNode).where(live).order_by(WorkerNode.name, WorkerNode.boot_id)))


def largest_node(session: Session) -> WorkerNode | None:
    """The live worker that trains with the largest memory budget. None when none is up, or none has a GPU."""
    training = [node for node in live_nodes(session) if "gpu" in node.queues and node.budget_gib is not None]
    return max(training, key=lambda node: node.budget_gib or 0.0, default=None)


def _seconds(seconds: float) -> ColumnElement[object]:
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds)
