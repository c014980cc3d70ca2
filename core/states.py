"""Where a job stands, and why it ended. Every status, transition and reason of the service is written here once.

A *status* says where (OpenAI's fine-tuning words); a *reason* says why. The reason itself knows the final status, whether
another attempt may follow, the child's exit code and what the user reads, so nothing else needs to decide any of that.
Transitions are applied by `store/jobs.py` alone, as `UPDATE ... WHERE status = :from`.
"""

from dataclasses import dataclass
from enum import StrEnum


class JobStatus(StrEnum):
    """A job: what a user asked for."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})

JOB_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class RunStatus(StrEnum):
    """A run: one attempt at a job."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    DRAINED = "drained"


class DatasetStatus(StrEnum):
    """An uploaded dataset. `uploaded` bytes are stored and untouched; the preparer moves them on."""

    UPLOADED = "uploaded"
    READY = "ready"
    FAILED = "failed"


class Phase(StrEnum):
    """Finer than a status, for people who watch: what a run is doing right now."""

    PREPARING = "preparing"
    LOADING = "loading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"


class Retry(StrEnum):
    """May another attempt follow a run that ended so?"""

    NEVER = "never"
    ONCE = "once"  # unknown faults: one more attempt, counted against the user's tries
    INFRASTRUCTURE = "infrastructure"  # the service's fault: resumed, given up as `poison` after MAX_LOST
    ALWAYS = "always"  # a clean stop for the service's own sake: counts against nothing


MAX_LOST = 3
"""A job that lost this many workers is given up as `poison`: it would take down the next one too."""


@dataclass(frozen=True)
class ReasonFacts:
    run: RunStatus
    job: JobStatus  # the status when no further attempt follows
    retry: Retry
    exit_code: int | None  # of the child `python -m core.train`; None: not decided by the child
    sentence: str


class Reason(StrEnum):
    """Why a run or job ended. The codes are stable: clients may branch on them."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    DRAINED = "drained"
    BAD_SPEC = "bad_spec"
    BAD_DATA = "bad_data"
    NO_TRAINABLE_TOKENS = "no_trainable_tokens"
    NUMERICAL_DIVERGENCE = "numerical_divergence"
    LOSS_IS_ZERO = "loss_is_zero"
    GRADIENT_EXPLOSION = "gradient_explosion"
    LOSS_DOES_NOT_MOVE = "loss_does_not_move"
    CUDA_OOM = "cuda_oom"
    BAD_ARTIFACT = "bad_artifact"
    LOST = "lost"
    POISON = "poison"
    INTERNAL_ERROR = "internal_error"

    @property
    def facts(self) -> ReasonFacts:
        return REASONS[self]


REASONS: dict[Reason, ReasonFacts] = {
    Reason.FINISHED: ReasonFacts(
        RunStatus.SUCCEEDED, JobStatus.SUCCEEDED, Retry.NEVER, 0, "Training finished and its result was published."
    ),
    Reason.CANCELLED: ReasonFacts(
        RunStatus.CANCELLED, JobStatus.CANCELLED, Retry.NEVER, None, "The job was cancelled on request."
    ),
    Reason.DRAINED: ReasonFacts(
        RunStatus.DRAINED,
        JobStatus.QUEUED,
        Retry.ALWAYS,
        10,
        "The worker was asked to stop; the job goes on from its last checkpoint.",
    ),
    Reason.BAD_SPEC: ReasonFacts(
        RunStatus.FAILED, JobStatus.FAILED, Retry.NEVER, 11, "The job asks for something this model or engine can't do."
    ),
    Reason.BAD_DATA: ReasonFacts(RunStatus.FAILED, JobStatus.FAILED, Retry.NEVER, 12, "The dataset can't be used for this job."),
    Reason.NO_TRAINABLE_TOKENS: ReasonFacts(
        RunStatus.FAILED,
        JobStatus.FAILED,
        Retry.NEVER,
        13,
        "No row keeps a token to train on: raise data.max_length or mend the rows without an answer.",
    ),
    Reason.NUMERICAL_DIVERGENCE: ReasonFacts(
        RunStatus.FAILED,
        JobStatus.FAILED,
        Retry.NEVER,
        14,
        "Loss or gradient stopped being a finite number: lower optim.learning_rate, or use bf16 or fp32 precision.",
    ),
    Reason.CUDA_OOM: ReasonFacts(
        RunStatus.FAILED,
        JobStatus.FAILED,
        Retry.NEVER,
        15,
        "The GPU ran out of memory: lower batch.micro_batch_size or data.max_length, or turn on memory.checkpointing.",
    ),
    Reason.LOSS_IS_ZERO: ReasonFacts(
        RunStatus.FAILED,
        JobStatus.FAILED,
        Retry.NEVER,
        16,
        "The loss was exactly 0 step after step, so nothing was learned: look at the started event's example of what is "
        "trained on, and use bf16 or fp32 precision.",
    ),
    Reason.GRADIENT_EXPLOSION: ReasonFacts(
        RunStatus.FAILED,
        JobStatus.FAILED,
        Retry.NEVER,
        17,
        "The gradient grew a thousandfold and stayed so: lower optim.learning_rate, raise schedule.warmup_steps, or use bf16 "
        "or fp32 precision.",
    ),
    Reason.LOSS_DOES_NOT_MOVE: ReasonFacts(
        RunStatus.FAILED,
        JobStatus.FAILED,
        Retry.NEVER,
        18,
        "The loss stayed the same over ever new rows, so nothing was learned: raise optim.learning_rate, or try fp32 precision "
        "and batch.packing off.",
    ),
    Reason.BAD_ARTIFACT: ReasonFacts(
        RunStatus.FAILED,
        JobStatus.FAILED,
        Retry.ONCE,
        None,
        "What the run produced did not verify against its manifest.",
    ),
    Reason.LOST: ReasonFacts(RunStatus.LOST, JobStatus.FAILED, Retry.INFRASTRUCTURE, None, "The worker went away in mid-run."),
    Reason.POISON: ReasonFacts(
        RunStatus.LOST,
        JobStatus.FAILED,
        Retry.NEVER,
        None,
        f"The job took its worker down {MAX_LOST} times and was given up.",
    ),
    Reason.INTERNAL_ERROR: ReasonFacts(
        RunStatus.FAILED, JobStatus.FAILED, Retry.ONCE, 1, "The engine failed; the run's log has the traceback."
    ),
}

EXIT_REASONS: dict[int, Reason] = {facts.exit_code: reason for reason, facts in REASONS.items() if facts.exit_code is not None}
"""Exit code of the child -> reason. A code that is not here (a signal, 137) reads as `internal_error`."""
