"""The preparer: what has to be known about data before a GPU is touched. Validates uploads, makes token and picture caches.

Each piece of work runs in a child (`python -m core.prepare WORK_DIR`) that dies with this process; here it is claimed, fed,
watched and recorded. The work depends on content alone, so doing it twice is harmless. A child that crashes over an upload
is tried again until MAX_TRIES, by the bell that still stands.
"""

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import select

from core.errors import ArtifactError
from core.events import StatusChanged
from core.manifest import verify_folder
from core.records import DatasetReport, RowProblem
from core.run import (
    LOG_FILE,
    PICTURE_CACHE_KIND,
    PICTURES_FOLDER,
    PREPARE_FILE,
    REPORT_FILE,
    ROWS_FILE,
    TOKEN_CACHE_KIND,
    TOKENS_FOLDER,
    PicturesInput,
    PrepareInput,
    TokenizeInput,
    ValidateInput,
    read_counts,
    wanted_tokens,
)
from core.states import EXIT_REASONS, Reason
from store import files, preparation
from store.tables import Job, Model
from worker import failures
from worker.child import Child
from worker.context import Context
from worker.lease import Lease, Standing

log = logging.getLogger(__name__)

PREPARE_COMMAND = (sys.executable, "-m", "core.prepare")
"""WORK_DIR follows."""

WALL_SECONDS = 6 * 3600.0
"""A child at work for so long counts as hung."""

_LOOK_SECONDS = 0.05
_CACHE_TRIES = 2


class _Why(Enum):
    """Why a child ended, where its exit code doesn't say."""

    ITSELF = "itself"
    NOT_OURS = "not ours"  # cancelled, deleted or taken over
    DRAIN = "drain"
    WALL = "wall"


