"""What a submitted spec is held against: registry, datasets, and what the model can do. Every reason at once, each with its
pointer; the same for `POST /jobs` and `POST /jobs/plan`. Runs in the caller's transaction, which then keeps the datasets.
"""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.errors import InvalidInput, NotFound, Problem
from core.plan import check_spec
from core.records import DatasetReport, PlanRecord, TokenCounts
from core.run import token_key
from core.spec import DATA_KINDS, JobSpec
from core.states import DatasetStatus
from store import datasets, models, nodes, plans
from store.tables import Dataset, Model, TokenCache

_NAMES_SHOWN = 20


@dataclass(frozen=True)
class Submission:
    """A spec that can be a job."""

    spec: JobSpec
    model: Model
    datasets: dict[str, Dataset]

    @property
    def digests(self) -> dict[str, str]:
        return {dataset_id: dataset.sha256 for dataset_id, dataset in self.datasets.items()}


def check_submission(session: Session, project_id: str, spec: JobSpec, *, has_judge: bool) -> Submission:
    """Raises InvalidInput with all reasons why the spec can't be a job of this project."""
    problems: list[Problem] = []
    model: Model | None = None
    try:
        model = models.find_model(session, spec.base_model)
    except NotFound:
        names = [known.name for known in models.list_models(session)]
        listed = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "") if names else "none"
        message = f"There is no model {spec.base_model}; registered: {listed}"
        problems.append(Problem("unknown-model", message, pointer="/base_model"))
    else:
        problems += check_spec(spec, architecture=model.architecture, context_length=model.context_length, config=model.config)
    if spec.adapter_name is not None and any(known.name == spec.adapter_name for known in models.list_models(session)):
        message = f"{spec.adapter_name} is the name of a model; an adapter needs another"
        problems.append(Problem("name-taken", message, pointer="/adapter_name"))
    if spec.eval.judge and not has_judge:
        message = "This service has no judge model: leave it out, or ask its operator to set STROP_JUDGE_URL"
        problems.append(Problem("no-judge", message, pointer="/eval/judge"))
    found = datasets.hold_datasets(session, project_id, [ref.dataset_id for ref in spec.data.datasets])
    problems += _dataset_problems(spec, found)
    if problems or model is None:
        raise InvalidInput("The job can't be run as it is asked for", problems)
    return Submission(spec, model, found)


def plan_submission(session: Session, submission: Submission) -> PlanRecord:
    """The dry run, from what the preparer has stored and the workers have said."""
    found = plans.plan_job(session, submission.spec, _stored_counts(session, submission), nodes.largest_node(session))
    assert found is not None, "the submission has a model"
    return found


def check_size(session: Session, submission: Submission) -> None:
    """Raises InvalidInput with the numbers for a job that fits no live worker. Where none is live, any job may wait for one."""
    counts = _stored_counts(session, submission)
    too_large = plans.why_too_large(session, submission.spec, counts, nodes.largest_node(session))
    if too_large is not None:
        raise InvalidInput("The job fits no worker", [Problem("does-not-fit", too_large, pointer="/batch/micro_batch_size")])


def _dataset_problems(spec: JobSpec, found: dict[str, Dataset]) -> list[Problem]:
    problems = []
    usable: list[int | None] = []
    for number, ref in enumerate(spec.data.datasets):
        pointer = f"/data/datasets/{number}/dataset_id"
        dataset = found.get(ref.dataset_id)
        if dataset is None:
            problems.append(Problem("unknown-dataset", f"There is no dataset {ref.dataset_id}", pointer=pointer))
        elif dataset.status == DatasetStatus.FAILED:
            message = f"{ref.dataset_id} holds no usable row; its report says why"
            problems.append(Problem("failed-dataset", message, pointer=pointer))
        else:
            report = None if dataset.report is None else DatasetReport.model_validate(dataset.report)
            wrong = None if report is None else report.wrong_kind(ref.dataset_id, spec.objective)
            if wrong is not None:
                problems.append(Problem("wrong-data-kind", wrong, pointer=pointer))
            usable.append(None if report is None else report.usable_rows)
    # How many examples a text makes is not known before it is tokenised.
    known = [rows for rows in usable if rows is not None and DATA_KINDS[spec.objective.kind] != "text"]
    if not problems and len(known) == len(spec.data.datasets) and sum(known) <= spec.data.eval_rows:
        message = f"{spec.data.eval_rows} rows held out of {sum(known)} leave none to train on"
        problems.append(Problem("too-few-rows", message, pointer="/data/eval_rows"))
    return problems


def _stored_counts(session: Session, submission: Submission) -> list[TokenCounts] | None:
    spec = submission.spec
    counts = []
    for dataset_id, sha256 in sorted(submission.digests.items()):
        key = token_key(sha256, submission.model.tokenizer, spec.data, spec.objective)
        stored = session.scalar(select(TokenCache.counts).where(TokenCache.key == key, TokenCache.dataset_id == dataset_id))
        if stored is None:
            return None
        counts.append(TokenCounts.model_validate(stored))
    return counts
