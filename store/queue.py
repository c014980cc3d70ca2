"""The doorbell: one Celery application that the control plane rings and the workers answer.

Settings follow what was measured of Celery on Redis: early acknowledgement (a late one runs long tasks twice), no result
backend, JSON only, no prefetching, no remote control, no delayed tasks. A message is one id; it may be lost or doubled.
"""

import logging
from collections.abc import Iterable
from urllib.parse import quote, urlsplit, urlunsplit

import redis
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from store import outbox
from store.db import Database
from store.settings import Settings

log = logging.getLogger(__name__)


def redis_url(settings: Settings) -> str:
    """REDIS_URL with its password filled in from the password file."""
    if settings.redis_password_file is None:
        return settings.redis_url
    parts = urlsplit(settings.redis_url)
    password = quote(settings.redis_password_file.read_text().strip(), safe="")
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{password}@{host}"))


def make_celery(settings: Settings) -> Celery:
    """The application, for both sides."""
    app = Celery("strop", broker=redis_url(settings), set_as_current=False)
    app.conf.update(
        task_acks_late=False,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[Queue(name) for name in sorted(set(outbox.QUEUES.values()))],
        task_create_missing_queues=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_soft_shutdown_timeout=settings.stop_seconds + 10,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_connect_timeout": 2,
            "socket_timeout": 5,
            "health_check_interval": 25,
            "visibility_timeout": 3600,
        },
    )
    return app


class Doorbell:
    """Rings bells after a commit. A broker that is away costs a log line and some seconds, never the request: what could
    not be rung stays posted, and a sweeper rings it."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._app = make_celery(settings)
        self._redis = redis.Redis.from_url(redis_url(settings), socket_timeout=2, socket_connect_timeout=2)
        self._database = database

    def ring(self, bells: Iterable[outbox.Bell]) -> None:
        rung = []
        for bell in bells:
            try:
                self._app.send_task(bell.task, args=[bell.key], queue=bell.queue, retry=False, ignore_result=True)
            except OperationalError as error:
                log.warning("bell %s %s not rung, a sweeper will: %s", bell.task, bell.key, error)
                break
            rung.append(bell)
        if rung:
            with self._database.transaction() as session:
                outbox.mark_rung(session, rung)

    def is_idle(self, queue: str) -> bool:
        """No message waits in the queue. Raises redis.RedisError when the broker is away."""
        return self._redis.llen(queue) == 0

    def close(self) -> None:
        self._app.close()
        self._redis.close()
