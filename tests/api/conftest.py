"""A control plane on a real socket, over its own database, Redis and storage; and rows to ask it about."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from api.app import create_app
from core.adapter import AdapterFacts, BaseIdentity
from core.events import Evaluation, Step, TrainEvent
from core.model_folder import ModelFacts
from core.records import DatasetReport, TokenCounts
from store import jobs, keys, models, preparation, runs
from store.db import Database
from store.files import Storage
from store.settings import Settings
from store.tables import DEFAULT_PROJECT, Project
from tests.conftest import RedisServer, free_port

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
ROWS = b"".join(json.dumps({"instruction": f"Add {n}.", "input": "", "output": str(n)}).encode() + b"\n" for n in range(12))
OTHER_PROJECT = "prj_other"


@dataclass
class Plane:
    """A running control plane and the ways into its record."""

    url: str
    settings: Settings
    database: Database
    storage: Storage
    redis_server: RedisServer
    _clients: list[httpx.Client] = field(default_factory=list)

    def token(self, *scopes: str, project: str = DEFAULT_PROJECT, lifetime: timedelta | None = None) -> str:
        with self.database.transaction() as session:
            wanted = list(scopes) or [keys.ADMIN]
            _, token = keys.create_key(session, self.settings.pepper, project, name="test", scopes=wanted, lifetime=lifetime)
        return token

    def client(self, *scopes: str, project: str = DEFAULT_PROJECT) -> httpx.Client:
        return self.client_of(self.token(*scopes, project=project))

    def client_of(self, token: str | None) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)
        self._clients.append(client)
        return client

    def upload(self, client: httpx.Client, data: bytes = ROWS, filename: str = "rows.jsonl", **fields: str) -> httpx.Response:
        return client.post("/datasets", data=fields, files={"file": (filename, data)})

    def ready_dataset(self, client: httpx.Client, format_name: str = "alpaca") -> str:
        dataset_id: str = self.upload(client).json()["id"]
        self.validate(dataset_id, format_name=format_name)
        return dataset_id

    def validate(self, dataset_id: str, usable_rows: int = 12, format_name: str = "alpaca") -> None:
        """What the preparer does."""
        kind = {"preference": "preference", "text": "text"}.get(format_name, "conversation")
        report = DatasetReport(
            **{"format": format_name, "kind": kind, "rows": 12, "usable_rows": usable_rows},
            **{"error_count": 0, "warning_count": 0, "errors": [], "warnings": []},
        )
        with self.database.transaction() as session:
            claim = preparation.claim_dataset(session, dataset_id, boot_id="p", lease_seconds=60)
            assert claim is not None
            preparation.finish_dataset(session, claim, report)

    def spec(self, dataset_id: str, **fields: Any) -> dict[str, Any]:
        return {"base_model": "tiny", "data": {"datasets": [{"dataset_id": dataset_id}], "max_length": 64}} | fields

    def job(self, client: httpx.Client, **fields: Any) -> str:
        answer = client.post("/jobs", json=self.spec(self.ready_dataset(client), **fields))
        assert answer.status_code == 201, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def prepare(self, job_id: str) -> None:
        with self.database.transaction() as session:
            claim = preparation.claim_job(session, job_id, boot_id="p", lease_seconds=60)
            assert claim is not None
            for missing in claim.missing:
                preparation.record_tokens(session, claim, missing, counts(missing.dataset_id))
            preparation.queue_job(session, claim)

    def claim(self, job_id: str) -> runs.Claim:
        with self.database.transaction() as session:
            claim = runs.claim_run(session, job_id, boot_id="w", worker="host", lease_seconds=60)
        assert claim is not None
        return claim

    def running(self, client: httpx.Client, **fields: Any) -> runs.Claim:
        job_id = self.job(client, **fields)
        self.prepare(job_id)
        return self.claim(job_id)

    def finish(self, claim: runs.Claim, sha256: str = "f" * 64) -> None:
        facts = AdapterFacts(
            tuning="lora",
            base=BaseIdentity(model="tiny", weights="w"),
            job_id=claim.job_id,
            attempt=claim.attempt,
            step=3,
            rank=8,
            template="t",
            eval_loss=1.5,
        )
        with self.database.transaction() as session:
            runs.finish_run(session, claim, runs.Result(sha256, 10, facts), "done")

    def record(self, claim: runs.Claim, *events: TrainEvent) -> None:
        with self.database.transaction() as session:
            runs.record_events(session, claim, list(events))

    def job_status(self, job_id: str) -> str:
        with self.database.transaction() as session:
            return jobs.find_job(session, DEFAULT_PROJECT, job_id).status

    def files(self) -> list[str]:
        """Everything that lies in the storage and the upload folder."""
        roots = [Path(self.settings.storage), self.settings.scratch_folder / "uploads"]
        return sorted(path.name for root in roots for path in root.rglob("*") if path.is_file())


def counts(dataset_id: str, **fields: Any) -> TokenCounts:
    numbers = {"rows": 12, "tokens": 300, "trained_tokens": 100, "truncated_rows": 0, "rows_without_target": 0, "longest": 30}
    return TokenCounts(dataset_id=dataset_id, **(numbers | fields))


def step(seq: int, number: int, loss: float = 1.0) -> Step:
    ones = dict.fromkeys(
        ("epoch", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "eta_seconds", "rss_gib"), 1.0
    )
    nothing = dict.fromkeys(("allocated_gib", "reserved_gib", "peak_allocated_gib"))
    return Step(seq=seq, step=number, loss=loss, tokens=9, trained_tokens=5, **ones, **nothing)


def evaluation(seq: int, number: int, loss: float = 2.0) -> Evaluation:
    return Evaluation(seq=seq, step=number, eval_loss=loss, eval_perplexity=7.4, eval_trained_tokens=50, row_losses=[(1.0, 5)])


def model_facts(weights: str = "w" * 64, **fields: Any) -> ModelFacts:
    rest = {"architecture": "LlamaForCausalLM", "parameters": 100_000, "context_length": 512, "config": CONFIG}
    return ModelFacts(weights=weights, tokenizer="t" * 64, has_chat_template=True, **(rest | fields))


@contextmanager
def serve(settings: Settings) -> Iterator[str]:
    """A uvicorn in a thread of this process; its URL."""
    port = free_port()
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "uvicorn ended while starting"
            assert time.monotonic() < deadline, "uvicorn does not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def plane(settings: Settings, database: Database, redis_server: RedisServer) -> Iterator[Plane]:
    with database.transaction() as session:
        session.add(Project(id=OTHER_PROJECT, name="other"))
        session.flush()
        models.register_model(session, "tiny", "tiny", model_facts())
        models.register_model(session, "org/Small", "org/Small", model_facts("x" * 64, context_length=2048))
    with serve(settings) as url:
        storage = Storage(settings.storage, settings.scratch_folder / "cache")
        plane = Plane(url, settings, database, storage, redis_server)
        yield plane
        for client in plane._clients:
            client.close()


@pytest.fixture
def client(plane: Plane) -> httpx.Client:
    """May do everything."""
    return plane.client()


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The body of an error, checked to be one."""
    assert answer.status_code == status, f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}"
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["instance"] == answer.headers["x-request-id"]
    assert set(body) == {"type", "title", "status", "detail", "instance", "errors", "error_count"}
    return body


def places(body: dict[str, Any]) -> set[tuple[str, str]]:
    """(code, pointer or field) of every reason."""
    return {(error["code"], error.get("pointer") or error.get("field") or "") for error in body["errors"]}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
