"""What a request may use: one set per process, made when the application starts and closed when it stops."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.concurrency import run_in_threadpool

from store import schema
from store.db import Database, database_url
from store.files import Storage
from store.queue import Doorbell, redis_url
from store.settings import Settings

log = logging.getLogger(__name__)

POOL_SIZE = 20
"""With as many more on demand: the 40 threads that synchronous routes run in never wait for a connection."""

_UPLOAD_LEFTOVER_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Services:
    settings: Settings
    pepper: bytes
    database: Database
    storage: Storage
    doorbell: Doorbell
    redis: redis.asyncio.Redis
    uploads: Path
    """Local folder of uploads in progress, on the scratch disk."""

    newest_revision: str | None


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Reaches neither Postgres nor Redis: the service starts before them, and says so at /readyz. Raises what makes it
    useless for good: no DATABASE_URL, no pepper, a scratch folder that can't be written."""
    uploads = settings.scratch_folder / "uploads"
    await run_in_threadpool(_clear_leftovers, uploads)
    database = Database(database_url(settings), pool_size=POOL_SIZE, application_name="strop-api")
    doorbell = Doorbell(settings, database)
    client = redis.asyncio.Redis.from_url(
        redis_url(settings),
        socket_connect_timeout=2,
        socket_timeout=5,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        yield Services(
            settings=settings,
            pepper=settings.pepper,
            database=database,
            storage=Storage(settings.storage, settings.scratch_folder / "cache"),
            doorbell=doorbell,
            redis=client,
            uploads=uploads,
            newest_revision=schema.newest_revision(),
        )
    finally:
        await client.aclose()
        doorbell.close()
        database.close()


def _clear_leftovers(uploads: Path) -> None:
    """A process that was killed in an upload left its file; one so old is in nobody's hands."""
    uploads.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in uploads.iterdir():
        if time.time() - path.stat().st_mtime > _UPLOAD_LEFTOVER_SECONDS:
            log.warning("removing the upload %s, left behind by a process that died", path.name)
            path.unlink(missing_ok=True)
