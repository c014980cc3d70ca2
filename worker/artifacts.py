"""What a run leaves behind, on its way into the storage: checkpoints, the log, the result.

A checkpoint is verified against its manifest, stored, and only then recorded under the fence, after all that was said before
it; from that commit on a later attempt resumes from it. All of it happens in one thread, in order, so that a slow storage
never stalls the pump. A folder named by the child is taken only from within its run folder.
"""

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.adapter import ADAPTER_KIND, AdapterFacts
from core.errors import ArtifactError, FenceLost, Unavailable
from core.events import Warned
from core.manifest import folder_bytes, folder_digest, verify_folder
from core.run import CHECKPOINT_KIND
from store import files, runs
from store.db import UNREACHABLE, Database
from store.files import Storage

log = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
_LOG_SECONDS_PER_MIB = 5.0
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class _Written:
    step: int
    folder: str


class Uploader:
    """Stores checkpoints and the growing log of one attempt. `failure` is set once, when the fence is lost."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        claim: runs.Claim,
        run_dir: Path,
        log_file: Path,
        *,
        flush: Callable[[], bool],
        warn: Callable[[Warned], None],
        give_up: Callable[[], bool],
    ) -> None:
        self._database = database
        self._storage = storage
        self._claim = claim
        self._run_dir = run_dir
        self._log_file = log_file
        self._log_stored = 0
        self._log_stored_at = time.monotonic()
        self._flush = flush
        self._warn = warn
        self._give_up = give_up
        self._waiting: queue.SimpleQueue[_Written | None] = queue.SimpleQueue()
        self._abandoned = False
        self._recorded: set[int] = set()
        self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
        self.failure: FenceLost | None = None
        self._thread.start()

    def checkpoint(self, step: int, folder: str) -> None:
        """A checkpoint folder stands in the run folder. Returns at once."""
        self._waiting.put(_Written(step, folder))

    def close(self) -> None:
        """Wait until every checkpoint is recorded."""
        self._waiting.put(None)
        self._thread.join()

    def abandon(self) -> None:
        """Store no more checkpoints; one in the middle of being stored is waited for."""
        self._abandoned = True
        self.close()

    def store_log(self) -> None:
        """Store the log as far as it has grown."""
        size = self._log_file.stat().st_size if self._log_file.exists() else 0
        if size == self._log_stored:
            return
        try:
            self._storage.put_file(self._log_file, files.log_key(self._claim.job_id, self._claim.attempt))
        except Exception as error:  # a missing log is no reason to end a run
            log.warning("%s: log not stored: %s", self._claim.job_id, error)
            return
        self._log_stored, self._log_stored_at = size, time.monotonic()

    def result(self, folder: str) -> runs.Result:
        """Verify the adapter folder and store it under its digest. Raises ArtifactError."""
        path = inside(self._run_dir, folder)
        facts = AdapterFacts.model_validate(verify_folder(path, ADAPTER_KIND))
        if (facts.job_id, facts.attempt) != (self._claim.job_id, self._claim.attempt):
            raise ArtifactError(f"{folder}: made by {facts.job_id}, attempt {facts.attempt}")
        sha256, size = folder_digest(path), folder_bytes(path)
        self._storage.publish_folder(path, files.adapter_key(sha256))
        return runs.Result(sha256, size, facts)

    def _work(self) -> None:
        while not self._abandoned and self.failure is None:
            try:
                written = self._waiting.get(timeout=_LOG_SECONDS)
            except queue.Empty:
                self._store_growing_log()
                continue
            if written is None:
                return
            try:
                self._store_checkpoint(written)
            except FenceLost as error:
                self.failure = error
            except Exception as error:  # the run goes on: an older checkpoint, or the next one, still serves
                log.exception("%s: checkpoint of step %d not stored", self._claim.job_id, written.step)
                message = f"The checkpoint of step {written.step} was not stored: {error}"
                self._warn(Warned(code="checkpoint-not-stored", message=message))

    def _store_checkpoint(self, written: _Written) -> None:
        folder = inside(self._run_dir, written.folder)
        if written.step in self._recorded:  # a periodic one and one asked for at the same step
            shutil.rmtree(folder)
            return
        verify_folder(folder, CHECKPOINT_KIND)
        sha256, size = folder_digest(folder), folder_bytes(folder)
        key = runs.checkpoint_key(self._claim.job_id, self._claim.attempt, written.step)
        self._storage.publish_folder(folder, key)
        try:
            surplus = self._record(written.step, sha256, size)
        except FenceLost:
            self._storage.delete(key)
            raise
        self._recorded.add(written.step)
        for old in surplus:
            self._storage.delete(old)

    def _record(self, step: int, sha256: str, size: int) -> list[str]:
        while True:
            try:
                # What was said up to it comes first: a later attempt begins behind this step and won't say it again.
                if self._flush():
                    with self._database.transaction() as session:
                        return runs.record_checkpoint(session, self._claim, step=step, sha256=sha256, size=size)
            except UNREACHABLE as error:
                log.warning("%s: checkpoint of step %d waits: %s", self._claim.job_id, step, type(error).__name__)
            if self._abandoned or self._give_up():
                raise Unavailable("the database is away")
            time.sleep(_RETRY_SECONDS)

    def _store_growing_log(self) -> None:
        pause = _LOG_SECONDS + _LOG_SECONDS_PER_MIB * self._log_stored / (1 << 20)
        if time.monotonic() - self._log_stored_at >= pause:
            self.store_log()


def inside(run_dir: Path, folder: str) -> Path:
    """A folder the child named, if it lies in its run folder. Raises ArtifactError."""
    path = (run_dir / folder).resolve()
    if not path.is_relative_to(run_dir.resolve()) or path == run_dir.resolve():
        raise ArtifactError(f"{folder}: not a folder of this run")
    return path
