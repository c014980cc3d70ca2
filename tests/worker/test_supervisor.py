"""One attempt, from claim to close: the real supervisor in this process, a child that obeys a script."""

import dataclasses
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import func, select, update

from core.catalog import REMOTE_CODE
from core.errors import FenceLost
from core.manifest import closed_folder
from core.model_folder import code_digest
from core.run import CHECKPOINT_KIND, RunInput
from core.states import JobStatus, Reason, RunStatus
from store import files, runs
from store.settings import Settings
from store.stream import stream_key
from store.tables import Checkpoint, Job, Model
from tests.worker.service import FAKE_CHILD, Service, is_alive, run_as_admin, wait
from worker import child
from worker.context import Context
from worker.supervisor import Supervisor


@pytest.fixture
def context(service: Service) -> Iterator[Context]:
    with service.context() as context:
        yield context


def attempt(service: Service, context: Context, job_id: str) -> runs.Claim:
    claim = take(context, job_id)
    Supervisor(context, FAKE_CHILD).run(claim)
    return claim


def take(context: Context, job_id: str) -> runs.Claim:
    with context.database.transaction() as session:
        claim = runs.claim_run(
            session, job_id, boot_id=context.boot_id, worker="test", lease_seconds=context.settings.lease_seconds
        )
    assert claim is not None
    return claim


class Background:
    """An attempt that runs while the test does something to it."""

    def __init__(self, context: Context, job_id: str) -> None:
        self.claim = take(context, job_id)
        self._thread = threading.Thread(target=Supervisor(context, FAKE_CHILD).run, args=(self.claim,))
        self._thread.start()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def test_a_run_ends_with_one_adapter_version_and_a_gapless_history(service: Service, context: Context) -> None:
    job_id = service.job()
    attempt(service, context, job_id)

    job = service.read_job(job_id)
    assert (job.status, job.reason, job.step, job.total_steps) == (JobStatus.SUCCEEDED, Reason.FINISHED, 6, 6)
    assert job.adapter_version == 1
    assert service.versions(job_id) == 1
    assert service.statuses(job_id) == [("queued", None), ("running", None), ("succeeded", "finished")]
    ids = [event.id for event in service.history(job_id)]
    assert ids == ["0-1", *(f"1-{seq}" for seq in range(1, len(ids)))]
    kinds = [event.kind for event in service.history(job_id)]
    assert kinds.count("step") == 6
    assert kinds.count("checkpoint") == 2
    with service.database.transaction() as session:
        standing = session.scalars(select(Checkpoint).order_by(Checkpoint.step)).all()
    assert [row.step for row in standing] == [2, 4]
    assert service.storage.exists(runs.checkpoint_key(job_id, 1, 4) + "/manifest.json")
    assert not list((context.settings.scratch_folder / "runs" / context.boot_id).glob("job_*/*"))


def test_the_live_stream_holds_what_the_record_holds(service: Service, context: Context, redis_server: Any) -> None:
    job_id = service.job()
    attempt(service, context, job_id)
    with redis.Redis.from_url(redis_server.url) as client:
        streamed = [entry_id.decode() for entry_id, _ in client.xrange(stream_key(job_id))]
    assert streamed == [event.id for event in service.history(job_id)][1:]


def test_surplus_checkpoints_are_deleted_oldest_first(service: Service, context: Context) -> None:
    job_id = service.job([["train", 9, 2, 0]], keep=1)
    attempt(service, context, job_id)
    keys = [runs.checkpoint_key(job_id, 1, step) for step in (2, 4, 6, 8)]
    assert [service.storage.exists(key) for key in keys] == [False, False, False, True]


