"""The one Settings class: the only reader of the environment. docs/settings.md describes every field (a test compares).

Names: the conventional one where there is one (DATABASE_URL, REDIS_URL, STORAGE_URL), else STROP_...; a `.env` file is read
too. Secrets come from files, so that they stand in no environment, argv or log.
"""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _env(name: str, default: Any, description: str) -> Any:
    return Field(default=default, validation_alias=AliasChoices(name), description=description)


class Settings(BaseSettings):
    # A refusal does not repeat what it refuses: it may hold a password.
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True)

    home: Path = _env("STROP_HOME", Path(".strop"), "Folder of all embedded data: databases, files, logs, the first key.")
    database_url: str = _env("DATABASE_URL", "", "PostgreSQL 15 or newer, as postgresql+psycopg://user@host/database.")
    database_password_file: Path | None = _env(
        "STROP_DATABASE_PASSWORD_FILE", None, "File with the database password, where DATABASE_URL holds none."
    )
    redis_url: str = _env("REDIS_URL", "redis://127.0.0.1:6379/0", "Redis 6.2 or newer: the Celery broker and live streams.")
    redis_password_file: Path | None = _env(
        "STROP_REDIS_PASSWORD_FILE", None, "File with the Redis password, where REDIS_URL holds none."
    )
    storage_url: str = _env(
        "STORAGE_URL",
        "",
        "Folder, or s3://bucket/prefix, of datasets, checkpoints and adapters; default $STROP_HOME/files.",
    )
    pepper_file: Path | None = _env(
        "STROP_PEPPER_FILE", None, "File with the secret that API keys are hashed with; default $STROP_HOME/pepper."
    )
    models: Path | None = _env(
        "STROP_MODELS", None, "Folder scanned for base models, one model folder each; default $STROP_HOME/models."
    )
    hub: bool = _env("STROP_HUB", False, "1: `store.admin models add` may fetch a model from the Hugging Face hub.")
    scratch: Path | None = _env("STROP_SCRATCH", None, "Local work folder of runs and caches; default $STROP_HOME/scratch.")

    lease_seconds: float = _env("STROP_LEASE_SECONDS", 60.0, "A worker that has not renewed for so long has lost its job.")
    heartbeat_seconds: float = _env("STROP_HEARTBEAT_SECONDS", 10.0, "How often a worker renews its lease.")
    flush_seconds: float = _env("STROP_FLUSH_SECONDS", 1.0, "How often a run's events go to Postgres; Redis has them at once.")
    sweep_seconds: float = _env("STROP_SWEEP_SECONDS", 5.0, "How often the sweeper looks for lost bells and dead runs.")
    bell_seconds: float = _env("STROP_BELL_SECONDS", 30.0, "A bell unanswered for so long is rung again.")
    orphan_seconds: float = _env(
        "STROP_ORPHAN_SECONDS", 900.0, "A run that can't reach Postgres trains on for so long, then stops."
    )
    stop_seconds: float = _env("STROP_STOP_SECONDS", 30.0, "Grace for a child asked to stop, before it is killed.")
    gpu_budget_gib: float | None = _env(
        "STROP_GPU_BUDGET_GIB", None, "GPU memory a run may plan with; default: the card minus serving's share."
    )

    bases: Annotated[tuple[str, ...], NoDecode] = _env(
        "STROP_BASES",
        (),
        "Bases an endpoint serves, comma separated: name[:nf4|:nf4-double|:fp4|:fp4-double|:int8|:fp8][:bf16|:fp16|:fp32].",
    )
    serving_gpu_gib: float | None = _env(
        "STROP_SERVING_GPU_GIB", None, "GPU memory the endpoint may take; default 0.9 of the card."
    )
    serving_kv_gib: float = _env(
        "STROP_SERVING_KV_GIB", 2.0, "Of it, what keys and values of running requests may take, per base or full model."
    )
    serving_adapter_gib: float = _env(
        "STROP_SERVING_ADAPTER_GIB",
        2.0,
        "Of it, what LoRA adapters that are asked may take, per base; others wait in RAM.",
    )
    serving_host_gib: float = _env(
        "STROP_SERVING_HOST_GIB",
        16.0,
        "RAM that LoRA adapters may take beside a GPU, per base; others are read again from their files when they are asked.",
    )
    serving_running: int = _env("STROP_SERVING_RUNNING", 64, "Requests that one base answers at once.")
    poll_seconds: float = _env("STROP_POLL_SECONDS", 5.0, "How often an endpoint looks for deployments it was not notified of.")
    endpoint_name: str = _env("STROP_ENDPOINT_NAME", "endpoint", "Name an endpoint signs its receipts with.")

    judge_url: str = _env(
        "STROP_JUDGE_URL", "", "Base URL of an OpenAI-compatible API that marks answers, as http://host:8001/v1; none: no judge."
    )
    judge_model: str = _env("STROP_JUDGE_MODEL", "", "The judge's name at that address; goes with STROP_JUDGE_URL.")
    judge_key_file: Path | None = _env("STROP_JUDGE_KEY_FILE", None, "File with the judge's API key, where it asks for one.")
    judge_seconds: float = _env(
        "STROP_JUDGE_SECONDS", 60.0, "A mark that takes longer is given up; all of a run's, after 8 times that."
    )

    upload_max_bytes: int = _env("STROP_UPLOAD_MAX_BYTES", 10 << 30, "Largest dataset file accepted.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = _env(
        "STROP_ALLOWED_HOSTS", (), "Host names answered besides localhost, comma separated; `*` answers any."
    )

    @field_validator("bases", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _judge_is_whole(self) -> Self:
        if bool(self.judge_url) != bool(self.judge_model):
            raise ValueError("STROP_JUDGE_URL and STROP_JUDGE_MODEL go together: set both, or neither")
        if self.judge_key_file is not None and not self.judge_url:
            raise ValueError("STROP_JUDGE_KEY_FILE is set, and no judge: set STROP_JUDGE_URL and STROP_JUDGE_MODEL too")
        if self.judge_url and not _is_base_url(self.judge_url):
            raise ValueError("STROP_JUDGE_URL must be http(s)://host[:port][/path]; a key belongs in STROP_JUDGE_KEY_FILE")
        if not 0 < self.judge_seconds <= 3600:
            raise ValueError("STROP_JUDGE_SECONDS must be above 0 and at most 3600")
        return self

    @property
    def storage(self) -> str:
        return self.storage_url or str((self.home / "files").absolute())

    @property
    def models_folder(self) -> Path:
        return (self.models or self.home / "models").absolute()

    @property
    def scratch_folder(self) -> Path:
        return (self.scratch or self.home / "scratch").absolute()

    @property
    def has_judge(self) -> bool:
        return bool(self.judge_url)

    @property
    def pepper(self) -> bytes:
        """The HMAC key of API keys. Raises FileNotFoundError with the path when the file is missing."""
        return (self.pepper_file or self.home / "pepper").read_bytes().strip()


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port_is_number = parts.port is None or parts.port > 0
    except ValueError:
        return False
    is_plain = "@" not in parts.netloc and not parts.query and not parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port_is_number and is_plain


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read once."""
    return Settings()
