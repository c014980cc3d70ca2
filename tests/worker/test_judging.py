"""A judged run from its child's end to its own: the real supervisor, a child that obeys a script, the record, a real server."""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from core.data.tokenizer import Tokenizer
from core.data.tokens import TokenRow, write_token_cache
from core.events import Judged
from core.states import JobStatus, Reason
from store import events, files, runs
from store.tables import JobDataset
from tests.worker.judge_server import HANG, JudgeServer, judge_server
from tests.worker.service import FAKE_CHILD, Service, wait
from worker.context import Context
from worker.supervisor import Supervisor

KEY = "canary-key-4f1b9a7e"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "judge_key"
    path.write_text(f"{KEY}\n")
    return path


@pytest.fixture
def context(service: Service) -> Iterator[Context]:
    """Of a worker without a judge."""
    with service.context() as context:
        yield context


@pytest.fixture
def judged_service(service: Service, key_file: Path) -> Iterator[Callable[..., Context]]:
    """Makes the context of a worker whose judge is a given server."""
    opened = []

    def make(server: JudgeServer) -> Context:
        fields = {"judge_url": server.url, "judge_model": "strict-7b", "judge_key_file": key_file, "judge_seconds": 30.0}
        service.settings = service.settings.model_copy(update=fields)
        manager = service.context()
        opened.append(manager)
        return manager.__enter__()

    yield make
    for manager in opened:
        manager.__exit__(None, None, None)


def take(context: Context, job_id: str) -> runs.Claim:
    with context.database.transaction() as session:
        claim = runs.claim_run(session, job_id, boot_id=context.boot_id, worker="test", lease_seconds=3)
    assert claim is not None
    return claim


SCRIPT: list[Any] = [["environment"], ["answers", 4], ["train", 6, 9, 0]]


