"""Jobs: submit, plan, list, read, cancel."""

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Response

from api import submit
from api.auth import SecuredRoute, needs
from api.deps import CallerDep, Cursor, JobId, Limit, ServicesDep, page
from api.errors import secured
from api.wire import JSON
from core.records import JobRecord, Page, PlanRecord
from core.spec import JobSpec
from core.states import JobStatus
from store import audit, idempotency, jobs

router = APIRouter(tags=["jobs"], route_class=SecuredRoute)

_DATA = {"datasets": [{"dataset_id": "ds_k3v9x2m4q7w5n6p2r3t4"}], "max_length": 512, "eval_rows": 32}
_BATCH = {"micro_batch_size": 4, "gradient_accumulation_steps": 4}
SPEC_EXAMPLES: dict[str, Any] = {
    "lora": {
        "summary": "LoRA on all linear modules, with held-out loss",
        "value": {
            "base_model": "SmolLM2-135M-Instruct",
            "adapter_name": "my-assistant",
            "tuning": {"kind": "lora", "rank": 8, "alpha": 16},
            "data": _DATA,
            "schedule": {"kind": "cosine", "epochs": 1, "warmup_steps": 5},
            "batch": _BATCH,
        },
    },
    "qlora": {
        "summary": "QLoRA: the same over a base in 4 bits",
        "value": {
            "base_model": "SmolLM2-135M-Instruct",
            "tuning": {"kind": "lora", "rank": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
            "quantization": {"kind": "nf4", "double_quantization": True},
            "data": _DATA,
            "optim": {"kind": "paged_adamw_8bit", "learning_rate": 2e-4},
            "batch": _BATCH,
            "memory": {"checkpointing": True},
        },
    },
    "full": {
        "summary": "Full tuning: every weight",
        "value": {
            "base_model": "SmolLM2-135M-Instruct",
            "tuning": {"kind": "full"},
            "data": _DATA,
            "optim": {"learning_rate": 2e-5},
            "schedule": {"kind": "linear", "max_steps": 200},
            "batch": _BATCH,
        },
    },
}
SpecBody = Annotated[JobSpec, Body(openapi_examples=SPEC_EXAMPLES)]
IdempotencyKey = Annotated[
    str | None,
    Header(description="Any text of yours, unique per job: sent again, it gives the same answer and no second job."),
]


@router.post(
    "/jobs",
    status_code=201,
    response_model=JobRecord,
    dependencies=[needs("jobs:write")],
    responses=secured(413, 415),
)
def create_job(services: ServicesDep, caller: CallerDep, spec: SpecBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Submit a job. It is queued once its datasets are validated and tokenised; watch it at `/jobs/{job_id}/metrics`."""
    digest = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    with services.database.transaction() as session:
        if idempotency_key is not None:
            answered = idempotency.find(session, caller.project_id, idempotency_key, digest)
            if answered is not None:
                return _answer(answered[0], JobRecord.model_validate(answered[1]))
        submission = submit.check_submission(session, caller.project_id, spec, has_judge=services.settings.has_judge)
        submit.check_size(session, submission)
        job, bell = jobs.create_job(
            session,
            caller.project_id,
            spec,
            dataset_digests=submission.digests,
            tokenizer=submission.model.tokenizer,
            processor=submission.model.processor,
        )
        audit.record(session, caller.project_id, caller.key_id, "job.create", job.id, base_model=spec.base_model)
        record = jobs.job_record(session, job)
        if idempotency_key is not None:
            stored = record.model_dump(mode="json")
            idempotency.keep(session, caller.project_id, idempotency_key, digest, 201, stored)
    services.doorbell.ring([bell])
    return _answer(201, record)


@router.post("/jobs/plan", dependencies=[needs("jobs:read")], responses=secured(413, 415))
def plan_job(services: ServicesDep, caller: CallerDep, spec: SpecBody) -> PlanRecord:
    """Dry run: would it be accepted, how many steps, how much memory and time, what would make it fit, and what looks unwise."""
    with services.database.transaction() as session:
        submission = submit.check_submission(session, caller.project_id, spec, has_judge=services.settings.has_judge)
        return submit.plan_submission(session, submission)


@router.get("/jobs", dependencies=[needs("jobs:read")], responses=secured(404))
def list_jobs(
    services: ServicesDep,
    caller: CallerDep,
    status: JobStatus | None = None,
    base_model: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9._/-]{1,200}$")] = None,
    cursor: Cursor = None,
    limit: Limit = 20,
) -> Page[JobRecord]:
    """Newest first."""
    with services.database.transaction() as session:
        rows = jobs.list_jobs(session, caller.project_id, status=status, base_model=base_model, cursor=cursor, limit=limit)
        return page(rows, limit, lambda shown: [jobs.job_record(session, row) for row in shown], lambda row: row.id)


@router.get("/jobs/{job_id}", dependencies=[needs("jobs:read")], responses=secured(404))
def get_job(services: ServicesDep, caller: CallerDep, job_id: JobId) -> JobRecord:
    """The job with its runs and token counts."""
    with services.database.transaction() as session:
        return jobs.job_record(session, jobs.find_job(session, caller.project_id, job_id))


@router.post("/jobs/{job_id}/cancel", dependencies=[needs("jobs:write")], responses=secured(404, 409))
def cancel_job(services: ServicesDep, caller: CallerDep, job_id: JobId) -> JobRecord:
    """End a job: one that waits at once, a running one within a heartbeat of its worker. 409 when it has already ended."""
    with services.database.transaction() as session:
        job = jobs.cancel_job(session, caller.project_id, job_id)
        audit.record(session, caller.project_id, caller.key_id, "job.cancel", job_id)
        return jobs.job_record(session, job)


def _answer(status: int, record: JobRecord) -> Response:
    return Response(record.model_dump_json(), status, {"Location": f"/jobs/{record.id}"}, JSON)
