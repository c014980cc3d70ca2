"""The hand-over between the worker's processes and the children they start: files in a work folder, nothing else.

`python -m core.train RUN_DIR` reads `run.json` (RunInput) and leaves `checkpoints/step-<n>/` and `adapter/`;
`python -m core.prepare WORK_DIR` reads `prepare.json` (PrepareInput) and leaves what its kind names. A child opens no
network connection, database or path that is not named here.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from core.records import TokenCounts
from core.spec import DataSpec, JobSpec, SftObjective

RUN_FILE = "run.json"
PREPARE_FILE = "prepare.json"
REPORT_FILE = "report.json"
ROWS_FILE = "rows.jsonl"
COUNTS_FILE = "counts.json"
TOKENS_FOLDER = "tokens"
LOG_FILE = "log"

TOKEN_CACHE_KIND = "tokens"
CHECKPOINT_KIND = "checkpoint"


class _HandOver(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenCacheRef(_HandOver):
    dataset_id: str
    folder: Path
    weight: float


class RunInput(_HandOver):
    """Everything a training child may know. Paths are local and absolute."""

    job_id: str
    attempt: int
    spec: JobSpec
    model_folder: Path
    model_weights: str = Field(description="Digest the registry holds for the base model; the adapter is bound to it.")
    token_caches: list[TokenCacheRef]
    resume_from: Path | None = Field(description="A checkpoint folder, already verified against its manifest.")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ValidateInput(_HandOver):
    """Parse an upload. Leaves report.json (DatasetReport) and rows.jsonl (one {"row": n, "messages": [...]} per usable row)."""

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
    train_on: Literal["last_turn", "all_turns"]


PrepareInput = Annotated[ValidateInput | TokenizeInput, Field(discriminator="kind")]
_prepare_input: TypeAdapter[ValidateInput | TokenizeInput] = TypeAdapter(PrepareInput)


def read_run_input(run_dir: Path) -> RunInput:
    return RunInput.model_validate_json((run_dir / RUN_FILE).read_bytes())


def read_prepare_input(work_dir: Path) -> ValidateInput | TokenizeInput:
    return _prepare_input.validate_json((work_dir / PREPARE_FILE).read_bytes())


def read_counts(work_dir: Path) -> TokenCounts:
    return TokenCounts.model_validate_json((work_dir / COUNTS_FILE).read_bytes())


RENDERER_VERSION = 1
"""Raised when the renderer would make other tokens from the same rows: old caches are then no longer found."""


def token_key(dataset_sha256: str, tokenizer_digest: str, data: DataSpec, objective: SftObjective) -> str:
    """Name of a token cache: a digest of everything the tokens of one dataset depend on."""
    parts = [
        RENDERER_VERSION,
        dataset_sha256,
        tokenizer_digest,
        data.template,
        data.max_length,
        objective.train_on,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
