"""What every part of a worker needs: the record, the files, the stream, the bell, and who this worker is."""

import mmap
from dataclasses import dataclass

from store.db import Database
from store.files import Storage
from store.queue import Doorbell
from store.settings import Settings
from store.stream import Publisher
from worker.scratch import Scratch


class DrainFlag:
    """Raised in the main process, seen in its pool processes. A shared byte: a signal handler may set it at any moment,
    while a lock (as in multiprocessing.Event) could be held by the very thread the handler interrupted."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._page[0] = 1

    def is_set(self) -> bool:
        return self._page[0] == 1


@dataclass(frozen=True)
class Context:
    """Made once per process, after any fork."""

    settings: Settings
    database: Database
    storage: Storage
    live: Publisher
    doorbell: Doorbell
    scratch: Scratch
    boot_id: str
    name: str
    drain: DrainFlag

    def close(self) -> None:
        self.doorbell.close()
        self.live.close()
        self.database.close()
