"""What a run says, numbered and handed on: to the live stream at once, to the record in batches under the fence.

The supervisor owns the run's numbering: the child's events and its own get the next `seq` here. A thread stores batches, so
that a slow or absent database never stalls the pump; what waits is bounded by `has_room`, and beyond it the child is held
back by its own pipe. Sits between worker/supervisor.py and store/runs.py.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable

from core.errors import FenceLost, StropError
from core.events import StatusChanged, TrainEvent
from store import events, runs, stream
from store.db import UNREACHABLE, Database

log = logging.getLogger(__name__)

BATCH = 500
BACKLOG = 10_000
_RETRY_SECONDS = 1.0


class GaveUp(StropError):
    """The database stayed away for too long: what became of the run is left to the sweeper."""


class RunEvents:
    """The events of one attempt. Safe to use from several threads."""

    def __init__(self, database: Database, live: stream.Publisher, claim: runs.Claim, *, flush_seconds: float) -> None:
        self._database = database
        self._live = live
        self._claim = claim
        self._flush_seconds = flush_seconds
        self._seq = claim.began.seq
        self._waiting: list[TrainEvent] = []
        self._lock = threading.Lock()
        self._storing = threading.Lock()
        self._unsure = False
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._record, name="recorder", daemon=True)
        self.failure: Exception | None = None
        """Why the record refuses these events: FenceLost, or a bug. Set once; nothing is stored after it."""
        live.publish(claim.job_id, claim.attempt, [claim.began])
        self._thread.start()

    def say(self, said: Iterable[TrainEvent]) -> None:
        """Number events, stream them now, store them soon."""
        with self._lock:
            numbered = []
            for event in said:
                self._seq += 1
                numbered.append(event.model_copy(update={"seq": self._seq}))
            if numbered:
                self._live.publish(self._claim.job_id, self._claim.attempt, numbered)
                self._waiting += numbered
        if len(self._waiting) >= BATCH:
            self._wake.set()

    def flush(self) -> bool:
        """Store what was said until now. False while the database is away. Raises what `failure` holds."""
        is_stored = self._store_batch()
        if self.failure is not None:
            raise self.failure
        return is_stored

    def has_room(self) -> bool:
        return len(self._waiting) < BACKLOG

    def say_last(self, change: StatusChanged) -> None:
        """Stream the status event that the record itself wrote when it closed the run."""
        self._live.publish(self._claim.job_id, self._claim.attempt, [change])

    def close(self, give_up: Callable[[], bool]) -> None:
        """Store what waits. Tries on while the database is away, until `give_up()`. Raises GaveUp,
        or what `failure` holds."""
        self.abandon()
        while self.failure is None and not self._store_batch():
            if give_up():
                raise GaveUp(f"{self._claim.job_id}: {len(self._waiting)} events could not be stored")
            time.sleep(_RETRY_SECONDS)
        if self.failure is not None:
            raise self.failure

    def abandon(self) -> None:
        """End the thread; what waits is dropped unless `close` follows."""
        self._ended = True
        self._wake.set()
        self._thread.join()

    def _record(self) -> None:
        while not self._ended and self.failure is None:
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            self._store_batch()

    def _store_batch(self) -> bool:
        """Store all that waits now, in batches. True when nothing is left."""
        with self._storing:
            while self._waiting and self.failure is None:
                with self._lock:
                    batch = self._waiting[:BATCH]
                try:
                    self._store(batch)
                except UNREACHABLE as error:
                    if not self._unsure:
                        log.warning("%s: events wait for the database: %s", self._claim.job_id, type(error).__name__)
                    self._unsure = True
                    return False
                except Exception as error:
                    if not isinstance(error, FenceLost):
                        log.exception("%s: events can't be stored", self._claim.job_id)
                    self.failure = error
                    return False
                self._unsure = False
                with self._lock:
                    del self._waiting[: len(batch)]
        return self.failure is None

    def _store(self, batch: list[TrainEvent]) -> None:
        with self._database.transaction() as session:
            if self._unsure:  # the last commit's answer was lost: it may have happened
                stored = events.next_seq(session, self._claim.job_id, self._claim.attempt)
                batch = [event for event in batch if event.seq >= stored]
            runs.record_events(session, self._claim, batch)
