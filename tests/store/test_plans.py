"""A worker takes what fits it and leaves the rest to others; what fits nobody is ended with its numbers."""

from typing import Any

import pytest

from core.records import TokenCounts
from core.spec import JobSpec
from core.states import JobStatus, Reason
from store import jobs, nodes, outbox, plans, preparation, runs
from store.db import Database
from store.tables import DEFAULT_PROJECT, Dataset, Job, Model, Outbox, WorkerNode
from tests.core.plan.jobs import LLAMA_7B, PARAMETERS_7B

DATASET = "ds_dddddddddddd"
SPEC = JobSpec.model_validate(
    {"base_model": "llama", "data": {"datasets": [{"dataset_id": DATASET}]}, "batch": {"micro_batch_size": 16}}
)


@pytest.fixture(autouse=True)
def _model(database: Database) -> None:
    facts: dict[str, Any] = {"weights": "w", "tokenizer": "t", "has_chat_template": True, "folder": "llama"}
    with database.transaction() as session:
        model = Model(
            id="mdl_x",
            name="llama",
            architecture="LlamaForCausalLM",
            parameters=PARAMETERS_7B,
            context_length=4096,
            config=LLAMA_7B,
            **facts,
        )
        session.add(model)
        data = {"name": "d", "filename": "d", "bytes": 1, "sha256": "s", "status": "ready"}
        session.add(Dataset(id=DATASET, project_id=DEFAULT_PROJECT, **data))


def counts(length: int) -> TokenCounts:
    sums = {"rows": 100, "tokens": 100 * length, "trained_tokens": 50 * length, "squared_tokens": 100 * length**2}
    return TokenCounts(dataset_id=DATASET, truncated_rows=0, rows_without_target=0, longest=length, **sums)


def worker(database: Database, boot_id: str, budget_gib: float | None) -> None:
    with database.transaction() as session:
        nodes.register(
            session, boot_id=boot_id, name=boot_id, queues=["gpu"], device="NVIDIA H100 80GB HBM3", budget_gib=budget_gib
        )


def prepared(database: Database, length: int) -> str:
    """A job whose rows have been tokenised, queued or not."""
    with database.transaction() as session:
        job, _ = jobs.create_job(session, DEFAULT_PROJECT, SPEC, dataset_digests={DATASET: "s"}, tokenizer="t")
        job_id = job.id
    with database.transaction() as session:
        claim = preparation.claim_job(session, job_id, boot_id="p", lease_seconds=60)
        assert claim is not None
        for missing in claim.missing:
            preparation.record_tokens(session, claim, missing, counts(length))
        preparation.queue_job(session, claim)
    return job_id


def take(database: Database, job_id: str, boot_id: str) -> runs.Claim | None:
    with database.transaction() as session:
        return runs.claim_run(session, job_id, boot_id=boot_id, worker=boot_id, lease_seconds=60)


def test_a_worker_claims_only_what_fits_it(database: Database) -> None:
    worker(database, "small", 20.0)
    worker(database, "large", 78.0)
    job_id = prepared(database, 512)  # 8192 tokens of a 7B at once
    assert take(database, job_id, "small") is None
    with database.transaction() as session:
        job = session.get(Job, job_id)
        assert (job.status, job.fence) == (JobStatus.QUEUED, 0)
        assert session.get(Outbox, (outbox.RUN_JOB, job_id)) is not None, "its bell stands"
    assert take(database, job_id, "large") is not None


def test_short_rows_fit_where_long_ones_do_not(database: Database) -> None:
    worker(database, "small", 20.0)
    assert take(database, prepared(database, 20), "small") is not None


@pytest.mark.parametrize("is_registered", [True, False])
def test_a_worker_without_a_budget_or_a_row_takes_anything(database: Database, is_registered: bool) -> None:
    if is_registered:
        worker(database, "here", None)
    job_id = prepared(database, 512)
    assert take(database, job_id, "here") is not None


def test_a_job_whose_rows_fit_no_live_worker_fails_with_its_numbers(database: Database) -> None:
    worker(database, "small", 20.0)
    job_id = prepared(database, 512)
    with database.transaction() as session:
        job = session.get(Job, job_id)
        assert (job.status, job.reason) == (JobStatus.FAILED, Reason.BAD_SPEC)
        assert "GiB are needed (weights 1" in job.message
        assert "plans with 20.0: " in job.message
        assert session.get(Outbox, (outbox.RUN_JOB, job_id)) is None


def test_before_rows_are_counted_only_what_no_row_decides_is_held_against_a_job(database: Database) -> None:
    with database.transaction() as session:
        roomy, tight = (WorkerNode(device="cpu", budget_gib=budget) for budget in (20.0, 10.0))
        assert plans.why_too_large(session, SPEC, None, roomy) is None, "its rows may be short"
        assert "about" in str(plans.why_too_large(session, SPEC, None, tight))
        assert "about" in str(plans.why_too_large(session, SPEC, [counts(512)], roomy))
        assert plans.why_too_large(session, SPEC.model_copy(update={"base_model": "gone"}), None, tight) is None


def test_auto_comes_to_what_a_worker_has_room_for(database: Database) -> None:
    asked = JobSpec.model_validate(SPEC.model_dump() | {"batch": {"micro_batch_size": "auto", "rows_per_step": 32}})
    with database.transaction() as session:
        large, small, unknown = (
            plans.rows_at_once(session, asked, [counts(512)], WorkerNode(device="cpu", budget_gib=budget))
            for budget in (78.0, 24.0, None)
        )
        assert plans.rows_at_once(session, SPEC, [counts(512)], WorkerNode(device="cpu", budget_gib=78.0)) is None
    assert large is not None
    assert small is not None
    assert large > small >= 1
    assert unknown == 4
