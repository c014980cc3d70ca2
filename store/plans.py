"""Plans of jobs from what stands in the record: the registered model, the preparer's counts, what the workers have said, and
what finished runs have measured.

One sentence decides three times over: it refuses a job at submit, fails one whose rows turn out too long for every live worker,
and keeps a worker from a job that fits others only.
"""

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.plan import does_not_fit, plan
from core.plan.memory import estimate_memory
from core.plan.refine import RUNS_ASKED, method_of, ratio_of
from core.plan.work import work_of
from core.records import PlanRecord, TokenCounts
from core.spec import JobSpec
from store.tables import Event, MeasuredPeak, Metric, Model, WorkerNode

_HALVED = "micro_batch_halved"


def plan_job(session: Session, spec: JobSpec, counts: list[TokenCounts] | None, node: WorkerNode | None) -> PlanRecord | None:
    """The dry run of a job on a worker; None when its model is no longer registered."""
    model = _model(session, spec)
    if model is None:
        return None
    return plan(
        spec,
        architecture=model.architecture,
        parameters=model.parameters,
        config=model.config,
        counts=counts or None,
        budget_gib=None if node is None else node.budget_gib,
        gpu=None if node is None else node.device,
        measured={} if node is None else _measured(session, model.name, node.device),
    )


def record_peak(
    session: Session, job_id: str, attempt: int, spec: JobSpec, counts: list[TokenCounts], node: WorkerNode | None
) -> None:
    """Keep what a finished run measured beside its plan, for the next plans of its kind.

    Nothing is kept of a run that says nothing of a plan: on a CPU, on another tier than planned, with a micro-batch that had to
    be halved or that `auto` decided (what it came to is nowhere in the record).
    """
    model = _model(session, spec)
    peak = session.scalar(
        select(func.max(Metric.value)).where(
            Metric.job_id == job_id, Metric.attempt == attempt, Metric.name == "peak_allocated_gib"
        )
    )
    if model is None or node is None or peak is None or not counts or spec.batch.micro_batch_size == "auto":
        return
    facts: dict[str, Any] = {"architecture": model.architecture, "parameters": model.parameters, "config": model.config}
    found = plan(spec, counts=counts, budget_gib=None, **facts)
    if found.memory is None:
        return
    work = work_of(spec, counts=counts, steps=found.steps, **facts)
    said = session.execute(
        select(Event.kind, Event.data).where(
            Event.job_id == job_id, Event.attempt == attempt, Event.kind.in_(["started", "warning"])
        )
    ).all()
    ran_as_planned = all(data["tier"] == work.tier if kind == "started" else data["code"] != _HALVED for kind, data in said)
    planned = estimate_memory(work)
    ratio = ratio_of(planned, peak)
    if not ran_as_planned or ratio is None:
        return
    session.add(
        MeasuredPeak(
            job_id=job_id,
            device=node.device,
            base_model=model.name,
            method=method_of(work),
            planned_gib=planned.total_gib,
            measured_gib=peak,
            ratio=ratio,
        )
    )
    session.flush()


def rows_at_once(session: Session, spec: JobSpec, counts: list[TokenCounts], node: WorkerNode | None) -> int | None:
    """What `batch.micro_batch_size: auto` comes to on a worker; None for a spec that says it itself."""
    if spec.batch.micro_batch_size != "auto":
        return None
    found = plan_job(session, spec, counts, node)
    return None if found is None else found.rows_at_once


def why_too_large(session: Session, spec: JobSpec, counts: list[TokenCounts] | None, node: WorkerNode | None) -> str | None:
    """What keeps a job from a worker, in numbers; None when it fits or nobody can say.

    Without counts rows are planned as long as they may be, and most are not: then only what no row decides is held against it.
    """
    if node is None or node.budget_gib is None:
        return None
    found = plan_job(session, spec, counts, node)
    if found is None or found.memory is None or found.fits or found.fits is None:
        return None
    if not found.ready and found.memory.weights_gib + found.memory.optimizer_gib <= node.budget_gib:
        return None
    return does_not_fit(found.memory, node.budget_gib, found.knobs)


def _model(session: Session, spec: JobSpec) -> Model | None:
    return session.scalar(select(Model).where(Model.name == spec.base_model))


def _measured(session: Session, base_model: str, device: str) -> dict[str, list[float]]:
    """By method, the newest first."""
    place = func.row_number().over(partition_by=MeasuredPeak.method, order_by=MeasuredPeak.at.desc())
    numbered = (
        select(MeasuredPeak.method, MeasuredPeak.ratio, place.label("place"))
        .where(MeasuredPeak.device == device, MeasuredPeak.base_model == base_model)
        .subquery()
    )
    found: dict[str, list[float]] = {}
    newest = select(numbered.c.method, numbered.c.ratio).where(numbered.c.place <= RUNS_ASKED).order_by(numbered.c.place)
    for method, ratio in session.execute(newest):
        found.setdefault(method, []).append(ratio)
    return found
