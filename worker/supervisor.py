"""One attempt at a job, from the claim to its end: start the child, hand on what it says, close the run.

The child trains; this process watches it, and holds neither torch nor a gradient. The pump below reads the child's events
and obeys four voices: a lost fence (kill, write nothing more), a cancellation (SIGTERM, then SIGKILL), a drain of this
worker (the line `stop`, then SIGKILL), and a database silent for `orphan_seconds` (as a drain). What waits on the network or
a disk lives in threads of its own: heartbeat, recorder, uploader. The judge model alone is waited for; no child is left then.
"""

import logging
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from sqlalchemy.orm import Session

from core.errors import ArtifactError, FenceLost
from core.events import AdapterWritten, CheckpointWritten, ChildEvent, Ended, PhaseChanged, parse_child_event
from core.run import LOG_FILE, RUN_FILE
from core.states import Phase, Reason
from store import runs
from store.db import UNREACHABLE
from worker import failures
from worker.artifacts import Uploader
from worker.child import Child
from worker.context import Context
from worker.judge import judge_answers
from worker.lease import Lease, Standing
from worker.publisher import GaveUp, RunEvents
from worker.staging import Refused, stage_run

log = logging.getLogger(__name__)
T = TypeVar("T")

TRAIN_COMMAND = (sys.executable, "-m", "core.train")
"""RUN_DIR and `--events-fd N` follow."""

_TERM_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_EXIT_LOOK_SECONDS = 0.01
"""A child that has closed its pipe is about to be gone, and its result waits for that."""
_RETRY_SECONDS = 1.0
_READ_BYTES = 1 << 18
_LINE_BYTES = 32 << 20


class _Asked(Enum):
    """Why this side ended the child."""

    NOTHING = "nothing"
    CANCEL = "cancel"
    STOP = "stop"


@dataclass(frozen=True)
class _End:
    """How an attempt ends."""

    reason: Reason
    message: str
    result: runs.Result | None = None


class Supervisor:
    """Runs claimed jobs, one after another."""

    def __init__(self, context: Context, command: Sequence[str] = TRAIN_COMMAND) -> None:
        self._context = context
        self._command = command

    def run(self, claim: runs.Claim) -> None:
        """See an attempt through to a closed run. Returns without a word to the record when the fence was lost."""
        run_dir = self._context.scratch.fresh(claim.job_id, str(claim.attempt))
        lease = Lease(claim.job_id, lambda: self._renew(claim), every_seconds=self._context.settings.heartbeat_seconds)
        try:
            with lease:
                _Attempt(self._context, claim, run_dir, lease, self._command).run()
        except FenceLost as error:
            log.warning("%s; its run was stopped here", error)
        finally:
            shutil.rmtree(run_dir, ignore_errors=True)

    def _renew(self, claim: runs.Claim) -> Standing:
        with self._context.database.transaction() as session:
            cancelled = runs.renew(session, claim, lease_seconds=self._context.settings.lease_seconds)
        return Standing.CANCELLED if cancelled else Standing.HELD


