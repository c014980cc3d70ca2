"""What the API answers. The same classes describe the OpenAPI page and what a client reads."""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.adapter import BaseIdentity, ParitySummary
from core.spec import DATA_KINDS, DataKind, JobSpec, Objective
from core.states import DatasetStatus, JobStatus, Phase, Reason, RunStatus

T = TypeVar("T")


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Page(Record, Generic[T]):
    """One page of a list. Pass `next_cursor` as `cursor` for the next one; null on the last."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    next_cursor: str | None = None


class RowProblem(Record):
    """A row that can't be used, or that deserves a look. Rows count from 1; `line` is set where the file has lines."""

    row: int | None = Field(description="Null where the whole file is meant.")
    line: int | None = None
    field: str | None = None
    code: str
    message: str


class DatasetReport(Record):
    """What the preparer found in a file. `errors` and `warnings` hold the first 100 of each; the counts are complete."""

    format: str | None = Field(
        description="alpaca, sharegpt, messages, prompt_completion; "
        "preference, preference_implicit, preference_alpaca, preference_sharegpt, preference_openai; text; "
        "of pictures: imagefolder, open_clip, image_text, image_caption, image_captions, coco_captions; vqa_answer, vqa_answers; "
        "llava, messages_images; "
        "null when not even that is clear."
    )
    kind: DataKind | None = Field(default=None, description="What a row is, by the format; an objective trains on one kind.")
    encoding: str = "utf-8"
    rows: int
    usable_rows: int
    turns: int = 0
    characters: int = 0
    duplicate_rows: int = 0
    pictures: int = Field(default=0, description="Different pictures that usable rows name.")
    error_count: int
    warning_count: int
    errors: list[RowProblem]
    warnings: list[RowProblem]

    def wrong_kind(self, dataset_id: str, objective: Objective) -> str | None:
        """The sentence that refuses this dataset to an objective which trains on rows of another kind; None where it fits."""
        held: DataKind = self.kind or "conversation"  # the only kind when reports did not name one
        wanted = DATA_KINDS[objective.kind]
        if held == wanted:
            return None
        meant_for = " or ".join(name for name, kind in DATA_KINDS.items() if kind == held)
        whose = f"objective {meant_for}" if meant_for else "no objective yet"
        return (
            f"{dataset_id} holds {held} rows (format {self.format}), which are for {whose}; "
            f"objective {objective.kind} trains on {wanted} rows"
        )


class DatasetRecord(Record):
    object: Literal["dataset"] = "dataset"
    id: str
    name: str
    filename: str
    status: DatasetStatus
    bytes: int
    sha256: str
    created_at: datetime
    report: DatasetReport | None = Field(description="Null until the preparer has read the file.")


class TokenCounts(Record):
    """A dataset as one job trains on it: after template, tokenizer and `max_length`, held-out rows included.

    Rows are those of the upload that were read: conversations, pairs or texts. Examples are what the engine draws, holds out
    and counts steps by: a conversation; a pair's two sequences; as many sequences as a text fills. Tokens are those of the
    examples kept.
    """

    dataset_id: str
    rows: int
    examples: int = Field(description="Examples kept.")
    tokens: int
    trained_tokens: int
    truncated_rows: int = Field(description="Rows cut at max_length; a text goes on in a further sequence instead.")
    rows_without_target: int = Field(description="Rows left without a trained token; they are dropped.")
    longest: int = Field(description="Tokens of the longest sequence before the cut.")
    squared_tokens: int | None = Field(
        default=None, description="Sum over the sequences of their squared tokens; null where it was not counted."
    )

    @model_validator(mode="before")
    @classmethod
    def _count_examples(cls, stored: Any) -> Any:
        """Counts stored when every row was one example do not say so."""
        if isinstance(stored, dict) and "examples" not in stored and {"rows", "rows_without_target"} <= stored.keys():
            return stored | {"examples": stored["rows"] - stored["rows_without_target"]}
        return stored


class RunRecord(Record):
    object: Literal["run"] = "run"
    id: str
    attempt: int
    status: RunStatus
    reason: Reason | None
    message: str
    worker: str
    started_at: datetime
    ended_at: datetime | None
    resumed_from_step: int | None


class JobRecord(Record):
    object: Literal["job"] = "job"
    id: str
    status: JobStatus
    phase: Phase | None = Field(description="What is going on right now, finer than the status.")
    reason: Reason | None = Field(description="Why it ended; a stable code.")
    message: str = Field(description="The same for people.")
    spec: JobSpec
    tokens: list[TokenCounts] = Field(description="Empty until the preparer has tokenised the datasets.")
    step: int | None = Field(description="Last optimizer step recorded.")
    total_steps: int | None
    cancel_requested_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    adapter_id: str | None = Field(description="The result, once the job succeeded.")
    adapter_version: int | None
    runs: list[RunRecord]


