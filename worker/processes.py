"""The processes of one Celery worker, and what each of them holds.

The main process answers no task: it holds the sweeper, the worker's presence and the drain flag, with a database of its own.
The one pool process is forked from it before any thread or connection exists, makes its own parts, and does the work.
"""

import logging
import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

from celery import Celery, signals

from store.db import Database, database_url
from store.files import Storage
from store.ids import new_id
from store.queue import Doorbell, make_celery, redis_url
from store.settings import Settings
from store.stream import Publisher
from worker import tasks
from worker.context import Context, DrainFlag
from worker.preparer import PREPARE_COMMAND
from worker.presence import Presence
from worker.scratch import Scratch
from worker.supervisor import TRAIN_COMMAND
from worker.sweeper import Sweeper

log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def make_worker(settings: Settings, *, train: Sequence[str] = TRAIN_COMMAND, prepare: Sequence[str] = PREPARE_COMMAND) -> Celery:
    """The Celery application of a worker, its tasks and its life. The commands start the children."""
    app = make_celery(settings)
    app.conf.worker_pool = "prefork"
    worker = _Worker(settings)
    tasks.register(app, worker.pool_context, train=train, prepare=prepare)
    for moment, act in {
        signals.worker_init: worker.on_init,
        signals.worker_ready: worker.on_ready,
        signals.worker_process_init: worker.on_process_init,
        signals.worker_shutting_down: worker.on_shutting_down,
        signals.worker_shutdown: worker.on_shutdown,
    }.items():
        moment.connect(act, weak=False)
    return app


class _Worker:
    """State of a worker across its processes. The fork copies it; `boot_id`, scratch lock and drain flag are then shared."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._boot_id = new_id("boot")
        self._drain = DrainFlag()
        self._name = ""
        self._scratch: Scratch | None = None
        self._main: Context | None = None
        self._pool: Context | None = None
        self._threads: list[Sweeper | Presence] = []

    def pool_context(self) -> Context:
        if self._pool is None:
            raise RuntimeError("the pool process was not initialised")
        return self._pool

    def on_init(self, sender: Any, **_: Any) -> None:
        logging.getLogger().setLevel(logging.INFO)
        self._name = sender.hostname
        self._scratch = Scratch(self._settings.scratch_folder, self._boot_id)
        self._scratch.remove_stale()

    def on_process_init(self, **_: Any) -> None:
        self._threads = []  # the main process's, not ours
        self._pool = self._context("strop worker")

    def on_ready(self, sender: Any, **_: Any) -> None:
        _before_celery(_STOP_SIGNALS, self._drain)
        self._main = main = self._context("strop sweeper")
        queues = sorted(sender.app.amqp.queues.consume_from)
        self._threads = [
            Sweeper(self._settings, main.database, main.live, main.doorbell),
            Presence(self._settings, main.database, boot_id=self._boot_id, name=self._name, queues=queues),
        ]
        for thread in self._threads:
            thread.start()
        log.info("worker %s (%s) answers %s", self._name, self._boot_id, ", ".join(queues))

    def on_shutting_down(self, **_: Any) -> None:
        self._drain.set()

    def on_shutdown(self, **_: Any) -> None:
        for thread in self._threads:
            thread.stop()
        if self._main is not None:
            self._main.close()
        if self._scratch is not None:
            self._scratch.close()

    def _context(self, application_name: str) -> Context:
        settings = self._settings
        if self._scratch is None:
            raise RuntimeError("the worker was not initialised")
        database = Database(database_url(settings), application_name=application_name)
        return Context(
            settings=settings,
            database=database,
            storage=Storage(settings.storage, settings.scratch_folder / "cache"),
            live=Publisher(redis_url(settings)),
            doorbell=Doorbell(settings, database),
            scratch=self._scratch,
            boot_id=self._boot_id,
            name=self._name,
            drain=self._drain,
        )


def _before_celery(numbers: Sequence[signal.Signals], drain: DrainFlag) -> None:
    """Raise the drain flag before Celery's own handler: its cold shutdown sleeps first and tells us afterwards."""
    pid = os.getpid()
    for number in numbers:
        handler = signal.getsignal(number)
        if not callable(handler):
            continue

        def drain_first(got: int, frame: FrameType | None, handler: Any = handler) -> None:
            if os.getpid() == pid:  # a pool process forked later may still hold this handler for a moment
                drain.set()
            handler(got, frame)

        signal.signal(number, drain_first)
