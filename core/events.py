"""TrainEvent: what a run says, in one shape from the GPU to the browser.

The loop yields events, the child writes each as one JSON line into its own pipe, the supervisor sends it to a Redis stream
at once and to Postgres in batches, and server-sent events carry it on. `seq` counts from 1 within a run without gaps; with
the attempt's number it is the event's id on the wire, `<attempt>-<seq>`, which makes every hop resumable. Attempt 0 holds
what happened before the first run.
"""

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from core.catalog import Tier
from core.states import JobStatus, Phase, Reason


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int = Field(default=0, ge=0, description="1, 2, ... within the attempt; 0 until numbered.")
    at: float = Field(default_factory=time.time, description="Unix seconds, for display; order is by seq.")


class Started(_Event):
    """The child has everything in memory and begins (or goes on) with the first step."""

    kind: Literal["started"] = "started"
    device: str
    precision: str
    total_steps: int
    first_step: int = Field(description="The step that comes next: 1, or more after a resume.")
    train_rows: int
    eval_rows: int
    trainable_parameters: int
    total_parameters: int
    tier: Tier = Field(default="plain", description="packed: rows end to end, without padding; fused: with layers of our own.")
    tier_reason: str = Field(default="", description="Why this tier, for people.")
    example: list[tuple[str, bool]] = Field(description="The first row as it is trained: (text, carries loss) pieces.")


class PhaseChanged(_Event):
    kind: Literal["phase"] = "phase"
    phase: Phase


class Step(_Event):
    """One optimizer step. Memory is in GiB; the allocator's figures are null on a CPU, where `rss_gib` speaks."""

    kind: Literal["step"] = "step"
    step: int
    epoch: float
    loss: float = Field(
        description="Mean over the whole step: nats per trained token, the loss per preference, or of pictures and captions the "
        "nats of finding a pair among the step's others."
    )
    learning_rate: float
    grad_norm: float = Field(description="Global norm before clipping.")
    tokens: int = Field(description="Non-padding tokens of the step.")
    trained_tokens: int
    reward_accuracy: float | None = Field(default=None, description="Preferences: share of pairs whose chosen answer gains more.")
    reward_margin: float | None = Field(default=None, description="Preferences: mean gain of chosen over rejected answers.")
    temperature: float | None = Field(default=None, description="Pairs: what similarities were divided by in this step.")
    alignment: float | None = Field(
        default=None, description="Pairs: mean squared distance of a picture and its caption, 0 to 4; less is nearer."
    )
    uniformity: float | None = Field(
        default=None, description="Pairs: how unevenly features lie, 0 (all in one place) down to -8; of the first 2,048."
    )
    tokens_per_second: float
    step_seconds: float
    eta_seconds: float
    allocated_gib: float | None
    reserved_gib: float | None
    peak_allocated_gib: float | None
    rss_gib: float


class Evaluation(_Event):
    """Held-out loss, and what else is measured, after `step` optimizer steps; step 0 is the model before training.

    Null is what this job does not measure, or what was not measured yet when the event was written.
    """

    kind: Literal["eval"] = "eval"
    step: int
    eval_loss: float = Field(description="As the loss of a step, over all held-out rows; pairs are told from all others of them.")
    eval_perplexity: float | None = Field(default=None, description="e to the eval_loss; null for preferences.")
    eval_trained_tokens: int
    eval_reward_accuracy: float | None = None
    eval_reward_margin: float | None = None
    eval_exact_match: float | None = Field(default=None, description="Share of answers equal to their reference, 0 to 1.")
    eval_bleu: float | None = Field(default=None, description="Corpus BLEU of the answers by sacrebleu, 0 to 100.")
    eval_rouge_l: float | None = Field(default=None, description="Mean F1 of the longest common subsequence of words, 0 to 1.")
    eval_image_to_text_recall_at_1: float | None = Field(
        default=None, description="Share of held-out pictures that find one of their captions first, among all held-out captions."
    )
    eval_image_to_text_recall_at_5: float | None = None
    eval_image_to_text_recall_at_10: float | None = None
    eval_text_to_image_recall_at_1: float | None = Field(
        default=None, description="Share of held-out captions that find their picture first, among all held-out pictures."
    )
    eval_text_to_image_recall_at_5: float | None = None
    eval_text_to_image_recall_at_10: float | None = None
    eval_retention: float | None = Field(
        default=None, description="Mean of the six recalls over the base's own, those left out where the base found nothing."
    )
    eval_kept_direction: float | None = Field(
        default=None, description="Mean cosine of held-out features and the base's for the same inputs; 1 is unmoved."
    )
    row_losses: list[tuple[float, int]] = Field(
        description="Per held-out row, in order: (summed loss, terms); none for pairs, whose loss is no sum."
    )


