"""The sweeper: repairs what crashes and lost messages left, from the record alone.

A thread in the main process of every Celery worker (never a Celery task: a busy one-slot worker would not run it). A session
advisory lock on a connection of its own makes one of them effective; were two effective, every act is conditional and
harmless. Closes runs whose lease ran out, rings bells again, mends bells, forgets silent nodes and old idempotency keys.
"""

import logging
import threading

import redis
from sqlalchemy import Connection, NullPool, create_engine, delete, func, text

from store import nodes, outbox, runs
from store.db import UNREACHABLE, Database, database_url
from store.queue import Doorbell
from store.settings import Settings
from store.stream import Publisher
from store.tables import Idempotency

log = logging.getLogger(__name__)

_LOCK_KEY = 0x7374726F70  # "strop"
_IDEMPOTENCY_HOURS = 24
_GRACE_LEASES = 1.5


class Sweeper:
    """Sweeps every `sweep_seconds` from `start` to `stop`."""

    def __init__(self, settings: Settings, database: Database, live: Publisher, doorbell: Doorbell) -> None:
        self._settings = settings
        self._database = database
        self._live = live
        self._doorbell = doorbell
        self._engine = create_engine(database_url(settings), poolclass=NullPool, connect_args={"connect_timeout": 5})
        self._connection: Connection | None = None
        self._held = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._let_go()
        self._engine.dispose()

    def sweep(self) -> bool:
        """One round. False when another sweeper is the effective one."""
        if not self._leads():
            return False
        self._close_expired()
        with self._database.transaction() as session:
            outbox.mend(session)
            nodes.prune(session)
            old = func.now() - func.make_interval(0, 0, 0, 0, _IDEMPOTENCY_HOURS)
            session.execute(delete(Idempotency).where(Idempotency.created_at < old))
        self._ring_again()
        return True

    def _work(self) -> None:
        while True:
            try:
                self.sweep()
            except UNREACHABLE as error:
                log.warning("sweep put off, the database is away: %s", type(error).__name__)
                self._let_go()
            except Exception:  # the next round goes on: a sweeper that ended would be missed too late
                log.exception("sweep failed")
                self._let_go()
            if self._ended.wait(self._settings.sweep_seconds):
                return

    def _leads(self) -> bool:
        """Hold the lock, or try for it. It is lost with its connection, which every round proves alive."""
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            self._held = False
        if self._held:
            self._connection.execute(text("SELECT 1"))
        else:
            self._held = bool(self._connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _LOCK_KEY}))
        return self._held

    def _let_go(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.invalidate()
            connection.close()

    def _close_expired(self) -> None:
        grace = _GRACE_LEASES * self._settings.lease_seconds
        with self._database.transaction() as session:
            closed = runs.close_expired(session, grace_seconds=grace)
        for job, change, _ in closed:
            log.warning("%s: attempt %d was lost; the job is %s", job.id, job.fence, change.status)
            self._live.publish(job.id, job.fence, [change])
        self._doorbell.ring([bell for _, _, bell in closed if bell is not None])

    def _ring_again(self) -> None:
        """Ring due bells whose queue is idle: while messages wait there, theirs may be among them, and ringing every bell
        again and again would fill the queue of a busy worker without end."""
        with self._database.transaction() as session:
            due = outbox.due(session, self._settings.bell_seconds)
        try:
            idle = {queue for queue in {bell.queue for bell in due} if self._doorbell.is_idle(queue)}
        except redis.RedisError as error:
            log.warning("%d bells wait for the broker: %s", len(due), error)
            return
        self._doorbell.ring([bell for bell in due if bell.queue in idle])
