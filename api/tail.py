"""Follow a job's history live: what stands in Postgres, then the Redis stream, each event exactly once and in order.

Postgres is complete but a second late; Redis is at once but may be away, wiped or trimmed. So an entry of the stream is taken
only when it continues the last event of the same attempt; whatever else happens (a gap, a new attempt, Redis away, silence),
Postgres is read again from where we stand. No session or transaction is open while waiting.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import redis
from starlette.concurrency import run_in_threadpool

from api.services import Services
from core.records import EventRecord
from core.states import TERMINAL
from store import events, jobs, stream
from store.events import START, Place, parse_place

LIFE_SECONDS = 3600.0
"""A connection ends after this; the client reconnects by id. So no stream outlives a deployment, or its key, for long."""

_BLOCK_SECONDS = 1.0
_PAUSE_SECONDS = 0.5
_BATCH = 500


@dataclass(frozen=True)
class _Record:
    """What Postgres knows after a place."""

    events: list[EventRecord]
    is_over: bool
    """The job had ended before the events were read, so these are the last."""

    end: EventRecord | None
    """The event that says how it ended."""


async def follow(services: Services, project_id: str, job_id: str, place: Place) -> AsyncIterator[EventRecord | None]:
    """Events after `place` until the job has ended and all were sent. None now and then, when there was nothing to send.

    A run that was lost may have streamed events that never reached Postgres, and the event that closed it then stands
    *before* them. The job's last status is sent in any case, so that a stream never ends without it.
    """
    begun = time.monotonic()
    told_end = False
    while time.monotonic() - begun < LIFE_SECONDS:
        record = await run_in_threadpool(_read, services, project_id, job_id, place)
        for event in record.events:
            place = parse_place(event.id)
            told_end |= record.end is not None and event.id == record.end.id
            yield event
        if len(record.events) == _BATCH:
            continue
        if record.is_over:
            if record.end is not None and not told_end and parse_place(record.end.id) < place:
                yield record.end
            return
        yield None
        try:
            async for event in _stream(services, job_id, place):
                place = parse_place(event.id)
                yield event
        except redis.RedisError:
            await asyncio.sleep(_PAUSE_SECONDS)


async def _stream(services: Services, job_id: str, place: Place) -> AsyncIterator[EventRecord]:
    """Entries of the live stream that continue `place` without a gap; ends at the first doubt. Raises redis.RedisError."""
    while True:
        entries = await stream.read_tail(services.redis, job_id, place, block_seconds=_BLOCK_SECONDS)
        if not entries:
            return
        for entry in entries:
            found = parse_place(entry.id)
            if found != Place(place.attempt, place.seq + 1):
                # Missing ones reach Postgres with the run's next batch; a new attempt stands in it before it streams.
                await asyncio.sleep(_PAUSE_SECONDS if found.attempt == place.attempt else _PAUSE_SECONDS / 10)
                return
            place = found
            yield entry
            if entry.kind == "status":
                return  # perhaps the last one: only the record knows


def _read(services: Services, project_id: str, job_id: str, place: Place) -> _Record:
    with services.database.transaction() as session:
        # The status first: an end and its event are committed together, so an end seen here is among the events below.
        is_over = jobs.find_job(session, project_id, job_id).status in TERMINAL
        found = events.after(session, job_id, place, limit=_BATCH)
        statuses = events.after(session, job_id, START, kinds=("status",)) if is_over else []
    return _Record(found, is_over, statuses[-1] if statuses else None)
