"""The hand-over between the worker's processes and the children they start: files in a work folder, nothing else.

`python -m core.train RUN_DIR` reads `run.json` (RunInput) and leaves `checkpoints/step-<n>/`, `adapter/` and, where a judge is
asked for, `answers.jsonl` (core.events.Answer, a line each); `python -m core.prepare WORK_DIR` reads `prepare.json`
(PrepareInput) and leaves what its kind names. A child opens no network connection, database or path that is not named here.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from core.records import TokenCounts
from core.spec import DATA_KINDS, PICTURE_KINDS, DataKind, DataSpec, JobSpec, Objective, SftObjective

RUN_FILE = "run.json"
ANSWERS_FILE = "answers.jsonl"
PREPARE_FILE = "prepare.json"
REPORT_FILE = "report.json"
ROWS_FILE = "rows.jsonl"
COUNTS_FILE = "counts.json"
TOKENS_FOLDER = "tokens"
PICTURES_FOLDER = "pictures"
LOG_FILE = "log"

JUDGED_ANSWERS = 64
"""At most so many answers are written for the judge model: each is a call, and the worker waits for it."""

TOKEN_CACHE_KIND = "tokens"
PICTURE_CACHE_KIND = "pictures"
CHECKPOINT_KIND = "checkpoint"

TrainOn = Literal["last_turn", "all_turns", "everything"]
"""Which tokens of a row carry loss, as `SftObjective.train_on` says."""


class _HandOver(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenCacheRef(_HandOver):
    dataset_id: str
    folder: Path
    pictures: Path | None = Field(default=None, description="The picture cache of the same rows, where they have pictures.")
    weight: float


class RunInput(_HandOver):
    """Everything a training child may know. Paths are local and absolute."""

    job_id: str
    attempt: int
    spec: JobSpec
    model_folder: Path
    model_weights: str = Field(description="Digest the registry holds for the base model; the adapter is bound to it.")
    allow_remote_code: bool = Field(
        default=False, description="The operator registered the model with the code in its folder. No spec can say so."
    )
    token_caches: list[TokenCacheRef]
    rows_at_once: int | None = Field(
        default=None, description="What batch.micro_batch_size auto comes to on this worker; it may differ between attempts."
    )
    resume_from: Path | None = Field(description="A checkpoint folder, already verified against its manifest.")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ValidateInput(_HandOver):
    """Parse an upload. Leaves report.json (DatasetReport) and rows.jsonl (core.data.rows), a line per usable row."""

    kind: Literal["validate"] = "validate"
    upload: Path
    filename: str


class TokenizeInput(_HandOver):
    """Tokenise parsed rows. Leaves the closed folder tokens/ (a token cache) and counts.json (TokenCounts)."""

    kind: Literal["tokenize"] = "tokenize"
    dataset_id: str
    rows: Path
    model_folder: Path
    template: Literal["model", "chatml", "alpaca"]
    max_length: int
    data_kind: DataKind = "conversation"
    train_on: TrainOn = Field(description="Asked of conversations; preferences train their last turn, texts everything.")
    new_tokens: list[str] = Field(default_factory=list, description="Added to the model's tokenizer, as DataSpec has them.")


class PicturesInput(_HandOver):
    """Bring the pictures that rows name to the size a model takes. Leaves the closed folder pictures/ (a picture cache)."""

    kind: Literal["pictures"] = "pictures"
    dataset_id: str
    upload: Path
    rows: Path
    model_folder: Path


PrepareInput = Annotated[ValidateInput | TokenizeInput | PicturesInput, Field(discriminator="kind")]
_prepare_input: TypeAdapter[ValidateInput | TokenizeInput | PicturesInput] = TypeAdapter(PrepareInput)


def read_run_input(run_dir: Path) -> RunInput:
    return RunInput.model_validate_json((run_dir / RUN_FILE).read_bytes())


def read_prepare_input(work_dir: Path) -> ValidateInput | TokenizeInput | PicturesInput:
    return _prepare_input.validate_json((work_dir / PREPARE_FILE).read_bytes())


def read_counts(work_dir: Path) -> TokenCounts:
    return TokenCounts.model_validate_json((work_dir / COUNTS_FILE).read_bytes())


DECODER_VERSION = 1
"""Raised when decoding or resizing would make other pixels from the same files: old caches are then no longer found."""

RENDERER_VERSION = 1
"""Raised when the renderer would make other tokens from the same rows: old caches are then no longer found."""


def wanted_tokens(objective: Objective) -> tuple[DataKind, TrainOn]:
    """The rows that an objective trains on, and which of their tokens carry loss: all that the preparer needs of it."""
    kind = DATA_KINDS[objective.kind]
    if isinstance(objective, SftObjective):
        return kind, objective.train_on
    return kind, "last_turn" if kind == "preference" else "everything"


def token_key(dataset_sha256: str, tokenizer_digest: str, data: DataSpec, objective: Objective) -> str:
    """Name of a token cache: a digest of everything the tokens of one dataset depend on.

    The objective's own settings are not among it, so dpo and orpo, or two values of beta, share their tokens.
    """
    kind, train_on = wanted_tokens(objective)
    parts = [
        RENDERER_VERSION,
        dataset_sha256,
        tokenizer_digest,
        data.template,
        data.max_length,
        train_on if kind == "conversation" else kind,
        *([data.new_tokens] if data.new_tokens else []),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def picture_key(dataset_sha256: str, processor_digest: str | None, objective: Objective) -> str | None:
    """Name of a picture cache, likewise: of one dataset as one image processor makes its pictures. None for rows of text.

    `processor_digest` is None for a model that takes no pictures.
    """
    if DATA_KINDS[objective.kind] not in PICTURE_KINDS or processor_digest is None:
        return None
    parts = [DECODER_VERSION, dataset_sha256, processor_digest]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