@pytest.mark.parametrize("state", ["ordinary", "allowed", "changed since"])
def test_a_model_s_own_code_is_allowed_by_its_registration_alone(
    service: Service, context: Context, tmp_path: Path, state: str
) -> None:
    folder = service.settings.models_folder / "tiny"
    (folder / "modeling_toy.py").write_text("1\n")
    if state != "ordinary":
        with service.database.transaction() as session:
            values = {"allow_remote_code": True, "config": {REMOTE_CODE: {"code": code_digest(folder)}}}
            session.execute(update(Model).values(**values))
    if state == "changed since":
        (folder / "modeling_toy.py").write_text("2\n")
    job_id = service.job()
    kept = tmp_path / "run.json"
    copying = (sys.executable, "-c", f"import shutil, sys; shutil.copy(sys.argv[1] + '/run.json', {str(kept)!r})")
    Supervisor(context, copying).run(take(context, job_id))
    [attempted] = service.read_runs(job_id)
    if state == "changed since":
        assert not kept.exists(), "no child is started"
        assert "not the code it was registered with" in attempted.message
    else:
        assert RunInput.model_validate_json(kept.read_bytes()).allow_remote_code == (state == "allowed")


def test_the_log_is_kept_whatever_the_end(service: Service, context: Context) -> None:
    job_id = service.job([["print", "hello from the child"], ["fail", "no such thing: /some/where/on/disk.txt"]])
    attempt(service, context, job_id)
    text = service.storage.read_range(files.log_key(job_id, 1), 0, 10_000).decode()
    assert "hello from the child" in text
    assert "Traceback" in text
    [run] = service.read_runs(job_id)
    assert run.message == "The training process ended with exit code 1: RuntimeError: no such thing: disk.txt"


def test_a_log_without_end_is_cut_with_a_mark(service: Service, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LOG_LIMIT_BYTES", 100_000)
    job_id = service.job([["print", "x" * 99, 5_000], ["train", 1, 9, 0]])
    attempt(service, context, job_id)
    size = service.storage.size(files.log_key(job_id, 1))
    assert 100_000 < size < 100_100
    assert b"[truncated" in service.storage.read_range(files.log_key(job_id, 1), 100_000, 1000)
    assert service.read_job(job_id).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("script", "reason", "words"),
    [
        ([["end", "bad_spec", 0, "no such thing"]], Reason.BAD_SPEC, "no such thing"),
        ([["end", "bad_data"]], Reason.BAD_DATA, "said by the child"),
        ([["end", "no_trainable_tokens"]], Reason.NO_TRAINABLE_TOKENS, "said by the child"),
        ([["end", "numerical_divergence"]], Reason.NUMERICAL_DIVERGENCE, "said by the child"),
        ([["end", "cuda_oom"]], Reason.CUDA_OOM, "said by the child"),
        ([["exit", 15]], Reason.CUDA_OOM, "memory"),
    ],
)
def test_an_end_for_the_users_reason_is_never_tried_again(
    service: Service, context: Context, script: list[Any], reason: Reason, words: str
) -> None:
    job_id = service.job(script)
    attempt(service, context, job_id)
    job = service.read_job(job_id)
    assert (job.status, job.reason) == (JobStatus.FAILED, reason)
    assert words in job.message
    assert service.bells() == []


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ([["kill"]], "SIGKILL"),
        ([["fail", "boom"]], "RuntimeError: boom"),
        ([["exit", 77]], "exit code 77"),
        ([["end", "drained"]], "without having been asked"),
        ([["raw", "this is no event\n"], ["hang"]], "no event"),
        ([["raw", '{"kind":"status","status":"succeeded","seq":1}\n'], ["hang"]], "no event"),
        ([["steps", 1, 2], ["skip", 1], ["steps", 3, 3], ["hang"]], "number 4 came after 2"),
    ],
)
def test_an_unknown_fault_is_tried_once_more(service: Service, context: Context, script: list[Any], words: str) -> None:
    job_id = service.job(script)
    attempt(service, context, job_id)
    job = service.read_job(job_id)
    assert (job.status, job.reason) == (JobStatus.QUEUED, Reason.INTERNAL_ERROR)
    assert words in job.message
    assert [bell.key for bell in service.bells()] == [job_id]
    attempt(service, context, job_id)
    assert service.read_job(job_id).status == JobStatus.FAILED
    assert [run.status for run in service.read_runs(job_id)] == [RunStatus.FAILED, RunStatus.FAILED]


