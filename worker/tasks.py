"""The three Celery tasks. Each takes one id, which anyone may have forged, doubled or delayed: the claim decides.

Thin on purpose: claim, hand over, return. What goes wrong with the work is in the record, not in Celery.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery

from store import outbox, runs
from store.db import UNREACHABLE
from worker.context import Context
from worker.preparer import PREPARE_COMMAND, Preparer
from worker.supervisor import TRAIN_COMMAND, Supervisor

log = logging.getLogger(__name__)

_JOB_ID = re.compile(r"job_[a-z0-9]{8,40}")
_DATASET_ID = re.compile(r"ds_[a-z0-9]{8,40}")


def register(
    app: Celery,
    context: Callable[[], Context],
    *,
    train: Sequence[str] = TRAIN_COMMAND,
    prepare: Sequence[str] = PREPARE_COMMAND,
) -> None:
    """Put the tasks on the app. `context` gives the pool process's own parts; the commands start the children."""

    @app.task(name=outbox.RUN_JOB)
    def run_job(*args: Any, **kwargs: Any) -> None:
        def work(job_id: str) -> None:
            parts = context()
            with parts.database.transaction() as session:
                claim = runs.claim_run(
                    session,
                    job_id,
                    boot_id=parts.boot_id,
                    worker=parts.name,
                    lease_seconds=parts.settings.lease_seconds,
                )
            if claim is None:
                log.info("%s: nothing to run", job_id)
            else:
                Supervisor(parts, train).run(claim)

        _answer(outbox.RUN_JOB, _JOB_ID, args, kwargs, context, work)

    @app.task(name=outbox.PREPARE_JOB)
    def prepare_job(*args: Any, **kwargs: Any) -> None:
        _answer(outbox.PREPARE_JOB, _JOB_ID, args, kwargs, context, lambda job_id: Preparer(context(), prepare).prepare(job_id))

    @app.task(name=outbox.VALIDATE_DATASET)
    def validate_dataset(*args: Any, **kwargs: Any) -> None:
        def work(dataset_id: str) -> None:
            Preparer(context(), prepare).validate(dataset_id)

        _answer(outbox.VALIDATE_DATASET, _DATASET_ID, args, kwargs, context, work)


def _answer(
    task: str,
    pattern: re.Pattern[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Callable[[], Context],
    work: Callable[[str], None],
) -> None:
    key = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(key, str) or pattern.fullmatch(key) is None:
        log.warning("%s: not a bell of ours: %.200r %.200r", task, args, kwargs)
        return
    if context().drain.is_set():
        return  # this worker is about to end; the bell stands, and another one will be rung
    try:
        work(key)
    except UNREACHABLE as error:
        log.warning("%s %s: put off, the database is away: %s", task, key, type(error).__name__)
