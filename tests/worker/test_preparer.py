"""Uploads and jobs in preparation: the real preparer in this process, a child that obeys the upload."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from core.manifest import verify_folder
from core.records import DatasetReport
from core.run import TOKEN_CACHE_KIND
from core.spec import DpoObjective, Objective, SftObjective
from core.states import DatasetStatus, JobStatus, Phase, Reason
from store import files, outbox, preparation
from store.tables import Dataset
from tests.core.data.pictures.draw import noise, saved, write_zip
from tests.worker.service import FAKE_PREPARER, Service, wait
from worker.context import Context
from worker.preparer import Preparer


@pytest.fixture
def context(service: Service) -> Iterator[Context]:
    with service.context() as context:
        yield context


def preparer(context: Context, **options: float) -> Preparer:
    return Preparer(context, FAKE_PREPARER, **options)


def test_an_upload_becomes_ready_with_its_report_and_rows(service: Service, context: Context) -> None:
    dataset_id = service.upload()
    preparer(context).validate(dataset_id)
    dataset = service.read_dataset(dataset_id)
    assert (dataset.status, dataset.report["usable_rows"], dataset.owner) == (DatasetStatus.READY, 3, None)
    assert service.storage.exists(files.rows_key(dataset_id))
    assert service.bells() == []
    preparer(context).validate(dataset_id)
    assert service.read_dataset(dataset_id).tries == 1


def test_an_archive_of_pictures_is_read_by_the_real_child(service: Service, context: Context, tmp_path: Path) -> None:
    rows = b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n'
    members = {"a.png": saved(noise(0)), "b.png": b"no picture", "metadata.jsonl": rows}
    dataset_id = service.upload()
    service.storage.put_file(write_zip(tmp_path / "a.zip", members), files.upload_key(dataset_id), move=True)
    Preparer(context).validate(dataset_id)
    dataset = service.read_dataset(dataset_id)
    report = DatasetReport.model_validate(dataset.report)
    assert (dataset.status, report.format, report.kind) == (DatasetStatus.READY, "imagefolder", "picture_pair")
    assert (report.rows, report.usable_rows, report.pictures) == (2, 1, 1)
    assert [(problem.row, problem.field, problem.code) for problem in report.errors] == [(2, "file_name", "bad-image")]
    kept = context.storage.fetch_file(files.rows_key(dataset_id), tmp_path / "rows").read_text()
    assert kept == '{"row": 1, "image": "a.png", "captions": ["one"]}\n'


def test_an_upload_without_a_usable_row_fails_and_keeps_no_rows(service: Service, context: Context) -> None:
    dataset_id = service.upload("empty")
    job_id = service.job(dataset=dataset_id)
    preparer(context).validate(dataset_id)
    assert service.read_dataset(dataset_id).status == DatasetStatus.FAILED
    assert not service.storage.exists(files.rows_key(dataset_id))
    preparer(context).prepare(job_id)
    job = service.read_job(job_id)
    assert (job.status, job.reason) == (JobStatus.FAILED, Reason.BAD_DATA)
    assert dataset_id in job.message
    assert service.bells() == []


def test_an_upload_that_crashes_the_preparer_is_given_up(service: Service, context: Context) -> None:
    dataset_id = service.upload("crash")
    for tried in range(1, preparation.MAX_TRIES + 1):
        assert service.read_dataset(dataset_id).status == DatasetStatus.UPLOADED
        assert [bell.key for bell in service.bells()] == [dataset_id]
        preparer(context).validate(dataset_id)
        assert service.read_dataset(dataset_id).tries == tried
    dataset = service.read_dataset(dataset_id)
    assert dataset.status == DatasetStatus.FAILED
    assert dataset.report["errors"][0]["code"] == "preparer-crashed"
    assert service.bells() == []


def test_an_upload_that_took_the_whole_preparer_along_is_given_up_unread(service: Service, context: Context) -> None:
    dataset_id = service.upload("fine")
    with service.database.transaction() as session:
        session.execute(update(Dataset).values(tries=preparation.MAX_TRIES))
    preparer(context).validate(dataset_id)
    assert service.read_dataset(dataset_id).report["errors"][0]["code"] == "preparer-crashed"


def test_a_child_without_end_counts_as_crashed(service: Service, context: Context) -> None:
    dataset_id = service.upload("hang")
    preparer(context, wall_seconds=0.5).validate(dataset_id)
    dataset = service.read_dataset(dataset_id)
    assert (dataset.status, dataset.tries, dataset.owner) == (DatasetStatus.UPLOADED, 1, None)


def test_a_vanished_upload_and_a_deleted_dataset_are_no_crash(service: Service, context: Context) -> None:
    gone, deleted = service.upload(), service.upload()
    service.storage.delete(files.upload_key(gone))
    preparer(context).validate(gone)
    assert service.read_dataset(gone).report["errors"][0]["code"] == "upload-missing"
    with service.database.transaction() as session:
        session.execute(update(Dataset).where(Dataset.id == deleted).values(deleted_at=Dataset.created_at))
    preparer(context).validate(deleted)
    assert service.read_dataset(deleted).report is None


def test_a_drained_validation_is_given_back_uncounted(service: Service, context: Context) -> None:
    dataset_id = service.upload("hang")
    context.drain.set()
    preparer(context).validate(dataset_id)
    dataset = service.read_dataset(dataset_id)
    assert (dataset.status, dataset.tries, dataset.lease_until) == (DatasetStatus.UPLOADED, 0, None)
    assert [bell.key for bell in service.bells()] == [dataset_id]


def test_a_job_waits_for_its_dataset_then_for_its_tokens_then_for_a_gpu(service: Service, context: Context) -> None:
    dataset_id = service.upload()
    job_id = service.job(dataset=dataset_id)
    preparer(context).prepare(job_id)
    assert service.read_job(job_id).status == JobStatus.VALIDATING_FILES
    preparer(context).validate(dataset_id)
    preparer(context).prepare(job_id)
    assert service.read_job(job_id).status == JobStatus.QUEUED
    assert service.bells() == [] or [bell.task for bell in service.bells()] == [outbox.RUN_JOB]
    assert list(Path(service.settings.storage, "datasets", dataset_id, "tokens").glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("verb", "reason", "words"),
    [
        ("crash", Reason.INTERNAL_ERROR, "SIGSEGV"),
        ("spec", Reason.BAD_SPEC, "no such template"),
        ("targetless", Reason.NO_TRAINABLE_TOKENS, "token"),
    ],
)
def test_a_job_whose_tokens_cant_be_made_fails_with_the_reason(
    service: Service, context: Context, verb: str, reason: Reason, words: str
) -> None:
    dataset_id = service.upload(f"fine/{verb}")
    job_id = service.job(dataset=dataset_id)
    preparer(context).validate(dataset_id)
    preparer(context).prepare(job_id)
    job = service.read_job(job_id)
    assert (job.status, job.reason) == (JobStatus.FAILED, reason)
    assert words in job.message
    assert service.bells() == []


def test_pairs_are_tokenised_as_such_for_an_objective_that_trains_on_them(service: Service, context: Context) -> None:
    dataset_id = service.upload("pairs/fine")
    job_id = service.job(dataset=dataset_id, objective=DpoObjective())
    preparer(context).validate(dataset_id)
    preparer(context).prepare(job_id)
    assert service.read_job(job_id).status == JobStatus.QUEUED
    (folder,) = Path(service.settings.storage, "datasets", dataset_id, "tokens").iterdir()
    facts = verify_folder(folder, TOKEN_CACHE_KIND)
    assert (facts["data_kind"], facts["train_on"]) == ("preference", "last_turn")


@pytest.mark.parametrize(("upload", "objective"), [("fine", DpoObjective()), ("pairs", SftObjective())])
def test_a_dataset_that_turns_out_to_be_of_another_kind_fails_its_job(
    service: Service, context: Context, upload: str, objective: Objective
) -> None:
    dataset_id = service.upload(upload)
    job_id = service.job(dataset=dataset_id, objective=objective)
    preparer(context).validate(dataset_id)
    preparer(context).prepare(job_id)
    job = service.read_job(job_id)
    assert (job.status, job.reason) == (JobStatus.FAILED, Reason.BAD_DATA)
    report = DatasetReport.model_validate(service.read_dataset(dataset_id).report)
    assert job.message == report.wrong_kind(dataset_id, objective)
    assert service.bells() == []


def test_a_job_cancelled_while_its_tokens_are_made_is_left_alone(service: Service, context: Context) -> None:
    dataset_id = service.upload("fine/hang")
    job_id = service.job(dataset=dataset_id)
    preparer(context).validate(dataset_id)
    working = threading.Thread(target=preparer(context).prepare, args=(job_id,))
    working.start()
    wait(lambda: service.read_job(job_id).owner == context.boot_id, 20)
    assert service.read_job(job_id).phase == Phase.PREPARING
    service.cancel(job_id)
    working.join(20)
    assert not working.is_alive()
    assert service.statuses(job_id) == [("validating_files", None), ("cancelled", "cancelled")]


def test_bells_alone_take_an_upload_and_its_job_to_the_end(service: Service) -> None:
    with service.worker("prepare"), service.worker("gpu"):
        dataset_id = service.upload()
        job_id = service.job(dataset=dataset_id)
        service.wait_job(job_id, JobStatus.SUCCEEDED)
    assert service.bells() == []
