"""What a run needs before its child starts: model, token caches and the checkpoint it goes on from, checked and on this disk.

Everything is verified against what the record says of it, here and not in the child: the child trusts the paths in run.json.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.errors import ArtifactError
from core.events import Warned
from core.manifest import folder_digest, verify_folder
from core.model_folder import verify_code
from core.run import CHECKPOINT_KIND, PICTURE_CACHE_KIND, TOKEN_CACHE_KIND, RunInput, TokenCacheRef
from core.states import Reason
from store import files, jobs, plans, runs
from store.tables import JobDataset, Model, WorkerNode
from worker.context import Context
from worker.publisher import RunEvents

log = logging.getLogger(__name__)

Transact = Callable[[Callable[[Session], Any]], Any]
"""Runs a function of a session in a transaction of its own, however long the database is away."""


class Refused(Exception):
    """The attempt can't begin, or went wrong in a way that names its reason."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def stage_run(context: Context, claim: runs.Claim, transact: Transact, events: RunEvents) -> RunInput:
    """The run input of a claimed job. Says through `events` which checkpoints had to be discarded. Raises Refused."""
    return _Staging(context, claim, transact, events).run_input()


class _Staging:
    def __init__(self, context: Context, claim: runs.Claim, transact: Transact, events: RunEvents) -> None:
        self._context = context
        self._claim = claim
        self._transact = transact
        self._events = events

    def run_input(self) -> RunInput:
        spec = self._claim.spec
        model, keys, rows_at_once = self._transact(self._look_up)
        if model is None:
            raise Refused(Reason.BAD_SPEC, f"The base model {spec.base_model} is no longer registered.")
        model_folder = self._context.settings.models_folder / model.folder
        if not (model_folder / "config.json").is_file():
            raise Refused(Reason.INTERNAL_ERROR, f"The folder of the base model {model.name} is missing on {self._context.name}.")
        if model.allow_remote_code:
            try:
                verify_code(model_folder, model.config)
            except ArtifactError as error:
                log.error("%s: %s", self._claim.job_id, error)
                message = f"The code of the base model {model.name} is not the code it was registered with."
                raise Refused(Reason.BAD_ARTIFACT, message) from None
        return RunInput(
            job_id=self._claim.job_id,
            attempt=self._claim.attempt,
            spec=spec,
            model_folder=model_folder,
            model_weights=model.weights,
            allow_remote_code=model.allow_remote_code,
            token_caches=[
                TokenCacheRef(
                    dataset_id=ref.dataset_id,
                    folder=self._cache(ref.dataset_id, "token", keys[ref.dataset_id].token_key),
                    pictures=self._pictures(ref.dataset_id, keys[ref.dataset_id].picture_key),
                    weight=ref.weight,
                )
                for ref in spec.data.datasets
            ],
            rows_at_once=rows_at_once,
            resume_from=self._checkpoint(),
        )

    def _look_up(self, session: Session) -> tuple[Model | None, dict[str, JobDataset], int | None]:
        model = session.scalar(select(Model).where(Model.name == self._claim.spec.base_model))
        reads = session.scalars(select(JobDataset).where(JobDataset.job_id == self._claim.job_id)).all()
        node = session.get(WorkerNode, self._claim.boot_id)
        counts = jobs.job_tokens(session, self._claim.job_id)
        rows = plans.rows_at_once(session, self._claim.spec, counts, node)
        return model, {read.dataset_id: read for read in reads}, rows

    def _pictures(self, dataset_id: str, key: str | None) -> Path | None:
        return None if key is None else self._cache(dataset_id, "picture", key)

    def _cache(self, dataset_id: str, what: Literal["token", "picture"], key: str) -> Path:
        name, kind = (files.tokens_key, TOKEN_CACHE_KIND) if what == "token" else (files.pictures_key, PICTURE_CACHE_KIND)
        try:
            folder = self._context.storage.fetch_folder(name(dataset_id, key))
            verify_folder(folder, kind)
        except (ArtifactError, FileNotFoundError) as error:
            log.error("%s: %s cache of %s: %s", self._claim.job_id, what, dataset_id, error)
            raise Refused(Reason.BAD_ARTIFACT, f"The {what} cache of {dataset_id} is missing or damaged.") from None
        return folder

    def _checkpoint(self) -> Path | None:
        """The newest checkpoint that verifies; worse ones are discarded on the way."""
        point = self._claim.resume
        while point is not None:
            key = runs.checkpoint_key(self._claim.job_id, point.attempt, point.step)
            try:
                folder = self._context.storage.fetch_folder(key)
                verify_folder(folder, CHECKPOINT_KIND)
                if folder_digest(folder) != point.sha256:
                    raise ArtifactError(f"step-{point.step}: not the checkpoint that was recorded")
                return folder
            except (ArtifactError, FileNotFoundError) as error:
                log.warning("%s: checkpoint discarded: %s", self._claim.job_id, error)
            message = f"The checkpoint of step {point.step} is missing or damaged; an older one is tried."
            self._events.say([Warned(code="checkpoint-discarded", message=message)])
            point = self._transact(partial(runs.discard_checkpoint, claim=self._claim, point=point))
            self._context.storage.delete(key)
        return None
