"""The heartbeat: a thread that renews the lease of one piece of work and learns what became of it.

Apart from everything else a supervisor does, so that no upload, flush or slow disk makes a healthy run look dead. Times are
monotonic. It decides nothing: the supervisor looks at `standing` and `silent_seconds`.
"""

import logging
import threading
import time
from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Self

from core.errors import FenceLost
from store.db import UNREACHABLE

log = logging.getLogger(__name__)


class Standing(Enum):
    HELD = "held"
    CANCELLED = "cancelled"  # still ours, and asked to end
    LOST = "lost"  # someone else's, or nobody's: write nothing more


class Lease:
    """Renews as long as the `with` block lasts. `renew` says how the work stands, or raises FenceLost."""

    def __init__(self, name: str, renew: Callable[[], Standing], *, every_seconds: float) -> None:
        self._name = name
        self._renew = renew
        self._every_seconds = every_seconds
        self._renewed_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.standing = Standing.HELD

    @property
    def silent_seconds(self) -> float:
        """For how long the database has not confirmed the lease."""
        return time.monotonic() - self._renewed_at

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._every_seconds):
            try:
                standing = self._renew()
            except FenceLost:
                standing = Standing.LOST
            except UNREACHABLE as error:
                log.warning("%s: lease not renewed for %.0f s: %s", self._name, self.silent_seconds, type(error).__name__)
                continue
            except Exception:  # a bug must not end the heartbeat without a word: the lease would run out
                log.exception("%s: lease not renewed", self._name)
                continue
            self._renewed_at = time.monotonic()
            self.standing = standing
            if standing is Standing.LOST:
                return
