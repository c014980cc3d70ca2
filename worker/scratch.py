"""Local work folders of one worker, and the removal of what dead workers left.

$scratch/runs/<boot>/ belongs to one boot of one worker, which holds a lock on it for as long as any of its processes lives;
a folder whose lock is free is nobody's. Runs work in <boot>/<job>/<attempt>/, the preparer in <boot>/<id>/.
"""

import fcntl
import logging
import os
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

_LOCK = "lock"


class Scratch:
    """Made in the main process before the pool is forked: every process of the worker then shares the lock."""

    def __init__(self, root: Path, boot_id: str) -> None:
        self._runs = root / "runs"
        self._own = self._runs / boot_id
        self._own.mkdir(mode=0o750, parents=True)
        self._lock = os.open(self._own / _LOCK, os.O_CREAT | os.O_RDWR, 0o640)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def fresh(self, *names: str) -> Path:
        """An empty folder of this boot."""
        folder = self._own.joinpath(*names)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o750, parents=True)
        return folder

    def remove_stale(self) -> None:
        """Remove the folders of boots of which no process lives."""
        for folder in self._runs.iterdir():
            if folder != self._own and _is_free(folder):
                log.info("removing the work folder of a worker that is gone: %s", folder.name)
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove this boot's own folder."""
        shutil.rmtree(self._own, ignore_errors=True)
        os.close(self._lock)


def _is_free(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False  # another worker is just starting
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