def test_a_finished_run_is_judged_before_its_job_ends(
    service: Service, judged_service: Callable[..., Context], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with judge_server(3, 4, "words", 8) as server:
        context = judged_service(server)
        job_id = service.job(SCRIPT, judge=True)
        Supervisor(context, FAKE_CHILD).run(take(context, job_id))
    job = service.read_job(job_id)
    assert (job.status, job.reason, job.adapter_version) == (JobStatus.SUCCEEDED, Reason.FINISHED, 1)
    assert [event.kind for event in service.history(job_id)][-6:] == ["adapter", "ended", "phase", "judged", "warning", "status"]
    [judged] = service.history(job_id, "judged")
    assert judged.data == {
        "step": 6,
        "adapter_step": 6,
        "model": "strict-7b",
        "asked": 4,
        "marked": 3,
        "judge_score": 5.0,
        "scores": [3, 4, None, 8],
    }
    with service.database.transaction() as session:
        points = {point.step: point.model_dump() for point in events.curves(session, job_id)}
    assert points[6]["judge_score"] == 5.0
    assert points[6]["loss"] == pytest.approx(1 / 6)
    assert [json.loads(request.body["messages"][1]["content"])["question"] for request in server.requests] == [
        f"What is {n}?" for n in range(4)
    ]

    log = service.storage.read_range(files.log_key(job_id, 1), 0, 100_000).decode()
    assert "PYTHONUNBUFFERED" in log, "the child's environment stands in its log"
    told = "".join(str(event.data) for event in service.history(job_id))
    for secret in (KEY, server.url, "STROP_JUDGE", "secret words"):
        assert secret not in log
        assert secret not in told
    assert "chat/completions" in caplog.text, "what httpx logs has been looked at"
    assert KEY not in caplog.text


def test_a_child_that_really_trains_is_judged(
    service: Service, judged_service: Callable[..., Context], tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, service.settings.models_folder / "tiny", dirs_exist_ok=True)
    job_id = service.job(judge=True)
    with service.database.transaction() as session:
        [ref] = session.scalars(select(JobDataset).where(JobDataset.job_id == job_id))
    key = files.tokens_key(ref.dataset_id, ref.token_key)
    end = Tokenizer.from_folder(tiny_model).token_id("<|im_end|>")
    assert end is not None
    rows = [TokenRow(n, [40, 41, 50 + n, end], [0, 0, 1, 1]) for n in range(1, 7)]
    write_token_cache(tmp_path / "tokens", ref.dataset_id, rows, 512, {})
    service.storage.delete(key)
    service.storage.publish_folder(tmp_path / "tokens", key)
    with judge_server(4) as server:
        context = judged_service(server)
        Supervisor(context).run(take(context, job_id))
    [run] = service.read_runs(job_id)
    assert service.read_job(job_id).status == JobStatus.SUCCEEDED, run.message
    [judged] = service.history(job_id, "judged")
    assert (judged.data["scores"], judged.data["judge_score"]) == ([4], 4.0)
    [request] = server.requests
    [said] = [e.data["answers"] for e in service.history(job_id, "answers") if e.data["step"] == judged.data["step"]]
    sent = json.loads(request.body["messages"][1]["content"])
    assert (sent["reference"], sent["answer"]) == (said[0]["reference"], said[0]["text"])


@pytest.mark.parametrize(
    "script", [[["answers", 2], ["end", "bad_data"]], [["answers", 2], ["adapter", 3], ["tear_adapter"], ["exit", 0]]]
)
def test_a_run_without_a_result_is_not_judged(
    service: Service, judged_service: Callable[..., Context], script: list[Any]
) -> None:
    with judge_server(9) as server:
        context = judged_service(server)
        job_id = service.job(script, judge=True)
        Supervisor(context, FAKE_CHILD).run(take(context, job_id))
    assert service.read_job(job_id).status in (JobStatus.FAILED, JobStatus.QUEUED)
    assert (server.requests, service.history(job_id, "judged")) == ([], [])


def test_a_child_gives_itself_no_mark(service: Service, context: Context) -> None:
    mark = Judged(seq=1, step=6, adapter_step=6, model="me", asked=1, marked=1, judge_score=10, scores=[10])
    job_id = service.job([["raw", mark.model_dump_json() + "\n"], ["hang"]], judge=True)
    Supervisor(context, FAKE_CHILD).run(take(context, job_id))
    assert "no event" in service.read_job(job_id).message
    assert service.history(job_id, "judged") == []


def test_a_job_that_does_not_ask_is_not_judged(service: Service, judged_service: Callable[..., Context]) -> None:
    with judge_server(9) as server:
        context = judged_service(server)
        job_id = service.job(SCRIPT)
        Supervisor(context, FAKE_CHILD).run(take(context, job_id))
    assert service.read_job(job_id).status == JobStatus.SUCCEEDED
    assert (server.requests, service.history(job_id, "judged", "warning")) == ([], [])


def test_a_worker_without_a_judge_says_so_and_the_job_succeeds(service: Service, context: Context) -> None:
    job_id = service.job(SCRIPT, judge=True)
    Supervisor(context, FAKE_CHILD).run(take(context, job_id))
    assert service.read_job(job_id).status == JobStatus.SUCCEEDED
    [warned] = service.history(job_id, "warning")
    assert warned.data["code"] == "judge_failed"
    assert "STROP_JUDGE_URL" in warned.data["message"]


class Judging:
    """A run that waits for its judge."""

    def __init__(self, service: Service, context: Context, server: JudgeServer) -> None:
        self.job_id = service.job(SCRIPT, judge=True)
        self.claim = take(context, self.job_id)
        self._thread = threading.Thread(target=Supervisor(context, FAKE_CHILD).run, args=(self.claim,))
        self._thread.start()
        wait(lambda: len(server.requests) == 2, 40)

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_the_lease_is_renewed_while_the_judge_thinks(service: Service, judged_service: Callable[..., Context]) -> None:
    with judge_server(9, HANG) as server:
        judging = Judging(service, judged_service(server), server)
        seen = set()

        def renewed_often() -> bool:
            seen.add(service.read_job(judging.job_id).lease_until)
            return len(seen) > 3

        wait(renewed_often, 20)
        server.released.set()
        judging.join()
    assert service.history(judging.job_id, "judged")[0].data["scores"] == [9, 5, 5, 5]


@pytest.mark.parametrize("wish", ["cancel", "drain"])
def test_a_wish_to_end_ends_the_judging_and_keeps_the_result(
    service: Service, judged_service: Callable[..., Context], wish: str
) -> None:
    with judge_server(9, HANG) as server:
        context = judged_service(server)
        judging = Judging(service, context, server)
        if wish == "cancel":
            service.cancel(judging.job_id)
        else:
            context.drain.set()
        judging.join()
        assert not server.released.is_set(), "the judge was not waited for"
    job = service.read_job(judging.job_id)
    assert (job.status, job.adapter_version) == (JobStatus.SUCCEEDED, 1)
    assert service.history(judging.job_id, "judged")[0].data["scores"] == [9, None, None, None]
    [warned] = service.history(judging.job_id, "warning")
    assert warned.data["message"].endswith("the run was asked to end.")


def test_a_lost_fence_ends_the_judging_and_nothing_more_is_said(service: Service, judged_service: Callable[..., Context]) -> None:
    with judge_server(9, HANG) as server:
        judging = Judging(service, judged_service(server), server)
        wait(lambda: service.history(judging.job_id)[-1].data.get("phase") == "evaluating", 20)
        with service.database.transaction() as session:
            runs.close_run(session, judging.claim, Reason.LOST, "taken away")
        before = len(service.history(judging.job_id))
        judging.join()
    assert len(service.history(judging.job_id)) == before
    assert service.read_job(judging.job_id).status == JobStatus.QUEUED
    assert service.versions(judging.job_id) == 0


def test_a_celery_worker_has_its_judge_from_the_environment(service: Service, key_file: Path) -> None:
    with judge_server(7) as server:
        variables = {"STROP_JUDGE_URL": server.url, "STROP_JUDGE_MODEL": "m", "STROP_JUDGE_KEY_FILE": str(key_file)}
        with service.worker("gpu", **variables) as worker:
            job_id = service.job(SCRIPT, judge=True)
            service.ring(job_id)
            service.wait_job(job_id, JobStatus.SUCCEEDED)
            worker.stop()
            assert KEY not in worker.text()
    assert service.history(job_id, "judged")[0].data["judge_score"] == 7.0
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