@pytest.mark.parametrize(
    "script",
    [
        [["end", "finished"]],
        [["adapter", 3], ["tear_adapter"], ["end", "finished"]],
        [["raw", '{"kind":"adapter","step":1,"folder":"../../..","seq":1}\n'], ["exit", 0]],
    ],
)
def test_a_result_that_does_not_verify_is_not_published(service: Service, context: Context, script: list[Any]) -> None:
    job_id = service.job(script)
    attempt(service, context, job_id)
    assert service.read_job(job_id).reason == Reason.BAD_ARTIFACT
    assert service.versions(job_id) == 0


def test_a_torn_checkpoint_is_a_warning_and_never_recorded(service: Service, context: Context) -> None:
    bad = '{"kind":"checkpoint","step":1,"folder":"checkpoints/none","seq":1}\n'
    job_id = service.job([["raw", bad], ["skip", 1], ["train", 3, 9, 0]])
    attempt(service, context, job_id)
    assert service.read_job(job_id).status == JobStatus.SUCCEEDED
    assert service.history(job_id, "warning")[0].data["code"] == "checkpoint-not-stored"


def test_a_flood_of_events_arrives_complete_and_in_order(service: Service, context: Context) -> None:
    job_id = service.job([["warn", 20_000], ["train", 1, 9, 0]])
    attempt(service, context, job_id)
    codes = [event.data["code"] for event in service.history(job_id, "warning")]
    assert codes == [f"w{index}" for index in range(20_000)]


def test_the_next_attempt_resumes_from_the_newest_checkpoint(service: Service, context: Context) -> None:
    job_id = service.job([["train", 9, 2, 0]], attempt_1=[["checkpoint", 2], ["checkpoint", 4], ["fail", "boom"]])
    attempt(service, context, job_id)
    attempt(service, context, job_id)
    assert [run.resumed_from_step for run in service.read_runs(job_id)] == [None, 4]
    assert service.history(job_id, "started")[0].data["first_step"] == 5
    assert service.read_job(job_id).status == JobStatus.SUCCEEDED


def test_a_checkpoint_counts_only_once_all_that_was_said_before_it_is_stored(service: Service, context: Context) -> None:
    """A later attempt begins behind it: what the batch of a killed worker held of earlier steps would be said by nobody."""
    lazy = dataclasses.replace(context, settings=context.settings.model_copy(update={"flush_seconds": 3600.0}))
    job_id = service.job([["train", 1000, 3, 0.05]])
    running = Background(lazy, job_id)

    def newest() -> int:
        with service.database.transaction() as session:
            return session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job_id)) or 0

    wait(lambda: newest() >= 6, 40)
    upto = newest()
    steps = {event.data["step"] for event in service.history(job_id, "step")}
    assert steps >= set(range(1, upto + 1))
    service.cancel(job_id)
    running.join()


@pytest.mark.parametrize("harm", ["rot", "gone", "swapped"])
def test_a_damaged_checkpoint_is_discarded_for_an_older_one(service: Service, context: Context, harm: str) -> None:
    job_id = service.job([["train", 9, 2, 0]], attempt_1=[["checkpoint", 2], ["checkpoint", 4], ["fail", "boom"]])
    attempt(service, context, job_id)
    folder = Path(service.settings.storage) / runs.checkpoint_key(job_id, 1, 4)
    if harm == "rot":
        (folder / "state.json").write_text(json.dumps({"step": 5}))
    elif harm == "gone":
        (folder / "manifest.json").unlink()
    else:
        _swap(folder)
    attempt(service, context, job_id)
    assert [run.resumed_from_step for run in service.read_runs(job_id)] == [None, 2]
    assert service.history(job_id, "warning")[0].data["code"] == "checkpoint-discarded"
    assert service.history(job_id, "started")[0].data["first_step"] == 3
    assert service.read_job(job_id).status == JobStatus.SUCCEEDED


def test_a_running_job_is_cancelled_within_a_heartbeat(service: Service, context: Context) -> None:
    job_id = service.job([["pid"], ["hang"]])
    running = Background(context, job_id)
    pid = int(service.wait_event(job_id, "warning", code="pid").data["message"])
    service.cancel(job_id)
    running.join()
    assert service.statuses(job_id)[-1] == ("cancelled", "cancelled")
    assert not is_alive(pid)
    assert service.bells() == []