class EventRecord(Record):
    object: Literal["event"] = "event"
    id: str = Field(description="<attempt>-<seq>; usable as Last-Event-ID.")
    kind: str
    at: datetime
    data: dict[str, Any]


class MetricPoint(BaseModel):
    """All curve values of one step, each from the highest attempt that reached it."""

    model_config = ConfigDict(extra="allow")

    step: int
    attempt: int


class CheckpointRecord(Record):
    object: Literal["checkpoint"] = "checkpoint"
    job_id: str
    attempt: int
    step: int
    bytes: int
    sha256: str
    created_at: datetime


class ReceiptRecord(Record):
    """One check by one endpoint before it serves a version."""

    endpoint: str
    check: str
    passed: bool
    numbers: dict[str, Any]
    at: datetime


class AdapterVersionRecord(Record):
    version: int
    sha256: str
    bytes: int
    job_id: str | None = Field(description="Null for an adapter that was imported.")
    tuning: Literal["lora", "mora", "full"]
    base: BaseIdentity
    step: int
    eval_loss: float | None
    deployed: bool
    parity: ParitySummary | None = Field(description="What was measured when it was made; endpoints are held to it.")
    servable_on: list[str] = Field(description="Endpoints whose receipts all passed.")
    receipts: list[ReceiptRecord]
    created_at: datetime


class AdapterRecord(Record):
    object: Literal["adapter"] = "adapter"
    id: str
    name: str
    created_at: datetime
    latest_version: int
    versions: list[AdapterVersionRecord]


class ModelRecord(Record):
    object: Literal["model"] = "model"
    id: str
    name: str
    family: str = Field(description="The architecture as transformers names it.")
    parameters: int
    context_length: int
    weights: str = Field(description="Digest over all tensors.")
    has_chat_template: bool
    created_at: datetime


class MemoryEstimate(Record):
    """GiB at the peak of a run, in the parts that stand in memory at that moment."""

    weights_gib: float = Field(description="Of model and adapter, and the copies that mixed precision makes.")
    gradients_gib: float = Field(description="Beside activations: those of one micro-batch grow as these go.")
    optimizer_gib: float = Field(description="The optimizer's states.")
    activations_gib: float = Field(description="What layers keep for the backward pass.")
    logits_gib: float = Field(description="The output head's results and their gradients, of one chunk.")
    workspace_gib: float = Field(description="One layer's backward pass, one unpacked matrix, the libraries' own.")
    total_gib: float


class Refinement(Record):
    """What finished runs of the same base model and method on this kind of device said of their plans."""

    factor: float = Field(description="By which activations, logits and workspace are multiplied; bounded.")
    runs: int = Field(description="Finished runs that it comes from.")


class Knob(Record):
    """A change to a job that lowers its memory, by the plan of the changed job."""

    changes: dict[str, Any] = Field(description="JSON pointer into the spec, and the value to set there.")
    total_gib: float
    fits: bool
    step_time: float | None = Field(description="Time of a step over that of the job as it is; null for an unknown GPU.")
    same_training: bool = Field(description="Nothing that is learned changes but by rounding.")


class PlanRecord(Record):
    """A dry run: what a job would do, before anything is queued."""

    object: Literal["plan"] = "plan"
    ready: bool = Field(description="False while the preparer has not tokenised the data; counts and steps are null then.")
    train_rows: int | None
    eval_rows: int | None
    steps: int | None
    tokens: list[TokenCounts]
    rows_at_once: int = Field(description="batch.micro_batch_size, or what auto comes to on the worker with the largest budget.")
    trainable_parameters: int | None = Field(description="Null where there is no estimate of memory.")
    memory: MemoryEstimate | None = Field(description="Null for tasks that there is no estimate for yet; a warning says so.")
    refinement: Refinement | None = Field(
        default=None, description="How measured peaks changed `memory`; null while no run of this kind has finished."
    )
    budget_gib: float | None = Field(description="The largest memory budget among live workers; null when none is up.")
    fits: bool | None
    knobs: list[Knob] = Field(description="What would make a job fit that doesn't, best first; else empty.")
    total_tokens: int | None = Field(description="Of all steps, without padding.")
    gpu: str | None = Field(description="Kind of GPU that the seconds are for: the one with the largest budget.")
    step_seconds: float | None = Field(description="Of a step of average rows; null while counts or the kind of GPU are unknown.")
    seconds: float | None = Field(description="Of all steps; loading, evaluations and saving come on top.")
    warnings: list[str]
