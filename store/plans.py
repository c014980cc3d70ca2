"""Plans of jobs from what stands in the record: the registered model, the preparer's counts, and what the workers have said.

One sentence decides three times over: it refuses a job at submit, fails one whose rows turn out too long for every live worker,
and keeps a worker from a job that fits others only.
"""

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.plan import does_not_fit, plan
from core.records import PlanRecord, TokenCounts
from core.spec import JobSpec
from store.tables import Model, WorkerNode


def plan_job(session: Session, spec: JobSpec, counts: list[TokenCounts] | None, node: WorkerNode | None) -> PlanRecord | None:
    """The dry run of a job on a worker; None when its model is no longer registered."""
    model = session.scalar(select(Model).where(Model.name == spec.base_model))
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
    )


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
    if found is None or found.fits or found.fits is None:
        return None
    if not found.ready and found.memory.weights_gib + found.memory.optimizer_gib <= node.budget_gib:
        return None
    return does_not_fit(found.memory, node.budget_gib, found.knobs)
