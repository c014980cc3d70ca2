"""The live tail of a job's events: a Redis stream per job, whose entry ids are the events' own places.

A Redis stream id is two rising numbers, and so is `<attempt>-<seq>`: an event is appended under its place, a reader asks
for what stands behind one, and a stale attempt's late write is refused by Redis itself. The stream is a copy; what is
missing in it (Redis was away, wiped or trimmed) a reader finds in Postgres.
"""

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import redis
import redis.asyncio

from core.events import TrainEvent
from core.records import EventRecord
from store.events import Place, parse_place

log = logging.getLogger(__name__)

KEPT = 5_000
TTL_SECONDS = 24 * 3600


def stream_key(job_id: str) -> str:
    return f"strop:events:{job_id}"


class Publisher:
    """Appends events. Redis being away is no error of the run: said once in the log, and again when it is back."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1, health_check_interval=25)
        self._away = False

    def publish(self, job_id: str, attempt: int, events: Iterable[TrainEvent]) -> None:
        key = stream_key(job_id)
        try:
            pipe = self._redis.pipeline(transaction=False)
            for event in events:
                fields: dict[Any, Any] = {"event": event.model_dump_json()}
                pipe.xadd(key, fields, id=str(Place(attempt, event.seq)), maxlen=KEPT, approximate=True)
            pipe.expire(key, TTL_SECONDS)
            answers = pipe.execute(raise_on_error=False)
        except redis.RedisError as error:
            if not self._away:
                log.warning("live stream away, Postgres goes on: %s", error)
            self._away = True
            return
        refused = [answer for answer in answers if isinstance(answer, redis.RedisError)]
        if refused:
            log.warning("%s: %d events not streamed: %s", job_id, len(refused), refused[0])
        self._away = False

    def close(self) -> None:
        self._redis.close()


async def read_tail(client: "redis.asyncio.Redis", job_id: str, place: Place, *, block_seconds: float) -> list[EventRecord]:
    """Events behind a place, waiting up to `block_seconds` for the first. Raises redis.RedisError when Redis is away."""
    answer: Any = await client.xread({stream_key(job_id): str(place)}, count=500, block=max(1, int(block_seconds * 1000)))
    if not answer:
        return []
    [[_, entries]] = answer
    return [_record(entry_id, fields) for entry_id, fields in entries]


def _record(entry_id: bytes | str, fields: dict[bytes | str, bytes | str]) -> EventRecord:
    place = parse_place(entry_id.decode() if isinstance(entry_id, bytes) else entry_id)
    raw = fields.get(b"event") or fields["event"]
    event = json.loads(raw)
    kind, at = event.pop("kind"), event.pop("at")
    event.pop("seq")
    return EventRecord(id=str(place), kind=kind, at=datetime.fromtimestamp(at, UTC), data=event)