def test_a_child_that_ignores_sigterm_is_killed(service: Service, context: Context) -> None:
    job_id = service.job([["ignore_everything"]])
    running = Background(context, job_id)
    pid = int(service.wait_event(job_id, "warning", code="deaf").data["message"])
    service.cancel(job_id)
    running.join()
    assert service.read_job(job_id).status == JobStatus.CANCELLED
    assert not is_alive(pid)


def test_a_drained_run_goes_back_to_the_queue_with_its_checkpoint(service: Service, context: Context) -> None:
    job_id = service.job([["train", 1000, 999, 0.05]])
    running = Background(context, job_id)
    service.wait_event(job_id, "step", step=3)
    context.drain.set()
    running.join()
    job = service.read_job(job_id)
    assert (job.status, job.reason, job.failed_count, job.lost_count) == (JobStatus.QUEUED, Reason.DRAINED, 0, 0)
    claim = take(context, job_id)
    assert claim.resume is not None
    assert claim.resume.step >= 3


def test_a_run_whose_fence_is_lost_is_killed_and_says_nothing_more(service: Service, context: Context) -> None:
    job_id = service.job([["pid"], ["hang"]])
    running = Background(context, job_id)
    pid = int(service.wait_event(job_id, "warning", code="pid").data["message"])
    with service.database.transaction() as session:
        runs.close_run(session, running.claim, Reason.LOST, "taken away")
    before = len(service.history(job_id))
    running.join()
    assert not is_alive(pid)
    assert len(service.history(job_id)) == before
    assert service.read_job(job_id).status == JobStatus.QUEUED


def test_a_stale_fence_can_write_nothing(service: Service, context: Context) -> None:
    job_id = service.job()
    stale = take(context, job_id)
    with service.database.transaction() as session:
        runs.close_run(session, stale, Reason.LOST, "taken away")
    take(context, job_id)
    writes = [
        lambda session: runs.renew(session, stale, lease_seconds=9),
        lambda session: runs.record_events(session, stale, []),
        lambda session: runs.record_checkpoint(session, stale, step=1, sha256="0", size=1),
        lambda session: runs.close_run(session, stale, Reason.INTERNAL_ERROR, "late"),
        lambda session: runs.finish_run(session, stale, runs.Result("0", 1, None), "done"),  # type: ignore[arg-type]
    ]
    for write in writes:
        with pytest.raises(FenceLost), service.database.transaction() as session:
            write(session)


def test_a_database_that_stays_away_stops_the_run_after_the_orphan_time(
    service: Service, settings: Settings, postgres_url: str
) -> None:
    """Its events wait, its child is asked to stop, and the rest is the sweeper's."""
    service.settings = settings.model_copy(update={"orphan_seconds": 2.0})
    with service.context() as context:
        job_id = service.job([["train", 100_000, 99_999, 0.05]])
        running = Background(context, job_id)
        service.wait_event(job_id, "step", step=1)
        name = settings.database_url.rsplit("/", 1)[1].split("?")[0]
        run_as_admin(postgres_url, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        run_as_admin(postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        running.join()
        run_as_admin(postgres_url, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    assert service.read_job(job_id).status == JobStatus.RUNNING
    with service.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=func.now()))
    with service.database.transaction() as session:
        [(_, change, _)] = runs.close_expired(session, grace_seconds=0)
    assert (change.status, change.reason) == (JobStatus.QUEUED, Reason.LOST)


def test_a_database_that_comes_back_gets_every_event_once(
    service: Service, context: Context, settings: Settings, postgres_url: str
) -> None:
    job_id = service.job([["train", 60, 999, 0.02]])
    running = Background(context, job_id)
    service.wait_event(job_id, "step", step=1)
    name = settings.database_url.rsplit("/", 1)[1].split("?")[0]
    for _ in range(5):
        run_as_admin(postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        time.sleep(0.2)
    running.join()
    assert [event.data["step"] for event in service.history(job_id, "step")] == list(range(1, 61))
    assert service.read_job(job_id).status == JobStatus.SUCCEEDED


def _swap(folder: Path) -> None:
    """Another folder with a manifest of its own, in itself perfectly valid."""
    shutil.rmtree(folder)
    with closed_folder(folder, CHECKPOINT_KIND, {}) as draft:
        (draft / "state.json").write_text(json.dumps({"step": 4000}))