class _Attempt:
    """The moving parts of one attempt."""

    def __init__(self, context: Context, claim: runs.Claim, run_dir: Path, lease: Lease, command: Sequence[str]) -> None:
        self._context = context
        self._claim = claim
        self._run_dir = run_dir
        self._lease = lease
        self._command = command
        self._events = RunEvents(context.database, context.live, claim, flush_seconds=context.settings.flush_seconds)
        self._uploader = Uploader(
            context.database,
            context.storage,
            claim,
            run_dir,
            run_dir / LOG_FILE,
            flush=self._events.flush,
            warn=lambda warned: self._events.say([warned]),
            give_up=self._is_orphan,
        )
        self._child_seq = 0
        self._ended: Ended | None = None
        self._adapter: AdapterWritten | None = None

    def run(self) -> None:
        try:
            try:
                end = self._train()
            except (FenceLost, GaveUp):
                raise
            except Refused as refused:
                end = _End(refused.reason, str(refused))
            except Exception:
                log.exception("%s: attempt %d failed in its supervisor", self._claim.job_id, self._claim.attempt)
                end = _End(Reason.INTERNAL_ERROR, "The supervisor of the run failed.")
            self._close(end)
        except GaveUp as error:
            log.error("%s; the run is left to the sweeper", error)
        finally:
            self._uploader.abandon()
            self._events.abandon()

    def _train(self) -> _End:
        run = stage_run(self._context, self._claim, self._patiently, self._events)
        (self._run_dir / RUN_FILE).write_text(run.model_dump_json(indent=1))
        reading, writing = os.pipe()
        try:
            command = [*self._command, str(self._run_dir), "--events-fd", str(writing)]
            child = Child(command, log=self._run_dir / LOG_FILE, pass_fds=[writing])
        finally:
            os.close(writing)
        try:
            asked = self._pump(child, reading)
        finally:
            exit_code = child.reap()
            os.close(reading)
        if asked is _Asked.CANCEL:
            self._uploader.abandon()
            return _End(Reason.CANCELLED, Reason.CANCELLED.facts.sentence)
        stopping = asked is _Asked.STOP
        if stopping and exit_code < 0:
            return _End(Reason.DRAINED, "The worker was asked to stop, and the run did not write a checkpoint in time.")
        reason, message = failures.judge(exit_code, self._ended, child.tail(), asked_to_stop=stopping)
        self._uploader.close()
        self._check_fence()
        if reason is not Reason.FINISHED:
            return _End(reason, message)
        end = self._result(message)
        if end.result is not None and self._claim.spec.eval.judge:
            self._judge(end.result.facts.step)
        return end

    def _judge(self, adapter_step: int) -> None:
        self._events.say([PhaseChanged(phase=Phase.EVALUATING)])
        step = adapter_step if self._ended is None else self._ended.step
        said = judge_answers(
            self._context.settings, self._run_dir, step=step, adapter_step=adapter_step, should_end=self._must_end
        )
        self._check_fence()
        self._events.say(said)

    def _must_end(self) -> bool:
        """Someone waits for this run to be over, or nothing of it can be stored any more."""
        failed = self._events.failure is not None or self._uploader.failure is not None
        return failed or self._lease.standing is not Standing.HELD or self._context.drain.is_set() or self._is_orphan()

    def _result(self, message: str) -> _End:
        if self._adapter is None:
            return _End(Reason.BAD_ARTIFACT, "The training process ended well, but left no result.")
        try:
            return _End(Reason.FINISHED, message, self._uploader.result(self._adapter.folder))
        except (ArtifactError, ValidationError) as error:
            log.warning("%s: result refused: %s", self._claim.job_id, error)
            return _End(Reason.BAD_ARTIFACT, failures.tidy(f"The result did not verify: {error}"))

    def _pump(self, child: Child, pipe: int) -> _Asked:
        """Read events until the child is gone and its pipe is empty. Raises FenceLost, Refused; the caller reaps."""
        os.set_blocking(pipe, False)
        asked, kill_at, unread, is_open = _Asked.NOTHING, None, b"", True
        while True:
            self._check_fence()
            asked, kill_at = self._obey(child, asked, kill_at)
            has_exited = child.has_exited()
            if not self._events.has_room():
                if has_exited and self._is_orphan():
                    raise GaveUp(f"{self._claim.job_id}: its last events could not be stored")
                time.sleep(0.01)  # the child waits in its pipe until the record has caught up
                continue
            chunk = _read(pipe, 0 if has_exited else _LOOK_SECONDS) if is_open else None
            if chunk == b"":
                is_open = False
            elif chunk:
                *lines, unread = (unread + chunk).split(b"\n")
                if len(unread) > _LINE_BYTES:
                    raise Refused(Reason.INTERNAL_ERROR, "The training process wrote an event without an end.")
                self._take(lines)
                continue
            if has_exited:  # looked at before the read, so nothing can have come since
                return asked
            if not is_open:
                time.sleep(_EXIT_LOOK_SECONDS)

    def _check_fence(self) -> None:
        for failure in (self._events.failure, self._uploader.failure):
            if isinstance(failure, FenceLost):
                raise failure
            if failure is not None:
                raise Refused(Reason.INTERNAL_ERROR, "The record refused an event of the training process.")
        if self._lease.standing is Standing.LOST:
            raise FenceLost(f"{self._claim.job_id}: attempt {self._claim.attempt} no longer owns the job")

    def _obey(self, child: Child, asked: _Asked, kill_at: float | None) -> tuple[_Asked, float | None]:
        now = time.monotonic()
        if self._lease.standing is Standing.CANCELLED and asked is not _Asked.CANCEL:
            child.terminate()
            return _Asked.CANCEL, now + _TERM_SECONDS
        if asked is _Asked.NOTHING and (self._context.drain.is_set() or self._is_orphan()):
            child.ask_to_stop()
            return _Asked.STOP, now + self._context.settings.stop_seconds
        if kill_at is not None and now > kill_at:
            child.kill()
            return asked, None
        return asked, kill_at

    def _is_orphan(self) -> bool:
        return self._lease.silent_seconds > self._context.settings.orphan_seconds

    def _take(self, lines: list[bytes]) -> None:
        said = []
        for line in lines:
            event = self._parse(line)
            said.append(event)
            if isinstance(event, Ended):
                self._ended = event
            elif isinstance(event, AdapterWritten):
                self._adapter = event
        self._events.say(said)
        for event in said:
            if isinstance(event, CheckpointWritten):
                self._uploader.checkpoint(event.step, event.folder)

    def _parse(self, line: bytes) -> ChildEvent:
        try:
            # PostgreSQL has no place for a NUL in a text; training data may hold one.
            event = parse_child_event(line.replace(b"\\u0000", b"\\ufffd"))
        except ValidationError:
            log.warning("%s: not an event: %r", self._claim.job_id, line[:200])
            raise Refused(Reason.INTERNAL_ERROR, "The training process wrote something that is no event.") from None
        if event.seq != self._child_seq + 1:
            message = f"The training process lost events: number {event.seq} came after {self._child_seq}."
            raise Refused(Reason.INTERNAL_ERROR, message)
        self._child_seq = event.seq
        return event

    def _close(self, end: _End) -> None:
        self._uploader.close()
        if self._uploader.failure is not None:
            raise self._uploader.failure
        self._uploader.store_log()
        try:
            self._events.close(self._is_orphan)
        except (FenceLost, GaveUp):
            raise
        except Exception:  # logged by the recorder; the run still gets its end
            end = _End(Reason.INTERNAL_ERROR, "The record refused an event of the training process.")
        if end.result is not None:
            finish = partial(runs.finish_run, claim=self._claim, result=end.result, message=end.message)
            change, bell = self._patiently(finish), None
        else:
            close = partial(runs.close_run, claim=self._claim, reason=end.reason, message=end.message)
            change, bell = self._patiently(close)
        self._events.say_last(change)
        if bell is not None:
            self._context.doorbell.ring([bell])
        log.info("%s: attempt %d ended: %s", self._claim.job_id, self._claim.attempt, end.reason)

    def _patiently(self, act: Callable[[Session], T]) -> T:
        """A transaction, tried again while the database is away. Raises GaveUp after `orphan_seconds`."""
        while True:
            try:
                with self._context.database.transaction() as session:
                    return act(session)
            except UNREACHABLE as error:
                if self._is_orphan():
                    raise GaveUp(f"{self._claim.job_id}: the database is away") from error
            time.sleep(_RETRY_SECONDS)


def _read(pipe: int, timeout_seconds: float) -> bytes | None:
    """What the pipe holds: bytes, b"" at its end, None when nothing came in time."""
    ready, _, _ = select.select([pipe], [], [], timeout_seconds)
    return os.read(pipe, _READ_BYTES) if ready else None