class Preparer:
    """Does what the bells `validate_dataset` and `prepare_job` ask for."""

    def __init__(self, context: Context, command: Sequence[str] = PREPARE_COMMAND, *, wall_seconds: float = WALL_SECONDS) -> None:
        self._context = context
        self._command = command
        self._wall_seconds = wall_seconds

    def validate(self, dataset_id: str) -> None:
        """Read an upload and store its report, and its usable rows as messages."""
        context = self._context
        with context.database.transaction() as session:
            claim = preparation.claim_dataset(
                session, dataset_id, boot_id=context.boot_id, lease_seconds=context.settings.lease_seconds
            )
        if claim is None:
            return
        if claim.tries > preparation.MAX_TRIES:  # each time it took the whole preparer with it
            self._finish(claim, _crash_report())
            return
        work = context.scratch.fresh(dataset_id)
        try:
            with self._lease(dataset_id, claim) as lease:
                self._validate(claim, work, lease)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def prepare(self, job_id: str) -> None:
        """Make the caches a job lacks, and queue it; or fail it with the reason."""
        context = self._context
        with context.database.transaction() as session:
            claim = preparation.claim_job(session, job_id, boot_id=context.boot_id, lease_seconds=context.settings.lease_seconds)
        if isinstance(claim, StatusChanged):
            self._stream(job_id, claim)
        if not isinstance(claim, preparation.JobClaim):
            return
        work = context.scratch.fresh(job_id)
        try:
            with self._lease(job_id, claim) as lease:
                if all(self._make(claim, missing, work, lease) for missing in claim.missing):
                    self._queue(claim)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _validate(self, claim: preparation.DatasetClaim, work: Path, lease: Lease) -> None:
        context = self._context
        try:
            upload = context.storage.fetch_file(files.upload_key(claim.dataset_id), work / "upload")
        except FileNotFoundError:
            self._finish(claim, _failed_report("upload-missing", "The uploaded file is gone from the storage."))
            return
        why, code, output = self._run(work, ValidateInput(upload=upload, filename=claim.filename), lease)
        if why is _Why.NOT_OURS:
            return
        if why is _Why.DRAIN:
            with context.database.transaction() as session:
                preparation.release_dataset(session, claim, counted=False)
            return
        report = _read_report(work) if (why, code) == (_Why.ITSELF, 0) else None
        if report is not None:
            if report.usable_rows:
                context.storage.put_file(work / ROWS_FILE, files.rows_key(claim.dataset_id), move=True)
            self._finish(claim, report)
            return
        log.error("%s: preparer crashed (%s, exit code %d): %s", claim.dataset_id, why.value, code, failures.last_error(output))
        if claim.tries >= preparation.MAX_TRIES:
            self._finish(claim, _crash_report())
            return
        with context.database.transaction() as session:
            preparation.release_dataset(session, claim, counted=True)

    def _finish(self, claim: preparation.DatasetClaim, report: DatasetReport) -> None:
        with self._context.database.transaction() as session:
            bells = preparation.finish_dataset(session, claim, report)
        self._context.doorbell.ring(bells)

    def _make(self, claim: preparation.JobClaim, missing: preparation.MissingCache, work: Path, lease: Lease) -> bool:
        """Make one cache. False when the job does not go on from here."""
        context = self._context
        with context.database.transaction() as session:
            model = session.scalar(select(Model).where(Model.name == claim.spec.base_model))
        if model is None:
            self._fail(claim, Reason.BAD_SPEC, f"The base model {claim.spec.base_model} is no longer registered.")
            return False
        try:
            task = self._task(claim, missing, work, context.settings.models_folder / model.folder)
        except FileNotFoundError:
            self._fail(claim, Reason.BAD_DATA, f"The files of {missing.dataset_id} are gone from the storage.")
            return False
        for _ in range(_CACHE_TRIES):
            folder = context.scratch.fresh(claim.job_id, missing.dataset_id)
            why, code, output = self._run(folder, task, lease)
            if why is _Why.NOT_OURS:
                return False
            if why is _Why.DRAIN:
                with context.database.transaction() as session:
                    preparation.release_job(session, claim)
                return False
            if why is _Why.ITSELF and code == 0 and self._keep(claim, missing, folder):
                return True
            reason = EXIT_REASONS.get(code, Reason.INTERNAL_ERROR) if why is _Why.ITSELF else Reason.INTERNAL_ERROR
            if reason in (Reason.BAD_DATA, Reason.BAD_SPEC, Reason.NO_TRAINABLE_TOKENS):
                self._fail(claim, reason, failures.last_line(output) or reason.facts.sentence)
                return False
            said = failures.last_error(output)
            log.error("%s: making %s crashed (%s, %d): %s", claim.job_id, missing.kind, why.value, code, said)
        self._fail(claim, Reason.INTERNAL_ERROR, f"The preparer failed over {missing.dataset_id}: {_words(why, code, output)}")
        return False

    def _task(
        self, claim: preparation.JobClaim, missing: preparation.MissingCache, work: Path, model_folder: Path
    ) -> PrepareInput:
        """Raises FileNotFoundError where the dataset's files are gone."""
        storage, dataset_id = self._context.storage, missing.dataset_id
        rows = storage.fetch_file(files.rows_key(dataset_id), work / f"{dataset_id}.jsonl")
        if missing.kind == "pictures":
            upload = storage.fetch_file(files.upload_key(dataset_id), work / f"{dataset_id}.upload")
            return PicturesInput(dataset_id=dataset_id, upload=upload, rows=rows, model_folder=model_folder)
        data_kind, train_on = wanted_tokens(claim.spec.objective)
        return TokenizeInput(
            dataset_id=dataset_id,
            rows=rows,
            model_folder=model_folder,
            template=claim.spec.data.template,
            max_length=claim.spec.data.max_length,
            data_kind=data_kind,
            train_on=train_on,
            new_tokens=claim.spec.data.new_tokens,
        )

    def _keep(self, claim: preparation.JobClaim, missing: preparation.MissingCache, work: Path) -> bool:
        """Store and record what the child left. False where that is not sound."""
        database, storage = self._context.database, self._context.storage
        try:
            if missing.kind == "pictures":
                verify_folder(work / PICTURES_FOLDER, PICTURE_CACHE_KIND)
                storage.publish_folder(work / PICTURES_FOLDER, files.pictures_key(missing.dataset_id, missing.key))
                with database.transaction() as session:
                    preparation.record_pictures(session, claim, missing)
                return True
            verify_folder(work / TOKENS_FOLDER, TOKEN_CACHE_KIND)
            counts = read_counts(work)
        except (ArtifactError, FileNotFoundError, ValidationError) as error:
            log.error("%s: %s of %s refused: %s", claim.job_id, missing.kind, missing.dataset_id, error)
            return False
        storage.publish_folder(work / TOKENS_FOLDER, files.tokens_key(missing.dataset_id, missing.key))
        with database.transaction() as session:
            preparation.record_tokens(session, claim, missing, counts)
        return True

    def _queue(self, claim: preparation.JobClaim) -> None:
        with self._context.database.transaction() as session:
            queued = preparation.queue_job(session, claim)
        if queued is None:
            return
        change, bell = queued
        self._stream(claim.job_id, change)
        if bell is not None:
            self._context.doorbell.ring([bell])

    def _fail(self, claim: preparation.JobClaim, reason: Reason, message: str) -> None:
        with self._context.database.transaction() as session:
            change = preparation.fail_job(session, claim.job_id, reason, message)
        if change is not None:
            self._stream(claim.job_id, change)

    def _stream(self, job_id: str, change: StatusChanged) -> None:
        with self._context.database.transaction() as session:
            attempt = session.scalar(select(Job.fence).where(Job.id == job_id)) or 0
        self._context.live.publish(job_id, attempt, [change])

    def _lease(self, name: str, claim: preparation.DatasetClaim | preparation.JobClaim) -> Lease:
        settings = self._context.settings

        def renew() -> Standing:
            with self._context.database.transaction() as session:
                if isinstance(claim, preparation.JobClaim):
                    held = preparation.renew_job(session, claim, lease_seconds=settings.lease_seconds)
                else:
                    held = preparation.renew_dataset(session, claim, lease_seconds=settings.lease_seconds)
            return Standing.HELD if held else Standing.LOST

        return Lease(name, renew, every_seconds=settings.heartbeat_seconds)

    def _run(self, work: Path, task: PrepareInput, lease: Lease) -> tuple[_Why, int, str]:
        """Run the child to its end. Returns why it ended, its exit code and the end of its output."""
        (work / PREPARE_FILE).write_text(task.model_dump_json(indent=1))
        child = Child([*self._command, str(work)], log=work / LOG_FILE)
        why, ends_at = _Why.ITSELF, time.monotonic() + self._wall_seconds
        try:
            while why is _Why.ITSELF and not child.has_exited():
                if lease.standing is not Standing.HELD:
                    why = _Why.NOT_OURS
                elif self._context.drain.is_set():
                    why = _Why.DRAIN
                elif time.monotonic() > ends_at:
                    why = _Why.WALL
                else:
                    time.sleep(_LOOK_SECONDS)
        finally:
            code = child.reap()
        return why, code, child.tail()


def _read_report(work: Path) -> DatasetReport | None:
    try:
        report = DatasetReport.model_validate_json((work / REPORT_FILE).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        log.error("%s: report refused: %s", work.name, error)
        return None
    return report if report.usable_rows == 0 or (work / ROWS_FILE).is_file() else None


def _crash_report() -> DatasetReport:
    message = "Reading this file ended the preparer every time, so it was given up. Its log has the traceback."
    return _failed_report("preparer-crashed", message)


def _failed_report(code: str, message: str) -> DatasetReport:
    problem = RowProblem(row=0, code=code, message=message)
    return DatasetReport(format=None, rows=0, usable_rows=0, error_count=1, warning_count=0, errors=[problem], warnings=[])


def _words(why: _Why, code: int, output: str) -> str:
    if why is _Why.WALL:
        return "it took too long."
    return failures.judge(code, None, output, asked_to_stop=False)[1]