class Answer(BaseModel):
    """What the model says to a prompt. In an event long texts are cut, and an ellipsis stands for what was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    text: str
    reference: str | None = Field(description="The answer that stands in the data; null for a prompt of the panel.")
    finish_reason: Literal["stop", "length"]


class Answered(_Event):
    """Answers of the model as it is after `step` steps, greedy, to the job's panel or to the first held-out prompts."""

    kind: Literal["answers"] = "answers"
    step: int
    source: Literal["panel", "held_out"]
    answers: list[Answer]


class Judged(_Event):
    """The operator's judge model marked answers of the result. Written by the supervisor, after the child's last word."""

    kind: Literal["judged"] = "judged"
    step: int = Field(description="The run's last step.")
    adapter_step: int = Field(description="The step whose weights the result holds, and gave the answers with.")
    model: str = Field(description="The judge.")
    asked: int = Field(description="Answers to be marked.")
    marked: int = Field(description="Answers that have a mark.")
    judge_score: float = Field(description="Mean of the marks, 1 to 10.")
    scores: list[int | None] = Field(description="Per answer, in the order of the held-out rows; null is no mark.")


class CheckpointWritten(_Event):
    """A checkpoint folder stands closed by its manifest in the run folder; it counts once the record holds it."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    folder: str = Field(description="Relative to the run folder.")


class AdapterWritten(_Event):
    kind: Literal["adapter"] = "adapter"
    step: int
    folder: str = Field(description="Relative to the run folder.")


class Warned(_Event):
    kind: Literal["warning"] = "warning"
    code: str
    message: str


class Ended(_Event):
    """The child's last word; its exit code says the same. The supervisor decides what becomes of the job."""

    kind: Literal["ended"] = "ended"
    reason: Reason
    message: str
    step: int


class StatusChanged(_Event):
    """A job changed its status. Written by the record itself, in the transaction that made the change."""

    kind: Literal["status"] = "status"
    status: JobStatus
    reason: Reason | None = None
    message: str = ""


ChildEvent = Annotated[
    Started | PhaseChanged | Step | Evaluation | Answered | CheckpointWritten | AdapterWritten | Warned | Ended,
    Field(discriminator="kind"),
]
"""What a training child may say."""

TrainEvent = Annotated[
    Started
    | PhaseChanged
    | Step
    | Evaluation
    | Answered
    | CheckpointWritten
    | AdapterWritten
    | Warned
    | Ended
    | Judged
    | StatusChanged,
    Field(discriminator="kind"),
]
"""What a job's history may hold."""

_child_event: TypeAdapter[Any] = TypeAdapter(ChildEvent)
_train_event: TypeAdapter[Any] = TypeAdapter(TrainEvent)

METRICS: dict[str, tuple[str, ...]] = {
    "step": (
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "reward_accuracy",
        "reward_margin",
        "temperature",
        "alignment",
        "uniformity",
        "tokens_per_second",
        "step_seconds",
        "eta_seconds",
        "allocated_gib",
        "reserved_gib",
        "peak_allocated_gib",
        "rss_gib",
    ),
    "eval": (
        "eval_loss",
        "eval_perplexity",
        "eval_trained_tokens",
        "eval_reward_accuracy",
        "eval_reward_margin",
        "eval_exact_match",
        "eval_bleu",
        "eval_rouge_l",
        "eval_image_to_text_recall_at_1",
        "eval_image_to_text_recall_at_5",
        "eval_image_to_text_recall_at_10",
        "eval_text_to_image_recall_at_1",
        "eval_text_to_image_recall_at_5",
        "eval_text_to_image_recall_at_10",
        "eval_retention",
        "eval_kept_direction",
    ),
    "judged": ("judge_score",),
}
"""Event kind -> its fields that are curves over `step`, as `GET /jobs/{id}/metrics` names them."""


def parse_child_event(line: str | bytes) -> "ChildEvent":
    """One line of the child's pipe. Raises pydantic.ValidationError on anything else."""
    event: ChildEvent = _child_event.validate_json(line)
    return event


def parse_event(stored: dict[str, Any]) -> "TrainEvent":
    """A stored event as today's type."""
    event: TrainEvent = _train_event.validate_python(stored)
    return event


def metrics_of(event: "TrainEvent") -> dict[str, float]:
    """The curve values an event carries; empty for kinds without any."""
    names = METRICS.get(event.kind, ())
    return {name: float(value) for name in names if (value := getattr(event, name)) is not None}
