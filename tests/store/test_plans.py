"""A worker takes what fits it and leaves the rest to others; what fits nobody is ended with its numbers."""

from typing import Any

import pytest
from sqlalchemy import func, select

from core.adapter import AdapterFacts
from core.events import Started, Step, TrainEvent, Warned
from core.records import PlanRecord, TokenCounts
from core.spec import JobSpec
from core.states import JobStatus, Reason
from store import jobs, nodes, outbox, plans, preparation, runs
from store.db import Database
from store.events import next_seq
from store.tables import DEFAULT_PROJECT, Dataset, Job, MeasuredPeak, Model, Outbox, WorkerNode
from tests.core.plan.jobs import H100, LLAMA_7B, PARAMETERS_7B

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
        nodes.register(session, boot_id=boot_id, name=boot_id, queues=["gpu"], device=H100, budget_gib=budget_gib)


def prepared(database: Database, length: int, spec: JobSpec = SPEC) -> str:
    """A job whose rows have been tokenised, queued or not."""
    with database.transaction() as session:
        job, _ = jobs.create_job(session, DEFAULT_PROJECT, spec, dataset_digests={DATASET: "s"}, tokenizer="t")
        job_id = job.id
        if job.status == JobStatus.QUEUED:  # an earlier job's tokens serve
            return job_id
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


def finished(database: Database, measured_gib: float, *, said: tuple[TrainEvent, ...] = (), spec: JobSpec = SPEC) -> None:
    """A run of the job to its end, whose largest peak is `measured_gib`."""
    job_id = prepared(database, 512, spec)
    claim = take(database, job_id, "large")
    assert claim is not None
    started: dict[str, Any] = {"device": H100, "precision": "bf16", "total_steps": 2, "first_step": 1, "example": []}
    started |= {"train_rows": 100, "eval_rows": 0, "trainable_parameters": 1, "total_parameters": 2, "tier": "packed"}
    step: dict[str, Any] = {"epoch": 0.1, "loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 9, "trained_tokens": 4}
    step |= {"tokens_per_second": 1.0, "step_seconds": 1.0, "eta_seconds": 0.0, "allocated_gib": 1.0, "reserved_gib": 90.0}
    peaks = (measured_gib - 1, measured_gib)
    steps = [Step(**step, step=number, peak_allocated_gib=peak, rss_gib=99.0) for number, peak in enumerate(peaks, 1)]
    events = [Started(**started), *said, *steps]
    facts = AdapterFacts.model_construct()
    with database.transaction() as session:
        first = next_seq(session, job_id, claim.attempt)
        runs.record_events(session, claim, [event.model_copy(update={"seq": first + n}) for n, event in enumerate(events)])
        runs.finish_run(session, claim, runs.Result("s", 1, facts), "done")


def plan_on(database: Database, device: str) -> PlanRecord:
    with database.transaction() as session:
        found = plans.plan_job(session, SPEC, [counts(512)], WorkerNode(device=device, budget_gib=78.0))
    assert found is not None
    return found


def test_a_finished_run_refines_the_plans_of_its_kind_on_its_kind_of_device(database: Database) -> None:
    worker(database, "large", 78.0)
    before = plan_on(database, H100)
    assert before.refinement is None
    finished(database, before.memory.total_gib + 2)
    after = plan_on(database, H100)
    assert after.memory.total_gib == pytest.approx(before.memory.total_gib + 2)
    assert after.refinement is not None
    assert after.refinement.runs == 1
    assert plan_on(database, "NVIDIA A100").memory == before.memory

    finished(database, before.memory.total_gib + 1)
    assert plan_on(database, H100).memory == after.memory, "the highest counts, and is measured against the plan as it was"
    for _ in range(8):
        finished(database, before.memory.total_gib - 0.5)
    assert plan_on(database, H100).memory.total_gib == pytest.approx(before.memory.total_gib - 0.5), "the newest eight"


@pytest.mark.parametrize("why", ["other tier", "halved", "auto"])
def test_a_run_that_was_not_as_planned_refines_nothing(database: Database, why: str) -> None:
    worker(database, "large", 78.0)
    before = plan_on(database, H100)
    said: tuple[TrainEvent, ...] = (Warned(code="micro_batch_halved", message="m"),) if why == "halved" else ()
    spec = SPEC
    if why == "other tier":
        spec = JobSpec.model_validate(SPEC.model_dump() | {"memory": {"fused_layers": True}})  # planned fused, ran packed
    elif why == "auto":
        spec = JobSpec.model_validate(SPEC.model_dump() | {"batch": {"micro_batch_size": "auto", "rows_per_step": 16}})
    finished(database, before.memory.total_gib + 2, said=said, spec=spec)
    assert plan_on(database, H100) == before
    with database.transaction() as session:
        assert session.scalar(select(func.count()).select_from(MeasuredPeak)) == 0
